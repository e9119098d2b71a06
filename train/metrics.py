"""Segmentation scores from one confusion matrix of exact pixel counts."""

from dataclasses import dataclass

import numpy as np
import torch


class ConfusionMatrix:
    """Counts int64 (C, C) of pixels, rows truth and columns prediction: float counts saturate at 2^24 pixels a class."""

    def __init__(self, num_classes: int, ignore_index: int, device: torch.device | str = "cpu") -> None:
        self.num_classes, self.ignore_index = num_classes, ignore_index
        self.counts = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)

    def update(self, prediction: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
        """Add integer maps of equal shape, and return their own counts; pixels whose truth is ignored do not count."""
        valid = truth != self.ignore_index
        pairs = truth[valid].long() * self.num_classes + prediction[valid].long()
        counts = torch.bincount(pairs, minlength=self.num_classes**2).view(self.num_classes, -1)
        self.counts += counts
        return counts

    def scores(self) -> "Scores":
        return Scores(self.counts.cpu().numpy())


@dataclass(frozen=True)
class Scores:
    """A confusion matrix of pixels, int64 (C, C), rows truth and columns prediction, and the ratios made from it: float64
    (C,) or a mean. A class that nowhere occurs is NaN, never 0."""

    confusion: np.ndarray

    @property
    def intersection(self) -> np.ndarray:
        return np.diag(self.confusion)

    @property
    def predicted(self) -> np.ndarray:
        return self.confusion.sum(0)

    @property
    def true(self) -> np.ndarray:
        return self.confusion.sum(1)

    @property
    def iou(self) -> np.ndarray:
        """float64 (C,): NaN where neither truth nor prediction has a pixel."""
        return _ratio(self.intersection, self.predicted + self.true - self.intersection)

    @property
    def accuracy(self) -> np.ndarray:
        """float64 (C,): the share of a class's true pixels that were found."""
        return _ratio(self.intersection, self.true)

    @property
    def miou(self) -> float:
        return _mean(self.iou)

    @property
    def mean_accuracy(self) -> float:
        return _mean(self.accuracy)

    @property
    def pixel_accuracy(self) -> float:
        return float(_ratio(self.intersection.sum(), self.true.sum()))

    def table(self, classes: tuple[str, ...]) -> str:
        """One line a class: IoU, accuracy, share of the true pixels."""
        width = max(len(name) for name in classes)
        lines = [f"{'class':<{width}}    IoU     acc   pixels"]
        for name, iou, accuracy, share in zip(classes, self.iou, self.accuracy, self.true / max(1, self.true.sum()), strict=True):
            cells = ["     -" if np.isnan(value) else f"{value:6.3f}" for value in (iou, accuracy)]
            lines.append(f"{name:<{width}} {cells[0]}  {cells[1]}  {share:6.2%}")
        return "\n".join(lines)


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(whole > 0, np.divide(part, whole, dtype=np.float64), np.nan)


def _mean(values: np.ndarray) -> float:
    return float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")
