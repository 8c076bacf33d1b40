"""Drives a runner as the scheduler does and holds its logits against each sequence alone."""

import random

import torch

from halfweight.engine.runners.probe import plain_logits
from halfweight.engine.step import Chunk

CLOSE = 1e-4
"""Largest error of a logit in float32; the logits of the tiny models are about 1."""
SIZES = {"max_sequences": 6, "max_context": 64}


class Drive:
    """Plays the scheduler: random chunks of all sequences, random pages, then checks the logits."""

    def __init__(self, runner, model, seed=0):
        self.runner, self.model = runner, model
        self.random = random.Random(seed)
        self.free = list(range(1, runner.num_pages))
        self.random.shuffle(self.free)
        self.texts = {}
        self.pages = {}
        self.read = {}

    def add(self, slot, text):
        """A sequence in a slot that is free."""
        self.texts[slot], self.pages[slot], self.read[slot] = text, [], 0
        self.runner.table[slot, : len(text)] = torch.tensor(text, dtype=torch.int32)

    def leave(self, slot):
        """Give back the slot and its pages."""
        self.free += self.pages.pop(slot)
        self.random.shuffle(self.free)
        del self.texts[slot], self.read[slot]

    def chunk(self, slot, num_tokens, num_logits):
        start = self.read[slot]
        while len(self.pages[slot]) * self.runner.page_tokens < start + num_tokens:
            self.pages[slot].append(self.free.pop())
        return Chunk(slot, start, num_tokens, num_logits, self.pages[slot])

    def step(self, wanted):
        """Run {slot: (tokens, logits)}; the largest error of all logits against the model alone."""
        chunks = [self.chunk(slot, *sizes) for slot, sizes in wanted.items()]
        chunks.sort(key=lambda chunk: chunk.num_tokens > 1)
        logits = self.runner.run(chunks)
        assert logits.shape == (sum(c.num_logits for c in chunks), self.runner.vocab_size)
        worst = 0.0
        for chunk, got in zip(chunks, logits.split([c.num_logits for c in chunks]), strict=True):
            self.read[chunk.slot] = end = chunk.start + chunk.num_tokens
            if chunk.num_logits:
                ids = torch.tensor(self.texts[chunk.slot][:end], device=self.runner.device)
                alone = plain_logits(self.model, ids)[end - chunk.num_logits :]
                worst = max(worst, float((got - alone).abs().max()))
        return worst

    def random_step(self, slots):
        """Chunks of 1 to 9 tokens of `slots`, of which some are already past their prompt."""
        wanted = {}
        for slot in slots:
            left = len(self.texts[slot]) - self.read[slot]
            num = min(left, self.random.choice([1, 1, self.random.randint(2, 9)]))
            if num:
                wanted[slot] = (num, self.random.choice([0, 1, num]))
        return self.step(wanted) if wanted else None


def texts_for(model, lengths, seed=0):
    vocab = model.config.get_text_config(decoder=True).vocab_size
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, vocab, (n,), generator=generator).tolist() for n in lengths]


def poison(runner):
    for pool in getattr(runner, "pools", []):
        for tensor in pool.tensors:
            tensor.fill_(torch.nan if tensor.is_floating_point() else 127)


def drive_all(runner, model):
    """Six sequences that come one after another and run beside each other to their ends."""
    drive = Drive(runner, model)
    texts = texts_for(model, [45, 33, 12, 3, 50, 20])
    errors, waiting = [], list(enumerate(texts))
    while waiting or any(drive.read[s] < len(drive.texts[s]) for s in drive.texts):
        if waiting:
            drive.add(*waiting.pop(0))
        errors.append(drive.random_step(list(drive.texts)))
    return max(error for error in errors if error is not None)
