"""Label maps: what each class of one label set becomes in another, so that data sets of other classes train together.

The package's own maps lie in `data/label_maps`, one YAML file each; a user's file has the same keys.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from data import DataError
from data.labels import LabelSet, first_problem, load_label_set, side_of
from data.yaml_files import read_yaml

LABEL_MAPS = Path(__file__).parent / "label_maps"


@dataclass(frozen=True)
class LabelMap:
    """Which class of the label set `target` each class of the label set `source` becomes.

    Args:
        name: short name, such as "lip20_to_goliath28".
        source: the label set's name.
        target: the label set's name, or a YAML file's path from the map's own folder.
        pairs: for each class name of the source a class name of the target, or None for pixels to ignore.
        file: where the map was read from, for messages.
    """

    name: str
    source: str
    target: str
    pairs: Mapping[str, str | None]
    file: Path | None = field(default=None, compare=False)

    def target_set(self) -> LabelSet:
        """The label set that `target` names. Raises DataError."""
        own_file = self.target.endswith((".yaml", ".yml"))
        return load_label_set(self.file.parent / self.target if own_file and self.file else self.target)

    def table(self, source: LabelSet, target: LabelSet) -> np.ndarray:
        """Lookup for masks, uint8 (256,): `table[mask]` turns ids of `source` into ids of `target`.

        The ignored value, and every value that is no class of `source`, becomes `target.ignore_index`.

        Raises:
            DataError: the map is for other label sets, leaves out a class, names one that its set lacks, or treats
                left and right differently, so that mirrored masks would be mapped to other labels.
        """
        where = self.file or f"label map {self.name!r}"
        for key, problem in self._problems(source, target):
            raise DataError(f"{where}: key '{key}': {problem}")
        ids = {name: i for i, name in enumerate(target.classes)} | {None: target.ignore_index}
        table = np.full(256, target.ignore_index, dtype=np.uint8)
        table[: source.num_classes] = [ids[self.pairs[name]] for name in source.classes]
        mapped_last, mirrored_last = table[source.flip_table()], target.flip_table()[table]
        for i in np.flatnonzero(mapped_last != mirrored_last):
            a, b = (_class_name(target, values[i]) for values in (mapped_last, mirrored_last))
            raise DataError(
                f"{where}: key 'map.{source.classes[i]}': first mirrored, then mapped, this class is {a}; "
                f"first mapped, then mirrored, it is {b}; map both sides alike"
            )
        return table

    def warnings(self) -> list[str]:
        """One line for each class that changes sides by name. It is right between sets that mean the photo's left and
        the person's left; else every left becomes a right."""
        return [
            f"{self.file or f'label map {self.name!r}'}: key 'map.{name}': {name!r} becomes {mapped!r}, of the other side"
            for name, mapped in self.pairs.items()
            if mapped and side_of(name) and side_of(mapped) and side_of(name) != side_of(mapped)
        ]

    def _problems(self, source: LabelSet, target: LabelSet) -> Iterator[tuple[str, str]]:
        """Yields (key, what is wrong with it)."""
        target_name = self.target_set().name if self.target.endswith((".yaml", ".yml")) else self.target
        for key, wanted, given in (("source", self.source, source), ("target", target_name, target)):
            if wanted != given.name:
                yield key, f"the map is for {wanted!r}, not {given.name!r}; choose another map or another label set"
        for name, mapped in self.pairs.items():
            if name not in source.classes:
                yield f"map.{name}", _no_such_class(name, source)
            if mapped is not None and mapped not in target.classes:
                yield f"map.{name}", _no_such_class(mapped, target)
        if missing := [name for name in source.classes if name not in self.pairs]:
            names = ", ".join(map(repr, missing))
            yield "map", f"leaves out {names} of {source.name!r}; add a line for each, with null to ignore its pixels"


def reached(table: np.ndarray, classes: Iterable[int], target: LabelSet) -> tuple[int, ...]:
    """The ids of `target` that these source classes become through `LabelMap.table`, sorted: all that mapped masks show."""
    return tuple(sorted({int(table[i]) for i in classes} - {target.ignore_index}))


def load_label_map(name_or_path: str | Path) -> LabelMap:
    """One of the package's label maps by its name ("lip20_to_goliath28"), or a user's by the path of its .yaml file.

    Raises:
        DataError: no such map or file, not YAML, or a key at fault.
    """
    path, raw = read_yaml(name_or_path, LABEL_MAPS, "label map")
    try:
        parsed = _LabelMapFile.model_validate(raw)
    except ValidationError as error:
        raise DataError(f"{path}: {first_problem(error)}; correct the label map") from None
    return LabelMap(parsed.name, parsed.source, parsed.target, parsed.map, path)


def _no_such_class(name: str, label_set: LabelSet) -> str:
    close = get_close_matches(name, label_set.classes, n=1)
    remedy = f"did you mean {close[0]!r}?" if close else f"its classes are {', '.join(label_set.classes)}"
    return f"{label_set.name!r} has no class {name!r}; {remedy}"


def _class_name(label_set: LabelSet, i: int) -> str:
    return "ignored" if i == label_set.ignore_index else repr(label_set.classes[i])


class _LabelMapFile(BaseModel):
    """Keys and types of a label map's YAML; whether the classes are there is checked by `LabelMap.table`."""

    model_config = ConfigDict(extra="forbid")
    name: str
    source: str
    target: str
    note: str = ""
    map: dict[str, str | None]
