"""`python -m gvpo_mlx_lm`: mlx_lm.lora for scored responses, with the same flags and YAML file.

It adds the settings `beta` (0.1) and `groups_per_step`. `data` is a folder with train.jsonl and optionally valid.jsonl.
mlx-lm's `train_model` runs unchanged, except that it calls our `train` instead of its trainer's.
"""

import argparse
import inspect
import math
import os
import sys
import types
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import yaml
from mlx import optimizers
from mlx.utils import tree_flatten
from mlx_lm import lora
from mlx_lm.tuner.callbacks import get_reporting_callbacks
from mlx_lm.tuner.utils import build_schedule

from gvpo_core.hosts import SettingsError, check_beta, is_number
from gvpo_core.training.config import ConfigError
from gvpo_core.training.data import DataError
from gvpo_core.training.terminal.text import printable
from gvpo_mlx_lm import ModelError, load, load_groups, train
from gvpo_mlx_lm.models import quantized

_OURS = {"beta": 0.1, "groups_per_step": None}
_COUNTS = {  # name -> smallest allowed value
    **dict.fromkeys(("batch_size", "iters", "grad_accumulation_steps", "steps_per_report", "steps_per_eval"), 1),
    **dict.fromkeys(("save_every", "max_seq_length", "groups_per_step"), 1),
    "val_batches": -1,
    "num_layers": -1,
    "seed": 0,
}
_SWITCHES = ("train", "test", "grad_checkpoint", "mask_prompt", "trust_remote_code")
_LORA = ("rank", "scale", "dropout", "keys")


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains. Returns 0, or 2 after an error line about a setting, data or model that cannot be used."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    try:
        run(settings(arguments))
    except (ConfigError, DataError, ModelError, SettingsError) as error:
        print(f"gvpo_mlx_lm: {printable(str(error), keep=chr(10))}", file=sys.stderr)
        return 2
    return 0


