"""The engine's thread: takes requests from any other, runs steps, tells each request what is new.

On CUDA the thread is one step ahead of itself: it launches step n + 1, then waits for step n, tells
its tokens, and plans step n + 2 while n + 1 runs. So planning, sampling parameters, text and HTTP
all happen while the device works. Where a step's input depends on the tokens of the last one (a
grammar, drafts) it looks at those first, and so it does on a CPU, where a step is over when `run`
returns.

A step that raises ends the loop: every request gets the error, and so does who asks later. A device
that has faulted cannot be trusted with the next request. A NaN ends only the sequence that has it.
A process that was forked has no such thread: what it asks is refused, not waited for.
"""

from __future__ import annotations

import logging
import os
import secrets
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from halfweight.engine.launch import Launched, Launcher
from halfweight.engine.request import Output, Request, TokenLogprob
from halfweight.engine.scheduler import Scheduler
from halfweight.engine.sequence import MakeDrafter, Sequence
from halfweight.engine.step import Runner
from halfweight.errors import HalfweightError

if TYPE_CHECKING:
    from halfweight.engine.sampler import Sampler

log = logging.getLogger("halfweight")

DEVICE_SECONDS = 5.0
"""In which a step under way ends, once a rank is lost."""
OnOutput = Callable[[Output], None]
"""Called on the engine's thread with what is new; must return at once."""


class EngineStoppedError(HalfweightError):
    """The engine's thread has ended; no request can run."""


class NanLogitsError(HalfweightError):
    """A request's logits hold NaN, or leave no token to choose; that request ends."""


