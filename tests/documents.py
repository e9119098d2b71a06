"""README.md and docs/*.md as a reader takes them: what they tell to run, and a small copy of the repository to run it in.

There the recipes are tiny, and what the pages name (a data set, photos, pre-trained weights) is drawn.
"""

import csv
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import cv2
import numpy as np
import torch
import yaml

from data.synthetic import write_dataset
from model.segmenter import build_segmenter
from model.weight_files import original_key
from tests.conftest import PATIENCE, ROOT, train_environment

README = "README.md"
PAGES = [README, *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
# Commands of the pages that are not run, and why. Those of `make` build an environment or run for minutes.
NOT_RUN = {
    "make demo": "its commands are those of README's steps; trains for 7 minutes",
    "make demo DATA_ROOT=/path/to/dataset_100000": "as above",
    "make test": "this is one of its tests",
}
# How a command, {}, is run here instead, to be done in seconds or because it reads a model of another size.
INSTEAD = {
    # No argument makes these quick: they measure in many rounds, or train twice.
    "python -m benchmarks.data_pipeline": "{} --help",
    "python -m benchmarks.packing": "{} --help",
    "python -m benchmarks.checkpoints": "{} --help",
    "python -m benchmarks.layer_decay": "{} --help",
    "python -m benchmarks.real_faces /path/to/dataset_100 schedule.steps=1900": "{} --help",
    "python benchmarks/flip_pairs.py": "mode=debug {} schedule.steps=2",  # trains in one process, which starts sooner
    "python -m train.benchmark --config train/configs/demo.yaml --synthetic-data --compare plain": "{} --steps 1 --warm-up 1",
    "benchmarks/gpu.sh": "{} --help",  # tests/test_benchmark.py runs it
    "python -m benchmarks.recomputation": "{} --arch tiny --size 64 32",
    "python -m benchmarks.memory": "{} --archs tiny tiny2 --size 64 32",
    "python -m benchmarks.memory --measure": "{} --precision fp32 --archs tiny --size 64 32 --modes blocks --batches 2",
    "python -m benchmarks.optimisations": "{} --help",  # benchmarks/gpu.sh runs it
    "python -m benchmarks.losses --data shards/face/train": "{} --steps 2 --only ours --only on_device",
    "python -m train.doctor --config train/configs/face_1b.yaml load_from=sapiens_1b_epoch_173_clean.pth "
    "--gpus 8 --gpu-memory 80": "{} micro_batch_size=2",
    "python -m train.doctor --config train/configs/face_1b.yaml --gpus 8 --gpu-memory 24": "{} micro_batch_size=2",
    "python -m model.export --weights sapiens_1b_goliath.pth --patch-padding 0 --label-set data/label_sets/goliath28.yaml "
    "--format safetensors": "{} --image-size 32 24",
}
SIZE = (32, 24)
# Of each recipe where it says them itself; all else is its own.
SHRUNK = {
    "model.image_size": list(SIZE), "global_batch_size": 16, "micro_batch_size": 8, "schedule.epochs": 1, "schedule.steps": 2,
    "schedule.warmup_steps": 1, "data.workers": 0,
}  # fmt: skip
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: str) -> list[tuple[str, str]]:
    """(language, content) of each fenced block."""
    return FENCE.findall((ROOT / page).read_text())


def prose(page: str) -> str:
    """A page without its fenced blocks."""
    return FENCE.sub("", (ROOT / page).read_text())


def commands(page: str) -> list[str]:
    """What is to be run, in its order: each command of the bash blocks without its comments, and each Python block as one."""
    found: list[str] = []
    for language, content in blocks(page):
        if language == "bash":
            found += split(content, page)
        elif language == "python":
            found.append(f"python - <<'PYTHON'\n{content}PYTHON")
    return found


def split(script: str, page: str) -> list[str]:
    """The commands of a script; bash tells where one ends, be it over several lines or with a here-document."""
    found, lines = [], []
    for line in script.splitlines():
        if not lines and (not line.strip() or line.startswith("#")):
            continue
        lines.append(line)
        text = "\n".join(lines)
        checked = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True)
        if not line.endswith("\\") and not checked.returncode and not checked.stderr:
            joined = re.sub(r"\s*\\\n\s*", " ", text)
            found.append(joined if "\n" in joined else re.sub(r"\s+# .*", "", joined))
            lines = []
    assert not lines, f"{page}: bash finds no end of {lines}"
    return found


