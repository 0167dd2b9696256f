"""Finds settings that cannot run, alone or together, before a file is opened or a model loaded."""

import dataclasses
import datetime
import math
import re
import sys
from pathlib import Path
from typing import Any

from gvpo_core.objectives import OBJECTIVES, TABLE, suggestion
from gvpo_core.training.config import Config, ConfigError, TeacherConfig
from gvpo_core.training.config.backends import wrong_together
from gvpo_core.training.config.engine import server_ranges, wrong_sampler, wrong_server
from gvpo_core.training.config.secrets import HIDDEN
from gvpo_core.training.config.shares import shares

WITHOUT_REFERENCE = ("sft", "reject_sampling")  # objectives that read no reference
NO_REWARD = "no reward: add a [rewards.NAME] section with function = ..."
RESERVED_REWARD_NAMES = frozenset({"mean", "half_width", "trend", "spread", "min", "max"})
"""Names that a reward cannot have: reward/<name> is another metric."""
_LARGEST = 2**53  # larger numbers are not exact in JSON
# More than any run needs. Beyond these a step or its plan would not fit in memory, and the start would seem to hang.
_AT_MOST = {
    "run.steps": 10**8, "rollout.prompts": 2**20, "rollout.responses": 2**20, "rollout.max_tokens": 2**24,
    "data.max_prompt_tokens": 2**24, "objective.epochs": 10**4, "optimizer.micro_batch_tokens": 2**32,
    "optimizer.micro_batch_responses": 2**24, "model.lora_rank": 2**16, "evaluation.responses": 2**20,
    "evaluation.prompts": 2**24, "objective.length_exponent": 8, "data.reference_cache_size": 2**24,
    "data.buffer": 2**30, "rollout.redraws": 1000, "objective.reference_every": 10**8, "replay.groups": 2**20,
    "optimizer.learning_rate": 1000, "objective.beta": 10**12, "rollout.temperature": 10**6,
    "evaluation.temperature": 10**6,
}  # fmt: skip
_HEAVIEST = 1e12  # largest weight or reward of a setting: squares of their products stay finite in float32
SMALLEST_MOVE = 1e-12
"""Smallest change of a weight in a step. A float32 weight of 0.001 cannot change by less than 6e-11."""
SMALLEST_EPS = 1e-16
"""The square of a gradient below 1e-19 is 0 in float32, and AdamW then divides by eps alone."""


def check_config(config: Config) -> None:
    """Raises ConfigError listing every value or combination that cannot run."""
    if wrong := wrong_values(config):
        raise ConfigError("\n".join(message for _, message in wrong))


