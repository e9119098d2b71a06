import re

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from model import ModelError
from model.archs import ARCHS, get_arch
from model.head import SampleDropout2d
from model.segmenter import Segmenter, build_segmenter, has_weight_decay, layer_id, normalize
from model.weight_files import rename_key
from model.weights import load_weights
from tests.model_cases import ARCH, EXPECTED, EXPECTED2, PADDING, SIZE, arrays, build_golden, build_tiny, write_segmentation

IGNORE = 255


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_segmentation(tmp_path_factory.mktemp("golden") / "segmentation.pth")


@pytest.fixture(params=PADDING)
def variant(request):
    return request.param


@pytest.fixture
def golden(checkpoint, variant):
    model = build_golden(patch_padding=PADDING[variant])
    load_weights(model, checkpoint)
    return model


def draw_images(batch, seed=0):
    return torch.randint(0, 256, (batch, 3, *SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def test_normalize_matches_the_original():
    data = arrays("tensors")
    pixels = normalize(data["images"])
    assert pixels.dtype == torch.float32
    torch.testing.assert_close(pixels[:, :, ::8, ::8], data["normalized"], atol=1e-5, rtol=0)
    assert torch.equal(normalize(data["images"].bfloat16()), pixels), "bf16 holds every integer up to 255"


def test_features_logits_and_argmax_match_the_original(golden, variant):
    data = arrays("tensors")
    with torch.no_grad():
        features = golden.backbone(normalize(data["images"]))
        logits = golden(data["images"])
    torch.testing.assert_close(features, data[f"{variant}/features"], atol=1e-4, rtol=0)
    assert logits.shape == (2, 19, 64, 48)
    torch.testing.assert_close(logits[:, :, ::2, ::2], data[f"{variant}/logits"], atol=5e-4, rtol=0)
    resized = F.interpolate(logits, size=SIZE, mode="bilinear", align_corners=False)
    at_theirs = resized.gather(1, data[f"{variant}/argmax"].long()[:, None])[:, 0]
    assert torch.all(resized.amax(1) - at_theirs <= 1e-3), "another class wins by more than rounding"


def test_losses_and_gradients_match_the_original(golden, variant):
    data, expected = arrays("tensors"), EXPECTED["losses"][variant]
    logits = F.interpolate(golden(data["images"]), size=SIZE, mode="bilinear", align_corners=False)
    label = data["label"].long()
    per_pixel = F.cross_entropy(logits, label, ignore_index=IGNORE, reduction="none")
    loss = per_pixel.mean()  # the original counts ignored pixels too
    assert loss.item() == pytest.approx(expected["mean_over_all_pixels"], rel=1e-5)
    over_valid = per_pixel.sum() / (label != IGNORE).sum()
    assert over_valid.item() == pytest.approx(expected["mean_over_valid_pixels"], rel=1e-5)

    loss.backward()
    norms = {name: parameter.grad.norm().item() for name, parameter in golden.named_parameters()}
    theirs = {rename_key(name): norm for name, norm in expected["grad_norms"].items()}
    assert norms.keys() == theirs.keys()
    for name, norm in theirs.items():
        # InstanceNorm takes a bias away again: its gradient is rounding noise.
        noise = 1e-5 if re.search(r"conv_layers\.\d+\.bias", name) else 0
        assert norms[name] == pytest.approx(norm, rel=1e-3, abs=noise), name


@pytest.mark.parametrize("arch_name", ["golden", "sapiens_1b"])
def test_layer_ids_and_weight_decay_match_the_original(arch_name):
    arch = ARCH if arch_name == "golden" else get_arch(arch_name)
    with torch.device("meta"):
        model = Segmenter(arch, 19, SIZE)
    table = {rename_key(name): row for name, row in EXPECTED["layer_decay"][str(arch.depth)].items()}
    parameters = dict(model.named_parameters())
    assert parameters.keys() == table.keys()
    for name, (scale, decay) in table.items():
        assert 0.85 ** (arch.depth + 1 - layer_id(name, arch.depth)) == pytest.approx(scale, rel=1e-12), name
        assert has_weight_decay(name, parameters[name].ndim) == (decay > 0), name


@pytest.mark.parametrize(
    "name",
    ["backbone.blocks.4.norm1.weight", "backbone.layers.0.ln1.weight", "backbone.normal.weight", "head.weight", ""],
)
def test_a_parameter_of_no_layer_is_refused(name):
    with pytest.raises(ModelError, match=re.escape(repr(name))):
        layer_id(name, depth=4)


@pytest.mark.parametrize("name", sorted(ARCHS.keys() - {"tiny", "tiny2"}))
def test_parameters_and_flops_are_the_originals(name):
    if name in EXPECTED["parameters"]:
        classes, parameters, gflops = 19, EXPECTED["parameters"][name], EXPECTED["gflops"][name]
    else:
        classes, (parameters, gflops) = 29, EXPECTED2["models"][name].values()
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model = build_segmenter(name, classes, (1024, 768)).eval()
        model(torch.empty(1, 3, 1024, 768))
    parts = ("backbone", "decode_head")
    assert [sum(p.numel() for p in getattr(model, part).parameters()) for part in parts] == parameters
    counts = [sum(counter.get_flop_counts()[f"Segmenter.{part}"].values()) / 1e9 for part in parts]
    assert counts == pytest.approx(gflops, rel=1e-9)


def test_every_known_size_is_in_the_table():
    assert ARCHS.keys() == {*EXPECTED["parameters"], *EXPECTED2["models"], "tiny", "tiny2"}
    with pytest.raises(ModelError, match="sapiens_3b.*sapiens_0.3b.*tiny"):
        get_arch("sapiens_3b")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_size": (128, 100)}, "128x100.*multiples of 8"),
        ({"image_size": (0, 96)}, "0x96"),
        ({"patch_padding": 4}, "patch_padding: 4"),
        ({"patch_padding": -1}, "patch_padding: -1"),
        ({"num_classes": 1}, "num_classes: 1"),
    ],
)
def test_impossible_settings_are_refused_in_one_line(settings, message):
    with pytest.raises(ModelError, match=message) as error:
        build_segmenter(**{"arch": "tiny", "num_classes": 5, "image_size": SIZE} | settings)
    assert "\n" not in str(error.value)


