"""Messages between the run and a worker: JSON after its length in 8 bytes. Each direction has a pipe."""

import json
import os
import struct
from collections.abc import Iterator
from typing import Any


def read_message(descriptor: int) -> Any:
    """The next message. Raises: EOFError: the other end is closed."""
    (size,) = struct.unpack("<Q", _read(descriptor, 8))
    return json.loads(_read(descriptor, size))


def messages(descriptor: int) -> Iterator[Any]:
    """Yields messages until the other end is closed."""
    while True:
        try:
            message = read_message(descriptor)
        except EOFError:
            return
        yield message


def message_bytes(message: Any) -> bytes:
    """Encodes a message for a pipe."""
    body = json.dumps(message).encode()
    return struct.pack("<Q", len(body)) + body


def write_message(descriptor: int, message: Any) -> None:
    """Writes a whole message; waits while the pipe is full."""
    rest = memoryview(message_bytes(message))
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def _read(descriptor: int, size: int) -> bytes:
    parts = []
    while size:
        part = os.read(descriptor, min(size, 1 << 20))
        if not part:
            raise EOFError
        parts.append(part)
        size -= len(part)
    return b"".join(parts)
