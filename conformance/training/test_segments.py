"""Episodes whose chat template rewrites history: played, written, read back, replayed and dealt over ranks, exactly."""

import json
from dataclasses import replace

import numpy as np
import pytest
import toy_run
from places import SUPPORT
from ranks import RankedTable, run_ranks
from scripted_policy import ChatCharacters, ScriptedPolicy
from toy_run import records

from gvpo_core.training import cli, dealing
from gvpo_core.training.config import Config, ConfigError, EnvironmentConfig, OptimizerConfig, ReplayConfig
from gvpo_core.training.data import DataError, Prompts
from gvpo_core.training.policy import Batch, Response, Segment
from gvpo_core.training.policy import load as loading
from gvpo_core.training.policy.table import TablePolicy
from gvpo_core.training.recorded import Group
from gvpo_core.training.sources.replay import Buffer, Past

pytestmark = pytest.mark.core

GAMES = str(SUPPORT / "episode_games.py")
ROWS = [{"secret": 3}, {"secret": 7}]


class DropsThoughts(ChatCharacters):
    """Renders earlier turns of the assistant without what they say before a tilde."""

    def apply_chat_template(self, messages, **options):
        shown = [m | {"content": m["content"].rpartition("~")[2]} if m["role"] == "assistant" else m for m in messages]
        return super().apply_chat_template(shown, **options)


class Thinking(ScriptedPolicy):
    """Remembers every turn: what it saw, and what it drew."""

    def __init__(self, script, **options) -> None:
        super().__init__(script, **options)
        self.turns, self.batches = set(), []

    def _read_tokenizer(self) -> None:
        super()._read_tokenizer()
        self.tokenizer = DropsThoughts()

    def _generate(self, prompts, seeds, sampling):
        drawn = super()._generate(prompts, seeds, sampling)
        self.turns |= {(tuple(p), r.tokens) for p, many in zip(prompts, drawn, strict=True) for r in many}
        return drawn

    def update(self, batch, *given, **options):
        self.batches.append(batch)
        return super().update(batch, *given, **options)


def think(text: str, u: float) -> str:
    """Thinks in most turns, then says a number; the right one only without a thought, as the game reads all of it."""
    last = text.rpartition("<user>")[2]
    number = ("3" if u < 0.3 else "2") if "lower" in last else ("7" if u < 0.3 else "6") if "higher" in last else "5"
    return number if u > 0.8 or u < 0.2 else f"so {round(9 * u)}~{number}"


def config_of(folder, *, steps: int = 2, max_tokens: int = 60, **environment) -> Config:
    config = toy_run.config_of(folder, "scripted", steps, rollout={"max_tokens": max_tokens})
    given = {"path": f"{GAMES}:Guess", "max_turns": 3, "workers": 1, "timeout": 5.0, "memory": 0.0} | environment
    return replace(config, environment=EnvironmentConfig(**given))


def run(config: Config, rows=ROWS) -> Thinking:
    policy = Thinking(think, updates=config.updates)
    toy_run.run(config, rows, policy)
    return policy


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    folder = tmp_path_factory.mktemp("played")
    return run(config_of(folder / "run")), folder / "run"


