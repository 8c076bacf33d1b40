"""What a rank other than 0 runs: `python -m halfweight.engine.parallel.member SOCKET RANK RANKS`.

It says hello, is told its job, loads its part of the model, makes a runner and runs the steps that
rank 0 sends, whose logits nobody here looks at. It leaves when rank 0 says so or is gone, and tells
rank 0 before it leaves for any other reason. Ctrl-C is rank 0's to answer.

It always leaves by `os._exit`: torch's groups wait in their destructors for ranks that are gone.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from threading import Thread
from typing import Any, NoReturn

import torch

from halfweight.engine.parallel.channel import BEAT_SECONDS, Channel, Kind
from halfweight.engine.parallel.faults import BrokenLinkError, to_message
from halfweight.engine.parallel.job import Job, digest, hello, limit_memory, open_store, peak_bytes
from halfweight.engine.parallel.link import STEPPING, make_link
from halfweight.engine.parallel.ranks import EXPLAINING_SECONDS
from halfweight.engine.parallel.steps import StepReader

log = logging.getLogger("halfweight")

WAITING_SECONDS = 2 * EXPLAINING_SECONDS
"""In which a rank whose sum has failed is ended by rank 0, who knows which other one is lost."""


def main(arguments: Sequence[str]) -> NoReturn:
    """A rank that rank 0 has started on its own machine."""
    number, rank, ranks = map(int, arguments)
    follow(Channel(socket.socket(fileno=number)), rank, ranks)


def follow(channel: Channel, rank: int, ranks: int) -> NoReturn:
    """Be rank `rank` until rank 0 ends it; does not return."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    code = 1
    try:
        channel.send(Kind.HELLO, json.dumps(hello()).encode())
        pulse = Pulse(channel)
        _run(channel, rank, ranks, pulse)
        code = 0
    except (EOFError, TimeoutError, ConnectionError):
        print(f"rank {rank}: rank 0 is gone", file=sys.stderr)
    except BrokenLinkError as error:
        time.sleep(WAITING_SECONDS)
        _tell(channel, error)
    except BaseException as error:
        log.exception("rank %d ends", rank)
        _tell(channel, error)
    finally:
        sys.stderr.flush()
        os._exit(code)


def _tell(channel: Channel, error: BaseException) -> None:
    try:
        channel.send(Kind.FAULT, json.dumps(to_message(error)).encode())
    except OSError:
        log.info("rank 0 is gone as well")


class Pulse:
    """Says every second that this rank lives; leaves when nobody is there to hear it."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self.device = torch.device("cpu")
        """Whose memory is told, once it is known."""
        Thread(target=self._beat, daemon=True).start()

    def _beat(self) -> None:
        while True:
            try:
                self._channel.send(Kind.BEAT, peak_bytes(self.device).to_bytes(8, "little"))
            except OSError:
                os._exit(1)
            time.sleep(BEAT_SECONDS)


def _run(channel: Channel, rank: int, ranks: int, pulse: Pulse) -> None:
    from halfweight.checkpoint.headers import read_headers, resolve
    from halfweight.engine.runners import make_runner
    from halfweight.model.share import described, load_part, own_part

    job = Job.from_bytes(_wait_for(channel, Kind.JOB))
    logging.basicConfig(level=job.log_level, format="%(message)s", stream=sys.stderr)
    device = job.device_of(rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(job.num_threads)
    limit_memory(job, rank)
    pulse.device = device
    checkpoint = read_headers(resolve(job.model))
    part = own_part(checkpoint, described(checkpoint.root), rank, ranks)
    channel.send(Kind.FOUND, digest(part).encode())
    link = make_link(
        *(open_store(job), rank, ranks, device), backend=job.backend, is_local=job.is_local
    )
    model = load_part(checkpoint, rank, ranks, link, device=device, **job.loading_options())
    channel.send(Kind.LOADED)
    _wait_for(channel, Kind.GO)
    runner: Any = make_runner(model, **job.limits)
    link.set_timeout(STEPPING)
    channel.send(Kind.READY)
    reader = StepReader()
    with torch.inference_mode():
        while (message := _next(channel))[0] == Kind.STEP:
            runner.run(reader.read(message[1]))
    if device.type == "cuda":  # rank 0 may be told of its last step by what still runs here
        torch.cuda.synchronize(device)
    runner.close()


def _next(channel: Channel) -> tuple[Kind, bytes]:
    """The next message that is more than a beat."""
    while True:
        kind, content = channel.receive()
        if kind != Kind.BEAT:
            return kind, content


def _wait_for(channel: Channel, wanted: Kind) -> bytes:
    kind, content = _next(channel)
    if kind == Kind.END:
        raise EOFError
    assert kind == wanted, (kind, wanted)
    return content


if __name__ == "__main__":
    main(sys.argv[1:])
