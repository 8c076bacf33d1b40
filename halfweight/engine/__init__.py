"""One engine runs every token: requests come in from any thread, tokens and text go out as made.

A request (`request.py`) becomes a sequence, which the scheduler (`scheduler.py`) gives pages of KV
cache (`pages.py`) and a share of every step (`step.py`). The loop (`loop.py`) has a runner turn a
step into logits and the sampler turn those into tokens, one step ahead of what it has looked at.
What users call is `Engine` (`engine.py`). Open `step.py` first: at that seam all the others meet.
"""
