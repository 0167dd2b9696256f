"""`gvpo eval` and `gvpo export`: evaluate and export the policy of a run folder."""

import json
import logging
import math
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from gvpo_core.training.cli.parser import Parser
from gvpo_core.training.config import Config, ConfigError
from gvpo_core.training.evaluation import evaluated
from gvpo_core.training.files.disk import UnwritableError, anchored, make_synced, refuse_special, retried, unwritable
from gvpo_core.training.fingerprint import dtypes
from gvpo_core.training.inputs import Inputs, open_inputs
from gvpo_core.training.intervals import mean_half_width
from gvpo_core.training.policy import Policy
from gvpo_core.training.run.chosen import chosen, refuse_unknown
from gvpo_core.training.run.signals import ended_by_exit
from gvpo_core.training.samplers.load import opened_for_evaluation
from gvpo_core.training.terminal.output import say
from gvpo_core.training.terminal.text import fit, interval, percent
from gvpo_core.training.watch.metric_names import LOSSES

_CHECKPOINT = "a step, newest, best (best held-out result) or initial (the untrained model)"


def evaluate_run(arguments: list[str]) -> int:
    """`gvpo eval`: prints the rewards of a run's policy on held-out prompts; returns the exit status.

    Raises: ConfigError, DataError: a folder, checkpoint or file that cannot be used.
    """
    parser = Parser(prog="gvpo eval", description="Rewards of a run's policy on held-out prompts.")
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--checkpoint", default="newest", help=f"{_CHECKPOINT}. Default: newest")
    parser.add_argument(
        "--compare", metavar="CHECKPOINT", help=f"also evaluate this checkpoint, and the difference: {_CHECKPOINT}"
    )
    parser.add_argument("--data", metavar="FILE", help="rows to evaluate on. Default: the run's data.evaluation")
    parser.add_argument("--prompts", type=int, default=0, help="number of held-out prompts used. Default: 0, all")
    parser.add_argument("--json", action="store_true", help="print the metrics as JSON")
    options = parser.parse_args(arguments)
    config = _run_config(options.run)
    if options.prompts:
        config = replace(config, evaluation=replace(config.evaluation, prompts=options.prompts))
    if options.data:
        config = replace(config, data=replace(config.data, evaluation=options.data))
    names = [options.checkpoint, *([options.compare] if options.compare else [])]
    for name in names:  # before the slow load of the model
        refuse_unknown(options.run, name)
    run = options.run.absolute()  # a reward in a thread may change the working directory
    policy_config = replace(config, model=replace(config.model, path=anchored(config.model.path)))
    with open_inputs(config, training=False) as inputs:
        evaluations = {name: _evaluated(inputs, policy_config, run, name) for name in dict.fromkeys(names)}
    if evaluations[options.checkpoint][2] != 0:
        return 0
    metrics = {name: values for name, (values, _, _) in evaluations.items()}
    difference = None
    if options.compare:
        if "eval/reward" not in metrics[options.checkpoint]:
            raise ConfigError("--compare needs rewards of the held-out responses, and none is configured")
        change = evaluations[options.checkpoint][1] - evaluations[options.compare][1]
        change = change[~np.isnan(change)]  # prompts with a score in both
        difference = (float(change.mean()) if change.size else math.nan, mean_half_width(change))
    if options.json:
        say(json.dumps(_as_json(metrics, options.checkpoint, options.compare, difference), indent=1))
        return 0
    for name in evaluations:
        say(f"{name}: {_sentence(metrics[name])}")
    if difference is not None:
        say(f"{options.checkpoint} - {options.compare}: {interval(*difference)} (95 %, paired by prompt)")
    return 0


def _evaluated(
    inputs: Inputs, policy_config: Config, run: Path, checkpoint: str
) -> tuple[dict[str, float], np.ndarray, int]:
    """Returns a checkpoint's metrics, the (P,) mean reward of each prompt (NaN: no score), and this process's rank."""
    policy = _restored(policy_config, run, checkpoint)
    held_out = inputs.held_out(policy)
    if held_out is None:
        raise ConfigError("the run has no data.evaluation: name a file of held-out prompts with --data")
    with opened_for_evaluation(inputs.config, policy) as sampler:
        metrics, rollout = evaluated(inputs.config, policy, held_out, inputs.rewards, sampler=sampler)
    if rollout is None:  # recorded groups: no prompt has a reward
        return metrics, np.zeros(0), policy.rank
    scored = ~np.isnan(rollout.rewards)
    sums = np.bincount(rollout.group_ids[scored], rollout.rewards[scored], minlength=rollout.num_groups)
    with np.errstate(invalid="ignore"):
        means = sums / np.bincount(rollout.group_ids[scored], minlength=rollout.num_groups)
    return metrics, means, policy.rank


def _sentence(metrics: Mapping[str, float]) -> str:
    loss_parts = [
        f"{key.removeprefix('eval/')} {_with_interval(metrics[key], metrics.get(f'{key}_half_width'))}"
        for key in LOSSES
        if key in metrics
    ]
    if "eval/teacher_kl" in metrics and "eval/reward" not in metrics:
        loss_parts[-1] += f" on {metrics['eval/prompts']:,} prompts"
    loss_parts += [f"on {metrics['eval/groups']:,} recorded groups"] if "eval/groups" in metrics else []
    if "eval/reward" not in metrics:
        return ", ".join(loss_parts)
    parts = [f"reward {_with_interval(metrics['eval/reward'], metrics.get('eval/half_width'))}"]
    parts[0] += f" on {metrics['eval/prompts']:,} prompts"
    names = [key for key in metrics if key.startswith("eval/reward/")]
    if len(names) > 1:
        parts += [f"{key.removeprefix('eval/reward/')} {fit(metrics[key], 8)}" for key in names]
    if metrics["eval/unscored"]:
        parts.append(f"{metrics['eval/unscored']:,} responses without a score")
    parts.append(f"length {fit(metrics['eval/length'], 6)} tokens")
    cut = {"": "eval/truncated"}
    if "eval/episodes/turns" in metrics:
        cut = {f" at the {name[:-1]} limit": f"eval/episodes/{name}" for name in ("turns", "tokens")}
    parts += [f"{percent(metrics[key], ' %')} cut{where}" for where, key in cut.items()]
    return ", ".join(parts + loss_parts)


