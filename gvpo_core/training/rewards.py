"""Rewards: the user's functions, called so that one bad response or one hung call never stops a run.

A reward function follows TRL's convention: `reward(prompts, completions, **columns) -> list[float | None]`, plain or
async. A completion is text, or a list of one assistant message where the prompt is chat messages. `columns` are the
other columns of the data, one value a response, and `completion_ids`.

Calls run in threads of their own: a call past its time limit is given up, not killed, and one that never releases the
interpreter (a catastrophic regular expression) still blocks. Functions that execute code need a sandbox of their own.
"""

import asyncio
import importlib
import importlib.util
import inspect
import logging
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gvpo_core.training.builtin_rewards import BUILTIN
from gvpo_core.training.config import ConfigError, RewardConfig
from gvpo_core.training.policy import Prompt

RewardFunction = Callable[..., Any]

_log = logging.getLogger("gvpo.rewards")
_ISOLATED_CALLS = 64  # responses tried one by one at once, after a call for all of them failed


class RewardError(RuntimeError):
    """A reward function that cannot be used: a wrong count, a wrong type, or no response scored at all."""


@dataclass(frozen=True)
class Scores:
    """The rewards of N responses."""

    total: np.ndarray  # (N,) float64, weighted sum; NaN where any reward is missing
    parts: dict[str, np.ndarray]  # name -> (N,) float64, unweighted; NaN = missing
    errors: dict[str, dict[str, int]] = field(default_factory=dict)  # name -> {"error" | "timeout" | "none": count}
    seconds: dict[str, float] = field(default_factory=dict)  # name -> seconds the reward took


@dataclass(frozen=True)
class Reward:
    """One reward function with its weight and time limit."""

    name: str
    function: RewardFunction
    weight: float = 1.0
    timeout: float = 30.0
    options: Mapping[str, Any] = field(default_factory=dict)


def load_rewards(config: Mapping[str, RewardConfig]) -> list[Reward]:
    """Finds the configured functions.

    Raises: ConfigError: a module, file or function that is not there, or an import that fails, naming it.
    """
    return [
        Reward(name, find_function(c.function, f"rewards.{name}.function"), c.weight, c.timeout, dict(c.options))
        for name, c in config.items()
    ]


def find_function(spec: str, name: str) -> RewardFunction:
    """A built-in by name, or `package.module:function`, or `path/to/file.py:function`."""
    if spec in BUILTIN:
        return BUILTIN[spec]
    where, colon, attribute = spec.rpartition(":")
    if not colon or not where or not attribute:
        raise ConfigError(
            f"{name} = {spec!r}; expected one of {', '.join(BUILTIN)}, package.module:function or file.py:function"
        )
    try:
        if where.endswith(".py"):
            path = Path(where)
            if not path.is_file():
                raise ConfigError(f"{name} = {spec!r}: there is no file {path}")
            found = importlib.util.spec_from_file_location(f"gvpo_reward_{path.stem}", path)
            if found is None or found.loader is None:
                raise ConfigError(f"{name} = {spec!r}: {path} cannot be imported")
            module = importlib.util.module_from_spec(found)
            found.loader.exec_module(module)
        else:
            module = importlib.import_module(where)
    except ConfigError:
        raise
    except Exception as e:  # whatever the user's module raises on import
        raise ConfigError(f"{name} = {spec!r}: importing {where} failed: {type(e).__name__}: {e}") from e
    function = getattr(module, attribute, None)
    if not callable(function):
        raise ConfigError(f"{name} = {spec!r}: {where} has no function {attribute}")
    return function  # type: ignore[no-any-return]


def score(
    rewards: Sequence[Reward],
    prompts: Sequence[Prompt],
    responses: Sequence[str],
    columns: Mapping[str, Sequence[Any]],
) -> Scores:
    """Calls every reward, all at the same time, on the N responses.

    A response for which a reward raises, runs out of time, or gives None or NaN is left without a score. A call for
    all responses that fails is tried again response by response, so that only the bad ones are lost.

    Raises: RewardError: a wrong number of rewards, something that is not a number, or no response scored.
    """
    completions = [
        text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
        for prompt, text in zip(prompts, responses, strict=True)
    ]
    n = len(completions)
    if n == 0:
        return Scores(np.zeros(0), {r.name: np.zeros(0) for r in rewards}, {r.name: _no_errors() for r in rewards})
    with ThreadPoolExecutor(len(rewards)) as pool:
        outcomes = list(pool.map(lambda r: _score_one(r, prompts, completions, columns), rewards))
    parts = {r.name: values for r, (values, _, _) in zip(rewards, outcomes, strict=True)}
    total = np.asarray(sum(r.weight * parts[r.name] for r in rewards), dtype=np.float64)
    errors: dict[str, dict[str, int]] = {}
    for reward, (_, failures, _) in zip(rewards, outcomes, strict=True):
        counts = _no_errors()
        for kind, _, _ in failures:
            counts[kind] += 1
        errors[reward.name] = counts
        for kind, row, message in failures[:3]:
            _log.warning("reward %s: %s for the response to %r: %s", reward.name, kind, _start(prompts[row]), message)
        if len(failures) > 3:
            _log.warning("reward %s: %d more responses without a score", reward.name, len(failures) - 3)
        if len(failures) == n:
            kind, row, message = failures[0]
            raise RewardError(
                f"reward {reward.name} gave no score to any of {n} responses; the first ({kind}), to the prompt"
                f" {_start(prompts[row])!r}: {message}"
            )
    seconds = {r.name: s for r, (_, _, s) in zip(rewards, outcomes, strict=True)}
    return Scores(total, parts, errors, seconds)


