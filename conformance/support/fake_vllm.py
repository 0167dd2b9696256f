"""A fake of the module `vllm` with what `samplers.VLLM` calls, over a table policy.

conformance/support/vllm_process_trial.py runs the same class with the real one (`nox -s engines`).
"""

import logging
from types import ModuleType, SimpleNamespace

import numpy as np
from engine_server import Sent
from table_problem import REFERENCE, table

from gvpo_core.training.policy import Batch
from gvpo_core.training.policy.table import TablePolicy
from gvpo_core.training.sampling import Sampling

NAMES = ("vllm", "vllm.platforms", "vllm.distributed", "vllm.distributed.parallel_state")


class Policy(Sent):
    """A table that vLLM could end a response of, and that gives its weights as a folder alone."""

    end_tokens = (0,)


class WithTensors(Policy):
    """One that gives its weights as tensors."""

    def tensors(self):
        yield "table", self.log_table()


class LLM:
    """vLLM's LLM. `calls` has the names of what was called, in order."""

    newest: "LLM"

    def __init__(self, model, **options):
        if options.get("dtype") == "float7":
            raise ValueError("Unknown dtype:\n float7")
        self.model, self.options, self.calls, self.asked = model, options, [], []
        self.policy, self.abort, self.keep = TablePolicy(table(REFERENCE)), False, False
        self.llm_engine = SimpleNamespace(engine_core=SimpleNamespace(shutdown=lambda: self.calls.append("shutdown")))
        LLM.newest = self
        logging.getLogger("vllm.renderers.base").warning("Chat template warmup failed", exc_info=True)
        logging.getLogger("vllm.renderers.base").warning("something else")

    def collective_rpc(self, method, kwargs):
        self.calls.append(method)
        if "weights_path" in kwargs:
            self.policy = Sent.read(kwargs["weights_path"])
        elif not self.keep:
            rows = np.exp(dict(kwargs["weights_iterator"])["table"]).tolist()
            self.policy = TablePolicy({str(x): {str(y): p for y, p in enumerate(row)} for x, row in enumerate(rows)})

    def apply_model(self, function):
        self.calls.append("apply_model")

    def reset_prefix_cache(self):
        self.calls.append("reset_prefix_cache")
        return True

    def sleep(self, level):
        self.calls.append("sleep")

    def wake_up(self):
        self.calls.append("wake_up")

    def generate(self, prompts, asked, use_tqdm):
        self.calls.append("generate")
        self.asked += asked
        return [self.output(tuple(p["prompt_token_ids"]), one) for p, one in zip(prompts, asked, strict=True)]

    def output(self, prompt, asked):
        ((response,),) = self.policy.generate([prompt], [[asked.seed]], Sampling(asked.max_tokens, asked.temperature))
        logprob = float(self.policy.logprobs(Batch([prompt], [response.tokens], [0]))[0])
        reason = "abort" if self.abort and asked is self.asked[0] else "stop" if response.finished else "length"
        one = SimpleNamespace(token_ids=list(response.tokens), finish_reason=reason, cumulative_logprob=logprob)
        return SimpleNamespace(outputs=[one])


def modules(*, sleeps=False):
    """The modules by their names."""
    made = {name: ModuleType(name) for name in NAMES}
    made["vllm"].LLM, made["vllm"].__version__ = LLM, "0.0"
    made["vllm"].SamplingParams = lambda **given: SimpleNamespace(**given)
    platform = SimpleNamespace(
        is_sleep_mode_available=lambda: sleeps,
        is_cpu=lambda: not sleeps,
        empty_cache=lambda: LLM.newest.calls.append("empty_cache"),
    )
    made["vllm.platforms"].current_platform = platform
    made["vllm.distributed.parallel_state"].cleanup_dist_env_and_memory = lambda: LLM.newest.calls.append("clean")
    return made