def wrong_values(config: Config) -> list[tuple[str, str]]:
    """Returns every value or combination that cannot run: (field, message)."""
    c = config
    wrong = _impossible_values(config)
    reported = {name for name, _ in wrong}

    def need(good: bool, name: str, wanted: str) -> None:
        if not good and name not in reported:
            section, _, key = name.partition(".")
            wrong.append((name, f"{name} = {getattr(getattr(c, section), key)!r}; expected {wanted}"))

    for name in (
        "run.steps", "rollout.prompts", "rollout.responses", "rollout.max_tokens", "data.max_prompt_tokens",
        "data.buffer", "objective.epochs",
        "objective.minibatches", "optimizer.micro_batch_tokens", "evaluation.responses",
        "run.keep_checkpoints",
    ):  # fmt: skip
        need(_get(c, name) >= 1, name, "at least 1")
    for name in (
        "run.seed", "run.checkpoint_every", "run.show_every", "model.lora_rank", "model.lora_alpha",
        "optimizer.learning_rate", "optimizer.weight_decay", "optimizer.warmup", "optimizer.max_gradient_norm",
        "optimizer.micro_batch_responses", "optimizer.eps",
        "data.reference_cache_size", "evaluation.every", "evaluation.prompts",
        "evaluation.patience", "evaluation.temperature", "objective.beta", "rollout.temperature", "rollout.top_k",
        "objective.length_exponent", "objective.reference_every", "rollout.redraws", "replay.groups", "replay.age",
    ):  # fmt: skip
        need(_get(c, name) >= 0, name, ">= 0")
    for name, most in _AT_MOST.items():
        need(_get(c, name) <= most, name, f"at most {most:,}")
    for name in ("rollout.temperature", "evaluation.temperature"):  # float32 divides logits by it
        need(not 0 < _get(c, name) < 1e-6, name, "at least 1e-06, or 0 for the most likely response")
    need(
        c.rollout.prompts * c.rollout.responses <= 2**24 or c.rollout.prompts > 2**20 or c.rollout.responses > 2**20,
        "rollout.prompts",
        f"at most {2**24:,} responses a step, and rollout.responses = {c.rollout.responses}",
    )
    every = c.evaluation.every
    few = not every or c.run.steps > 10**8 or c.run.steps // max(every, 1) <= 10**6
    need(few, "evaluation.every", "at most 1,000,000 evaluations a run")
    need(0 < c.rollout.top_p <= 1, "rollout.top_p", "in (0, 1]")
    need(0 <= c.rollout.min_p < 1, "rollout.min_p", "in [0, 1)")
    need(all(c.rollout.stop), "rollout.stop", "texts that are not empty")
    need(0 < c.replay.share < 1, "replay.share", "in (0, 1)")
    need(0 < c.data.recorded_share < 1, "data.recorded_share", "in (0, 1)")
    need(0 <= c.data.curriculum < 1, "data.curriculum", "in [0, 1)")
    need(not (c.data.curriculum and c.rollout.source == "recorded"), "data.curriculum", "0 for recorded responses")
    wrong += _wrong_mixture(c) + _without_effect(c)
    reserved = sorted({*c.model.template} & _TEMPLATE)
    need(not reserved, "model.template", f"arguments of the template's own, not {', '.join(reserved)}")
    need(0 < c.objective.clip < 1, "objective.clip", "in (0, 1)")
    need(all(0 <= b < 1 for b in c.optimizer.betas), "optimizer.betas", "two numbers in [0, 1)")
    wrong += [(name, message) for name, message in _wrong_step(c) if name not in reported]
    need(bool(c.run.folder.strip()), "run.folder", "a folder for the run's files")
    need(bool(c.data.train), "data.train", "a file of training prompts")
    need(bool(c.model.path) or c.run.backend == "table", "model.path", "a model folder or name")
    need(
        not c.model.trust_remote_code or _is_commit(c.model.revision) or Path(c.model.path).is_dir(),
        "model.trust_remote_code",
        "a full commit hash in model.revision (40 hex digits; a branch or tag may move), so that the code"
        " that runs is the code that was read",
    )
    if unknown := wrong_objective(c.objective.name):
        wrong.append(("objective.name", unknown))
    elif c.objective.name in TABLE:
        smallest = TABLE[c.objective.name].smallest
        need(c.rollout.responses >= smallest, "rollout.responses", f"at least {smallest} for {c.objective.name}")
    need(
        c.objective.length_exponent == 0 or c.objective.name == "gvpo",
        "objective.length_exponent",
        f"0 for objective.name = {c.objective.name!r}; only gvpo weighs responses by length",
    )
    if c.objective.reference_every:
        need(
            c.objective.reference == "initial",
            "objective.reference_every",
            f"0 for objective.reference = {c.objective.reference!r}; only the initial reference is renewed",
        )
        need(
            c.objective.name not in WITHOUT_REFERENCE,
            "objective.reference_every",
            f"0 for objective.name = {c.objective.name!r}, which reads no reference",
        )
    if c.objective.name in TABLE and TABLE[c.objective.name].positive_beta:
        need(c.objective.beta > 0, "objective.beta", f"> 0 for {c.objective.name}")
    need(
        c.objective.minibatches <= c.rollout.prompts,
        "objective.minibatches",
        f"at most rollout.prompts = {c.rollout.prompts}",
    )
    wrong += [(name, message) for name, message in wrong_sampler(c) if name not in reported]
    wrong += wrong_together(c.model, c.optimizer)
    wrong += _wrong_teacher(c)
    sampled = c.rollout.source == "sampled" or not (c.data.train or c.rollout.source == "recorded")
    if not c.scores_responses and sampled and c.objective.reference != "teacher":
        wrong.append(("rewards", NO_REWARD))
    if c.environment.used:
        need(
            not c.rollout.stop, "rollout.stop", "no text with [environment], whose turns end with the model's end token"
        )
        need(c.rollout.source != "mixed", "rollout.source", "sampled or auto with [environment]")
        need(not c.rollout.ahead, "rollout.ahead", "0 with [environment]")
        need(c.objective.reference != "teacher", "objective.reference", "initial or rollout with [environment]")
        if "environment" in c.rewards:
            wrong.append(("rewards.environment", "a reward cannot be named 'environment' beside [environment]"))
        for key, good, wanted in (
            ("max_turns", 1 <= c.environment.max_turns <= 10_000, "1 to 10,000"),
            ("turn_tokens", 0 <= c.environment.turn_tokens <= c.rollout.max_tokens, "0 to rollout.max_tokens"),
            ("timeout", c.environment.timeout > 0, "> 0"),
            ("weight", abs(c.environment.weight) <= _HEAVIEST, f"within {_HEAVIEST:g}"),
            ("cut_reward", abs(c.environment.cut_reward) <= _HEAVIEST, f"within {_HEAVIEST:g}"),
            ("workers", 1 <= c.environment.workers <= 1024, "1 to 1,024"),
            ("memory", c.environment.memory >= 0, ">= 0"),
        ):
            if not good:
                full = f"environment.{key}"
                wrong.append((full, f"{full} = {getattr(c.environment, key)!r}; expected {wanted}"))
    for name, reward in c.rewards.items():
        if not reward.function:
            wrong.append((f"rewards.{name}", f"rewards.{name}.function is empty; expected a reward function"))
        if name in RESERVED_REWARD_NAMES or not re.fullmatch(r"[\w.\-]+", name):
            wrong.append((f"rewards.{name}", f"a reward cannot be named {name!r}; give it another name"))
        for key, good, wanted in (
            ("weight", abs(reward.weight) <= _HEAVIEST, f"within {_HEAVIEST:g}"),
            ("timeout", reward.timeout > 0, "> 0"),
            ("workers", 1 <= reward.workers <= 1024, "1 to 1,024"),
            ("memory", reward.memory >= 0, ">= 0"),
            ("max_failures", 0 <= reward.max_failures <= 1, "in [0, 1]"),
            ("failure_value", abs(reward.failure_value or 0) <= _HEAVIEST, f"within {_HEAVIEST:g}"),
        ):
            if not good:
                full = f"rewards.{name}.{key}"
                wrong.append((full, f"{full} = {getattr(reward, key)!r}; expected {wanted}"))
    sampling = None if wrong else c.rollout.sampling
    if sampling and sampling.truncated_support and not c.rollout.allow_truncated_support:
        cut = ", ".join(f"rollout.{x}" for x in sampling.truncated_support)
        wrong.append(
            (
                "rollout." + sampling.truncated_support[0].split(" ")[0],
                f"{cut} gives some responses probability 0, and GVPO's optimum needs them all (Cor. 3.2);"
                " remove it, or set rollout.allow_truncated_support = true",
            )
        )
    return wrong


