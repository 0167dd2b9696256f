"""The teacher of a run: a model that this process loads, or one behind a URL."""

from dataclasses import replace

from gvpo_core.training.config import Config, ConfigError, ModelConfig
from gvpo_core.training.config.backends import without_settings_of_others
from gvpo_core.training.policy import Policy
from gvpo_core.training.policy.load import load_policy
from gvpo_core.training.teacher.served import ServedTeacher
from gvpo_core.training.teacher.taught import Teacher


def load_teacher(config: Config, policy: Policy) -> Teacher:
    """The model of [teacher]: behind teacher.url, or loaded by its backend or the student's.

    Raises: ConfigError: a model or server that cannot be used; a teacher whose ranks are not the student's.
    """
    model = teacher_model(config)
    if config.teacher.url:
        return _served(config, model)
    backend, students = config.teacher.backend, policy.describe().backend
    if backend == "auto":
        backend = students  # type: ignore[assignment]
    if backend != students:
        model = replace(without_settings_of_others(model, backend), dtype=model.dtype)
    run, optimizer = replace(config.run, backend=backend), replace(config.optimizer, name="adamw")
    try:
        loaded = load_policy(replace(config, run=run, model=model, optimizer=optimizer), trained=False)
    except ConfigError as error:
        said = str(error).replace("model.path", "teacher.path")
        if config.teacher.device:
            said = said.replace("model.device", "teacher.device")
        raise ConfigError(said if "teacher." in said else f"teacher.path = {config.teacher.path!r}: {said}") from error
    if (loaded.rank, loaded.world_size) != (policy.rank, policy.world_size):
        raise ConfigError(
            f"the teacher has {loaded.world_size} ranks and the policy {policy.world_size}; use one backend for both"
        )
    if not hasattr(loaded, "encode_responses"):
        raise ConfigError(f"teacher.backend = {backend!r} has no encode_responses, which scoring texts needs")
    facts = loaded.describe()
    return Teacher(loaded, f"{model.path}, {facts.parameters:,} parameters, {facts.dtype}", facts.context, facts)


def teacher_model(config: Config) -> ModelConfig:
    """The settings that the teacher's model or tokenizer is read with."""
    given = config.teacher
    return replace(
        config.model,
        path=given.path,
        revision=given.revision,
        dtype=given.dtype,
        device=given.device or config.model.device,
        lora_rank=0,
        lora_kind="lora",
        quantization="none",
        compile=False,
        gradient_checkpointing=False,
        template=given.template,
    )


def _served(config: Config, model: ModelConfig) -> Teacher:
    try:
        scorer = ServedTeacher(config.teacher, model)
        scorer.check()
    except ConfigError as error:
        raise ConfigError(f"teacher.url = {config.teacher.url!r}: {error}") from error
    return Teacher(scorer, f"{scorer.model} at {scorer.url}, tokenizer of {model.path}", scorer.context)
