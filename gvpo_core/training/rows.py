"""Reads rows of data from files, `datasets`, DataFrames, and iterables of mappings."""

import json
import os
import re
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from gvpo_core.training.files.disk import refuse_special
from gvpo_core.training.files.hub import HubError, hub_dataset, is_hub_name
from gvpo_core.training.files.lfs import is_pointer, pointer_message
from gvpo_core.training.rewards.worker.reasoning_gym import is_spec, rows_of

Row = Mapping[str, Any]
_LONGEST_STREAM = 20_000  # most rows of an iterable without a length, which may never end
_UNREADABLE = (ArithmeticError, ImportError, LookupError, OSError, TypeError, ValueError)  # pyarrow's are ValueErrors

_SPLITS = {  # how to choose a split, by the name of the data
    "data.recorded": "give the folder or file of one of them, as hf://datasets/owner/name/file.parquet",
    "data.evaluation": "name one of them: data.evaluation_split",
    "evaluation_rows": "name one of them: data.evaluation_split",
    "the data": "name one of them: --split",
    "the held-out data": "name one of them: --held-out-split",
}


class DataError(ValueError):
    """Data that cannot be trained on; the message names the file, the row and the column."""


def load_rows(source: Any, name: str = "data", *, split: str = "", subset: str = "") -> list[Row]:
    """Loads rows of a JSON or Parquet file, a folder saved by `datasets`, a dataset of the hub, or a Python object.

    Args:
      source: a path, the hub's owner/name or reasoning_gym:NAME; or a Dataset, DatasetDict or IterableDataset of
        `datasets`, a DataFrame of pandas or polars, a table of pyarrow, a mapping of columns, or any iterable of
        mappings. Missing values of a DataFrame become None.
      name: name of the data in messages.
      split, subset: which part of a source that has several.
    Raises: DataError: no such file, a line that is not a JSON object (with its number), no rows, a row that is not a
      mapping, or a source that cannot be read as rows: several splits, columns of unequal lengths, an endless stream.
    """
    if is_spec(source):
        try:
            rows: list[Any] = rows_of(source)
        except LookupError as e:
            raise DataError(f"{name}: {e}") from e
    elif isinstance(source, str | Path):
        rows = _from_file(Path(os.path.expanduser(source)), name, split, subset)
    else:
        rows = _from_python(source, name, split)
    if not rows:
        raise DataError(f"{name} = {str(source)[:80]!r} has no rows; expected at least one prompt")
    for i, row in enumerate(rows):
        if not isinstance(row, Mapping):
            shown = " ".join(repr(row).split())  # some objects print on several lines
            raise DataError(
                f'{name} row {i} is a {type(row).__name__} ({shown:.60}); expected a mapping, as {{"prompt": ...}}'
            )
        for column in row:
            if not isinstance(column, str):
                raise DataError(
                    f"{name} row {i} has a column named {column!r} ({type(column).__name__}); expected text"
                )
    return rows


def _from_python(source: Any, name: str, split: str = "") -> list[Any]:
    """Returns the rows of a Python object."""
    kind = type(source).__name__
    if isinstance(source, Mapping):
        if source and all(hasattr(value, "column_names") for value in source.values()):
            return _from_python(_split_of(source, split, f"{name} is a {kind}"), name)
        return _of_columns(source, name)
    if isinstance(source, type):
        raise DataError(f"{name} is the class {source.__name__}; expected rows, or an object of it")
    if hasattr(source, "collect"):
        raise DataError(f"{name} is a {kind}, whose rows are not computed yet; pass {kind}.collect()")
    if hasattr(source, "to_dicts"):  # polars
        return list(source.to_dicts())
    if hasattr(source, "to_pylist"):  # pyarrow
        return _of_table(source, name)
    if hasattr(source, "columns") and hasattr(source, "to_dict"):  # pandas
        _check_unique(list(source.columns), name)
        values = source.astype(object)
        return [_plain(row) for row in values.where(values.notna(), None).to_dict("records")]
    if hasattr(source, "with_format") and hasattr(source, "column_names"):  # datasets: rows of Python's own types
        source = source.with_format(None)
    if hasattr(source, "__len__") and hasattr(source, "__getitem__"):
        return list(islice(iter(source), len(source)))
    try:
        rows = iter(source)
    except TypeError as e:
        raise DataError(f"{name} is a {kind}; expected a path, or rows: a list of mappings") from e
    first_rows = list(islice(rows, _LONGEST_STREAM + 1))
    if len(first_rows) > _LONGEST_STREAM:
        raise DataError(unbounded(f"{name} is a {kind} of unknown length, perhaps endless", _LONGEST_STREAM))
    return first_rows


