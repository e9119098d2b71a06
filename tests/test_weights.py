import pytest
import torch
from safetensors.torch import save_file

from model.segmenter import normalize
from model.trained import load_segmenter
from model.weight_files import read_weights, save_safetensors
from model.weights import load_weights
from tests.model_cases import (
    METADATA,
    PADDING,
    SIZE,
    arrays,
    build_golden,
    build_tiny,
    refused,
    write_pretraining,
    write_segmentation,
)

POS_EMBED = "backbone.pos_embed"


@pytest.fixture(scope="module")
def segmentation(tmp_path_factory):
    return write_segmentation(tmp_path_factory.mktemp("golden") / "segmentation.pth")


@pytest.fixture(scope="module")
def saved_tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny") / "tiny.safetensors"
    save_safetensors(path, build_tiny().state_dict(), METADATA)
    return path


@pytest.mark.parametrize("variant", PADDING)
@pytest.mark.parametrize(("name", "side"), [("160", 10), ("96", 6)])
def test_a_pretrained_backbone_loads_as_in_the_original(tmp_path, name, side, variant):
    data = arrays("tensors")
    model = build_golden(patch_padding=PADDING[variant])
    report = load_weights(model, write_pretraining(tmp_path / "pretrained.pth", name))
    torch.testing.assert_close(model.backbone.pos_embed.data, data[f"{name}/pos_embed"], atol=1e-5, rtol=0)
    with torch.no_grad():
        features = model.backbone(normalize(data["images"]))
    torch.testing.assert_close(features, data[f"{name}/{variant}/features"], atol=1e-4, rtol=0)

    head = {key for key in model.state_dict() if key.startswith("decode_head.")}
    assert report.resized == {POS_EMBED: f"{side}x{side} -> 8x6"}
    assert report.unused == ("backbone.cls_token",)
    assert report.reinitialised == dict.fromkeys(report.reinitialised, "not in the file") and set(report.reinitialised) == head
    assert sorted([*report.loaded, *report.resized, *head]) == sorted(model.state_dict())
    assert all(key in report.summary() for key in (*head, POS_EMBED, "backbone.cls_token"))


@pytest.mark.parametrize("grid", ["9x9", "10x7"])
def test_position_embeddings_that_the_original_cannot_load(tmp_path, grid):
    data = arrays("tensors")
    changed = {"pos_embed": data[f"{grid}/pos_embed"]} | ({"cls_token": None} if grid == "10x7" else {})
    model = build_golden()
    report = load_weights(model, write_pretraining(tmp_path / "pretrained.pth", "96", **changed))
    assert report.resized == {POS_EMBED: f"{grid} -> 8x6"}
    torch.testing.assert_close(model.backbone.pos_embed.data, data[f"{grid}/resized"], atol=1e-5, rtol=0)


def test_a_pretrained_grid_is_square_even_where_the_models_own_has_as_many_patches(tmp_path):
    path = write_pretraining(tmp_path / "square.pth", "96", pos_embed=torch.randn(1, 1 + 64, 64))
    assert load_weights(build_golden(image_size=(256, 64)), path).resized == {POS_EMBED: "8x8 -> 16x4"}


@pytest.mark.parametrize("rows", [47, 7 * 49])
def test_position_embeddings_that_form_no_grid_are_refused(tmp_path, rows):
    path = write_pretraining(tmp_path / "odd.pth", "96", pos_embed=torch.zeros(1, rows, 64), cls_token=None)
    refused(load_weights, build_golden(), path, match=f"odd.pth.*{rows} position embeddings form no grid")


def test_a_segmentation_model_loads_whole(segmentation):
    model = build_golden()
    report = load_weights(model, segmentation)
    assert set(report.loaded) == model.state_dict().keys()
    assert not (report.resized or report.reinitialised or report.unused)
    assert read_weights(segmentation).keys() == model.state_dict().keys()


def test_a_segmentation_model_loads_at_another_resolution(segmentation):
    data = arrays("tensors")
    model = build_golden(image_size=(160, 112), patch_padding=0)
    assert load_weights(model, segmentation).resized == {POS_EMBED: "8x6 -> 10x7"}
    with torch.no_grad():
        features = model.backbone(data["160x112/pixels"])
    torch.testing.assert_close(features, data["160x112/features"], atol=1e-4, rtol=0)


def test_another_number_of_classes_gets_a_new_classifier(segmentation):
    model = build_golden(num_classes=28)
    torch.nn.init.ones_(model.decode_head.conv_seg.bias)
    report = load_weights(model, segmentation)
    classifier = {"decode_head.conv_seg.weight", "decode_head.conv_seg.bias"}
    assert report.reinitialised == dict.fromkeys(classifier, "19 classes in the file, 28 in the model")
    assert set(report.loaded) == model.state_dict().keys() - classifier
    theirs = read_weights(segmentation)
    for key, value in model.state_dict().items():
        assert key in classifier or torch.equal(value, theirs[key]), key
    assert model.decode_head.conv_seg.bias.eq(0).all()


