"""The benchmark of a whole step: on real processes, and its peer computes what we do."""

import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from benchmarks.memory import experiment as memory_experiment
from benchmarks.memory import measure
from benchmarks.optimisations import NOT_TAKEN, TAKEN
from data.batch import Batch
from data.labels import load_label_set
from tests.conftest import PATIENCE, ROOT, experiment, launched, train_environment
from train.benchmark import ROUND, Side, ratios
from train.clock import StepClock
from train.config import load_config
from train.engine import Job
from train.loss import PixelLoss
from train.pace import PHASES
from train.peer import Plain
from train.run import build_model, prepare


def benchmark(*arguments: object, processes: int = 1) -> subprocess.CompletedProcess:
    command = [*launched("train.benchmark", processes), *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=train_environment(), capture_output=True, text=True, timeout=PATIENCE)


def test_both_sides_are_measured_on_the_same_loader(shards, tmp_path):
    found, trace = tmp_path / "out" / "figures.json", tmp_path / "trace.json"
    options = ["--steps", 7, "--warm-up", 2, "--compare", "plain", "--json", found, "--trace", trace]
    done = benchmark("--config", *experiment(shards, tmp_path / "run", "ema.decay=0.9"), *options)
    assert done.returncode == 0, done.stderr
    figures = json.loads(found.read_text())
    assert figures["steps"] == 10 and figures["accumulation"] == 2 and list(figures["sides"]) == ["ours", "plain"]
    assert figures["ratios"].keys() == {"step_ms", "forward_ms", "backward_ms", "optimizer_ms", "images_per_second", "tflops"}
    for side in figures["sides"].values():
        phases = [side[f"{phase}_ms"] for phase in ("data", "forward", "backward", "optimizer")]
        assert all(ms > 0 for ms in phases) and 0.5 < sum(phases) / side["step_ms"] < 1.2
        assert side["images_per_second"] == pytest.approx(8e3 / side["step_ms"])
        assert side["mfu"] is None and side["peak_gb"] is None and 0 < side["tflops"] < 1
        assert np.isfinite(side["losses"]).all() and side["losses"][-1] < side["losses"][0]
        assert len(side["losses"]) == 13  # the traced steps are none of the measured ones
    assert "images/s" in done.stdout and "ratio" in done.stdout and "Self CPU" in done.stdout and "\n  wait " not in done.stdout
    assert json.loads(trace.read_text())["traceEvents"]
    assert not (tmp_path / "run").exists()


def test_synthetic_data():
    """In the place of a recipe's, whose run would be of so few images that it ends in its warm-up."""
    options = ["--synthetic-data", "--steps", 1, "--warm-up", 1, "model.arch=tiny", "model.image_size=[32,32]"]
    done = benchmark("--config", "train/configs/face_1b.yaml", "micro_batch_size=8", "data.train=nowhere", *options)
    assert done.returncode == 0 and "images/s" in done.stdout, done.stderr


def test_drawn_faces_leave_with_the_command_that_is_ended(tmp_path):
    options = ["--config", "train/configs/demo.yaml", "--synthetic-data", "--steps", "100000"]
    environment = train_environment() | {"TMPDIR": str(tmp_path)}
    with subprocess.Popen([sys.executable, "-m", "train.benchmark", *options], cwd=ROOT, env=environment) as process:
        while not any(tmp_path.glob("*/shards/train")):
            assert process.poll() is None, "ended by itself"
            time.sleep(0.1)
        process.terminate()
        assert process.wait(PATIENCE) == 128 + signal.SIGTERM
    assert not any(tmp_path.glob("*/faces"))


def test_waits_for_data_count_however_few_steps_wait():
    side = Side(None, iter(()), StepClock(on_gpu=False), Job(0, 1, torch.device("cpu")))
    side.laps = [{"data": 0.0, "forward": 0.1, "backward": 0.1, "optimizer": 0.1}] * (2 * ROUND - 1)
    side.laps.append(side.laps[0] | {"data": 7.0})  # many at once, as workers deliver them, after a long wait
    figures = side.figures(rounds=2, images=8, flops=10**9, peak=1e12, others=0)
    assert figures["data_ms"] == pytest.approx(700) and figures["step_ms"] == pytest.approx(1000)
    assert figures["images_per_second"] == pytest.approx(8) and figures["mfu"] == pytest.approx(0.008)


