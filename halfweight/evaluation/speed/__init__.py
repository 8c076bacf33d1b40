"""How fast whole models are: INT8 by halfweight beside 16 bits by transformers, on this machine.

Every rival (`rivals`) runs in a fresh process (`process`), so that neither allocator caches nor
compiled code of one serve another; `load` and `generate` say what is measured.
"""
