"""Is everything ready for a run? Looked at in under a minute, before a GPU is busy.

    python -m train.doctor --config train/configs/face_1b.yaml [key=value ...] --gpus 8 --gpu-memory 80

Checks the shards, of which some are read against their sha256; the experiment, DeepSpeed's settings and the checkpoint to go on
from; the weights' keys; tells the memory of each GPU at every ZeRO stage, and the cheapest change that makes it fit; steps,
epochs and hours; and asks the hosts of a hostfile. Exit code: 0 if the run can start, 1 if something is wrong, 2 for bad
arguments.
"""

import argparse
import fcntl
import json
import math
import os
import re
import statistics
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import torch

from data.arguments import whole_number
from data.mixture import Mixture
from data.shards import ShardSet
from model.segmenter import build_segmenter
from model.weight_files import HUB
from model.weights import match_weights
from train import TrainError, checkpoint, deepspeed_config
from train.check import check
from train.config import Config, load_config, training_order
from train.data_findings import look_at_data
from train.findings import Findings
from train.remedies import GB, Remedies
from train.report import read_metrics

PREFLIGHT_SECONDS = 40
READINGS = 10  # of a run's pace, whose median counts
CHECKPOINT_BYTES = 4e9  # up to which a checkpoint is read whole, in seconds


