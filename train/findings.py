"""What the doctor tells: lines under titles, warnings, and errors, each once."""

from collections.abc import Callable

from data import DataError
from model import ModelError
from train import TrainError


class Findings:
    """Prints what is found, and keeps count.

    Attributes:
        errors: the texts of those that were told.  warnings: how many.
    """

    def __init__(self) -> None:
        self.errors: list[str] = []
        self.warnings = 0

    def part(self, title: str, look: Callable[[], None]) -> None:
        """What `look` tells, under a title. What it raises is an error, and does not keep other parts from being looked at."""
        print(title, flush=True)
        try:
            look()
        except (DataError, ModelError, TrainError, OSError) as error:
            self.error(str(error))

    def line(self, text: str) -> None:
        print(f"  {text}", flush=True)

    def warning(self, text: str) -> None:
        self.warnings += 1
        self.line(f"warning: {text}")

    def error(self, text: str) -> None:
        """Not if it was told before, with the key in front or without."""
        if not any(text in told or told in text for told in self.errors):
            self.errors.append(text)
            self.line(f"error: {text}")
