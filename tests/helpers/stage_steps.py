"""Stages of a model to hold against the whole of it: how they are made, and steps of two texts."""

import torch

from halfweight.checkpoint.headers import read_headers
from halfweight.engine.pipeline.runner import StagedRunner
from halfweight.engine.runners import make_runner
from halfweight.engine.step import Chunk
from halfweight.engine.transfer import on_device
from halfweight.memory.pipeline import Stage
from halfweight.model.stage import load_stage, stage_part

STEP_TOKENS = 96
LIMITS = {"max_sequences": 4, "max_context": 128, "cache_tokens": 256}
TEXT = 75
"""Tokens of each text: more than a page of any runner."""


def stages_at(*ends, devices=None):
    """Stages that end at these layers, on the CPU if no devices are named."""
    begins, devices = (0, *ends[:-1]), devices or ["cpu"] * len(ends)
    return [
        Stage(device, device.partition(":")[0], begin, end, begin == 0, end == ends[-1])
        for device, begin, end in zip(devices, begins, ends, strict=True)
    ]


def staged(folder, stages, dtype, makers=None, **limits):
    """A runner over these stages; `makers` of their own runners."""
    checkpoint = read_headers(folder)
    loaded = [
        load_stage(stage_part(checkpoint, stage), stage, STEP_TOKENS, dtype=dtype)
        for stage in stages
    ]
    makers = makers or [make_runner] * len(stages)
    limits = LIMITS | limits
    runners = [make(model, **limits) for make, model in zip(makers, loaded, strict=True)]
    return StagedRunner(loaded, runners, STEP_TOKENS)


def steps(page_tokens):
    """A prompt in chunks, one beside another, both decoding, drafts, tokens without logits."""

    def chunk(slot, start, num, num_logits):
        pages = range(1 + slot, 100, 2)[: -(-(start + num) // page_tokens)]
        return Chunk(slot, start, num, num_logits, list(pages))

    yield [chunk(0, 0, 40, 0)]
    yield [chunk(0, 40, 20, 1), chunk(1, 0, 30, 3)]
    yield [chunk(1, 30, 30, 30)]
    for at in range(60, 64):
        yield [chunk(0, at, 1, 1), chunk(1, at, 1, int(at != 61))]
    yield [chunk(1, 64, 1, 1), chunk(0, 64, 5, 5)]
    yield [chunk(0, 69, 4, 4), chunk(1, 65, 3, 3)]


def logits_of(runner, steps=steps):
    """All logits of `steps`, in float32."""
    for slot in range(2):
        ids = [(7 * i * i + 3 * i + 11 * slot + 1) % runner.vocab_size for i in range(TEXT)]
        runner.table[slot, :TEXT] = torch.tensor(ids, dtype=torch.int32)
    with torch.inference_mode(), on_device(runner.device):  # as an engine's thread
        found = [runner.run(step).float().clone() for step in steps(runner.page_tokens)]
    return torch.cat(found)


def short_steps(page_tokens):
    """Each way that the GPU's runner has for a step: reads, decodes, verifies, and one by one."""

    def chunk(slot, start, num, num_logits):
        pages = range(1 + slot, 100, 2)[: -(-(start + num) // page_tokens)]
        return Chunk(slot, start, num, num_logits, list(pages))

    yield [chunk(0, 0, 8, 0), chunk(1, 0, 9, 2)]
    yield [chunk(0, 8, 1, 0), chunk(1, 9, 1, 1)]
    yield [chunk(1, 10, 1, 1), chunk(0, 9, 4, 3)]
    yield [chunk(0, 13, 12, 12)]
