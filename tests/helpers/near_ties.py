"""Answers of one model that add in another order: the same tokens up to a near tie."""

import pytest


def assert_same(found, expected, near, within=None):
    """Two answers with two log-probabilities a token, which differ by at most `within` if given.

    Where tokens part, the two likeliest are less than `near` nats apart; the rest is not compared.
    """
    for entry, right in zip(found.logprobs, expected.logprobs, strict=True):
        if entry.token != right.token:
            (_, first), (_, second) = right.top
            assert first - second < near
            return
        if within is not None:
            assert entry.logprob == pytest.approx(right.logprob, abs=within)