def turns_of(batch: Batch, i: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """What the policy saw and what it said then, by the tokens and masks of all segments of row `i`."""
    found = []
    rows = [(batch.prompts[i], batch.responses[i], (batch.masks or [None] * len(batch))[i])]
    rows += [(s.prompt, s.response, s.mask) for s in batch.later[i]]
    for prompt, response, own in rows:
        edges = np.flatnonzero(np.diff([0, *(own or (True,) * len(response)), 0]))
        found += [((*prompt, *response[:a]), response[a:b]) for a, b in zip(edges[::2], edges[1::2], strict=True)]
    return found


def test_every_turn_is_scored_once_in_the_context_that_it_was_drawn_in(played) -> None:
    policy, folder = played
    seen = [turn for batch in policy.batches for i in range(len(batch)) for turn in turns_of(batch, i)]
    assert {*seen} == policy.turns and len(policy.turns) > 10
    written = records(folder, "completions")
    assert len(seen) == sum(c["turns"] for c in written)
    counts = [1 + len(segments) for segments in policy.batches[0].later]
    assert {1, 2, 3} <= {*counts}, "episodes of one, two and three segments beside each other"
    for i, c in enumerate(written[:8]):
        said = [m["content"] for m in c["episode"] if m["role"] == "assistant"]
        assert counts[i] == 1 + sum("~" in words for words in said[:-1]), "one more after each turn with a thought"
        turns = turns_of(policy.batches[0], i)
        assert [policy.decode(tokens) for _, tokens in turns] == said
        assert c["tokens"] == sum(len(tokens) for _, tokens in turns)
        contexts = [policy.tokenizer.decode(context) for context, _ in turns]
        assert all("~" not in context for context in contexts), "no turn saw an earlier thought"
    first = records(folder)[0]
    assert first["episodes/segments"] == pytest.approx(np.mean(counts))
    assert first["length/mean"] == pytest.approx(np.mean([c["tokens"] for c in written[:8]]))
    assert first["kl"] == pytest.approx(0, abs=1e-9) and abs(records(folder)[1]["kl"]) > 1e-6
    assert "assistant: so " in written[0]["response"] + written[1]["response"], "reports show the conversation"


def test_the_policy_s_sums_are_those_of_all_turns(played) -> None:
    fresh, batch = Thinking(think), played[0].batches[0]
    logs = fresh.weights - np.log(np.exp(fresh.weights).sum(1, keepdims=True))
    right = [
        sum(
            logs[a, b]
            for context, drawn in turns_of(batch, i)
            for a, b in zip((context[-1], *drawn), drawn, strict=False)
        )
        for i in range(len(batch))
    ]
    np.testing.assert_allclose(fresh.logprobs(batch), right, rtol=1e-12)


def test_a_resumed_run_and_one_fed_from_the_record_take_the_same_steps(played, tmp_path) -> None:
    policy, folder = played
    run(config_of(tmp_path / "parts", steps=1))
    resumed = run(config_of(tmp_path / "parts"))
    np.testing.assert_array_equal(resumed.weights, policy.weights)
    fed = toy_run.config_of(
        tmp_path / "fed", "scripted", rollout={"max_tokens": 60}, data={"train": str(folder / "completions.jsonl")}
    )
    again = run(fed, None)
    assert again.batches[0].later == policy.batches[0].later and again.turns == set()
    np.testing.assert_array_equal(again.weights, policy.weights)
    copied = replace(fed, run=replace(fed.run, folder=str(tmp_path / "again")))
    copied = replace(copied, data=replace(copied.data, train=str(tmp_path / "fed/completions.jsonl")))
    np.testing.assert_array_equal(run(copied, None).weights, policy.weights)


def test_the_limit_is_on_what_the_policy_sees(tmp_path) -> None:
    policy = run(config_of(tmp_path / "run", max_turns=8, max_tokens=48, steps=1))
    prompt = policy.batches[0].prompts[0]
    written = records(tmp_path / "run", "completions")
    cut = [c for c in written if c["end"] == "tokens"]
    assert cut
    assert max(len(context) + len(drawn) for context, drawn in policy.turns) <= len(prompt) + 48
    run(config_of(tmp_path / "kept", max_turns=8, max_tokens=48, steps=1, history="keep"))
    more, fewer = (np.mean([c["turns"] for c in records(tmp_path / name, "completions")]) for name in ("run", "kept"))
    assert more > fewer, "thoughts that are dropped leave room"


@pytest.mark.slow
def test_turns_are_kept_as_seen_or_the_run_stops_where_asked(tmp_path) -> None:
    kept = run(config_of(tmp_path / "kept", history="keep", max_tokens=100))
    assert kept.batches[0].later is None and records(tmp_path / "kept")[0]["episodes/segments"] == 1
    assert any("~" in kept.tokenizer.decode(context) for context, _ in kept.turns)
    with pytest.raises(ConfigError, match=r"set environment\.history = 'segments'"):
        run(config_of(tmp_path / "error", history="error"))


def test_a_template_that_keeps_history_is_not_changed_by_the_setting(tmp_path) -> None:
    found = []
    for history in ("segments", "error"):
        policy = ScriptedPolicy(think, updates=2)
        toy_run.run(config_of(tmp_path / history, history=history), ROWS, policy)
        found.append(policy.weights)
        assert records(tmp_path / history)[0]["episodes/segments"] == 1
    np.testing.assert_array_equal(*found)


# -- records, replay, ranks


LATER = [
    [{"prompt_ids": [2, 1, 5], "response_ids": [3, 9, 7, 0], "response_mask": [1, 0, 1, 1]}],
    None,
    [{"prompt_ids": [2, 1], "response_ids": [4, 0]}, {"prompt_ids": [2], "response_ids": [4, 0]}],
]


def recorded(**changes) -> list[dict]:
    row = {"prompt": "ab", "responses": [[5, 0], [8, 0], [5, 1, 0]], "rewards": [1.0, 0.0, 0.5]}
    return [row | {"response_segments": LATER} | changes]


@pytest.fixture
def model(tmp_path):
    return toy_run.write_model(tmp_path / "model")


def test_segments_of_recorded_groups_are_trained_on(tmp_path, model) -> None:
    cache = {"reference_cache": str(tmp_path / "cache")}
    results = {}
    for name, segments in {"with": LATER, "without": None, "again": LATER}.items():
        config = toy_run.config_of(tmp_path / name, model, data=cache)
        results[name] = toy_run.run(config, recorded(response_segments=segments))
    np.testing.assert_array_equal(results["with"].weights, results["again"].weights)
    assert np.abs(results["with"].weights - results["without"].weights).max() > 1e-3
    scored = [records(tmp_path / name)[0]["machine/reference_scored"] for name in results]
    assert scored == [6, 6, 0], "reference scores are those of all segments"
    assert records(tmp_path / "with")[0]["length/mean"] == pytest.approx((2 + 3 + 2 + 3 + 2 + 2) / 3)
    [line, *_] = records(tmp_path / "with", "completions")
    assert line["response_segments"] == LATER[0]


WRONG = {
    "row 0 has 3 responses and 1 response_segments; expected equal numbers": {"response_segments": [None]},
    "entry 0 is {'prompt_ids': [1]}; expected {'prompt_ids': [...], 'response_ids': [...]}": {
        "response_segments": [[{"prompt_ids": [1]}], None, None]
    },
    "response 1 holds 99, which is not a token id of the model (0 to 26)": {
        "response_segments": [None, [{"prompt_ids": [99], "response_ids": [0]}], None]
    },
    "response 0 cannot be used: its segment 1: it has the end token 0 before its end": {
        "response_segments": [[{"prompt_ids": [1], "response_ids": [0, 4]}], None, None]
    },
    "response 1 cannot be used: its segment 1: finished is true, and its last token 4 is no end token": {
        "response_segments": [None, [{"prompt_ids": [1], "response_ids": [4]}], None],
        "finished": [True, True, True],
    },
    "its mask has 1 entries for 2 tokens": {
        "response_segments": [[{"prompt_ids": [1], "response_ids": [4, 0], "response_mask": [1]}], None, None]
    },
    "response 0 is a text with later segments of token ids": {"responses": ["a", [8, 0], [5, 0]]},
    "response 2 has 13 tokens, more than rollout.max_tokens = 12": {
        "response_segments": [None, None, [{"prompt_ids": [1] * 13, "response_ids": [4, 0]}]]
    },
}


@pytest.mark.parametrize("message", WRONG)
def test_segments_that_cannot_be_used_are_named(message: str, tmp_path, model) -> None:
    with pytest.raises(DataError) as error:
        toy_run.run(toy_run.config_of(tmp_path / "run", model), recorded(**WRONG[message]))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_replayed_episodes_keep_their_segments_and_a_resumed_run_repeats(tmp_path) -> None:
    replay = ReplayConfig(groups=8, share=0.5)
    whole = run(replace(config_of(tmp_path / "whole", steps=3), replay=replay))
    assert records(tmp_path / "whole")[-1]["groups/replayed"] == 1
    last = whole.batches[-1]
    before = {(batch.responses[i], tuple(batch.later[i])) for batch in whole.batches[:-1] for i in range(len(batch))}
    again = [i for i in range(len(last)) if (last.responses[i], tuple(last.later[i])) in before and last.later[i]]
    assert again, "episodes of several segments came back"
    run(replace(config_of(tmp_path / "parts", steps=2), replay=replay))
    resumed = run(replace(config_of(tmp_path / "parts", steps=3), replay=replay))
    np.testing.assert_array_equal(resumed.weights, whole.weights)


def test_replayed_groups_keep_their_segments_over_a_checkpoint() -> None:
    later = (Segment((2, 1), (3, 0), (True, False)), Segment((4,), (5, 0)))
    group = Group((1,), (Response((7, 0), True, later=later), Response((8, 0), True)), np.asarray([1.0, 0.0]))
    buffer = Buffer(ReplayConfig(groups=4), 0)
    buffer.past = [Past(3, 0, group)]
    state = json.loads(json.dumps(buffer.state()))

    buffer.restore(state, Prompts(["x"], [(1,)], [{}]))
    assert buffer.past[0].group.responses == group.responses


def everyone() -> Batch:
    """Two groups of a table of three prompts: some responses have later segments, whose prompts are others."""
    segments = [
        (),
        (Segment((1,), (2, 0)),),
        (Segment((1,), (1, 0)), Segment((2,), (3, 0))),
        (),
        (Segment((2,), (1, 0)),),
        (),
    ]
    return Batch([(0,)] * 3 + [(1,)] * 3, [(1, 0), (2, 0), (3, 0)] * 2, [0] * 3 + [1] * 3, later=segments)


TABLE = {p: {"a": 0.2, "b": 0.3, "c": 0.5} for p in "xyz"}


def test_a_table_steps_along_the_sums_of_segments() -> None:
    policy, batch = TablePolicy(TABLE), everyone()
    log_pi, c = np.log([0.2, 0.3, 0.5]), np.asarray([0.3, -0.5, 0.2, 0.7, -0.4, -0.3])
    cells = [[(0, 0)], [(0, 1), (1, 1)], [(0, 2), (1, 0), (2, 2)], [(1, 0)], [(1, 1), (2, 0)], [(1, 2)]]
    right = [sum(log_pi[y] for _, y in of_one) for of_one in cells]
    np.testing.assert_allclose(policy.logprobs(batch), right, rtol=1e-12)
    gradient = np.zeros((3, 3))
    for factor, of_one in zip(c, cells, strict=True):
        for x, y in of_one:
            gradient[x] += factor * np.asarray([0.2, 0.3, 0.5])
            gradient[x, y] -= factor
    before = policy.logits.copy()
    update = policy.update(batch, lambda logprobs, rows: c)
    moved = policy.logits - before
    np.testing.assert_allclose(moved / np.abs(moved).max(), -gradient / np.abs(gradient).max(), atol=1e-12)
    np.testing.assert_allclose(update.logprobs, right, rtol=1e-12)


class Rows:
    """What `deal` reads of a rollout."""

    def __init__(self, batch: Batch, start: int, group_ids: np.ndarray) -> None:
        self.batch, self.start, self.group_ids = batch, start, group_ids


@pytest.mark.parametrize("by_group", [False, True])
def test_segments_move_to_the_rank_of_their_group(by_group: bool) -> None:
    whole, found = everyone(), {}

    def work(policy: RankedTable) -> None:
        policy.by_group = by_group
        start, stop = ((0, 4), (4, 6))[policy.rank]
        rows = Rows(whole.take(list(range(start, stop))), start, np.asarray(whole.groups))
        found[policy.rank] = dealing.deal(policy, rows, np.ones(6, bool), [np.arange(2)])

    run_ranks(2, work, TABLE, OptimizerConfig())
    assert sorted(i for of in found.values() for i in of.rows) == list(range(6))
    for of in found.values():
        assert [of.batch.later[n] for n in range(len(of.rows))] == [whole.later[i] for i in of.rows]
        assert by_group is False or len({*of.batch.groups}) == 1


def test_a_later_segment_counts_with_its_prompt_where_work_is_dealt() -> None:
    segments = [(Segment((1,) * 7, (2,) * 5),), ()]
    batch = Batch([(0,)] * 2, [(1, 0), (1, 2, 0)], [0, 1], later=segments)
    for packed in (False, True):
        assert dealing.added_tokens(batch, packed).tolist() == [2 + 7 + 5, 3]


def test_collected_episodes_keep_segments_and_the_tokens_of_prompts(tmp_path, monkeypatch) -> None:
    policies = []

    def load(config):
        policies.append(Thinking(think, updates=2))
        return policies[-1]

    monkeypatch.setattr(loading, "load_policy", load)
    config = tmp_path / "config.toml"
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    config.write_text(f"""
[run]
folder = "{tmp_path}/run"
backend = "table"
steps = 1
[model]
path = "{tmp_path}"
[data]
train = "{tmp_path}/rows.jsonl"
shuffle = false
[rollout]
prompts = 2
responses = 4
max_tokens = 400
[environment]
path = "{GAMES}:Guess"
tools = ["{GAMES}:add"]
max_turns = 3
workers = 1
memory = 0.0
""")
    assert cli.main(["collect", str(config), str(tmp_path / "groups.jsonl")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "groups.jsonl").read_text().splitlines()]
    assert all(row["prompt_ids"] for row in rows) and any(any(row["response_segments"]) for row in rows)
    fed = toy_run.config_of(
        tmp_path / "fed", "scripted", 1, rollout={"max_tokens": 400}, data={"train": str(tmp_path / "groups.jsonl")}
    )
    again = run(fed, None)
    seen = {turn for i in range(8) for turn in turns_of(again.batches[0], i)}
    assert seen == policies[0].turns, "what was scored is what was seen and drawn"
