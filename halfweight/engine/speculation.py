"""Speculation without a second model: text often repeats what stands in the prompt or before.

`PromptLookup` looks where the sequence's last four tokens (or three, or two) stood before and
guesses that what followed them then follows again. The engine has the model check the guess in one
step. A wrong guess costs time, so each is scored, by the number of tokens it is based on, whether
the model was asked or not: drafts start when guesses turn out right and stop when they do not, at
no cost but the look-up's.
"""

from __future__ import annotations

from collections.abc import Sequence

_LENGTHS = (4, 3, 2)
_MEMORY = 32.0
"""Guessed tokens after which a score has mostly forgotten what was before."""
_PRIOR_RIGHT, _PRIOR_WEIGHT = 0.0, 2.0
"""A score begins as if this share of so many guessed tokens had been right: with no drafts."""


class PromptLookup:
    """Guesses of what follows in one sequence.

    `extend` with every token that the sequence gains, `draft` before a step.
    """

    def __init__(
        self, tokens: Sequence[int] = (), *, step_cost: float = 0.05, token_cost: float = 0.03
    ) -> None:
        """`tokens` is the prompt.

        The costs are parts of the time of a step without drafts: what one with drafts takes longer
        however many there are, and for each of them. The defaults are those of 1 to 8 sequences of
        an 8B model on one H200, with the step that cannot be launched ahead.
        """
        self._tokens = list(tokens)
        self._ends: dict[int, int] = {}
        self._num_indexed = 0
        self._costs = step_cost, token_cost
        self._scores = {length: _Score() for length in _LENGTHS}
        self._guess: tuple[int, list[int]] | None = None

    def extend(self, tokens: Sequence[int]) -> None:
        """The sequence gained these, drafted or not; scores the last guess."""
        if self._guess is not None and tokens:
            length, guess = self._guess
            self._scores[length].add(guess, tokens)
            self._guess = None
        self._tokens += tokens

    def draft(self, limit: int) -> list[int]:
        """At most `limit` tokens that are worth a check, often none."""
        self._index()
        self._guess = found = self._look_up(limit)
        if found is None:
            return []
        length, guess = found
        return guess[: best_length(self._scores[length].rate, len(guess), *self._costs)]

    def _index(self) -> None:
        """Note behind which 2, 3 and 4 tokens each new token stands.

        Keys are hashes of tuples: two that collide make a wrong guess, not a wrong text.
        """
        for length in _LENGTHS:
            first = max(length, self._num_indexed)
            part = self._tokens[first - length : -1]
            runs = zip(*(part[i:] for i in range(length)), strict=False)
            self._ends.update(zip(map(hash, runs), range(first, len(self._tokens)), strict=False))
        self._num_indexed = len(self._tokens)

    def _look_up(self, limit: int) -> tuple[int, list[int]] | None:
        """How many tokens were found again, and the `limit` that followed them the last time.

        Where those reach the end of the text, they go on as a text of that period would.
        """
        tokens = self._tokens
        for length in _LENGTHS:
            end = self._ends.get(hash(tuple(tokens[-length:])))
            if end is not None and limit > 0 and len(tokens) > length:
                found = tokens[end : end + limit]
                return length, (found * -(-limit // len(found)))[:limit]
        return None


class _Score:
    """How often tokens were guessed right of late."""

    def __init__(self) -> None:
        self._right, self._all = _PRIOR_RIGHT * _PRIOR_WEIGHT, _PRIOR_WEIGHT

    @property
    def rate(self) -> float:
        """The part that was right."""
        return self._right / self._all

    def add(self, guess: Sequence[int], tokens: Sequence[int]) -> None:
        """Count up to the first wrong token: what follows it says nothing."""
        for guessed, token in zip(guess, tokens, strict=False):
            keep = 1 - 1 / _MEMORY
            self._right = self._right * keep + (guessed == token)
            self._all = self._all * keep + 1
            if guessed != token:
                return


def best_length(rate: float, limit: int, step_cost: float, token_cost: float) -> int:
    """Drafts that give the most tokens for the time, each right with chance `rate`; 0 for none."""
    best, most, gained, chance = 0, 1.0, 1.0, 1.0
    for length in range(1, limit + 1):
        chance *= rate
        gained += chance
        speed = gained / (1 + step_cost + token_cost * length)
        if speed > most:
            best, most = length, speed
    return best
