import numpy as np
import pytest
import torch
import torch.nn.functional as F

from data import DataError
from data.labels import LabelSet, load_label_set
from tests.model_cases import EXPECTED2, arrays, build_golden2, write_segmentation2
from train import TrainError
from train.loss import PixelLoss, class_weights
from train.memory import PeakTracker

LABELS = LabelSet("three", ("a", "b", "c"), ((0, 0, 0),) * 3, ())


def counts(labels):
    return torch.stack([torch.bincount(label.flatten().long(), minlength=256) for label in labels])


def drawn(images: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits at half the labels' size; the first image is mostly ignored, the last wholly."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(images, 3, 8, 6, generator=generator)
    labels = torch.randint(0, 3, (images, 16, 12), generator=generator, dtype=torch.uint8)
    labels[0, :9] = 255  # so that a mean of means would be another number
    labels[-1] = 255
    return logits, labels


def at_labels(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.interpolate(logits, labels.shape[-2:], mode="bilinear", align_corners=False)


@pytest.mark.parametrize("weights", [torch.ones(3), torch.tensor([0.2, 3.0, 1.0])])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_without_dice_it_is_the_cross_entropy_of_the_whole_batch(weights, smoothing):
    logits, labels = drawn()
    loss = PixelLoss(weights, LABELS, smoothing)
    ours = loss.share(logits, labels, loss.totals(counts(labels)))
    whole = F.cross_entropy(at_labels(logits, labels), labels.long(), weights, ignore_index=255, label_smoothing=smoothing)
    assert ours.item() == pytest.approx(whole.item(), rel=1e-6)


def test_parts_of_a_batch_have_shares_that_add_up():
    logits, labels = drawn()
    loss = PixelLoss(torch.tensor([0.2, 3.0, 1.0]), LABELS, 0.1, 0.7)
    labels[1] = 0  # nothing but background
    parts = [slice(i, i + 1) for i in range(4)]
    each = [loss.totals(counts(labels[part])) for part in parts]
    totals = [sum(column) for column in zip(*each, strict=True)]
    assert totals == list(loss.totals(counts(labels))) and totals[1] == 2
    whole, cut = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    expected = loss.share(whole, labels, totals)
    shares = [loss.share(cut[part], labels[part], totals) for part in parts]
    assert sum(shares).item() == pytest.approx(expected.item(), rel=1e-6) and shares[3] == 0
    expected.backward()
    sum(shares).backward()
    torch.testing.assert_close(cut.grad, whole.grad, atol=1e-8, rtol=1e-5)


def test_the_classes_cross_entropies_are_told_and_change_nothing():
    logits, labels = drawn()
    loss = PixelLoss(torch.tensor([0.2, 3.0, 1.0]), LABELS, 0.1, 0.7)
    totals, sums = loss.totals(counts(labels)), torch.zeros(3, dtype=torch.float64)
    assert loss.share(logits, labels, totals, None, sums) == loss.share(logits, labels, totals)
    large = at_labels(logits, labels).movedim(1, -1)
    for i in range(3):
        expected = F.cross_entropy(large[labels == i], labels[labels == i].long(), reduction="sum")
        assert sums[i].item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_batch_without_a_valid_pixel_teaches_nothing():
    logits, labels = drawn(1)
    logits.requires_grad_()
    loss = PixelLoss(torch.ones(3), LABELS, 0.1, 1.0)
    value = loss.share(logits, labels, loss.totals(counts(labels)))
    value.backward()
    assert value == 0 and (logits.grad == 0).all()


@pytest.mark.parametrize("at_once", [1, 2 * 3 * 16 * 12, 2**24])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("some_labelled", [False, True])
def test_a_few_images_at_a_time_are_all_at_once(monkeypatch, at_once, dtype, some_labelled):
    """Loss, gradient and the classes' sums are those of the whole batch through autograd."""
    monkeypatch.setattr("train.loss.AT_ONCE", at_once)
    logits, labels = drawn(5)
    labelled = None
    if some_labelled:
        labelled = torch.ones(5, 3, dtype=torch.bool)
        labelled[2, 1], labels[2][labels[2] == 1] = False, 0
    loss = PixelLoss(torch.tensor([0.2, 3.0, 1.0]), LABELS, 0.1, 0.7)
    totals = loss.totals(counts(labels))
    ours, plain = (logits.to(dtype).clone().requires_grad_() for _ in range(2))
    sums, expected_sums = (torch.zeros(3, dtype=torch.float64) for _ in range(2))
    value = loss.share(ours, labels, totals, labelled, sums)
    expected = loss._share(plain.float(), labels, totals, labelled, expected_sums)
    assert value.item() == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(sums, expected_sums)
    (value * 3).backward()
    (expected * 3).backward()
    torch.testing.assert_close(ours.grad, plain.grad, atol=1e-8, rtol=1e-5 if dtype == torch.float32 else 1e-2)
    with torch.no_grad():
        assert loss.share(ours, labels, totals, labelled).item() == pytest.approx(expected.item(), rel=1e-6)


def test_more_images_take_no_more_memory_at_the_labels_size(monkeypatch):
    monkeypatch.setattr("train.loss.AT_ONCE", 3 * 64 * 48)
    peaks = []
    for images in (2, 12):
        logits, labels = torch.zeros(images, 3, 8, 6, requires_grad=True), torch.zeros(images, 64, 48, dtype=torch.uint8)
        loss = PixelLoss(torch.ones(3), LABELS)
        with PeakTracker([logits, labels]) as tracker:
            loss.share(logits, labels, (1.0, 1.0)).backward()
        peaks.append(tracker.peak)
    assert peaks[1] - peaks[0] < 10 * 4 * 3 * 8 * 6 * 4  # some copies at the logits' own size


def dice_only(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    classes = logits.shape[1]
    loss = PixelLoss(torch.zeros(classes), LabelSet("c", tuple(map(str, range(classes))), ((0, 0, 0),) * classes, ()), dice=1.0)
    return loss.share(logits, labels, loss.totals(counts(labels)))


def test_dice_is_its_formula():
    logits, labels = drawn()
    labels[1] = 0
    labels[2][labels[2] == 2] = 0
    probabilities = at_labels(logits.double(), labels).softmax(1).numpy()
    dice = []
    for p, label in zip(probabilities, labels.numpy(), strict=True):
        shown, valid = set(label[label != 255].tolist()) - {0}, label != 255
        terms = [1 - (2 * p[c][label == c].sum() + 1e-3) / ((p[c][valid] ** 2).sum() + (label == c).sum() + 1e-3) for c in shown]
        dice += [np.mean(terms)] if terms else []
    assert len(dice) == 2
    assert dice_only(logits, labels).item() == pytest.approx(np.mean(dice), rel=1e-6)


def test_dice_is_that_of_sapiens2(tmp_path):
    model = build_golden2(write_segmentation2(tmp_path / "golden.safetensors"), "fp32")
    data = arrays("tensors", 2)
    with torch.no_grad():
        logits = model(data["images"])
    ours = [dice_only(logits[i : i + 1], data["label"][i : i + 1]).item() for i in range(2)]
    assert ours == pytest.approx(EXPECTED2["losses"]["fp32"]["dice_per_sample"], abs=1e-5)


def test_a_perfect_prediction_costs_nothing():
    labels = drawn()[1]
    logits = 50 * F.one_hot(labels.long().clamp(max=2), 3).movedim(-1, 1).float()
    loss = PixelLoss(torch.ones(3), LABELS, dice=1.0)
    assert loss.share(logits, labels, loss.totals(counts(labels))) < 1e-6


def test_a_strange_label_is_named():
    with pytest.raises(DataError, match=r"\[7\].*three.*0\.\.2"):
        PixelLoss(torch.ones(3), LABELS).totals(counts(torch.full((1, 2, 2), 7, dtype=torch.uint8)))


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


@pytest.mark.parametrize(("smoothing", "dice"), [(0.0, 0.0), (0.2, 1.0)])
def test_a_class_that_a_set_cannot_show_is_not_taught(smoothing, dice):
    """Its logits get no gradient from that image, and those of the others none from it."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 4, 4, generator=generator, requires_grad=True)
    labels = torch.randint(0, 2, (2, 8, 8), generator=generator, dtype=torch.uint8)
    loss = PixelLoss(torch.ones(3), LABELS, smoothing, dice)
    totals = loss.totals(counts(labels))
    labelled = torch.tensor([[True, True, True], [True, True, False]])
    value = loss.share(logits, labels, totals, labelled)
    value.backward()
    assert value < 10 and (logits.grad[0, 2] != 0).all() and (logits.grad[1, 2] == 0).all()
    two = logits.detach()[1:, :2].requires_grad_()
    PixelLoss(torch.ones(2), LabelSet("two", ("a", "b"), ((0, 0, 0),) * 2, ()), smoothing, dice).share(
        two, labels[1:], totals
    ).backward()
    assert torch.allclose(logits.grad[1, :2], two.grad[0], atol=1e-6)
