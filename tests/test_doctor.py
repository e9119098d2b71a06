"""What the doctor finds in set-ups that are broken, each in its own way."""

import fcntl
import json
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from data import build_shards
from model.segmenter import build_segmenter
from model.weight_files import save_safetensors
from tests.conftest import PATIENCE, ROOT, experiment, train, train_environment, zero
from train import doctor

Broken = tuple[list[str], str]  # arguments, and what is to be found
SILENT: list[socket.socket] = []


def examined(capsys, arguments: list[str]) -> tuple[int, str]:
    capsys.readouterr()
    code = doctor.main(["--config", *arguments])
    return code, capsys.readouterr().out


def weights(path: Path, arch: str) -> str:
    model = build_segmenter(arch, 19, (32, 24), patch_padding=0)
    save_safetensors(path, model.state_dict(), model.describe())
    return f"load_from={path}"


def misspelt_key(shards: Path, folder: Path) -> Broken:
    return [*experiment(shards, folder / "run"), "optimizer.learning_rate=1"], r"error: .*optimizer.learning_rate: unknown key"


def batch_that_does_not_divide(shards: Path, folder: Path) -> Broken:
    arguments = [*experiment(shards, folder / "run"), "--gpus", "3"]
    return arguments, r"error: global_batch_size: 8 does not divide by .* 4 x 3 = 12"


def deepspeed_key_unknown(shards: Path, folder: Path) -> Broken:
    (folder / "zero.json").write_text('{"zero_optimization": {"stage": 2}, "overlap_comm": true}')
    return [*experiment(shards, folder / "run"), f"deepspeed={folder / 'zero.json'}"], r"zero.json: overlap_comm: unknown key"


def shards_missing(shards: Path, folder: Path) -> Broken:
    return [*experiment(folder / "nowhere", folder / "run")], r"error: .*nowhere/train: no such folder; build it with"


def tar_damaged(shards: Path, folder: Path) -> Broken:
    shutil.copytree(shards, folder / "shards")
    tar = folder / "shards/train/shard-000000.tar"
    content = bytearray(tar.read_bytes())
    content[700] ^= 1
    tar.write_bytes(content)
    return experiment(folder / "shards", folder / "run"), r"error: .*shard-000000.tar: its content changed \(sha256 differs"


def other_label_set_in_validation(shards: Path, folder: Path) -> Broken:
    shutil.copytree(shards, folder / "shards")
    index = folder / "shards/val/index.json"
    told = json.loads(index.read_text())
    told["label_set"]["flip_pairs"] = told["label_set"]["flip_pairs"][1:]
    index.write_text(json.dumps(told))
    return experiment(folder / "shards", folder / "run"), r"error: data.val: .* or other names, pairs or ignored values"


def side_without_its_pair(faces: Path, folder: Path) -> Path:
    """Shards whose label set has lost the pair of the eyes, and whose class 18 is in no image."""
    told = yaml.safe_load((ROOT / "data/label_sets/face19.yaml").read_text())
    told["flip_pairs"] = told["flip_pairs"][1:]
    (folder / "face.yaml").write_text(yaml.safe_dump(told))
    out = ["--out", str(folder / "shards"), "--workers", "1", "--val-fraction", "0.2"]
    arguments = ["--dataset", "facesynthetics", "--root", str(faces), "--label-set", str(folder / "face.yaml"), *out]
    assert build_shards.main(arguments) == 0
    return folder / "shards"


def warm_up_longer_than_the_run(shards: Path, folder: Path) -> Broken:
    arguments = [*experiment(shards, folder / "run"), "schedule.steps=5", "schedule.warmup_steps=9"]
    return arguments, r"error: schedule.warmup_steps: 9 is not below the run's 5 steps"


def weights_of_another_arch(shards: Path, folder: Path) -> Broken:
    arguments = [*experiment(shards, folder / "run"), weights(folder / "model.safetensors", "tiny2")]
    return arguments, r"error: .*model.safetensors: does not fit the backbone of tiny, .* looks like tiny2"


def weights_cut_short(shards: Path, folder: Path) -> Broken:
    override = weights(folder / "model.safetensors", "tiny")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-1000])
    return [*experiment(shards, folder / "run"), override], r"error: .*not a whole .safetensors file"


def class_weights_of_another_set(shards: Path, folder: Path) -> Broken:
    arguments = [*experiment(shards, folder / "run"), "loss.class_weights=[1,2,3]"]
    return arguments, r"error: loss.class_weights: 3 values, but the shards' label set has 19"


def output_that_is_a_file(shards: Path, folder: Path) -> Broken:
    (folder / "run").write_text("")
    return experiment(shards, folder / "run"), r"error: .*run/doctor_train.png: cannot be written"


def host_that_is_not_there(shards: Path, folder: Path) -> Broken:
    (folder / "hosts").write_text("")
    arguments = [*experiment(shards, folder / "run"), "--hostfile", str(folder / "hosts")]
    return arguments, r"error: launch/preflight.sh found hosts that are not fit"


