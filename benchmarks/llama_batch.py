"""llama.cpp as a target of halfweight.evaluation.speed.serving: a batch of sequences, greedy.

    python benchmarks/llama_batch.py MODEL.gguf MOST_SEQUENCES MOST_TOKENS

runs in any Python that has llama-cpp-python. All requests of a load begin at once: their prompts
are read one after the other, then each step decodes a token of every sequence, the way llama.cpp's
own batched benchmark does.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

import llama_cpp
import numpy as np

PIECE = 512
"""Tokens of a prompt that are read in one call."""


class Batch:
    """A model, and a context for so many sequences of so many tokens."""

    def __init__(self, path: str, most_sequences: int, most_tokens: int) -> None:
        llama_cpp.llama_backend_init()
        loading = llama_cpp.llama_model_default_params()
        loading.use_extra_bufts = False  # weights packed for AMX end SmolLM2 with a crash in 0.3.36
        model = llama_cpp.llama_model_load_from_file(path.encode(), loading)
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        options = llama_cpp.llama_context_default_params()
        options.n_ctx = most_sequences * most_tokens
        options.n_seq_max = most_sequences
        options.n_batch = options.n_ubatch = PIECE
        options.n_threads = options.n_threads_batch = os.cpu_count()
        self._context = llama_cpp.llama_init_from_model(model, options)
        self._batch = llama_cpp.llama_batch_init(PIECE, 0, 1)

    def answers(self, asks: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """All requests, begun at once."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
        asked = time.perf_counter()
        tokens, pieces = [], []
        for sequence, ask in enumerate(asks):
            tokens.append(self._read(sequence, ask["prompt"]))
            pieces.append([time.perf_counter()])
        for step in range(1, max(ask["new_tokens"] for ask in asks)):
            running = [i for i, ask in enumerate(asks) if step < ask["new_tokens"]]
            places = [len(asks[i]["prompt"]) + step - 1 for i in running]
            self._decode([tokens[i] for i in running], places, running, [True] * len(running))
            for row, i in enumerate(running):
                tokens[i] = self._likeliest(row)
                pieces[i].append(time.perf_counter())
        return [
            {
                "prompt_tokens": len(ask["prompt"]),
                "new_tokens": ask["new_tokens"],
                "asked": asked,
                "pieces": times,
            }
            for ask, times in zip(asks, pieces, strict=True)
        ]

    def _read(self, sequence: int, prompt: list[int]) -> int:
        """Read a prompt; the token after it."""
        for begin in range(0, len(prompt), PIECE):
            part = prompt[begin : begin + PIECE]
            places = list(range(begin, begin + len(part)))
            wanted = [place == len(prompt) - 1 for place in places]
            self._decode(part, places, [sequence] * len(part), wanted)
        return self._likeliest(len(part) - 1)

    def _decode(
        self, tokens: list[int], places: list[int], sequences: list[int], wanted: list[bool]
    ) -> None:
        batch = self._batch
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i] = token, places[i]
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequences[i]
            batch.logits[i] = wanted[i]
        if llama_cpp.llama_decode(self._context, batch):
            raise RuntimeError("llama_decode failed")

    def _likeliest(self, row: int) -> int:
        logits = llama_cpp.llama_get_logits_ith(self._context, row)
        return int(np.ctypeslib.as_array(logits, (self._vocab_size,)).argmax())


def main() -> None:
    """Answer a load for each line of stdin."""
    path, most_sequences, most_tokens = sys.argv[1:4]
    batch = Batch(path, int(most_sequences), int(most_tokens))
    print("{}", flush=True)
    for line in sys.stdin:
        print(json.dumps({"answers": batch.answers(json.loads(line)["asks"])}), flush=True)


if __name__ == "__main__":
    main()
