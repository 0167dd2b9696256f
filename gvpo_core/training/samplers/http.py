"""Requests to a server: JSON by POST, repeated with growing pauses, with a key from the environment.

A server that is away or has no time, which refuses or resets connections or answers 429, 502, 503 or 504, is waited for
until the deadline. Other failures have a number of tries.
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
_SHORTEST, _LONGEST = 0.05, 5.0  # seconds between two looks for a server that is away
_LOOK_EVERY = 0.1  # seconds
_SAID_AFTER = 0.5  # seconds for which a server is away: a single connection may be reset


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
        self.away = away  # the server is not there or has no time: worth a wait
        self.status = status  # of the answer
        self.other_weights = other_weights  # the server no longer has those that were asked for


def read_json(content: bytes, url: str) -> Any:
    """The value of an answer. Raises: Failed: it is no JSON."""
    try:
        return json.loads(content)
    except ValueError as e:
        raise Failed(f"{url} does not answer with JSON: {e}", again=True) from e


class Clock:
    """The time that the requests of a step have, from when the first of them starts."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self._until, self._started = seconds, 0.0, threading.Event()

    def start(self) -> float:
        """Starts, unless it runs. Returns: the moment of time.monotonic at which it ends."""
        if not self._started.is_set():
            self._until = time.monotonic() + self._seconds
            self._started.set()
        return self._until

    def left(self) -> float:
        """Seconds until the end, at least 0; waits for the start."""
        self._started.wait()
        return max(self._until - time.monotonic(), 0.0)


class Server:
    """A server by its address."""

    def __init__(
        self, url: str, *, tries: int, pause: float, api_key: str = "", section: str = "engine", waits: bool = True
    ) -> None:
        """
        Args:
          url: without /v1.
          tries: requests, the first one included.
          pause: seconds before the second try; twice as long before each further one.
          api_key: "$NAME", the environment variable that holds the key. It is read for each request and kept nowhere.
          section: of the settings, for errors.
          waits: whether a server that is away is waited for; else that is a failure as others.
        Raises: ConfigError: the variable is not set.
        """
        self.url, self.tries, self.pause = url.rstrip("/"), tries, pause
        self.stopping: Callable[[], bool] = bool  # asked while the server is away: whether to wait no longer
        self._waits, self._away, self._saying = waits, 0.0, threading.Lock()  # away: since when; 0: it is there
        self._said = False  # that it is away
        self._key, self._section = api_key, section
        self._read_key()

    def asked(
        self,
        path: str,
        body: dict[str, Any] | None,
        until: float,
        read: Callable[[bytes], Result],
        *,
        patient: bool = False,
    ) -> Result:
        """What `read` makes of the answer, tried again where that may help.

        Args:
          body: of a POST; None: a GET.
          until: the moment of time.monotonic at which the tries end.
          read: raises Failed where it cannot use the answer.
          patient: whether every failure that may pass is waited for, whatever the number of tries.
        Raises: Failed: of the last try. Stopped: the run was asked to stop while the server was away.
        """
        failed = waited = 0
        while True:
            try:
                answer = read(self._ask(path, body, until))
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
                self.there()
                return answer

    def wait(self, error: Failed, seconds: float, until: float) -> None:
        """Waits for a server that is away, and says so once.

        Args:
          error: of the request that failed.
          until: the moment of time.monotonic at which it is given up.
        Raises: Stopped: the run was asked to stop.
        """
        with self._saying:
            self._away = self._away or time.monotonic()
            new = not self._said and time.monotonic() - self._away >= _SAID_AFTER
            self._said |= new
        if new:
            left = max(until - time.monotonic(), 0.0)
            _log.warning("%s; waiting for the server for up to %.0f s", error, left)
        sleep(seconds, self.stopping)

    def there(self) -> None:
        """The server has answered; says so where it was away."""
        with self._saying:
            since, said = self._away, self._said
            self._away, self._said = 0.0, False
        if said:
            _log.warning("%s answers again, after %.0f s", self.url, time.monotonic() - since)

    def told(self, path: str, until: float) -> dict[str, Any]:
        """The JSON object that a GET answers; empty where the server answers something else, or not.

        Args:
          until: the moment of time.monotonic at which the tries end.
        """
        try:
            facts = self.asked(path, None, until, lambda content: read_json(content, self.url))
        except Failed:
            return {}
        return facts if isinstance(facts, dict) else {}

    def _read_key(self) -> str:
        return str(resolved({"api_key": self._key}, self._section)["api_key"])

    def _ask(self, path: str, body: dict[str, Any] | None, until: float) -> bytes:
        request = urllib.request.Request(self.url + path, None if body is None else json.dumps(body).encode())
        request.add_header("Content-Type", "application/json")
        key = self._read_key()
        if key:
            request.add_unredirected_header("Authorization", f"Bearer {key}")  # another host never gets it
        try:
            with urllib.request.urlopen(request, timeout=max(until - time.monotonic(), 0.01)) as file:
                answer: bytes = file.read()
                return answer
        except urllib.error.HTTPError as e:
            with e:  # else its connection stays open until the error is collected
                text = e.read(300).decode("utf-8", "replace")
            shown = text.replace(key, "***") if key else text
            again, away = e.code == 429 or e.code >= 500, e.code in _BUSY
            raise Failed(f"{self.url} answers {e.code}: {shown}", again=again, away=away, status=e.code) from e
        except (OSError, http.client.HTTPException) as e:  # refused, reset, too slow, ended within the answer
            reason = e.reason if isinstance(e, urllib.error.URLError) else e
            away = isinstance(reason, ConnectionError) or getattr(reason, "errno", None) in _UNREACHABLE
            raise Failed(f"{self.url}: {type(e).__name__}: {e}", again=True, away=away) from e


def between_looks(seconds: float) -> float:
    """The seconds to wait before the next look for a server that is away: neither a busy loop nor a long sleep."""
    return min(max(seconds, _SHORTEST), _LONGEST)


def sleep(seconds: float, stopping: Callable[[], bool]) -> None:
    """Sleeps. Raises: Stopped: `stopping` says that the run was asked to stop."""
    until = time.monotonic() + seconds
    while True:
        if stopping():
            raise Stopped
        left = until - time.monotonic()
        if left <= 0:
            return
        time.sleep(min(left, _LOOK_EVERY))