def _wrong_step(c: Config) -> list[tuple[str, str]]:
    """Finds settings with which AdamW's step changes no weight, makes weights NaN, or flips their signs."""
    o, wrong = c.optimizer, []
    if 0 <= o.eps < SMALLEST_EPS:
        wanted = f"at least {SMALLEST_EPS:g}: a weight whose gradient is 0 would become NaN"
        wrong.append(("optimizer.eps", f"optimizer.eps = {o.eps!r}; expected {wanted}"))
    if 0 < o.learning_rate < SMALLEST_MOVE:
        wanted = f"at least {SMALLEST_MOVE:g}, or 0: float32 weights do not change by less"
        wrong.append(("optimizer.learning_rate", f"optimizer.learning_rate = {o.learning_rate!r}; expected {wanted}"))
    elif o.learning_rate > 0:
        updates = max(1, c.run.steps * c.objective.epochs * c.objective.minibatches)
        if o.warmup > 0 and o.learning_rate * min(1.0, updates / o.warmup) < SMALLEST_MOVE:
            wanted = f"fewer: the learning rate would not reach {SMALLEST_MOVE:g} within {updates} updates"
            wrong.append(("optimizer.warmup", f"optimizer.warmup = {o.warmup}; expected {wanted}"))
        norm = o.max_gradient_norm
        if norm > 0 and o.eps >= SMALLEST_EPS and o.learning_rate * norm / (norm + o.eps) < SMALLEST_MOVE:
            wanted = (
                f"0 for no clipping, or a larger norm: with optimizer.eps = {o.eps:g} no step would change a weight"
            )
            wrong.append(("optimizer.max_gradient_norm", f"optimizer.max_gradient_norm = {norm!r}; expected {wanted}"))
    if o.learning_rate * o.weight_decay >= 1:
        wanted = (
            f"less than 1 / optimizer.learning_rate = {1 / o.learning_rate:g}: a step would flip the weights' signs"
        )
        wrong.append(("optimizer.weight_decay", f"optimizer.weight_decay = {o.weight_decay!r}; expected {wanted}"))
    return wrong


