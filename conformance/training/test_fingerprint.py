"""What a run remembers of its data is the same in every process, and another for other data."""

import collections
import datetime as dt
import fractions
import json
import uuid

import numpy as np
import pytest
import table_run

from gvpo_core.training import cli
from gvpo_core.training import fingerprint as module
from gvpo_core.training.config import ModelConfig, RewardConfig
from gvpo_core.training.fingerprint import changes, fingerprint, model_fingerprint, reward_fingerprints

pytestmark = pytest.mark.core


def test_a_fingerprint_is_of_the_values_in_order():
    rows = [{"prompt": "a", "answer": 1}, {"prompt": "b", "answer": None}]
    known = fingerprint(rows)
    assert known["rows"] == 2 and fingerprint([dict(reversed(row.items())) for row in rows]) == known
    others = [rows[::-1], rows[:1], [rows[0], rows[1] | {"answer": 0}], [*rows, rows[0]], [rows[0] | {"x": 1}, rows[1]]]
    assert len({known["sha256"], *(fingerprint(other)["sha256"] for other in others)}) == 6
    arrays, objects = ([{"prompt": "a", "x": value}] for value in (np.arange(3), object()))
    assert fingerprint(arrays) == fingerprint([{"prompt": "a", "x": [0, 1, 2]}])
    assert fingerprint(objects) == fingerprint([{"prompt": "a", "x": object()}])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({1, 2}, {1, 3}), (fractions.Fraction(1, 3), fractions.Fraction(2, 3)), (1j, 2j), (range(3), range(4)),
        (dt.timedelta(1), dt.timedelta(2)), (uuid.UUID(int=1), uuid.UUID(int=2)), ({(0, 1): "a"}, {(0, 1): "b"}),
        ({"x": {(0, 1): "a"}}, {"x": {(0, 2): "a"}}), ([{None: 1}], [{None: 2}]), (bytearray(b"a"), bytearray(b"b")),
        (collections.deque([1]), collections.deque([2])),
    ],
    ids=repr,
)  # fmt: skip
def test_every_value_that_a_reward_can_get_counts(one, other):
    a, b = (fingerprint([{"prompt": "p", "x": value}]) for value in (one, other))
    assert a == fingerprint([{"x": one, "prompt": "p"}]) != b
    up, down = set([0, 8]), set([8, 0])  # noqa: C405 - equal, and of another order inside
    assert list(up) != list(down) and fingerprint([{"x": up}]) == fingerprint([{"x": down}])


def test_a_models_fingerprint_is_of_its_files_wherever_they_lie(tmp_path):
    names = ("config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja", "notes.txt")

    def written(folder, **changed):
        (tmp_path / folder).mkdir()
        for name in names:
            (tmp_path / folder / name).write_text(changed.get(name.partition(".")[0], "same"))
        return model_fingerprint(ModelConfig(path=str(tmp_path / folder)))

    known = written("a")
    assert known.keys() == {"weights", "tokenizer"} and written("b") == written("c", notes="other") == known
    for name in ("config", "model"):
        other = written(f"other-{name}", **{name: "othr"})
        assert other["weights"] != known["weights"] and other["tokenizer"] == known["tokenizer"]
    for name in ("tokenizer", "chat_template"):
        other = written(f"other-{name}", **{name: "othr"})
        assert other["weights"] == known["weights"] and other["tokenizer"] != known["tokenizer"]
    assert model_fingerprint(ModelConfig()) == model_fingerprint(ModelConfig(path="nobody/nothing")) == {}


