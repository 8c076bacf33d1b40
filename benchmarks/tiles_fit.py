"""What the models of tiles may be fitted by: today's constants, others near them, and their use."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar
from unittest import mock

from halfweight.kernels.cuda import tiles as sm80
from halfweight.kernels.cuda.tiles import Shape
from halfweight.kernels.hopper import tiles as hopper
from halfweight.kernels.hopper.tiles import Config, Int8, Small

SM80_CONSTANTS = (
    "TILE_US",
    "SHARE_US",
    "SUM_US",
    "EVEN_SHARE",
    "LATENCY_US",
    "WAIT_US",
    "PRODUCTS",
    "INSTRUCTIONS",
    "BANKS",
    "BOTH",
)

MOST_FACTOR = 1.3
"""Of a shape: how far it may be from the model."""
FIRST_STEP, LAST_STEP = 0.2, 0.02
"""Of a constant, as a part of it."""

Constants = TypeVar("Constants")


@dataclass(frozen=True)
class Model(Generic[Constants]):
    """A family's model: its constants of today; some of them multiplied by factors drawn; a place
    to use them in; lines that tell them.
    """

    today: Callable[[], Constants]
    near: Callable[[Constants, Callable[[], float], random.Random], Constants]
    using: Callable[[Constants], AbstractContextManager[Any]]
    told: Callable[[Constants], Iterable[str]]


def fit(
    model: Model[Constants], penalty: Callable[[], float], tries: int, seed: int = 0
) -> Constants:
    """Constants near those of today under which `penalty` is least; steps become smaller."""
    chance, best, least = random.Random(seed), model.today(), penalty()
    for i in range(tries):
        spread = FIRST_STEP * (LAST_STEP / FIRST_STEP) ** (i / tries)
        tried = model.near(best, lambda: math.exp(chance.gauss(0, spread)), chance)  # noqa: B023
        with model.using(tried):
            found = penalty()
        if found < least:
            best, least = tried, found
    return best


def hopper_today() -> tuple[Config, ...]:
    """All configurations, with the times of their stages."""
    return (*hopper.SMALL, *hopper.LARGE, *hopper.INT8)


def with_times(configs: Sequence[Config], factors: Mapping[Config, float]) -> tuple[Config, ...]:
    """The configurations, their stages slower by factors."""
    return tuple(replace(c, block_us=round(c.block_us * factors[c], 3)) for c in configs)


def hopper_near(
    configs: tuple[Config, ...], factor: Callable[[], float], chance: random.Random
) -> tuple[Config, ...]:
    """Two stage times changed."""
    factors = dict.fromkeys(configs, 1.0)
    for config in chance.sample(configs, 2):
        factors[config] = factor()
    return with_times(configs, factors)


def hopper_using(configs: Sequence[Config]) -> AbstractContextManager[Any]:
    """Choose among these instead."""
    small = tuple(c for c in configs if isinstance(c, Small))
    int8 = tuple(c for c in configs if isinstance(c, Int8))
    large = tuple(c for c in configs if not isinstance(c, Int8 | Small))
    return mock.patch.multiple(hopper, SMALL=small, LARGE=large, INT8=int8)


@dataclass(frozen=True)
class Sm80:
    """Constants of kernels/cuda/tiles.py by name, and its shapes with their factors."""

    values: Mapping[str, float]
    shapes: tuple[Shape, ...]


def sm80_today() -> Sm80:
    """As the module has them."""
    return Sm80({name: getattr(sm80, name) for name in SM80_CONSTANTS}, sm80.SHAPES)


def sm80_near(of: Sm80, factor: Callable[[], float], chance: random.Random) -> Sm80:
    """One to three constants or shapes' factors changed; factors stay near 1."""
    values, shapes = dict(of.values), list(of.shapes)
    for _ in range(chance.randint(1, 3)):
        if chance.random() < 0.5:
            name = chance.choice(SM80_CONSTANTS)
            values[name] = round(values[name] * factor(), 5)
        else:
            i = chance.randrange(len(shapes))
            changed = round(shapes[i].factor * factor(), 3)
            shapes[i] = replace(shapes[i], factor=min(MOST_FACTOR, max(1 / MOST_FACTOR, changed)))
    return Sm80(values, tuple(shapes))


def sm80_using(of: Sm80) -> AbstractContextManager[Any]:
    """Estimate by these instead."""
    return mock.patch.multiple(sm80, SHAPES=of.shapes, **of.values)


def sm80_told(of: Sm80) -> list[str]:
    """Lines to put into kernels/cuda/tiles.py."""
    return [*(f"{name} = {value}" for name, value in of.values.items()), *map(str, of.shapes)]


HOPPER = Model(hopper_today, hopper_near, hopper_using, lambda configs: map(str, configs))
SM80 = Model(sm80_today, sm80_near, sm80_using, sm80_told)
