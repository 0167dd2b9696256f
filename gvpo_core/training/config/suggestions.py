"""Suggests a setting for one that does not exist, by its name in another section or trainer, or by its spelling."""

import dataclasses
import difflib
from collections.abc import Iterable
from typing import Any

from gvpo_core.training.config import Config

ELSEWHERE = {
    "run.folder": (
        "output_dir",
        "default_local_dir",
        "output_folder",
        "out_dir",
        "save_dir",
        "output",
        "save_path",
        "ckpt_path",
        "adapter_path",
    ),
    "run.steps": (
        *("max_steps", "total_training_steps", "num_steps", "iters"),
        *("num_train_epochs", "num_epochs", "total_epochs", "max_epochs", "num_episodes"),
    ),
    "run.checkpoint_every": ("save_steps", "save_freq", "save_every", "save_strategy"),
    "run.keep_checkpoints": ("save_total_limit", "max_ckpt_to_keep", "max_ckpt_num"),
    "run.keep_best": ("load_best_model_at_end",),
    "run.trackers": ("report_to", "logger", "use_wandb", "use_tensorboard"),
    "model.path": ("model_name_or_path", "model_name", "model_id", "pretrained_model_name_or_path", "pretrain"),
    "model.dtype": ("bf16", "fp16", "torch_dtype", "mixed_precision", "precision"),
    "model.lora_rank": ("lora_r", "r", "use_peft", "peft_config"),
    "model.lora_kind": ("use_dora", "fine_tune_type"),
    "model.lora_targets": ("target_modules", "lora_target_modules"),
    "model.quantization": (*("load_in_4bit", "quantization_config", "bnb_4bit_quant_type", "use_qlora", "qlora"),),
    "model.gradient_checkpointing": ("enable_gradient_checkpointing", "grad_checkpoint"),
    "model.sharding": ("fsdp", "fsdp_config", "deepspeed", "zero_stage"),
    "data.train": ("prompt_data", "train_files", "dataset_name", "train_dataset", "train_file"),
    "data.evaluation": ("val_files", "eval_dataset", "validation_file", "eval_data"),
    "data.split": ("dataset_train_split", "dataset_split", "prompt_split"),
    "data.subset": ("dataset_config", "dataset_config_name"),
    "data.shuffle": ("shuffle_dataset",),
    "data.prompt": ("prompt_key", "prompt_column", "input_key"),
    "data.max_prompt_tokens": ("max_prompt_length", "prompt_max_len"),
    "rollout.prompts": ("batch_size", "train_batch_size", "generation_batch_size", "num_prompts", "rollout_batch_size"),
    "rollout.responses": (
        *("num_generations", "n", "group_size", "rollout_n", "num_samples"),
        *("n_samples", "num_responses", "n_samples_per_prompt", "num_return_sequences"),
    ),
    "rollout.max_tokens": (
        "max_completion_length",
        "max_new_tokens",
        "max_response_length",
        "response_length",
        "generate_max_len",
    ),
    "rollout.truncated": ("mask_truncated_completions", "overlong_filter"),
    "rollout.sampler": ("use_vllm", "vllm_mode"),
    "engine.options": ("gpu_memory_utilization", "vllm_gpu_memory_utilization", "vllm_max_model_length"),
    "engine.url": ("vllm_server_base_url", "base_url", "server_url"),
    "objective.name": ("loss_type", "adv_estimator", "advantage_estimator", "algorithm"),
    "objective.beta": ("kl_coef", "init_kl_coef", "kl_loss_coef", "kl_beta"),
    "objective.reference_every": ("ref_model_sync_steps", "sync_ref_model"),
    "objective.epochs": ("num_iterations", "ppo_epochs"),
    "objective.minibatches": ("ppo_mini_batch_size", "num_mini_batches", "steps_per_generation"),
    "objective.clip": ("epsilon", "clip_ratio", "cliprange", "eps_clip", "clip_eps"),
    "optimizer.name": ("optim", "optimizer_name", "optimizer_type", "use_8bit_adam", "adam8bit"),
    "optimizer.learning_rate": ("lr", "actor_lr", "actor_learning_rate"),
    "optimizer.betas": ("adam_beta1", "adam_beta2", "beta1", "beta2"),
    "optimizer.weight_decay": ("wd", "l2"),
    "optimizer.eps": ("adam_epsilon",),
    "optimizer.warmup": (
        *("warmup_steps", "lr_warmup_steps", "num_warmup_steps"),
        *("warmup_ratio", "lr_warmup_steps_ratio"),
    ),
    "optimizer.schedule": ("lr_scheduler_type", "lr_scheduler"),
    "optimizer.max_gradient_norm": ("max_grad_norm", "grad_clip", "clip_grad"),
    "optimizer.micro_batch_tokens": ("gradient_accumulation_steps", "ppo_max_token_len_per_gpu"),
    "optimizer.micro_batch_responses": (
        "per_device_train_batch_size",
        "micro_batch_size",
        "ppo_micro_batch_size",
        "micro_train_batch_size",
    ),
    "evaluation.every": ("eval_steps", "test_freq", "eval_every", "steps_per_eval", "eval_strategy"),
    "evaluation.prompts": ("val_batches", "test_batches", "eval_batches"),
    "evaluation.patience": ("early_stopping_patience",),
}
"""Setting -> its names in TRL, verl, transformers and mlx-lm."""
_SPELLINGS = {
    "run.folder": (
        "output_path output_directory checkpoint_dir ckpt_dir log_dir logging_dir results_dir work_dir exp_dir"
    ),
    "run.steps": (
        "total_steps max_train_steps max_iters num_iters num_train_steps training_steps train_steps train_epochs "
        "max_steps_per_run num_training_steps num_updates"
    ),
    "run.seed": "random_seed data_seed manual_seed rng_seed",
    "run.checkpoint_every": (
        "save_interval checkpoint_interval ckpt_every ckpt_interval checkpoint_steps checkpoint_freq"
    ),
    "run.keep_checkpoints": "max_checkpoints num_checkpoints keep_last_n max_to_keep",
    "run.keep_best": "metric_for_best_model save_best",
    "run.trackers": "wandb wandb_project log_with trackio tensorboard tracker use_trackio",
    "run.show_every": "log_completions_steps print_every",
    "model.path": "model model_path base_model pretrained_model actor_model policy_model model_name_or_id hf_model",
    "model.device": "device_map use_cpu no_cuda accelerator",
    "model.revision": "model_revision",
    "model.lora_rank": "rank lora_dim use_lora lora peft lora_config",
    "model.lora_alpha": "alpha",
    "model.lora_targets": "target_module lora_modules lora_layers lora_target",
    "model.template": "chat_template chat_template_kwargs enable_thinking apply_chat_template_kwargs",
    "model.gradient_checkpointing": (
        "activation_checkpointing recompute gradient_checkpoint use_gradient_checkpointing"
    ),
    "model.compile": "torch_compile",
    "model.mesh_tensor": "tensor_parallel_size tp_size tensor_model_parallel_size tensor_parallel",
    "data.train": "dataset dataset_path data_path train_data train_data_path train_path train_dataset_path",
    "data.evaluation": (
        "eval_path val_data valid_data test_data test_file eval_file val_path eval_dataset_path valid_file"
    ),
    "data.system_prompt": "system system_message",
    "data.max_prompt_tokens": "max_input_length max_input_len max_prompt_len max_source_length",
    "rollout.prompts": (
        "global_batch_size prompts_per_step num_unique_prompts_rollout train_bsz gen_batch_size bsz prompts_per_batch"
    ),
    "rollout.responses": (
        "num_samples_per_prompt samples_per_prompt generations rollouts_per_prompt k group num_rollouts best_of "
        "n_rollouts num_return responses_per_prompt completions_per_prompt generations_per_prompt num_completions "
        "rollout_num"
    ),
    "rollout.max_tokens": (
        "max_completion_tokens max_output_tokens max_gen_len max_generate_tokens max_completion_len "
        "max_tokens_per_response max_gen_length max_generation_length max_response_tokens max_response_len "
        "max_gen_tokens max_target_length completion_length"
    ),
    "rollout.temperature": "temp sampling_temperature generation_temperature",
    "rollout.top_p": "nucleus_p",
    "rollout.stop": "stop_sequences stop_strings stop_words",
    "rollout.ahead": "async_rollout off_policy_steps staleness max_staleness max_off_policyness",
    "objective.beta": "kl kl_coefficient kl_weight kl_penalty_coef kl_ctrl",
    "objective.clip": "epsilon_high epsilon_low clip_ratio_high clip_ratio_low clip_range",
    "objective.minibatches": "mini_batch_size minibatch_size",
    "objective.epochs": "n_epochs inner_epochs",
    "objective.reference": "ref_model ref_model_path reference_model reference_policy",
    "optimizer.learning_rate": "learn_rate policy_lr max_lr peak_lr base_lr",
    "optimizer.betas": "adam_b1 adam_b2 beta_1 beta_2 adam_betas",
    "optimizer.eps": "adam_eps",
    "optimizer.weight_decay": "decay",
    "optimizer.warmup": "warmup_iters warmup_fraction warmup_proportion",
    "optimizer.schedule": (
        "learning_rate_schedule scheduler lr_decay_style lr_schedule scheduler_type lr_scheduler_name"
    ),
    "optimizer.max_gradient_norm": (
        "gradient_clipping clip_grad_norm max_norm grad_norm_clip gradient_clip_val gradient_clip max_gradient"
    ),
    "optimizer.micro_batch_tokens": (
        "grad_accum gradient_accumulation accumulation_steps grad_accum_steps grad_accumulation_steps"
    ),
    "optimizer.micro_batch_responses": (
        "micro_batch_size_per_gpu ppo_micro_batch_size_per_gpu per_device_batch_size per_gpu_train_batch_size "
        "train_micro_batch_size_per_gpu device_batch_size"
    ),
    "evaluation.every": (
        "eval_interval val_every test_every evaluation_strategy evaluate_every val_check_interval eval_freq"
    ),
    "evaluation.patience": "early_stopping",
    "environment.max_turns": "max_tool_calls max_tool_calling_iterations max_assistant_turns",
    "teacher.path": "teacher_model teacher_model_name_or_path",
}
"""Setting -> other spellings in use, which are not names from one certain trainer."""
_OF_A_SECTION = {
    "engine": {
        "engine.model": "path model model_name base_model model_name_or_path model_path served_model_name model_id",
        "engine.url": "host port address endpoint",
        "engine.deadline": "timeout request_timeout",
    },
    "rollout": {"engine.options": "tensor_parallel_size tensor_model_parallel_size tensor_parallel tp_size"},
    "teacher": {
        "teacher.path": "model model_name base_model model_path model_id name",
        "teacher.url": "base_url server_url host port endpoint",
        "teacher.deadline": "timeout request_timeout",
    },
}
"""Section -> setting -> names that mean this setting in this section, and something else in others."""
_OF_ENGINES = (
    "tensor_parallel_size tensor_parallel tp_size gpu_memory_utilization enforce_eager max_num_seqs dtype "
    "max_model_len max_num_batched_tokens enable_prefix_caching quantization seed kv_cache_dtype"
)
"""Arguments of vLLM, for engine.options."""
_NO_COUNTERPART = (
    "logging_steps",
    "steps_per_report",
    "ddp_timeout",
)  # names in other trainers that look like a setting here, and have no counterpart
ABSENT = {
    "context parallel is not supported: a row must fit one device": (
        *("context_parallel_size", "context_parallel", "cp_size", "sequence_parallel_size", "sequence_parallel"),
        *("ulysses_sequence_parallel_size", "ulysses_size", "ring_attn_size", "sp_size"),
    ),
    "pipeline parallel is not supported: use model.sharding or model.mesh_fsdp": (
        *("pipeline_parallel_size", "pipeline_parallel", "pp_size"),
    ),
    "a base in 8 bits is not supported: use model.quantization = 'nf4' with model.lora_rank": ("load_in_8bit",),
    "gvpo train resumes the run in run.folder by itself": ("resume_from_checkpoint", "resume_mode", "load_checkpoint"),
    "each reward is a section: [rewards.NAME] with function and weight": (
        *("reward_funcs", "reward_fn", "reward_function", "custom_reward_function", "reward_weights", "remote_rm_url"),
        *("reward_pretrain", "reward_model_path"),
    ),
    "the trackers of run.trackers take the project and the run's name from their own environment variables": (
        *("run_name", "experiment_name", "project", "tracker_project_name", "wandb_entity", "wandb_run_name"),
    ),
    "GVPO has no critic, and its weights are centred in each group without a scale": (
        *("gamma", "gae_lambda", "lam", "scale_rewards", "normalize_advantage", "advantage_normalization"),
        *("value_loss_coef", "whiten_rewards"),
    ),
    "the longest row is the prompt's limit plus the response's: data.max_prompt_tokens and rollout.max_tokens": (
        *(
            "max_length",
            "max_seq_length",
            "max_seq_len",
            "seq_length",
            "sequence_length",
            "cutoff_len",
            "max_model_len",
        ),
    ),
    "sampling must cover the model's own distribution (Cor. 3.2), and penalties change it": (
        *("repetition_penalty", "frequency_penalty", "presence_penalty", "no_repeat_ngram_size"),
    ),
    "the launcher starts the processes, as torchrun --nproc-per-node does: see docs/launch.md": (
        *("n_gpus_per_node", "nnodes", "num_processes", "num_gpus", "actor_num_gpus_per_node", "actor_num_nodes"),
    ),
    "responses end at the tokens of the model's own settings and chat template: rollout.stop takes texts": (
        *("stop_token_ids", "eos_token_id", "stop_token_id", "eos_token_ids"),
    ),
    "the tokenizer is read from model.path": (
        "tokenizer",
        "tokenizer_path",
        "tokenizer_name",
        "tokenizer_name_or_path",
    ),
    "dropout is always off, so that what is trained is what is scored": (
        "lora_dropout",
        "dropout",
        "attention_dropout",
    ),
}
"""Why there is no such setting -> its names in other trainers."""


