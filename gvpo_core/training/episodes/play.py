"""Plays episodes: the policy's turns, drawn for all episodes at once, and what tools and environments answer."""

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Literal

import numpy as np

from gvpo_core.training.episodes.calls import parse_calls
from gvpo_core.training.episodes.environments import Environments, Operation, Result
from gvpo_core.training.episodes.transcript import Chat, Transcript
from gvpo_core.training.policy import Policy, Response, Tokens
from gvpo_core.training.policy.ranks import attempt, highest
from gvpo_core.training.rewards.failures import RewardError
from gvpo_core.training.samplers.protocol import Drawn
from gvpo_core.training.sampling import Sampling, row_seed

_log = logging.getLogger("gvpo")

End = Literal["done", "turns", "tokens", "failed"]
_ENDS = ("done", "turns", "tokens", "failed")
NUMBERS = 7 + len(_ENDS)  # of an episode, for metrics; see `episode_rows`
Draw = Callable[
    [Sequence[Sequence[Mapping[str, Any]]], Sequence[Tokens], Sequence[Sequence[int]], Sampling],
    Sequence[Sequence[Response]],
]
"""(conversations, their tokens, seeds of each, settings) -> responses of each; every rank calls it equally often."""

_episodes = count()  # numbers of the episodes of this process


class EnvironmentFailed(RewardError):
    """Environments that failed for too many episodes, or a user's that breaks the protocol."""


@dataclass(frozen=True)
class Episode(Drawn):
    """A response of several turns: tokens from outside are not the policy's own."""

    messages: Sequence[dict[str, Any]] = field(default=(), kw_only=True)  # after the prompt
    reward: float | None = field(default=None, kw_only=True)  # sum over the turns; None: unscored
    end: End = field(default="done", kw_only=True)  # turns, tokens: cut by a limit; failed: by the environment
    turns: int = field(default=1, kw_only=True)  # of the policy
    calls: int = field(default=0, kw_only=True)  # of tools
    failed_calls: int = field(default=0, kw_only=True)  # that could not be read, or whose tool raised
    seconds: float = field(default=0.0, kw_only=True)  # waited for tools and environments
    error: str = field(default="", kw_only=True)  # of the environment


class _Playing:
    """An episode in progress."""

    def __init__(self, place: tuple[int, int], seed: int, transcript: Transcript) -> None:
        self.place, self.seed, self.transcript = place, seed, transcript
        self.number = next(_episodes)
        self.rewards: list[float] = []
        self.turns = self.calls = self.failed_calls = 0
        self.seconds, self.end, self.error = 0.0, "", ""
        self.logprob = 0.0
        self.version: int | None = None
        self.pending: list[str] = []  # errors of the last turn's calls

    def episode(self, cut_reward: float) -> Episode:
        cut = [cut_reward] if self.end in ("turns", "tokens") else []
        scored = self.end != "failed" and bool(self.rewards or cut)
        end: Any = self.end
        first, *later = self.transcript.segments
        return Episode(
            first.response,
            self.end == "done",
            self.logprob,
            self.version,
            mask=first.mask,
            later=tuple(later),
            messages=self.transcript.messages,
            reward=sum(self.rewards) + sum(cut) if scored else None,
            end=end,
            turns=self.turns,
            calls=self.calls,
            failed_calls=self.failed_calls,
            seconds=self.seconds,
            error=self.error,
        )


