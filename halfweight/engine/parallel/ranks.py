"""The other ranks as rank 0 has them: started, watched, and ended together.

Ranks of this machine are started as programs of their own (`member.py`), not by multiprocessing,
which would run the user's main module once more in each: an interactive Python has none, and a
script would need a guard. A socket pair is their channel, so there is no port that could be in use.

One thread listens to all. The first rank that tells of an error, ends, or is silent for
SILENCE_SECONDS is the fault of the job: the others are killed, and whoever runs or waits is told.
"""

from __future__ import annotations

import json
import logging
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from threading import Condition, Thread

from halfweight.engine.parallel.channel import BEAT_SECONDS, SILENCE_SECONDS, Channel, Kind
from halfweight.engine.parallel.faults import BrokenLinkError, RankError, from_message
from halfweight.engine.parallel.job import hello
from halfweight.errors import HalfweightError, UsageError

log = logging.getLogger("halfweight")

STARTING_SECONDS = 120
"""In which a rank says hello."""
ENDING_SECONDS = 5
"""In which a rank leaves when it is told to."""
EXPLAINING_SECONDS = 3
"""In which the watch finds who is lost, once a sum has failed."""
WORDS = 5
"""Lines of a rank's stderr that are kept."""


@dataclass
class Member:
    """A rank other than 0."""

    rank: int
    channel: Channel
    process: subprocess.Popen[bytes] | None = None
    """None where another program has started it."""
    where: str = ""
    state: Kind = Kind.BEAT
    """The last thing that it has told of itself."""
    files: str = ""
    """Digest of those that it has found."""
    peak_bytes: int = 0
    heard: float = field(default_factory=time.monotonic)
    words: deque[str] = field(default_factory=lambda: deque(maxlen=WORDS))

    @property
    def name(self) -> str:
        """As errors call it."""
        return f"rank {self.rank} ({self.where})" if self.where else f"rank {self.rank}"


class Ranks:
    """All ranks but 0. Messages go to all of them, any thread may send."""

    def __init__(self, members: Sequence[Member]) -> None:
        self.members = members
        self.fault: HalfweightError | None = None
        self._tell: list[Callable[[HalfweightError], None]] = []
        self._is_ended = False
        self._changed = Condition()
        self._thread = Thread(target=self._watch, name="halfweight-ranks", daemon=True)
        self._thread.start()

    @classmethod
    def start(cls, ranks: int) -> Ranks:
        """Start ranks 1 to `ranks` - 1 on this machine; they say hello some seconds later."""
        return cls([_started(rank, ranks) for rank in range(1, ranks)])

    def send(self, kind: Kind, content: bytes = b"") -> None:
        """Tell all; one that is gone is the watch's to find."""
        for member in self.members:
            with suppress(OSError):
                member.channel.send(kind, content)

    def wait_for(self, state: Kind, seconds: float | None = None) -> None:
        """Return when all ranks have come to `state`; raise the fault where one is lost."""
        with self._changed:
            self._changed.wait_for(lambda: self.fault or self._are(state), seconds)
        late = [member for member in self.members if member.state < state]
        if self.fault is None and late:
            self._lose(RankError(f"{late[0].name} has not started within {seconds} s"))
        if self.fault is not None:
            raise self.fault

    def explain(self, error: BrokenLinkError) -> HalfweightError:
        """Why a sum has failed: what the watch has found, or finds now."""
        with self._changed:
            self._changed.wait_for(lambda: self.fault is not None, EXPLAINING_SECONDS)
        if self.fault is None:
            hint = "all ranks answer, so one is stuck in a step: see the log of each with -v"
            self._lose(RankError(f"ranks wait for each other: {error.message}", hint=hint))
        assert self.fault is not None
        return self.fault

    def on_fault(self, tell: Callable[[HalfweightError], None]) -> None:
        """Have `tell` called when a rank is lost, by the thread that watches; now if one is."""
        with self._changed:
            self._tell.append(tell)
        if self.fault is not None:
            tell(self.fault)

    def end(self) -> None:
        """Tell all to leave, and kill what is left."""
        if self._is_ended:
            return
        self._is_ended = True
        self.send(Kind.END)
        deadline = time.monotonic() + (ENDING_SECONDS if self.fault is None else 0)
        for member in self.members:
            _leave(member, deadline)
        self._thread.join(2 * BEAT_SECONDS)

    def _are(self, state: Kind) -> bool:
        return all(member.state >= state for member in self.members)

    def _watch(self) -> None:
        with selectors.DefaultSelector() as selector:
            for member in self.members:
                selector.register(member.channel, selectors.EVENT_READ, member)
            beat_at = time.monotonic()
            while not self._is_ended and self.fault is None:
                for key, _ in selector.select(BEAT_SECONDS):
                    self._hear(key.data)
                if time.monotonic() >= beat_at:
                    self.send(Kind.BEAT)
                    beat_at = time.monotonic() + BEAT_SECONDS
                    self._find_silent()

    def _hear(self, member: Member) -> None:
        try:
            kind, content = member.channel.receive()
        except (EOFError, OSError):
            if not self._is_ended:
                self._lose(_gone(member))
            return
        member.heard = time.monotonic()
        if kind == Kind.BEAT:
            member.peak_bytes = int.from_bytes(content, "little")
        elif kind == Kind.FAULT:
            self._lose(from_message(content, member.name))
        else:
            self._note(member, kind, content)

    def _note(self, member: Member, kind: Kind, content: bytes) -> None:
        if kind == Kind.HELLO:
            said = json.loads(content)
            member.where = f"pid {said['pid']} on {said['host']}"
            if wrong := _other_versions(member, said["versions"]):
                self._lose(wrong)
                return
        elif kind == Kind.FOUND:
            member.files = content.decode()
        with self._changed:
            member.state = kind
            self._changed.notify_all()

    def _find_silent(self) -> None:
        now = time.monotonic()
        for member in self.members:
            if member.state > Kind.BEAT and now - member.heard > SILENCE_SECONDS:
                said = f"has said nothing for {SILENCE_SECONDS:.0f} s: it hangs or is stopped"
                self._lose(RankError(f"{member.name} {said}{_last_words(member)}"))

    def _lose(self, fault: HalfweightError) -> None:
        """The job is over: one rank is lost, and no rank can go on without it."""
        with self._changed:
            if self.fault is not None or self._is_ended:
                return
            self.fault = fault
            self._changed.notify_all()
        for member in self.members:
            _leave(member, 0)
        for tell in reversed(self._tell):  # the loop hears of it before the link lets kernels end
            tell(fault)


