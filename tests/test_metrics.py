import json

import numpy as np
import pytest
import torch

from tests.model_cases import FIXTURES, arrays
from train.metrics import ConfusionMatrix

GOLDEN = json.loads((FIXTURES / "golden_v1" / "metric.json").read_text())


def numbers(values):
    return np.array([np.nan if value is None else value for value in values], np.float64)


@pytest.mark.parametrize("case", GOLDEN)
def test_equals_the_original_metric(case):
    expected, maps = GOLDEN[case], arrays("metric")
    matrix = ConfusionMatrix(19, 255)
    for prediction, label in zip(maps[f"{case}/pred"], maps[f"{case}/label"], strict=True):
        matrix.update(prediction, label)
    scores = matrix.scores()
    assert np.array_equal(scores.intersection, expected["area_intersect"])
    assert np.array_equal(scores.predicted, expected["area_pred"])
    assert np.array_equal(scores.true, expected["area_label"])
    assert np.allclose(scores.iou, numbers(expected["unrounded"]["IoU"]), atol=1e-6, equal_nan=True)
    assert np.allclose(scores.accuracy, numbers(expected["unrounded"]["Acc"]), atol=1e-6, equal_nan=True)
    assert scores.miou == pytest.approx(expected["mIoU"], abs=1e-6)
    assert scores.mean_accuracy == pytest.approx(expected["mAcc"], abs=1e-6)
    assert scores.pixel_accuracy == pytest.approx(expected["aAcc"], abs=1e-6)


def test_an_absent_class_is_no_zero():
    matrix = ConfusionMatrix(3, 255)
    matrix.update(torch.tensor([0, 1, 1]), torch.tensor([0, 1, 255]))
    scores = matrix.scores()
    assert np.isnan(scores.iou[2]) and scores.miou == 1.0
    assert "-" in scores.table(("a", "b", "c")).splitlines()[-1]


def test_counts_beyond_what_floats_hold():
    matrix = ConfusionMatrix(2, 255)
    matrix.counts[0, 0] = 2**53
    matrix.update(torch.zeros(1, dtype=torch.uint8), torch.zeros(1, dtype=torch.uint8))
    assert matrix.scores().intersection[0] == 2**53 + 1
