"""Plays episodes: draws the policy's turns for all episodes at once, and gets the answers of tools and environments."""

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
NUMBERS = 7 + len(_ENDS)  # numbers per episode, for metrics; see `episode_rows`
Draw = Callable[
    [Sequence[Sequence[Mapping[str, Any]]], Sequence[Tokens], Sequence[Sequence[int]], Sampling],
    Sequence[Sequence[Response]],
]
"""(conversations, their tokens, seeds of each, settings) -> responses of each. All ranks make equally many calls."""

_episodes = count()  # numbers of the episodes of this process


class EnvironmentFailed(RewardError):
    """Environments failed for too many episodes, or a user's environment broke the protocol."""


@dataclass(frozen=True)
class Episode(Drawn):
    """A response of several turns. Tokens of tools and environments are not the policy's own."""

    messages: Sequence[dict[str, Any]] = field(default=(), kw_only=True)  # after the prompt
    reward: float | None = field(default=None, kw_only=True)  # sum over the turns; None: unscored
    end: End = field(default="done", kw_only=True)  # turns, tokens: cut by a limit; failed: the environment failed
    turns: int = field(default=1, kw_only=True)  # turns of the policy
    calls: int = field(default=0, kw_only=True)  # tool calls
    failed_calls: int = field(default=0, kw_only=True)  # calls that could not be read, or with a tool that raised
    seconds: float = field(default=0.0, kw_only=True)  # time spent waiting for tools and environments
    error: str = field(default="", kw_only=True)  # error of the environment


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

    def result(self, cut_reward: float) -> Episode:
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
    """Plays an episode for each seed of each prompt. Every rank calls this.

    The seed of turn t is made from the episode's seed and t. So an episode depends only on its prompt, its seed, the
    parameters and its environment.

    Args:
      prompts: messages, token ids and data row of each prompt.
      sampling: `max_tokens` limits all tokens after the prompt, including those of the environment.
      system_prompt: data.system_prompt; prompts without a system message of their own begin with it.
    Raises: EnvironmentFailed: an environment broke the protocol, or failed for more than half of the episodes.
    """
    config = environments.config
    playing = [
        _Playing((p, e), seed, Transcript(chat, prompts[p][0], prompts[p][1]))
        for p, row in enumerate(seeds)
        for e, seed in enumerate(row)
    ]
    lost: set[tuple[int, int]] = set()

    def begin() -> None:
        operations = [Operation("reset", episode.number, (dict(prompts[episode.place[0]][2]),)) for episode in playing]
        for episode, result in _asked(environments, playing, operations):
            messages = result.get("messages")
            prompt = episode.transcript.prompt
            row_prompt = prompt[1:] if prompt[0] == {"role": "system", "content": system_prompt} else prompt
            if messages is not None and messages not in (prompt, row_prompt):
                raise EnvironmentFailed(
                    "reset gave other messages than the prompt of the row: the episodes of a group must begin alike."
                    " Make reset depend on its row alone, or return None to use the row's prompt"
                )

    attempt(policy, begin, kind=EnvironmentFailed)
    active = [episode for episode in playing if not episode.end]
    positions = policy.describe().context or 0  # 0: not known
    while True:
        requests = _requests(active, sampling, config.turn_tokens, positions)
        if not (rounds := highest(policy, len(requests))):
            break
        for number in range(rounds):  # equally many on every rank: the model may be sharded
            members, limit = requests[number] if number < len(requests) else ([], sampling.max_tokens)
            settings = Sampling(limit, sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p)
            firsts = [many[0].transcript for many in members]
            drawn = draw(
                [[*t.prompt, *t.messages] for t in firsts],
                [t.context for t in firsts],
                [[row_seed(episode.seed, episode.turns) for episode in many] for many in members],
                settings,
            )
            for many, responses in zip(members, drawn, strict=True):
                for episode, response in zip(many, responses, strict=False):
                    _say(policy, episode, response, sampling.max_tokens - episode.transcript.length)
                lost |= {episode.place for episode in many[len(responses) :]}
        active = [episode for episode in active if episode.place not in lost]
        attempt(policy, lambda: _answered(environments, active, sampling), kind=EnvironmentFailed)  # noqa: B023
        active = [episode for episode in active if not episode.end]
    closed = environments.ask([Operation("close", episode.number) for episode in playing])
    if errors := [result["error"] for result in closed if "error" in result]:
        _log.warning("close failed for %d of %d episodes; the first: %s", len(errors), len(playing), errors[0])
    attempt(policy, lambda: _check_failures(playing), kind=EnvironmentFailed)
    episodes: list[list[Episode]] = [[] for _ in seeds]
    for episode in playing:
        if episode.place not in lost and episode.turns:
            episodes[episode.place[0]].append(episode.result(config.cut_reward))
    return episodes


def _requests(
    active: Sequence[_Playing], sampling: Sampling, turn: int, positions: int
) -> list[tuple[list[list[_Playing]], int]]:
    """Plans the calls of `draw`: each has episodes, grouped by context, and the token limit of a turn.

    If the model has enough positions, one call draws all turns, and turns that are too long for their episode are cut
    later. Otherwise there is one call for each limit. Both give the same turns.
    """
    limits = [min(turn or sampling.max_tokens, sampling.max_tokens - episode.transcript.length) for episode in active]
    longest = max((len(episode.transcript.context) for episode in active), default=0)
    if active and longest + max(limits) <= positions:
        limits = [max(limits)] * len(active)
    calls: dict[int, dict[Tokens, list[_Playing]]] = {}
    for episode, limit in zip(active, limits, strict=True):
        calls.setdefault(limit, {}).setdefault(episode.transcript.context, []).append(episode)
    return [(list(contexts.values()), limit) for limit, contexts in sorted(calls.items())]


