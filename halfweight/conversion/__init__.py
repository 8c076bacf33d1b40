"""Checkpoint -> INT8 checkpoint: a stream that survives kill -9, published when verified.

In: a Source and a Recipe. Out: a folder that is complete or not there. First file: convert.py; then
shard_writer.py (blocks to bytes), workspace.py (journal and rename), verification.py.

May import: errors, quantization, checkpoint, model (for whether the result can be loaded).
"""
