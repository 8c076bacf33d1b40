"""Ranks that another program has started: torchrun, or a scheduler that sets what torchrun does.

RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT say who a process is and where the ranks meet. There
rank 0 leaves the address at which it waits for the others' channels, and a secret without which it
talks to nobody.
"""

from __future__ import annotations

import hmac
import json
import os
import secrets
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from torch import distributed as dist

from halfweight.engine.parallel.channel import Channel
from halfweight.engine.parallel.faults import RankError
from halfweight.engine.parallel.job import outside_store
from halfweight.engine.parallel.ranks import STARTING_SECONDS, Member, Ranks
from halfweight.errors import UsageError

NAMES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
ADDRESS = "channels"
SECRET_BYTES = 32
RANK_BYTES = 4


@dataclass(frozen=True)
class Place:
    """Which of how many ranks this process is."""

    rank: int
    ranks: int

    @classmethod
    def found(cls, environment: Mapping[str, str] = os.environ) -> Place | None:
        """As the environment says; None where nobody has started several."""
        if not all(name in environment for name in NAMES):
            return None
        place = cls(int(environment["RANK"]), int(environment["WORLD_SIZE"]))
        return place if place.ranks > 1 else None


def lead(ranks: int) -> tuple[Ranks, Any]:
    """Wait, as rank 0, for the channels of all others; they and the store where ranks meet.

    Raises UsageError where MASTER_PORT is in use, RankError where a rank does not come.
    """
    store = _store(is_first=True)
    secret = secrets.token_bytes(SECRET_BYTES)
    with _listening() as server:
        host, port = os.environ["MASTER_ADDR"], server.getsockname()[1]
        store.set(ADDRESS, json.dumps([host, port, secret.hex()]))
        server.settimeout(STARTING_SECONDS)
        members: dict[int, Member] = {}
        while len(members) < ranks - 1:
            try:
                connection, _ = server.accept()
            except TimeoutError:
                missing = min(set(range(1, ranks)) - members.keys())
                raise RankError(
                    f"rank {missing} has not come within {STARTING_SECONDS} s",
                    hint=f"start all {ranks} ranks, and let them reach {host} on any port",
                ) from None
            if (rank := _admitted(connection, secret)) is not None:
                members[rank] = Member(rank, Channel(connection))
    return Ranks([members[rank] for rank in sorted(members)]), store


def follow(place: Place) -> NoReturn:
    """Be a rank other than 0 until rank 0 ends it."""
    from halfweight.engine.parallel import member

    host, port, secret = json.loads(_store(is_first=False).get(ADDRESS))
    connection = socket.create_connection((host, port), STARTING_SECONDS)
    connection.sendall(bytes.fromhex(secret) + place.rank.to_bytes(RANK_BYTES, "little"))
    member.follow(Channel(connection), place.rank, place.ranks)


def _store(*, is_first: bool) -> Any:
    try:
        return outside_store(is_first=is_first)
    except dist.DistNetworkError as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        if "EADDRINUSE" in str(error):
            raise UsageError(
                f"{where}, where ranks are to meet, is in use",
                hint="give torchrun another --master-port",
            ) from None
        raise RankError(
            f"{where}, where ranks are to meet, cannot be reached: {_first_line(error)}",
            hint="start rank 0 as well, and let all ranks reach that port",
        ) from None


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]


def _listening() -> socket.socket:
    """A socket at the address that all ranks know rank 0 by, or else at all addresses."""
    try:
        return socket.create_server((os.environ["MASTER_ADDR"], 0))
    except OSError:
        return socket.create_server(("", 0))


def _admitted(connection: socket.socket, secret: bytes) -> int | None:
    """The rank at the other end; None, and a closed connection, for somebody else."""
    connection.settimeout(5)
    try:
        said = connection.recv(SECRET_BYTES + RANK_BYTES, socket.MSG_WAITALL)
    except OSError:
        said = b""
    if hmac.compare_digest(said[:SECRET_BYTES], secret):
        return int.from_bytes(said[SECRET_BYTES:], "little")
    connection.close()
    return None