def zero_key_unknown_to_deepspeed(shards: Path, folder: Path) -> Broken:
    (folder / "zero.json").write_text('{"zero_optimization": {"stage": 2, "reduce_bucket": 5, "allgather_bucket_size": "many"}}')
    arguments = [*experiment(shards, folder / "run"), f"deepspeed={folder / 'zero.json'}"]
    return arguments, r"error: .*zero.json: DeepSpeed refuses .*reduce_bucket"


def other_seed_and_batch_than_the_checkpoints(shards: Path, folder: Path) -> Broken:
    assert train(shards, folder / "run", "schedule.steps=2").code == 0
    arguments = [*experiment(shards, folder / "run"), "seed=7", "model.freeze=1", "global_batch_size=4"]
    return arguments, r"cannot be resumed: global_batch_size was 8, is 4; seed was 0, is 7; freeze was None, is 1; restore"


def two_sets_missing(shards: Path, folder: Path) -> Broken:
    arguments = [*experiment(shards, folder / "run"), f"data.train=[{folder}/a, {folder}/b]"]
    return arguments, r"error: data.train: .*/a: no such folder.*\n.*error: data.train: .*/b: no such folder"


def server_that_says_nothing(shards: Path, folder: Path) -> Broken:
    silent = socket.create_server(("127.0.0.1", 0))
    SILENT.append(silent)  # open until the tests end
    url = f"http://127.0.0.1:{silent.getsockname()[1]}/train"
    arguments = [*experiment(shards, folder / "run"), f"data.train={url}", f"data.cache={folder / 'cache'}"]
    return arguments, r"error: data.train: http://127.0.0.1:\d+/train/index.json: .*no byte for 10 s"


def too_large_for_the_gpu(shards: Path, folder: Path) -> Broken:
    arguments = [*experiment(shards, folder / "run"), "model.arch=sapiens_0.3b", "model.image_size=[1024,768]"]
    return [*arguments, "--gpus", "1", "--gpu-memory", "16"], r"error: memory: .* GB are needed, 16.0 GB are there; the cheapest"


BROKEN: list[Callable[[Path, Path], Broken]] = [
    misspelt_key, batch_that_does_not_divide, deepspeed_key_unknown, shards_missing, tar_damaged, other_label_set_in_validation,
    warm_up_longer_than_the_run, weights_of_another_arch, weights_cut_short, class_weights_of_another_set,
    output_that_is_a_file, host_that_is_not_there, too_large_for_the_gpu, zero_key_unknown_to_deepspeed,
    other_seed_and_batch_than_the_checkpoints, two_sets_missing, server_that_says_nothing,
]  # fmt: skip


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken.__name__)
def test_what_is_broken_is_found(shards, tmp_path, capsys, broken):
    arguments, finding = broken(shards, tmp_path)
    started = time.monotonic()
    code, output = examined(capsys, arguments)
    assert code == 1 and re.search(finding, output), output
    assert time.monotonic() - started < 60
    assert f"\nerrors: {2 if broken in (two_sets_missing, shards_missing) else 1}, " in output, output


def test_a_sound_set_up_is_told_to_be_ready(shards, tmp_path, capsys):
    override = weights(tmp_path / "model.safetensors", "tiny")
    code, output = examined(capsys, [*experiment(shards, tmp_path / "run"), override, "--images-per-second", "10"])
    assert code == 0 and "error:" not in output and output.rstrip().endswith("; ready"), output
    assert "31 training images of face19" in output and "  9 validation images" in output
    assert "reinitialised     0" in output and "hours at 10 images/s, as given" in output
    assert [line.split()[0] for line in output.splitlines() if line.endswith("fits")] == [
        "zero0", "*", "zero2", "zero2_offload", "zero3", "zero3_offload"
    ]  # fmt: skip
    assert (tmp_path / "run/doctor_train.png").stat().st_size > 10_000
    assert not (tmp_path / "run/checkpoints").exists()


def test_wrong_pairs_and_missing_classes_are_warned_of(faces, tmp_path, capsys):
    shards = side_without_its_pair(faces, tmp_path)
    code, output = examined(capsys, experiment(shards, tmp_path / "run"))
    assert code == 0 and re.search(r"warning: label set .* is in no flip pair: its other side is", output), output
    assert re.search(r"warning: .* shows no .*: no score will tell", output), output


def test_the_change_that_it_names_makes_it_fit(shards, tmp_path, capsys):
    arguments, _ = too_large_for_the_gpu(shards, tmp_path)
    _, output = examined(capsys, arguments)
    remedy = re.search(r"the cheapest change that fits, with .* for each process: (.+)", output).group(1).split()
    code, output = examined(capsys, [*arguments, *remedy])
    assert "fits into 16 GB" in output, output


