"""Channels that carry weights to the workers of a server: protocol, parts, and a channel over TCP."""

import secrets
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import urlsplit

from gvpo_core.training.samplers.http import Failed

PART_BYTES = 2**28
"""Bytes of weights in one request. In addition to the model, one part and one tensor are in memory."""
_SLICE, _LOOK_EVERY = 2**20, 0.5  # bytes sent at a time; seconds between checks
_TOKEN = 32  # bytes

Named = tuple[str, Any]  # a tensor and its name in a Hugging Face folder
Watch = Callable[[], None]
"""Raises Failed if the server has rejected the part, or the time is over."""


@dataclass(frozen=True)
class Part:
    """Some of the weights."""

    info: dict[str, Any]  # the update_info of the request: names, dtype_names, shapes
    carry: Callable[[Watch], None]  # sends the tensors while the server answers the request


class Channel(Protocol):
    """The trainer's end. `open` and `join` are called once, then `parts` and `finished` for each version."""

    def open(self, host: str, port: int, workers: int) -> dict[str, Any]:
        """Prepares a connection to all workers of the server. Returns: the init_info that tells them the address.

        Args:
          host, port: address of this machine; port 0: any free port.
        Raises: Failed: the channel cannot serve so many workers, or the address cannot be used.
        """

    def join(self, until: float) -> None:
        """Connects to the workers, in a thread, while the server handles the init_info. Raises: Failed."""

    def parts(self, tensors: Iterator[Named]) -> Iterator[Part]:
        """Yields the tensors in parts. The caller takes the next part after the server has received the one before."""

    def finished(self) -> None:
        """Called after the server has finished the update."""

    def close(self) -> None:
        """Ends the connection, even during `join` and `carry`."""


def collected(tensors: Iterable[Named], size: Callable[[Any], int]) -> Iterator[list[Named]]:
    """Yields lists of tensors of up to about PART_BYTES each.

    Args:
      size: returns the bytes of a tensor.
    """
    part, nbytes = list[Named](), 0
    for name, tensor in tensors:
        if part and nbytes + size(tensor) > PART_BYTES:
            yield part
            part, nbytes = [], 0
        part.append((name, tensor))
        nbytes += size(tensor)
    if part:
        yield part


def described(part: Iterable[Named]) -> dict[str, Any]:
    """Returns the update_info fields that all of vLLM's transfer engines share."""
    named = list(part)
    return {
        "names": [name for name, _ in named],
        "dtype_names": [str(tensor.dtype).rpartition(".")[2] for _, tensor in named],
        "shapes": [list(tensor.shape) for _, tensor in named],
    }


def own_address(url: str, listen: str) -> tuple[str, int]:
    """Returns the host and port at which the server's workers reach this machine; port 0: any free port.

    Args:
      listen: engine.listen, "HOST" or "HOST:PORT". Empty: the address from which this machine reaches the server.
    Raises: Failed: the server's host is unknown.
    """
    if listen:
        host, _, port = listen.rpartition(":") if ":" in listen else (listen, "", "0")
        return host, int(port)
    parts = urlsplit(url)
    try:
        family, _, _, _, place = socket.getaddrinfo(parts.hostname, parts.port or 80, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:  # sends nothing
            probe.connect(place)
            return str(probe.getsockname()[0]), 0
    except OSError as e:
        raise Failed(f"{url}: no address of this machine leads there: {e}", again=True) from e


def listening(host: str, port: int) -> socket.socket:
    """Opens a listening socket. Raises: Failed: the address cannot be used."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except OSError as e:
        place = f"{host}:{port}" if port else host
        raise Failed(
            f"this machine cannot listen at {place} ({e.strerror or e}): set engine.listen to an address of it that"
            " the server reaches",
            again=False,
        ) from e


class TCP:
    """Sends the bytes of the tensors to each worker over a connection that the worker opens (`gvpo_vllm`).

    A worker first sends the token of the init_info. Connections without it are closed.
    """

    def __init__(self, as_bytes: Callable[[Any], memoryview]) -> None:
        """
        Args:
          as_bytes: returns the bytes of a tensor in row-major order.
        """
        self._as_bytes, self._token = as_bytes, secrets.token_hex(_TOKEN // 2)
        self._server: socket.socket | None = None
        self._workers, self._connections = 0, dict[int, socket.socket]()

    def open(self, host: str, port: int, workers: int) -> dict[str, Any]:
        """See `Channel`."""
        self._server, self._workers = listening(host, port), workers
        self._server.listen(workers)
        return {"address": host, "port": self._server.getsockname()[1], "token": self._token}

    def join(self, until: float) -> None:
        """See `Channel`."""
        server = self._server
        assert server is not None  # `open` comes first
        server.settimeout(_LOOK_EVERY)
        while len(self._connections) < self._workers:
            if time.monotonic() > until:
                raise Failed(f"{len(self._connections)} of {self._workers} workers have connected", again=False)
            try:
                connection, _ = server.accept()
            except TimeoutError:
                continue
            except OSError as e:  # closed
                raise Failed(f"the connection was ended: {e}", again=True) from e
            connection.settimeout(5)
            try:
                greeting = _received(connection, _TOKEN + 4)
            except OSError:
                greeting = b""
            rank = int.from_bytes(greeting[_TOKEN:], "big")
            if greeting[:_TOKEN].decode("ascii", "replace") != self._token or not rank < self._workers:
                connection.close()
                continue
            connection.settimeout(_LOOK_EVERY)
            self._connections[rank] = connection

    def parts(self, tensors: Iterator[Named]) -> Iterator[Part]:
        """See `Channel`."""
        for part in collected(tensors, lambda tensor: int(tensor.nbytes)):
            yield Part(described(part), lambda watch, part=part: self._carry(part, watch))  # type: ignore[misc]

    def _carry(self, part: list[Named], watch: Watch) -> None:
        for _, tensor in part:
            content = self._as_bytes(tensor)
            for connection in self._connections.values():
                sent = 0
                while sent < len(content):
                    watch()
                    piece = content[sent : sent + _SLICE]
                    try:
                        sent += connection.send(piece)
                    except TimeoutError:  # the worker is busy, or does not read
                        continue
                    except OSError as e:
                        raise Failed(f"a worker ended the connection: {e}", again=True) from e

    def finished(self) -> None:
        """See `Channel`."""

    def close(self) -> None:
        """See `Channel`."""
        for connection in (self._server, *self._connections.values()):
            if connection is not None:
                connection.close()
        self._server, self._connections = None, {}


def _received(connection: socket.socket, count: int) -> bytes:
    content = b""
    while len(content) < count and (more := connection.recv(count - len(content))):
        content += more
    return content
