"""Trained models in every format, run in the runtime of each."""

import hashlib
import json
import os
import resource
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
import yaml
from safetensors import safe_open
from torch import Tensor

from model.archs import ARCHS, Arch
from model.backbone import GroupedAttention
from model.export import ENDINGS, compare, export, main
from model.programs import write_pt2, write_torchscript
from model.segmenter import Segmenter
from model.trained import load_segmenter
from model.weight_files import META, read_metadata, read_weights, save_safetensors
from tests.conftest import ROOT, experiment, python, recorded_runs
from tests.model_cases import ARCH, ARCH2, SIZE, build_tiny, images, refused, write_segmentation, write_segmentation2

LABELS = ROOT / "data" / "label_sets" / "face19.yaml"


def runtime(path: Path, format: str) -> tuple[Callable[[Tensor], Tensor], dict]:
    """A file as its users load it, and its metadata."""
    extra = {"metadata.json": ""}
    if format == "torchscript":
        return torch.jit.load(path, _extra_files=extra), json.loads(extra["metadata.json"])
    if format == "pt2":
        return torch.export.load(path, extra_files=extra).module(), json.loads(extra["metadata.json"])
    if format == "onnx":
        session = onnxruntime.InferenceSession(path)
        metadata = session.get_modelmeta().custom_metadata_map["metadata.json"]
        return lambda x: torch.from_numpy(session.run(None, {"images": x.numpy()})[0]), json.loads(metadata)
    return load_segmenter(path)


