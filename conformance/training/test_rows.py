"""Rows: every source that people hand over is read, or refused in one line that names it."""

import datetime
import decimal
import itertools
import json
import time

import numpy as np
import pytest

from gvpo_core.training.files import hub
from gvpo_core.training.rows import DataError, load_rows

pytestmark = pytest.mark.core

ROWS = [{"prompt": "one", "answer": 1}, {"prompt": "two", "answer": 2}]
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"


def refused(source, name="train_rows"):
    with pytest.raises(DataError) as raised:
        load_rows(source, name)
    message = str(raised.value)
    assert name in message and "\n" not in message
    return message


def test_rows_from_jsonl_and_iterables(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('\ufeff{"prompt": "é one"}\n\n{"prompt": "two\u2028", "answer": 3}\n', encoding="utf-8")
    assert load_rows(file) == [{"prompt": "é one"}, {"prompt": "two\u2028", "answer": 3}]
    assert load_rows(iter(ROWS)) == ROWS
    assert load_rows(row for row in ROWS) == ROWS
    assert load_rows(tuple(ROWS)) == ROWS


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.jsonl", "", "has no rows; expected at least one prompt"),
        ("bad.jsonl", '{"prompt": "a"}\n{oops}\n', r"bad.jsonl:2: not JSON"),
        (
            "twice.jsonl",
            '{"answer": 1, "prompt": "a", "answer": 2}\n',
            r"twice.jsonl:1: .*the key 'answer' is there twice",
        ),
        ("inner.jsonl", '{"prompt": [{"role": "user", "role": "x"}]}\n', r":1: .*the key 'role' is there twice"),
        ("list.jsonl", "[1]\n", r"list.jsonl:1: a list; expected a JSON object"),
        ("data.csv", "prompt\n", "expected .jsonl, .json, .parquet or a folder"),
        ("data.jsonl", POINTER, "data.jsonl is a Git LFS pointer, not the file itself: run `git lfs pull` in "),
        ("data.parquet", POINTER, "data.parquet is a Git LFS pointer"),
        ("data.parquet", "PAR1", "is not a Parquet file"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, name, content, message):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message) as raised:
        load_rows(tmp_path / name, "data.train")
    assert "\n" not in str(raised.value)


def test_an_array_of_objects_is_rows_and_endings_have_any_case(tmp_path):
    rows = [{"prompt": "a"}, {"prompt": "b", "answer": [1]}]
    for name, text in (
        ("x.json", json.dumps(rows)),
        ("y.JSON", json.dumps(rows, indent=1)),
        ("z.JSONL", '{"prompt": 1}\n'),
    ):
        (tmp_path / name).write_text(text)
        assert load_rows(tmp_path / name) == (rows if name < "z" else [{"prompt": 1}])
    (tmp_path / "empty.json").write_text("[]")
    with pytest.raises(DataError, match="has no rows"):
        load_rows(tmp_path / "empty.json")


