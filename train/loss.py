"""Cross-entropy as one mean over the valid pixels of the whole global batch, not a mean of means."""

import numpy as np
import torch
import torch.nn.functional as F

from data import DataError
from data.labels import LabelSet
from data.statistics import balanced_weights
from train import TrainError

UNSEEN = -1e4  # a logit that takes no part in a softmax; finite, for resizing would make NaN of infinities


def class_weights(setting: str | list[float], pixel_counts: np.ndarray, label_set: LabelSet) -> torch.Tensor:
    """float32 (C,) from the experiment's `loss.class_weights`: none, a list, the label set's own, or ("auto") from the
    pixels of each class in the training shards. Raises TrainError when they are missing or do not fit."""
    if setting == "none":
        return torch.ones(len(pixel_counts))
    if setting == "auto":
        return torch.tensor(balanced_weights(pixel_counts), dtype=torch.float32)
    if setting == "label_set":
        if label_set.class_weights is None:
            raise TrainError(f"loss.class_weights: label set {label_set.name} has none; use auto, or give a list")
        return torch.tensor(label_set.class_weights, dtype=torch.float32)
    if len(setting) != len(pixel_counts):
        raise TrainError(
            f"loss.class_weights: {len(setting)} values, but the shards' label set has {len(pixel_counts)} classes"
        )
    if not all(np.isfinite(setting)) or min(setting) < 0 or max(setting) == 0:
        raise TrainError("loss.class_weights: must be finite, none below 0, and not all 0")
    return torch.tensor(setting, dtype=torch.float32)


def check_labels(pixel_counts: torch.Tensor, label_set: LabelSet) -> None:
    """Raises DataError when a label is neither a class nor ignored: on a GPU the loss would abort the process.

    pixel_counts: int64 (B, 256), the pixels of each label value.
    """
    counts, classes = pixel_counts.sum(0), label_set.num_classes
    strange = [value for value in range(classes, 256) if value != label_set.ignore_index and counts[value]]
    if strange:
        raise DataError(
            f"a mask holds the labels {strange}, but label set {label_set.name} has the classes 0..{classes - 1} and "
            f"ignores {label_set.ignore_index}; build the shards again"
        )


class PixelLoss:
    """Weighted cross-entropy sums and the weight they are to be divided by."""

    def __init__(self, weights: torch.Tensor, label_set: LabelSet) -> None:
        self.weights, self.label_set = weights, label_set

    def weight_of(self, pixel_counts: torch.Tensor) -> float:
        """The summed weight of all valid pixels, from label value counts int64 (B, 256), in double precision.

        Raises DataError for labels that are none.
        """
        check_labels(pixel_counts, self.label_set)
        counts = pixel_counts.sum(0)[: self.label_set.num_classes]
        return float((counts.double() * self.weights.double()).sum())

    def sum(self, logits: torch.Tensor, labels: torch.Tensor, labelled: torch.Tensor | None = None) -> torch.Tensor:
        """Summed weighted cross-entropy in fp32, a scalar.

        Args:
            logits: (B, C, h, w), resized bilinearly to the labels.  labels: uint8 (B, H, W).
            labelled: bool (B, C), the classes that each image's masks can show; the others take no part. None: all.
        """
        logits = logits.float()
        if labelled is not None:
            logits = logits.masked_fill(~labelled[:, :, None, None], UNSEEN)
        if logits.shape[-2:] != labels.shape[-2:]:
            logits = F.interpolate(logits, labels.shape[-2:], mode="bilinear", align_corners=False)
        weights = self.weights.to(logits.device)
        return F.cross_entropy(logits, labels.long(), weights, ignore_index=self.label_set.ignore_index, reduction="sum")