def _without_effect(c: Config) -> list[tuple[str, str]]:
    """Finds settings of unused features, which would be ignored silently."""
    wrong, default = [], Config()
    for section, names, used, why in (
        ("model", ("lora_alpha", "lora_kind", "lora_targets"), c.model.lora_rank, "model.lora_rank is 0: set it"),
        ("replay", ("share", "age"), c.replay.groups, "replay.groups is 0: set it"),
        ("data", ("recorded_share",), c.data.recorded, "data.recorded is empty: name a file"),
        (
            "environment",
            ("max_turns", "turn_tokens", "cut_reward", "weight", "history", "timeout", "workers", "memory", "options"),
            c.environment.used,
            "environment.path and environment.tools are empty: set one",
        ),
    ):
        for name in names if not used else ():
            value, full = getattr(getattr(c, section), name), f"{section}.{name}"
            if value != getattr(getattr(default, section), name):
                wrong.append((full, f"{full} is set and has no effect, as {why}, or leave {full} out"))
    return wrong


def _wrong_teacher(c: Config) -> list[tuple[str, str]]:
    taught, path = c.objective.reference == "teacher", c.teacher.path
    if taught and not path:
        return [("teacher.path", "objective.reference = 'teacher', and teacher.path is empty; expected a model folder")]
    if path and not taught and c.rollout.sampler != "teacher":
        message = f"teacher.path = {path!r}, and objective.reference = {c.objective.reference!r}; set it to 'teacher'"
        return [("teacher.path", message)]
    if taught and c.objective.name in WITHOUT_REFERENCE:
        return [("objective.reference", f"objective.name = {c.objective.name!r} reads no reference; use gvpo")]
    server, default = c.teacher, TeacherConfig()
    if not server.url:
        names = ("model", "concurrency", "deadline", "tries", "pause", "api_key")
        return [
            (f"teacher.{name}", f"teacher.{name} is set, and teacher.url is empty: name the server, or leave it out")
            for name in names
            if getattr(server, name) != getattr(default, name)
        ]
    wrong = [
        (f"teacher.{n}", f"teacher.{m}") for n, m in wrong_server(server.url, server.api_key, server_ranges(server))
    ]
    if server.backend != "auto":
        wrong.append(("teacher.backend", "teacher.backend is set, and the server of teacher.url scores; leave it out"))
    return wrong


def _wrong_mixture(c: Config) -> list[tuple[str, str]]:
    """Finds sources that cannot be mixed in one step."""
    wrong = []
    mixed = {"replay.groups": c.replay.groups, "data.recorded": c.data.recorded}
    for name in (name for name, value in mixed.items() if value):
        value = _get(c, name)
        if c.rollout.source == "recorded":
            wrong.append(
                (name, f"{name} = {value!r} and rollout.source = 'recorded': nothing is sampled to mix it with")
            )
    if c.objective.name in TABLE and TABLE[c.objective.name].needs_old:
        others = {"rollout.ahead": c.rollout.ahead, "rollout.sampler": c.rollout.sampler == "teacher" and "teacher"}
        why = _NO_RATIO.format(c.objective.name)
        wrong += [(name, f"{name} = {value!r}; {why}") for name, value in (mixed | others).items() if value]
    if any(mixed.values()) and shares(c).sampled < 1:
        name = "replay.share" if c.replay.groups else "data.recorded_share"
        wrong.append(
            (name, f"{name} = {_get(c, name)}; of rollout.prompts = {c.rollout.prompts} none would be sampled")
        )
    return wrong


