"""The teacher of a run: a model that this process loads, or one behind a URL."""

from dataclasses import replace

from gvpo_core.training.config import Config, ConfigError, ModelConfig
from gvpo_core.training.config.backends import without_settings_of_others
from gvpo_core.training.policy import Policy
from gvpo_core.training.policy.load import load_policy
from gvpo_core.training.teacher.served import ServedTeacher
from gvpo_core.training.teacher.taught import Teacher


def load_teacher(config: Config, policy: Policy) -> Teacher:
    """Returns the model of [teacher]: a server at teacher.url, or a model loaded with its backend or the student's.

    Raises: ConfigError: the model or server cannot be used; the teacher has other ranks than the student.
    """
    model = teacher_model(config)
    if config.teacher.url:
        return _served(config, model)
    backend, student_backend = config.teacher.backend, policy.describe().backend
    if backend == "auto":
        backend = student_backend  # type: ignore[assignment]
    if backend != student_backend:
        model = replace(without_settings_of_others(model, backend), dtype=model.dtype)
    run, optimizer = replace(config.run, backend=backend), replace(config.optimizer, name="adamw")
    try:
        loaded = load_policy(replace(config, run=run, model=model, optimizer=optimizer), trained=False)
    except ConfigError as error:
        text = str(error).replace("model.path", "teacher.path")
        if config.teacher.device:
            text = text.replace("model.device", "teacher.device")
        raise ConfigError(text if "teacher." in text else f"teacher.path = {config.teacher.path!r}: {text}") from error
    if (loaded.rank, loaded.world_size) != (policy.rank, policy.world_size):
        raise ConfigError(
            f"the teacher has {loaded.world_size} ranks and the policy {policy.world_size}; use one backend for both"
        )
    if not hasattr(loaded, "encode_responses"):
        raise ConfigError(f"teacher.backend = {backend!r} has no encode_responses, which scoring texts needs")
    facts = loaded.describe()
    return Teacher(loaded, f"{model.path}, {facts.parameters:,} parameters, {facts.dtype}", facts.context, facts)


def teacher_model(config: Config) -> ModelConfig:
    """Returns the settings for loading the teacher's model or tokenizer."""
    teacher = config.teacher
    return replace(
        config.model,
        path=teacher.path,
        revision=teacher.revision,
        dtype=teacher.dtype,
        device=teacher.device or config.model.device,
        lora_rank=0,
        lora_kind="lora",
        quantization="none",
        compile=False,
        gradient_checkpointing=False,
        template=teacher.template,
    )


def _served(config: Config, model: ModelConfig) -> Teacher:
    try:
        scorer = ServedTeacher(config.teacher, model)
        scorer.check()
    except ConfigError as error:
        raise ConfigError(f"teacher.url = {config.teacher.url!r}: {error}") from error
    return Teacher(scorer, f"{scorer.model} at {scorer.url}, tokenizer of {model.path}", scorer.context)
