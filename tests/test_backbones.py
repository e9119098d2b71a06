"""What the backbones have beyond the originals: other sizes, stochastic depth, any plain vision transformer of timm's."""

from copy import deepcopy

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import AttentionRope

from model.archs import Arch, get_arch
from model.backbone import GroupedAttention
from model.recompute import kept_bytes, recompute
from model.segmenter import Segmenter, build_segmenter, full_size_logits, layer_id, normalize
from model.weight_files import save_safetensors
from model.weights import load_weights
from tests.model_cases import SIZE, arrays, build_golden, refused, write_segmentation

ARCHS = ("tiny", "tiny2", "timm:vit_tiny_patch16_224")
GROUPED = Arch("grouped", "sapiens2", 96, 18, 4, 8, (16, 16, 16), (16,), "vit_base_patch16_sapiens2")


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    return {name: build_segmenter(name, 5, (64, 48)).eval() for name in ARCHS}


def draw(*shape, seed=0):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("size", "padding"), [("160x112", 0), ("120x90", 0)])
def test_run_time_sizes_match_the_original(tmp_path, size, padding):
    """A larger grid, and an image that isn't whole patches, which the original fills up at its bottom and right corner."""
    data, model = arrays("tensors"), build_golden(patch_padding=padding)
    load_weights(model, write_segmentation(tmp_path / "a.pth"))
    pixels = data[f"{size}/pixels"]
    filled = F.pad(pixels, (0, -pixels.shape[3] % 16, 0, -pixels.shape[2] % 16))
    with torch.no_grad():
        torch.testing.assert_close(model.backbone(filled), data[f"{size}/features"], atol=1e-4, rtol=0)


def test_images_are_filled_up_with_the_mean_colour(models):
    model, image = models["tiny"], draw(1, 3, 60, 45)
    mean = F.pad(normalize(image), (0, 3, 0, 4))
    with torch.no_grad():
        expected = model.decode_head(model.backbone(mean))
        assert torch.equal(model(image), expected)
        full = F.interpolate(expected, (64, 48), mode="bilinear", align_corners=False)[:, :, :60, :45]
        assert torch.equal(full_size_logits(model, image), full)


@settings(max_examples=12)
@given(name=st.sampled_from(ARCHS), height=st.integers(9, 90), width=st.integers(9, 90))
def test_any_size_goes_in_and_comes_out(models, name, height, width):
    with torch.no_grad():
        logits = full_size_logits(models[name], draw(1, 3, height, width))
    assert logits.shape == (1, 5, height, width) and logits.isfinite().all()


@pytest.mark.parametrize("name", ARCHS)
def test_every_parameter_learns_and_has_a_layer(name):
    model = build_segmenter(name, 5, (64, 48), drop_path=0.3).train()
    recompute(model, "blocks")
    model(draw(2, 3, 64, 48), torch.tensor([1, 2])).square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    layers = {layer_id(key, model.arch.depth) for key, _ in model.named_parameters()}
    assert layers == set(range(model.arch.depth + 2))


@pytest.mark.parametrize("name", [*ARCHS, "grouped"])
def test_attention_holds_no_scores(models, name):
    """Tokens x tokens of each head and image, if it were not one kernel."""
    model = Segmenter(GROUPED, 5, SIZE).eval() if name == "grouped" else models[name]
    with torch.no_grad(), torch.profiler.profile() as profiler:
        model(draw(1, 3, 64, 48))
    operators = {event.key for event in profiler.key_averages()}
    assert "aten::scaled_dot_product_attention" in operators and not any("softmax" in operator for operator in operators)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_queries_are_those_of_repeated_keys(precision, dtype):
    torch.manual_seed(0)
    ours = Segmenter(GROUPED, 5, SIZE, rope_precision=precision).to(dtype).eval()
    timms = deepcopy(ours)
    grouped = [block.attn for block in timms.backbone.blocks if isinstance(block.attn, GroupedAttention)]
    assert len(grouped) == 2  # all but the first and last eight
    for attention in grouped:
        attention.__class__ = AttentionRope
    images, outputs = draw(2, 3, *SIZE), []
    if dtype == torch.bfloat16:  # in fp32 on a GPU they are repeated
        assert kept_bytes(ours, images, torch.arange(2)) < kept_bytes(timms, images, torch.arange(2))
    for model in (ours, timms):
        outputs.append(model(images))
        outputs[-1].float().square().sum().backward()
    assert torch.equal(*outputs)
    for (name, one), other in zip(ours.named_parameters(), timms.parameters(), strict=True):
        if one.ndim > 1:  # of the others some are rounding noise
            rounding = 1e-5 if (dtype, precision) == (torch.float32, "fp32") else 2e-2
            assert (one.grad - other.grad).abs().max() <= rounding * other.grad.abs().max(), name


