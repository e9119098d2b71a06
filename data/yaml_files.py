"""Reads the package's small YAML files, by name, and a user's own, by path; and what their sections have in common."""

from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationInfo, field_validator

from data import DataError


def read_yaml(name_or_path: str | Path, folder: Path, what: str) -> tuple[Path, object]:
    """The path and the parsed content of a .yaml file, or of the one with that name in `folder`.

    Args:
        what: "label set" or "label map", for the messages.

    Raises:
        DataError: no such name or file, not YAML, or a key that stands twice.
    """
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        path = folder / f"{name_or_path}.yaml"
        if not path.is_file():
            known = ", ".join(sorted(file.stem for file in folder.glob("*.yaml")))
            raise DataError(f"{what} '{name_or_path}': unknown; name one of {known}, or the path of a .yaml file")
    try:
        return path, yaml.load(path.read_text(encoding="utf-8"), _UniqueKeys)
    except OSError as error:
        raise DataError(f"{path}: the {what} cannot be read ({error.strerror}); check the path") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f"line {mark.line + 1}: {error.problem}" if mark else " ".join(str(error).split())
        raise DataError(f"{path}: not valid YAML, {place}") from None


class _UniqueKeys(yaml.SafeLoader):
    """YAML in which a key that stands twice is an error; PyYAML would keep the last of them without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        values = [key.value for key in keys]
        for i, key in enumerate(keys):
            if key.value in values[:i]:
                problem = f"the key {key.value!r} stands twice"
                raise yaml.constructor.ConstructorError(problem=problem, problem_mark=key.start_mark)
        return super().construct_mapping(node, deep)


class Settings(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False):
    """A section of a YAML file. Unknown keys are errors: a misspelt one would otherwise take the default in silence. So are
    true and false for numbers, which pydantic takes for 1 and 0.
    """

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        annotation = cls.model_fields[info.field_name].annotation
        if isinstance(value, bool) and annotation is not bool:
            raise ValueError("must not be true or false")
        return value
