"""What turns a step into logits: one file for each way of running a model (see engine/step.py)."""