def unbounded(source: str, rows: int) -> str:
    """Returns the error message for a stream with more rows than are held."""
    return (
        f"{source}: it gave more than {rows:,} rows; pass the rows to train on, such as list(rows), or"
        " list(itertools.islice(rows, 50000)) for an endless stream"
    )


def _split_of(splits: Mapping[str, Any], split: str, source: str) -> Any:
    """Returns the split of that name, or the only split. Raises: DataError: it is not clear which."""
    if split in splits:
        return splits[split]
    if not split and len(splits) == 1:
        return next(iter(splits.values()))
    listed = f"{source} with the splits {', '.join(map(str, splits))}"
    if split:
        raise DataError(f"{listed}; none of them is named {split!r}")
    hint = next((hint for name, hint in _SPLITS.items() if source.startswith(name)), "name one of them: data.split")
    raise DataError(f"{listed}; {hint}")


def _of_columns(columns: Mapping[Any, Any], name: str) -> list[Any]:
    """Returns the rows of a mapping from columns to their values."""
    lists = {
        column: list(values)
        for column, values in columns.items()
        if not isinstance(values, str | bytes | Mapping) and hasattr(values, "__len__") and hasattr(values, "__iter__")
    }
    if not columns or len(lists) < len(columns):
        other = [column for column in columns if column not in lists]
        keys = ", ".join(map(str, columns))[:80] or "no keys"
        raise DataError(
            f"{name} is one mapping ({type(columns).__name__} with {keys}); expected rows, a list of mappings, or"
            " columns, a mapping of lists" + (f": {other[0]!r} is not a list" if other else "")
        )
    lengths = {column: len(values) for column, values in lists.items()}
    if len({*lengths.values()}) > 1:
        listed = ", ".join(f"{column!r} {length}" for column, length in lengths.items())
        raise DataError(f"{name} is a mapping of columns of different lengths ({listed:.120}); expected equal lengths")
    return [dict(zip(lists, values, strict=True)) for values in zip(*lists.values(), strict=True)]