def test_missing_and_binary_files(tmp_path):
    with pytest.raises(DataError, match=r"data.train = .*nowhere.jsonl': there is no such file"):
        load_rows(tmp_path / "nowhere.jsonl", "data.train")
    (tmp_path / "b.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="not UTF-8"):
        load_rows(tmp_path / "b.jsonl")
    with pytest.raises(DataError, match="has no rows"):
        load_rows([])


def test_sources_of_datasets(tmp_path):
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    made = datasets.Dataset.from_list(ROWS)
    made.to_parquet(tmp_path / "a.parquet")
    made.save_to_disk(tmp_path / "saved")
    assert load_rows(tmp_path / "a.parquet") == ROWS
    assert load_rows(tmp_path / "saved") == ROWS
    for form in (None, "numpy", "pandas", "arrow"):
        assert load_rows(made.with_format(form)) == ROWS
    assert load_rows(made.to_iterable_dataset()) == ROWS
    both = datasets.DatasetDict(train=made, test=made)
    assert "is a DatasetDict with the splits train, test; name one of them: data.split" in refused(both)
    assert load_rows(both, split="test") == load_rows(both["test"])
    with pytest.raises(DataError, match="splits train, test; none of them is named 'dev'"):
        load_rows(both, split="dev")
    streams = datasets.IterableDatasetDict(train=made.to_iterable_dataset())
    assert load_rows(streams) == ROWS  # the only split
    both.save_to_disk(tmp_path / "split")
    assert "is a folder with the splits train, test; name one of them" in refused(tmp_path / "split")
    assert "train, test; name one of them: data.evaluation_split" in refused(tmp_path / "split", "data.evaluation")
    assert "train, test; name one of them: --split" in refused(tmp_path / "split", "the data")
    assert "train, test; name one of them: --held-out-split" in refused(tmp_path / "split", "the held-out data")
    assert "train, test; give the folder or file of one of them" in refused(tmp_path / "split", "data.recorded")
    assert load_rows(tmp_path / "split" / "train", "data.recorded") == ROWS
    assert load_rows(tmp_path / "split", split="train") == ROWS
    (arrow,) = (tmp_path / "saved").glob("*.arrow")
    arrow.write_text(POINTER)
    assert "is a Git LFS pointer" in refused(tmp_path / "saved")
    arrow.write_bytes(b"no arrow file")
    assert "is not a dataset saved with save_to_disk" in refused(tmp_path / "saved")


def test_pandas_frames_give_pythons_own_values():
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    chat = [{"role": "user", "content": "hi"}]
    frame = pandas.DataFrame(
        {
            "prompt": ["one", np.array(chat)],
            "answer": [1.5, None],
            "n": [1, 2],
            "kind": pandas.Categorical(["a", None]),
            "many": [np.array([1, 2]), None],
        }
    )
    rows = load_rows(frame)
    assert rows == [
        {"prompt": "one", "answer": 1.5, "n": 1, "kind": "a", "many": [1, 2]},
        {"prompt": chat, "answer": None, "n": 2, "kind": None, "many": None},
    ]
    assert {type(row["n"]) for row in rows} == {int}
    frame.columns = ["prompt", "a", "a", "kind", "many"]
    assert "has 2 columns named 'a'; rename them" in refused(frame)
    assert "has no rows" in refused(frame.iloc[:0, :1])


def test_polars_frames_and_arrow_tables():
    polars = pytest.importorskip("polars", reason="polars is not installed")
    chat = [{"role": "user", "content": "hi"}]
    frame = polars.DataFrame({"prompt": [chat, chat], "answer": [1, None]})
    assert load_rows(frame) == [{"prompt": chat, "answer": 1}, {"prompt": chat, "answer": None}]
    assert "is a LazyFrame, whose rows are not computed yet; pass LazyFrame.collect()" in refused(frame.lazy())


def test_arrow_tables_name_the_column_that_python_cannot_hold(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    from pyarrow import parquet

    day, cost = datetime.date(2026, 2, 28), decimal.Decimal("1.50")
    table = pyarrow.table({"prompt": ["a"], "day": [day], "cost": [cost]})
    assert load_rows(table) == [{"prompt": "a", "day": day, "cost": cost}]
    late = pyarrow.array([3_000_000], pyarrow.date32())  # after the year 9999
    far = table.append_column("far", late)
    parquet.write_table(far, tmp_path / "far.parquet")
    for source in (far, tmp_path / "far.parquet"):
        assert "column 'far' of date32[day] cannot be read: " in refused(source)


class OnLines:
    """What shows itself on several lines, as a table of pyarrow does."""

    def __repr__(self) -> str:
        return "two\nlines  of\nits own"


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (
            {"prompt": ["a", "b"], "answer": [1, 2, 3]},
            "a mapping of columns of different lengths ('prompt' 2, 'answer'",
        ),
        ({"prompt": ["a", "b"], "answer": 1}, "'answer' is not a list"),
        ({"prompt": "a"}, "is one mapping (dict with prompt); expected rows, a list of mappings, or columns"),
        ({}, "is one mapping (dict with no keys)"),
        (["a", "b"], "row 0 is a str ('a'); expected a mapping"),
        ([[{"role": "user", "content": "a"}]], "row 0 is a list"),
        ([*ROWS, None], "row 2 is a NoneType"),
        (3, "is a int; expected a path, or rows: a list of mappings"),
        (b"bytes", "row 0 is a int"),
        (dict, "is the class dict; expected rows"),
        ([OnLines()], "row 0 is a OnLines (two lines of its own); expected a mapping"),
        ([{"prompt": "a", 3: "b"}], "row 0 has a column named 3 (int); expected text"),
    ],
    ids=str,
)
def test_what_is_not_rows_is_refused_by_name(source, said):
    assert said in refused(source)


