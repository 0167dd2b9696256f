"""The process of a copy of the policy: loads the model and parameters, and draws. See `PolicyCopy`.

It imports no framework before its guard is forked.
"""

import sys
import traceback
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gvpo_core.training.config import Config, ModelConfig, OptimizerConfig, RunConfig
from gvpo_core.training.policy import Batch
from gvpo_core.training.policy.load import load_policy
from gvpo_core.training.rewards.worker.guard import start_guard
from gvpo_core.training.rewards.worker.messages import messages, read_message, write_message
from gvpo_core.training.rewards.worker.serve import outlive_signals_of_the_job
from gvpo_core.training.sampling import Sampling


def setup_of(config: Config, backend: str) -> dict[str, Any]:
    """Returns the settings that a backend needs to load a model; `config_of` reads them."""
    run = {"backend": backend, "seed": config.run.seed}
    return {"run": run, "model": asdict(config.model), "optimizer": asdict(config.optimizer)}


def config_of(setup: Mapping[str, Any]) -> Config:
    """Returns the settings in a `setup_of` that was sent as JSON."""
    values: dict[str, dict[str, Any]] = {
        section: {k: tuple(v) if isinstance(v, list) else v for k, v in setup[section].items()} for section in setup
    }
    return Config(
        run=RunConfig(**values["run"]),
        model=ModelConfig(**values["model"]),
        optimizer=OptimizerConfig(**values["optimizer"]),
    )


class Copy:
    """The copy of the policy, in its process."""

    def __init__(self, config: Config) -> None:
        self.policy: Any = load_policy(config, trained=False)
        self.version = -1  # of its parameters; -1: the initial ones

    def facts(self) -> dict[str, Any]:
        """Returns facts that the run compares with those of its own policy."""
        facts = self.policy.describe()
        names = ("architecture", "vocabulary", "parameters", "device", "dtype")
        return {name: getattr(facts, name) for name in names} | {"end": [*getattr(self.policy, "end_tokens", ())]}

    def take(self, folder: str, version: int) -> dict[str, Any]:
        """Loads a version of the parameters."""
        self.policy.load_parameters(Path(folder))
        self.version = version
        return {}

    def draw(
        self, prompts: list[list[int]], seeds: list[list[int]], sampling: dict[str, Any], scored: bool
    ) -> dict[str, Any]:
        """Returns responses by prompt: tokens, whether they are finished and, if `scored`, log-probabilities."""
        tokens = [tuple(prompt) for prompt in prompts]
        drawn = self.policy.generate(tokens, seeds, Sampling(**{**sampling, "stop": tuple(sampling["stop"])}))
        rows = [(i, r) for i, many in enumerate(drawn) for r in many]
        logprobs = None
        if scored:
            batch = Batch([tokens[i] for i, _ in rows], [r.tokens for _, r in rows], [i for i, _ in rows])
            logprobs = [float(x) for x in self.policy.logprobs(batch)]
        responses: list[list[dict[str, Any]]] = [[] for _ in tokens]
        for n, (i, r) in enumerate(rows):
            logprob = {} if logprobs is None else {"logprob": logprobs[n]}
            responses[i].append({"tokens": [int(t) for t in r.tokens], "finished": bool(r.finished)} | logprob)
        return {"responses": responses, "version": self.version}


def main() -> None:
    """Runs the process, from the set-up to the last request.

    Its command-line arguments are the folder of the parameters, and the descriptors of requests and answers.
    """
    folder, requests, answers = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    outlive_signals_of_the_job()
    start_guard((requests, answers), folder)
    setup, copy = read_message(requests), None
    for request in messages(requests):
        answer: dict[str, Any]
        try:
            copy = copy or Copy(config_of(setup))
            answer = getattr(copy, request["work"])(**request["arguments"])
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"[:2000]}
        sys.stdout.flush()
        write_message(answers, {"id": request["id"]} | answer)
