"""One rollout: responses to the step's prompts, drawn by all ranks, with the rewards of all ranks."""

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from gvpo_core.training.data import Prompts
from gvpo_core.training.episodes import COLUMN, Episode, EpisodePrompts, episode_rows
from gvpo_core.training.episodes.play import Draw
from gvpo_core.training.policy import Batch, Mask, Policy, Prompt, Response, ResponseError, Tokens, later_of, masks_of
from gvpo_core.training.policy.ranks import agree, attempt, gather_objects
from gvpo_core.training.rewards import Reward, RewardError, Scores
from gvpo_core.training.rewards.failures import count_errors, counted_failures, no_score, report
from gvpo_core.training.rewards.scores import call_rewards, stacked
from gvpo_core.training.rewards.total import members, total_rewards
from gvpo_core.training.samplers import Drawn, Sampler
from gvpo_core.training.samplers.drawing import draw_elsewhere
from gvpo_core.training.samplers.gaps import GapCheck
from gvpo_core.training.samplers.protocol import staleness
from gvpo_core.training.sampling import Sampling, row_seed


@dataclass(frozen=True)
class Rollout:
    """N responses over all ranks, in rank order; `batch` holds this rank's, rows `start`..`start + len(batch)` of N."""

    batch: Batch
    start: int
    group_ids: np.ndarray  # (N,) int64, 0..num_groups-1
    num_groups: int
    rewards: np.ndarray  # (N,) float64, total; NaN = unscored
    parts: dict[str, np.ndarray]  # name -> (N,)
    errors: dict[str, dict[str, int]]
    lengths: np.ndarray  # (N,) int64, the policy's own tokens
    finished: np.ndarray  # (N,) bool
    completions: list[dict[str, Any]]  # rows of completions.jsonl without kind and step; all N on every rank
    seconds: dict[str, float]  # generate, reward
    reward_seconds: dict[str, float]  # name -> s, of the slowest rank
    ref_logprobs: np.ndarray | None = None  # (N,) nats, of pi_ref, if the source has them; NaN = unscored
    recorded: np.ndarray | None = None  # (N,) bool: not drawn for this step; None: none
    details: dict[str, float] = field(default_factory=dict)  # metrics of the source
    sampler_logprobs: np.ndarray | None = None  # (N,) nats, from the sampler; NaN = unknown
    gaps: GapCheck | None = None  # compares sampler_logprobs with the policy's; None: not in this step
    staleness: np.ndarray | None = None  # (N,) steps that the policy took since the sampler's weights; NaN = unknown
    episodes: np.ndarray | None = None  # (N, NUMBERS) of `episode_rows`; NaN = no episode of this step
    columns: Sequence[Mapping[str, Any]] = ()  # by group, of its prompt's data row
    prompts: Sequence[Prompt] = ()  # by group, as in the data
    left_out: np.ndarray | None = None  # (N,) bool: not in the update, regardless of the reward; None: none
    stopped: np.ndarray | None = None  # (N,) bool: ended by a stop text; None: none
    taught: bool = False  # the reference is a teacher, from which a group learns with any rewards

    @property
    def drawn(self) -> np.ndarray:
        """(N,) bool: drawn for this step, by the policy or a sampler."""
        return np.ones(len(self.rewards), bool) if self.recorded is None else ~self.recorded

    @property
    def rewarded(self) -> bool:
        """Whether the rewards have a meaning: without a reward function all drawn responses have 0."""
        return bool(self.parts) or not self.drawn.any()

    @property
    def trained_rewards(self) -> np.ndarray:
        """(N,) float64: the rewards that the update sees; NaN = unscored or left out."""
        return self.rewards if self.left_out is None else np.where(self.left_out, np.nan, self.rewards)

    def check_gaps(self, logprobs: np.ndarray, *, moved: bool) -> None:
        """Compares the sampler's log-probabilities with the policy's, if this step has a comparison.

        Args:
          logprobs: (N,) nats, of the policy as the update scored them; NaN = not scored.
          moved: whether some were scored after an optimizer step of this rollout.
        Raises: SamplerError: the sampler has other weights than the policy.
        """
        if self.gaps is not None:
            self.gaps.check(self.sampler_logprobs, logprobs, self.lengths, None if moved else self.staleness)


