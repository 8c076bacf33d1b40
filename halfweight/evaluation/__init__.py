"""What quantization costs and gains, measured on a text or a machine.

In: a model (and its source). Out: perplexity, divergence and agreement (comparison.py and
scoring.py), where the loss was largest (weight_errors.py), rounding that makes up for it
(calibration.py), memory as it was (memory_run.py), speed (speed/), lm-eval (harness.py). First
file: comparison.py.

May import: every room but serve and cli.
"""
