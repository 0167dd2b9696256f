"""A server in this process that echoes the log-probabilities of a prompt's tokens, as vLLM does, by a policy."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from gvpo_core.training.policy import Batch, Policy


class EchoServer(ThreadingHTTPServer):
    """Answers POST /v1/completions, after the faults that are queued."""

    daemon_threads = True

    def __init__(self, policy: Policy, name: str, faults=(), lost=()) -> None:
        """
        Args:
          name: of the model.
          faults: of the next requests: a status; "no echo"; "bos", as a server that adds a token; "garbage"; "nan".
          lost: numbers of requests, from 0, that are always answered with 500.
        """
        super().__init__(("127.0.0.1", 0), _Handler)
        self.policy, self.name, self.faults, self.lost = policy, name, list(faults), lost
        self.asked, self.keys, self.lock = [], set(), threading.Lock()
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def logprobs(self, ids: list[int]) -> list[float | None]:
        """Of each token given those before it; the first has none."""
        places = range(1, len(ids))
        batch = Batch([tuple(ids[:i]) for i in places], [(ids[i],) for i in places], [*range(len(places))])
        return [None, *map(float, self.policy.logprobs(batch))]

    def go(self) -> None:
        """Refuses connections from now on."""
        self.shutdown()
        self.server_close()

    def __exit__(self, *_) -> None:
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    wbufsize = -1  # an answer in one packet

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        with server.lock:  # one policy, and requests in order
            number, fault = len(server.asked), server.faults.pop(0) if server.faults else None
            server.asked.append(body)
            server.keys.add(self.headers.get("Authorization"))
            fault = 500 if number in server.lost else fault
            ids = body["prompt"]
            scores = server.logprobs(ids) if body["echo"] and fault != "no echo" else []
        if fault == "bos":
            ids, scores = [1, *ids], [None, *scores]
        if fault == "nan":
            scores[-1] = None
        choice = {"text": "", "prompt_token_ids": ids, "logprobs": {"token_logprobs": scores}}
        answer = json.dumps({"model": server.name, "choices": [choice]}).encode()
        sent = b"no JSON" if fault == "garbage" else answer
        self.send_response(fault if isinstance(fault, int) else 200)
        self.send_header("Content-Length", str(len(sent)))
        self.end_headers()
        self.wfile.write(sent)

    def log_message(self, *arguments) -> None:
        """Prints nothing."""
