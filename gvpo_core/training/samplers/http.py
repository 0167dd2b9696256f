"""Requests to a server: JSON by POST, repeated with growing pauses, with a key from the environment.

If a server is away or busy (refuses or resets connections, or answers 429, 502, 503 or 504), the client waits for it
until the deadline. Other failures have a limited number of tries.
"""

import errno
import http.client
import json
import logging
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any, TypeVar

from gvpo_core.training.config.secrets import resolved
from gvpo_core.training.samplers.protocol import Stopped

Result = TypeVar("Result")
_log = logging.getLogger("gvpo")
_BUSY = (429, 502, 503, 504)
_UNREACHABLE = (errno.EHOSTUNREACH, errno.EHOSTDOWN, errno.ENETUNREACH)
_SHORTEST, _LONGEST = 0.05, 5.0  # seconds between two attempts to reach a server that is away
_LOOK_EVERY = 0.1  # seconds
_LOGGED_AFTER = 0.5  # seconds away before this is logged: a single connection may be reset


class Failed(Exception):
    """A request without a usable answer."""

    def __init__(
        self,
        message: str,
        *,
        again: bool,
        away: bool = False,
        status: int | None = None,
        other_weights: bool = False,
    ) -> None:
        super().__init__(message)
        self.again = again  # worth another try
        self.away = away  # the server cannot be reached or is busy: worth a wait
        self.status = status  # HTTP status of the answer
        self.other_weights = other_weights  # the server no longer has the requested weights


def read_json(content: bytes, url: str) -> Any:
    """Parses an answer. Raises: Failed: it is not JSON."""
    try:
        return json.loads(content)
    except ValueError as e:
        raise Failed(f"{url} does not answer with JSON: {e}", again=True) from e


class Clock:
    """The time limit of a step's requests. It begins when the first request starts."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self._until, self._started = seconds, 0.0, threading.Event()

    def start(self) -> float:
        """Starts the clock, unless it runs. Returns: its end, as a time of time.monotonic."""
        if not self._started.is_set():
            self._until = time.monotonic() + self._seconds
            self._started.set()
        return self._until

    def left(self) -> float:
        """Waits for the start. Returns: seconds until the end, at least 0."""
        self._started.wait()
        return max(self._until - time.monotonic(), 0.0)


class Server:
    """Client of a server at a URL."""

    def __init__(
        self, url: str, *, tries: int, pause: float, api_key: str = "", section: str = "engine", waits: bool = True
    ) -> None:
        """
        Args:
          url: without /v1.
          tries: most requests, including the first.
          pause: seconds before the second try; doubled before each further one.
          api_key: "$NAME", the environment variable with the key. It is read for each request and not stored.
          section: section of the settings, for errors.
          waits: whether to wait for a server that is away. If False, that is an ordinary failure.
        Raises: ConfigError: the variable is not set.
        """
        self.url, self.tries, self.pause = url.rstrip("/"), tries, pause
        self.stopping: Callable[[], bool] = bool  # called while the server is away: whether to stop waiting
        self._waits, self._away, self._lock = waits, 0.0, threading.Lock()  # _away: since when; 0: not away
        self._logged = False  # whether the log says that it is away
        self._key, self._section = api_key, section
        self._read_key()

    def request(
        self,
        path: str,
        body: dict[str, Any] | None,
        until: float,
        read: Callable[[bytes], Result],
        *,
        patient: bool = False,
    ) -> Result:
        """Sends a request and returns `read(answer)`. Retries if that may help.

        Args:
          body: body of a POST; None: a GET.
          until: the time of time.monotonic at which the tries end.
          read: reads the answer; raises Failed if it cannot be used.
          patient: whether to wait out every transient failure, regardless of the number of tries.
        Raises: Failed: that of the last try. Stopped: the run was asked to stop while the server was away.
        """
        failed = waited = 0
        while True:
            try:
                answer = read(self._send(path, body, until))
            except Failed as e:
                waits = self._waits and (e.away or patient)
                failed, waited = failed + (not waits), waited + waits
                seconds = self.pause * 2.0 ** min(failed + waited - 1, 60)
                seconds = between_looks(seconds) if waits else seconds
                if not e.again or failed == self.tries or time.monotonic() + seconds >= until:
                    raise
                if waits:
                    self.wait(e, seconds, until)
                else:
                    time.sleep(seconds)
            else:
                self.answered()
                return answer

    def wait(self, error: Failed, seconds: float, until: float) -> None:
        """Waits for a server that is away, and logs that once.

        Args:
          error: error of the failed request.
          until: the time of time.monotonic at which the wait ends.
        Raises: Stopped: the run was asked to stop.
        """
        with self._lock:
            self._away = self._away or time.monotonic()
            new = not self._logged and time.monotonic() - self._away >= _LOGGED_AFTER
            self._logged |= new
        if new:
            left = max(until - time.monotonic(), 0.0)
            _log.warning("%s; waiting for the server for up to %.0f s", error, left)
        sleep(seconds, self.stopping)

    def answered(self) -> None:
        """Notes that the server has answered. Logs that if the server was away."""
        with self._lock:
            since, logged = self._away, self._logged
            self._away, self._logged = 0.0, False
        if logged:
            _log.warning("%s answers again, after %.0f s", self.url, time.monotonic() - since)

    def get_object(self, path: str, until: float) -> dict[str, Any]:
        """Returns the JSON object that a GET gives; empty if the server does not answer with one.

        Args:
          until: the time of time.monotonic at which the tries end.
        """
        try:
            facts = self.request(path, None, until, lambda content: read_json(content, self.url))
        except Failed:
            return {}
        return facts if isinstance(facts, dict) else {}

    def _read_key(self) -> str:
        return str(resolved({"api_key": self._key}, self._section)["api_key"])

    def _send(self, path: str, body: dict[str, Any] | None, until: float) -> bytes:
        request = urllib.request.Request(self.url + path, None if body is None else json.dumps(body).encode())
        request.add_header("Content-Type", "application/json")
        key = self._read_key()
        if key:
            request.add_unredirected_header("Authorization", f"Bearer {key}")  # not sent to other hosts
        try:
            with urllib.request.urlopen(request, timeout=max(until - time.monotonic(), 0.01)) as file:
                answer: bytes = file.read()
                return answer
        except urllib.error.HTTPError as e:
            with e:  # otherwise its connection stays open until the error is collected
                text = e.read(300).decode("utf-8", "replace")
            shown = text.replace(key, "***") if key else text
            again, away = e.code == 429 or e.code >= 500, e.code in _BUSY
            raise Failed(f"{self.url} answers {e.code}: {shown}", again=again, away=away, status=e.code) from e
        except (OSError, http.client.HTTPException) as e:  # refused, reset, too slow, or ended inside the answer
            reason = e.reason if isinstance(e, urllib.error.URLError) else e
            away = isinstance(reason, ConnectionError) or getattr(reason, "errno", None) in _UNREACHABLE
            raise Failed(f"{self.url}: {type(e).__name__}: {e}", again=True, away=away) from e


def between_looks(seconds: float) -> float:
    """Seconds to wait before the next attempt to reach a server that is away: no busy loop, and no long sleep."""
    return min(max(seconds, _SHORTEST), _LONGEST)


def sleep(seconds: float, stopping: Callable[[], bool]) -> None:
    """Sleeps. Raises: Stopped: the run was asked to stop, as `stopping` tells."""
    until = time.monotonic() + seconds
    while True:
        if stopping():
            raise Stopped
        left = until - time.monotonic()
        if left <= 0:
            return
        time.sleep(min(left, _LOOK_EVERY))