class Loop:
    """Runs requests of one runner, which any thread may submit or cancel, from `start` to `stop`.

    When its thread ends it closes the runner.
    """

    def __init__(
        self,
        runner: Runner,
        sampler: Sampler,
        *,
        stop_tokens: frozenset[int] = frozenset(),
        make_drafter: MakeDrafter | None = None,
        overlaps: bool | None = None,
    ) -> None:
        """`stop_tokens` are those of requests that name none.

        `overlaps` says whether a step is launched before the last one's tokens are seen; by default
        on any device but the CPU.
        """
        self._scheduler = Scheduler(runner, make_drafter)
        self._launcher = Launcher(runner, sampler)
        self._runner, self._sampler = runner, sampler
        self._stop_tokens = stop_tokens
        self._overlaps = runner.device.type != "cpu" if overlaps is None else overlaps
        self._lock = threading.Lock()
        self._inbox: deque[Sequence | int] = deque()
        self._live: dict[int, Sequence] = {}
        self._num_submitted = 0
        self._is_stopping = False
        self._process = os.getpid()
        self._wake = threading.Event()
        self._fault: HalfweightError | None = None
        self._lost: HalfweightError | None = None
        self._thread = threading.Thread(target=self._run, name="halfweight-engine", daemon=True)
        if hasattr(runner, "on_fault"):  # it may fail between steps as well
            runner.on_fault(self.fail)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread after the step under way; requests that have not ended are cancelled."""
        if self._process != os.getpid():
            return  # a fork's locks are as they happened to be, and there is nothing to end
        self._is_stopping = True
        self._wake.set()
        if self._thread.ident is not None and self._thread is not threading.current_thread():
            self._thread.join(None if self._lost is None else DEVICE_SECONDS)

    def fail(self, fault: HalfweightError) -> None:
        """End as if a step had failed with `fault`; from any thread."""
        self._lost = fault
        self._is_stopping = True
        self._wake.set()
        if self._thread.ident is not None:
            threading.Thread(target=self._give_up, args=(fault,), daemon=True).start()

    def _give_up(self, fault: HalfweightError) -> None:
        """Tell all of a fault, though the device may never answer the thread that waits for it."""
        self._thread.join(DEVICE_SECONDS)
        if self._thread.is_alive():
            log.error("%s does not come back: its memory stays taken", self._runner.device)
            self._end(_fault(fault), was_asked=False)

    @property
    def fault(self) -> HalfweightError | None:
        """Why no request can run any more; None while they can."""
        return self._fault

    def room(self, num_prompt: int) -> int:
        """New tokens that there is room for after a prompt of so many; may be negative."""
        return self._scheduler.most_tokens - num_prompt

    @property
    def num_running(self) -> int:
        """Sequences in the batch."""
        return self._scheduler.num_running

    @property
    def num_requests(self) -> int:
        """Requests that have not ended."""
        return len(self._live)

    @property
    def num_used_pages(self) -> int:
        """Pages of KV cache that sequences have."""
        return self._scheduler.pool.num_used

    def check(self, request: Request) -> None:
        """Raise UsageError for a request that can never run."""
        self._scheduler.check(request)
        self._sampler.check(request.sampling)

    def submit(self, request: Request, on_output: OnOutput) -> int:
        """Run a request; its number. The last output has a reason or an error.

        Raises UsageError for what can never run, EngineStoppedError when nothing can.
        """
        if self._process != os.getpid():
            raise EngineStoppedError(
                "the engine runs in the process that made it, and this is a fork of that",
                hint="make an engine here, or start processes by spawn",
            )
        self.check(request)
        stops = self._stop_tokens if request.stop_tokens is None else request.stop_tokens
        if request.sampling.grammar is not None:
            stops |= self._stop_tokens  # all that may follow a complete text
        sequence = self._scheduler.make(_with_seed(request), stops, on_output)
        with self._lock:
            if self._fault is not None:
                raise self._fault
            self._num_submitted += 1
            sequence.id = self._num_submitted
            self._live[sequence.id] = sequence
            self._inbox.append(sequence)
        self._wake.set()
        return sequence.id

    def cancel(self, number: int) -> None:
        """End a request; nothing happens if it has ended."""
        if number in self._live:
            self._inbox.append(number)
            self._wake.set()

    def _run(self) -> None:
        try:
            if self._runner.device.type == "cuda":
                torch.cuda.set_device(self._runner.device)
            with torch.inference_mode():
                self._run_steps()
            if self._lost is not None:
                raise self._lost
            closed = EngineStoppedError("the engine was closed", hint="make a new one")
            self._end(closed, was_asked=True)
        except BaseException as error:
            fault = self._lost or error
            if isinstance(fault, HalfweightError):
                log.error("the engine stops: %s", fault.message)
            else:
                log.exception("a step failed; the engine stops")
            self._end(_fault(fault), was_asked=False)
        finally:
            self._close_runner()

    def _close_runner(self) -> None:
        try:
            self._runner.close()
        except Exception:  # of a device that is lost; there is nobody left to tell
            log.exception("the runner was not closed")

    def _run_steps(self) -> None:
        under_way: Launched | None = None
        while not self._is_stopping:
            self._read_inbox()
            if under_way is not None and self._must_look_first():
                self._tell(under_way)
                under_way = None
            plan = self._scheduler.plan()
            launched = self._launcher.launch(plan) if plan.step else None
            if under_way is not None:
                self._tell(under_way)
            elif launched is None:
                self._wake.wait()
            under_way = launched

    def _must_look_first(self) -> bool:
        return not self._overlaps or self._scheduler.waits_for_host

    def _read_inbox(self) -> None:
        self._wake.clear()
        while self._inbox:
            item = self._inbox.popleft()
            if isinstance(item, Sequence):
                self._scheduler.add(item)
            elif item in self._live:
                sequence = self._live[item]
                self._scheduler.finish(sequence, "cancelled")
                self._send(sequence, Output(finish_reason="cancelled"))

    def _tell(self, launched: Launched) -> None:
        """Wait for a step and pass on what it gave to whom."""
        found = self._launcher.read(launched)
        if self._lost is not None:  # a device that was let go of added up what was never sent
            raise self._lost
        for sequence, chunk, gained in found:
            if not sequence.is_finished:
                is_first = sequence.num_new == 0
                tokens, reason = self._scheduler.accept(sequence, chunk.num_logits, gained.tokens)
                self._send(
                    sequence,
                    Output(
                        tuple(tokens),
                        reason,
                        gained.logprobs[: len(tokens)],
                        stop_token=gained.tokens[len(tokens)] if reason == "stop" else None,
                        prompt_logprobs=_take_prompt_logprobs(sequence),
                        num_shared_tokens=sequence.num_shared or 0 if is_first else 0,
                        error=_nan_error(sequence) if reason == "nan" else None,
                    ),
                )

    def _send(self, sequence: Sequence, output: Output) -> None:
        """Tell a request what is new; it is forgotten after its last."""
        is_last = output.finish_reason is not None or output.error is not None
        if is_last and self._live.pop(sequence.id, None) is None:
            return  # it was told, by a thread that had given up waiting for this one
        try:
            sequence.on_output(output)
        except Exception:
            log.exception("request %d is cancelled: it failed to take its output", sequence.id)
            self.cancel(sequence.id)

    def _end(self, fault: HalfweightError, *, was_asked: bool) -> None:
        """Nothing runs any more: tell all."""
        with self._lock:
            self._fault = fault
        for sequence in list(self._live.values()):
            last = Output(finish_reason="cancelled") if was_asked else Output(error=fault)
            self._send(sequence, last)
        self._inbox.clear()


def _with_seed(request: Request) -> Request:
    """With a seed drawn now where it has none: a preempted sequence goes on with the same."""
    if request.sampling.seed is not None or request.sampling.temperature == 0:
        return request
    return replace(request, sampling=replace(request.sampling, seed=secrets.randbits(63)))


def _take_prompt_logprobs(sequence: Sequence) -> tuple[TokenLogprob | None, ...]:
    """Those of the prompt, complete with its first token; none after that."""
    found, sequence.prompt_logprobs = sequence.prompt_logprobs, None
    return tuple(found or ())


def _fault(error: BaseException) -> EngineStoppedError:
    """What requests are told of a step that failed."""
    if isinstance(error, HalfweightError):
        return EngineStoppedError(error.message, hint=error.hint)
    hint = "see the log, then start anew"
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        hint = "give it fewer --cache-tokens, or fewer --max-sequences"
    message = str(error).strip().partition("\n")[0]
    return EngineStoppedError(f"a step failed: {type(error).__name__}: {message}", hint=hint)


def _nan_error(sequence: Sequence) -> NanLogitsError:
    num_tokens, sampling = len(sequence.tokens), sequence.request.sampling
    if sampling.grammar is not None or sampling.logit_bias or sampling.min_new_tokens:
        return NanLogitsError(
            f"no token is left to choose after {num_tokens} tokens: grammar, logit_bias and "
            "min_new_tokens bar all, or the model's logits are NaN",
            hint="ask for what the model can give within max_new_tokens",
        )
    return NanLogitsError(
        f"the model's logits are NaN after {num_tokens} tokens",
        hint="verify the model's files; float16 overflows where bfloat16 does not",
    )
