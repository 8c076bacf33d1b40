"""Which tokens run next: budget, order, admission, who gives up pages, what is put off."""

import time

import pytest
from fake_model import FakeRunner

from halfweight.engine.request import Request
from halfweight.engine.scheduler import LOGPROB_TOKENS, MOST_DRAFTING, Scheduler


class Steps:
    """A scheduler driven by hand: every step gives each of its sequences token 1."""

    def __init__(self, make_drafter=None, **limits):
        self.scheduler = Scheduler(FakeRunner(**limits), make_drafter)
        self.count = 0

    def add(self, prompt, num_new=50, **options):
        request = Request(tuple(prompt), num_new, **options)
        sequence = self.scheduler.make(request, frozenset(), print)
        self.count += 1
        sequence.id = self.count
        self.scheduler.add(sequence)
        return sequence

    def plan(self):
        """(sequence, start, tokens, logits) of each chunk of the next step."""
        self.last = self.scheduler.plan()
        pairs = zip(self.last.sequences, self.last.step, strict=True)
        return [(s.id, c.start, c.num_tokens, c.num_logits) for s, c in pairs]

    def accept(self, token=1):
        for sequence, chunk in zip(self.last.sequences, self.last.step, strict=True):
            if chunk.num_logits and not sequence.is_finished:
                self.scheduler.accept(sequence, chunk.num_logits, [token])

    def run(self, count):
        for _ in range(count):
            self.plan()
            self.accept()


def distinct(number, length):
    """A prompt that shares nothing with those of other numbers."""
    return [number] + [20 + i % 10 for i in range(length - 1)]


def test_who_decodes_goes_first_and_prompts_share_what_is_left():
    steps = Steps(max_step_tokens=10)
    steps.add(distinct(1, 3))
    assert steps.plan() == [(1, 0, 3, 1)]
    steps.accept()
    steps.add(distinct(2, 12))
    steps.add(distinct(3, 4))
    assert steps.plan() == [(1, 3, 1, 1), (2, 0, 9, 0)]
    steps.accept()
    assert steps.plan() == [(1, 4, 1, 1), (2, 9, 3, 1), (3, 0, 4, 1)]
    steps.accept()
    assert steps.plan() == [(1, 5, 1, 1), (2, 12, 1, 1), (3, 4, 1, 1)]


def test_a_plan_needs_no_token_of_the_step_under_way():
    steps = Steps()
    steps.add([5, 6])
    assert steps.plan() == [(1, 0, 2, 1)]
    assert steps.plan() == [(1, 2, 1, 1)]


def test_no_step_is_planned_beyond_the_last_token():
    steps = Steps()
    steps.add([5, 6], num_new=2)
    assert len(steps.plan()) == 1
    assert len(steps.plan()) == 1
    assert steps.plan() == []


def test_no_inner_chunk_has_one_token_and_chunks_of_one_come_first():
    steps = Steps(max_step_tokens=10, max_sequences=4)
    steps.add(distinct(1, 9))
    steps.add(distinct(2, 8))
    assert steps.plan() == [(1, 0, 9, 1)]  # one of ten is left over
    steps.accept()
    steps.add(distinct(3, 2))
    assert steps.plan() == [(1, 9, 1, 1), (2, 0, 8, 1)]
    steps.accept()
    steps.add(distinct(4, 1))
    assert steps.plan() == [(1, 10, 1, 1), (2, 8, 1, 1), (4, 0, 1, 1), (3, 0, 2, 1)]


def test_logits_of_a_prompt_come_in_chunks_of_bounded_size():
    steps = Steps(max_step_tokens=700, max_context=1000, num_pages=400)
    steps.add([3] * 500, prompt_logprobs=0)
    assert steps.plan() == [(1, 0, LOGPROB_TOKENS, LOGPROB_TOKENS)]
    assert steps.plan() == [(1, LOGPROB_TOKENS, 500 - LOGPROB_TOKENS, 500 - LOGPROB_TOKENS)]


def test_nobody_overtakes_the_head_of_the_queue():
    """One that needs more pages than are free holds back smaller ones behind it."""
    steps = Steps(page_tokens=4, num_pages=11, max_step_tokens=64)
    steps.add(distinct(1, 16), num_new=8)
    assert steps.plan() == [(1, 0, 16, 1)]
    steps.accept()
    steps.add(distinct(2, 24), num_new=8)
    steps.add(distinct(3, 4), num_new=8)
    for _ in range(7):
        assert [chunk[0] for chunk in steps.plan()] == [1]
        steps.accept()
    assert [chunk[0] for chunk in steps.plan()] == [2, 3]


def test_a_prompt_is_admitted_only_with_a_page_left_for_each_that_grows():
    steps = Steps(page_tokens=4, num_pages=7, max_sequences=3, max_step_tokens=64)
    steps.add(distinct(1, 8), num_new=2)
    steps.add(distinct(2, 8), num_new=2)
    steps.add(distinct(3, 4), num_new=1)
    assert [chunk[0] for chunk in steps.plan()] == [1, 2]


def test_the_latest_gives_up_and_comes_before_those_behind_it_again():
    steps = Steps(page_tokens=1, num_pages=13, max_sequences=2, max_step_tokens=64)
    first = steps.add([1, 2], num_new=10)
    second = steps.add([3, 4], num_new=10)
    third = steps.add([5, 6], num_new=10)
    for _ in range(5):
        assert [chunk[0] for chunk in steps.plan()] == [1, 2]
        steps.accept()
    assert [chunk[0] for chunk in steps.plan()] == [1]
    steps.accept()
    assert second.pages == []
    assert len(second.tokens) == 7
    assert steps.scheduler.num_waiting == 2
    while not first.is_finished:
        assert [chunk[0] for chunk in steps.plan()] == [1]
        steps.accept()
    plan = steps.plan()
    assert plan[0][0] == 2
    assert plan[0][1] + plan[0][2] == 7
    assert third.pages == [] or plan[1][0] == 3


