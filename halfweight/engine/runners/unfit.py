"""The word of a runner that a model is not for it."""

from __future__ import annotations

from halfweight.errors import HalfweightError


class UnfitError(HalfweightError):
    """This runner would not give this model's logits; the message says why. Another one may."""
