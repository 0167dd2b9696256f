"""A copy of the policy in a process of its own, which draws while the policy is updated."""

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
_ANSWER, _ANSWER_TOKEN = 2**20, 16  # largest size of an answer, bytes, plus for each token
_END = 10.0  # seconds for a request to fail, once the process is ended


class PolicyCopy:
    """Draws as the policy itself does, with the parameters that it had when it was asked.

    The process does all requests in order: the parameters of a version, then what was asked for with them. So new
    parameters wait in a file, and not for the responses before them. It ends with the run, however that ends.

    Each rank of one host has a copy of its own. All of them read what the ranks have written into one folder.
    """

    def __init__(self, config: Config, policy: Policy) -> None:
        """Starts the process and loads the model there; every rank calls.

        Args:
          config: of the run; the copy is on rollout.ahead_device.
        Raises: ConfigError: a policy that cannot be copied, or a copy that does not load or is another model.
        """
        wanted = f"rollout.ahead = {config.rollout.ahead}, and the policy draws its responses itself: that takes a copy"
        facts = policy.describe()
        if policy.world_size > 1 and facts.backend == "jax":  # whose mesh may be over all processes
            raise ConfigError(
                f"{wanted}, which gvpo_jax makes in a run of one process, and this one has {policy.world_size}. Start a"
                " server (rollout.sampler = 'engine'), or leave rollout.ahead out"
            )
        if policy.settings.model is None or not hasattr(policy, "save_parameters"):
            raise ConfigError(
                f"{wanted}, and a {type(policy).__name__} that is given in Python cannot be copied: it was not loaded"
                " from model.path, or has no save_parameters. Name a sampler (rollout.sampler), or leave rollout.ahead"
                " out"
            )
        device = config.rollout.ahead_device or (facts.device if policy.world_size > 1 else "")
        model = replace(config.model, device=device) if device else config.model
        optimizer = replace(config.optimizer, name="adamw")  # which has no packages to import
        setup = setup_of(replace(config, model=model, optimizer=optimizer), facts.backend)
        self.version: int | None = None  # of the parameters that were sent last
        self._workers: Workers[Any] = Workers(1)
        self._asked: list[Future[Any]] = []
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
        """Facts of the copy, once it has loaded. Raises: ConfigError: it does not, or is another model."""
        same = {name: getattr(facts, name) for name in ("architecture", "vocabulary", "parameters")}
        same |= {"end": [*getattr(policy, "end_tokens", ())]}
        try:
            loaded = self._request("facts")
            if other := {name: loaded[name] for name, value in same.items() if loaded[name] != value}:
                raise self._failed(f"it has {other}, and the policy { ({name: same[name] for name in other}) }")
        except SamplerError as error:
            raise ConfigError(str(error)) from error
        return loaded

    def describe(self) -> str:
        """What draws, for the header."""
        return f"a copy of the policy on {self._device}, in a process of its own"

    def ask(self, prompts: Sequence[Tokens], seeds: Sequence[Sequence[int]], sampling: Sampling) -> Callable[[], Any]:
        """Asks for responses with the parameters of now. Returns: what waits for them, and gives them."""
        return self._ask(prompts, seeds, sampling, scored=False)

    def probe(self, prompts: Sequence[Tokens], seeds: Sequence[Sequence[int]], sampling: Sampling) -> list[list[Drawn]]:
        """Draws with the parameters of now, after all that was asked for, and with log-probabilities."""
        drawn: list[list[Drawn]] = self._ask(prompts, seeds, sampling, scored=True)()
        return drawn

    def generate(
        self, prompts: Sequence[Tokens], seeds: Sequence[Sequence[int]], sampling: Sampling
    ) -> list[list[Drawn]]:
        """See `Sampler`."""
        drawn: list[list[Drawn]] = self._ask(prompts, seeds, sampling, scored=False)()
        return drawn

    def refresh(self, policy: Policy, version: int) -> None:
        """Writes the policy's parameters, which the copy takes before it draws what is asked for from now on.

        Every rank calls.

        Raises: SamplerError: they cannot be written.
        """
        if version == self.version:
            return
        folder = self._folder / str(version)

        def make() -> None:
            for old in self._folder.iterdir():  # each rank has waited for what was drawn after these
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
        if not self._process.alive:  # the folder ends with it
            return self._failed(str(self._process.died()))
        return SamplerError(
            f"the parameters for the copy cannot be written to {self._folder}: {error}. rollout.ahead = {self._ahead}"
            f" keeps up to {self._ahead + 2} versions there: free memory, name another folder (TMPDIR), or lower it"
        )

    def close(self) -> None:
        """Ends the process; what was asked for is dropped."""
        self._workers.close()
        self._process.end()
        wait(self._asked, _END)
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
        self._asked = [*(f for f in self._asked if not f.done()), future]
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
        """The answer. After a failure there is none any more. Raises: SamplerError: the process died or failed."""
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
        said = why.replace("model.device", "rollout.ahead_device") if self._where else why
        return SamplerError(f"the copy of the policy{self._where} that draws ahead failed: {said}")


def _shared_folder(policy: Policy, size: int) -> Path:
    """A new folder for `size` bytes, the same on every rank. Raises: ConfigError: none, or a rank does not see it."""
    made = attempt(policy, lambda: _folder(size), main_only=True, kind=ConfigError)
    (told,) = gather_objects(policy, [] if made is None else [{"folder": str(made)}])
    folder = Path(told["folder"])

    def check() -> None:
        if not folder.is_dir():
            raise ConfigError(
                "rollout.ahead with the policy as its own sampler: the ranks are on several hosts, and the copies read"
                f" {folder} of one. Start a server (rollout.sampler = 'engine'), or leave rollout.ahead out"
            )

    try:
        attempt(policy, check, kind=ConfigError)
    except ConfigError:
        if made is not None:
            shutil.rmtree(made, ignore_errors=True)
        raise
    return folder


def _folder(size: int) -> Path:
    """A new folder for `size` bytes, in memory where there is room."""
    try:
        place = str(_MEMORY) if _MEMORY.is_dir() and shutil.disk_usage(_MEMORY).free > size else None
        return Path(tempfile.mkdtemp(prefix="gvpo-copy-", dir=place))
    except OSError as error:
        raise ConfigError(f"there is no folder for the parameters of the copy of the policy: {error}") from error


def _environment() -> dict[str, str]:
    """Of the process: it finds the same packages, and joins no other."""
    kept = {name: value for name, value in os.environ.items() if name not in _OF_RANKS}
    paths = os.pathsep.join(os.path.abspath(path) for path in sys.path)
    # Else JAX takes three quarters of a GPU that the policy may be on.
    return {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} | kept | {"PYTHONPATH": paths}


def _output(lines: Iterable[str]) -> None:
    for line in lines:
        _log.debug("%s", line)