def test_a_load_that_changes_between_two_turns_leaves_their_ratio():
    def side(*rounds: float) -> dict:
        found = Side(None, iter(()), StepClock(on_gpu=False), Job(0, 1, torch.device("cpu")))
        found.laps = [dict.fromkeys(PHASES, seconds) for seconds in rounds for _ in range(ROUND)]
        return found.figures(rounds=3, images=8, flops=10**9, peak=None, others=0)

    found = ratios(side(4.0, 0.8, 0.8), side(5.0, 5.0, 1.0))  # the load ends when plain has had its second turn
    assert found["forward_ms"] == pytest.approx(0.8) and found["step_ms"] == pytest.approx(0.8)
    assert found["images_per_second"] == pytest.approx(1.25) and "mfu" not in found and "data_ms" not in found


def test_two_processes(shards, tmp_path):
    arguments = ["--config", *experiment(shards, tmp_path / "run"), "--steps", 1, "--json", tmp_path / "figures.json"]
    done = benchmark(*arguments, processes=2)
    assert done.returncode == 0, done.stderr + done.stdout
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["processes"] == 2 and figures["accumulation"] == 1 and done.stdout.count("images/s") == 1
    assert figures["sides"]["ours"]["wait_ms"] > 0 and "\n  wait " in done.stdout
    refused = benchmark(*arguments, "--compare", "plain", processes=2)
    assert refused.returncode != 0 and "error: --compare plain: the peer is one process" in refused.stderr + refused.stdout


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["data.train=nowhere"], "nowhere"), (["micro_batch_size=3"], "micro_batch_size"), (["misspelt=1"], "misspelt"),
        (["precision=fp16", "--compare", "plain"], "fp16"), (["--json", "train"], "train cannot be written: Is a directory"),
        (["--trace", "README.md/trace.json"], "README.md/trace.json cannot be written"),
        (["--trace", "a.json", "--json", "./a.json"], "a.json: both --json and --trace"),
    ],  # fmt: skip
)
def test_mistakes_are_told_in_a_line(shards, tmp_path, overrides, words):
    done = benchmark("--config", *experiment(shards, tmp_path / "run", *overrides))
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith("error: ") and words in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("arch", "recompute", "frozen"), [("tiny", "none", 1), ("tiny2", "blocks", None)])
def test_the_peer_computes_the_same(arch, recompute, frozen):
    label_set = load_label_set("face19")
    settings = [f"model.arch={arch}", "model.image_size=[32,32]", f"model.recompute={recompute}", "optimizer.clip_norm=0"]
    settings.append(f"model.freeze={'null' if frozen is None else frozen}")
    config = load_config(ROOT / "train/configs/demo.yaml", settings)
    torch.manual_seed(0)
    model = build_model(config, label_set.num_classes).train()
    weights = torch.rand(label_set.num_classes) + 0.5
    job = Job(0, 1, torch.device("cpu"))
    peer = Plain(model, config, weights, label_set, StepClock(on_gpu=False), job)
    prepare(model, config)  # after that, as in train.opened: the peer freezes by itself
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    labels = torch.randint(0, label_set.num_classes, (3, 32, 32), dtype=torch.uint8)
    labels[0, :5] = label_set.ignore_index
    counts = torch.stack([torch.bincount(mask.flatten(), minlength=256) for mask in labels])
    loss = PixelLoss(weights, label_set)
    batch = Batch(["a", "b", "c"], images, labels, torch.arange(3), counts)
    expected = loss.share(model(images, batch.seeds), labels, loss.totals(counts))
    expected.backward()
    kept: list[torch.Tensor] = []
    peer.optimizer.zero_grad = lambda: kept.extend(parameter.grad.clone() for parameter in peer.parameters)
    assert peer.step([batch]) == pytest.approx(expected.item(), rel=1e-6)
    ours = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    largest = max(gradient.abs().max() for gradient in ours)
    assert len(kept) == len(ours) and all((a - b).abs().max() <= 1e-5 * largest for a, b in zip(kept, ours, strict=True))