@dataclass(frozen=True)
class Requests:
    """The responses of a step that this rank draws."""

    start: int  # number of responses of the ranks before this one
    places: dict[int, list[int]]  # group -> positions of this rank's responses in it
    tokens: list[Tokens]  # prompt of each group
    prompts: list[Prompt]  # prompt of each group, as in the data
    seeds: list[list[int]]  # seed of each response, by group


def requests_of(
    policy: Policy, prompts: Prompts, rows: Sequence[int], responses: int, seed_path: tuple[int, ...]
) -> Requests:
    """Returns this rank's part of `responses` responses to each prompt in `rows`; see `collect`."""
    total = len(rows) * responses
    start, stop = (total * r // policy.world_size for r in (policy.rank, policy.rank + 1))
    places: dict[int, list[int]] = {}
    for flat in range(start, stop):
        places.setdefault(flat // responses, []).append(flat % responses)
    seeds = [[row_seed(*seed_path, group, i) for i in positions] for group, positions in places.items()]
    chosen = [rows[group] for group in places]
    return Requests(start, places, [prompts.tokens[r] for r in chosen], [prompts.prompts[r] for r in chosen], seeds)


def collect(
    policy: Policy,
    prompts: Prompts,
    rows: Sequence[int],
    responses: int,
    sampling: Sampling,
    rewards: Sequence[Reward],
    seed_path: tuple[int, ...],
    *,
    sampler: Sampler | None = None,
    version: int = 0,
) -> Rollout:
    """Samples and scores `responses` responses to each prompt in `rows`.

    The P x k responses are split over the ranks in equal contiguous parts, so a group may be on two ranks. A response's
    seed depends on `seed_path`, its prompt's position and its own position, not on its rank.

    Args:
      sampler: draws the responses instead of the policy: an older copy, a teacher (Cor. 3.2). A group has those that
        arrive.
      version: steps that the policy has taken. Staleness is this number minus that of the sampler's weights.
    Raises: RewardError: on every rank, if a reward of any rank cannot be used. SamplerError: no response arrived.
    """
    clock = time.perf_counter()
    requests = requests_of(policy, prompts, rows, responses, seed_path)
    start, local_places, prompt_tokens, seeds = requests.start, requests.places, requests.tokens, requests.seeds
    details: dict[str, float] = {}
    if isinstance(prompts, EpisodePrompts):
        reusing = getattr(policy, "reusing_prefixes", nullcontext) if sampler is None else nullcontext
        with reusing() as prefixes:
            drawn: Sequence[Sequence[Response]] = prompts.play(
                policy, [rows[group] for group in local_places], seeds, sampling, _turns_of(policy, sampler)
            )
        arrived = int(policy.gather(np.asarray([sum(map(len, drawn))])).sum())
        details = {} if sampler is None else {"responses/lost": float(len(rows) * responses - arrived)}
        if arrived < len(rows) * responses:
            details["responses/lost"] = float(len(rows) * responses - arrived)
        if prefixes is not None:
            reused, computed = policy.gather(np.asarray([[prefixes.reused, prefixes.computed]])).sum(axis=0)
            details |= {"episodes/reused": int(reused), "episodes/prefilled": int(computed)}
    elif sampler is None:
        drawn = policy.generate(prompt_tokens, seeds, sampling)
    else:
        group_prompts = [prompts.prompts[rows[group]] for group in local_places]
        drawn, details = draw_elsewhere(policy, sampler, group_prompts, prompt_tokens, seeds, sampling)
    if sampling.stop:
        drawn = [
            [stopped(policy, response, sampling.stop) for response in group_responses] for group_responses in drawn
        ]
    flat_drawn: list[tuple[int, Response]] = [
        (g, r) for g, group_responses in zip(local_places, drawn, strict=True) for r in group_responses
    ]
    may_lose = sampler is not None or isinstance(prompts, EpisodePrompts)  # a rank may have fewer than it requested
    if may_lose:
        start = int(policy.gather(np.asarray([len(flat_drawn)]))[: policy.rank].sum())
    groups = [g for g, _ in flat_drawn]
    responses_drawn = [r for _, r in flat_drawn]
    tokens_of_rows = [prompts.tokens[rows[g]] for g in groups]
    masks, later = masks_of(responses_drawn), later_of(responses_drawn)
    batch = Batch(tokens_of_rows, [r.tokens for r in responses_drawn], groups, masks, later=later)
    texts = [policy.decode(r.tokens) for _, r in flat_drawn]
    generated = time.perf_counter()
    scores = score_everywhere(policy, rewards, prompts, [rows[g] for g in groups], texts, batch, responses_drawn)
    local_rewards = scores.total[start : start + len(batch)]
    completions: list[dict[str, Any]] = [
        {
            "prompt": plain_prompt(prompts.prompts[rows[g]]),
            "group": g,
            "row": prompts.row(rows[g]),
            "response": plain_prompt(r.messages) if isinstance(r, Episode) else text,
            "tokens": r.length,
            "finished": r.finished,
            "reward": float(local_rewards[i]),
            "rewards": {name: float(values[start + i]) for name, values in scores.parts.items()},
        }
        | ({"version": r.version} if isinstance(r, Drawn) and r.version is not None else {})
        | ({"stopped": True} if r.stopped else {})
        | ({"episode": list(r.messages), "end": r.end, "turns": r.turns} if isinstance(r, Episode) else {})
        for i, ((g, r), text) in enumerate(zip(flat_drawn, texts, strict=True))
    ]
    row = 0
    for (g, places), group_responses in zip(local_places.items(), drawn, strict=True):
        prompt, group_rows = prompts.prompts[rows[g]], slice(row, row + len(group_responses))
        if group_responses and (places[0] == 0 or may_lose):  # once per group: what a later run needs to train
            completions[row]["messages"] = None if isinstance(prompt, str) else prompt
            if isinstance(prompts, EpisodePrompts) and prompts.chat.tools:  # without tools, messages give other tokens
                completions[row]["prompt_ids"] = prompts.tokens[rows[g]]
        ids = odd_ids(policy, prompt, group_responses, texts[group_rows])
        for completion, response, response_ids in zip(completions[group_rows], group_responses, ids, strict=True):
            completion |= exact_tokens(response, response_ids)
        row += len(group_responses)
    gather = policy.gather
    logprobs = [r.logprob if isinstance(r, Drawn) else math.nan for _, r in flat_drawn]
    return Rollout(
        batch=batch,
        start=start,
        group_ids=gather(np.asarray(groups, np.int64)),
        num_groups=len(rows),
        rewards=scores.total,
        parts=scores.parts,
        errors=scores.errors,
        lengths=gather(np.asarray([r.length for r in responses_drawn], np.int64)),
        finished=gather(np.asarray([r.finished for _, r in flat_drawn], bool)),
        completions=gather_objects(policy, completions),
        seconds={"generate": generated - clock, "reward": time.perf_counter() - generated},
        reward_seconds={r.name: float(gather(np.asarray([scores.seconds.get(r.name, 0.0)])).max()) for r in rewards},
        columns=[prompts.columns[row] for row in rows],
        prompts=[prompts.prompts[row] for row in rows],
        episodes=gather(episode_rows(responses_drawn)) if isinstance(prompts, EpisodePrompts) else None,
        details=details,
        sampler_logprobs=None if sampler is None else gather(np.asarray(logprobs, np.float64)),
        staleness=None if sampler is None else gather(staleness([r for _, r in flat_drawn], version)),
        stopped=gather(np.asarray([r.stopped for _, r in flat_drawn], bool)) if sampling.stop else None,
    )


def stopped(policy: Policy, response: Response, stop: Sequence[str]) -> Response:
    """Cuts a response after the token that completes the first stop text in it. Without one it stays as it is."""

    def ends(count: int) -> bool:
        text = policy.decode(response.tokens[:count])
        return any(end in text for end in stop)

    if not ends(len(response.tokens)):
        return response
    low, high = 0, len(response.tokens)  # ends(high) holds, ends(low) does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if ends(middle) else (middle, high)
    changes: dict[str, Any] = {}
    if isinstance(response, Drawn):
        changes["logprob"] = math.nan  # a sampler's value covers the cut tokens too
    mask = None if response.mask is None else response.mask[:high]
    return replace(response, tokens=response.tokens[:high], finished=True, stopped=True, mask=mask, **changes)


def score_everywhere(
    policy: Policy,
    rewards: Sequence[Reward],
    prompts: Prompts,
    rows: list[int],
    texts: list[str],
    batch: Batch,
    responses: Sequence[Response],
) -> Scores:
    """Scores the responses of all ranks. A group may be on two ranks, so totals need the values of all ranks.

    Without any reward, which a teacher allows, every response has 0.

    Raises: RewardError: on every rank.
    """
    if not rewards:
        return Scores(np.zeros(int(policy.gather(np.asarray([len(texts)])).sum())), {}, {}, {})
    columns = prompts.columns_of(rows) | {"completion_ids": completion_ids(batch)}
    answers: list[Any] = list(texts)
    if isinstance(prompts, EpisodePrompts):
        episodes = [response for response in responses if isinstance(response, Episode)]
        answers, columns[COLUMN] = [list(e.messages) for e in episodes], [e.reward for e in episodes]
    asked_prompts, gather = [prompts.prompts[row] for row in rows], policy.gather
    calls = attempt(
        policy, lambda: call_rewards(rewards, asked_prompts, answers, columns), catch=(RewardError,), kind=RewardError
    )
    assert calls is not None  # every rank scores its own rows
    parts, failed = (np.stack([gather(x) for x in values]) for values in stacked(rewards, calls, len(texts)))
    group_ids = gather(np.asarray(batch.groups, np.int64))
    total = total_rewards(parts, failed, [r.weight for r in rewards], group_ids)
    start = int(gather(np.asarray([len(texts)]))[: policy.rank].sum())
    part_of = members(parts, failed, group_ids)[:, start : start + len(texts)]
    failures = counted_failures(rewards, calls.failures, part_of)
    report(rewards, failures, asked_prompts, answers)
    if np.isnan(total).all():
        agree(policy, no_score(failures, asked_prompts, len(total)), RewardError)
    errors = {
        name: {kind: int(gather(np.asarray([count])).sum()) for kind, count in counts.items()}
        for name, counts in count_errors(failures).items()
    }
    return Scores(total, dict(zip(calls.parts, parts, strict=True)), errors, calls.seconds)


def completion_ids(batch: Batch) -> list[list[int]]:
    """Returns the token ids of each response as reward functions get them: those of all segments, concatenated."""
    later = batch.later or [()] * len(batch)
    return [
        [*tokens, *(token for segment in segments for token in segment.response)]
        for tokens, segments in zip(batch.responses, later, strict=True)
    ]


def _turns_of(policy: Policy, sampler: Sampler | None) -> Draw:
    """Returns the function that draws the turns of episodes."""
    if sampler is None:
        return lambda conversations, tokens, seeds, sampling: policy.generate(tokens, seeds, sampling)
    return lambda conversations, tokens, seeds, sampling: draw_elsewhere(
        policy, sampler, conversations, tokens, seeds, sampling, all_lost=True
    )[0]


def exact_tokens(response: Response, ids: Tokens | None) -> dict[str, Any]:
    """Fields of completions.jsonl beside the text: the response's `odd_ids`, its mask and its later segments."""
    exact = _mask(response.mask) | ({} if ids is None else {"response_ids": ids})
    segments = [{"prompt_ids": s.prompt, "response_ids": s.response} | _mask(s.mask) for s in response.later]
    return exact | ({"response_segments": segments} if segments else {})


def _mask(mask: Mask | None) -> dict[str, list[int]]:
    return {} if mask is None else {"response_mask": [int(flag) for flag in mask]}


def odd_ids(policy: Policy, prompt: Prompt, responses: Sequence[Response], texts: Sequence[str]) -> list[Tokens | None]:
    """Returns the token ids of each response that its text does not reproduce, else None; see `encode_responses`."""
    if any(r.mask is not None or r.later or isinstance(r, Episode) for r in responses):
        return [response.tokens for response in responses]
    try:
        encoded = policy.encode_responses(prompt, texts, [r.finished for r in responses])
        return [None if a == r else r.tokens for a, r in zip(encoded, responses, strict=True)]
    except (ResponseError, AttributeError):  # one of them fails, or the policy reads no recorded responses
        if len(responses) == 1 or not hasattr(policy, "encode_responses"):
            return [r.tokens for r in responses]
    return [odd_ids(policy, prompt, [r], [text])[0] for r, text in zip(responses, texts, strict=True)]


def plain_prompt(prompt: Any) -> str:
    """Returns a prompt as readable text, with each chat message on a new line."""
    return prompt if isinstance(prompt, str) else "\n".join(f"{m['role']}: {m.get('content', '')}" for m in prompt)
