"""Messages between rank 0 and another rank, over a socket: a kind and some bytes.

Each side sends a beat every second, so silence means that the other hangs, and the end of the
stream that it is gone.
"""

from __future__ import annotations

import socket
import struct
from enum import IntEnum
from threading import Lock

BEAT_SECONDS = 1.0
SILENCE_SECONDS = 20.0
"""After so long without a word a rank is taken for lost."""
_HEAD = struct.Struct("<IB")


class Kind(IntEnum):
    """What a message is."""

    BEAT = 0
    """From another rank with the most bytes that it has had of its device, int64."""
    HELLO = 1
    """To rank 0: who and what this rank is."""
    JOB = 2
    """From rank 0: what to load and how to reach the others."""
    LOADED = 3
    """To rank 0: the weights are there."""
    GO = 4
    """From rank 0: all ranks have loaded."""
    READY = 5
    """To rank 0: the runner is made."""
    STEP = 6
    FAULT = 7
    """To rank 0: why this rank ends."""
    END = 8
    """From rank 0: nothing more comes."""


class Channel:
    """One end. Any thread may send; one receives."""

    def __init__(self, connection: socket.socket) -> None:
        connection.settimeout(SILENCE_SECONDS)
        self._socket, self._lock = connection, Lock()

    def fileno(self) -> int:
        """Of the socket, to wait for several."""
        return self._socket.fileno()

    def send(self, kind: Kind, content: bytes = b"") -> None:
        """Raises OSError where nobody is there."""
        with self._lock:
            self._socket.sendall(_HEAD.pack(len(content), kind) + content)

    def receive(self) -> tuple[Kind, bytes]:
        """The next message. Raises EOFError at the end, TimeoutError after SILENCE_SECONDS."""
        length, kind = _HEAD.unpack(self._read(_HEAD.size))
        return Kind(kind), self._read(length)

    def close(self) -> None:
        """The other end finds the end of the stream."""
        self._socket.close()

    def _read(self, length: int) -> bytes:
        found = bytearray()
        while len(found) < length:
            part = self._socket.recv(length - len(found))
            if not part:
                raise EOFError
            found += part
        return bytes(found)