def test_the_script_for_gpus_prints_its_table_last(tmp_path):
    runs = "demo none 2 zero1 yes\ndemo blocks 2 zero2 no augment.on_device=true ema.decay=0.9\n\ndemo none 2 zero9 yes\n"
    runs += "demo none 2 zero1 no output_dir=a/b"  # like the first but for the peer: beside its result, not over it
    variables = {"RUNS": runs, "STEPS": "1", "SIZE": "32,32"}
    done = subprocess.run(
        [ROOT / "benchmarks/gpu.sh", tmp_path / "out"], env=train_environment() | variables, capture_output=True, text=True,
        timeout=PATIENCE,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr + done.stdout
    reason = "not measured: error: rank 0: deepspeed: ds_configs/zero9.json: no such file"
    assert done.stdout.count(reason) == 2 and done.stdout.count("not measured") == 2  # beside the peer, then alone
    *lines, _, head, rule, first, second, third = done.stdout.splitlines()
    columns = [line.split(" | ") for line in lines]
    start = next(i for i, cells in enumerate(columns) if "output apart" in cells)
    apart = {cells[0]: cells[-2:] for cells in columns[start + 2 :]}
    assert len(apart) == len(TAKEN | NOT_TAKEN)
    assert all(float(cell.strip(" |-") or 0) < 0.05 for cells in apart.values() for cell in cells), apart  # in bf16
    assert float(apart["| fused AdamW, fp32"][0]) < 1e-5
    assert head.startswith("| model | recompute |") and set(rule) == set("|- ")
    assert first.startswith("| tiny 32x32 | none | - | 2 | zero1 |") and not first.endswith("| - |")
    assert second.startswith("| tiny 32x32 | blocks | on_device | 2 | zero2 |") and second.endswith("| - |")
    assert third.startswith("| tiny 32x32 | none | - | 2 | zero1 |") and third.endswith("| - |")


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would measure all sizes")
@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"RUNS": " \n"}, "no GPU is seen"), ({"STEPS": "08"}, "STEPS=08: give"),
        ({"SIZE": "32x32"}, "SIZE=32x32: give"), ({"RUNS": "sub/demo none 2 zero1 no"}, "RUNS: sub/demo zero1: give names"),
        ({"RUNS": "demo none 2 zero1 yes\ndemo none 2 zero1 compile=true"}, "RUNS: demo: compare is 'compile=true': give yes"),
    ],
)  # fmt: skip
def test_the_script_for_gpus_begins_only_what_it_can_end(tmp_path, variables, words):
    """Without RUNS, or with blanks in their place, it measures what wants a GPU."""
    command, variables = [ROOT / "benchmarks/gpu.sh", tmp_path / "out"], train_environment() | variables
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and words in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("augment.faithful=true", "on_device"),
        ("loss.dice=1", "loss.dice=1: fixed here"), ("model.image_size=[33,33]", "plain: image_size: 33x33"),
        ("deepspeed=ds_configs/zero3.json", "compile: compile: ds_configs/zero3.json is ZeRO stage 3"),
    ],
)  # fmt: skip
def test_runs_of_losses_that_cannot_be_are_told_before_the_first_trains(shards, override, told):
    command = [sys.executable, "-m", "benchmarks.losses", "--data", shards / "train", override]
    done = subprocess.run(command, cwd=ROOT, env=train_environment(), capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and told in done.stderr and not done.stdout


def measured_in_16_gb(*arguments: object) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    resource.setrlimit(resource.RLIMIT_AS, (16 * 10**9, -1))
    measure(*arguments)


def test_what_does_not_fit_is_measured_as_none():
    receiver, sender = multiprocessing.Pipe(duplex=False)
    config = memory_experiment("tiny", [1024, 1024], "fp32", 1, "blocks", "zero1", batch=8192)  # the pixels alone take 26 GB
    process = multiprocessing.get_context("spawn").Process(target=measured_in_16_gb, args=(config, sender))
    process.start()
    sender.close()
    process.join(PATIENCE)
    assert process.exitcode == 0 and receiver.recv() is None


@pytest.mark.parametrize("other", ["{}", "[]", "no JSON", '{"arch": "tiny"}', None])
def test_a_table_of_other_files_names_the_first(tmp_path, other):
    path = tmp_path / "other.json"
    path.mkdir() if other is None else path.write_text(other)
    command = [sys.executable, "-m", "benchmarks.gpu_table", tmp_path]
    done = subprocess.run(command, cwd=ROOT, env=train_environment(), capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 2 and "other.json: not what train.benchmark --json" in done.stderr
