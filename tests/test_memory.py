"""What train.memory tells beforehand, beside what real runs keep."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from data.labels import load_label_set
from model.recompute import recompute
from model.segmenter import build_segmenter
from tests.conftest import PATIENCE, ROOT, experiment, recorded_runs, train_environment, zero
from train import deepspeed_config
from train.config import load_config
from train.loss import PixelLoss
from train.memory import Estimate, PeakTracker
from train.optim import freeze

FACE = load_label_set("face19")
SMALL_BUCKET, LARGE_BUCKET = 20_000, 700_000  # elements: the model has 579 thousand
# ZeRO stage, precision, elements of a bucket, processes, side of the images in pixels: the smaller, the less of the peak are
# activations.
CASES = [
    *((stage, "bf16", SMALL_BUCKET, 2, 64) for stage in ("0", "1", "2", "2_offload", "3", "3_offload")),
    *((stage, "bf16", LARGE_BUCKET, 2, 16) for stage in ("2", "3")),
    *((stage, "bf16", LARGE_BUCKET, 1, 16) for stage in ("1", "3")),
    *((stage, "fp32", LARGE_BUCKET, 2, 16) for stage in ("2", "3")),
]  # fmt: skip
Case = tuple[str, str, int, int, int]


def settings_of(stage: str, bucket: int, folder) -> str:
    """As shipped, but for the bucket."""
    path = folder / f"zero{stage}_{bucket}.json"
    settings = json.loads((ROOT / zero(stage, folder).partition("=")[2]).read_text())
    if stage != "0":
        settings["zero_optimization"]["reduce_bucket_size"] = bucket
    if stage.startswith("3"):  # else small parameters stay gathered
        settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    path.write_text(json.dumps(settings))
    return f"deepspeed={path}"


@pytest.fixture(scope="module")
def runs(shards, once) -> dict[Case, tuple[list[str], dict[str, int]]]:
    """Of each case the experiment and what rank 0 measured."""

    def jobs(folder: Path) -> dict[Case, list[str]]:
        return {
            case: experiment(
                shards, folder / str(i), settings_of(stage, bucket, folder), f"precision={precision}", "micro_batch_size=2",
                f"model.image_size=[{side},{side}]", "schedule.steps=4", "log_every=100", "data.workers=0", "data.val=null",
                "ema.decay=0.9",
            )
            for i, case in enumerate(CASES)
            for stage, precision, bucket, _, side in [case]
        }  # fmt: skip

    def make(folder: Path) -> None:
        for processes in (1, 2):
            path = folder / f"{processes}.json"
            path.write_text(json.dumps({str(case): job for case, job in jobs(folder).items() if case[3] == processes}))
            command = [sys.executable, "-m", "tests.measured_run", str(path), str(processes)]
            done = subprocess.run(command, cwd=ROOT, env=train_environment(), timeout=PATIENCE, text=True, capture_output=True)
            assert done.returncode == 0, done.stdout + done.stderr

    folder = once("memory", make)
    measured = {case: json.loads((folder / str(i) / "memory.json").read_text()) for i, case in enumerate(CASES)}
    return {case: (job, measured[case]) for case, job in jobs(folder).items()}


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_every_zero_stage(runs, case):
    stage, precision, bucket, processes, _ = case
    (path, *overrides), measured = runs[case]
    config = load_config(ROOT / path, overrides)
    found = Estimate(FACE, True, processes).memory(config, deepspeed_config.resolve(config, processes, on_gpu=False))
    held, peak = found.held + found.host, found.device + found.host + measured["batch"]
    if stage.startswith("3"):  # gathered weights are gone by then, and its bucket is there from the start
        held += 4 * bucket - (found.weights if "offload" in stage else found.weights - own_weights(config, processes))
    print(f"zero{stage:<10} {precision} {processes} processes, bucket {bucket}: ", end="")
    print(f"held {held} / {measured['held']}, peak {peak} / {measured['peak']} bytes, predicted / measured")
    if precision == "bf16":  # in fp32 some gradients still lie in their bucket
        # The steps' counters, and the padding of a partition.
        assert measured["held"] == pytest.approx(held, abs=4096)
    assert measured["peak"] == pytest.approx(peak, rel=0.06)


def own_weights(config, processes: int) -> int:
    """Bytes of a process's share at ZeRO-3."""
    model = build_segmenter(config.model.arch, FACE.num_classes, config.model.image_size, config.model.patch_padding)
    size = 4 if config.precision == "fp32" else 2
    return size * sum(-(-parameter.numel() // processes) for parameter in model.parameters())


def test_what_is_frozen_has_neither_gradients_nor_states(shards, tmp_path):
    path, *others = experiment(shards, tmp_path, "precision=bf16", "data.val=null", "model.freeze=backbone")
    config = load_config(ROOT / path, others)
    found = Estimate(FACE, True, 1).memory(config, deepspeed_config.resolve(config, 1, on_gpu=False))
    with torch.device("meta"):
        model = build_segmenter(config.model.arch, FACE.num_classes, config.model.image_size, config.model.patch_padding)
    learnt = sum(parameter.numel() for parameter in model.decode_head.parameters())
    assert found.weights == 2 * sum(parameter.numel() for parameter in model.parameters())
    assert found.gradients == 6 * learnt and found.optimizer == pytest.approx(12 * learnt, abs=100)


def test_a_large_batch_of_validation_counts(shards, tmp_path):
    def device(batch: int) -> int:
        path, *others = experiment(shards, tmp_path, "precision=bf16", "micro_batch_size=1", f"evaluate.batch_size={batch}")
        config = load_config(ROOT / path, [*others, "model.image_size=[128,96]"])
        return Estimate(FACE, True, 1).memory(config, deepspeed_config.resolve(config, 1, on_gpu=False)).device

    assert device(64) > 2 * device(1)


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.recompute=none", "loss.dice=1"],
        ["model.recompute=head", "model.dropout=0.1", "model.drop_path=0.2"],
        ["model.recompute=attention", "model.arch=tiny2", "model.patch_padding=null"],
        ["model.recompute=mlp", "loss.label_smoothing=0.1"],
        ["model.recompute=blocks", "model.freeze=2"],
        ["model.recompute=2", "model.freeze=backbone"],
    ],
)
@pytest.mark.parametrize("all_labelled", [True, False])
def test_activations_are_those_of_real_tensors(shards, tmp_path, overrides, all_labelled):
    """Byte for byte, in bf16."""
    path, *others = experiment(shards, tmp_path, *overrides, "precision=bf16", "micro_batch_size=4")
    config = load_config(ROOT / path, others)
    found = Estimate(FACE, all_labelled, 1).memory(config, deepspeed_config.resolve(config, 1, on_gpu=False))
    spec, size = config.model, (4, *config.model.image_size)
    model = build_segmenter(
        spec.arch, FACE.num_classes, spec.image_size, spec.patch_padding, spec.rope_precision, spec.dropout, spec.drop_path
    ).bfloat16()
    recompute(model, spec.recompute)
    freeze(model, spec.freeze)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    loss, seeds = PixelLoss(torch.ones(FACE.num_classes), FACE, config.loss.label_smoothing, config.loss.dice), torch.arange(4)
    with PeakTracker([*model.parameters(), *model.buffers()]) as tracker:
        images, labels = torch.zeros(4, 3, *size[1:], dtype=torch.uint8), torch.zeros(size, dtype=torch.uint8)
        labelled = None if all_labelled else torch.ones(4, FACE.num_classes, dtype=torch.bool)
        logits = model.train()(images, seeds)
        loss.share(logits, labels, (1.0, 1.0), labelled).backward()
    assert found.activations == tracker.peak > 100_000


