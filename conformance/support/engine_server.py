"""Fakes of vLLM's and SGLang's servers in this process: token ids, and weights from a folder, by a table policy."""

import json
import socket
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
from table_problem import REFERENCE, table

from gvpo_core.training.policy import Batch
from gvpo_core.training.policy.table import TablePolicy
from gvpo_core.training.sampling import Sampling


class Server(ThreadingHTTPServer):
    """A fake of vLLM's /v1/completions: answers from a table policy, after the faults that are queued."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, policy=None, faults=(), *, text=False, port=0):
        """
        Args:
          text: takes and gives text, ignores `n`, and counts a token too many of the response a.
        """
        super().__init__(("127.0.0.1", port), Handler)
        self.policy, self.faults, self.asked = policy or TablePolicy(table(REFERENCE)), list(faults), []
        self.version = "default"  # of the weights, as SGLang names it
        self.told = None  # of the model, at /get_model_info; None: no such address
        self.keys, self.commands, self.adapters, self.text = Counter(), [], {}, text
        self.in_flight, self.counting, self.delay = 0, threading.Lock(), 0.0
        self.at_reload: list[int] = []  # requests in flight
        self.held, self.let_go = threading.Event(), threading.Event()  # of a request with the fault "hold"
        self.closed = threading.Event()
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def restart(self):
        """As a server that was started again: it has lost what was sent."""
        self.policy, self.adapters, self.version = TablePolicy(table(REFERENCE)), {}, "default"

    def arrives(self):
        """Called for each request for responses, first."""

    def away(self, seconds):
        """Refuses connections, and is back after some seconds without what was sent."""
        self.shutdown()
        self.server_close()
        self.restart()
        threading.Thread(target=self._come_back, args=(seconds,), daemon=True).start()

    def _come_back(self, seconds):
        if self.closed.wait(seconds):
            return
        self.socket = socket.socket(self.address_family, self.socket_type)
        self.server_bind()
        self.server_activate()
        self.serve_forever(0.01)

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def read(self, path):
        """The policy of a folder that was sent."""
        return Sent.read(path)

    read_adapters = read

    def said(self, body):
        """The answer to a chat."""
        return str(len(body["messages"]))

    def answer(self, body):
        if self.text:
            ((response,),) = self.policy.generate(
                [self.policy.encode(body["prompt"])],
                [[body["seed"]]],
                Sampling(body["max_tokens"], body["temperature"]),
            )
            reason = "stop" if response.finished else "length"
            choice = {"text": self.policy.decode(response.tokens), "finish_reason": reason}
            usage = {"completion_tokens": len(response.tokens) + (choice["text"] == "a")}
            return {"model": body["model"], "choices": [choice], "usage": usage}
        sampling = Sampling(body["max_tokens"], body["temperature"])
        prompt, seeds = tuple(body["prompt"]), [body["seed"] + i for i in range(body["n"])]
        policy = self.adapters.get(body["model"], self.policy)
        (drawn,) = policy.generate([prompt], [seeds], sampling)
        choices = []
        for response in drawn:
            logprob = float(policy.logprobs(Batch([prompt], [response.tokens], [0]))[0])
            each = [logprob] + [0.0] * (len(response.tokens) - 1)
            reason = "stop" if response.finished else "length"
            choices.append(
                {"token_ids": response.tokens, "finish_reason": reason, "logprobs": {"token_logprobs": each}}
            )
        return {"model": body["model"], "choices": choices}

    def __exit__(self, *_):
        self.closed.set()
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    wbufsize = -1  # an answer in one packet: the second one would wait for the first one's acknowledgement

    def do_GET(self):
        told = self.server.told if self.path == "/get_model_info" else None
        if self.path == "/weight_info" and self.server.version is not None:  # None: a server that tells none
            told = {"weight_version": self.server.version}
        self.send(200 if told else 404, json.dumps(told).encode())

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        if self.path in ("/generate", "/v1/completions"):
            server.arrives()
        if self.path == "/generate":
            return self.generate(server, body)
        if self.path not in ("/v1/completions", "/v1/chat/completions"):
            return self.take_weights(server, body)
        if body["model"] not in ("tiny", *server.adapters):
            return self.send(404, f"The model `{body['model']}` does not exist.".encode())
        if self.path == "/v1/chat/completions":
            server.asked.append(body)
            choice = {"message": {"role": "assistant", "content": server.said(body)}, "finish_reason": "stop"}
            return self.send(200, json.dumps({"model": "tiny", "choices": [choice], "usage": None}).encode())
        server.asked.append(body)
        server.keys[self.headers.get("Authorization")] += 1
        fault = server.faults.pop(0) if server.faults else None
        with server.counting:
            server.in_flight += 1
        if server.delay:
            time.sleep(server.delay)
        answer = server.answer(body)
        with server.counting:
            server.in_flight -= 1
        if fault == "slow":
            time.sleep(1.5)
        if fault == "hold":
            server.held.set()
            server.let_go.wait(60)
        if fault == "reset":
            self.close_connection = True
            return
        if fault == "wrong model":
            answer["model"] = "other"
        if fault == "one less":
            answer["choices"].pop()
        if fault == "abort":
            answer["choices"][0]["finish_reason"] = "abort"
        if fault == "no ids":
            del answer["choices"][0]["token_ids"]
        text = json.dumps(answer).encode()
        sent = text[:20] if fault == "cut" else b"no JSON" if fault == "garbage" else text
        self.send(fault if isinstance(fault, int) else 200, sent, len(text))

    def generate(self, server, body):
        """As SGLang: a dict, whose log-probabilities are at the temperature of sampling."""
        server.asked.append(body)
        fault = server.faults.pop(0) if server.faults else None
        asked, prompt = body["sampling_params"], tuple(body["input_ids"])
        if body.get("lora_path") and body["lora_path"] not in server.adapters:
            return self.send(400, f"not loaded: {body['lora_path']}".encode())
        policy = server.adapters.get(body.get("lora_path"), server.policy)
        seeds = [[asked["sampling_seed"]]]
        ((response,),) = policy.generate([prompt], seeds, Sampling(asked["max_new_tokens"], asked["temperature"]))
        logprob = float(policy.logprobs(Batch([prompt], [response.tokens], [0]))[0])
        each = [logprob / asked["temperature"]] + [0.0] * (len(response.tokens) - 1)
        finish = {"type": "stop", "matched": response.tokens[-1]} if response.finished else {"type": "length"}
        facts = {
            "finish_reason": {"type": "abort", "message": "aborted"} if fault == "abort" else finish,
            "output_token_logprobs": [[x, token, None] for x, token in zip(each, response.tokens, strict=True)],
            "weight_version": "of yesterday" if fault == "wrong version" else server.version,
        }
        answer = {"text": "", "output_ids": list(response.tokens), "meta_info": facts}
        if fault == "no ids":
            del answer["output_ids"]
        text = b"no JSON" if fault == "garbage" else b"{}" if fault == "empty" else json.dumps(answer).encode()
        self.send(fault if isinstance(fault, int) else 200, text)

    def send(self, status, text, length=None):
        self.send_response(status)
        self.send_header("Content-Length", str(len(text) if length is None else length))
        self.end_headers()
        self.wfile.write(text)

    def take_weights(self, server, body):
        server.commands.append(self.path)
        fault = server.faults.pop(0) if server.faults else 200
        if fault == 200 and self.path in ("/v1/load_lora_adapter", "/load_lora_adapter"):
            server.adapters[body["lora_name"]] = server.read_adapters(body["lora_path"])
        elif fault == 200 and self.path in ("/v1/unload_lora_adapter", "/unload_lora_adapter"):
            fault = 200 if server.adapters.pop(body["lora_name"], None) else 404
        elif fault == 200 and self.path == "/update_weights_from_disk":
            server.policy, server.version = server.read(body["model_path"]), body["weight_version"]
        elif fault == 200 and self.path == "/update_weight_version":
            fault = 404 if server.version is None else 200
            server.version = server.version and body["new_version"]
        elif fault == 200 and self.path == "/collective_rpc":
            assert body["method"] == "reload_weights"
            server.at_reload.append(server.in_flight)
            server.policy = server.read(body["kwargs"]["weights_path"])
        self.send_response(fault)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *arguments):
        """Prints nothing."""


class Sent(TablePolicy):
    """A table whose adapters and model can be read back from a folder."""

    tied = False

    def export_adapters(self, directory):
        directory.mkdir(parents=True)
        np.save(directory / "table.npy", self.log_table())

    def export(self, directory):
        self.export_adapters(directory)
        (directory / "config.json").write_text(json.dumps({"tie_word_embeddings": self.tied}))

    @staticmethod
    def read(path):
        return TablePolicy(table(np.exp(np.load(f"{path}/table.npy"))))