def test_of_a_large_file_size_and_pieces_count(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_WHOLE", 1000)
    monkeypatch.setattr(module, "_PIECE", 64)
    path, config = tmp_path / "model.safetensors", ModelConfig(path=str(tmp_path))
    rng = np.random.default_rng(0)
    content = bytearray(rng.bytes(5000))
    path.write_bytes(content)
    known = model_fingerprint(config)
    for change in (0, 4999):  # its first and its last byte
        other = content.copy()
        other[change] ^= 1
        path.write_bytes(other)
        assert model_fingerprint(config) != known
    path.write_bytes(content + b"x")
    assert model_fingerprint(config) != known
    path.write_bytes(rng.bytes(5000))  # trained on: all of it is another
    assert model_fingerprint(config) != known


def test_a_rewards_fingerprint_is_of_its_own_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("def f(completions): return [1.0]")
    rewards = {"file": "mine.py:f", "module": "mine:f", "built": "exact_match", "lost": "nowhere.py:f", "std": "json:x"}
    rewards = {name: RewardConfig(function=function) for name, function in rewards.items()}
    known = reward_fingerprints(rewards)
    assert known.keys() == {"file", "module", "built", "std"} and known["file"] == known["module"] != known["built"]
    (tmp_path / "mine.py").write_text("def f(completions): return [2.0]")
    new = reward_fingerprints(rewards)
    assert {name for name in known if known[name] != new[name]} == {"file", "module"}
    one = lambda completions: [1.0]
    two = lambda completions: [2.0]  # of another line: the source of a function is that of its lines
    given = [reward_fingerprints({"g": RewardConfig(function="given in Python")}, {"g": f}) for f in (one, one, two)]
    assert given[0] == given[1] != given[2] and given[0]["g"]["sha256"]


@pytest.mark.parametrize("changed", ["helper.py", "deep/inner.py", "deep/__init__.py", "near.py"])
def test_what_a_reward_imports_from_its_folder_is_part_of_its_code(changed, tmp_path, monkeypatch):
    folder = tmp_path / "rewards"
    (folder / "deep").mkdir(parents=True)
    sources = {
        "reward.py": "import json, helper\nfrom deep import inner\ndef reward(completions): return []",
        "helper.py": "import near",
        "near.py": "K = 1",
        "deep/__init__.py": "",
        "deep/inner.py": "from . import inner",
        "other.py": "import reward",
    }
    for name, text in sources.items():
        (folder / name).write_text(text)
    config = {"r": RewardConfig(function=f"{folder}/reward.py:reward")}
    before = reward_fingerprints(config)
    (folder / "other.py").write_text("import reward\nK = 2")
    assert reward_fingerprints(config) == before, "nothing imports it"
    (folder / changed).write_text(sources[changed] + "\nL = 2")
    assert reward_fingerprints(config) != before


def test_the_files_and_models_that_a_rewards_options_name_are_part_of_it(tmp_path):
    """A reward model trained further in its folder, or another table of answers, scores otherwise."""
    (tmp_path / "rm").mkdir()
    files = {"answers.json": "{}", "rm/config.json": "{}", "rm/model.safetensors": "1", "rm/tokenizer.json": "{}"}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    options = {"path": str(tmp_path / "rm"), "answers": str(tmp_path / "answers.json"), "n": 3, "mode": "strict"}
    known = reward_fingerprints({"r": RewardConfig(function="reward_model", options=options)})
    for name, text in files.items():
        (tmp_path / name).write_text(text + " ")
        assert reward_fingerprints({"r": RewardConfig(function="reward_model", options=options)}) != known, name
        (tmp_path / name).write_text(text)
    assert reward_fingerprints({"r": RewardConfig(function="reward_model", options=options)}) == known
    long = options | {"template": "Grade the answer. " * 40}  # no name of a file
    assert reward_fingerprints({"r": RewardConfig(function="reward_model", options=long)}) == known


def test_the_versions_of_a_built_in_rewards_library_are_part_of_it(monkeypatch):
    monkeypatch.setattr(module, "version", lambda package: "1")
    one = reward_fingerprints({"m": RewardConfig(function="math_verify"), "e": RewardConfig(function="exact_match")})
    monkeypatch.setattr(module, "version", lambda package: "2" if package == "math-verify" else "1")
    two = reward_fingerprints({"m": RewardConfig(function="math_verify"), "e": RewardConfig(function="exact_match")})
    assert one["m"] != two["m"] and one["e"] == two["e"]


def test_a_built_in_rewards_code_is_all_of_it(monkeypatch):
    read = []
    monkeypatch.setattr(module, "retried", lambda work: read.append(work.__self__.name) or work())
    reward_fingerprints({"r": RewardConfig(function="math_verify")})
    assert {"builtin.py", "math_answers.py"} <= {*read}


def test_what_changed_is_refused_noted_or_unknown():
    old = {"data": {"train": {"rows": 3, "sha256": "a" * 64}}, "model": {"weights": {"sha256": "b" * 64}}, "gvpo": "1"}
    old |= {"policy": {"versions": {"torch": "2.12"}, "device_name": "CPU"}, "rewards": {"r": {"sha256": "c" * 64}}}
    assert changes(old, json.loads(json.dumps(old))) == ([], [])
    new = {"data": {"train": {"rows": 4, "sha256": "d" * 64}}, "model": {"weights": {"sha256": "e" * 64}}, "gvpo": "2"}
    new |= {"policy": {"versions": {"torch": "2.13"}, "device_name": "CPU"}, "rewards": {"r": {"sha256": "f" * 64}}}
    noted, refused = changes(old, new)
    assert refused == [
        "data.train: 3 rows, SHA-256 aaaaaaaaaaaa -> 4 rows, SHA-256 dddddddddddd",
        "model.weights: SHA-256 bbbbbbbbbbbb -> SHA-256 eeeeeeeeeeee",
    ]
    assert noted == ["rewards.r: SHA-256 cccccccccccc -> SHA-256 ffffffffffff", "gvpo: 1 -> 2", "torch: 2.12 -> 2.13"]
    assert changes({"gvpo": "1"}, new) == (["gvpo: 1 -> 2"], [])  # a run of before they were kept


@pytest.mark.parametrize("what", ["model", "reward"])
def test_a_run_refuses_another_model_and_notes_another_reward(what, tmp_path, caplog, capfd):
    """Under LoRA the checkpoint's adapters were put on another base model without a word."""
    pytest.importorskip("tyro", reason="the command line's extra is not installed")
    (tmp_path / "mine.py").write_text("def f(completions): return [float(len(c)) for c in completions]")
    config = table_run.make(tmp_path, steps=2, reward=f'function = "{tmp_path / "mine.py"}:f"')
    config.write_text(config.read_text().replace('"cosine"', '"constant"'))
    assert cli.main(["train", str(config)]) == 0
    if what == "model":
        table = json.loads((tmp_path / "table.json").read_text())
        (tmp_path / "table.json").write_text(json.dumps(table | {"p0": {"a": 0.9, "b": 0.1}}))
        assert cli.main(["train", str(config), "--run.steps", "4"]) == 2
        said = capfd.readouterr().err
        assert (
            "holds a run on other data, on another model or in another dtype" in said
            and "model.weights: SHA-256 " in said
        )
        return
    with (tmp_path / "mine.py").open("a") as code:
        code.write("  # mended")
    assert cli.main(["train", str(config), "--run.steps", "4"]) == 0
    assert "changed since the last start: rewards.right: SHA-256 " in caplog.text
    starts = json.loads((tmp_path / "run" / "environment.json").read_text())["starts"]
    assert [s["step"] for s in starts] == [0, 2] and any("rewards.right: " in x for x in starts[1]["changed"])