def play(
    policy: Policy,
    environments: Environments,
    chat: Chat,
    prompts: Sequence[tuple[Sequence[Mapping[str, Any]], Tokens, Mapping[str, Any]]],
    seeds: Sequence[Sequence[int]],
    sampling: Sampling,
    draw: Draw,
    *,
    system_prompt: str = "",
) -> list[list[Episode]]:
    """An episode for each seed of each prompt; every rank calls.

    Turn t of an episode is drawn with a seed made of the episode's and t. So an episode depends on its prompt, its
    seed, the parameters and its environment alone.

    Args:
      prompts: messages, token ids and row of the data, each.
      sampling: `max_tokens` are those that the policy sees after the prompt, the environment's included.
      system_prompt: data.system_prompt, with which prompts begin that have no system message of their own.
    Raises: EnvironmentFailed: an environment that broke the protocol, or failed for more than half of the episodes.
    """
    config = environments.config
    playing = [
        _Playing((p, e), seed, Transcript(chat, prompts[p][0], prompts[p][1]))
        for p, row in enumerate(seeds)
        for e, seed in enumerate(row)
    ]
    lost: set[tuple[int, int]] = set()

    def begin() -> None:
        operations = [Operation("reset", one.number, (dict(prompts[one.place[0]][2]),)) for one in playing]
        for one, result in _asked(environments, playing, operations):
            given = result.get("messages")
            prompt = one.transcript.prompt
            own = prompt[1:] if prompt[0] == {"role": "system", "content": system_prompt} else prompt
            if given is not None and given not in (prompt, own):
                raise EnvironmentFailed(
                    "reset gave other messages than the prompt of the row: the episodes of a group must begin alike."
                    " Make reset depend on its row alone, or return None to use the row's prompt"
                )

    attempt(policy, begin, kind=EnvironmentFailed)
    active = [one for one in playing if not one.end]
    positions = policy.describe().context or 0  # 0: not known
    while True:
        requests = _requests(active, sampling, config.turn_tokens, positions)
        if not (rounds := highest(policy, len(requests))):
            break
        for number in range(rounds):  # as many on every rank: there a model may be sharded
            members, limit = requests[number] if number < len(requests) else ([], sampling.max_tokens)
            settings = Sampling(limit, sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p)
            firsts = [many[0].transcript for many in members]
            drawn = draw(
                [[*t.prompt, *t.messages] for t in firsts],
                [t.context for t in firsts],
                [[row_seed(one.seed, one.turns) for one in many] for many in members],
                settings,
            )
            for many, responses in zip(members, drawn, strict=True):
                for one, response in zip(many, responses, strict=False):
                    _say(policy, one, response, sampling.max_tokens - one.transcript.length)
                lost |= {one.place for one in many[len(responses) :]}
        active = [one for one in active if one.place not in lost]
        attempt(policy, lambda: _answered(environments, active, sampling), kind=EnvironmentFailed)  # noqa: B023
        active = [one for one in active if not one.end]
    closed = environments.ask([Operation("close", one.number) for one in playing])
    if errors := [result["error"] for result in closed if "error" in result]:
        _log.warning("close failed for %d of %d episodes; the first: %s", len(errors), len(playing), errors[0])
    attempt(policy, lambda: _check_failures(playing), kind=EnvironmentFailed)
    episodes: list[list[Episode]] = [[] for _ in seeds]
    for one in playing:
        if one.place not in lost and one.turns:
            episodes[one.place[0]].append(one.episode(config.cut_reward))
    return episodes


def _requests(
    active: Sequence[_Playing], sampling: Sampling, turn: int, positions: int
) -> list[tuple[list[list[_Playing]], int]]:
    """Calls of `draw`: episodes by their context, and tokens of a turn at most.

    One call, whose longer turns are cut to the room of their episode, where the model has the positions for it; else a
    call for each limit. The turns are the same.
    """
    limits = [min(turn or sampling.max_tokens, sampling.max_tokens - one.transcript.length) for one in active]
    longest = max((len(one.transcript.context) for one in active), default=0)
    if active and longest + max(limits) <= positions:
        limits = [max(limits)] * len(active)
    calls: dict[int, dict[Tokens, list[_Playing]]] = {}
    for one, limit in zip(active, limits, strict=True):
        calls.setdefault(limit, {}).setdefault(one.transcript.context, []).append(one)
    return [(list(contexts.values()), limit) for limit, contexts in sorted(calls.items())]


def _say(policy: Policy, one: _Playing, response: Response, room: int) -> None:
    if len(response.tokens) > room:  # what the same seed draws within the room
        response = Response(response.tokens[:room], False)
    one.transcript.say(response, policy.decode(response.tokens))
    one.turns += 1
    if isinstance(response, Drawn):
        one.logprob += response.logprob
        one.version = response.version
    else:
        one.logprob = float("nan")
    if not response.finished:
        one.end = "tokens"


