"""Requests and answers of SGLang's own endpoint: token ids in; token ids and log-probabilities of one response out.

Written from the sources of SGLang 0.5.23.
"""

from collections.abc import Mapping, Sequence
from typing import Any, cast

from gvpo_core.training.policy import Policy, Prompt
from gvpo_core.training.policy.protocol import Tokens
from gvpo_core.training.samplers.http import Failed, read_json
from gvpo_core.training.samplers.protocol import Drawn, SamplerError
from gvpo_core.training.sampling import Sampling


def refuse_other_model(facts: Mapping[str, Any], model: str, url: str) -> None:
    """Compares engine.model with the model in /get_model_info, if it names one.

    Raises: SamplerError: the server has another model. Compares paths, hub names and the last part of each.
    """
    served = [str(facts[name]) for name in ("model_path", "served_model_name") if facts.get(name)]
    names = {name for path in served for name in (path, path.rstrip("/").rpartition("/")[2])}
    if served and model not in names and model.rstrip("/").rpartition("/")[2] not in names:
        raise SamplerError(
            f"engine.model = {model!r}, and the server at {url} has {served[0]!r}: set engine.model to the server's"
            " model, or start the server with yours (--model-path)"
        )


class SGLang:
    """A `completions.Interface`. An answer names the version of the weights that drew it."""

    path = "/generate"

    def __init__(self, url: str, weights: str, omit: Sequence[str], fields: Mapping[str, Any]) -> None:
        self.url, self.weights, self.omit, self.fields = url, weights, omit, fields

    def requests(
        self, served: str, prompt: Tokens | Prompt, seeds: Sequence[int], sampling: Sampling, policy: Policy | None
    ) -> list[dict[str, Any]]:
        """Returns one request per response: several responses of a request would share its seed."""
        ids = list(cast(Tokens, prompt))
        adapters = {"lora_path": served} if self.weights == "adapters" and served else {}
        return [
            {
                "input_ids": ids,
                "sampling_params": self._sampling(seed, sampling),
                "return_logprob": True,
                "stream": False,
            }
            | adapters
            for seed in seeds
        ]

    def _sampling(self, seed: int, sampling: Sampling) -> dict[str, Any]:
        values = {
            "n": 1,
            "max_new_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k or -1,
            "min_p": sampling.min_p,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "sampling_seed": seed % 2**31,  # used by a server with --enable-deterministic-inference
        }
        return {name: value for name, value in values.items() if name not in self.omit} | dict(self.fields)

    def choices(self, content: bytes, served: str) -> list[dict[str, Any]]:
        """Returns the response of an answer. Raises: Failed: it was not drawn with the weights that were sent."""
        answer = read_json(content, self.url)
        if not isinstance(answer, dict) or not isinstance(answer.get("meta_info"), dict):
            raise Failed(f"{self.url} answers without meta_info", again=True)
        version = answer["meta_info"].get("weight_version")
        if self.weights == "model" and version != served:
            raise Failed(
                f"{self.url} answers with the weights {version!r}; asked for {served!r}",
                again=True,
                other_weights=True,
            )
        return [answer]

    def response(self, choice: dict[str, Any], body: dict[str, Any], version: int | None) -> Drawn:
        """Reads a response. Raises: SamplerError: it has no token ids. Failed: it was aborted.

        SGLang returns log-probabilities at the sampling temperature. They are left out if it is not 1.
        """
        ids, facts = choice.get("output_ids"), choice["meta_info"]
        finish = facts.get("finish_reason")
        reason = finish.get("type") if isinstance(finish, dict) else finish
        if reason not in ("stop", "length"):
            raise Failed(f"{self.url} ended a response with {reason!r}", again=False)
        if not isinstance(ids, list):
            raise SamplerError(
                f"{self.url} gives no token ids (output_ids); engine.kind = 'sglang' needs SGLang's server"
            )
        if not ids:
            raise Failed(f"{self.url} gave a response without tokens", again=False)
        logprobs = [entry[0] for entry in facts.get("output_token_logprobs") or []]
        known = len(logprobs) == len(ids) and all(isinstance(x, int | float) for x in logprobs)
        at_one = body["sampling_params"]["temperature"] == 1
        return Drawn(tuple(ids), reason == "stop", float(sum(logprobs)) if known and at_one else float("nan"), version)
