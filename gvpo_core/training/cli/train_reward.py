"""`gvpo train-reward`: trains a reward model on preferences with the Bradley-Terry loss (Eq. 4 of the paper)."""

import argparse
import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from gvpo_core.training.cli.parser import Parser
from gvpo_core.training.config import ConfigError, ModelConfig, OptimizerConfig
from gvpo_core.training.config.check import SMALLEST_MOVE
from gvpo_core.training.data import column_names
from gvpo_core.training.files.disk import UnwritableError, make_synced, unwritable
from gvpo_core.training.intervals import wilson
from gvpo_core.training.policy.load import missing_package
from gvpo_core.training.recorded.rows import recorded_rows
from gvpo_core.training.recorded.shapes import UNSCORED, shape_of
from gvpo_core.training.rows import DataError, load_rows
from gvpo_core.training.run.signals import ended_by_exit
from gvpo_core.training.terminal.output import say, show_progress
from gvpo_core.training.terminal.text import fit, percent

_PROGRESS_LINES = 20  # approximate number of progress lines


@dataclass(frozen=True)
class Preference:
    """Two responses to one prompt, as texts."""

    prompt: Any
    chosen: str
    rejected: str
    difference: float  # reward of chosen minus reward of rejected
    row: int  # row of the data


def train_reward(arguments: list[str]) -> int:
    """Trains and writes a reward model; returns the exit status.

    Raises: ConfigError, DataError: a file, option or model that cannot be used.
    """
    options = _parser().parse_args(arguments)
    _check(options)
    _refuse_unwritable(options.out)
    preferences = read_preferences(options.data, "the data", options.prompt, options.split, options.subset)
    if options.held_out:
        held_out_split = options.held_out_split
        held_out_preferences = read_preferences(
            options.held_out, "the held-out data", options.prompt, held_out_split, options.subset
        )
    else:
        preferences, held_out_preferences = split(preferences, options.held_out_share, options.seed)

    from gvpo_torch.reward_model import Pair, RewardModel, train

    config = ModelConfig(path=options.model, revision=options.revision, device=options.device, dtype=options.dtype)
    optimizer = OptimizerConfig(
        learning_rate=options.learning_rate, schedule="linear", micro_batch_tokens=options.micro_batch_tokens
    )
    model = RewardModel(config, seed=options.seed)
    longest = min(options.max_tokens or math.inf, model.context or math.inf)

    def encoded(rows: Sequence[Preference]) -> list[Pair]:
        all_pairs = [
            Pair(model.ids(p.prompt, p.chosen), model.ids(p.prompt, p.rejected), options.margin * p.difference)
            for p in rows
        ]
        return [pair for pair in all_pairs if pair.width <= longest and pair.chosen != pair.rejected]

    pairs, held_out = encoded(preferences), encoded(held_out_preferences)
    if not pairs:
        raise DataError(f"no pair has at most {longest:,} tokens; raise --max-tokens, or use shorter responses")
    model.check(_sample_rows(pairs))
    steps = options.epochs * math.ceil(len(pairs) / options.batch)
    optimizer = replace(optimizer, warmup=math.ceil(options.warmup * steps))
    show_progress(
        f"model            {options.model}, {type(model.model).__name__}, {model.device}, products in {options.dtype}"
    )
    left_out = len(preferences) + len(held_out_preferences) - len(pairs) - len(held_out)
    show_progress(
        f"pairs            {len(pairs):,} training, {len(held_out):,} held-out, {left_out:,} too long or equal"
    )
    show_progress(
        f"steps            {steps:,} of {options.batch} pairs, learning rate {options.learning_rate:g}, linear\n"
    )
    _show_accuracy(model, held_out, options.micro_batch_tokens, "before")
    start, every = time.monotonic(), max(1, steps // _PROGRESS_LINES)
    for done, loss, norm in train(
        model, pairs, optimizer, batch=options.batch, epochs=options.epochs, seed=options.seed
    ):
        if done % every == 0 or done in (1, steps):
            left = (time.monotonic() - start) / done * (steps - done)
            show_progress(
                f"step {done:>6}   loss {fit(loss, 6)}   gradient norm {fit(norm, 6)}   {left / 60:.0f} min left"
            )
    _show_accuracy(model, held_out, options.micro_batch_tokens, "after")
    with ended_by_exit():
        try:
            model.save(options.out)
        except Exception as e:
            if why := unwritable(e):
                raise UnwritableError(f"cannot write {options.out}: {why}") from e
            raise
    say(f"\nwrote {options.out}; as a reward:\n")
    say(f'[rewards.preferred]\nfunction = "reward_model"\noptions = {{ path = "{options.out}" }}')
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="gvpo train-reward", description="Trains a reward model on preferences, by the Bradley-Terry loss (Eq. 4)."
    )
    add = parser.add_argument
    add("data", help="rows with chosen and rejected, or with responses and rewards: a file or hub name")
    add("out", type=Path, help="new folder for the reward model")
    add("--model", required=True, help="folder or hub name of the decoder to start from")
    add("--revision", help="commit or tag of a hub model")
    add(
        "--held-out",
        metavar="FILE",
        help="held-out rows for the accuracy before and after. Default: a share of the data",
    )
    add(
        "--held-out-share",
        type=float,
        default=0.1,
        help="share of the prompts held out if --held-out is not given. Default: 0.1",
    )
    add("--split", default="", help="split of the data, if it has several")
    add("--held-out-split", default="", metavar="SPLIT", help="split of --held-out, if it has several")
    add("--subset", default="", help="configuration of a hub dataset")
    add("--prompt", default="prompt", help="column of the prompt. Default: prompt")
    add(
        "--margin",
        type=float,
        default=0.0,
        help="target difference of two scores, as a multiple of the difference of their rewards. Default: 0",
    )
    add("--epochs", type=int, default=1, help="passes over the pairs. Default: 1")
    add("--batch", type=int, default=32, help="pairs a step. Default: 32")
    add("--learning-rate", type=float, default=1e-5, help="peak learning rate of AdamW. Default: 1e-5")
    add("--warmup", type=float, default=0.05, help="share of the steps used for warm-up. Default: 0.05")
    add(
        "--max-tokens",
        type=int,
        default=0,
        help="longest row, tokens; longer pairs are dropped. Default: 0, the model's context",
    )
    add("--micro-batch-tokens", type=int, default=8192, help="tokens in a forward pass. Default: 8192")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1. Default: auto")
    add(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="dtype of matrix products. Default: float32"
    )
    add("--seed", type=int, default=0, help="seed of the order and the held-out split. Default: 0")
    return parser


