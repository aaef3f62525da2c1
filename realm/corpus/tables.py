"""Rows of Arrow tables, which Parquet files and Hugging Face datasets consist of."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import pyarrow as pa

from realm.corpus.records import BadRecord, BadRecords, Place
from realm.errors import first_line

T = TypeVar("T")


def parsed_rows(
    batches: Iterable[pa.RecordBatch | pa.Table], path: str, report: BadRecords, parse: Callable[[Place, dict], T]
) -> Iterator[T]:
    """Yield `parse(place, row)` for every row of a table, as a dict of Python values.

    Rows that cannot be converted, and those for which `parse` raises BadRecord, are added to
    `report`. Raises ArrowInvalid if the table is damaged.
    """
    number = 0
    for batch in batches:
        names = batch.column_names
        for column in batch.columns:
            _check_offsets(column)
        for values in zip(*batch.columns, strict=True):
            number += 1
            place = Place(path, number)
            with report.skipping(place):
                row = {name: _python_value(name, value) for name, value in zip(names, values, strict=True)}
                yield parse(place, row)


def _check_offsets(column: pa.Array | pa.ChunkedArray) -> None:
    """Raise ArrowInvalid if offsets of a column point outside of it; using one ends the process."""
    # Strings are checked as bytes: text that is not UTF-8 is an error of its row alone.
    binary = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary()}.get(column.type)
    (column if binary is None else column.cast(binary)).validate(full=True)


def _python_value(name: str, value: pa.Scalar) -> Any:
    """The value of column `name` as a Python object. Raises BadRecord if it has none."""
    try:
        return value.as_py()
    except UnicodeDecodeError:
        raise BadRecord("not UTF-8", f' in "{name}"') from None
    except (ValueError, OverflowError, KeyError, pa.ArrowException) as error:  # such as a date after the year 9999
        raise BadRecord(f'"{name}" has no Python value', f" ({value.type}: {first_line(error)})") from None
