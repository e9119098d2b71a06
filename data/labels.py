"""Label sets: class names, display colours, the left/right pairs that mirroring swaps, the label to ignore.

The package's own sets lie in `data/label_sets`, one YAML file each; a user's file has the same keys. The packed shards
carry the whole set (`LabelSet.to_dict`), so training asks the data, not a config, how many classes there are.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from data import DataError

LABEL_SETS = Path(__file__).parent / "label_sets"

# Strict: YAML's `true` and `"3"` would otherwise pass for the ids 1 and 3.
Integer = Annotated[int, Field(strict=True)]


@dataclass(frozen=True)
class LabelSet:
    """The meaning of a mask's pixel values: value i is class `classes[i]`, `ignore_index` is no class at all.

    Args:
        name: short name, such as "face19".
        classes: one unique name a class, in the order of their ids.
        colors: one RGB triple (0..255) a class, for pictures only.
        flip_pairs: pairs of ids that change places when the image is mirrored (left and right eye, ...).
        ignore_index: the pixel value (0..255, not a class) that neither loss nor metrics look at.
        source: where the classes come from.

    Raises:
        DataError: one line that names the key at fault.
    """

    name: str
    classes: tuple[str, ...]
    colors: tuple[tuple[int, int, int], ...]
    flip_pairs: tuple[tuple[int, int], ...]
    ignore_index: int = 255
    source: str = ""

    def __post_init__(self) -> None:
        for key, problem in self._problems():
            raise DataError(f"label set {self.name!r}: key '{key}': {problem}")

    def _problems(self) -> Iterator[tuple[str, str]]:
        """Yields (key, what is wrong with it)."""
        n = len(self.classes)
        if n == 0:
            yield "classes", "needs at least one class"
        for name, count in Counter(self.classes).items():
            if count > 1 or not name:
                yield "classes", f"the name {name!r} stands {count} times; names must be unique and not empty"
        if len(self.colors) != n:
            yield "colors", f"{len(self.colors)} colours for {n} classes"
        for i, color in enumerate(self.colors):
            if len(color) != 3 or not all(0 <= channel <= 255 for channel in color):
                yield f"classes.{i}.color", f"{list(color)} must be three numbers 0..255 (red, green, blue)"
        if not n <= self.ignore_index <= 255:
            yield "ignore_index", f"{self.ignore_index} must lie outside the classes 0..{n - 1} and be at most 255"
        for pair in self.flip_pairs:
            if len(pair) != 2 or pair[0] == pair[1] or not all(0 <= i < n for i in pair):
                yield "flip_pairs", f"{list(pair)} must be two different ids of 0..{n - 1}"
        for i, count in Counter(i for pair in self.flip_pairs for i in pair).items():
            if count > 1:
                yield "flip_pairs", f"the id {i} is in {count} pairs; it can change places with one class only"

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def flip_table(self) -> np.ndarray:
        """Lookup for mirrored masks, uint8 (256,): `table[mask]` swaps the pairs and keeps every other value."""
        table = np.arange(256, dtype=np.uint8)
        for a, b in self.flip_pairs:
            table[a], table[b] = b, a
        return table

    def palette(self) -> np.ndarray:
        """Colours for pictures, RGB uint8 (256, 3): `palette[mask]`. Ignored pixels are white, unused values black."""
        palette = np.zeros((256, 3), dtype=np.uint8)
        palette[: self.num_classes] = self.colors
        palette[self.ignore_index] = 255
        return palette

    def to_dict(self) -> dict:
        """The set as JSON-able values, with the keys of the YAML files."""
        return {
            "name": self.name,
            "source": self.source,
            "num_classes": self.num_classes,
            "ignore_index": self.ignore_index,
            "classes": [
                {"id": i, "name": name, "color": list(color)}
                for i, (name, color) in enumerate(zip(self.classes, self.colors, strict=True))
            ],
            "flip_pairs": [list(pair) for pair in self.flip_pairs],
        }

    @classmethod
    def from_dict(cls, raw: object) -> "LabelSet":
        """The inverse of `to_dict`, also for parsed YAML.

        Raises:
            DataError: one line that names the key at fault; the caller puts the file's name before it.
        """
        try:
            parsed = _LabelSetFile.model_validate(raw)
        except ValidationError as error:
            raise DataError(first_problem(error)) from None
        classes = sorted(parsed.classes, key=lambda entry: entry.id)
        ids = [entry.id for entry in classes]
        if ids != list(range(len(ids))):
            raise DataError(f"key 'classes': the ids must be 0..{len(ids) - 1}, each once; they are {ids}")
        if parsed.num_classes not in (None, len(ids)):
            raise DataError(f"key 'num_classes': says {parsed.num_classes}, but {len(ids)} classes are listed")
        return cls(
            name=parsed.name,
            classes=tuple(entry.name for entry in classes),
            colors=tuple(entry.color for entry in classes),
            flip_pairs=tuple(parsed.flip_pairs),
            ignore_index=parsed.ignore_index,
            source=parsed.source,
        )


def load_label_set(name_or_path: str | Path) -> LabelSet:
    """One of the package's label sets by its name ("face19"), or a user's by the path of its .yaml file.

    Raises:
        DataError: no such set or file, not YAML, or a key at fault.
    """
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        path = LABEL_SETS / f"{name_or_path}.yaml"
        if not path.is_file():
            known = ", ".join(sorted(file.stem for file in LABEL_SETS.glob("*.yaml")))
            raise DataError(f"label set '{name_or_path}': unknown; name one of {known}, or the path of a .yaml file")
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: the label set cannot be read ({error.strerror}); check the path") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f"line {mark.line + 1}: {error.problem}" if mark else " ".join(str(error).split())
        raise DataError(f"{path}: not valid YAML, {place}") from None
    try:
        return LabelSet.from_dict(raw)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None


def first_problem(error: ValidationError) -> str:
    """A failed validation in one line: the first key at fault, why, what it holds, and how many more there are."""
    first, *others = error.errors()
    key = ".".join(str(part) for part in first["loc"])
    reason = "unknown key" if first["type"] == "extra_forbidden" else first["msg"]
    found = repr(first["input"])
    more = f" (and {len(others)} more)" if others else ""
    return f"{f'key {key!r}: ' if key else ''}{reason}, found {found if len(found) < 60 else found[:56] + ' ...'}{more}"


class _Class(BaseModel):
    model_config = ConfigDict(extra="forbid")
    id: Integer
    name: str
    color: tuple[Integer, Integer, Integer]


class _LabelSetFile(BaseModel):
    """Keys and types of a label set's YAML; what the values mean together is checked by `LabelSet`."""

    model_config = ConfigDict(extra="forbid")
    name: str
    source: str = ""
    note: str = ""
    num_classes: Integer | None = None
    ignore_index: Integer = 255
    classes: list[_Class]
    flip_pairs: list[tuple[Integer, Integer]] = []