def test_a_stream_without_end_is_refused_and_a_long_one_is_read_up_to_its_end():
    assert "is a cycle of unknown length, perhaps endless" in refused(itertools.cycle(ROWS))
    assert "is a generator of unknown length" in refused({"prompt": str(i)} for i in itertools.count())
    assert len(load_rows({"prompt": str(i)} for i in range(20_000))) == 20_000
    assert len(load_rows([{"prompt": str(i)} for i in range(30_000)])) == 30_000

    class Indexed:  # a dataset of torch: its length is known, and indexing it never ends
        def __len__(self):
            return 3

        def __getitem__(self, i):
            return {"prompt": str(i)}

    assert load_rows(Indexed()) == [{"prompt": str(i)} for i in range(3)]


def test_an_endless_stream_of_datasets_is_refused():
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")

    def endless():
        while True:
            yield from ROWS

    assert "IterableDataset of unknown length" in refused(datasets.IterableDataset.from_generator(endless))


def test_columns_are_rows():
    assert load_rows({"prompt": ["one", "two"], "answer": [1, 2]}) == ROWS
    assert load_rows({"prompt": np.array(["one", "two"]), "answer": (1, 2)}) == ROWS


@pytest.mark.parametrize("name", ["openai/gsm8k", "hf://openai/gsm8k", "hf://datasets/openai/gsm8k"])
def test_a_hub_name_is_asked_for_with_its_subset_and_split(name, monkeypatch):
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    asked = []

    def load_dataset(path, subset=None, *, split=None, data_files=None):
        asked.append((path, subset, split, data_files))
        made = datasets.Dataset.from_list(ROWS)
        return made if split else datasets.DatasetDict(train=made, test=made)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(hub, "unreachable_for", lambda name, kind: "")
    assert load_rows(name, split="train", subset="main") == ROWS
    assert "with the splits train, test; name one of them: data.split" in refused(name)
    assert load_rows("hf://datasets/me/mine/deep/rows.jsonl") == ROWS
    assert asked == [
        ("openai/gsm8k", "main", "train", None),
        ("openai/gsm8k", None, None, None),
        ("json", None, "train", "hf://datasets/me/mine/deep/rows.jsonl"),
    ]


@pytest.mark.parametrize("name", ["data/v1..2", "hf://data/rows.git", "runs/-first"])
def test_an_impossible_dataset_name_is_not_an_unreachable_hub(name):
    pytest.importorskip("datasets", reason="datasets is not installed")
    said = refused(name)
    assert "no such file or folder here, and not a valid name of the hub" in said and "reached" not in said


@pytest.mark.parametrize("name", ["models--a", "me/model.git", "me/a..b"])
def test_an_impossible_model_name_is_not_a_failed_download(name):
    pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    from gvpo_core.training.config import ConfigError, ModelConfig
    from gvpo_core.training.policy.hugging_face import local_folder

    with pytest.raises(ConfigError, match="no such folder here, and not a valid name of the hub"):
        local_folder(ModelConfig(path=name))


@pytest.mark.parametrize("name", ["nobody/nothing-of-this-name", "hf://nobody/nothing/rows.parquet"])
def test_a_hub_that_does_not_answer_is_not_waited_for(name, monkeypatch, caplog):
    """`datasets` asks six times, with waits of 23 s in all and a line on standard error each."""
    pytest.importorskip("datasets", reason="datasets is not installed")
    from huggingface_hub import HfApi, constants

    asked = []

    def dataset_info(self, name, **options):
        asked.append(name)
        raise OSError("no route to host")

    monkeypatch.setattr(HfApi, "dataset_info", dataset_info)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    assert "the hub cannot be reached: OSError: no route to host" in refused(name)
    assert asked and not waits
    assert not constants.HF_HUB_OFFLINE, "the setting is put back"


def test_a_hub_name_that_cannot_be_reached_is_one_line(monkeypatch, tmp_path):
    pytest.importorskip("datasets", reason="datasets is not installed")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    said = refused("nobody/nothing-of-this-name")
    assert "is not a file here and cannot be read from the hub as a dataset (" in said
    assert "names no dataset; expected owner/name" in refused("hf://gsm8k")
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "name").write_text("")
    monkeypatch.chdir(tmp_path)
    assert "expected .jsonl, .json, .parquet" in refused("owner/name"), "what is here comes first"