def test_one_with_a_token_on_its_way_is_not_admitted_again_in_the_same_plan():
    """Pages left over from wrong drafts make room for it."""
    steps = Steps(page_tokens=1, num_pages=7, max_sequences=2, max_step_tokens=64)
    steps.add([1, 2], num_new=2)
    second = steps.add([3, 4], num_new=4)
    assert len(steps.plan()) == 2
    second.pages += steps.scheduler.pool.allocate(2)
    under_way = steps.last
    assert steps.plan() == [(1, 2, 1, 1)]
    assert second.pages == []
    steps.last = under_way
    steps.accept()
    assert steps.plan()[0][0] == 2


def test_what_was_read_before_giving_up_is_mostly_found_again():
    steps = Steps(page_tokens=2, num_pages=12, max_sequences=2, max_step_tokens=64)
    first = steps.add(distinct(1, 6), num_new=16)
    second = steps.add(distinct(2, 6), num_new=8)
    while second.pages or not steps.count or not second.num_new:
        steps.plan()
        steps.accept()
    steps.scheduler.finish(first, "cancelled")
    num_tokens = len(second.tokens)
    ((number, start, count, _),) = steps.plan()
    assert (number, start + count) == (2, num_tokens)
    assert count <= 2


def test_prompts_that_come_together_wait_for_the_pages_of_the_first():
    steps = Steps(page_tokens=4, num_pages=60, max_step_tokens=64)
    for last in (1, 2, 3):
        steps.add([9] * 8 + [last])
    steps.add(distinct(7, 5))
    assert steps.plan() == [(1, 0, 9, 1), (4, 0, 5, 1)]
    assert steps.plan() == [(1, 9, 1, 1), (4, 5, 1, 1), (2, 8, 1, 1), (3, 8, 1, 1)]


def test_at_least_one_token_of_a_prompt_is_read():
    steps = Steps(page_tokens=4, num_pages=60, max_step_tokens=64)
    steps.add([9] * 8)
    steps.run(1)
    steps.add([9] * 8)
    assert steps.plan()[-1] == (2, 4, 4, 1)


def test_a_prompt_whose_logprobs_are_wanted_is_read_in_full():
    steps = Steps(page_tokens=4, num_pages=60, max_step_tokens=64)
    steps.add([9] * 8)
    steps.run(1)
    steps.add([9] * 8, prompt_logprobs=0)
    assert steps.plan()[-1] == (2, 0, 8, 8)


class Drafts:
    """Always the same three."""

    def __init__(self, tokens):
        pass

    def extend(self, tokens):
        pass

    def draft(self, limit):
        return [1, 2, 3][:limit]


def test_drafts_are_read_with_the_token_before_them_and_those_accepted_count():
    steps = Steps(Drafts, max_step_tokens=20)
    sequence = steps.add([5, 6])
    steps.plan()
    steps.accept()
    assert steps.scheduler.waits_for_host
    assert steps.plan() == [(1, 2, 4, 4)]
    ((chunk, drafts),) = steps.last.drafts
    assert (chunk.start, drafts) == (2, [1, 2, 3])
    steps.scheduler.accept(sequence, 4, [1, 2, 7])
    assert sequence.tokens.tolist() == [5, 6, 1, 1, 2, 7]
    assert steps.plan() == [(1, 5, 4, 4)]


def test_drafts_do_not_pass_the_last_token_nor_the_budget_nor_the_pages():
    steps = Steps(Drafts, max_step_tokens=20)
    steps.add([5, 6], num_new=3)
    steps.run(1)
    assert steps.plan() == [(1, 2, 2, 2)]

    steps = Steps(Drafts, max_step_tokens=6, max_sequences=2)
    steps.add(distinct(1, 2))
    steps.add(distinct(2, 2))
    steps.run(1)
    plan = steps.plan()
    assert sum(chunk[2] for chunk in plan) <= 6
    assert {chunk[0] for chunk in plan} == {1, 2}

    steps = Steps(Drafts, page_tokens=1, num_pages=7, max_step_tokens=20)
    steps.add([5, 6], num_new=4)
    steps.run(1)
    steps.scheduler.pool.allocate(3)
    assert steps.plan() == [(1, 2, 1, 1)]


def test_many_sequences_do_not_draft():
    steps = Steps(Drafts, max_sequences=MOST_DRAFTING + 1, max_step_tokens=64, num_pages=99)
    for number in range(MOST_DRAFTING + 1):
        steps.add([number])
    steps.run(2)
    assert not steps.scheduler.waits_for_host
    assert len(steps.plan()) == MOST_DRAFTING + 1


@pytest.mark.parametrize(("num_sequences", "most_us"), [(1, 80), (64, 500)])
def test_a_plan_and_its_acceptance_take_little_time(num_sequences, most_us):
    """The best of many, so that a busy machine does not count."""
    steps = Steps(
        max_sequences=num_sequences,
        max_context=400,
        page_tokens=16,
        num_pages=2000,
        max_step_tokens=2000,
    )
    for number in range(num_sequences):
        steps.add([number % 38], num_new=300)
    steps.run(1)
    best = 1.0
    for _ in range(200):
        begin = time.perf_counter()
        steps.scheduler.plan()
        best = min(best, time.perf_counter() - begin)
    assert best * 1e6 < most_us
