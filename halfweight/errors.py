"""Every error halfweight raises on purpose, in one tree.

Catch :class:`HalfweightError` to catch them all. Each error is one line that names what failed
and where, what was found and what was expected, and a `hint` that names the remedy. The command
line prints both and leaves with the class's `exit_code`.
"""

from __future__ import annotations


class HalfweightError(Exception):
    """Root of all errors of this package; exit code 1."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        message = on_one_line(message)
        super().__init__(message)
        self.message = message
        self.hint = on_one_line(hint)


def on_one_line(text: str) -> str:
    """The text with what is not printable escaped: names in a file may hold anything."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class UsageError(HalfweightError):
    """An argument or option is outside what the call accepts; exit code 2."""

    exit_code = 2


class DoesNotFitError(HalfweightError):
    """The request needs more memory than the device has; exit code 3."""

    exit_code = 3


class DiskFullError(HalfweightError):
    """The disk has no room for the output; exit code 1."""


class CheckpointError(HalfweightError):
    """A source checkpoint is missing, damaged, unsafe or unsupported; exit code 4."""

    exit_code = 4


class VerificationError(HalfweightError):
    """A finished checkpoint is not what its manifest says; exit code 5."""

    exit_code = 5


class InterruptedConversionError(HalfweightError):
    """The user stopped a conversion that can be resumed by the same command; exit code 130."""

    exit_code = 130