_VALUES = {
    "bfloat16": "bf16 torch.bfloat16 jnp.bfloat16",
    "float32": "fp32 f32 float torch.float32 jnp.float32",
    "torch": "pytorch",
    "mlx": "mlx-lm mlx_lm",
    "server": "openai openai-compatible http",
    "cosine": "cosine_with_restarts cosine_with_min_lr cosine_annealing",
    "linear": "linear_with_warmup",
    "constant": "constant_with_warmup none",
    "nf4": "4bit int4 bnb bitsandbytes",
}
"""Value of a setting -> its other names."""


def setting_names(config: Config) -> list[str]:
    """Returns the dotted names of all settings, including those of the configured rewards."""
    names = []
    for section in dataclasses.fields(Config):
        value = getattr(config, section.name)
        if isinstance(value, dict):
            for name, item in value.items():
                names += [f"{section.name}.{name}.{f.name}" for f in dataclasses.fields(item)]
                names += [f"{section.name}.{name}.options.{key}" for key in item.options]
        else:
            names += [f"{section.name}.{f.name}" for f in dataclasses.fields(value)]
    return names


def suggest(name: str, names: Iterable[str]) -> str:
    """Returns "; did you mean ...?", or why there is no such setting; empty if no setting has a similar name."""
    order = {setting: i for i, setting in enumerate(setting_names(Config()))}
    settings = sorted(names, key=lambda k: (order.get(k.lstrip("-"), len(order)), k))  # ties: first section
    last = _last(name)
    if last in _NO_COUNTERPART:
        return ""
    meant = _of_its_section(name, last, settings)
    if meant:
        return f"; did you mean {meant}?"
    absent = next((why for why, other_names in ABSENT.items() if _among(last, other_names)), None)
    if absent:
        return f"; {absent}"
    listed = [*ELSEWHERE.items(), *((setting, other_names.split()) for setting, other_names in _SPELLINGS.items())]
    match = next((setting for setting, other_names in listed if _among(last, other_names)), None)
    close = [k for k in settings if _last(k) == last and last != "model"]  # engine.model is not meant
    in_section = f"{_section(name)}.{match.partition('.')[2]}" if match else None  # teacher.precision: teacher.dtype
    for setting in (in_section, match):
        close = close or [k for k in settings if setting is not None and k.lstrip("-") == setting]
    if not close and "." in name:
        alike = [k for k in settings if difflib.get_close_matches(last, [_last(k)])]
        close = difflib.get_close_matches(name, alike, n=1)
    if not close:
        spelt = difflib.get_close_matches(last, [_last(k) for k in settings], n=1, cutoff=0.75)
        close = [k for k in settings if [_last(k)] == spelt]
    return f"; did you mean {close[0]}?" if close else ""