def _no_errors() -> dict[str, int]:
    return {"error": 0, "timeout": 0, "none": 0}


_Failure = tuple[str, int, str]  # kind, row, message


def _score_one(
    reward: Reward, prompts: Sequence[Prompt], completions: Sequence[Any], columns: Mapping[str, Sequence[Any]]
) -> tuple[np.ndarray, list[_Failure], float]:
    start = time.perf_counter()
    n = len(completions)
    call = _accepted(reward, columns)
    failures: list[_Failure] = []
    try:
        values = _with_limit(call, prompts, completions, columns, reward.timeout)
        result = _numbers(reward.name, values, n)
    except RewardError:
        raise
    except Exception as first:  # anything the user's function raises
        if n == 1:
            failures.append(_failure(0, first, reward.timeout))
            return np.full(1, np.nan), failures, time.perf_counter() - start
        result = np.full(n, np.nan)

        def one(row: int) -> float | BaseException:
            own = {name: [values[row]] for name, values in columns.items()}
            try:
                alone = _with_limit(call, [prompts[row]], [completions[row]], own, reward.timeout)
                return float(_numbers(reward.name, alone, 1)[0])
            except Exception as e:
                return e

        with ThreadPoolExecutor(min(n, _ISOLATED_CALLS)) as pool:
            for row, outcome in enumerate(pool.map(one, range(n))):
                if isinstance(outcome, RewardError):
                    raise outcome from first
                if isinstance(outcome, BaseException):
                    failures.append(_failure(row, outcome, reward.timeout))
                else:
                    result[row] = outcome
    failed = {row for _, row, _ in failures}
    failures += [("none", int(row), "None or NaN") for row in np.flatnonzero(np.isnan(result)) if row not in failed]
    return result, failures, time.perf_counter() - start


def _failure(row: int, error: BaseException, limit: float) -> _Failure:
    if isinstance(error, TimeoutError):
        return "timeout", row, f"no result within {limit:g} s"
    return "error", row, f"{type(error).__name__}: {error}"


def _accepted(reward: Reward, columns: Mapping[str, Sequence[Any]]) -> RewardFunction:
    """The function with its options, taking only the columns that its signature names (all with **kwargs)."""
    parameters = inspect.signature(reward.function).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    names = [c for c in columns if (takes_all or c in parameters) and c not in reward.options]

    def call(prompts: Sequence[Prompt], completions: Sequence[Any], values: Mapping[str, Sequence[Any]]) -> Any:
        chosen = {name: list(values[name]) for name in names}
        return reward.function(prompts=list(prompts), completions=list(completions), **chosen, **reward.options)

    return call


def _with_limit(call: RewardFunction, prompts: Any, completions: Any, columns: Any, limit: float) -> Any:
    """The call's result, from a thread that dies with the process. Raises: TimeoutError, or what the call raised."""
    outcome: list[Any] = []
    done = threading.Event()

    def work() -> None:
        try:
            value = call(prompts, completions, columns)
            if inspect.isawaitable(value):
                value = asyncio.run(_await(value))
            outcome.append((value, None))
        except BaseException as e:  # SystemExit too: a reward must not end the run
            outcome.append((None, e))
        done.set()

    threading.Thread(target=work, daemon=True, name="gvpo-reward").start()
    if not done.wait(limit):
        raise TimeoutError
    value, error = outcome[0]
    if isinstance(error, TimeoutError):
        raise RuntimeError(f"TimeoutError inside the reward: {error}") from error
    if isinstance(error, BaseException):
        raise error if isinstance(error, Exception) else RuntimeError(f"{type(error).__name__}: {error}")
    return value


async def _await(value: Any) -> Any:
    return await value


def _numbers(name: str, values: Any, n: int) -> np.ndarray:
    if isinstance(values, str | bytes | Mapping) or not hasattr(values, "__len__"):
        raise RewardError(f"reward {name} returned {_start(values)!r}; expected a list of {n} numbers or None")
    if len(values) != n:
        raise RewardError(f"reward {name} returned {len(values)} values for {n} completions; expected one each")
    out = np.full(n, np.nan)
    for i, value in enumerate(values):
        if value is None:
            continue
        try:
            if isinstance(value, str | bytes):
                raise TypeError
            out[i] = float(value)
        except (TypeError, ValueError):
            raise RewardError(
                f"reward {name} returned {_start(value)!r} ({type(value).__name__}) for completion {i};"
                " expected a number or None"
            ) from None
        if math.isinf(out[i]):
            raise RewardError(f"reward {name} returned {out[i]} for completion {i}; expected a finite number or None")
    return out


def _start(value: Any, length: int = 80) -> str:
    text = value if isinstance(value, str) else str(value)
    return text if len(text) <= length else text[: length - 1] + "…"
