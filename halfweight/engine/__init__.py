"""One engine runs every token: requests come in from any thread, tokens and text go out as made.

In: a model, and requests (prompt, sampling, limits, stops). Out: tokens, text and logprobs as they
are made. A request (request.py) becomes a sequence, which the scheduler (scheduler.py) gives pages
of KV cache (pages.py) and a share of every step (step.py). The loop (loop.py) has a runner
(runners/) turn a step into logits and the sampler (sampler.py) turn those into tokens, one step
ahead of what it has looked at. What users call is `Engine` (engine.py). First file: step.py, the
seam where all the others meet.

May import: errors, quantization, kernels, memory, model.
"""
