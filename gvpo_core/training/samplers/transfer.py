"""Sends weights to the memory of a running vLLM server, by its weight-transfer interface: no folder, no second copy.

HTTP requests announce the tensors; a `Channel` of the policy's framework carries them. Written from the sources of vLLM
0.32.
"""

import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import Any, Literal

import numpy as np

from gvpo_core.training.config import ConfigError
from gvpo_core.training.policy import Policy
from gvpo_core.training.policy.ranks import agree, attempt
from gvpo_core.training.samplers.channels import Channel, Named, Part, own_address
from gvpo_core.training.samplers.http import Failed, Server, between_looks
from gvpo_core.training.samplers.protocol import SamplerError
from gvpo_core.training.samplers.workers import Workers

Kind = Literal["nccl", "ipc", "tcp"]

INCOMPLETE = "incomplete"
"""Version of the server's weights during an update."""
_LOOK_EVERY = 0.01  # seconds between checks
_RESUME = 30.0  # seconds to resume the server
_LAST_WORDS = 5.0  # seconds to wait for the server's error after sending a part failed


class Transfer:
    """Sends a policy's weights to one server. Every rank has an instance; only the main rank talks to the server."""

    def __init__(
        self, kind: Kind, url: str, *, listen: str, api_key: str, tries: int, pause: float, deadline: float
    ) -> None:
        """
        Args:
          kind: type of the channel.
          listen: address at which the server's workers reach the main rank; see `own_address`.
          tries: most tries of an update, including the first, while the server is reachable.
          pause: seconds before the second try; doubled before each further one.
          deadline: seconds that one update may take, and that a server may be away.
        """
        self.kind, self._listen = kind, listen
        self._tries, self._pause, self._deadline = tries, pause, deadline
        self._server = Server(url, tries=1, pause=pause, api_key=api_key, waits=False)
        self._run = 0  # id of the run in version names, equal on all ranks
        self._channel: Channel | None = None
        self._name = ""  # newest version that the server has completely
        self._until = 0.0

    def send(self, policy: Policy, version: int) -> None:
        """Sends the policy's weights to the server, and retries after a transient failure. Every rank calls this.

        The server first answers the requests in flight, then pauses during the update. Its prefix cache is emptied.

        Raises: SamplerError: the server does not have the weights after all tries. ConfigError: the policy cannot send
          weights.
        """
        if not hasattr(policy, "weight_channel"):
            backend = policy.describe().backend
            raise ConfigError(
                f"engine.transfer = {self.kind!r} sends tensors of gvpo_torch, and the backend is {backend}: set"
                " engine.transfer = 'folder'"
            )
        if not self._run:
            self._run = int(policy.gather(np.array([time.time_ns()] if policy.rank == 0 else [], dtype=np.int64))[0])
        self._name, name, number = INCOMPLETE, f"{self._run}-{version}", 0
        until, waited = time.monotonic() + self._deadline, 0
        while True:
            failed = self._try(policy, name)
            away = failed is not None and failed.away and time.monotonic() < until
            number, waited = number + (not away), waited + away
            again = failed is not None and failed.again and (away or number < self._tries)
            outcome = policy.gather(np.array([failed is not None, again] if policy.rank == 0 else [], dtype=np.int64))
            if not outcome[0]:
                self._name = name
                self._server.answered()
                return
            if not outcome[1]:
                tries = "" if number + waited == 1 else f", tried {number + waited} times"
                error = SamplerError(f"the weights were not sent by {self.kind}{tries}: {failed}") if failed else None
                agree(policy, error, SamplerError)
            wait = partial(self._wait, failed, self._pause * 2.0 ** min(number + waited - 1, 60), until)
            attempt(policy, wait, main_only=True, kind=SamplerError)

    def _wait(self, failed: Failed | None, seconds: float, until: float) -> None:
        if failed is not None and failed.away:
            self._server.wait(failed, between_looks(seconds), until)
        else:
            time.sleep(seconds)

    def heed(self, stopping: Callable[[], bool]) -> None:
        """See `Sampler.stopping`."""
        self._server.stopping = stopping

    def _try(self, policy: Any, name: str) -> Failed | None:
        """Tries one update. Returns: the failure, on the main rank; None if it succeeded."""
        fresh: Channel = policy.weight_channel(self.kind)  # on every rank, so that all ranks raise its errors
        tensors, failed = iter(policy.tensors()), None
        try:
            if policy.rank == 0:
                self._until = time.monotonic() + self._deadline
                self._update(fresh, tensors, name)
        except Failed as e:
            failed = e
        except (OSError, RuntimeError, ValueError, ImportError) as e:  # errors of torch, NCCL or vLLM
            failed = Failed(f"{type(e).__name__}: {' '.join(str(e).split())[:300]}", again=False)
        if failed:
            self.close()
        if policy.world_size > 1:
            for _ in tensors:  # ranks gather all tensors together
                pass
        return failed

    def _update(self, fresh: Channel, tensors: Iterator[Named], name: str) -> None:
        workers: Workers[Any] = Workers(2)
        try:
            channel = self._channel = self._channel or self._connected(fresh, workers)
            try:
                self._post("/pause?mode=wait")
                self._post("/update_weight_version", {"new_version": INCOMPLETE})
                self._post("/start_weight_update")
                for part in channel.parts(tensors):
                    self._send(part, workers)
                self._post("/finish_weight_update", {"weight_version": name})
                channel.finished()
                self._server.request("/reset_prefix_cache", {}, self._until, cache_is_empty)
            finally:
                with suppress(Failed):  # the server may be gone; if it stays paused, it answers nothing
                    self._server.request("/resume", {}, time.monotonic() + _RESUME, lambda answer: None)
        finally:
            workers.close()

    def _send(self, part: Part, workers: Workers[Any]) -> None:
        request = workers.submit(partial(self._post, "/update_weights", {"update_info": part.info}))
        try:
            part.carry(lambda: self._watch(request))
        except Exception:
            with suppress(TimeoutError):  # the server's own error is more helpful
                request.result(min(_LAST_WORDS, max(self._until - time.monotonic(), 0.0)))
            raise
        while not request.done():
            self._watch(request)
            time.sleep(_LOOK_EVERY)
        request.result()

    def _watch(self, *running: "Future[Any]") -> None:
        """Raises Failed if one of the requests has failed, or the time is over."""
        for future in running:
            if future.done():
                future.result()
        if time.monotonic() > self._until:
            raise self._late()

    def _connected(self, channel: Channel, workers: Workers[Any]) -> Channel:
        """Opens the channel to all workers of the server. Ends an earlier channel and an incomplete update first."""
        count = int(self._read("/get_world_size", "world_size"))
        if self._read("/weight_info", "weight_version") == INCOMPLETE:
            with suppress(Failed):  # the update may already have started
                self._post("/start_weight_update")
            self._post("/finish_weight_update")
        with suppress(Failed):
            self._post("/shutdown_weight_transfer_engine")
        try:
            info = channel.open(*own_address(self._server.url, self._listen), count)
            request = workers.submit(partial(self._post, "/init_weight_transfer_engine", {"init_info": info}))
            join = workers.submit(partial(channel.join, self._until))
            while not (request.done() and join.done()):
                self._watch(request, join)
                time.sleep(_LOOK_EVERY)
            self._watch(request, join)
        except BaseException:
            channel.close()
            raise
        return channel

    def _post(self, path: str, body: dict[str, Any] | None = None) -> None:
        try:
            self._server.request(path, body or {}, self._until, lambda answer: None)
        except Failed as e:
            raise self._explained(path, e) from e

    def _read(self, path: str, field: str) -> Any:
        """Returns a field of the answer to a GET."""

        def read(content: bytes) -> Any:
            answer = json.loads(content)
            return answer[field]

        try:
            return self._server.request(path, None, self._until, read)
        except Failed as e:
            raise self._explained(path, e) from e
        except (ValueError, KeyError, TypeError) as e:
            raise Failed(f"{self._server.url}{path} answers without {field}", again=True) from e

    def _explained(self, path: str, error: Failed) -> Failed:
        if time.monotonic() > self._until:
            return self._late()
        text = str(error)
        if "answers 404" in text or "not configured" in text:
            return Failed(
                f"{text} ({path}): start vLLM with VLLM_SERVER_DEV_MODE=1 and --weight-transfer-config"
                f' \'{{"backend": "{self.kind}"}}\'',
                again=False,
            )
        return Failed(f"{text} ({path})", again=error.again, away=error.away)

    def _late(self) -> Failed:
        return Failed(f"{self._server.url} did not take the weights within {self._deadline:g} s", again=False)

    @property
    def named(self) -> str:
        """The version that the server should report."""
        return self._name

    def close(self) -> None:
        """Ends the connection. A later `send` opens a new one."""
        if self._channel is not None:
            self._channel.close()
        self._channel = None


def cache_is_empty(content: bytes) -> None:
    """Checks the answer to /reset_prefix_cache. Raises: Failed: the cache still has results of older weights."""
    with suppress(ValueError):
        answer = json.loads(content or b"{}")
        if isinstance(answer, dict) and answer.get("success") is False:
            raise Failed("the prefix cache was not emptied: requests are still running", again=True)