def test_a_run_is_gone_on_with_at_its_pace(shards, tmp_path, capsys):
    folder = tmp_path / "run"
    assert train(shards, folder, "schedule.steps=4").code == 0
    code, output = examined(capsys, [*experiment(shards, folder), "schedule.steps=4000"])
    assert code == 0 and f"goes on from {folder}/checkpoints/step_00000004" in output, output
    assert "4000 steps of 8 images" in output
    assert "the 3996 steps that are left: " in output and f"measured in {folder} on 1 x x86_64 CPU" in output
    (folder / "metrics.jsonl").write_text('5\n{"step": 1, "speed/images_per_second": "fast"}\n{"st')
    code, output = examined(capsys, [*experiment(shards, folder), "schedule.steps=4000"])
    assert code == 0 and "how long: give --images-per-second" in output, output
    with (folder / "log.txt").open("a") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        assert "a run is at work in it" in examined(capsys, experiment(shards, folder))[1]
    beyond = [*experiment(shards, folder), "schedule.steps=2"]
    assert "stands at step 4, beyond the run's 2" in examined(capsys, beyond)[1]
    weights = folder / "checkpoints/step_00000004/rank_00000.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    code, output = examined(capsys, experiment(shards, folder))
    assert code == 1 and "damaged: rank_00000.safetensors; passed over" in output, output
    assert "no checkpoint there is sound" in output and "errors: 1, " in output


def test_the_slots_of_a_hostfile_are_the_processes(shards, tmp_path, capsys):
    (tmp_path / "hosts").write_text("127.0.0.1 slots=3\n# n2 slots=9\n")
    arguments = [*experiment(shards, tmp_path / "run"), "--hostfile", str(tmp_path / "hosts")]
    assert "global_batch_size: 8 does not divide by" in examined(capsys, arguments)[1]
    assert "error: --gpus 8: " in examined(capsys, [*arguments, "--gpus", "8"])[1]


def test_pictures_that_cannot_be_written_hide_nothing(shards, capsys):
    code, output = examined(capsys, experiment(shards, Path("/proc/nothing")))
    assert code == 1 and "error: output_dir: /proc/nothing/doctor_train.png" in output, output
    assert "steps of 8 images" in output and "errors: 1, " in output, output


def test_the_largest_recipe_takes_less_than_a_minute_and_little_memory(shards, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", "import resource, sys; from train.doctor import main; code = main(sys.argv[1:]); "
         "used = resource.getrusage(resource.RUSAGE_SELF); print(used.ru_maxrss, used.ru_utime + used.ru_stime); sys.exit(code)",
         "--config", "train/configs/sapiens2_29_5b.yaml", f"data.train={shards / 'train'}", f"data.val={shards / 'val'}",
         f"output_dir={tmp_path}", "loss.class_weights=none", "--gpus", "8", "--gpu-memory", "16"],
        cwd=ROOT, env=train_environment(), text=True, capture_output=True, timeout=PATIENCE,
    )  # fmt: skip
    assert "the cheapest change that fits, with" in done.stdout, done.stdout + done.stderr
    kilobytes, seconds = map(float, done.stdout.split()[-2:])
    assert seconds < 60 and kilobytes < 4e6  # its weights alone are 20 GB
    rows = {line.split()[0]: line for line in done.stdout.replace("*", " ").splitlines() if line.strip().startswith("zero")}
    assert rows["zero3_offload"].endswith("fits") and rows["zero3"].endswith("too much")


def test_options_that_are_wrong(capsys):
    for option in ("--gpus", "--gpu-memory", "--images-per-second"):
        for value in ("0", "-1", "nan", "many"):
            with pytest.raises(SystemExit) as ended:
                doctor.main(["--config", "train/configs/demo.yaml", option, value])
            assert ended.value.code == 2, (option, value)


def test_settings_that_deepspeed_takes_are_no_mistake(shards, tmp_path, capsys):
    settings = json.loads((ROOT / zero("3_offload", tmp_path).partition("=")[2]).read_text())
    settings["zero_optimization"]["offload_param"] = None
    (tmp_path / "zero.json").write_text(json.dumps(settings))
    code, output = examined(capsys, [*experiment(shards, tmp_path / "run"), f"deepspeed={tmp_path / 'zero.json'}"])
    assert code == 0 and "* zero " in output, output


def test_weights_are_looked_at_without_being_read(shards, tmp_path):
    """On the meta device, as those of 5 billion parameters."""
    from model.weights import load_weights, match_weights

    weights(tmp_path / "model.safetensors", "tiny2")
    with torch.device("meta"):
        model = build_segmenter("tiny2", 19, (64, 48))
    state, report = match_weights(model, tmp_path / "model.safetensors")
    real = build_segmenter("tiny2", 19, (64, 48))
    assert load_weights(real, tmp_path / "model.safetensors") == report and set(state) <= set(real.state_dict())
