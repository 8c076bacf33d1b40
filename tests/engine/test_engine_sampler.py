"""The sampler: right scores, right chances, the same token for a seed whatever runs beside it."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from halfweight.engine import choice, edits
from halfweight.engine.logprobs import Logprobs
from halfweight.engine.request import Sampling
from halfweight.engine.sampler import Sampler
from halfweight.engine.step import Chunk
from halfweight.errors import UsageError
from halfweight.kernels.triton import sampling as sampling_kernels
from halfweight.kernels.triton.penalties import Penalizer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INF = float("inf")


def make_table(slots, context=64, device=DEVICE):
    return torch.zeros(slots + 1, context + 1, dtype=torch.int32, device=device)


def decoding(slot, length, num_logits=1):
    """A chunk whose last row predicts the token at `length`."""
    return Chunk(slot, length - num_logits, num_logits, num_logits, ())


def sampled(sampler, logits, chunks):
    """The one token of each chunk."""
    return np.array([gained.tokens for gained in sampler.sample(logits, chunks).wait()])[:, 0]


def scores_of(rows, vocab, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, vocab, generator=generator) * 3).to(dtype).to(DEVICE)


def row_of(temperature, top_k=0, top_p=1.0, min_p=0.0, uniform=0.0):
    row = np.zeros(choice.NUM_COLUMNS, np.int32)
    row[choice.TOP_K] = top_k
    row.view(np.float32)[choice.TEMPERATURE :] = temperature, top_p, min_p, uniform
    return row


def reference_weights(scores, sampling, history=None):
    """Probabilities by transformers' own processors."""
    found = LogitsProcessorList()
    if sampling.repetition_penalty != 1:
        found.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    found.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        found.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        found.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        found.append(MinPLogitsWarper(sampling.min_p))
    return found(history, scores.float()).softmax(dim=-1)


def test_greedy_rows_take_the_first_of_the_likeliest_and_write_it_to_the_table():
    table = make_table(3)
    sampler = Sampler(table, 1000)
    logits = scores_of(3, 1000, dtype=torch.float16)
    logits[1, [7, 700]] = 100
    for slot in range(3):
        sampler.set(slot, Sampling(), [1])
    chunks = [decoding(2, 5), decoding(0, 1), decoding(1, 64)]
    found = sampler.sample(logits, chunks).wait()
    assert [gained.tokens for gained in found] == [[row] for row in logits.argmax(dim=-1).tolist()]
    assert found[1].tokens == [7]
    assert [[table[2, 5]], [table[0, 1]], [table[1, 64]]] == [gained.tokens for gained in found]
    assert int((table != 0).sum()) == 3


@pytest.mark.parametrize("bad", [float("nan"), INF, -INF])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_broken_row_affects_only_itself(bad, temperature):
    table = make_table(4)
    sampler = Sampler(table, 50)
    for slot in range(4):
        sampler.set(slot, Sampling(temperature=temperature, seed=slot), [1])
    logits = scores_of(4, 50)
    whole = sampled(sampler, logits, [decoding(s, 3) for s in range(4)])
    table.zero_()
    if bad == -INF:
        logits[2] = bad
    else:
        logits[2, 31] = bad
    found = sampled(sampler, logits, [decoding(s, 3) for s in range(4)])
    assert found[2] == choice.NAN
    assert np.delete(found, 2).tolist() == np.delete(whole, 2).tolist()
    assert table[2, 3] == 0


def test_a_mask_or_a_penalty_does_not_hide_a_nan():
    sampler = Sampler(make_table(1), 50)
    sampling = Sampling(repetition_penalty=1.5, logit_bias={9: -INF}, min_new_tokens=5)
    sampler.set(0, sampling, [1], stop_tokens=[9])
    logits = scores_of(1, 50)
    logits[0, 9] = float("nan")
    assert sampled(sampler, logits, [decoding(0, 1)])[0] == choice.NAN