def _check(options: argparse.Namespace) -> None:
    """Raises: ConfigError: an option is wrong; the message has one line for each."""
    wrong = [
        f"--{name.replace('_', '-')} {getattr(options, name)}: expected {expected}"
        for name, good, expected in (
            ("held_out_share", 0 <= options.held_out_share < 1, "0 to below 1"),
            ("margin", options.margin >= 0, "at least 0"),
            ("epochs", options.epochs >= 1, "at least 1"),
            ("batch", options.batch >= 1, "at least 1"),
            ("learning_rate", SMALLEST_MOVE <= options.learning_rate <= 1000, f"{SMALLEST_MOVE:g} to 1000"),
            ("warmup", 0 <= options.warmup <= 1, "0 to 1"),
            ("max_tokens", options.max_tokens >= 0, "at least 0"),
            ("micro_batch_tokens", options.micro_batch_tokens >= 1, "at least 1"),
            ("seed", options.seed >= 0, "at least 0"),
        )
        if not good
    ]
    if options.out.exists():
        wrong.append(f"{options.out} exists; give a new folder")
    wrong += [line for name in ("torch", "transformers") for line in missing_package(name, "torch")]
    if wrong:
        raise ConfigError("\n".join(wrong))


def _refuse_unwritable(folder: Path) -> None:
    """Raises ConfigError: the folder cannot be created. Checked first, since training may take hours."""
    try:
        make_synced(folder.parent)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".partial-"):
            pass
    except OSError as e:
        raise ConfigError(f"cannot write {folder}: {e.filename}: {e.strerror or e}; give another folder") from e


def read_preferences(source: str, name: str, prompt: str, split: str = "", subset: str = "") -> list[Preference]:
    """Returns every pair of responses to the same prompt with different rewards; the higher reward is `chosen`.

    Raises: DataError: the rows hold no preferences.
    """
    rows = load_rows(source, name, split=split, subset=subset)
    shape = shape_of(column_names(rows))
    if shape is None or shape in UNSCORED:
        raise DataError(
            f"{name} holds no preferences: its columns are {', '.join(column_names(rows))}; expected chosen and"
            " rejected, or responses and rewards"
        )
    preferences = []
    for row in recorded_rows(rows, shape, name, prompt=prompt).rows:
        if not all(isinstance(response, str) for response in row.responses):
            raise DataError(f"{row.where} has responses as token ids; expected texts, which any tokenizer can read")
        scored = [(r, text) for r, text in zip(row.rewards, row.responses, strict=True) if not math.isnan(r)]
        for (a, first), (b, second) in combinations(scored, 2):
            if a != b:
                better, worse = (first, second) if a > b else (second, first)
                preferences.append(Preference(row.prompt, better, worse, abs(a - b), row.row))
    if not preferences:
        raise DataError(f"{name} holds no two responses to one prompt with different rewards")
    return preferences


def split(preferences: Sequence[Preference], share: float, seed: int) -> tuple[list[Preference], list[Preference]]:
    """Returns the training pairs and the held-out pairs, which are all pairs of a random share of the prompts.

    Raises: DataError: no pair is left to train on.
    """
    prompts = sorted({repr(p.prompt) for p in preferences})
    order = np.random.default_rng((seed, 1)).permutation(len(prompts))
    held_out_prompts = {prompts[i] for i in order[: round(share * len(prompts))]}
    held_out = [p for p in preferences if repr(p.prompt) in held_out_prompts]
    training = [p for p in preferences if repr(p.prompt) not in held_out_prompts]
    if not training:
        raise DataError(f"--held-out-share {share:g} of {len(prompts)} prompts leaves none to train on")
    return training, held_out


def _sample_rows(pairs: Sequence[Any]) -> list[tuple[int, ...]]:
    """Up to four rows of the first 64 pairs, with the shortest and the longest among them."""
    rows = sorted((row for pair in pairs[:64] for row in (pair.chosen, pair.rejected)), key=len)
    return rows if len(rows) <= 4 else [rows[0], rows[len(rows) // 3], rows[2 * len(rows) // 3], rows[-1]]


def _show_accuracy(model: Any, held_out: Sequence[Any], tokens: int, when: str) -> None:
    if held_out:
        loss, right = model.evaluate(held_out, tokens)
        low, high = wilson(right * len(held_out), len(held_out))
        accuracy = f"{percent(right)} % of {len(held_out):,} held-out pairs in the right order"
        show_progress(f"{when:<16} {accuracy} (95 %: {percent(low)} to {percent(high)}), loss {fit(loss, 6)}")