class Doctor:
    """Looks at one part of an experiment after the other."""

    def __init__(self, config: Config, args: argparse.Namespace) -> None:
        self.config, self.args = config, args
        self.findings = Findings()
        self.environment = dict(os.environ)  # before DeepSpeed's import, which adds to it
        self.train: Mixture | None = None
        self.val: ShardSet | None = None
        self.resumed: checkpoint.RunState | None = None
        self.on_gpu = args.gpus is not None or args.gpu_memory is not None or torch.cuda.is_available()
        self.processes = args.gpus or max(1, torch.cuda.device_count())

    def examine(self) -> None:
        parts = {
            "data": self._data, "experiment": self._experiment, "weights": self._weights, "memory": self._memory,
            "time": self._time, "hosts": self._hosts,
        }  # fmt: skip
        for title, look in parts.items():
            self.findings.part(title, look)

    def _data(self) -> None:
        self.train, self.val = look_at_data(self.config, self.findings)

    def _experiment(self) -> None:
        config, tell = self.config, self.findings.line
        if not self.on_gpu:
            tell("no GPU is here: judged as a run on this CPU; --gpus N --gpu-memory GB judge one elsewhere")
        if self.args.hostfile and self.args.hostfile.is_file():
            self._count_slots(self.args.hostfile)
        settings = deepspeed_config.resolve(config, self.processes, self.on_gpu)
        accumulated = settings["gradient_accumulation_steps"]
        where = f"{self.processes} x {'GPU' if self.on_gpu else 'CPU'}"
        tell(f"{config.model.arch} at {'x'.join(map(str, config.model.image_size))} on {where}, {config.deepspeed}")
        tell(f"batch {config.global_batch_size} = {config.micro_batch_size} x {self.processes} x {accumulated} accumulated")
        if self.train is None:
            tell("not looked at whole: the training data has an error")
            return
        check(config, self.train, self.val, self.processes, self.on_gpu)
        self._look_for_another_run()
        found = checkpoint.sources(config.output_dir, config.resume_from)
        if not found:
            tell(f"a new run in {config.output_dir}")
            return
        now = checkpoint.fresh_state(config, settings, self.train, self.processes, {})
        for path in found:
            then, files = checkpoint.read(path)
            checkpoint.refuse_another_run(path, then, now)
            is_read = sum(entry.bytes for entry in files.values()) <= CHECKPOINT_BYTES
            damaged = [name for name, entry in files.items() if not entry.is_at(path / name)] if is_read else []
            if not damaged:
                self.resumed = then
                tell(f"goes on from {path}{'' if is_read else ', whose checksums are compared when the run starts'}")
                break
            self.findings.warning(f"{path}: damaged: {', '.join(damaged)}; passed over")
        else:
            raise TrainError(f"{found[0].parent}: no checkpoint there is sound; start anew in another output_dir")

    def _look_for_another_run(self) -> None:
        with suppress(OSError), (self.config.output_dir / "log.txt").open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                self.findings.warning(f"{self.config.output_dir}: a run is at work in it; one that starts now would leave again")

    def _count_slots(self, hostfile: Path) -> None:
        slots = sum(map(int, re.findall(r"^\s*[^#\s]+\s+slots=(\d+)", hostfile.read_text(errors="replace"), re.MULTILINE)))
        if slots and self.args.gpus not in (None, slots):
            raise TrainError(f"--gpus {self.args.gpus}: {hostfile} has {slots} slots; leave --gpus out, or mend it")
        self.processes = slots or self.processes  # none: what is wrong with the file is told of the hosts

    def _weights(self) -> None:
        config, tell = self.config, self.findings.line
        if self.resumed:
            tell("the checkpoint's")
            return
        if config.load_from is None:
            tell("fresh: load_from names no file")
            if config.model.arch.startswith("sapiens"):  # of which Meta has released some
                self.findings.warning("load_from: names no weights: training from scratch takes far more images and time")
            return
        if config.load_from.startswith(HUB):
            tell(f"{config.load_from} is looked at when the run starts: it may have to be fetched")
            return
        if self.train is None:
            tell("not looked at: the training data tells the classes")
            return
        classes = self.train.label_set.classes
        with torch.device("meta"):
            model = build_segmenter(
                config.model.arch, len(classes), config.model.image_size, config.model.patch_padding,
                config.model.rope_precision,
            )  # fmt: skip
        _, report = match_weights(model, config.load_from, classes, config.load_partial, config.load_classes)
        for line in report.summary().splitlines():
            tell(line)

    def _memory(self) -> None:
        if self.train is None:
            self.findings.line("not known: the training data tells the number of classes")
            return
        have = self.args.gpu_memory * GB if self.args.gpu_memory else _memory_here(self.on_gpu)
        all_labelled = bool(self.train.labelled.all())
        remedies = Remedies(self.train.label_set, all_labelled, self.processes, self.on_gpu, have)
        own = remedies.fit(self.config)
        if own is None:
            self.findings.line("not known: the experiment has an error")
            return
        for line in remedies.table(self.config):
            self.findings.line(line)
        if have is None:
            self.findings.line(f"{own.needed / GB:.1f} GB are needed on each GPU; --gpu-memory tells whether they are there")
        elif own.fits:
            self.findings.line(f"fits into {have / GB:.0f} GB, by {(have - own.needed) / GB:.1f} GB")
        else:
            remedy = "nothing that can be set makes it fit; take GPUs with more memory, a smaller image_size or model"
            if cheapest := remedies.cheapest(self.config):
                changes, then = cheapest
                on_host = (then.memory.host + then.memory.copies) / GB
                remedy = f"the cheapest change that fits, with {on_host:.1f} GB of the host's for each process: {changes}"
            self.findings.error(f"memory: {own.needed / GB:.1f} GB are needed, {have / GB:.1f} GB are there; {remedy}")

    def _time(self) -> None:
        if self.train is None:
            self.findings.line("not known: the training data tells the length of an epoch")
            return
        config, length = self.config, training_order(self.config, self.train).epoch_length
        steps = config.total_steps(length)
        epochs = steps * config.global_batch_size / length
        self.findings.line(f"{steps} steps of {config.global_batch_size} images: {epochs:.1f} epochs of {length}")
        rate, whose = self.args.images_per_second, "as given"
        if rate is None:
            rate, whose = _measured_rate(config.output_dir), f"measured in {config.output_dir} on {_devices(config.output_dir)}"
        if rate is None:
            self.findings.line("how long: give --images-per-second, which a few steps with schedule.steps=50 tell")
            return
        done = self.resumed.step if self.resumed else 0
        hours = (steps - done) * config.global_batch_size / rate / 3600
        left = f"the {steps - done} steps that are left: " if done else ""
        self.findings.line(f"{left}{hours:.1f} hours at {rate:.3g} images/s, {whose}, without validation")

    def _hosts(self) -> None:
        if self.args.hostfile is None:
            self.findings.line("none asked: --hostfile names them")
            return
        if not self.args.hostfile.is_file():
            raise TrainError(f"{self.args.hostfile}: no such hostfile; a line of it is `worker-1 slots=8`")
        variables = {
            "HOSTFILE": str(self.args.hostfile.absolute()), "OUTPUT_DIR": str(self.config.output_dir.absolute()),
            "PREFLIGHT_TIMEOUT": str(PREFLIGHT_SECONDS),
        }  # fmt: skip
        done = subprocess.run(
            ["launch/preflight.sh"], env={**self.environment, **variables}, stdin=subprocess.DEVNULL, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        for line in done.stdout.splitlines():
            self.findings.line(line)
        if done.returncode:
            raise TrainError("launch/preflight.sh found hosts that are not fit, see above; mend them, or leave them out")


def _memory_here(on_gpu: bool) -> float | None:
    """Bytes of this machine's first GPU, or of all it has where the CPU trains; None for GPUs that are elsewhere."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory
    return None if on_gpu else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _measured_rate(output_dir: Path) -> float | None:
    """Images a second of the run in that folder; None if it tells none."""
    try:
        _, rates = read_metrics(output_dir / "metrics.jsonl")["speed/images_per_second"]
    except (TrainError, KeyError):
        return None
    rate = statistics.median(rates[-READINGS:])
    return rate if rate > 0 else None


def _devices(output_dir: Path) -> str:
    """What the run in that folder was measured on."""
    try:
        about = json.loads((output_dir / "environment.json").read_text())
        return f"{about['processes']} x {about['device']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "devices that it does not tell"


def _positive(text: str) -> float:
    """For `type=`."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not (0 < number < math.inf):
        raise argparse.ArgumentTypeError(f"'{text}' is no number above 0")
    return number


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m train.doctor", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--gpus", type=whole_number(1), help="of the whole run (default: those here, else the CPU)")
    parser.add_argument("--gpu-memory", type=_positive, metavar="GB", help="of one GPU (default: of the first one here)")
    parser.add_argument("--images-per-second", type=_positive, metavar="N", help="of the whole run (default: as OUTPUT_DIR had)")
    parser.add_argument("--hostfile", type=Path, help="DeepSpeed's: these hosts are asked whether they are fit")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example micro_batch_size=1")
    args = parser.parse_intermixed_args(argv)
    try:
        config = load_config(args.config, args.overrides)
    except TrainError as error:
        print(f"error: {error}")
        print("errors: 1, and nothing else was looked at")
        return 1
    doctor = Doctor(config, args)
    doctor.examine()
    errors, warnings = len(doctor.findings.errors), doctor.findings.warnings
    print(f"errors: {errors}, warnings: {warnings}{'' if errors else '; ready'}")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
