"""Lists of files, that a data set brings along or a user writes, as checked records."""

import csv
import json
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from data import DataError
from data.labels import first_problem

Record = TypeVar("Record", bound=BaseModel)


def read_records(file: Path, record: type[Record], expected: str) -> Iterator[tuple[str, Record]]:
    """Yields (where, record) for each record of a .json file (one list), a .jsonl file (one object a line) or a .csv
    file (names of the columns first). `where` names file and record, for the caller's own messages.

    Args:
        expected: what the file should hold, for messages.

    Raises:
        DataError: the file cannot be read or parsed, or a record is not of the class `record`.
    """
    try:
        # Excel puts a byte order mark before the first column's name.
        rows = list(READERS[file.suffix.lower()](file.read_text(encoding="utf-8-sig")))
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror}); check the path") from None
    except (ValueError, csv.Error) as error:
        raise DataError(f"{file}: {error}; expected {expected}") from None
    for place, row in rows:
        where = f"{file}: {place}"
        try:
            yield where, record.model_validate(row)
        except ValidationError as error:
            raise DataError(f"{where}: {first_problem(error)}; expected {expected}") from None


def _json_rows(text: str) -> Iterator[tuple[str, object]]:
    rows = json.loads(text)
    if not isinstance(rows, list):
        raise ValueError("not a JSON list")
    return ((f"record {i}", row) for i, row in enumerate(rows))


def _json_lines(text: str) -> Iterator[tuple[str, object]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield f"line {number}", json.loads(line)
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from None


def _csv_rows(text: str) -> Iterator[tuple[str, dict[str, str | None]]]:
    reader = csv.DictReader(StringIO(text, newline=""), skipinitialspace=True, strict=True)
    for row in reader:
        if None in row:
            raise ValueError(f"line {reader.line_num}: more cells than columns; put names with commas in quotes")
        yield f"line {reader.line_num}", {column: cell or None for column, cell in row.items()}


READERS = {".json": _json_rows, ".jsonl": _json_lines, ".csv": _csv_rows}
