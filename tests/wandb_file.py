"""What wandb has written into an offline run's file: the log format of LevelDB, of records in protobuf."""

import json
from collections.abc import Iterator
from pathlib import Path

from wandb.proto.wandb_internal_pb2 import Record

FILE_HEADER, HEADER, BLOCK = 7, 7, 32768
LAST, WHOLE = 4, 1  # kinds of a piece of a record


def records(path: Path) -> Iterator[Record]:
    data, at, pieces = path.read_bytes(), FILE_HEADER, b""
    while at + HEADER <= len(data):
        if BLOCK - at % BLOCK < HEADER:  # filled with zeros
            at += BLOCK - at % BLOCK
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        pieces += data[at + HEADER : at + HEADER + length]
        at += HEADER + length
        if kind in (WHOLE, LAST):
            yield Record.FromString(pieces)
            pieces = b""


def offline_runs(folder: Path) -> list[list[Record]]:
    """Of a training's output folder: the records of each of its starts."""
    return [list(records(path)) for path in sorted(folder.glob("wandb/offline-run-*/*.wandb"))]


def history(run: list[Record]) -> list[dict]:
    """The lines that were logged."""
    return [_values(record.history.item) for record in run if record.HasField("history")]


def summary(run: list[Record]) -> dict:
    return {k: v for record in run if record.HasField("summary") for k, v in _values(record.summary.update).items()}


def config(run: list[Record]) -> dict:
    return {k: v for record in run if record.HasField("run") for k, v in _values(record.run.config.update).items()}


def _values(items) -> dict:
    found: dict = {}
    for item in items:
        *outer, last = item.nested_key or [item.key]
        inside = found
        for key in outer:
            inside = inside.setdefault(key, {})
        inside[last] = json.loads(item.value_json)
    return found
