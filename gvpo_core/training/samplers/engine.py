"""An inference engine behind HTTP as the sampler."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from gvpo_core.training.config import ConfigError, EngineConfig
from gvpo_core.training.config.engine import wrong_engine
from gvpo_core.training.policy import Policy, Prompt, Response
from gvpo_core.training.policy.protocol import Tokens
from gvpo_core.training.policy.ranks import attempt
from gvpo_core.training.samplers.completions import Interface, OpenAI
from gvpo_core.training.samplers.http import Clock, Failed, Server
from gvpo_core.training.samplers.protocol import AGAIN, LOST_WEIGHTS, OTHER_WEIGHTS, SamplerError, Text
from gvpo_core.training.samplers.sglang import SGLang, refuse_other_model
from gvpo_core.training.samplers.transfer import Transfer, cache_is_empty
from gvpo_core.training.samplers.weights import NAMES, SGLANG, VLLM, Unknown, WeightFolder
from gvpo_core.training.samplers.workers import Workers
from gvpo_core.training.sampling import Sampling

_log = logging.getLogger("gvpo")
_AT_THE_END = 10.0  # seconds for a server to wake up in `close`


@dataclass(eq=False)
class _Requests:
    """The requests of one step."""

    served: str  # name of the model to request
    version: int | None  # version of the weights with that name
    clock: Clock
    failures: list[str] = field(default_factory=list)
    again: bool = False  # a failure may be transient
    other_weights: bool = False  # the server no longer has these weights
    work: list[list["Future[list[Response | Text]]"]] = field(default_factory=list)  # requests of each prompt


class Engine:
    """Draws responses from a server, by POST to {url}/v1/completions, /v1/chat/completions or SGLang's {url}/generate.

    There is one request per prompt; for text and for SGLang, one per response. A request that fails (too slow, 500, an
    answer that is not JSON or is of another model) is repeated with growing pauses. Missing responses are lost, and
    their groups are smaller. If the server is away (refused, reset, 429, 502 to 504), returns nothing at all or does
    not load the weights, the engine waits for it until the deadline. If the server comes back without the weights, they
    are sent again, and what it drew without them is drawn again.

    Without `weights`, the server keeps the weights that it was started with.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        kind: Literal["server", "sglang"] = "server",
        tokens: Literal["ids", "text", "chat"] = "ids",
        weights: Literal["kept", "adapters", "model"] = "kept",
        transfer: Literal["folder", "nccl", "ipc", "tcp"] = "folder",
        folder: str | Path = "",
        listen: str = "",
        sleep: bool = False,
        gap_tolerance: float | None = None,
        gap_every: int = 0,
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        concurrency: int = 16,
        deadline: float = 600.0,
        tries: int = 4,
        pause: float = 0.5,
        api_key: str = "",
        omit: Sequence[str] = (),
        fields: Mapping[str, Any] | None = None,
    ) -> None:
        """
        Args:
          url: of the server, without /v1.
          model: its name on the server.
          kind: server: OpenAI's endpoints, as in vLLM; sglang: SGLang's own endpoint, with token ids.
          tokens: format of prompts and responses. text: any OpenAI-compatible server; chat: its chat endpoint, which
            gets the prompts as messages; see `Text`.
          weights: what `refresh` sends to the vLLM or SGLang server before each step. adapters: the policy's LoRA
            adapters; model: the whole model. If the model's head is tied to its embedding, vLLM must have been started
            from a folder of `gvpo export --own-head`.
          transfer: how vLLM gets the whole model; see `Transfer`.
          folder: folder for the weights, under the same path on the server. Keeps the versions in use and one before.
          listen: HOST or HOST:PORT at which the server reaches the main rank, for nccl and tcp. Empty: automatic.
          sleep: whether the vLLM server sleeps from the end of `generate` to the next `refresh` or `generate`. Then its
            weights are in the host's memory, and its cache of keys and values is freed. Only in a run of one process.
          gap_tolerance: largest difference to the policy's log-probabilities, nats per token. None: see `GapCheck`.
          gap_every: steps between two comparisons. 0: every step; 20 with rollout.ahead and no gap_tolerance.
          dtype: dtype that the server computes in, for that comparison. auto: the policy's.
          concurrency: number of requests at a time.
          deadline: seconds that the responses of one step may take; later ones are lost. Also the seconds that a server
            may be away.
          tries: most requests for a prompt, including the first, while the server is reachable.
          pause: seconds before the second try; doubled before each further one.
          api_key: "$NAME", the environment variable with the server's key. The key is not written anywhere.
          omit: fields that the server rejects, such as top_k. Requests leave them out; the server's default applies.
          fields: further fields of every request; for SGLang, of its `sampling_params`.
        Raises: ConfigError: an argument is out of range, or the variable is not set.
        """
        settings = EngineConfig(
            url=url,
            model=model,
            kind=kind,
            tokens=tokens,
            weights=weights,
            transfer=transfer,
            folder=str(folder),
            listen=listen,
            sleep=sleep,
            gap_tolerance=gap_tolerance,
            gap_every=gap_every,
            dtype=dtype,
            concurrency=concurrency,
            deadline=deadline,
            tries=tries,
            pause=pause,
            api_key=api_key,
            omit=tuple(omit),
            fields=dict(fields or {}),
        )
        if wrong := [message for _, message in wrong_engine(settings)]:
            raise ConfigError("\n".join(wrong))
        self.url, self.model, self.deadline, self.gap_tolerance = url.rstrip("/"), model, deadline, gap_tolerance
        self.kind, self.weights, self.gap_every, self.dtype = kind, weights, gap_every, dtype
        self.tokens = tokens
        sglang = kind == "sglang"
        self._interface: Interface = (
            SGLang(self.url, weights, settings.omit, settings.fields)
            if sglang
            else OpenAI(self.url, tokens, settings.omit, settings.fields)
        )
        self.messages = tokens == "chat"  # see `Sampler`
        self._policy: Policy | None = None
        self.served = "" if sglang else model  # name to request; each version of adapters has its own
        self.version: int | None = None  # of the server's weights: steps taken
        self.failures: list[str] = []  # why the newest `generate` lost responses
        self.retry = 0  # see `protocol.AGAIN`
        self._newest = 0  # version of the newest `refresh`
        self._server = Server(url, tries=tries, pause=pause, api_key=api_key)
        self._concurrency = concurrency
        self._workers: Workers[list[Response | Text]] | None = None
        self._pending: list[_Requests] = []  # requests with responses that were not taken yet
        commands = SGLANG if sglang else VLLM
        self._weights: WeightFolder | None = None
        self._transfer: Transfer | None = None
        self._way = transfer
        if transfer != "folder":
            self._transfer = Transfer(
                transfer, self.url, listen=listen, api_key=api_key, tries=tries, pause=pause, deadline=deadline
            )
        elif weights != "kept":
            self._weights = WeightFolder(Path(folder), adapters=weights == "adapters", commands=commands)
        self._sleeps, self._awake = sleep, not sleep  # an earlier run may have left the server asleep

    def describe(self) -> str:
        """Describes the sampler for the header."""
        weights = "its own weights" if self.weights == "kept" else f"{self.weights} sent before each step"
        weights += "" if self._transfer is None else f" by {self._way}"
        weights += ", asleep in updates" if self._sleeps else ""
        how = "SGLang, " if self.kind == "sglang" else ""
        return f"{self.model} at {self.url}, {how}{weights}{'' if self.tokens == 'ids' else f', {self.tokens}'}"

    def generate(
        self, prompts: Sequence[Tokens | Prompt], seeds: Sequence[Sequence[int]], sampling: Sampling
    ) -> list[list[Response | Text]]:
        """Draws up to `len(seeds[i])` responses to prompt i.

        A request for token ids has one seed, the first of its prompt; the server derives those of the other responses.
        A request for text, or to SGLang, has its own seed and returns one response.

        Raises: SamplerError: an answer has no token ids; or SGLang's server has another model.
        """
        return self.ask(prompts, seeds, sampling)()

    def probe(
        self, prompts: Sequence[Tokens | Prompt], seeds: Sequence[Sequence[int]], sampling: Sampling
    ) -> list[list[Response | Text]]:
        """Draws before all requests that have not begun."""
        return self.ask(prompts, seeds, sampling, first=True)()

    def ask(
        self,
        prompts: Sequence[Tokens | Prompt],
        seeds: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        first: bool = False,
    ) -> Callable[[], list[list[Response | Text]]]:
        """Requests responses with the current weights. Returns: a function that waits for them and returns them."""
        if self.kind == "sglang" and self._workers is None and self.weights != "model":  # else the policy was sent
            facts = self._server.get_object("/get_model_info", time.monotonic() + self.deadline)
            refuse_other_model(facts, self.model, self.url)
        self._wake()
        self._workers = self._workers or Workers(self._concurrency)
        requests = _Requests(self.served, self.version, Clock(self.deadline))
        for prompt, row in zip(prompts, seeds, strict=True):
            bodies = self._interface.requests(self.served, prompt, row, sampling, self._policy)
            requests.work.append(
                [self._workers.submit(partial(self._draw, requests, body), first=first) for body in bodies]
            )
        self._pending.append(requests)
        return partial(self._take, requests)

    def _take(self, requests: _Requests) -> list[list[Response | Text]]:
        """Waits for responses until the deadline."""
        futures = [future for row in requests.work for future in row]
        late = wait(futures, requests.clock.left(), FIRST_EXCEPTION).not_done if futures else set()
        for future in late:
            future.cancel()
        if late:
            requests.failures.append(f"no answer within {self.deadline:g} s")
        self._pending.remove(requests)
        self.failures = requests.failures
        drawn = [[r for future in row if future not in late for r in future.result()] for row in requests.work]
        if requests.version == self.version:
            self._mark_other_weights(requests)
        if self._sleeps and not self._pending:
            self._command("/sleep?level=1", {}, "the server does not sleep")
            self._awake = False
        self.retry = AGAIN if requests.again else 0
        if requests.other_weights:
            newest = requests.version == self.version and requests.served == self.served
            self.retry = LOST_WEIGHTS if newest else OTHER_WEIGHTS
            return [[] for _ in requests.work]
        return drawn

    def _mark_other_weights(self, *pending: _Requests) -> None:
        """Marks requests that were answered with other weights, if the server tells which weights it has.

        A server loses its weights when it is restarted.
        """
        sender = self._transfer or self._weights
        if sender is None or not sender.named or not pending:
            return
        version = self._server.get_object(NAMES, time.monotonic() + self.deadline).get("weight_version")
        if version in (None, sender.named):
            return
        for requests in pending:
            requests.other_weights = True
            requests.failures.append(
                f"{self.url} has the weights {version!r}; sent were {sender.named!r}: it was restarted, or another run"
                " sends to it"
            )

    def send_again(self, policy: Policy) -> None:
        """Sends the policy's weights to a server that has lost them. Every rank calls this. Raises: see `refresh`."""
        _log.warning(
            "%s; the weights are sent again", next(reversed(self.failures), "another rank's server lacks them")
        )
        self.version = None
        if self._transfer is not None:
            self._transfer.close()  # the old connection
        self.refresh(policy, self._newest)

    def refresh(self, policy: Policy, version: int) -> None:
        """Sends the policy's weights if `weights` asks for it and the server lacks this version. Every rank calls this.

        Responses requested earlier keep the earlier weights.

        Raises: SamplerError: the server did not load the weights, after all tries.
        """
        self._policy, self._newest = policy, version
        if self._sleeps and policy.world_size > 1:
            raise ConfigError(
                f"engine.sleep = true, and the run has {policy.world_size} processes: one would put the server to sleep"
                " while another one draws. Leave it out"
            )
        if (self._weights is None and self._transfer is None) or version == self.version:
            return
        self._wake()
        if self.weights == "model":  # the server has one copy
            for requests in self._pending:
                wait([f for row in requests.work for f in row], timeout=requests.clock.left() if requests.work else 0)
            if self.version is not None:  # as on the other ranks
                attempt(policy, lambda: self._mark_other_weights(*self._pending), kind=SamplerError)
        in_use = {requests.served for requests in self._pending}
        if self._transfer is not None:
            self.version = None  # until all weights have arrived
            self._transfer.send(policy, version)
        elif self._weights is not None:
            self.served = self._weights.send(
                policy, version, self.model, self._command, self._get, seconds=self.deadline, in_use=in_use
            )
        self.version = version

    @property
    def stopping(self) -> Callable[[], bool]:
        """See `Sampler`."""
        return self._server.stopping

    @stopping.setter
    def stopping(self, stopping: Callable[[], bool]) -> None:
        self._server.stopping = stopping
        if self._transfer is not None:
            self._transfer.heed(stopping)

    def _get(self, path: str) -> dict[str, Any]:
        return self._server.get_object(path, time.monotonic() + self.deadline)

    def _command(
        self, path: str, body: dict[str, Any], failed: str = "the weights were not loaded", *, patient: bool = True
    ) -> None:
        """Sends a command by POST, and repeats it until the deadline if that may help.

        Args:
          failed: beginning of the error message.
          patient: whether the command may take longer than a few seconds.
        Raises: SamplerError: the command failed, or the prefix cache was not emptied.
        """
        until = time.monotonic() + (self.deadline if patient else min(self.deadline, _AT_THE_END))
        try:
            self._server.request(path, body, until, cache_is_empty, patient=patient)
        except Failed as e:
            kind = Unknown if e.status in (404, 405) else SamplerError
            raise kind(f"{failed} ({path}): {e}") from e

    def _wake(self, *, patient: bool = True) -> None:
        if self._awake:
            return
        if (release := getattr(self._policy, "release_memory", None)) is not None:
            release()
        self._command("/wake_up", {}, "the server does not wake up", patient=patient)
        self._awake = True

    def close(self) -> None:
        """Drops requests that have not begun, and wakes the server. The next run sends its weights again."""
        with suppress(SamplerError):
            self._wake(patient=False)
        self._awake = not self._sleeps
        if self._transfer is not None:
            self._transfer.close()
        if self._workers is not None:
            self._workers.close()
        self._workers, self._pending, self.version, self.stopping = None, [], None, bool

    def _draw(self, requests: _Requests, body: dict[str, Any]) -> list[Response | Text]:
        """Returns the responses of one request; empty if it fails permanently."""
        read = partial(self._interface.choices, served=requests.served)
        try:
            choices = self._server.request(self._interface.path, body, requests.clock.start(), read)
        except Failed as e:
            requests.failures.append(str(e))
            requests.again |= e.again
            requests.other_weights |= e.other_weights or self._lacks_adapters(e, requests)
            return []
        drawn: list[Response | Text] = []
        for choice in choices[: body.get("n", 1)]:
            try:
                drawn.append(self._interface.response(choice, body, requests.version))
            except Failed as e:
                requests.failures.append(str(e))
        return drawn

    def _lacks_adapters(self, error: Failed, requests: _Requests) -> bool:
        """Whether an error names the requested version: a restarted server has no adapters."""
        return self.weights == "adapters" and error.status in (400, 404) and requests.served in str(error)
