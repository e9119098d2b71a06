"""A trained model in another format. The new file is run before it gets its name: it gives the logits of the old one.

python -m model.export --weights outputs/demo/run/model.safetensors --format onnx

Weights, for programs that know the architecture:

    safetensors   our own layout, with all metadata. Converts the file of an original, too; what that doesn't tell (patch
                  padding, image size, label set, RoPE precision) is told by options. model.predict, train.evaluate and
                  load_from=F read it.
    sapiens       the original Sapiens' .pth, whose test and demo scripts load it as they load their own. Set img_size and
                  the patch's padding in their config as metadata has them.
    sapiens2      the original Sapiens2's .safetensors. A model with rope_precision fp32 needs its RoPE set to fp32 there.

    Precision and names of the tensors stay as they are in the file, so that an original's comes back bit for bit.

Programs, which need nothing of this repository:

    torchscript   model = torch.jit.load(F, map_location="cuda");  logits = model(images)
    pt2           program = torch.export.load(F);  logits = program.module()(images)
                  on a GPU: program = torch.export.passes.move_to_device_pass(program, "cuda")
    onnx          session = onnxruntime.InferenceSession(F);  [logits] = session.run(None, {"images": images})
                  beyond 2 GB the weights lie beside it, in F.data, and must stay there; RoPE in bf16 is in it as such,
                  so that the logits are the source's but for what bf16 rounds the other way, see the line printed

    images   float32 (B, 3, height, width), RGB, 0..255: the normalisation is inside. B is free; height and width are
             metadata's image_size, to which the photo is resized bilinearly. With metadata's keep_aspect it is resized to
             fit, and centred on the colour (124, 116, 104). TorchScript takes uint8 as well.
    logits   float32 (B, classes, h, w) at the head's own resolution. The mask, at the photo's:
             F.interpolate(logits, (photo_height, photo_width), mode="bilinear").argmax(1)
             With keep_aspect: first enlarge to image_size, and cut the photo's part out.

Metadata is JSON: architecture, image_size, normalization, label_set (names, colours, flip pairs), origin and licence of the
weights, step. It lies in the header of .safetensors, in meta["sapiens_seg"] of .pth, and elsewhere as "metadata.json":

    torchscript   extra = {"metadata.json": ""}; torch.jit.load(F, _extra_files=extra)
    pt2           extra = {"metadata.json": ""}; torch.export.load(F, extra_files=extra)
    onnx          session.get_modelmeta().custom_metadata_map["metadata.json"]
"""

import argparse
import hashlib
import importlib.util
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from model import ModelError
from model.backbone import ROPE_PRECISIONS
from model.programs import Run, example, write_onnx, write_pt2, write_torchscript
from model.segmenter import Segmenter
from model.trained import load_segmenter
from model.weight_files import (
    HUB,
    META,
    is_label_set,
    locate_weights,
    original_key,
    read_metadata,
    read_weights,
    save_safetensors,
)
from model.weights import PERIODS

TOLERANCE = 1e-4  # largest difference between logits of source and export
ENDINGS = {  # of the default output's name
    "safetensors": "_converted.safetensors", "sapiens": "_sapiens.pth", "sapiens2": "_sapiens2.safetensors",
    "torchscript": "_torchscript.pt", "pt2": ".pt2", "onnx": ".onnx",
}  # fmt: skip