def make_world(folder: Path) -> None:
    """This repository at `folder`, in small, and beside its files those that the pages take for a reader's."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, check=True
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file() and not name.startswith("tests/"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    for path in (folder / "train/configs").glob("*.yaml"):
        path.write_text(yaml.safe_dump(shrink(yaml.safe_load(path.read_text()))))
    for name in ("dataset_100000", "dataset_100"):
        write_dataset(folder / "path/to" / name, count=40, seed=5, size=64)
    for part in ("train", "val"):
        draw_pairs(folder / f"LIP/images/{part}_images", folder / f"LIP/segmentations/{part}_segmentations", 20)
    draw_pairs(folder / "my_photos/images", folder / "my_photos/masks", 3)
    with (folder / "list.csv").open("w") as file:
        rows = [(image.relative_to(folder), f"my_photos/masks/{image.stem}.png") for image in folder.glob("my_photos/images/*")]
        csv.writer(file).writerows([("image", "mask"), *rows])
    (folder / "photos").mkdir()
    shutil.copy(next(folder.glob("my_photos/images/*")), folder / "photos/one.jpg")
    write_weights(folder)


def shrink(recipe: dict) -> dict:
    arch = recipe.get("model", {}).get("arch", "")
    for key, value in {**SHRUNK, "model.arch": "tiny2" if arch.startswith("sapiens2") else "tiny"}.items():
        *section, name = key.split(".")
        place = recipe.get(section[0], {}) if section else recipe
        if name in place:
            place[name] = value
    return recipe if "base" in recipe else recipe | {"wandb": {"mode": "disabled"}}


def draw_pairs(images: Path, masks: Path, classes: int) -> None:
    """40 noisy photos of 60x40 pixels, whose masks are patches of the classes."""
    images.mkdir(parents=True), masks.mkdir(parents=True)
    for i in range(40):
        rng = np.random.default_rng(i)
        mask = rng.integers(0, classes, (6, 4), np.uint8).repeat(10, axis=0).repeat(10, axis=1)
        cv2.imwrite(str(images / f"{i}.jpg"), rng.integers(0, 256, (*mask.shape, 3), np.uint8))
        cv2.imwrite(str(masks / f"{i}.png"), mask)


def write_weights(folder: Path) -> None:
    """Meta's files, of the tiny architecture: two that were pre-trained and one that segments."""
    torch.manual_seed(0)
    model = build_segmenter("tiny", 28, SIZE, 0)
    state = {original_key(key, "sapiens"): tensor for key, tensor in model.state_dict().items()}
    torch.save({"state_dict": state, "meta": {}}, folder / "sapiens_1b_goliath.pth")
    backbone = {key.removeprefix("backbone."): tensor for key, tensor in state.items() if key.startswith("backbone.")}
    for name in ("sapiens_1b_epoch_173_clean.pth", "sapiens_0.3b_epoch_1600_clean.pth"):
        torch.save(backbone, folder / name)


def literal(command: str, folder: Path) -> str:
    """What is run in the copy at `folder`."""
    return INSTEAD.get(command, "{}").replace("{}", command).replace("/path/to/", f"{folder}/path/to/")


def run(command: list[str], folder: Path, **environment: str) -> tuple[int | None, str]:
    """Exit code (None: it was late, and ended with all that it started) and output."""
    # The commands' `python` is this one. One thread each: as many as cores would wait for each other.
    everything = {**train_environment(), "OMP_NUM_THREADS": "1", **environment}
    everything["PATH"] = f"{Path(sys.executable).parent}:{everything['PATH']}"
    output = folder / "printed.txt"
    with output.open("w") as printed:  # not a pipe, which what is left of the command would hold open
        process = subprocess.Popen(
            command, cwd=folder, env=everything, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=printed, stderr=printed,
        )  # fmt: skip
    try:
        return process.wait(PATIENCE), output.read_text()
    except subprocess.TimeoutExpired:
        return None, output.read_text()
    finally:  # also when pytest's own time is over
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