def test_dropout_depends_on_the_samples_seed_alone():
    dropout = SampleDropout2d(0.25).train()
    x = torch.ones(3, 4000, 2, 2)
    seeds = torch.tensor([7, 2**62 + 1, 8])
    together = dropout(x, seeds)
    alone = torch.cat([dropout(x[:1], seeds[i : i + 1]) for i in range(3)])
    assert torch.equal(together, alone)
    assert torch.equal(dropout(x, seeds.flip(0)), together.flip(0))
    assert not torch.equal(together[0], together[2])
    assert torch.equal(together, together[:, :, :1, :1].expand_as(x)), "whole channels are dropped"
    assert set(together.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert together.mean().item() == pytest.approx(1, abs=0.02)


def test_dropout_is_off_in_eval_and_needs_seeds_in_training():
    model, images = build_tiny(), draw_images(2)
    with pytest.raises(AssertionError, match="dropout_seeds"):
        model.train()(images)
    trained = model(images, torch.tensor([1, 2]))
    model.eval()
    assert torch.equal(model(images), model(images, torch.tensor([1, 2])))
    assert not torch.equal(model(images), trained)


def test_bfloat16_rounds_the_pixels_once_and_not_the_constants():
    model, images = build_tiny().bfloat16(), draw_images(1)
    seen = []
    model.backbone.patch_embed.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    assert model(images).dtype == torch.bfloat16
    assert torch.equal(seen[0], normalize(images).bfloat16())
    assert normalize(images).dtype == torch.float32


def test_normalize_leaves_nothing_behind_after_export():
    model, images = build_tiny(), draw_images(1)
    exported = torch.export.export(model, (images,)).module()
    torch.testing.assert_close(exported(images), model(images))
