"""Rows of data: from files, `datasets`, DataFrames, and iterables of mappings."""

import json
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from gvpo_core.training.files.lfs import is_pointer, pointer_message

Row = Mapping[str, Any]
_LONGEST_STREAM = 20_000  # rows of an iterable that does not tell its length: it may never end
_UNREADABLE = (ArithmeticError, ImportError, LookupError, OSError, TypeError, ValueError)  # pyarrow's are ValueErrors


class DataError(ValueError):
    """Data that cannot be trained on; the message names the file, the row and the column."""


def load_rows(source: Any, name: str = "data") -> list[Row]:
    """Rows of a .jsonl or .parquet file, a folder saved by `datasets`, or rows given in Python.

    Args:
      source: a path; or a Dataset or IterableDataset of `datasets`, a DataFrame of pandas or polars, a table of
        pyarrow, or any iterable of mappings. Missing values of a DataFrame become None.
      name: of the data, for messages.
    Raises: DataError: no such file, a line that is not a JSON object (with its number), no rows, a row that is not a
      mapping, or a source that has no rows of its own: a mapping, splits, a stream without end.
    """
    rows = _from_file(Path(source), name) if isinstance(source, str | Path) else _given(source, name)
    if not rows:
        raise DataError(f"{name} = {str(source)[:80]!r} has no rows; expected at least one prompt")
    for i, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise DataError(
                f'{name} row {i} is a {type(row).__name__} ({row!r:.60}); expected a mapping, as {{"prompt": ...}}'
            )
        for column in row:
            if not isinstance(column, str):
                raise DataError(
                    f"{name} row {i} has a column named {column!r} ({type(column).__name__}); expected text"
                )
    return rows


def _given(source: Any, name: str) -> list[Any]:
    """Rows handed over in Python."""
    kind = type(source).__name__
    if isinstance(source, Mapping):
        if source and all(hasattr(value, "column_names") for value in source.values()):
            raise DataError(f"{name} is a {kind} with the splits {', '.join(map(str, source))}; give one of them")
        raise DataError(
            f"{name} is one mapping ({kind} with {', '.join(map(str, source))[:80] or 'no keys'}); expected rows: a"
            " list of mappings; datasets.Dataset.from_dict makes rows of columns"
        )
    if hasattr(source, "collect"):
        raise DataError(f"{name} is a {kind}, whose rows are not computed yet; give {kind}.collect()")
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
    found = list(islice(rows, _LONGEST_STREAM + 1))
    if len(found) > _LONGEST_STREAM:
        raise DataError(
            f"{name} is a {kind} of unknown length, perhaps endless: it gave more than {_LONGEST_STREAM:,} rows; give"
            " the rows to train on, as list(rows), or list(itertools.islice(rows, 50000)) of an endless one"
        )
    return found


def _plain(value: Any) -> Any:
    """Lists in the place of arrays, at any depth."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if hasattr(value, "tolist"):
        value = value.tolist()
    return [_plain(item) for item in value] if isinstance(value, list) else value


def _check_unique(columns: list[Any], name: str) -> None:
    for column in columns:
        if columns.count(column) > 1:
            raise DataError(f"{name} has {columns.count(column)} columns named {column!r}; rename them")


def _from_file(path: Path, name: str) -> list[Any]:
    where = f"{name} = {str(path)!r}"
    if not path.exists():
        raise DataError(f"{where}: there is no such file or folder")
    for file in [*path.glob("*.arrow")] if path.is_dir() else [path]:
        if is_pointer(file):
            raise DataError(f"{where}: {pointer_message(file)}")
    if path.is_dir():
        return _from_datasets(path, where)
    if path.suffix == ".parquet":
        return _from_parquet(path, where)
    if path.suffix in (".jsonl", ".json"):
        return _from_jsonl(path)
    raise DataError(f"{where}: expected .jsonl, .parquet or a folder saved by datasets")


def _from_jsonl(path: Path) -> list[Any]:
    rows = []
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as e:
        raise DataError(f"{path} is not UTF-8 text: {e}") from e
    except OSError as e:
        raise DataError(f"{path} cannot be read: {e.strerror or e}") from e
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as e:
            raise DataError(f"{path}:{number}: not JSON: {e}") from e
        if not isinstance(row, dict):
            raise DataError(f'{path}:{number}: a {type(row).__name__}; expected a JSON object, as {{"prompt": ...}}')
        rows.append(row)
    return rows


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
    """Rows of a pyarrow table. Raises: DataError: a column with values that Python does not have."""
    _check_unique(table.schema.names, where)
    columns = []
    for column in table.schema.names:
        try:
            columns.append(table[column].to_pylist())
        except _UNREADABLE as e:  # a date after the year 9999, nanoseconds
            kind = table.schema.field(column).type
            raise DataError(f"{where}, column {column!r} of {kind} cannot be read: {_reason(e)}") from e
    return [dict(zip(table.schema.names, values, strict=True)) for values in zip(*columns, strict=True)]


def _from_datasets(path: Path, where: str) -> list[Any]:
    try:
        from datasets import Dataset, load_from_disk
    except ImportError as e:
        raise DataError(f"{where} is a folder, which needs datasets: pip install datasets") from e
    try:
        loaded = load_from_disk(str(path))
        if isinstance(loaded, Dataset):
            return list(loaded.with_format(None))
    except _UNREADABLE as e:
        raise DataError(f"{where} is no dataset saved by datasets' save_to_disk: {_reason(e)}") from e
    raise DataError(f"{where} holds the splits {', '.join(loaded)}; point to one of them")


def _reason(error: Exception) -> str:
    return f"{error}".strip().partition("\n")[0] or type(error).__name__
