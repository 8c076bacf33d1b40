"""Prompt lookup: finds what followed before, and drafts only where that pays."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from halfweight.engine.speculation import PromptLookup, best_length


def eager(tokens):
    """A lookup to which any draft is worth it."""
    return PromptLookup(tokens, step_cost=0, token_cost=-0.01)


def naive(tokens, limit):
    """The definition: what followed the longest of the 4, 3 or 2 last tokens the last time."""
    for length in (4, 3, 2):
        for end in range(len(tokens) - 1, length - 1, -1):
            if tokens[end - length : end] == tokens[-length:]:
                text = list(tokens)
                for i in range(limit):
                    text.append(text[end + i])
                return text[len(tokens) :]
    return []


@given(st.lists(st.integers(0, 3), max_size=60), st.integers(1, 12), st.data())
def test_the_longest_run_found_last_predicts_and_pieces_make_no_difference(tokens, limit, data):
    lookup = eager([])
    at = 0
    while at < len(tokens):
        stop = data.draw(st.integers(at + 1, len(tokens)))
        lookup.extend(tokens[at:stop])
        assert lookup.draft(limit) == naive(tokens[:stop], limit)
        at = stop


def test_a_longer_match_wins_over_a_later_shorter_one():
    assert eager([1, 2, 3, 4, 70, 9, 9, 3, 4, 80, 9, 1, 2, 3, 4]).draft(1) == [70]
    assert eager([1, 2, 3, 4, 70, 1, 2, 3, 4, 80, 1, 2, 3, 4]).draft(1) == [80]


def test_a_repetition_goes_on():
    assert eager([5, 6, 7, 5, 6, 7]).draft(7) == [5, 6, 7, 5, 6, 7, 5]


def test_no_drafts_without_a_match_or_a_limit():
    assert eager([1, 2, 3, 4, 5]).draft(8) == []
    assert eager([1, 2, 1, 2]).draft(0) == []
    assert eager([]).draft(8) == []
    assert eager([1]).draft(8) == []


@pytest.mark.parametrize(
    ("rate", "limit", "costs", "expected"),
    [
        (0.0, 8, (0.05, 0.03), 0),
        (0.07, 8, (0.05, 0.03), 0),
        (0.09, 8, (0.05, 0.03), 1),
        (1.0, 8, (0.05, 0.03), 8),
        (0.9, 0, (0.05, 0.03), 0),
        (0.5, 8, (0.1, 0.5), 0),
        (0.9, 8, (0.1, 0.5), 3),
    ],
)
def test_as_many_drafts_as_give_the_most_tokens_for_the_time(rate, limit, costs, expected):
    speeds = [
        sum(rate**i for i in range(n + 1)) / (1 + (costs[0] + costs[1] * n if n else 0))
        for n in range(limit + 1)
    ]
    assert best_length(rate, limit, *costs) == speeds.index(max(speeds))
    assert best_length(rate, limit, *costs) == expected


def run(prompt, text, step_cost=0.05, token_cost=0.03, limit=8):
    """Time of a text in steps without drafts, by the lookup's own costs."""
    lookup = PromptLookup(prompt, step_cost=step_cost, token_cost=token_cost)
    at, time, made = 0, 0.0, []
    while at < len(text):
        drafts = lookup.draft(min(limit, len(text) - at - 1))
        right = 0
        while right < len(drafts) and drafts[right] == text[at + right]:
            right += 1
        time += 1 + (step_cost + token_cost * len(drafts) if drafts else 0)
        made += text[at : at + right + 1]
        lookup.extend(text[at : at + right + 1])
        at += right + 1
    assert made == text
    return time


def test_copying_with_edits_takes_a_third_of_the_steps():
    source = random.Random(1)
    prompt = [source.randrange(5000) for _ in range(1500)]
    text = list(prompt)
    for at in range(40, 1500, 60):
        text[at : at + 2] = [source.randrange(5000) for _ in range(3)]
    assert run(prompt, text) < len(text) / 3


def test_text_that_misleads_costs_at_most_two_percent():
    """Pairs repeat all the time, what follows them never does but by chance."""
    source = random.Random(2)
    pairs = [(source.randrange(5000), source.randrange(5000)) for _ in range(30)]
    text = []
    for _ in range(1000):
        text += [*source.choice(pairs), source.randrange(5000)]
    assert run(text[:600], text[600:]) < len(text[600:]) * 1.02


def test_drafts_start_again_when_copying_does():
    source = random.Random(3)
    prompt = [source.randrange(5000) for _ in range(400)]
    pairs = [(source.randrange(5000), source.randrange(5000)) for _ in range(20)]
    noise = [t for _ in range(300) for t in (*source.choice(pairs), source.randrange(5000))]
    assert run(prompt, noise + prompt) < len(noise) * 1.02 + len(prompt) / 3


def test_a_guess_that_was_not_sent_is_scored_by_the_next_token():
    lookup = PromptLookup([1, 2, 3, 1, 2])
    assert lookup.draft(4) == []
    lookup.extend([3])
    lookup.extend([7, 1, 2])
    assert lookup.draft(4)[:1] == [3]
    wrong = PromptLookup([1, 2, 3, 1, 2])
    assert wrong.draft(4) == []
    wrong.extend([4])
    wrong.extend([7, 1, 2])
    assert wrong.draft(4) == []
