"""One engine runs every token: requests come in from any thread, tokens and text go out as made.

A request (`request.py`) becomes a sequence, which the scheduler (`scheduler.py`) gives pages of KV
cache (`pages.py`) and a share of every step (`step.py`). The loop (`loop.py`) has a runner turn a
step into logits and the sampler into tokens, one step ahead of the tokens it looks at. What users
call is `Engine` (`engine.py`); open `step.py` first: it is the seam that all the others meet at.
"""
