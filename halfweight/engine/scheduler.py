"""What runs next: a budget of tokens for each step, shared among sequences by when they came.

Sequences that decode go first, one token each (and their drafts); what is left of the budget reads
prompts, in chunks, first come first served. A prompt is admitted when there is a slot and there are
pages for all of it; from then on a sequence takes a page at a time. When there is none, the one
that came last gives up its pages and waits; when it runs again it reads its prompt and what it had
generated as one prompt, mostly from pages that can still be found. The sequence that came first is
never the one to give up, and nobody overtakes the head of the queue: all end.

A plan is made while the step before it runs, so it never depends on that step's tokens: a sequence
counts (`num_tokens`) the token that is on its way. What a step turns out to have sampled is told to
`accept` later; a sequence that ended meanwhile is in one more step, whose token is dropped. Its
pages can be given away at once: steps run in the order of their launch.

Prompts that begin alike and come together are not all read: one whose next page is being filled by
this very step is put off to the next, when it finds that page.
"""

from __future__ import annotations

from array import array
from bisect import insort
from collections.abc import Callable
from dataclasses import dataclass, field
from operator import attrgetter

from halfweight.engine import admission
from halfweight.engine.pages import PagePool
from halfweight.engine.request import FinishReason, Output, Request
from halfweight.engine.sequence import MakeDrafter, Sequence
from halfweight.engine.step import Chunk, Runner

NAN = -1
"""The token that stands for logits with a NaN in them."""
LOGPROB_TOKENS = 256
"""Tokens of a prompt whose logits are wanted in one chunk: bounds the memory of logits."""
MOST_PASSED_OVER = 64
"""Waiting sequences that are looked at and put off in one plan."""
MOST_DRAFTING = 8
"""Sequences at once up to which drafts are asked for: with more, a step has no time to spare."""

_arrival = attrgetter("id")


@dataclass(slots=True)
class Plan:
    """A step, and what has to be known about it to launch it and to read its results."""

    step: list[Chunk] = field(default_factory=list)
    sequences: list[Sequence] = field(default_factory=list)
    """Whose each chunk is."""
    admitted: list[Sequence] = field(default_factory=list)
    """Those with a new slot: the table does not hold their tokens yet."""
    drafts: list[tuple[Chunk, list[int]]] = field(default_factory=list)
    """Tokens that the table must hold after the first of a chunk."""

    def add(self, sequence: Sequence, num_tokens: int, num_logits: int) -> Chunk:
        """One more chunk, of the tokens that the sequence has not read."""
        chunk = Chunk(sequence.slot, sequence.num_read, num_tokens, num_logits, sequence.pages)
        self.step.append(chunk)
        self.sequences.append(sequence)
        sequence.num_read += num_tokens
        return chunk