def _started(rank: int, ranks: int) -> Member:
    ours, theirs = socket.socketpair()
    with theirs:
        number = theirs.fileno()
        command = [sys.executable, "-m", "halfweight.engine.parallel.member"]
        process = subprocess.Popen(
            [*command, str(number), str(rank), str(ranks)],
            pass_fds=(number,),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            process_group=0,  # Ctrl-C is for rank 0, which ends the others
        )
    member = Member(rank, Channel(ours), process, f"pid {process.pid}")
    Thread(target=_listen, args=(member,), daemon=True).start()
    return member


def _listen(member: Member) -> None:
    """Pass on what a rank writes, and keep its last words."""
    assert member.process is not None
    assert member.process.stdout is not None
    for line in member.process.stdout:
        text = line.decode(errors="replace").rstrip()
        if text:
            member.words.append(text)
            log.info("rank %d: %s", member.rank, text)


def _leave(member: Member, deadline: float) -> None:
    """Wait for a rank's end until `deadline`, then make it end."""
    if member.process is not None:
        with suppress(subprocess.TimeoutExpired):
            member.process.wait(max(0, deadline - time.monotonic()))
        if member.process.poll() is None:
            member.process.kill()
            member.process.wait()
    member.channel.close()


def _gone(member: Member) -> RankError:
    if member.process is None:
        return RankError(f"{member.name} is gone", hint="see what it has written")
    with suppress(subprocess.TimeoutExpired):
        member.process.wait(BEAT_SECONDS)
    code, hint = member.process.poll(), "see the log of each rank with -v"
    how = f"ended with code {code}"
    if code is not None and code < 0:
        how = f"was killed by {signal.Signals(-code).name}"
        if -code == signal.SIGKILL:
            hint = "the machine may have run out of memory: see dmesg"
    time.sleep(0.1)  # its last lines may still be on their way
    return RankError(f"{member.name} {how}{_last_words(member)}", hint=hint)


def _last_words(member: Member) -> str:
    return f"; its last words: {member.words[-1]}" if member.words else ""


def _other_versions(member: Member, versions: dict[str, str]) -> UsageError | None:
    for name, ours in hello()["versions"].items():
        if versions.get(name) != ours:
            return UsageError(
                f"{member.name} has {name} {versions.get(name)}, rank 0 has {ours}",
                hint="install the same versions on every machine",
            )
    return None