def test_a_used_head_is_really_drawn_anew(tmp_path, segmentation):
    model = build_golden()
    load_weights(model, segmentation)
    before = {key: value.clone() for key, value in model.decode_head.state_dict().items()}
    load_weights(model, write_pretraining(tmp_path / "pretrained.pth", "96"))
    assert not any(torch.equal(value, before[key]) for key, value in model.decode_head.state_dict().items())


def test_our_own_grid_comes_from_the_metadata(tmp_path):
    path = tmp_path / "wide.safetensors"
    wide = build_tiny(image_size=(96, 128))  # as many patches as 128x96, and another grid
    save_safetensors(path, wide.state_dict(), METADATA | {"image_size": [96, 128]})
    assert load_weights(build_tiny(1), path).resized == {POS_EMBED: "12x16 -> 16x12"}
    save_safetensors(path, wide.state_dict(), METADATA | {"image_size": [96, 136]})
    refused(load_weights, build_tiny(), path, match="do not fit image_size")


def test_another_patch_padding_of_our_own_is_refused(tmp_path):
    save_safetensors(tmp_path / "a.safetensors", build_tiny().state_dict(), METADATA | {"patch_padding": 0})
    refused(load_weights, build_tiny(), tmp_path / "a.safetensors", match="patch_padding 0")


def test_an_uncovered_backbone_is_refused(tmp_path, saved_tiny, segmentation):
    lost = write_pretraining(tmp_path / "lost.pth", "96", **{"layers.3.ln1.weight": None})
    refused(load_weights, build_golden(), lost, match="1 keys.*backbone.blocks.3.norm1.weight")
    refused(load_weights, build_golden(), saved_tiny, match="looks like tiny")
    refused(load_weights, build_tiny(), segmentation, match="embed_dim 64, 4 blocks, patch 16")
    state = build_tiny().state_dict()
    save_file({key: state[key] for key in state if key.startswith("decode_head.")}, tmp_path / "head.safetensors")
    refused(load_weights, build_tiny(), tmp_path / "head.safetensors", match="no vision transformer")


def test_a_deeper_backbone_is_refused(tmp_path):
    state = build_tiny().state_dict()
    save_file(state | {"backbone.blocks.4.norm1.weight": torch.zeros(128)}, tmp_path / "deep.safetensors")
    refused(load_weights, build_tiny(), tmp_path / "deep.safetensors", match="backbone.blocks.4.norm1.weight.*5 blocks")


def test_a_head_of_another_shape_or_half_a_head_is_refused(tmp_path):
    path, key = tmp_path / "head.safetensors", "decode_head.deconv_layers.3.weight"
    state = build_tiny().state_dict()
    save_file(state | {key: torch.zeros(32, 64, 1, 1)}, path)
    refused(load_weights, build_tiny(), path, match=rf"{key} has shape \(32, 64, 1, 1\)")
    save_file({name: value for name, value in state.items() if name != key}, path)
    refused(load_weights, build_tiny(), path, match=f"{key} is missing")


def test_surplus_keys_are_reported(tmp_path):
    state = build_tiny().state_dict() | {"neck.weight": torch.zeros(2)}
    save_file(state, tmp_path / "surplus.safetensors")
    report = load_weights(build_tiny(1), tmp_path / "surplus.safetensors")
    assert report.unused == ("neck.weight",)
    assert "neck.weight" in report.summary()


def test_a_saved_model_comes_back_bit_for_bit(tmp_path):
    model = build_tiny()
    metadata = METADATA | {"label_set": {"names": ["a", "b"], "flip": [[1, 2]]}, "origin": {"file": "x.pth"}}
    path = tmp_path / "new" / "model.safetensors"
    save_safetensors(path, model.state_dict(), metadata)
    assert [file.name for file in path.parent.iterdir()] == [path.name]

    again, read = load_segmenter(path)
    assert read == metadata | {"rope_precision": "bf16"}
    assert not again.training and (again.image_size, again.patch_padding, again.num_classes) == (SIZE, 2, 5)
    state = again.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    images = torch.randint(0, 256, (1, 3, *SIZE), dtype=torch.uint8)
    assert torch.equal(again(images), model(images))
    other = build_tiny(1)
    load_weights(other, path)
    assert torch.equal(other(images), model(images))


def test_metadata_that_builds_no_model_is_refused(tmp_path):
    path, state = tmp_path / "model.safetensors", build_tiny().state_dict()
    for changed, match in [
        ({"image_size": None}, "does not tell its image_size"),
        ({"patch_padding": None}, "does not tell its patch_padding"),
        ({"arch": "huge"}, "model.safetensors.*'huge' is unknown"),
        ({"image_size": [128, 100]}, "128x100"),
        ({"num_classes": 6}, "conv_seg.weight"),
        ({"image_size": [128, 128]}, "pos_embed"),
    ]:
        metadata = {key: value for key, value in (METADATA | changed).items() if value is not None}
        save_safetensors(path, state, metadata)
        refused(load_segmenter, path, match=match)
    refused(load_segmenter, path.with_suffix(".pth"), match="no such weight file")
    save_file(state, path)
    refused(load_segmenter, path, match="does not tell its image_size, patch_padding")