def wrong_objective(name: str) -> str | None:
    """Returns what is wrong with an objective's name, without looking for its function; None if nothing is."""
    if name in TABLE or (":" in name and all(name.rpartition(":")[::2])):
        return None
    names = ", ".join(map(repr, OBJECTIVES))
    return f"objective.name = {name!r}; expected one of {names} or file.py:function{suggestion(name)}"


def _get(config: Config, name: str) -> Any:
    section, _, key = name.partition(".")
    return getattr(getattr(config, section), key)


def _is_commit(revision: str | None) -> bool:
    return revision is not None and re.fullmatch(r"[0-9a-f]{40}", revision) is not None


def _impossible_values(config: Config) -> list[tuple[str, str]]:
    """Finds values that no setting can have, and secrets that were hidden when the settings were saved."""
    wrong: list[tuple[str, str]] = []

    def look(value: Any, name: str) -> None:
        if dataclasses.is_dataclass(value):
            for field in dataclasses.fields(value):
                look(getattr(value, field.name), f"{name}.{field.name}" if name else field.name)
        elif isinstance(value, dict):
            for key, item in value.items():
                look(item, f"{name}.{key}")
        elif isinstance(value, list | tuple):
            for item in value:
                look(item, name)
        elif isinstance(value, float) and not math.isfinite(value):
            wrong.append((name, f"{name} = {value}; expected a finite number"))
        elif isinstance(value, int) and abs(value) > _LARGEST:
            wrong.append((name, f"{name} = {value}; expected a number within 2^53"))
        elif isinstance(value, str) and "\0" in value:
            wrong.append((name, f"{name} = {value!r}; expected text without a null character"))
        elif isinstance(value, str) and (why := _unwritable(value, name)):
            wrong.append((name, f"{name} = {value!a}; expected {why}"))
        elif isinstance(value, str) and (value == HIDDEN or f"//{HIDDEN}@" in value):
            wrong.append((name, f"{name} is a secret and was not saved with these settings: {_MEND}"))

        elif not isinstance(value, _TOML):
            kind = type(value).__name__
            wrong.append((name, f"{name} is a {kind}; expected a value that TOML has: text, a number, a list, a table"))

    look(config, "")
    return wrong


def _unwritable(value: str, name: str) -> str:
    """Returns what was expected instead of a text that cannot be written or a path that cannot be opened, or "".

    Python keeps undecodable bytes of a command line or file name as lone surrogates, which no TOML file and no tracker
    accepts. Under a locale such as LC_ALL=C with PYTHONUTF8=0, every character beyond ASCII becomes one.
    """
    encoding = sys.getfilesystemencoding()
    advice = "" if encoding == "utf-8" else f"; the locale's encoding is {encoding}: set PYTHONUTF8=1"
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return f"UTF-8 text{advice or ', so rename it'}"
    try:
        if name in _PATHS or name.startswith("rewards."):
            value.encode(encoding, "surrogateescape")
    except UnicodeEncodeError:
        return f"a name that this process can open{advice}"
    return ""


_PATHS = ("run.folder", "model.path", "teacher.path", "data.train", "data.evaluation", "data.recorded",
          "objective.name", "rollout.sampler", "engine.folder", "environment.path", "environment.tools")  # fmt: skip
_TOML = (str, int, float, datetime.date, datetime.time, type(None))  # bool is an int, datetime a date


_TEMPLATE = {"add_generation_prompt", "continue_final_message", "tokenize", "return_dict", "conversation", "messages"}
_NO_RATIO = "objective.name = {!r} weighs a response by its ratio to the policy that drew it for this step; use gvpo"
_MEND = "set it again; a reward's option can be '$NAME', which is read from the environment variable NAME"
