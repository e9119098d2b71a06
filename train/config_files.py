"""An experiment as layers: `key=value` overrides, the YAML file, the file it names as its `base`, that one's base ..."""

from pathlib import Path
from typing import Any

import yaml

from data import DataError
from data.yaml_files import read_yaml
from train import TrainError

CONFIGS = Path("train/configs")
Layer = tuple[Path, dict[str, Any]]  # a file and what it says; of a key that several hold, the first one's value counts


def read_layers(path: Path, overrides: list[str]) -> list[Layer]:
    """The overrides, told as the first file's, then the file and those below it.

    `base` is a path, taken from the folder of the file that names it. Raises TrainError naming the file or the override.
    """
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in CONFIGS.glob("*.yaml")))
        raise TrainError(f"{path}: no such config; in {CONFIGS} there are {known}")
    layers, seen = [(path, _from_overrides(overrides))], [path]
    while "base" in (values := _read(path)):
        base = values.pop("base")
        if not isinstance(base, str):
            raise TrainError(f"{path}: base: must be the path of one YAML file, not {base!r}")
        layers.append((path, values))
        below = path.parent / base
        if not below.is_file():
            raise TrainError(f"{path}: base: {below}: no such file; the path starts at this file's folder")
        if any(below.samefile(file) for file in seen):
            raise TrainError(f"{path}: base: {base} builds on this file itself; name one that does not")
        seen.append(path := below)
    return [*layers, (path, values)]


def merge(layers: list[Layer]) -> dict[str, Any]:
    """One dict of them all: sections are merged key by key, anything else, lists too, is replaced."""
    merged: dict[str, Any] = {}
    for _, values in reversed(layers):
        merged = _above(values, merged)
    return merged


def file_of(key: tuple[str | int, ...], layers: list[Layer]) -> Path:
    """The file that a key's value comes from: the uppermost that holds it, or the first one if none does."""
    for path, values in layers:
        for part in key:
            if not isinstance(values, dict) or part not in values:
                break
            values = values[part]
        else:
            return path
        if not isinstance(values, dict):
            return path
    return layers[0][0]


def _above(values: dict[str, Any], below: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in values.items():
        if isinstance(value, dict):
            under = below.get(key)
            value = _above(value, under if isinstance(under, dict) else {})
        merged[key] = value
    return merged


def _read(path: Path) -> dict[str, Any]:
    try:
        _, values = read_yaml(path, CONFIGS, "experiment")
    except DataError as error:
        raise TrainError(str(error)) from None
    if not isinstance(values, dict):
        raise TrainError(f"{path}: holds no `key: value` lines; write an experiment as those in {CONFIGS}")
    return values


def _from_overrides(overrides: list[str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for override in overrides:
        dotted, equals, text = override.partition("=")
        if not equals or not dotted:
            raise TrainError(f"override {override!r}: write key=value, for example optimizer.lr=1e-4")
        *sections, key = dotted.split(".")
        section = values
        for name in sections:
            section = section.setdefault(name, {})
            if not isinstance(section, dict):
                raise TrainError(f"override {override!r}: {name} is a value, not a section")
        try:
            section[key] = yaml.safe_load(text)
        except yaml.YAMLError:
            raise TrainError(f"override {override!r}: {text!r} is not a YAML value; quote it") from None
    return values