def export(weights: str | Path, format: str, output: Path | None = None, label_set: Path | None = None, **told: Any) -> str:
    """Write `weights` (see load_segmenter, also for `told`) in another format; returns a line that tells file and difference.

    Args:
        format: a key of ENDINGS.
        output: replaced if it exists; None: beside the weights, or in the current folder for those of the hub.
        label_set: a YAML as in data/label_sets, for an original's file, which doesn't tell its own.

    Raises ModelError if the format can't hold the model, the file can't be written, or its logits differ by more than
    TOLERANCE (in ONNX with RoPE in bf16: than they would for a slightly other image); the output is then as it was.
    """
    path = locate_weights(weights)
    output = output or (Path() if str(weights).startswith(HUB) else path.parent) / (path.stem + ENDINGS[format])
    _check_output(output, path, format)
    model, metadata = load_segmenter(path, **told)
    if format in ("sapiens", "sapiens2") and model.arch.family != format:
        raise ModelError(
            f"--format {format}: {path} holds a {model.arch.name}, of the family {model.arch.family}, take another format"
        )
    metadata = _complete(metadata, model, weights, path, label_set)
    model.requires_grad_(False)
    images = example(model.image_size)
    expected, tolerance = model(images), TOLERANCE
    if format == "onnx" and model.arch.family == "sapiens2" and model.rope_precision == "bf16":
        # Another runtime adds up in another order; what lies between two numbers of bf16 is rounded the other way, and
        # the logits jump, by as much as they do for a ten-thousandth of a grey level.
        tolerance = max(TOLERANCE, 3 * float((model(images + 1e-4) - expected).abs().max()))
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as folder:
            partial = Path(folder) / output.name
            run = _write(format, model, metadata, path, partial)
            difference = compare(run, images, expected, tolerance, f"{output}: not written, for the new file")
            size = sum(file.stat().st_size for file in partial.parent.iterdir())
            _move(partial, output)
    except ModelError:
        raise
    except Exception as error:  # exporters and runtimes raise nearly anything for a model that they can't express
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{output}: cannot be written as {format} ({reason})") from error
    return f"{output}: {size / 1e6:.1f} MB, its logits differ by {difference:.1e} from those of {path} (allowed {tolerance:.1e})"


def compare(run: Run, images: Tensor, expected: Tensor, tolerance: float, who: str) -> float:
    """The largest difference between `run`'s logits and those expected. Raises ModelError if it is not within tolerance."""
    found = run(images)
    if found.shape != expected.shape or found.dtype != expected.dtype:
        raise ModelError(f"{who} gives {found.dtype} {tuple(found.shape)}, not {expected.dtype} {tuple(expected.shape)}")
    difference = float((found - expected).abs().max())
    if not difference <= tolerance:  # also if it is not a number
        raise ModelError(f"{who} gives logits that differ by {difference:.1e} from those of its source, over {tolerance:.1e}")
    return difference


def _check_output(output: Path, path: Path, format: str) -> None:
    suffix = "." + ENDINGS[format].rpartition(".")[2]
    if output.suffix != suffix:  # by which files of weights are read
        raise ModelError(f"--output {output}: must end in {suffix} for --format {format}")
    if output.is_dir() or (output.exists() and output.samefile(path)):
        raise ModelError(f"--output {output}: is {'a folder' if output.is_dir() else 'the input'}, name another file")
    needed = ("onnx", "onnxscript", "onnxruntime") if format == "onnx" else ()
    if any(importlib.util.find_spec(name) is None for name in needed):
        raise ModelError(f"--format onnx: needs other packages: pip install {' '.join(needed)}")


def _move(partial: Path, output: Path) -> None:
    """Into place, the weights that lie beside an .onnx first."""
    for file in sorted(partial.parent.iterdir(), key=lambda file: file == partial):
        with file.open("rb") as written:
            os.fsync(written.fileno())
        file.replace(output.with_name(file.name))


def _complete(metadata: dict, model: Segmenter, weights: str | Path, path: Path, label_set: Path | None) -> dict[str, Any]:
    """`metadata` with all that the model, its file and the user's label set tell."""
    is_original = "arch" not in read_metadata(path)
    if is_original:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        name = str(weights) if str(weights).startswith(HUB) else path.name
        metadata = metadata | {"origin": {"weights": name, "sha256": digest, "licence": model.arch.licence}}
    if label_set and not is_original:
        raise ModelError(f"--label-set: {path} tells its own classes; leave that out")
    if label_set:
        metadata = metadata | {"label_set": read_label_set(label_set, model.num_classes)}
    return metadata | model.describe()


