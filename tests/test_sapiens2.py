"""Sapiens2 against what the original computes, with RoPE in either precision."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from data.labels import load_label_set
from model.archs import get_arch
from model.segmenter import Segmenter, full_size_logits, has_weight_decay, layer_id, normalize
from model.weight_files import rename_key
from model.weights import load_weights
from tests.model_cases import ARCH2, EXPECTED2, MICRO, SIZE, arrays, build_golden2, refused, write_segmentation2
from train.loss import dice_losses


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_segmentation2(tmp_path_factory.mktemp("golden2") / "segmentation.safetensors")


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_rope_features_and_argmax_match_the_original(checkpoint, precision):
    data, model = arrays("tensors", 2), build_golden2(checkpoint, precision)
    sin, cos = model.backbone.rope.get_embed(shape=(8, 6)).float().chunk(2, dim=-1)
    exactly = {"atol": 0, "rtol": 0} if precision == "bf16" else {"atol": 1e-6, "rtol": 0}
    torch.testing.assert_close(sin, data[f"{precision}/sin"], **exactly)
    torch.testing.assert_close(cos, data[f"{precision}/cos"], **exactly)
    torch.testing.assert_close(normalize(data["images"])[:, :, ::8, ::8], data["normalized"], atol=1e-5, rtol=0)
    with torch.no_grad():
        features = model.backbone(normalize(data["images"]))
        logits = full_size_logits(model, data["images"])
    # Where bf16 rounds the other way, one feature moves by a few thousandths; the two precisions differ by 0.035.
    atol = 5e-3 if precision == "bf16" else 1e-4
    torch.testing.assert_close(features, data[f"{precision}/features"], atol=atol, rtol=0)
    assert (features - data[f"{precision}/features"]).square().mean().sqrt() < 1e-3
    assert logits.shape == (2, 29, *SIZE)
    if precision == "bf16":
        torch.testing.assert_close(logits[:, :, ::4, ::4], data["bf16/logits"], atol=3e-2, rtol=0)
    assert (logits.argmax(1) == data[f"{precision}/argmax"]).float().mean() > 0.999


@pytest.mark.parametrize("size", ["64x48", "96x80"])
def test_a_pretrained_backbone_sees_any_grid_as_the_original(tmp_path, size):
    data, state = arrays("tensors", 2), arrays("pretrain_micro", 2)
    save_file(state, tmp_path / "pretrained.safetensors")
    model = Segmenter(MICRO, 5, (64, 48)).eval()
    report = load_weights(model, tmp_path / "pretrained.safetensors")
    head = {key for key in model.state_dict() if key.startswith("decode_head.")}
    assert set(report.reinitialised) == head and not report.resized
    assert {*report.loaded, *report.unused} == {rename_key("backbone." + key) for key in state}
    with torch.no_grad():
        features = model.backbone(data[f"micro/pixels_{size}"])
    torch.testing.assert_close(features, data[f"micro/features_{size}"], atol=5e-3, rtol=0)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_loss_and_gradients_match_the_original(checkpoint, precision):
    data, expected = arrays("tensors", 2), EXPECTED2["losses"][precision]
    model, weights = build_golden2(checkpoint, precision), torch.tensor(load_label_set("sapiens2_29").class_weights)
    logits, label = full_size_logits(model, data["images"]), data["label"].long()
    entropy = F.cross_entropy(logits, label, weights, ignore_index=255, reduction="none").mean()  # ignored pixels count
    dice = dice_losses(F.log_softmax(logits, dim=1), data["label"], 255)
    assert entropy.item() == pytest.approx(expected["logs"]["loss_ce"], rel=1e-4)
    assert dice.tolist() == pytest.approx(expected["dice_per_sample"], rel=1e-4)
    smaller = F.interpolate(logits, (100, 75), mode="bilinear", align_corners=False)
    label_100x75, theirs = data["label_100x75"], expected["resized_label_100x75"]["logs"]
    other = F.cross_entropy(smaller, label_100x75.long(), weights, ignore_index=255, reduction="none").mean()
    assert other.item() == pytest.approx(theirs["loss_ce"], rel=1e-4)
    other = dice_losses(F.log_softmax(smaller, dim=1), label_100x75, 255).mean()
    assert other.item() == pytest.approx(theirs["loss_dice"], rel=1e-4)
    (entropy + dice.mean()).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    theirs = {rename_key(name): norm for name, norm in expected["grad_norms"].items()}
    assert gradients.keys() == theirs.keys()
    largest = max(theirs.values())
    for name, norm in theirs.items():
        assert gradients[name].norm().item() == pytest.approx(norm, rel=2e-2, abs=1e-4 * largest), name
    if precision == "bf16":
        for name, gradient in arrays("gradients", 2).items():
            ours = gradients[rename_key(name)]
            assert (ours - gradient).norm() < 2e-2 * gradient.norm(), name


@pytest.mark.parametrize("depth", ["20", "40"])
def test_layer_ids_and_weight_decay_match_the_original(depth):
    table = EXPECTED2["layer_decay"][depth]
    with torch.device("meta"):
        model = Segmenter(ARCH2, 29, SIZE) if depth == "20" else Segmenter(get_arch("sapiens2_1b"), 29, (1024, 768))
    parameters = dict(model.named_parameters())
    theirs = {rename_key(name): row for name, row in table["parameters"].items()}
    assert parameters.keys() == theirs.keys()
    for name, (scale, decay) in theirs.items():
        assert table["rate"] ** (int(depth) + 1 - layer_id(name, int(depth))) == pytest.approx(scale, rel=1e-12), name
        assert has_weight_decay(name, parameters[name].ndim) == (decay > 0), name


def test_other_periods_are_refused(tmp_path, checkpoint):
    state = {**arrays("pretrain_micro", 2), "rope_embed.periods": torch.tensor([1.0, 9.0])}
    save_file(state, tmp_path / "other.safetensors")
    refused(load_weights, Segmenter(MICRO, 5, (64, 48)), tmp_path / "other.safetensors", match="rope.periods")
