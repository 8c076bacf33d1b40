"""The arithmetic of perplexity and divergence, on distributions whose figures are known."""

import math

import numpy as np
import pytest
import torch

from halfweight.errors import UsageError
from halfweight.evaluation.scoring import (
    CHUNK_TOKENS,
    Estimate,
    Text,
    TokenScores,
    cut,
    sample,
    score,
    summarize,
)

P, Q = 0.75, 0.6
"""Chance of token 0 under the reference and under the model: the same at every place."""
TARGETS = torch.tensor([0, 0, 0, 1] * 100)


def coin(chance):
    """A head over two tokens that gives token 0 this chance, and a constant added to all logits."""
    logits = torch.tensor([chance, 1 - chance]).log() + 7.0
    return lambda states: logits.expand(len(states), 2)


def coin_scores(targets=TARGETS):
    states = torch.zeros(len(targets), 1)
    return score(states, coin(Q), targets, (states, coin(P)))


def test_a_coin_has_the_perplexity_and_divergence_of_a_coin():
    found = summarize(coin_scores())
    share = 0.75
    nll = -share * math.log(Q) - (1 - share) * math.log(1 - Q)
    reference_nll = -share * math.log(P) - (1 - share) * math.log(1 - P)
    divergence = P * math.log(P / Q) + (1 - P) * math.log((1 - P) / (1 - Q))
    assert found.num_tokens == 400
    assert found.perplexity.value == pytest.approx(math.exp(nll), rel=1e-6)
    compared = found.comparison
    assert compared.reference_perplexity.value == pytest.approx(math.exp(reference_nll), rel=1e-6)
    assert compared.perplexity_change.value == pytest.approx(
        math.exp(nll - reference_nll) - 1, rel=1e-5
    )
    for value in (compared.kl_mean.value, compared.kl_median, compared.kl_999, compared.kl_max):
        assert value == pytest.approx(divergence, rel=1e-5)
    assert compared.kl_mean.error == pytest.approx(0, abs=1e-12)
    assert compared.top_agreement.value == 1
    assert compared.probability_rms == pytest.approx(P - Q, rel=1e-6)


def test_the_standard_error_is_that_of_independent_tokens():
    a, b = -math.log(Q), -math.log(1 - Q)
    spread = math.sqrt(400 / 399 * 0.75 * 0.25) * abs(a - b)
    found = summarize(coin_scores()).perplexity
    assert found.error == pytest.approx(found.value * spread / math.sqrt(400), rel=1e-6)


def test_a_pair_has_a_smaller_error_than_each_alone():
    rng = np.random.default_rng(0)
    scores = np.zeros(1000, TokenScores)
    scores["reference_nll"] = rng.exponential(3, 1000)
    scores["nll"] = scores["reference_nll"] + 0.01 + 0.001 * rng.standard_normal(1000)
    change = summarize(scores).comparison.perplexity_change
    assert change.value == pytest.approx(math.expm1(0.01), rel=0.02)
    assert change.error == pytest.approx(0.001 / math.sqrt(1000), rel=0.1)


def test_divergence_of_equal_logits_is_zero_and_of_near_ones_is_kept():
    torch.manual_seed(0)
    logits = torch.randn(64, 5000) * 3
    near = logits + 1e-2 * torch.randn(64, 5000)
    states = torch.arange(64)
    targets = torch.zeros(64, dtype=torch.long)
    same = score(states, lambda at: logits[at], targets, (states, lambda at: logits[at]))
    assert np.abs(same["kl"]).max() == 0
    found = score(states, lambda at: near[at], targets, (states, lambda at: logits[at]))
    exact = torch.nn.functional.kl_div(
        near.double().log_softmax(-1), logits.double().log_softmax(-1), log_target=True,
        reduction="none",
    ).sum(-1)  # fmt: skip
    assert found["kl"].mean() == pytest.approx(float(exact.mean()), rel=2e-3)