def test_what_is_recomputed_is_not_kept(shards, tmp_path):
    def activations(mode: str, batch: int) -> int:
        path, *others = experiment(shards, tmp_path, f"model.recompute={mode}", f"micro_batch_size={batch}", "precision=bf16")
        config = load_config(ROOT / path, others)
        return Estimate(FACE, True, 1).memory(config, deepspeed_config.resolve(config, 1, on_gpu=False)).activations

    assert activations("blocks", 4) < activations("head", 4) < activations("none", 4)
    assert activations("none", 4) > 1.9 * activations("none", 2)


def test_the_estimate_of_a_large_model_allocates_nothing(shards, tmp_path):
    """5 billion parameters, in a process that could not hold them."""
    code = """
import resource
from pathlib import Path
from data.labels import load_label_set
from train import deepspeed_config
from train.config import load_config
from train.memory import Estimate
config = load_config(Path("train/configs/sapiens2_29_5b.yaml"), [])
memory = Estimate(load_label_set("sapiens2_29"), True, 8).memory(config, deepspeed_config.resolve(config, 8, True))
print(memory.device, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=train_environment(), text=True, capture_output=True, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr
    device, used = map(int, done.stdout.split())
    assert device > 15e9 and used < 4e9


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU of 40 GB")
@pytest.mark.parametrize("arch", ["sapiens_0.3b", "sapiens2_0.4b", "sapiens_1b"])
def test_on_a_gpu(shards, tmp_path, arch):
    """What PyTorch has allocated at most, in a run of one process."""
    path, *overrides = experiment(
        shards, tmp_path / "run", f"model.arch={arch}", "model.image_size=[1024,768]", "model.patch_padding=null",
        "model.recompute=blocks", "micro_batch_size=1", "global_batch_size=2", "schedule.steps=3", "data.val=null",
    )  # fmt: skip
    recorded_runs({arch: [path, *overrides]}, tmp_path, 0)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    config = load_config(ROOT / path, overrides)
    found = Estimate(FACE, True, 1).memory(config, deepspeed_config.resolve(config, 1, on_gpu=True))
    print(f"{arch}: {found.device / 1e9:.2f} / {lines[-1]['memory/peak_gb']:.2f} GB, predicted / measured")
    assert lines[-1]["memory/peak_gb"] == pytest.approx(found.device / 1e9, rel=0.1)