def _answered(environments: Environments, active: Sequence[_Playing], sampling: Sampling) -> None:
    """What tools and environments answer to the newest turns, added to the transcripts."""
    operations, asked = [], []
    unheard = [one for one in active if one.end]  # cut within a turn, which no environment hears
    for one in active:
        if one.end:
            continue
        message = dict(one.transcript.messages[-1])
        calls, one.pending = parse_calls(message["content"]) if environments.tools else ([], [])
        one.calls += len(calls) + len(one.pending)
        one.failed_calls += len(one.pending)
        asked.append(one)
        if environments.answers:
            one.pending = []
            operations.append(Operation("step", one.number, (message | {"tool_calls": calls},)))
        elif calls or one.pending:
            operations.append(Operation("tools", one.number, (calls,)))
        else:
            operations.append(Operation("step", one.number, (message,)))
    for one, result in _asked(environments, asked, operations):
        messages = result["messages"] + [{"role": "tool", "content": f"error: {text}"} for text in one.pending]
        one.failed_calls += result.get("failures", 0)
        if result.get("reward") is not None:
            one.rewards.append(result["reward"])
        if result.get("done"):
            one.transcript.messages += messages  # shown; no turn of the policy reads them
            one.end = "done"
        elif not messages:
            raise EnvironmentFailed("step gave no messages and done = False; expected messages for the next turn")
        elif one.turns == environments.config.max_turns:
            one.transcript.messages += messages
            one.end = "turns"
        else:
            heard = one.transcript.heard(messages)
            if one.transcript.length_with(heard) >= sampling.max_tokens:
                one.transcript.messages += messages
                one.end = "tokens"
            else:
                one.transcript.hear(messages, heard)
    if environments.scores_cut:
        cut = [one for one in active if one.end in ("turns", "tokens")]
        operations = [
            Operation("at_limit", one.number, (_last_turn(one, environments) if one in unheard else None,))
            for one in cut
        ]
        for one, result in _asked(environments, cut, operations):
            if result["reward"] is not None:
                one.rewards.append(result["reward"])


def _last_turn(one: _Playing, environments: Environments) -> dict[str, Any]:
    """The newest turn as `step` gets it: with the calls that are whole in it, where the environment answers them."""
    message = dict(one.transcript.messages[-1])
    if environments.answers:
        message["tool_calls"] = parse_calls(message["content"])[0]
    return message


def _asked(
    environments: Environments, episodes: Sequence[_Playing], operations: Sequence[Operation]
) -> list[tuple[_Playing, Result]]:
    """The results of the operations that did not fail; an episode whose operation failed has ended."""
    clock, answered = time.perf_counter(), []
    results = environments.ask(operations)
    seconds = time.perf_counter() - clock
    for one, result in zip(episodes, results, strict=True):
        one.seconds += seconds
        if "error" in result:
            one.end, one.error = "failed", f"{result['error']}\n{result.get('traceback', '')}".strip()
        else:
            answered.append((one, result))
    return answered


def _check_failures(playing: Sequence[_Playing]) -> None:
    failed = [one for one in playing if one.end == "failed"]
    if len(failed) * 2 > len(playing):
        raise EnvironmentFailed(
            f"the environment failed for {len(failed)} of {len(playing)} episodes: {failed[0].error}"
        )
    if failed:
        seen = f"the environment failed for {len(failed)} of {len(playing)} episodes; the first: "
        _log.warning("%s", seen + failed[0].error.partition("\n")[0])
        _log.info("%s", seen + failed[0].error)


def _repeats(episode: Episode) -> bool:
    """Whether two turns say the same, or make the same tool calls, whatever the words around them."""
    turns = []
    for message in episode.messages:
        if message["role"] == "assistant":
            calls = parse_calls(message["content"]).calls if episode.calls else []
            turns.append(json.dumps(calls, sort_keys=True) if calls else message["content"])
    return len({*turns}) < len(turns)


def episode_rows(episodes: Sequence[Response]) -> np.ndarray:
    """(N, NUMBERS) numbers of a step's episodes, of which `episode_metrics` makes metrics."""
    rows = [
        [
            *(e.turns, e.calls, e.failed_calls, e.seconds, len(e.all_tokens), _repeats(e), 1 + len(e.later)),
            *(e.end == end for end in _ENDS),
        ]
        for e in episodes
        if isinstance(e, Episode)
    ]
    return np.asarray(rows, np.float64).reshape(len(rows), NUMBERS)


def episode_metrics(rows: np.ndarray) -> dict[str, float]:
    """The metrics of episodes, of all ranks' `episode_rows`; rows of NaN are left out."""
    rows = rows[~np.isnan(rows).any(axis=1)]
    if not len(rows):
        return {}
    turns, calls, failed, seconds, tokens, repeated, segments = rows[:, :7].T
    metrics = {
        "turns/mean": float(turns.mean()),
        "turns/max": int(turns.max()),
        "tools/calls": float(calls.mean()),
        "episodes/seconds": float(seconds.max()),
        "episodes/repeated": float(repeated.mean()),
        "episodes/segments": float(segments.mean()),
        "length/context": float(tokens.mean()),
    }
    if calls.sum():
        metrics["tools/failed"] = float(failed.sum() / calls.sum())
    return metrics | ends_of(rows)


def ends_of(rows: np.ndarray) -> dict[str, float]:
    """The shares of the ways in which episodes ended, of all ranks' `episode_rows`; rows of NaN are left out."""
    rows = rows[~np.isnan(rows).any(axis=1)]
    return {f"episodes/{end}": float(rows[:, 7 + i].mean()) for i, end in enumerate(_ENDS) if len(rows)}