def _with_interval(value: float, half: float | None) -> str:
    return fit(value, 8) if half is None else f"{interval(value, half)} (95 %)"


def _as_json(
    metrics: Mapping[str, dict[str, float]], name: str, other: str | None, difference: tuple[float, float] | None
) -> dict[str, object]:
    if other is None or difference is None:
        return dict(metrics[name])
    return {**metrics[name], "compared": {**metrics[other], "checkpoint": other}} | {
        "difference": difference[0],
        "difference/half_width": difference[1],
    }


def export_run(arguments: list[str]) -> int:
    """`gvpo export`: writes a run's policy as a Hugging Face folder; returns the exit status.

    Raises: ConfigError: a folder or checkpoint that cannot be used.
    """
    parser = Parser(prog="gvpo export", description="Writes a run's policy as a Hugging Face folder.")
    parser.add_argument("run", type=Path, help="run folder, or a settings file to export its initial model")
    parser.add_argument("folder", type=Path, help="folder to create; must be empty")
    parser.add_argument("--checkpoint", default="newest", help=f"{_CHECKPOINT}. Default: newest")
    parser.add_argument("--adapters", action="store_true", help="write only the LoRA or DoRA adapters")
    parser.add_argument(
        "--own-head",
        action="store_true",
        help="write a tied output layer as a separate tensor, for a vLLM server that reloads it",
    )
    options = parser.parse_args(arguments)
    if _is_settings_file(options.run) and options.checkpoint == "newest":
        options.checkpoint = "initial"
    if options.adapters and options.own_head:
        raise ConfigError("--adapters with --own-head: adapters have no output layer; leave one of them out")
    config, folder = _exported_config(options.run, options.checkpoint), options.folder
    if options.adapters and not config.model.lora_rank:
        raise ConfigError(
            f"{options.run} trains all parameters (model.lora_rank = 0) and has no adapters: leave --adapters out"
        )
    if options.adapters and options.checkpoint == "initial":
        raise ConfigError("--adapters with --checkpoint initial: the untrained model has no adapters to write")
    refuse_unknown(options.run, options.checkpoint)
    try:
        make_synced(folder)
        occupied = any(folder.iterdir())
    except OSError as e:
        raise ConfigError(f"cannot export to {folder}: {e.strerror or e}; give a new folder") from e
    if occupied:
        raise ConfigError(f"{folder} is not empty; give a new folder")
    policy = _restored(config, options.run, options.checkpoint)
    with ended_by_exit():
        try:
            if options.adapters:
                policy.export_adapters(folder)
            elif options.own_head:
                policy.export(folder, own_head=True)
            else:
                policy.export(folder)
        except BaseException as e:  # remove an incomplete or corrupt export: it could be mistaken for the policy
            if policy.rank == 0:
                for path in folder.iterdir():
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            if isinstance(e, Exception) and (why := unwritable(e)):
                raise UnwritableError(f"cannot write {options.folder}: {why}") from e
            raise
    if policy.rank == 0:
        say(options.folder)
    return 0


def _exported_config(run: Path, checkpoint: str) -> Config:
    from gvpo_core.training.config.file import read_config

    return read_config(run) if _is_settings_file(run) and checkpoint == "initial" else _run_config(run)


def _is_settings_file(path: Path) -> bool:
    """Whether the path is a settings file outside a run folder. A run folder's config.toml has a trained policy."""
    return path.suffix == ".toml" and path.is_file() and not (path.parent / "checkpoints").is_dir()


def _run_config(run: Path) -> Config:
    from gvpo_core.training.config.file import read_config

    if not (run / "config.toml").is_file():
        if run.is_file():
            raise ConfigError(f"{run} is a file; expected a run folder, such as {run.parent}")
        raise ConfigError(f"{run} is not a run folder: it has no config.toml")
    return _with_trained_dtypes(read_config(run / "config.toml"), run)


def _with_trained_dtypes(config: Config, run: Path) -> Config:
    """The settings with each dtype "auto" replaced by the dtype in which the run was trained."""
    try:
        refuse_special(run / "environment.json")
        trained_dtypes = dtypes(json.loads(retried((run / "environment.json").read_bytes)))
    except (OSError, ValueError, RecursionError, AttributeError) as e:
        logging.getLogger("gvpo").warning("%s: the dtype of the run is not known: %s", run / "environment.json", e)
        return config
    for name, dtype in trained_dtypes.items():
        section = getattr(config, name)
        if section.dtype == "auto" and dtype in ("float32", "bfloat16"):
            config = replace(config, **{name: replace(section, dtype=dtype)})
    return config


def _restored(config: Config, run: Path, checkpoint: str) -> Policy:
    """Loads the run's policy at a checkpoint, which a run in progress does not remove meanwhile."""
    from gvpo_core.training.policy.load import load_policy

    with chosen(run, checkpoint) as saved:
        policy = load_policy(config)
        if saved is not None:
            policy.restore(saved.policy)
            logging.getLogger("gvpo").info("restored the checkpoint of step %d", saved.step)
    return policy