def _plain(value: Any) -> Any:
    """Replaces arrays by lists, at any depth."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if hasattr(value, "tolist"):
        value = value.tolist()
    return [_plain(item) for item in value] if isinstance(value, list) else value


def _check_unique(columns: list[Any], name: str) -> None:
    for column in columns:
        if columns.count(column) > 1:
            raise DataError(f"{name} has {columns.count(column)} columns named {column!r}; rename them")


def _from_file(path: Path, name: str, split: str, subset: str) -> list[Any]:
    named = re.sub(r"^(\w+):/(?!/)", r"\1://", str(path))  # Path drops a slash
    where = f"{name} = {named!r}"
    if not path.exists() and is_hub_name(named):
        try:
            loaded = hub_dataset(named, f"{name} = {named!r}", split=split, subset=subset)
        except HubError as e:
            raise DataError(str(e)) from e
        return _from_python(loaded, f"{name} = {named!r}", split)
    if not path.exists():
        raise DataError(f"{where}: there is no such file or folder{_meant_name(named)}")
    for file in [*path.glob("*.arrow")] if path.is_dir() else [path]:
        try:
            refuse_special(file)
        except OSError as e:
            raise DataError(f"{where} cannot be read: {file}: {e.strerror}") from e
        if is_pointer(file):
            raise DataError(f"{where}: {pointer_message(file)}")
    if path.is_dir():
        return _from_datasets(path, where, split)
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return _from_parquet(path, where)
    if suffix in (".jsonl", ".json"):
        return _from_jsonl(path)
    raise DataError(f"{where}: expected .jsonl, .json, .parquet or a folder saved by datasets")


def _meant_name(named: str) -> str:
    """Returns a hint for a text that is neither a path nor a hub name; empty if it looks like a path."""
    page = re.match(r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/datasets/([\w.-]+/[\w.-]+)", named)
    if page:
        return f"; a dataset of the hub is given by its name, {page[1]!r}"
    if "://" in named:
        return "; expected a file or folder here, or the name of a dataset of the hub: download it first"
    owned = re.fullmatch(r"([\w.-]+/[\w.-]+):([\w.-]+)", named)
    if owned:
        return f"; a dataset of the hub is given by its name, {owned[1]!r}, and its part by data.subset or data.split"
    bare = re.fullmatch(r"[\w-]+", named)
    return f"; a dataset of the hub has an owner: OWNER/{named}" if bare else ""


def _from_jsonl(path: Path) -> list[Any]:
    rows = []
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as e:
        raise DataError(f"{path} is not UTF-8 text: {e}") from e
    except OSError as e:
        raise DataError(f"{path} cannot be read: {e.strerror or e}") from e
    if (array_rows := _of_array(text)) is not None:
        return array_rows
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=_unique)
        except (ValueError, RecursionError) as e:
            raise DataError(f"{path}:{number}: not JSON: {e}") from e
        if not isinstance(row, dict):
            raise DataError(f'{path}:{number}: a {type(row).__name__}; expected a JSON object, as {{"prompt": ...}}')
        rows.append(row)
    return rows


def _of_array(text: str) -> list[Any] | None:
    """Returns the rows of a file that is one JSON array of objects; None for any other file."""
    if not text.lstrip().startswith("["):
        return None
    try:
        rows = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError):
        return None
    return rows if all(isinstance(row, dict) for row in rows) else None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns the object of a line. Raises: ValueError: a key is there twice; JSON readers keep only the last."""
    result = dict(pairs)
    if len(result) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} is there twice")
    return result


def _from_parquet(path: Path, where: str) -> list[Any]:
    try:
        from pyarrow import parquet
    except ImportError as e:
        raise DataError(f"{where}: Parquet needs pyarrow: pip install pyarrow") from e
    try:
        table = parquet.read_table(path)
    except _UNREADABLE as e:
        raise DataError(f"{where} is not a Parquet file: {_reason(e)}") from e
    return _of_table(table, where)


def _of_table(table: Any, where: str) -> list[Any]:
    """Returns the rows of a pyarrow table. Raises: DataError: a column has values that Python does not have."""
    _check_unique(table.schema.names, where)
    columns = []
    for column in table.schema.names:
        try:
            columns.append(table[column].to_pylist())
        except _UNREADABLE as e:  # a date after the year 9999, nanoseconds
            kind = table.schema.field(column).type
            raise DataError(f"{where}, column {column!r} of {kind} cannot be read: {_reason(e)}") from e
    return [dict(zip(table.schema.names, values, strict=True)) for values in zip(*columns, strict=True)]


def _from_datasets(path: Path, where: str, split: str) -> list[Any]:
    try:
        from datasets import Dataset, load_from_disk
    except ImportError as e:
        raise DataError(f"{where} is a folder, which needs datasets: pip install datasets") from e
    try:
        loaded = load_from_disk(str(path))
        if not isinstance(loaded, Dataset):
            loaded = _split_of(loaded, split, f"{where} is a folder")
        return list(loaded.with_format(None))
    except DataError:
        raise
    except _UNREADABLE as e:
        raise DataError(f"{where} is not a dataset saved with save_to_disk: {_reason(e)}") from e


def _reason(error: Exception) -> str:
    return f"{error}".strip().partition("\n")[0] or type(error).__name__