@pytest.fixture(scope="module", params=["tiny", "tiny2"])
def trained(request, shards, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    job = experiment(shards, folder / "run", "schedule.steps=3", f"model.arch={request.param}")
    run = recorded_runs({request.param: job}, folder, processes=1)[request.param]
    return run.folder / "model.safetensors"


@pytest.mark.parametrize("format", ENDINGS)
@torch.no_grad()
def test_every_format_gives_the_logits_of_the_engine_that_trained(trained, format):
    model, source = load_segmenter(trained)
    if format in ("sapiens", "sapiens2") and model.arch.family != format:
        refused(export, trained, format, match=f"--format {format}: .*holds a {model.arch.name}")
        return
    path = trained.with_name(f"model{ENDINGS[format]}")
    line = export(trained, format)
    assert line.startswith(f"{path}: ") and "differ by" in line
    run, metadata = runtime(path, format)
    engines = torch.load(trained.with_name("logits.pt"))
    assert (run(images(3).float()) - engines).abs().max() <= 1e-4 < engines.std()
    assert (run(images(1).float()) - model(images(1))).abs().max() <= 1e-4
    assert len(source["label_set"]["flip_pairs"]) == 3 and source["step"] == 3
    assert json.loads(json.dumps(metadata)) == source | model.describe()
    assert str(ROOT).encode() not in path.read_bytes()
    if format == "torchscript":  # else it could not be moved to a GPU
        assert 'value="cpu"' not in str(run.inlined_graph)
    assert not [file for file in trained.parent.iterdir() if file.name.startswith(".")]


@pytest.mark.parametrize("write", [write_torchscript, write_pt2])  # ONNX is made of the latter
@torch.no_grad()
def test_grouped_queries_go_into_a_program(write, tmp_path):
    torch.manual_seed(0)
    model = Segmenter(Arch("grouped", "sapiens2", 32, 17, 4, 8, (8,), (8,), "vit_base_patch16_sapiens2"), 5, SIZE).eval()
    assert isinstance(model.backbone.blocks[8].attn, GroupedAttention)
    photo = images(1, SIZE).float()
    run, expected = write(model, {}, tmp_path / "model.pt2"), model(photo)
    assert (run(photo) - expected).abs().max() <= 1e-4 * expected.abs().max()


def build_rounding() -> tuple[Arch, Segmenter]:
    """A Sapiens2 whose logits tell in which precision RoPE was computed."""
    arch = Arch("rounding", "sapiens2", 64, 2, 4, 8, (16,), (16,), "vit_base_patch16_sapiens2")
    torch.manual_seed(0)
    model = Segmenter(arch, 5, (32, 24)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gamma" in name:
                parameter.fill_(1)
            elif "q_proj" in name or "k_proj" in name:
                parameter.mul_(10)
        model.decode_head.conv_seg.weight.mul_(100)
    return arch, model


@torch.no_grad()
def test_onnx_rounds_as_the_rope_of_sapiens2_does(tmp_path, monkeypatch):
    arch, model = build_rounding()
    monkeypatch.setitem(ARCHS, arch.name, arch)
    save_safetensors(tmp_path / "model.safetensors", model.state_dict(), model.describe())
    export(tmp_path / "model.safetensors", "onnx")
    exact = Segmenter(arch, 5, (32, 24), rope_precision="fp32").eval()
    exact.load_state_dict(model.state_dict())
    run, _ = runtime(tmp_path / "model.onnx", "onnx")
    expected = model(images(3))
    assert (run(images(3).float()) - expected).abs().max() < 0.1 * (exact(images(3)) - expected).abs().max()
    onnx.checker.check_model(tmp_path / "model.onnx", full_check=True)


@pytest.mark.parametrize("family", ["sapiens", "sapiens2"])
def test_an_originals_file_comes_back_bit_for_bit(tmp_path, monkeypatch, family):
    arch, write, name = {
        "sapiens": (ARCH, write_segmentation, "face.pth"),
        "sapiens2": (ARCH2, write_segmentation2, "body.safetensors"),
    }[family]
    monkeypatch.setitem(ARCHS, arch.name, arch)
    original = write(tmp_path / name)
    labels = LABELS if family == "sapiens" else LABELS.with_name("sapiens2_29.yaml")
    told = {"patch_padding": 2} if family == "sapiens" else {}
    ours = tmp_path / "ours.safetensors"
    export(original, "safetensors", ours, labels, image_size=list(SIZE), **told)
    export(ours, family, tmp_path / f"again{original.suffix}")
    before, after = stored(original), stored(tmp_path / f"again{original.suffix}")
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert after[key].dtype == tensor.dtype and torch.equal(after[key], tensor), key

    metadata = read_metadata(tmp_path / f"again{original.suffix}")
    assert metadata == read_metadata(ours)
    digest = hashlib.sha256(original.read_bytes()).hexdigest()
    assert metadata["origin"] == {"weights": name, "sha256": digest, "licence": arch.licence} and arch.licence
    assert metadata["label_set"] == yaml.safe_load(labels.read_text()) and metadata["image_size"] == list(SIZE)
    assert metadata["arch"] == arch.name and metadata["patch_padding"] == told.get("patch_padding", 0)
    if family == "sapiens":
        meta = torch.load(tmp_path / "again.pth", weights_only=True)["meta"]
        assert meta["dataset_meta"]["classes"][:2] == ("Background", "Skin")
        assert meta["dataset_meta"]["palette"][1] == [128, 200, 255] and meta[META] == metadata


def stored(path: Path) -> dict[str, Tensor]:
    """An original's tensors as they lie in the file."""
    if path.suffix == ".pth":
        return torch.load(path, weights_only=True)["state_dict"]
    with safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}


@pytest.fixture
def tiny(tmp_path) -> Path:
    model = build_tiny(image_size=(32, 24))
    save_safetensors(tmp_path / "tiny.safetensors", model.state_dict(), model.describe())
    return tmp_path / "tiny.safetensors"


def test_half_precision_stays_what_it_is(tmp_path, tiny):
    state = {key: tensor.half() for key, tensor in read_weights(tiny).items()}
    save_safetensors(tmp_path / "half.safetensors", state, read_metadata(tiny))
    export(tmp_path / "half.safetensors", "sapiens")
    again = read_weights(tmp_path / "half_sapiens.pth")
    assert all(torch.equal(again[key], tensor) and again[key].dtype == torch.half for key, tensor in state.items())


def test_torchscript_takes_bytes_and_refuses_other_sizes(tmp_path, tiny):
    export(tiny, "torchscript")
    run = torch.jit.load(tmp_path / "tiny_torchscript.pt")
    assert torch.equal(run(images(2)), run(images(2).float()))
    for size in ((24, 32), (64, 48)):  # the first has as many patches
        with pytest.raises(RuntimeError, match="must match the existing size"):
            run(images(1, size))


@pytest.mark.parametrize("format", ["safetensors", "sapiens", "torchscript", "pt2"])
def test_an_export_that_cannot_be_written_leaves_the_old_file(tmp_path, tiny, format):
    output = tmp_path / "out" / f"model{Path('x' + ENDINGS[format]).suffix}"
    output.parent.mkdir()
    output.write_text("old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # as a disk that fills up
    try:
        refused(export, tiny, format, output, match=f"{output}: cannot be written as {format}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(output.parent) == [output.name] and output.read_text() == "old"


def test_an_export_with_other_logits_is_not_written(tmp_path, tiny):
    state = read_weights(tiny)
    state["decode_head.conv_seg.bias"][0] = torch.nan
    save_safetensors(tmp_path / "broken.safetensors", state, read_metadata(tiny))
    message = refused(export, tmp_path / "broken.safetensors", "torchscript", match="not written.*differ by nan")
    assert str(tmp_path / "broken_torchscript.pt") in message
    assert sorted(os.listdir(tmp_path)) == ["broken.safetensors", "tiny.safetensors"]


@torch.no_grad()
def test_compare_tells_the_difference(tiny):
    model, _ = load_segmenter(tiny)
    expected = model(images(2))
    assert compare(model, images(2), expected, 0, "it") == 0
    model.decode_head.conv_seg.bias[3] += 0.25
    assert compare(model, images(2), expected, 0.3, "it") == pytest.approx(0.25)
    refused(compare, model, images(2), expected, 1e-4, "it", match="it gives logits that differ by 2.5e-01 .*over 1.0e-04")
    refused(compare, model, images(1), expected, 1e-4, "it", match=r"\(1, 5, 32, 24\), not .*\(2, 5, 32, 24\)")


def test_the_command_converts_an_originals_file(tmp_path, capsys):
    torch.manual_seed(0)
    model = Segmenter(ARCHS["tiny"], 19, (32, 24), 0).eval()
    save_safetensors(tmp_path / "own.safetensors", model.state_dict(), model.describe())
    export(tmp_path / "own.safetensors", "sapiens", tmp_path / "own.pth")
    state = torch.load(tmp_path / "own.pth", weights_only=True)["state_dict"]
    torch.save({"state_dict": state, "meta": {}}, tmp_path / "face.pth")
    command = ["--weights", tmp_path / "face.pth", "--format", "safetensors", "--patch-padding", 0]
    main([str(word) for word in [*command, "--image-size", 32, 24, "--label-set", LABELS]])
    printed = capsys.readouterr().out
    assert printed.startswith(f"{tmp_path / 'face_converted.safetensors'}: ") and "differ by 0.0e+00" in printed
    converted, metadata = load_segmenter(tmp_path / "face_converted.safetensors")
    assert converted.image_size == (32, 24) and converted.patch_padding == 0
    assert metadata["label_set"]["flip_pairs"] == [[3, 4], [5, 6], [7, 8]] and metadata["origin"]["weights"] == "face.pth"

    done = python("-m", "model.export", *command, "--output", tmp_path / "again.safetensors")
    assert done.returncode == 1 and done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1
    assert "does not tell its image_size" in done.stderr and not (tmp_path / "again.safetensors").exists()


def test_what_cannot_be_is_refused(tmp_path, tiny, monkeypatch):
    def command(format: str, *more: object, match: str) -> None:
        refused(main, ["--weights", str(tiny), "--format", format, *map(str, more)], match=match)

    command("sapiens2", match="--format sapiens2: .*holds a tiny, of the family sapiens")
    command("onnx", "--output", tmp_path / "model.pt", match="must end in .onnx")
    command("safetensors", "--output", tiny, match="is the input, name another")
    (tmp_path / "folder.onnx").mkdir()
    command("onnx", "--output", tmp_path / "folder.onnx", match="is a folder")
    (tmp_path / "file").touch()
    command("safetensors", "--output", tmp_path / "file" / "model.safetensors", match="cannot be written")
    command("sapiens", "--patch-padding", 0, match="says patch_padding 2, not 0")
    command("sapiens", "--label-set", LABELS, match="tells its own classes")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # as if it were not installed
    command("onnx", match="pip install onnx onnxscript onnxruntime")

    monkeypatch.undo()
    state = {f"backbone.{key}" if "." not in key else key: tensor for key, tensor in read_weights(tiny).items()}
    torch.save(state, tmp_path / "original.pth")
    told = {"patch_padding": 2, "image_size": [32, 24]}
    labels = tmp_path / "labels.yaml"
    command = partial(export, tmp_path / "original.pth", "safetensors", None, labels, **told)
    refused(command, match="labels.yaml: .*No such file")
    for content in (LABELS.read_text(), "- a\n", "classes: [{id: 0}]", "a: [", "classes: 3"):
        labels.write_text(content)
        refused(command, match="--label-set .*labels.yaml: ")
