import numpy as np
import pytest
import torch
import torch.nn.functional as F

from data import DataError
from data.labels import LabelSet, load_label_set
from train import TrainError
from train.loss import PixelLoss, class_weights

LABELS = LabelSet("three", ("a", "b", "c"), ((0, 0, 0),) * 3, ())


def counts(labels):
    return torch.stack([torch.bincount(label.flatten().long(), minlength=256) for label in labels])


@pytest.mark.parametrize("weights", [torch.ones(3), torch.tensor([0.2, 3.0, 1.0])])
def test_parts_of_a_batch_sum_to_the_mean_over_its_valid_pixels(weights):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 3, 8, 6, generator=generator)
    labels = torch.randint(0, 3, (4, 16, 12), generator=generator, dtype=torch.uint8)
    labels[0, :9] = 255  # so that a mean of means would be another number
    loss = PixelLoss(weights, LABELS)
    parts = [(logits[i : i + 1], labels[i : i + 1]) for i in range(4)]
    total = sum(loss.sum(*part) for part in parts) / sum(loss.weight_of(counts(label)) for _, label in parts)
    whole = F.cross_entropy(
        F.interpolate(logits, (16, 12), mode="bilinear", align_corners=False), labels.long(), weights, ignore_index=255
    )
    assert total.item() == pytest.approx(whole.item(), rel=1e-6)


def test_a_strange_label_is_named():
    with pytest.raises(DataError, match=r"\[7\].*three.*0\.\.2"):
        PixelLoss(torch.ones(3), LABELS).weight_of(counts(torch.full((1, 2, 2), 7, dtype=torch.uint8)))


def test_auto_weights():
    pixels = np.array([900_000, 90_000, 10_000, 0])
    weights = class_weights("auto", pixels, LABELS).numpy()
    assert weights[:3].mean() == pytest.approx(1, rel=1e-6) and weights[3] == 1
    assert weights[2] / weights[0] == pytest.approx(90**0.35, rel=1e-5)
    assert class_weights("auto", np.array([10**9, 1]), LABELS).max() <= 10


def test_a_list_of_another_length_is_refused():
    assert class_weights([1.0, 2.0], np.array([1, 1]), LABELS).tolist() == [1, 2]
    with pytest.raises(TrainError, match="class_weights: 3 values.*2 classes"):
        class_weights([1.0, 2.0, 3.0], np.array([1, 1]), LABELS)
    for weights in ([-1.0, 1.0], [0.0, 0.0], [float("nan"), 1.0]):
        with pytest.raises(TrainError, match="class_weights: must be finite"):
            class_weights(weights, np.array([1, 1]), LABELS)


def test_the_label_sets_own_weights():
    with pytest.raises(TrainError, match="three has none; use auto"):
        class_weights("label_set", np.ones(3), LABELS)
    goliath = load_label_set("goliath28")
    assert class_weights("label_set", np.ones(28), goliath).tolist() == pytest.approx(goliath.class_weights)


def test_a_class_that_a_set_cannot_show_is_not_taught():
    """Its logits get no gradient from that image, and those of the others none from it."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 4, 4, generator=generator, requires_grad=True)
    labels = torch.randint(0, 2, (2, 8, 8), generator=generator, dtype=torch.uint8)
    loss = PixelLoss(torch.ones(3), LABELS)
    loss.sum(logits, labels, torch.tensor([[True, True, True], [True, True, False]])).backward()
    assert (logits.grad[0, 2] != 0).all() and (logits.grad[1, 2] == 0).all()
    two = logits.detach()[1:, :2].requires_grad_()
    PixelLoss(torch.ones(2), LabelSet("two", ("a", "b"), ((0, 0, 0),) * 2, ())).sum(two, labels[1:]).backward()
    assert torch.allclose(logits.grad[1, :2], two.grad[0], atol=1e-6)