def _say(policy: Policy, episode: _Playing, response: Response, room: int) -> None:
    if len(response.tokens) > room:  # the same seed would draw this within the room
        response = Response(response.tokens[:room], False)
    episode.transcript.say(response, policy.decode(response.tokens))
    episode.turns += 1
    if isinstance(response, Drawn):
        episode.logprob += response.logprob
        episode.version = response.version
    else:
        episode.logprob = float("nan")
    if not response.finished:
        episode.end = "tokens"


def _answered(environments: Environments, active: Sequence[_Playing], sampling: Sampling) -> None:
    """Adds the answers of tools and environments to the newest turns to the transcripts."""
    operations, stepped = [], []
    unheard = [episode for episode in active if episode.end]  # cut inside a turn, which is not sent to the environment
    for episode in active:
        if episode.end:
            continue
        message = dict(episode.transcript.messages[-1])
        calls, episode.pending = parse_calls(message["content"]) if environments.tools else ([], [])
        episode.calls += len(calls) + len(episode.pending)
        episode.failed_calls += len(episode.pending)
        stepped.append(episode)
        if environments.answers:
            episode.pending = []
            operations.append(Operation("step", episode.number, (message | {"tool_calls": calls},)))
        elif calls or episode.pending:
            operations.append(Operation("tools", episode.number, (calls,)))
        else:
            operations.append(Operation("step", episode.number, (message,)))
    for episode, result in _asked(environments, stepped, operations):
        messages = result["messages"] + [{"role": "tool", "content": f"error: {text}"} for text in episode.pending]
        episode.failed_calls += result.get("failures", 0)
        if result.get("reward") is not None:
            episode.rewards.append(result["reward"])
        if result.get("done"):
            episode.transcript.messages += messages  # recorded only: the policy has no further turn
            episode.end = "done"
        elif not messages:
            raise EnvironmentFailed("step gave no messages and done = False; expected messages for the next turn")
        elif episode.turns == environments.config.max_turns:
            episode.transcript.messages += messages
            episode.end = "turns"
        else:
            heard = episode.transcript.heard(messages)
            if episode.transcript.length_with(heard) >= sampling.max_tokens:
                episode.transcript.messages += messages
                episode.end = "tokens"
            else:
                episode.transcript.hear(messages, heard)
    if environments.scores_cut:
        cut = [episode for episode in active if episode.end in ("turns", "tokens")]
        operations = [
            Operation("at_limit", episode.number, (_last_turn(episode, environments) if episode in unheard else None,))
            for episode in cut
        ]
        for episode, result in _asked(environments, cut, operations):
            if result["reward"] is not None:
                episode.rewards.append(result["reward"])


def _last_turn(episode: _Playing, environments: Environments) -> dict[str, Any]:
    """Returns the newest turn as `step` gets it: with its complete calls, if the environment answers calls."""
    message = dict(episode.transcript.messages[-1])
    if environments.answers:
        message["tool_calls"] = parse_calls(message["content"])[0]
    return message


def _asked(
    environments: Environments, episodes: Sequence[_Playing], operations: Sequence[Operation]
) -> list[tuple[_Playing, Result]]:
    """Returns the results of operations that did not fail. If an operation fails, its episode ends."""
    clock, answered = time.perf_counter(), []
    results = environments.ask(operations)
    seconds = time.perf_counter() - clock
    for episode, result in zip(episodes, results, strict=True):
        episode.seconds += seconds
        if "error" in result:
            episode.end, episode.error = "failed", f"{result['error']}\n{result.get('traceback', '')}".strip()
        else:
            answered.append((episode, result))
    return answered


def _check_failures(playing: Sequence[_Playing]) -> None:
    failed = [episode for episode in playing if episode.end == "failed"]
    if len(failed) * 2 > len(playing):
        raise EnvironmentFailed(
            f"the environment failed for {len(failed)} of {len(playing)} episodes: {failed[0].error}"
        )
    if failed:
        seen = f"the environment failed for {len(failed)} of {len(playing)} episodes; the first: "
        _log.warning("%s", seen + failed[0].error.partition("\n")[0])
        _log.info("%s", seen + failed[0].error)


def _repeats(episode: Episode) -> bool:
    """Whether two turns have the same text or make the same tool calls, regardless of the text around the calls."""
    turns = []
    for message in episode.messages:
        if message["role"] == "assistant":
            calls = parse_calls(message["content"]).calls if episode.calls else []
            turns.append(json.dumps(calls, sort_keys=True) if calls else message["content"])
    return len({*turns}) < len(turns)


def episode_rows(episodes: Sequence[Response]) -> np.ndarray:
    """(N, NUMBERS) numbers of a step's episodes, for `episode_metrics`."""
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
    """Metrics of episodes, from the `episode_rows` of all ranks. Ignores rows with NaN."""
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
    """Shares of the ways in which episodes ended, from the `episode_rows` of all ranks. Ignores rows with NaN."""
    rows = rows[~np.isnan(rows).any(axis=1)]
    return {f"episodes/{end}": float(rows[:, 7 + i].mean()) for i, end in enumerate(_ENDS) if len(rows)}
