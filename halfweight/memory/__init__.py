"""What a model needs of a device, before it is loaded and as it turned out.

In: a config.json, headers, or a preset, and a Workload. Out: a Plan (bytes by part, verdict), its
picture and page, what would fit instead. First file: plan.py; architecture.py says what a model is
made of. Nothing here imports torch but device_memory.py, so that a plan starts in no time.

May import: errors, cache_folder, quantization, checkpoint.
"""
