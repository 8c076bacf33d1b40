"""Forms of w8a16.cu that a sweep measures: those that may be chosen, and others."""

from __future__ import annotations

from typing import Any

import torch

from halfweight.kernels.cuda import backend, schedule, tiles
from halfweight.kernels.cuda.card import Card
from halfweight.kernels.cuda.tiles import Shape

Plan = schedule.Plan[Any]

TRIED = (
    Shape(1, 1, 1, 1, 8, 1, blocks=2),
    Shape(2, 2, 4, 1, 2, 1, blocks=2),
    Shape(2, 4, 2, 1, 2, 1, blocks=3),
    Shape(2, 4, 4, 1, 1, 2, blocks=3),
    Shape(2, 4, 4, 1, 1, 2, blocks=3, scaled=True),
    Shape(4, 4, 4, 1, 1, 2, blocks=2, scaled=True),
    Shape(2, 8, 4, 1, 1, 2, blocks=3, scaled=True),
    Shape(4, 8, 4, 1, 1, 2, blocks=2, scaled=True),
    Shape(4, 8, 4, 2, 1, 2, scaled=True),
    Shape(4, 8, 4, 1, 2, 1, scaled=True),
    Shape(4, 8, 8, 1, 1, 2, scaled=True),
    Shape(2, 16, 4, 1, 1, 2, blocks=2, scaled=True),
    Shape(4, 8, 2, 2, 1, 2, blocks=2, scaled=True),
)
"""Forms of w8a16.cu that are measured beside those that may be chosen."""


def plans(tokens: int, shape: tuple[int, int], card: Card) -> list[Plan]:
    """Every schedule of every form whose tiles cover the tokens once or twice."""
    shapes = (*tiles.SHAPES, *TRIED)
    sizes = sorted({shape.tokens for shape in shapes})
    covering = next((size for size in sizes if size >= tokens), sizes[-1])
    forms = [tiles.form_on(card, s) for s in shapes if covering <= 2 * s.tokens <= 2 * covering]
    return [
        plan
        for form in forms
        if form.stages >= 2
        for plan in schedule.plans(form, tokens, *shape, card)
    ]


def choices(tokens: int, shape: tuple[int, int], card: Card) -> list[Plan]:
    """Every schedule of every form that may be chosen for such a product."""
    forms = tiles.forms(card, tokens, scaled=True)
    return [plan for form in forms for plan in schedule.plans(form, tokens, *shape, card)]


def text(plan: Plan, architecture: str) -> tuple[str, str]:
    """The text of a plan's kernel."""
    return backend.source(plan.config, 128, torch.uint8, torch.float16), architecture
