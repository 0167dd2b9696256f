"""A copy of the policy in a separate process. It draws while the policy is updated."""

import logging
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, wait
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from gvpo_core.training.config import Config, ConfigError
from gvpo_core.training.policy import Policy, PolicyFacts
from gvpo_core.training.policy.protocol import Tokens
from gvpo_core.training.policy.ranks import attempt, gather_objects
from gvpo_core.training.rewards.process import CallFailed, Worker
from gvpo_core.training.samplers.copy_worker import setup_of
from gvpo_core.training.samplers.protocol import Drawn, SamplerError
from gvpo_core.training.samplers.workers import Workers
from gvpo_core.training.sampling import Sampling

_log = logging.getLogger("gvpo.copy")
_PROGRAM = "from gvpo_core.training.samplers.copy_worker import main; main()"
_OF_RANKS = (
    "WORLD_SIZE",
    "RANK",
    "LOCAL_RANK",
    "JAX_COORDINATOR_ADDRESS",
    "MLX_RANK",
    "OMPI_COMM_WORLD_RANK",
    "PMI_RANK",
)
"""Environment variables by which a backend would join the run's processes."""
_MEMORY = Path("/dev/shm")
_ANSWER, _ANSWER_TOKEN = 2**20, 16  # largest size of an answer, bytes: fixed part, and part per token
_END = 10.0  # seconds for running requests to fail after the process has ended


class PolicyCopy:
    """Draws like the policy itself, with the parameters that the policy had at the time of the request.

    The process handles requests in order: the parameters of a version, then the responses requested with them. New
    parameters wait in a file, so the policy does not wait for earlier responses. The process ends with the run, however
    the run ends.

    Each rank has its own copy. All ranks must be on one host, as all copies read the parameters from one folder.
    """

    def __init__(self, config: Config, policy: Policy) -> None:
        """Starts the process and loads the model there. Every rank calls this.

        Args:
          config: settings of the run; the copy is on rollout.ahead_device.
        Raises: ConfigError: the policy cannot be copied, or its copy does not load or is another model.
        """
        reason = f"rollout.ahead = {config.rollout.ahead} without a sampler needs a copy of the policy"
        facts = policy.describe()
        if policy.world_size > 1 and facts.backend == "jax":  # its mesh may span all processes
            raise ConfigError(
                f"{reason}. gvpo_jax makes it only in a run of one process, and this one has {policy.world_size}. Start"
                " a server (rollout.sampler = 'engine'), or leave rollout.ahead out"
            )
        if policy.settings.model is None or not hasattr(policy, "save_parameters"):
            raise ConfigError(
                f"{reason}, but this {type(policy).__name__} cannot be copied: it was not loaded from model.path, or"
                " has no save_parameters. Name a sampler (rollout.sampler), or leave rollout.ahead out"
            )
        device = config.rollout.ahead_device or (facts.device if policy.world_size > 1 else "")
        model = replace(config.model, device=device) if device else config.model
        optimizer = replace(config.optimizer, name="adamw")  # needs no further packages
        setup = setup_of(replace(config, model=model, optimizer=optimizer), facts.backend)
        self.version: int | None = None  # of the parameters that were sent last
        self._workers: Workers[Any] = Workers(1)
        self._pending: list[Future[Any]] = []
        self._failure, self._where = "", f" on {device}" if device else ""
        self._ahead, self._alone, self._main = config.rollout.ahead, policy.world_size == 1, policy.rank == 0
        size = 4 * facts.trainable_parameters * (config.rollout.ahead + 2)
        self._folder = _shared_folder(policy, size)
        removed = str(self._folder) if self._main else ""
        self._process = Worker(setup, _output, program=("-c", _PROGRAM, removed), environment=_environment())
        try:
            loaded = attempt(policy, lambda: self._loaded(policy, facts), kind=ConfigError)
        except BaseException:
            self.close()
            raise
        assert loaded is not None  # every rank loads
        self.dtype: str = loaded["dtype"]
        self._device: str = loaded["device"]

    def _loaded(self, policy: Policy, facts: PolicyFacts) -> dict[str, Any]:
        """Waits for the copy and returns its facts. Raises: ConfigError: it does not load, or is another model."""
        expected = {name: getattr(facts, name) for name in ("architecture", "vocabulary", "parameters")}
        expected |= {"end": [*getattr(policy, "end_tokens", ())]}
        try:
            loaded = self._request("facts")
            if other := {name: loaded[name] for name, value in expected.items() if loaded[name] != value}:
                raise self._failed(f"it has {other}, and the policy { ({name: expected[name] for name in other}) }")
        except SamplerError as error:
            raise ConfigError(str(error)) from error
        return loaded

    def describe(self) -> str:
        """Describes the sampler for the header."""
        return f"a copy of the policy on {self._device}, in a process of its own"

    def ask(self, prompts: Sequence[Tokens], seeds: Sequence[Sequence[int]], sampling: Sampling) -> Callable[[], Any]:
        """Requests responses with the current parameters. Returns: a function that waits for them and returns them."""
        return self._ask(prompts, seeds, sampling, scored=False)

    def probe(self, prompts: Sequence[Tokens], seeds: Sequence[Sequence[int]], sampling: Sampling) -> list[list[Drawn]]:
        """Draws with the current parameters, after all earlier requests. The responses have log-probabilities."""
        drawn: list[list[Drawn]] = self._ask(prompts, seeds, sampling, scored=True)()
        return drawn

    def generate(
        self, prompts: Sequence[Tokens], seeds: Sequence[Sequence[int]], sampling: Sampling
    ) -> list[list[Drawn]]:
        """See `Sampler`."""
        drawn: list[list[Drawn]] = self._ask(prompts, seeds, sampling, scored=False)()
        return drawn

    def refresh(self, policy: Policy, version: int) -> None:
        """Writes the policy's parameters. The copy loads them before it draws later requests. Every rank calls this.

        Raises: SamplerError: they cannot be written.
        """
        if version == self.version:
            return
        folder = self._folder / str(version)

        def make() -> None:
            for old in self._folder.iterdir():  # every rank has received responses of newer versions
                if int(old.name) < version - self._ahead:
                    shutil.rmtree(old, ignore_errors=True)
            folder.mkdir()

        attempt(policy, make, main_only=True, kind=SamplerError, explain=self._unwritten)
        save: Callable[[], None] = partial(policy.save_parameters, folder)  # type: ignore[attr-defined]
        attempt(policy, save, kind=SamplerError, explain=self._unwritten)
        self._submit(partial(self._take, folder, version))
        self.version = version

    def _unwritten(self, error: Exception) -> Exception:
        if not isinstance(error, OSError):
            return error
        if not self._process.alive:  # its guard removes the folder
            return self._failed(str(self._process.died()))
        return SamplerError(
            f"the parameters for the copy cannot be written to {self._folder}: {error}. rollout.ahead = {self._ahead}"
            f" keeps up to {self._ahead + 2} versions there: free memory, name another folder (TMPDIR), or lower it"
        )

    def close(self) -> None:
        """Ends the process and drops all requests."""
        self._workers.close()
        self._process.end()
        wait(self._pending, _END)
        self._process.kill()
        if self._main:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _ask(
        self, prompts: Sequence[Tokens], seeds: Sequence[Sequence[int]], sampling: Sampling, *, scored: bool
    ) -> Callable[[], Any]:
        arguments = {"prompts": prompts, "seeds": seeds, "sampling": asdict(sampling), "scored": scored}
        tokens = sum(map(len, seeds)) * sampling.max_tokens
        return self._submit(partial(self._draw, arguments, _ANSWER + _ANSWER_TOKEN * tokens, self.version)).result

    def _submit(self, work: Callable[[], Any]) -> "Future[Any]":
        future = self._workers.submit(work)
        self._pending = [*(f for f in self._pending if not f.done()), future]
        return future

    def _take(self, folder: Path, version: int) -> None:
        self._request("take", {"folder": str(folder), "version": version})
        if self._alone:
            shutil.rmtree(folder, ignore_errors=True)

    def _draw(self, arguments: dict[str, Any], largest: int, version: int | None) -> list[list[Drawn]]:
        answer = self._request("draw", arguments, largest)
        if answer["version"] != version:
            raise SamplerError(f"the copy of the policy has version {answer['version']}; it was asked for {version}")
        return [
            [Drawn(tuple(r["tokens"]), r["finished"], r.get("logprob", math.nan), version) for r in many]
            for many in answer["responses"]
        ]

    def _request(self, work: str, arguments: dict[str, Any] | None = None, largest: int = _ANSWER) -> dict[str, Any]:
        """Returns the answer. After a failure, all requests fail. Raises: SamplerError: the process died or failed."""
        if not self._failure:
            try:
                answer: dict[str, Any] = self._process.ask(
                    {"work": work, "arguments": arguments or {}}, math.inf, largest
                )
                self._failure = answer.get("error", "")
            except CallFailed as error:
                self._failure = str(error)
        if self._failure:
            raise self._failed(self._failure)
        return answer

    def _failed(self, why: str) -> SamplerError:
        reason = why.replace("model.device", "rollout.ahead_device") if self._where else why
        return SamplerError(f"the copy of the policy{self._where} that draws ahead failed: {reason}")