def read_label_set(path: Path, num_classes: int) -> dict[str, Any]:
    """A YAML as in data/label_sets. Raises ModelError if it is not one of `num_classes` classes."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        found = [entry["id"] for entry in content["classes"] if isinstance(entry["name"], str)]
    except (OSError, UnicodeDecodeError, yaml.YAMLError, TypeError, KeyError) as error:
        raise ModelError(f"--label-set {path}: no label set, see data/label_sets ({' '.join(str(error).split())})") from None
    if not is_label_set(content):
        raise ModelError(f"--label-set {path}: colours must be [red, green, blue], 0 to 255, flip_pairs pairs of the ids")
    if found != list(range(num_classes)):
        raise ModelError(
            f"--label-set {path}: its ids must be 0..{num_classes - 1} in order, for the model has {num_classes} classes"
        )
    return content


def _write(format: str, model: Segmenter, metadata: dict, source: Path, path: Path) -> Run:
    """A new file at `path`, and the model that is read back from it."""
    programs = {"torchscript": write_torchscript, "pt2": write_pt2, "onnx": write_onnx}
    if format in programs:
        return programs[format](model, metadata, path)
    layouts = {"safetensors": _save_own, "sapiens": _save_sapiens, "sapiens2": _save_sapiens2}
    layouts[format](model, metadata, _tensors(model, source), path)
    return load_segmenter(path)[0].requires_grad_(False)


def _tensors(model: Segmenter, path: Path) -> dict[str, Tensor]:
    """The model's, in the precision of its file."""
    precisions = {key: tensor.dtype for key, tensor in read_weights(path).items()}
    return {key: tensor.to(precisions[key]) for key, tensor in model.state_dict().items()}


def _save_own(model: Segmenter, metadata: dict, state: dict[str, Tensor], path: Path) -> None:
    save_safetensors(path, state, metadata)


def _save_sapiens(model: Segmenter, metadata: dict, state: dict[str, Tensor], path: Path) -> None:
    classes = metadata.get("label_set", {}).get("classes", [])
    dataset_meta: dict[str, Any] = {"classes": tuple(entry["name"] for entry in classes)} if classes else {}
    if classes and all("color" in entry for entry in classes):
        dataset_meta["palette"] = [list(entry["color"]) for entry in classes]
    state = {original_key(key, "sapiens"): tensor for key, tensor in state.items()}
    torch.save({"state_dict": state, "meta": {"dataset_meta": dataset_meta, META: metadata}}, path)


def _save_sapiens2(model: Segmenter, metadata: dict, state: dict[str, Tensor], path: Path) -> None:
    # The original loads its RoPE's periods from the file, in that precision.
    precision = torch.bfloat16 if model.rope_precision == "bf16" else torch.float32
    state = state | {PERIODS: model.backbone.rope.periods.to(precision)}
    save_safetensors(path, {original_key(key, "sapiens2"): tensor for key, tensor in state.items()}, metadata)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", required=True, help="a trained model: our own file, an original's, or hf-hub:OWNER/NAME")
    parser.add_argument("--format", required=True, choices=ENDINGS)
    parser.add_argument("--output", type=Path, help="default: beside the weights, named after them and the format")
    told = parser.add_argument_group("for files of the originals, which don't tell")
    told.add_argument("--patch-padding", type=int, metavar="N", help="Sapiens: 0 for face and Goliath, 2 for LIP and CIHP")
    told.add_argument("--image-size", type=int, nargs=2, metavar=("H", "W"), help="where it isn't 1024 768")
    told.add_argument("--label-set", type=Path, metavar="FILE", help="the classes: a YAML as in data/label_sets")
    told.add_argument("--rope-precision", choices=ROPE_PRECISIONS, help="Sapiens2; its own is bf16")
    args = {key: value for key, value in vars(parser.parse_args(arguments)).items() if value is not None}
    print(export(**args))


if __name__ == "__main__":
    try:
        main()
    except (ModelError, OSError) as error:
        sys.exit(f"error: {error}")
