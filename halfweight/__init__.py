"""halfweight: run a language model in half its memory. Importing this does no work."""

__version__ = "0.1.0"