@given(
    st.integers(0, 10**6),
    st.floats(0.1, 3),
    st.integers(0, 60),
    st.floats(0.01, 1),
    st.floats(0, 0.5),
)
@settings(deadline=None, max_examples=150)
def test_what_is_kept_is_what_transformers_keeps(seed, temperature, top_k, top_p, min_p):
    scores = scores_of(1, 50, seed).cpu()
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    weights = choice.kept_weights(scores[0].numpy(), row_of(temperature, top_k, top_p, min_p))
    wanted = reference_weights(scores, sampling)[0].numpy()
    np.testing.assert_allclose(weights / weights.sum(), wanted, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("top_p", [0.3, 0.9, 0.9999])
def test_a_wide_nucleus_is_found(top_p):
    scores = torch.arange(5000) * 1e-3
    weights = choice.kept_weights(scores.numpy(), row_of(1.0, top_p=top_p))
    wanted = reference_weights(scores[None], Sampling(temperature=1.0, top_p=top_p))[0].numpy()
    assert abs(np.count_nonzero(weights) - np.count_nonzero(wanted)) <= 1
    assert np.count_nonzero(wanted) > 300


@pytest.mark.parametrize("way", ["definition", "kernel"])
def test_penalties_are_transformers_and_openais(way):
    vocab, prompt, text = 40, [3, 3, 5, 8], [8, 9, 9, 9]
    table = make_table(2)
    table[1, :8] = torch.tensor(prompt + text)
    table[1, 8:] = 11
    table[0] = 12
    before = scores_of(3, vocab)
    places = np.array([[1, 2], [1, 0], [8, 1], [len(prompt), 1]])
    penalties = np.array([[1.7, 0.25, 0.5], [2.0, 9.0, 9.0]], np.float32)
    packed = np.concatenate([places.T.astype(np.int32), penalties.view(np.int32)], axis=1)
    on_device, kernel = torch.from_numpy(packed).to(DEVICE), Penalizer(table.device)
    for _ in range(2):  # what a call leaves behind is nothing
        scores = before.clone()
        if way == "definition":
            edits.penalize(scores, places, penalties, table)
        else:
            kernel(scores, on_device, table)
        history = torch.tensor([prompt + text], device=DEVICE)
        wanted = RepetitionPenaltyLogitsProcessor(1.7)(history, before[1:2].clone())[0]
        wanted[8] -= 0.25 + 0.5
        wanted[9] -= 0.25 + 0.5 * 3
        torch.testing.assert_close(scores[1], wanted)
        first = torch.tensor([[12]], device=DEVICE)
        wanted = RepetitionPenaltyLogitsProcessor(2.0)(first, before[2:].clone())[0]
        torch.testing.assert_close(scores[2], wanted)
        assert torch.equal(scores[0], before[0])


def test_bias_and_held_stop_tokens():
    sampler = Sampler(make_table(2), 50)
    logits = scores_of(2, 50)
    best = int(logits[0].argmax())
    logits[1] = logits[0]
    sampler.set(0, Sampling(logit_bias={best: -100, 4: 90.0}), [1, 2])
    sampler.set(1, Sampling(min_new_tokens=3), [1, 2], stop_tokens=[best])
    second = int(logits[0].argsort()[-2])
    for length, wanted in [(2, second), (4, second), (5, best)]:
        chunks = [decoding(0, length), decoding(1, length)]
        assert sampled(sampler, logits, chunks).tolist() == [4, wanted]


def test_ids_that_the_device_could_not_take_are_refused_by_name():
    sampler = Sampler(make_table(1), 50)
    with pytest.raises(UsageError, match="logit_bias has token id 50, expected 0 to 49"):
        sampler.check(Sampling(logit_bias={50: 1.0}))
    with pytest.raises(UsageError, match="51 logprobs of 50 tokens"):
        sampler.check(Sampling(num_logprobs=51))


def chi_square(counts, chances):
    """How many standard deviations the statistic is from what is expected; all chances > 0."""
    total = counts.sum()
    statistic = ((counts - total * chances) ** 2 / (total * chances)).sum()
    freedom = len(counts) - 1
    return (statistic - freedom) / (2 * freedom) ** 0.5


def draws(sampling, logits, prompt, num_slots=64, num_positions=128):
    """Counts [V] of one row's tokens over seeds and positions."""
    table = make_table(num_slots, num_positions + len(prompt))
    table[:, : len(prompt)] = torch.tensor(prompt)
    sampler = Sampler(table, len(logits))
    found = []
    for slot in range(num_slots):
        seeded = Sampling(**{**sampling, "seed": slot})
        sampler.set(slot, seeded, prompt)
    many = logits.expand(num_slots, -1)
    for position in range(num_positions):
        chunks = [decoding(slot, len(prompt) + position) for slot in range(num_slots)]
        table[:, len(prompt) :] = prompt[0]
        found.append(sampled(sampler, many, chunks))
    return np.bincount(np.concatenate(found), minlength=len(logits))


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 1.0},
        {"temperature": 0.6, "top_k": 7},
        {"temperature": 1.3, "top_p": 0.8},
        {"temperature": 2.0, "min_p": 0.1},
        {"temperature": 1.5, "top_k": 12, "top_p": 0.9, "min_p": 0.02},
        {"temperature": 1.0, "top_k": 9, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.4},
    ],
)
def test_tokens_come_with_transformers_chances(sampling):
    logits = scores_of(1, 30, seed=5)[0] / 3
    prompt = [int(logits.argmax()), 4]
    counts = draws(sampling, logits, prompt)
    history = torch.tensor([prompt], device=DEVICE)
    chances = (
        reference_weights(logits[None].clone(), Sampling(**sampling), history)[0].cpu().numpy()
    )
    assert counts[chances == 0].sum() == 0
    kept = chances > 0
    assert abs(chi_square(counts[kept], chances[kept])) < 5


