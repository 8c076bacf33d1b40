"""INT8 weights on their way to a device while the model that will hold them is built.

The headers say all there is to know of a packed weight, so its place on the device is allocated and
being filled before transformers has begun to build modules: that is a second or less of Python,
which needs the processor, and this is reading, which does not. On the CPU nothing is read, a
weight is a view of its file.

Scales come first, as the file has them. While the weights follow they become one byte each where
they lie on a grid8 grid, and leave memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor

from halfweight.checkpoint.headers import StoredWeight
from halfweight.model.llama_like import SHARED_INPUT
from halfweight.model.weight_reader import DTYPES, Tally, read_into
from halfweight.quantization.numerics import QuantizedTensor, grid8_from_scales

Weights = dict[str, QuantizedTensor]
_Scales = dict[str, tuple[Tensor, Tensor | None]]


@contextmanager
def arriving(
    stored: Mapping[str, StoredWeight],
    mapped: Mapping[str, Tensor],
    device: torch.device,
    tally: Tally,
) -> Iterator[Callable[[], Weights]]:
    """Bring the weights `stored` to `device` while the block runs; what it yields waits for them.

    `mapped` are the file's tensors, the weights themselves on a CPU. Leaving the block by an error
    stops the reading.
    """
    with ThreadPoolExecutor(2) as pool:
        if device.type == "cpu":
            weights = pool.submit(_map_weights, stored, mapped)
        else:
            weights = pool.submit(read_weights, stored, device, tally, pool)
        try:
            yield weights.result
        except BaseException:
            tally.stop()
            raise


def read_weights(
    stored: Mapping[str, StoredWeight],
    device: torch.device,
    tally: Tally,
    pool: ThreadPoolExecutor,
) -> Weights:
    """The weights on `device`, read from their files; `pool` has a thread for other work."""
    rooms = pool.submit(empty_packed, stored, device)
    scales = _empty_scales(stored, device)
    read_into(((stored[name].scale, place) for name, place in scales.items()), tally)
    compacted: Future[_Scales] = pool.submit(_compact, scales)
    packed = rooms.result()
    read_into(((stored[name].packed, place) for name, place in packed.items()), tally)
    return {name: QuantizedTensor(packed[name], *of) for name, of in compacted.result().items()}


def empty_packed(stored: Mapping[str, StoredWeight], device: torch.device) -> dict[str, Tensor]:
    """Room for the bytes of every weight, uint8 [N, K].

    Weights that share their input lie one behind the other in one tensor, so that `modules.stack`
    makes one product of them without a copy.
    """
    rooms: dict[str, Tensor] = {}
    for names in _together(stored):
        heights = [stored[name].shape[0] for name in names]
        shape = (sum(heights), stored[names[0]].shape[1])
        whole = torch.empty(shape, dtype=torch.uint8, device=device)
        rooms |= zip(names, torch.split(whole, heights), strict=True)
    return rooms


def _together(stored: Mapping[str, StoredWeight]) -> Iterator[tuple[str, ...]]:
    """Every name once: those of one product together, in its order; the others alone."""
    done: set[str] = set()
    for name in stored:
        if name in done:
            continue
        parent, _, own = name.rpartition(".")
        roles = next((roles for roles in SHARED_INPUT if own in roles), (own,))
        names = tuple(f"{parent}.{role}" if parent else role for role in roles)
        columns = {stored[n].shape[1] if n in stored else None for n in names}
        found = names if len(columns) == 1 else (name,)
        done.update(found)
        yield found


def _empty_scales(stored: Mapping[str, StoredWeight], device: torch.device) -> dict[str, Tensor]:
    infos = {name: weight.scale.info for name, weight in stored.items()}
    return {
        name: torch.empty(info.shape, dtype=DTYPES[info.dtype], device=device)
        for name, info in infos.items()
    }


def _map_weights(stored: Mapping[str, StoredWeight], mapped: Mapping[str, Tensor]) -> Weights:
    scales = _compact({name: mapped[f"{name}.weight_scale"].contiguous() for name in stored})
    return {
        name: QuantizedTensor(mapped[f"{name}.weight_packed"].contiguous().view(torch.uint8), *of)
        for name, of in scales.items()
    }


def _compact(scales: dict[str, Tensor]) -> _Scales:
    """Codes and exponents in place of each tensor of scales; float scales and None off the grid."""
    found: _Scales = {}
    for name in list(scales):
        floats = scales.pop(name)
        found[name] = grid8_from_scales(floats) or (floats, None)
    return found