class Scheduler:
    """Plans steps within a runner's limits. Belongs to one thread, but for `check` and `make`."""

    def __init__(self, runner: Runner, make_drafter: MakeDrafter | None = None) -> None:
        """`runner` is only asked for its limits, and told of pages that a sequence has let go where
        it has a `release`. Without `make_drafter` there are no drafts.
        """
        assert runner.max_step_tokens > runner.max_sequences + 1, "no room to read prompts"
        self._runner = runner
        self._release: Callable[[list[int]], None] | None = getattr(runner, "release", None)
        self._page_tokens = runner.page_tokens
        self._make_drafter = make_drafter
        self._waiting: list[Sequence] = []
        self._running: list[Sequence] = []
        self._reading: list[Sequence] = []
        self._slots = list(range(runner.max_sequences - 1, -1, -1))
        self.pool = PagePool(runner.num_pages)

    @property
    def num_running(self) -> int:
        """Sequences that have pages."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Sequences that have none yet, or not any more."""
        return len(self._waiting)

    @property
    def waits_for_host(self) -> bool:
        """Whether the next plan needs the tokens of the step under way, to draft from."""
        return self._make_drafter is not None and any(s.drafts for s in self._running)

    @property
    def most_tokens(self) -> int:
        """Tokens of the longest sequence that can run."""
        held = (self._runner.num_pages - 1) * self._page_tokens
        return min(self._runner.max_context, held)

    def check(self, request: Request) -> None:
        """Raise UsageError for a request that can never run."""
        admission.check(request, self._runner, self.most_tokens)

    def make(
        self, request: Request, stops: frozenset[int], on_output: Callable[[Output], None]
    ) -> Sequence:
        """The sequence of a request that was checked; its `id` is for the caller to give."""
        tokens = array("i", request.ids.tobytes())
        limit = len(tokens) + max(1, request.max_new_tokens)
        stops = stops if request.max_new_tokens else frozenset()
        sequence = Sequence(request, on_output, stops, tokens, limit, num_tokens=len(tokens))
        if request.prompt_logprobs is not None:
            sequence.prompt_logprobs = [None] * len(tokens)
        if self._runner.shares_prefixes:
            sequence.extend_keys(len(tokens) // self._page_tokens, self._page_tokens)
        if self._make_drafter is not None:
            sequence.drafter = self._make_drafter(tokens)
        return sequence

    def add(self, sequence: Sequence) -> None:
        """Let a sequence wait for its turn."""
        insort(self._waiting, sequence, key=_arrival)

    def plan(self) -> Plan:
        """The next step; empty where nothing can run before a step under way is accepted."""
        for sequence in self._reading:
            if sequence.pages:
                self._publish(sequence)
        self._reading = []
        plan = Plan()
        budget = self._plan_decoding(plan)
        for sequence in self._reading:
            budget -= self._read(plan, sequence, budget)
        self._admit(plan, budget)
        if self._reading or plan.drafts:
            _decoding_first(plan)
        return plan

    def accept(
        self, sequence: Sequence, num_rows: int, gained: list[int]
    ) -> tuple[list[int], FinishReason | None]:
        """A step with `num_rows` rows of logits for a sequence gave it the tokens `gained`.

        They are the drafts that were right and the token after them; NAN is the last of all.
        Returns the tokens that it keeps and, where it ends, why. A stop token is not among them.
        """
        sequence.num_read -= num_rows - len(gained)
        sequence.num_tokens -= 1
        reason: FinishReason | None = None
        for count, token in enumerate(gained):
            if token == NAN or token in sequence.stops:
                reason, gained = "nan" if token == NAN else "stop", gained[:count]
                break
        sequence.tokens.fromlist(gained)
        sequence.num_tokens += len(gained)
        if reason is None and len(sequence.tokens) >= sequence.limit:
            reason = "length"
        if reason is None:
            self._continue(sequence, gained)
        else:
            self.finish(sequence, reason)
        return gained if sequence.request.max_new_tokens else [], reason

    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
        """The sequence has ended: its pages and slot are free."""
        sequence.is_finished = True
        if sequence.slot < 0:
            self._waiting.remove(sequence)
        else:
            self._leave(sequence)
        if reason == "nan":
            self.pool.forget(sequence.keys)

    def _plan_decoding(self, plan: Plan) -> int:
        """Chunks of all that decode; returns the budget left. Fills `_reading` with the others."""
        running = self._running
        num_drafts = (self._runner.max_step_tokens - len(running)) // 2
        i = 0
        while i < len(running):  # which loses its end where somebody gives up
            sequence = running[i]
            i += 1
            unread = sequence.num_tokens - sequence.num_read
            if unread > 1:
                self._reading.append(sequence)
            elif sequence.num_tokens < sequence.limit and self._has_page(sequence):
                if sequence.drafts:
                    num_drafts -= self._decode_drafts(plan, sequence, num_drafts)
                else:
                    plan.add(sequence, 1, 1)
                sequence.num_tokens += 1
        return self._runner.max_step_tokens - sum(chunk.num_tokens for chunk in plan.step)

    def _has_page(self, sequence: Sequence) -> bool:
        """Whether the next token has a place, if need be at the cost of those that came later."""
        if sequence.num_read < len(sequence.pages) * self._page_tokens:
            return True
        while not self.pool.num_available:
            last = self._running[-1]
            self._leave(last)
            self.add(last)
            if last is sequence:
                return False
        sequence.pages += self.pool.allocate(1)
        return True

    def _decode_drafts(self, plan: Plan, sequence: Sequence, most: int) -> int:
        """A chunk with as many drafts as have room; returns how many."""
        most = min(most, sequence.limit - sequence.num_tokens - 1)
        drafts = sequence.drafts = sequence.drafts[: max(0, most)]
        wanted = -(-(sequence.num_tokens + len(drafts)) // self._page_tokens) - len(sequence.pages)
        if wanted > self.pool.num_available:
            drafts = sequence.drafts = []
        else:
            sequence.pages += self.pool.allocate(max(0, wanted))
        chunk = plan.add(sequence, 1 + len(drafts), 1 + len(drafts))
        if drafts:
            plan.drafts.append((chunk, drafts))
        return len(drafts)

    def _read(self, plan: Plan, sequence: Sequence, budget: int) -> int:
        """A chunk of a prompt within the budget; returns its tokens.

        No inner chunk has one token: runners take that for decoding.
        """
        unread = sequence.num_tokens - sequence.num_read
        wants_logprobs = sequence.prompt_logprobs is not None
        num_tokens = min(unread, budget, LOGPROB_TOKENS if wants_logprobs else unread)
        if num_tokens < min(unread, 2):
            return 0
        is_last = num_tokens == unread
        plan.add(sequence, num_tokens, num_tokens if wants_logprobs else int(is_last))
        sequence.num_tokens += is_last
        return num_tokens

    def _admit(self, plan: Plan, budget: int) -> None:
        """Give slots and pages to those who wait, in their order, while there is budget."""
        if not self._waiting or not self._slots:
            return
        filling = {key for sequence in plan.sequences for key in self._being_filled(sequence)}
        at = 0
        while budget > 0 and self._slots and at < min(len(self._waiting), MOST_PASSED_OVER):
            sequence = self._waiting[at]
            if sequence.num_tokens > len(sequence.tokens):
                return  # it has just given up its pages, with a token on its way
            most = self._most_shared(sequence)
            shared = self.pool.find(sequence.keys[:most])
            if len(shared) < most and sequence.keys[len(shared)] in filling:
                at += 1
                continue
            if not self._take_pages(sequence, shared):
                return
            del self._waiting[at]
            insort(self._running, sequence, key=_arrival)
            sequence.slot = self._slots.pop()
            plan.admitted.append(sequence)
            self._reading.append(sequence)
            budget -= self._read(plan, sequence, budget)
            filling.update(self._being_filled(sequence))

    def _most_shared(self, sequence: Sequence) -> int:
        """Pages that it may share: its last token has to be read, for its logits."""
        if sequence.prompt_logprobs is not None:
            return 0
        return min(len(sequence.keys), (len(sequence.tokens) - 1) // self._page_tokens)

    def _being_filled(self, sequence: Sequence) -> list[bytes]:
        """Keys of pages that will be full after the step and cannot be found yet."""
        return sequence.keys[sequence.num_published : sequence.num_read // self._page_tokens]

    def _take_pages(self, sequence: Sequence, shared: list[int]) -> bool:
        """Pages for all its tokens, if that leaves one for each that will need another."""
        needed = -(-sequence.num_tokens // self._page_tokens) - len(shared)
        growing = sum(len(s.pages) * self._page_tokens < s.limit - 1 for s in self._running)
        available = self.pool.num_available - self.pool.num_kept(shared)
        if needed + growing > available:
            return False
        self.pool.share(shared)
        sequence.pages = shared + self.pool.allocate(needed)
        sequence.num_published = len(shared)
        sequence.num_read = len(shared) * self._page_tokens
        if sequence.num_shared is None:
            sequence.num_shared = sequence.num_read
        return True

    def _leave(self, sequence: Sequence) -> None:
        """Give slot and pages back; what is full of known tokens can still be found."""
        self._publish(sequence)
        self._running.remove(sequence)
        self._slots.append(sequence.slot)
        self.pool.release(sequence.pages)
        if self._release is not None:
            self._release(sequence.pages)
        sequence.slot, sequence.pages = -1, []
        sequence.num_read = sequence.num_published = 0

    def _continue(self, sequence: Sequence, gained: list[int]) -> None:
        """These tokens were added to a sequence that goes on."""
        if sequence.slot >= 0:
            self._publish(sequence)
        if sequence.drafter is not None:
            sequence.drafter.extend(gained)
            asks = sequence.slot >= 0 and len(self._running) <= MOST_DRAFTING
            sequence.drafts = sequence.drafter.draft(self._runner.most_drafts) if asks else []

    def _publish(self, sequence: Sequence) -> None:
        """Let others find its pages that are full of tokens which are known."""
        full = min(sequence.num_read, len(sequence.tokens)) // self._page_tokens
        if full <= sequence.num_published or not self._runner.shares_prefixes:
            return
        sequence.extend_keys(full, self._page_tokens)
        for i in range(sequence.num_published, full):
            self.pool.publish(sequence.pages[i], sequence.keys[i])
        sequence.num_published = full


def _decoding_first(plan: Plan) -> None:
    """Chunks of one token before the others, else as they are."""
    step = plan.step
    order = sorted(range(len(step)), key=lambda i: step[i].num_tokens > 1)
    plan.step = [step[i] for i in order]
    plan.sequences = [plan.sequences[i] for i in order]