def test_uniform_numbers_are_uniform_and_independent():
    seeds = np.arange(400, dtype=np.uint64)
    table = choice.uniforms(np.repeat(seeds, 500), np.tile(np.arange(500), 400)).reshape(400, 500)
    assert table.min() >= 0
    assert table.max() < 1
    even = np.full(64, 1 / 64)
    assert abs(chi_square(np.bincount((table * 64).astype(int).ravel(), minlength=64), even)) < 5
    for left, right in [(table[:, 1:], table[:, :-1]), (table[1:], table[:-1])]:
        pairs = (left * 8).astype(int) * 8 + (right * 8).astype(int)
        assert abs(chi_square(np.bincount(pairs.ravel(), minlength=64), even)) < 5


def test_seeds_of_any_size_are_taken_and_none_differs_each_time():
    logits = torch.zeros(1, 40_000, device=DEVICE)
    sampler = Sampler(make_table(1), 40_000)

    def first(seed):
        sampler.set(0, Sampling(temperature=1.0, seed=seed), [1])
        return int(sampled(sampler, logits, [decoding(0, 1)])[0])

    assert first(-1) == first(-1) == first(2**64 - 1)
    assert len({first(seed) for seed in (0, 1, -1, 2**40)}) == 4
    assert len({first(None) for _ in range(5)}) > 1


SAMPLINGS = [
    Sampling(),
    Sampling(temperature=1.0, seed=1),
    Sampling(temperature=0.8, top_p=0.9, seed=2),
    Sampling(temperature=1.2, top_k=20, seed=3, num_logprobs=2),
    Sampling(temperature=0.9, min_p=0.05, seed=4, repetition_penalty=1.3),
    Sampling(repetition_penalty=1.5, presence_penalty=0.4, frequency_penalty=0.3),
    Sampling(temperature=1.0, seed=5, logit_bias={3: 2.0}, min_new_tokens=4),
]


@given(st.permutations(range(len(SAMPLINGS))), st.integers(1, len(SAMPLINGS)))
@settings(deadline=None, max_examples=40)
def test_a_seed_gives_the_same_token_in_any_company_and_order(order, count):
    vocab = 300
    logits = scores_of(len(SAMPLINGS), vocab, seed=9)
    alone = []
    for slot, sampling in enumerate(SAMPLINGS):
        sampler = Sampler(make_table(1), vocab)
        sampler.set(0, sampling, [1, 2])
        alone.append(sampled(sampler, logits[slot : slot + 1], [decoding(0, 2)])[0])
    sampler = Sampler(make_table(len(SAMPLINGS)), vocab)
    for slot, sampling in enumerate(SAMPLINGS):
        sampler.set(slot, sampling, [1, 2])
    chosen = order[:count]
    found = sampled(sampler, logits[chosen], [decoding(slot, 2) for slot in chosen])
    assert found.tolist() == [alone[slot] for slot in chosen]


class Bigrams:
    """A model whose logits depend on the last token alone."""

    def __init__(self, vocab):
        self.logits = scores_of(vocab, vocab, seed=3)

    def run(self, table, slot, chunk):
        stop = chunk.start + chunk.num_tokens
        return self.logits[table[slot, stop - chunk.num_logits : stop].long()]


