"""Label sets: class names, colours, the left/right pairs that mirroring swaps, the label to ignore, class weights.

The package's own sets lie in `data/label_sets`, one YAML file each; a user's file has the same keys. The packed shards
carry the whole set (`LabelSet.to_dict`), so training asks the data, not a config, how many classes there are.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from data import DataError
from data.yaml_files import read_yaml

LABEL_SETS = Path(__file__).parent / "label_sets"
WHITE = (255, 255, 255)  # ignored pixels, where pixels are colours

# Where a class name's words part: Left_Eye, left-eye, "eye (left)", LeftEye, LEye. "Bright" and "Upright" are one word.
WORD_LIMIT = re.compile(r"[\s_.()\[\]/-]+|(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
SIDES = {"l": "left", "r": "right"}
MIRRORED = {"left": "right", "right": "left"}

# Strict: YAML's `true` and `"3"` would otherwise pass for the ids 1 and 3.
Integer = Annotated[int, Field(strict=True)]


@dataclass(frozen=True)
class LabelSet:
    """The meaning of a mask's pixel values: value i is class `classes[i]`, `ignore_index` is no class at all.

    Args:
        name: short name, such as "face19".
        classes: one unique name a class, in the order of their ids.
        colors: one RGB triple (0..255) a class, for pictures and for masks that are stored as colours.
        flip_pairs: pairs of ids that change places when the image is mirrored (left and right eye, ...).
        ignore_index: the pixel value (0..255, not a class) that neither loss nor metrics look at.
        source: where the classes come from.
        class_weights: one weight a class for the loss, finite and not negative; None: the set recommends none.

    Raises:
        DataError: one line that names the key at fault.
    """

    name: str
    classes: tuple[str, ...]
    colors: tuple[tuple[int, int, int], ...]
    flip_pairs: tuple[tuple[int, int], ...]
    ignore_index: int = 255
    source: str = ""
    class_weights: tuple[float, ...] | None = None

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
        words = [_words(name) for name in self.classes]
        for a, b in self.flip_pairs:
            mirrored = _mirrored(words[a])
            if mirrored != words[b] and (mirrored != words[a] or _mirrored(words[b]) != words[b]):
                pair = f"[{a}, {b}] swaps {self.classes[a]!r} with {self.classes[b]!r}"
                yield "flip_pairs", f"{pair}, which is not its other side by name; correct the ids or the names"
        weights = self.class_weights
        if weights is not None and len(weights) != n:
            yield "class_weights", f"{len(weights)} weights for {n} classes; give one a class, or leave the key out"
        if weights is not None and not (all(0 <= weight < math.inf for weight in weights) and any(weights)):
            yield "class_weights", f"{list(weights)} must be finite, none below 0, and not all 0"

    def warnings(self) -> list[str]:
        """What is allowed and still looks wrong, one line each: a class whose name carries a side (left, right, l, r) but
        which is in no flip pair, so that mirrored images would teach the wrong side; and where others carry sides, a pair
        that carries none."""
        paired = {i for pair in self.flip_pairs for i in pair}
        words = [_words(name) for name in self.classes]
        lines, of = [], f"label set {self.name!r}"
        lower = [name.lower() for name in self.classes]
        for i, name in enumerate(lower):  # "lefteye": too short of limits to be sure, but it has its like
            other = name.replace("left", "right")
            if i not in paired and side_of(self.classes[i]) is None and other != name and other in lower:
                pair = sorted((i, lower.index(other)))
                lines.append(f"{of}: {self.classes[i]!r} ({i}) is in no flip pair; add {pair} to flip_pairs")
        if any(map(side_of, self.classes)):
            for a, b in self.flip_pairs:
                if side_of(self.classes[a]) is None:
                    names = f"{self.classes[a]!r} ({a}) and {self.classes[b]!r} ({b})"
                    lines.append(f"{of}: {names} change places in a mirror, but carry no side; check the ids")
        for i, name in enumerate(self.classes):
            mirrored = _mirrored(words[i])
            if i in paired or mirrored == words[i]:
                continue
            remedy = "no class is its other side by name"
            if mirrored in words:
                partner = words.index(mirrored)
                remedy = f"its other side is {self.classes[partner]!r}; add {sorted((i, partner))} to flip_pairs"
            lines.append(f"{of}: {name!r} ({i}) carries a side but is in no flip pair: {remedy}")
        return lines

    def means_the_same(self, other: "LabelSet") -> bool:
        """Whether masks of both can be mixed: the same classes, mirrored and ignored alike. Colours may differ."""
        ours, theirs = ((s.classes, set(map(frozenset, s.flip_pairs)), s.ignore_index) for s in (self, other))
        return ours == theirs

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
        palette[self.ignore_index] = WHITE
        return palette

    def ids_by_color(self) -> dict[tuple[int, int, int], int]:
        """RGB -> pixel value, for masks stored in the set's colours. White is `ignore_index` unless a class has it.

        Raises:
            DataError: two classes share a colour.
        """
        ids = {WHITE: self.ignore_index}
        for i, color in enumerate(self.colors):
            first = ids.setdefault(color, i)
            if first < i:
                names = f"{self.classes[first]!r} and {self.classes[i]!r} share the colour {list(color)}"
                remedy = "masks stored as colours cannot tell them apart; use masks of class ids"
                raise DataError(f"label set {self.name!r}: key 'classes.{i}.color': {names}; {remedy}")
            ids[color] = i
        return ids

    def to_dict(self) -> dict:
        """The set as JSON-able values, with the keys of the YAML files."""
        weights = {} if self.class_weights is None else {"class_weights": list(self.class_weights)}
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
            **weights,
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
            raise DataError(f"key 'num_classes': says {parsed.num_classes}, but {len(ids)} classes are listed; leave it out")
        return cls(
            name=parsed.name,
            classes=tuple(entry.name for entry in classes),
            colors=tuple(entry.color for entry in classes),
            flip_pairs=tuple(parsed.flip_pairs),
            ignore_index=parsed.ignore_index,
            source=parsed.source,
            class_weights=None if parsed.class_weights is None else tuple(parsed.class_weights),
        )


def load_label_set(name_or_path: str | Path) -> LabelSet:
    """One of the package's label sets by its name ("face19"), or a user's by the path of its .yaml file.

    Raises:
        DataError: no such set or file, not YAML, or a key at fault.
    """
    path, raw = read_yaml(name_or_path, LABEL_SETS, "label set")
    if not isinstance(raw, dict):
        raise DataError(f"{path}: holds no `key: value` lines; write name, classes and flip_pairs as in {LABEL_SETS}/face19.yaml")
    try:
        return LabelSet.from_dict(raw)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None


def first_problem(error: ValidationError) -> str:
    """A failed validation in one line: the first key at fault, why, what it holds, and how many more there are."""
    first, *others = error.errors()
    key = ".".join(str(part) for part in first["loc"])
    found = repr(first["input"])
    more = f" (and {len(others)} more)" if others else ""
    return f"{f'key {key!r}: ' if key else ''}{reason(first)}, found {found if len(found) < 60 else found[:56] + ' ...'}{more}"


def reason(problem: Mapping[str, Any]) -> str:
    """Why pydantic refused a value, without words that belong to Python."""
    if problem["type"] == "extra_forbidden":
        return "unknown key"
    if problem["type"] == "model_type":  # its message names our class
        return "must hold keys with values"
    return problem["msg"].removeprefix("Value error, ")


def side_of(name: str) -> str | None:
    """ "left" or "right", where one of a class name's words is that (or l, r)."""
    return next((word for word in _words(name) if word in MIRRORED), None)


def _words(name: str) -> tuple[str, ...]:
    """A class name's words in lower case, "l" and "r" as the sides they stand for."""
    return tuple(SIDES.get(word.lower(), word.lower()) for word in WORD_LIMIT.split(name) if word)


def _mirrored(words: tuple[str, ...]) -> tuple[str, ...]:
    """The words of the class on the other side; the same words where they carry no side."""
    return tuple(MIRRORED.get(word, word) for word in words)


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
    class_weights: list[float] | None = None