def _shared_folder(policy: Policy, size: int) -> Path:
    """Creates a folder for `size` bytes for all ranks. Raises: ConfigError: it fails, or a rank cannot see it."""
    created = attempt(policy, lambda: _folder(size), main_only=True, kind=ConfigError)
    (shared,) = gather_objects(policy, [] if created is None else [{"folder": str(created)}])
    folder = Path(shared["folder"])

    def check() -> None:
        if not folder.is_dir():
            raise ConfigError(
                "rollout.ahead with the policy as its own sampler: the ranks are on several hosts, and the copies read"
                f" {folder} on one of them. Start a server (rollout.sampler = 'engine'), or leave rollout.ahead out"
            )

    try:
        attempt(policy, check, kind=ConfigError)
    except ConfigError:
        if created is not None:
            shutil.rmtree(created, ignore_errors=True)
        raise
    return folder


def _folder(size: int) -> Path:
    """Creates a folder for `size` bytes, in memory if there is room."""
    try:
        place = str(_MEMORY) if _MEMORY.is_dir() and shutil.disk_usage(_MEMORY).free > size else None
        return Path(tempfile.mkdtemp(prefix="gvpo-copy-", dir=place))
    except OSError as error:
        raise ConfigError(f"there is no folder for the parameters of the copy of the policy: {error}") from error


def _environment() -> dict[str, str]:
    """Environment of the process: it finds the same packages, and joins no other processes."""
    inherited = {name: value for name, value in os.environ.items() if name not in _OF_RANKS}
    paths = os.pathsep.join(os.path.abspath(path) for path in sys.path)
    # Otherwise JAX would take three quarters of a GPU that the policy may use.
    return {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} | inherited | {"PYTHONPATH": paths}


def _output(lines: Iterable[str]) -> None:
    for line in lines:
        _log.debug("%s", line)