def generate(sampling, num_tokens, drafter=lambda tokens: [], vocab=60, preempt_at=()):
    """Tokens of one sequence, with what `drafter` guesses from those so far."""
    model, table, prompt = Bigrams(vocab), make_table(2, 256), [7, 7, 9]
    table[1, :3] = torch.tensor(prompt)
    sampler = Sampler(table, vocab)
    sampler.set(1, sampling, prompt, stop_tokens=[0])
    tokens = list(prompt)
    steps = 0
    while len(tokens) < num_tokens:
        drafts = drafter(tokens)
        table[1, len(tokens) : len(tokens) + len(drafts)] = torch.tensor(drafts, dtype=torch.int32)
        chunk = Chunk(1, len(tokens) - 1, 1 + len(drafts), 1 + len(drafts), ())
        tokens += sampler.sample(model.run(table, 1, chunk), [chunk]).wait()[0].tokens
        steps += 1
        if steps in preempt_at:
            sampler.set(1, sampling, prompt, generated=tokens[3:], stop_tokens=[0])
    return tokens[:num_tokens], steps


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_drafts_and_preemption_change_nothing_but_the_number_of_steps(sampling):
    whole, steps = generate(sampling, 80)
    assert steps == 77

    def oracle(tokens):
        """Right, but for every fifth token."""
        guess = whole[len(tokens) : len(tokens) + 4]
        return [(t + 1) % 60 if (len(tokens) + i) % 5 == 0 else t for i, t in enumerate(guess)]

    drafted, fewer = generate(sampling, 80, oracle)
    assert drafted == whole
    assert fewer < 40
    assert generate(sampling, 80, lambda tokens: [1, 2, 3])[0] == whole
    assert generate(sampling, 80, preempt_at=(1, 20))[0] == whole


def test_gained_tokens_are_the_longest_run_of_right_drafts_and_one_more():
    table = make_table(3)
    sampler = Sampler(table, 20)
    likeliest = [5, 6, 7, 8, 5, 6, 9, 2, 3, 4]
    logits = torch.full((10, 20), -1.0, device=DEVICE)
    logits[range(10), likeliest] = 1
    table[0, 1:4] = torch.tensor([5, 6, 3])
    table[1, 4:6] = torch.tensor([1, 6])
    table[2, 7:9] = torch.tensor([2, 3])
    for slot in range(3):
        sampler.set(slot, Sampling(num_logprobs=0 if slot == 1 else None), [1])
    chunks = [decoding(0, 4, 4), decoding(1, 6, 3), decoding(2, 9, 3)]
    found = sampler.sample(logits, chunks).wait()
    assert [gained.tokens for gained in found] == [[5, 6, 7], [5], [2, 3, 4]]
    assert table[0, 1:4].tolist() == [5, 6, 7]
    assert table[1, 4] == 5
    assert table[2, 7:10].tolist() == [2, 3, 4]
    assert [len(gained.logprobs) for gained in found] == [0, 1, 0]


def test_logprobs_are_the_models_own():
    sampler = Sampler(make_table(3), 100)
    logits = scores_of(3, 100)
    plain = Sampling(temperature=0.5, top_k=3, seed=1)
    sampler.set(0, plain, [1])
    changed = {"temperature": 0.5, "seed": 1, "repetition_penalty": 1.9, "logit_bias": {5: 3.0}}
    sampler.set(1, Sampling(num_logprobs=3, **changed), [1])
    sampler.set(2, Sampling(num_logprobs=0), [1])
    found = sampler.sample(logits, [decoding(slot, 1) for slot in range(3)]).wait()
    wanted = logits.log_softmax(dim=-1).cpu()
    assert [len(gained.logprobs) for gained in found] == [0, 1, 1]
    for row, gained in enumerate(found[1:], 1):
        (logprob,) = gained.logprobs
        assert [logprob.token] == gained.tokens
        assert logprob.logprob == pytest.approx(float(wanted[row, logprob.token]), abs=1e-5)
    top = found[1].logprobs[0].top
    assert [token for token, _ in top] == wanted[1].topk(3).indices.tolist()
    assert [value for _, value in top] == pytest.approx(wanted[1].topk(3).values.tolist(), abs=1e-5)
    assert found[2].logprobs[0].top == ()


