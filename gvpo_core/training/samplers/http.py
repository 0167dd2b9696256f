"""Requests to a server: JSON by POST, repeated with growing pauses, with a key from the environment."""

import http.client
import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any, TypeVar

from gvpo_core.training.config.secrets import resolved

Result = TypeVar("Result")


class Failed(Exception):
    """A request without a usable answer."""

    def __init__(self, message: str, *, again: bool) -> None:
        super().__init__(message)
        self.again = again  # worth another try


def read_json(content: bytes, url: str) -> Any:
    """The value of an answer. Raises: Failed: it is no JSON."""
    try:
        return json.loads(content)
    except ValueError as e:
        raise Failed(f"{url} answers no JSON: {e}", again=True) from e


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

    def __init__(self, url: str, *, tries: int, pause: float, api_key: str = "", section: str = "engine") -> None:
        """
        Args:
          url: without /v1.
          tries: requests, the first one included.
          pause: seconds before the second try; twice as long before each further one.
          api_key: "$NAME", the environment variable that holds the key. It is read for each request and kept nowhere.
          section: of the settings, for errors.
        Raises: ConfigError: the variable is not set.
        """
        self.url, self.tries, self.pause = url.rstrip("/"), tries, pause
        self._key, self._section = api_key, section
        self._read_key()

    def asked(self, path: str, body: dict[str, Any] | None, until: float, read: Callable[[bytes], Result]) -> Result:
        """What `read` makes of the answer, tried again where that may help. Raises: Failed: of the last try.

        Args:
          body: of a POST; None: a GET.
          until: the moment of time.monotonic at which the tries end.
          read: raises Failed where it cannot use the answer.
        """
        number = 0
        while True:
            try:
                return read(self._ask(path, body, until))
            except Failed as e:
                pause, number = self.pause * 2**number, number + 1
                if not e.again or number == self.tries or time.monotonic() + pause >= until:
                    raise
                time.sleep(pause)

    def told(self, path: str, until: float) -> dict[str, Any]:
        """The JSON object that one GET answers; empty where the server answers something else, or not.

        Args:
          until: the moment of time.monotonic at which the request ends.
        """
        try:
            facts = read_json(self._ask(path, None, until), self.url)
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
            raise Failed(f"{self.url} answers {e.code}: {shown}", again=e.code == 429 or e.code >= 500) from e
        except (OSError, http.client.HTTPException) as e:  # refused, reset, too slow, ended within the answer
            raise Failed(f"{self.url}: {type(e).__name__}: {e}", again=True) from e