def test_top_agreement_counts_changed_tops():
    states = torch.arange(4)
    model = torch.tensor([[2.0, 1], [1, 2], [2, 1], [2, 1]])
    reference = torch.tensor([[2.0, 1], [2, 1], [2, 1], [2, 1]])
    targets = torch.zeros(4, dtype=torch.long)
    scores = score(states, lambda at: model[at], targets, (states, lambda at: reference[at]))
    assert summarize(scores).comparison.top_agreement.value == 0.75


def test_without_a_reference_there_is_a_perplexity_and_no_comparison():
    scores = score(torch.zeros(400, 1), coin(Q), TARGETS)
    assert summarize(scores).comparison is None
    assert summarize(scores).perplexity == summarize(coin_scores()).perplexity


def test_chunks_do_not_change_a_score():
    targets = torch.arange(2 * CHUNK_TOKENS + 3) % 2
    assert np.array_equal(coin_scores(targets)[5:9], coin_scores(targets[5:9]))


def test_different_vocabularies_are_refused():
    def three(states):
        return torch.zeros(len(states), 3)

    states = torch.zeros(2, 1)
    with pytest.raises(UsageError, match="the model has 2 tokens, the reference 3"):
        score(states, coin(Q), TARGETS[:2], (states, three))


@pytest.mark.parametrize(("tokens", "context", "stride"), [(100, 16, 4), (17, 16, 16), (5, 16, 8)])
def test_windows_score_each_token_once(tokens, context, stride):
    windows = cut(tokens, context, stride)
    scored = [i for w in windows for i in range(w.first_scored, w.end)]
    unscored = set(range(0, tokens, stride)) if stride == context else {0}
    assert scored == [i for i in range(tokens) if i not in unscored]
    assert all(w.end - w.begin <= context and w.begin < w.first_scored for w in windows)
    if stride < context:
        assert all(w.first_scored - w.begin >= context - stride for w in windows[1:])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((100, 16, 17), "stride 17 with context 16"),
        ((100, 16, 0), "stride 0 with context 16"),
        ((100, 1, 1), "stride 1 with context 1"),
        ((1, 16, 16), "the text has 1 tokens"),
    ],
)
def test_sizes_out_of_range_are_refused(arguments, message):
    with pytest.raises(UsageError, match=message):
        cut(*arguments)


def test_batches_hold_windows_of_one_shape():
    run = sample(Text(torch.arange(100)), context=16, stride=8, batch_size=4)
    shapes = [run.inputs(batch).shape for batch in run.batches()]
    assert shapes[0] == (1, 16)
    assert max(shape[0] for shape in shapes) == 4
    assert sum(len(run.targets(batch)) for batch in run.batches()) == run.num_scored == 99
    with pytest.raises(UsageError, match="batch size 0 is not positive"):
        sample(Text(torch.arange(100)), batch_size=0)


@pytest.mark.parametrize("stride", [None, 16, 15, 4])
def test_every_window_begins_with_the_start_and_scores_the_same_tokens(stride):
    text = Text(torch.arange(100, 160), torch.tensor([7]))
    run = sample(text, context=16, stride=stride)
    bare = sample(Text(text.ids), context=15, stride=min(stride or 15, 15))
    assert run.windows == bare.windows
    for batch in run.batches():
        inputs = run.inputs(batch)
        assert inputs[:, 0].tolist() == [7] * len(batch)
        assert inputs.shape[1] <= 16
        assert torch.equal(inputs[:, 1:], bare.inputs(batch))
        states = run.scored_states(lambda ids: ids.unsqueeze(-1), batch)
        assert torch.equal(states, bare.scored_states(lambda ids: ids.unsqueeze(-1), batch))


def test_whole_windows_each_begin_with_the_start():
    text = Text(torch.arange(100, 131), torch.tensor([7]))
    expected = [[7, *range(100, 110)], [7, *range(110, 120)]]
    assert text.windows(11, 2).tolist() == expected
    assert len(text.windows(11, 16)) == 3
    assert len(text.windows(33, 16)) == 0


def test_one_sample_has_no_error():
    assert Estimate.of(np.array([2.0])) == Estimate(2.0, 0.0)