def test_logprobs_of_given_tokens():
    logits = scores_of(4, 100)
    tokens = torch.tensor([3, 99, 0, 5], dtype=torch.int32, device=DEVICE)
    found = Logprobs(logits, tokens, np.array([1, 1, -1, 0])).wait()
    wanted = logits.log_softmax(dim=-1)
    assert sorted(found) == [0, 1, 3]
    for row, logprob in found.items():
        assert logprob.token == tokens[row]
        assert logprob.logprob == pytest.approx(float(wanted[row, tokens[row]]), abs=1e-5)
    assert [found[row].top[0][0] for row in (0, 1)] == wanted[:2].argmax(dim=1).tolist()
    assert found[3].top == ()


DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ROWS = [
    row_of(0.0),
    *(row_of(1.0, uniform=u) for u in (0.0, 0.5, 1 - 2**-24)),
    row_of(0.7, top_k=1, uniform=0.9),
    row_of(1.5, top_k=40, uniform=0.3),
    row_of(1.5, top_p=0.5, uniform=0.8),
    row_of(1.0, top_p=0.999, uniform=0.99),
    row_of(1.0, top_p=0.0, uniform=0.5),
    row_of(2.0, min_p=0.2, uniform=0.6),
    row_of(2.0, top_k=30, top_p=0.7, min_p=0.05, uniform=0.95),
]


def by_kernel(scores, rows, table):
    out = torch.empty(len(rows), 2, dtype=torch.int32, device=DEVICE)
    on_device = torch.from_numpy(rows).to(DEVICE)
    sampling_kernels.Chooser(table.device)(scores, on_device, table, out)
    return out


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_kernel_chooses_what_the_definition_chooses(dtype):
    vocab = 9000
    scores = scores_of(len(ROWS) + 2, vocab, seed=4, dtype=dtype)
    rows = np.stack([*ROWS, row_of(1.0), row_of(0.0)])
    rows[:, choice.SLOT] = np.arange(len(rows))[::-1]
    rows[:, choice.POSITION] = 5
    scores[-2, 8999] = float("nan")
    scores[-1, 17] = INF
    table = make_table(len(rows))
    expected_table = table.cpu().clone()
    expected = choice.choose(scores.cpu(), rows, expected_table).on_device
    assert by_kernel(scores, rows, table).tolist() == expected.tolist()
    assert torch.equal(table.cpu(), expected_table)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("top_k", "top_p"), [(17, 1.0), (0, 0.9), (300, 0.8)])
def test_the_kernel_keeps_what_the_definition_keeps(dtype, top_k, top_p):
    """The last token of a row's nucleus comes for the uniform number just below the end."""
    vocab = 5000
    scores = scores_of(1, vocab, seed=top_k, dtype=dtype)
    weights = choice.kept_weights(scores[0].cpu().float().numpy(), row_of(1.0, top_k, top_p))
    weights = weights.astype(np.float64) / weights.sum(dtype=np.float64)
    kept = weights.nonzero()[0]
    middles = (weights.cumsum() - weights / 2)[kept]
    rows = np.stack([row_of(1.0, top_k, top_p, uniform=middle) for middle in middles[::7]])
    many = scores.expand(len(rows), -1).contiguous()
    found = by_kernel(many, rows, make_table(1))[:, 0]
    assert found.tolist() == kept[::7].tolist()


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="programs of one row wait for each other on CUDA only")
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_gets_the_same_token_from_any_number_of_programs(dtype):
    vocab, num_rows = 128_256, 300
    scores = scores_of(num_rows, vocab, seed=8, dtype=dtype)
    scores[11, 128_255] = float("nan")
    generator = np.random.default_rng(1)
    rows = np.stack([ROWS[i % len(ROWS)] for i in range(num_rows)])
    rows.view(np.float32)[:, choice.UNIFORM] = generator.random(num_rows, np.float32)
    table = make_table(1)
    rows[:, choice.SLOT], rows[:, choice.POSITION] = 0, 3
    together = by_kernel(scores, rows, table)[:, 0].tolist()
    for count in (1, 3, 7, 100):
        for begin in range(0, num_rows, count * 5):
            part = slice(begin, begin + count)
            found = by_kernel(scores[part], rows[part], table)[:, 0].tolist()
            assert found == together[part]
    assert together[11] == choice.NAN