def test_nothing_in_training_is_drawn_from_the_running_state():
    """timm's RoPE would move its grid."""
    model = build_segmenter("tiny2", 5, SIZE, rope_precision="fp32", dropout=0.1, drop_path=0.1).train()
    images, seeds = draw(2, 3, *SIZE), torch.arange(2)
    assert torch.equal(model(images, seeds), model(images, seeds))
    pixels, size = normalize(images), {"embed_dim": 96, "depth": 1, "num_heads": 3, "num_kv_heads": 3}
    timms = timm.create_model("vit_base_patch16_sapiens2", num_classes=0, dynamic_img_size=True, **size).train()
    assert not torch.equal(timms(pixels), timms(pixels))  # else this test could not fail


@pytest.mark.parametrize("name", ["tiny", "tiny2"])
def test_stochastic_depth_depends_on_the_sample_alone(name):
    torch.manual_seed(0)
    model, images = build_segmenter(name, 5, SIZE, dropout=0, drop_path=0.5).train(), draw(3, 3, *SIZE)
    seeds = torch.tensor([5, 2**62 + 1, 6])
    with torch.no_grad():
        together = model(images, seeds)
        alone = torch.cat([model(images[i : i + 1], seeds[i : i + 1]) for i in range(3)])
        other = model(images, seeds + 1)
        model.eval()
        everything = model(images)
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    assert all(not torch.allclose(together[i], other[i], atol=1e-3) or torch.equal(together[i], other[i]) for i in range(3))
    assert not torch.allclose(together, other, atol=1e-3) and not torch.allclose(together, everything, atol=1e-3)


def test_stochastic_depth_drops_as_often_as_its_rate_says():
    model = build_segmenter("tiny", 5, (32, 24), dropout=0, drop_path=0.4).train()
    rates = {name: module.rate for name, module in model.named_modules() if hasattr(module, "rate")}
    assert rates == pytest.approx({f"backbone.blocks.{i}.drop_path{j}": 0.4 * i / 3 for i in (1, 2, 3) for j in (1, 2)})
    with torch.no_grad():
        model(draw(1, 3, 32, 24).expand(600, -1, -1, -1), torch.arange(600))
    for name, rate in rates.items():
        keep = model.get_submodule(name).keep
        assert set(keep.unique().tolist()) <= {0.0, torch.tensor(1 / (1 - rate)).item()}
        assert (keep == 0).float().mean().item() == pytest.approx(rate, abs=0.07)


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "resnet18", "beit_base_patch16_224", "vit_nonsense"])
def test_what_is_no_plain_vision_transformer_is_refused(name):
    refused(get_arch, f"timm:{name}", match="arch: ")


def test_timms_sapiens2_is_ours_with_rope_in_fp32(tmp_path):
    theirs = timm.create_model(
        "vit_base_patch16_sapiens2", num_classes=0, patch_size=8, embed_dim=96, depth=4, num_heads=3, num_kv_heads=3,
        global_pool="",
    ).eval()  # fmt: skip
    save_safetensors(tmp_path / "timm.safetensors", theirs.state_dict(), {})
    model = build_segmenter("tiny2", 5, (64, 48), rope_precision="fp32").eval()
    report = load_weights(model, tmp_path / "timm.safetensors")
    assert not report.unused and all(key.startswith("decode_head.") for key in report.reinitialised)
    pixels = torch.randn(2, 3, 64, 48)
    with torch.no_grad():
        features = theirs.forward_intermediates(pixels, indices=1, norm=True, intermediates_only=True)[0]
        assert torch.equal(model.backbone(pixels), features)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch16_dinov3"])
def test_timms_own_weights_load_and_their_positions_are_resized(tmp_path, name):
    theirs = timm.create_model(name, num_classes=7)
    save_safetensors(tmp_path / "timm.safetensors", theirs.state_dict(), {})
    model = Segmenter(get_arch(f"timm:{name}"), 5, (64, 48)).eval()
    report = load_weights(model, tmp_path / "timm.safetensors")
    learned = theirs.pos_embed is not None
    assert set(report.resized) == ({"backbone.pos_embed"} if learned else set())
    assert {key for key in report.unused if "head" not in key} == set()
    assert all(key.startswith("decode_head.") for key in report.reinitialised)
    state = model.state_dict()
    for key, value in theirs.state_dict().items():
        if f"backbone.{key}" in state and key != "pos_embed":
            assert torch.equal(state[f"backbone.{key}"], value), key
    if learned:  # the class token's row is no part of the grid
        assert torch.equal(state["backbone.pos_embed"][:, 0], theirs.pos_embed[:, 0])