def nearest(value: str, choices: Iterable[Any]) -> str:
    """Returns "; did you mean ...?" for a value that is not among the choices; empty if none has a similar name."""
    listed, text = [choice for choice in choices if isinstance(choice, str)], value.strip().lower()
    meant = [choice for choice in listed if text == choice.lower() or text in _VALUES.get(choice, "").split()]
    meant = meant or difflib.get_close_matches(text, listed, n=1)
    return f"; did you mean {meant[0]!r}?" if meant else ""


def _of_its_section(name: str, last: str, settings: Iterable[str]) -> str | None:
    """Returns the setting that a name means in its own section."""
    section = _section(name)
    listed = [(setting, other_names.split()) for setting, other_names in _OF_A_SECTION.get(section, {}).items()]
    listed += [("engine.options", _OF_ENGINES.split())] if section == "engine" or last.startswith("vllm_") else []
    match = next((setting for setting, other_names in listed if _among(last.removeprefix("vllm_"), other_names)), None)
    return next((k for k in settings if k.lstrip("-") == match), None)


def _section(name: str) -> str:
    """Returns "rollout" for actor_rollout_ref.rollout.n; empty for a name without a section."""
    return name.lstrip("-").rpartition(".")[0].rpartition(".")[2]


def _among(name: str, other_names: Iterable[str]) -> bool:
    """Returns whether a name is one of the others, with or without underscores."""
    return name.replace("_", "") in (other.replace("_", "") for other in other_names)


def _last(name: str) -> str:
    return name.rpartition(".")[2].lstrip("-").replace("-", "_").lower()
