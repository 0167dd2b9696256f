"""TRL's settings with GVPO's defaults, and checks that reject settings that would change the GVPO update."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from trl import GRPOConfig

from gvpo_core.hosts import Rule, SettingsError, equals, is_beta, is_number, refused


@dataclass
class GVPOConfig(GRPOConfig):
    """`GRPOConfig` for `GVPOTrainer`. Some defaults differ, and `check` rejects some settings.

    `temperature` applies to sampling only: log-probabilities are scored at temperature 1. `epsilon` has no effect.
    """

    beta: float = field(
        default=0.1,
        metadata={"help": "KL coefficient of GVPO, reward units per nat of a response; 0: no reference model."},
    )
    loss_type: str = field(
        default="dr_grpo", metadata={"help": "Sums of token losses divided by a constant, as GVPO's weights need."}
    )
    scale_rewards: str = field(default="none", metadata={"help": "GVPO's rewards keep their scale."})
    disable_dropout: bool = field(default=True, metadata={"help": "Weights and gradient need the same sub-network."})
    router_aux_loss_coef: float | None = field(
        default=0.0, metadata={"help": "Load-balancing loss of mixture-of-experts models, which adds a gradient."}
    )
    vllm_importance_sampling_correction: bool = field(
        default=False, metadata={"help": "GVPO takes samples from anywhere without importance weights (Cor. 3.2)."}
    )
    allow_truncated_support: bool = field(
        default=False, metadata={"help": "Accept sampling that excludes responses, which Cor. 3.2 does not cover."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check()

    def check(self) -> None:
        """Raises: SettingsError: names every setting that would change the GVPO update, and what to set instead."""
        wrong = refused(RULES, lambda name: getattr(self, name))
        assert self.steps_per_generation is not None and self.num_generations is not None  # set by the host
        if self.steps_per_generation % self.gradient_accumulation_steps:
            wrong.append(
                f"steps_per_generation is {self.steps_per_generation}; set it to a multiple of"
                f" gradient_accumulation_steps ({self.gradient_accumulation_steps}): an optimizer step would hold"
                " responses of two generations, and the second is not sampled yet when weights are computed"
            )
        rows = self.per_device_train_batch_size * self.gradient_accumulation_steps
        if self.steps_per_generation > self.gradient_accumulation_steps and rows % self.num_generations:
            wrong.append(
                f"num_generations is {self.num_generations} and a process has {rows} responses per optimizer step"
                " (per_device_train_batch_size x gradient_accumulation_steps); set them so that num_generations"
                " divides it, or steps_per_generation to gradient_accumulation_steps: otherwise groups would be cut"
                " between the optimizer steps of a generation"
            )
        kwargs = cast("dict[str, Any]", self.generation_kwargs or {})
        wrong += cannot_sample(kwargs)
        if kwargs.get("eos_token_id") is not None:
            wrong.append(
                f"eos_token_id is {kwargs['eos_token_id']!r}; set it in the model's generation_config: TRL cuts a"
                " response at the end tokens of the model and tokenizer, and would count padding after another one as"
                " sampled"
            )
        if not self.allow_truncated_support:
            sampling = {name: getattr(self, name) for name in ("top_p", "top_k", "min_p")}
            wrong += cuts_support(sampling | kwargs)
            if self.vllm_structured_outputs_regex is not None:
                wrong.append(f"vllm_structured_outputs_regex is {self.vllm_structured_outputs_regex!r}; {_CUT}")
        if wrong:
            raise SettingsError("GVPOConfig cannot train exactly with these settings:\n" + "\n".join(wrong))


_CLIP = "GVPO has no ratio to clip"
_OTHER = "it adds another gradient"
_MASK = "it leaves tokens out of a response's log-probability"

RULES = (
    Rule("beta", is_beta, "a finite number of at least 0", "it is GVPO's beta"),
    Rule(
        "temperature",
        lambda x: is_number(x) and x > 0,
        "more than 0",
        "all greedy responses are equal",
    ),
    Rule(
        "num_generations_eval",
        lambda n: n is None or n >= 2,
        "2 or more, or None for num_generations",
        "one response has no variance: every evaluation's loss would be 0",
    ),
    Rule("max_completion_length", lambda n: bool(n), "a number of tokens", "the loss is divided by it"),
    Rule(
        "reward_weights",
        lambda weights: weights is None or all(is_number(w) and math.isfinite(w) for w in weights),
        "finite numbers",
        "a reward would have no value",
    ),
    Rule("loss_type", equals("dr_grpo"), '"dr_grpo"', "the others divide by a response's or a batch's tokens"),
    Rule("scale_rewards", equals("none"), '"none"', "GVPO does not divide by a group's standard deviation"),
    Rule(
        "multi_objective_aggregation",
        equals("sum_then_normalize"),
        '"sum_then_normalize"',
        "each reward would be divided by its standard deviation",
    ),
    Rule("importance_sampling_level", equals("token"), '"token"', "a mean over tokens would divide by the length"),
    Rule(
        "vllm_importance_sampling_correction",
        equals(False),
        "False",
        "GVPO needs no importance weights (Cor. 3.2), and these would multiply its weights",
    ),
    Rule("epsilon", equals(0.2), "0.2, its default", _CLIP),
    Rule("epsilon_high", equals(None), "None", _CLIP),
    Rule("delta", equals(None), "None", _CLIP),
    Rule("off_policy_mask_threshold", equals(None), "None", "masked responses would stay in their group's mean"),
    Rule("top_entropy_quantile", equals(1.0), "1.0", _MASK),
    Rule("entropy_coef", equals(0.0), "0.0", _OTHER),
    Rule("use_adaptive_entropy", equals(False), "False", _OTHER),
    Rule("router_aux_loss_coef", equals(0.0), "0.0", _OTHER),
    Rule(
        "accelerator_config",
        lambda c: not getattr(c, "split_batches", False) and getattr(c, "even_batches", True),
        "one with split_batches=False and even_batches=True",
        "the processes would get numbers of rows that TRL does not expect, and parts of groups",
    ),
    Rule("disable_dropout", equals(True), "True", "weights and gradient would belong to two different sub-networks"),
    Rule("neftune_noise_alpha", equals(None), "None", "weights and gradient would belong to two different models"),
    Rule(
        "optim",
        lambda name: not any(x in str(getattr(name, "value", name)) for x in ("lomo", "layerwise")),
        "an optimizer that steps once per batch",
        "parameters would move between the micro-batches of a step",
    ),
)

_CUT = (
    "it excludes responses that Cor. 3.2 needs; unset it, or set allow_truncated_support=True"
    " to give up the corollary's guarantee"
)

# Settings of generation_kwargs or generation_config that cut the support -> whether a value is harmless.
_SUPPORT: dict[str, Callable[[Any], bool]] = {
    "top_p": lambda x: x is None or x >= 1,
    "top_k": lambda x: x is None or x <= 0,
    "min_p": lambda x: not x,
    "top_h": lambda x: not x,
    "typical_p": lambda x: x is None or x >= 1,
    "epsilon_cutoff": lambda x: not x,
    "eta_cutoff": lambda x: not x,
    "do_sample": lambda x: x is None or bool(x),
    "num_beams": lambda x: x is None or x == 1,
    "sequence_bias": lambda x: not x or all(bias > -math.inf for bias in _biases(x)),
    **dict.fromkeys(
        (
            "penalty_alpha",
            "no_repeat_ngram_size",
            "encoder_no_repeat_ngram_size",
            "bad_words_ids",
            "bad_words",
            "force_words_ids",
            "constraints",
            "suppress_tokens",
            "begin_suppress_tokens",
            "forced_bos_token_id",
            "forced_eos_token_id",
            "min_length",
            "min_new_tokens",
            "min_tokens",
            "allowed_token_ids",
            "structured_outputs",
        ),
        lambda x: not x,
    ),
}


def _biases(value: Any) -> list[float]:
    """Returns the numbers of transformers' `sequence_bias`: {tokens: bias}, or pairs [tokens, bias]."""
    return [float(bias) for bias in (value.values() if isinstance(value, Mapping) else (pair[1] for pair in value))]


def cannot_sample(sampling: Mapping[str, Any]) -> list[str]:
    """Returns error lines for greedy sampling, a wrong number of samples, and ends of responses that TRL misses."""
    wrong = []
    temperature, sequences = sampling.get("temperature"), sampling.get("num_return_sequences")
    if temperature is not None and not (is_number(temperature) and temperature > 0):
        wrong.append(f"temperature is {temperature!r}; set it to more than 0: all greedy responses are equal")
    if sequences not in (None, 1):
        wrong.append(f"num_return_sequences is {sequences!r}; unset it: num_generations is the number of responses")
    if stop := sampling.get("stop_strings"):
        wrong.append(f"stop_strings is {stop!r}; unset it: TRL would count the padding after them as sampled")
    return wrong


def cuts_support(sampling: Mapping[str, Any]) -> list[str]:
    """Returns error lines for settings that give some response probability 0."""
    return [
        f"{name} is {sampling[name]!r}; {_CUT}"
        for name, harmless in _SUPPORT.items()
        if name in sampling and not harmless(sampling[name])
    ]