def settings(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Returns the settings as mlx_lm.lora resolves them: command line, then YAML file, then mlx-lm's defaults.

    Raises: SettingsError: GVPO does not support a setting, or the file has an unknown name.
    """
    parser = lora.build_parser()
    parser.prog, parser.description = "gvpo_mlx_lm", "GVPO on scored responses, through mlx-lm's LoRA trainer."
    parser.add_argument("--beta", type=float, help="KL coefficient, reward units per nat. Default 0.1.")
    parser.add_argument("--groups-per-step", type=int, help="Prompts per optimizer step. Default: as many as fit.")
    options = {name: value for name, value in vars(parser.parse_args(arguments)).items() if value is not None}
    defaults = lora.CONFIG_DEFAULTS | _OURS
    if options.get("config"):
        from_file = _read(options["config"])
        if unknown := sorted(map(str, from_file.keys() - defaults.keys())):
            raise SettingsError(
                f"{options['config']} has {', '.join(unknown)}; expected settings of mlx_lm.lora, or beta"
            )
        options = from_file | options
    args = argparse.Namespace(**(defaults | options))
    if not options.get("model"):  # else mlx-lm would download its default model
        raise SettingsError("model is not given; name the folder to train, as --model FOLDER or in the configuration")
    if args.train is False:
        raise SettingsError("train is not set; add --train, which mlx_lm.lora needs too")
    if args.test:
        raise SettingsError("test is not supported here; remove it, and give valid.jsonl for a held-out loss")
    if args.resume_adapter_file is not None and args.fine_tune_type == "full":
        raise SettingsError(
            "resume_adapter_file with fine_tune_type full: the weights to resume from would become the reference; use"
            " lora or dora, whose reference is the base model"
        )
    _check(args)
    return args


def _read(file: str) -> dict[str, Any]:
    try:
        # Importing mlx_lm.lora made this loader read 1e-5 as a float.
        values = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"config = {file!r} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingsError(f"config = {file!r} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict | None):
        raise SettingsError(f"config = {file!r} holds a {type(values).__name__}; expected settings, `name: value`")
    return values or {}


def _check(args: argparse.Namespace) -> None:
    """Checks settings that would otherwise end in a traceback, before the model loads."""
    check_beta(args.beta)
    for name, minimum in _COUNTS.items():
        value = getattr(args, name)
        if value is None and name == "groups_per_step":
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
            raise SettingsError(f"{name} = {value!r}; expected an integer of at least {minimum}")
    if args.num_layers == 0:
        raise SettingsError("num_layers = 0 means all layers to mlx-lm; expected -1 for all, or at least 1")
    if args.val_batches == 0:
        raise SettingsError("val_batches = 0 is a mean over nothing; expected -1 for all, or at least 1")
    if args.seed >= 2**64:
        raise SettingsError(f"seed = {args.seed}; expected an integer below 2**64")
    for name in _SWITCHES:
        if not isinstance(getattr(args, name), bool):
            raise SettingsError(f"{name} = {getattr(args, name)!r}; expected true or false")
    for name in ("model", "data", "adapter_path"):
        if not isinstance(getattr(args, name), str):
            raise SettingsError(f"{name} = {getattr(args, name)!r}; expected a path")
    if Path(args.adapter_path).exists() and not Path(args.adapter_path).is_dir():
        raise SettingsError(f"adapter_path = {args.adapter_path!r} is a file; expected a folder")
    defaults: dict[str, Any] = lora.CONFIG_DEFAULTS
    optimizer_names = tuple(defaults["optimizer_config"])
    for name, choices in (("fine_tune_type", ("lora", "dora", "full")), ("optimizer", optimizer_names)):
        if getattr(args, name) not in choices:
            raise SettingsError(f"{name} = {getattr(args, name)!r}; expected one of {', '.join(choices)}")
    if not is_number(args.learning_rate) or not 0 < args.learning_rate < math.inf:
        raise SettingsError(f"learning_rate = {args.learning_rate!r}; expected a finite number above 0")
    _check_optimizer(args)
    if args.lr_schedule:
        try:
            build_schedule(args.lr_schedule)
        except Exception as error:  # the schedule's function may raise anything
            text = " ".join(f"{type(error).__name__}: {error}".split())
            raise SettingsError(f"lr_schedule = {args.lr_schedule!r} is not in mlx.optimizers: {text}") from error
    if args.fine_tune_type != "full":
        _check_lora(args.lora_parameters)
    if args.resume_adapter_file is not None and not Path(args.resume_adapter_file).is_file():
        raise SettingsError(f"resume_adapter_file = {args.resume_adapter_file!r}: there is no such file")


def _check_optimizer(args: argparse.Namespace) -> None:
    config = args.optimizer_config
    options = config.get(args.optimizer, {}) if isinstance(config, dict) else None
    if not isinstance(options, dict):
        raise SettingsError(f"optimizer_config = {config!r}; expected {{{args.optimizer}: {{name: value}}}}")
    kind = {"adam": "Adam", "adamw": "AdamW", "sgd": "SGD"}.get(args.optimizer, args.optimizer.capitalize())
    known = [name for name in inspect.signature(getattr(optimizers, kind)).parameters if name != "learning_rate"]
    if unknown := sorted(map(str, options.keys() - {*known})):
        raise SettingsError(f"optimizer_config.{args.optimizer} has {', '.join(unknown)}; expected {', '.join(known)}")


def _check_lora(value: Any) -> None:
    parameters = value if isinstance(value, dict) else {}
    if missing := {"rank", "dropout", "scale"} - parameters.keys():
        raise SettingsError(f"lora_parameters = {value!r} has no {', '.join(sorted(missing))}")
    if unknown := sorted(map(str, parameters.keys() - {*_LORA})):
        raise SettingsError(f"lora_parameters has {', '.join(unknown)}; expected {', '.join(_LORA)}")
    rank, scale, keys = parameters["rank"], parameters["scale"], parameters.get("keys")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise SettingsError(f"lora_parameters: rank = {rank!r}; expected an integer of at least 1")
    if not is_number(scale) or not math.isfinite(scale) or not scale:
        raise SettingsError(f"lora_parameters: scale = {scale!r}; expected a finite number that is not 0")
    if not is_number(parameters["dropout"]) or parameters["dropout"]:
        raise SettingsError(
            f"lora_parameters: dropout = {parameters['dropout']!r}; expected 0: GVPO's weights need the"
            " log-probabilities of the model without dropout"
        )
    if keys is not None and not (isinstance(keys, list) and all(isinstance(key, str) for key in keys)):
        raise SettingsError(f"lora_parameters: keys = {keys!r}; expected a list of names of layers")


def _add_adapters(model: Any, *args: Any, file: str | None, **named: Any) -> None:
    """Runs mlx-lm's `linear_to_lora_layers`, then checks the adapter file, which mlx-lm loads without a check.

    Raises: SettingsError: the tensors in the file are not those of these adapters.
    """
    lora.linear_to_lora_layers(model, *args, **named)
    if file is None:
        return
    expected = {name: tuple(p.shape) for name, p in tree_flatten(model.trainable_parameters())}
    try:
        saved = {name: tuple(tensor.shape) for name, tensor in cast("dict[str, Any]", mx.load(file)).items()}
    except (RuntimeError, ValueError) as error:
        raise SettingsError(f"resume_adapter_file = {file!r} cannot be read: {error}") from error
    different = (name for name in sorted(expected.keys() | saved.keys()) if expected.get(name) != saved.get(name))
    if (name := next(different, None)) is not None:
        has = f"has {name} of shape {saved[name]}" if name in saved else f"has no {name}"
        asked = f"shape {expected[name]}" if name in expected else "no such tensor"
        raise SettingsError(
            f"resume_adapter_file = {file!r} {has}, and fine_tune_type, num_layers and lora_parameters ask for {asked}:"
            " mlx-lm would not load it; set them as in the adapter_config.json beside the file"
        )


def run(args: argparse.Namespace) -> None:
    """Loads the model, scores the reference, and starts mlx-lm's trainer."""
    trust = args.trust_remote_code
    model, tokenizer = load(args.model, tokenizer_config={"trust_remote_code": trust}, trust_remote_code=trust)
    if args.num_layers > len(model.layers):
        raise SettingsError(f"num_layers = {args.num_layers}, but the model has {len(model.layers)}; -1 takes all")
    if args.fine_tune_type == "full" and quantized(model):
        raise SettingsError(
            f"fine_tune_type is full, but {args.model!r} has quantized weights, which take no gradient: use lora or"
            " dora, or a model in 16 or 32 bits"
        )
    files = {name: Path(args.data) / f"{name}.jsonl" for name in ("train", "valid")}
    sets = {
        name: load_groups(path, tokenizer, max_seq_length=args.max_seq_length, name=str(path))
        for name, path in files.items()
        if name == "train" or path.exists()
    }
    try:
        callback = get_reporting_callbacks(
            args.report_to, project_name=args.project_name, log_dir=args.adapter_path, config=cast(Any, vars(args))
        )
    except (ImportError, ValueError) as error:
        raise SettingsError(f"report_to = {args.report_to!r}: {error}") from error
    train_model = types.FunctionType(
        lora.train_model.__code__,
        vars(lora)
        | {"train": partial(_train, settings=args), "CacheDataset": lambda groups: groups}
        | {"linear_to_lora_layers": partial(_add_adapters, file=args.resume_adapter_file)},
        argdefs=lora.train_model.__defaults__,
    )
    train_model(args, model, sets["train"], sets.get("valid"), callback)


def _train(
    *, settings: argparse.Namespace, model: Any, optimizer: Any, train_dataset: Any, val_dataset: Any, **rest: Any
) -> None:
    train(
        model,
        optimizer,
        train_dataset,
        val_dataset,
        model_path=settings.model,
        beta=settings.beta,
        groups_per_step=settings.groups_per_step,
        seed=settings.seed,
        **rest,
    )


if __name__ == "__main__":
    sys.exit(main())
