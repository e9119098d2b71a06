"""Cross-entropy and Dice as means over the whole global batch, not means of means."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F

from data import DataError
from data.labels import LabelSet
from data.statistics import balanced_weights
from train import TrainError

UNSEEN = -1e4  # a logit that takes no part in a softmax; finite, for resizing would make NaN of infinities
DICE_SMOOTH = 1e-3  # in pixels, as in Sapiens2
# Logits at the labels' size, in fp32: 64 MB, three times while a loss is computed; four with smoothing, six with Dice.
AT_ONCE = 2**24


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
    """Class-weighted cross-entropy, with label smoothing, and `dice` times the soft Dice loss.

    The loss of a global batch is

        its valid pixels' cross-entropies, summed / their class weights, summed
        + dice * its images' Dice losses, summed / the images that show a class other than the background

    Both divisors are known from the label counts before the forward pass, so that the loss is the sum of its parts'
    shares, whichever way the batch is cut into ranks and micro batches.

    A pixel's smoothed target is 1 - label_smoothing for its class and label_smoothing spread evenly over the classes that
    its mask can show. The terms have the weights of their own classes, the divisor those of the true ones: what
    F.cross_entropy computes from the whole batch.

    An image's Dice loss is the mean, over the classes other than 0 (the background) that its mask shows, of
    1 - (2 sum(p t) + s) / (sum(p^2) + sum(t^2) + s), with probabilities p, truth t (0 or 1) and s = DICE_SMOOTH summed
    over its valid pixels: Sapiens2's. An image that shows none has a Dice loss of 0 and is not counted.
    """

    def __init__(self, weights: torch.Tensor, label_set: LabelSet, label_smoothing: float = 0.0, dice: float = 0.0) -> None:
        self.weights, self.label_set = weights, label_set
        self.label_smoothing, self.dice = label_smoothing, dice

    def totals(self, pixel_counts: torch.Tensor) -> tuple[float, float]:
        """The two divisors, of any part of a batch: those of a whole batch are the sums of its parts'.

        pixel_counts: int64 (B, 256), the pixels of each label value. Raises DataError for labels that are none.
        """
        check_labels(pixel_counts, self.label_set)
        counts = pixel_counts[:, : self.label_set.num_classes]
        weight = (counts.sum(0).double() * self.weights.double()).sum()
        return float(weight), float((counts[:, 1:] > 0).any(1).sum())

    def share(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor,
        totals: Sequence[float],
        labelled: torch.Tensor | None = None,
        class_sums: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """These images' share of the loss of the global batch that has these `totals`: a scalar, computed in fp32.

        A few images at a time, the gradient together with the loss: logits at the labels' size are as large as what many
        blocks keep, and no more than AT_ONCE of them, or one image's, are held, whatever the batch.

        Args:
            logits: (B, C, h, w), resized bilinearly to the labels.  labels: uint8 (B, H, W).
            labelled: bool (B, C), the classes that each image's masks can show; the others take no part. None: all.
            class_sums: float64 (C,), to which the cross-entropies of each class's pixels are added, as they are without
                weights and smoothing: to be shown.
        """
        few = max(1, AT_ONCE // (logits.shape[1] * labels[0].numel()))
        parts = [slice(i, i + few) for i in range(0, len(logits), few)]

        def of_part(part: slice, some: torch.Tensor) -> torch.Tensor:
            return self._share(some, labels[part], totals, None if labelled is None else labelled[part], class_sums)

        if torch.is_grad_enabled() and logits.requires_grad:
            return _PartByPart.apply(logits, parts, of_part)
        return sum(of_part(part, logits[part].float()) for part in parts)

    def _share(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor,
        totals: Sequence[float],
        labelled: torch.Tensor | None,
        class_sums: torch.Tensor | None,
    ) -> torch.Tensor:
        """`share` of all these images at once; logits in fp32."""
        weight, images = totals
        if labelled is not None:
            logits = logits.masked_fill(~labelled[:, :, None, None], UNSEEN)
        if logits.shape[-2:] != labels.shape[-2:]:
            logits = F.interpolate(logits, labels.shape[-2:], mode="bilinear", align_corners=False)
        log_p, ignore = F.log_softmax(logits, dim=1), self.label_set.ignore_index
        weights = self.weights.to(logits.device, non_blocking=True)
        loss = F.nll_loss(log_p, labels.long(), weights, ignore_index=ignore, reduction="sum")
        if class_sums is not None:
            each = F.nll_loss(log_p.detach(), labels.long(), ignore_index=ignore, reduction="none")
            class_sums += torch.bincount(labels.flatten(), each.flatten().double(), minlength=256)[: len(class_sums)]
        if self.label_smoothing:
            targets = torch.ones_like(log_p[:, :, 0, 0]) if labelled is None else labelled.float()
            targets = weights * targets / targets.sum(1, keepdim=True)
            even = -((log_p * targets[:, :, None, None]).sum(1) * (labels != ignore)).sum()
            loss = torch.lerp(loss, even, self.label_smoothing)
        loss = loss / (weight or 1.0)  # no pixel of the global batch may be valid
        if self.dice:
            loss = loss + self.dice * dice_losses(log_p, labels, ignore).sum() / (images or 1.0)
        return loss


class _PartByPart(torch.autograd.Function):
    """The sum of a function of each part of the logits, whose gradient is known with it: nothing that a part needs on the way
    is left when the next one begins, and nothing is computed twice."""

    @staticmethod
    def forward(
        ctx, logits: torch.Tensor, parts: list[slice], function: Callable[[slice, torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        gradients = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
        total = torch.zeros((), device=logits.device)
        for part in parts:
            with torch.enable_grad():
                some = logits[part].detach().float().requires_grad_()
                value = function(part, some)
            (gradients[part],) = torch.autograd.grad(value, some)
            total += value.detach()
        ctx.save_for_backward(gradients)
        ctx.dtype = logits.dtype
        return total

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradients,) = ctx.saved_tensors
        return (gradients * gradient).to(ctx.dtype), None, None


def dice_losses(log_p: torch.Tensor, labels: torch.Tensor, ignore_index: int) -> torch.Tensor:
    """Each image's Dice loss (see PixelLoss), (B,), from log-probabilities (B, C, H, W) and labels uint8 (B, H, W)."""
    p = log_p[:, 1:].exp()
    foreground = torch.arange(1, log_p.shape[1], device=labels.device)
    truth = labels[:, None] == foreground[:, None, None]  # bool (B, C - 1, H, W), False where ignored
    area = truth.sum((2, 3))
    overlap = (p * truth).sum((2, 3))
    squares = (p.square() * (labels != ignore_index)[:, None]).sum((2, 3))
    losses = 1 - (2 * overlap + DICE_SMOOTH) / (squares + area + DICE_SMOOTH)
    shown = area > 0
    return (losses * shown).sum(1) / shown.sum(1).clamp(min=1)
