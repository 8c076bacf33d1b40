"""The trial of a runner: right ones pass whatever rounding does to a few rows, wrong ones never."""

import pytest
import torch
from tiny import small_llama

from halfweight.engine.runners.probe import _STEPS, deviation, limit, plain_logits, texts

ROWS_A_ROUND = sum(num for step in _STEPS for _, _, num in step)
BOUND = limit(torch.bfloat16, "16bit")


class Shifted:
    """Gives the model's own logits, each row moved by so much of its spread as `errors` say."""

    def __init__(self, model, errors):
        self.table = torch.zeros(2, 32, dtype=torch.int32)
        self.num_rows = 0
        self._model, self._errors = model, errors

    def run(self, step):
        return torch.cat([self._moved(chunk) for chunk in step])

    def _moved(self, chunk):
        ids = self.table[chunk.slot, : chunk.start + chunk.num_tokens].long()
        right = plain_logits(self._model, ids)[chunk.start :]
        errors = [self._errors(self.num_rows + i) for i in range(chunk.num_tokens)]
        self.num_rows += chunk.num_tokens
        spread = right - right.mean(dim=-1, keepdim=True)
        return right + torch.tensor(errors)[:, None] * spread


@pytest.fixture(scope="module")
def model():
    return small_llama()


def rounds(model, errors, bound=BOUND):
    """What the trial finds, and in how many rounds."""
    runner = Shifted(model, errors)
    return deviation(runner, model, bound), runner.num_rows // ROWS_A_ROUND


def test_the_median_row_is_what_is_found(model):
    found, count = rounds(model, lambda row: 0.06)
    assert (found, count) == (pytest.approx(0.06, rel=1e-3), 1)
    found, count = rounds(model, lambda row: 0.3 if row % 4 == 0 else 0.06)
    assert (found, count) == (pytest.approx(0.06, rel=1e-3), 1), "a few rows decide nothing"


def test_a_round_of_bad_luck_is_no_fault(model):
    """SmolLM2 in bfloat16: rounding moves most rows by 0.06, and in one round of many by more."""
    found, count = rounds(model, lambda row: 0.17 if row < ROWS_A_ROUND else 0.06)
    assert (found, count) == (pytest.approx(0.06, rel=1e-3), 2)


def test_what_is_wrong_stays_wrong(model):
    """The least that a wrong computation was seen to be off, of any model of transformers."""
    found, count = rounds(model, lambda row: 0.14)
    assert (found, count) == (pytest.approx(0.14, rel=1e-3), 4)


def test_one_wrong_kind_of_chunk_is_enough(model):
    """Only tokens that decode are wrong: 8 rows of each round."""
    begin = ROWS_A_ROUND - 8
    found, _ = rounds(model, lambda row: 0.2 if row % ROWS_A_ROUND >= begin else 0.0)
    assert found == pytest.approx(0.2, rel=1e-3)


def test_float32_is_tried_once(model):
    found, count = rounds(model, lambda row: 2e-3, limit(torch.float32, "16bit"))
    assert (found, count) == (pytest.approx(2e-3, rel=1e-2), 1)


def test_no_round_has_another_rounds_texts(model):
    found = [ids.tolist() for round_ in range(4) for ids in texts(model, round_)]
    assert len(found) == len({tuple(ids) for ids in found}) == 8
    assert {len(ids) for ids in found} == {16, 14}
    assert all(0 <= i < model.config.vocab_size and i not in (1, 2) for ids in found for i in ids)
