"""Is everything ready for a run? Looked at in under a minute, before a GPU is busy.

    python -m train.doctor --config train/configs/face_1b.yaml [key=value ...] --gpus 8 --gpu-memory 80

Checks the experiment and DeepSpeed's settings; the shards, of which some are read against their sha256; the weights' keys; tells
the memory of each GPU at every ZeRO stage, and the smallest change that makes it fit; steps, epochs and hours; and asks the
hosts of a hostfile. Exit code: 0 if the run can start, 1 if something is wrong, 2 for bad arguments.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from data import DataError
from data.arguments import whole_number
from data.inspect import example_sheet, few_images
from data.mixture import Mixture
from data.pictures import save_png
from data.remote import FileCache
from data.shards import ShardSet, verify
from model import ModelError
from model.segmenter import build_segmenter
from model.weight_files import HUB
from model.weights import match_weights
from train import TrainError, checkpoint, deepspeed_config
from train.__main__ import check
from train.config import Config, load_config, training_order
from train.remedies import Fit, Remedies
from train.report import read_metrics

TARS_READ = 3  # of each split, against their sha256
PICTURES = 8
PREFLIGHT_SECONDS = 40
GB = 1e9


class Doctor:
    """Goes through the parts of an experiment, and tells what it finds: a line each.

    Attributes:
        errors: those that were found.  warnings: how many.
    """

    def __init__(self, config: Config, args: argparse.Namespace) -> None:
        self.config, self.args = config, args
        self.errors: list[str] = []
        self.warnings = 0
        self.train: Mixture | None = None
        self.val: ShardSet | None = None
        self.on_gpu = args.gpus is not None or torch.cuda.is_available()
        self.processes = args.gpus or max(1, torch.cuda.device_count())

    def examine(self) -> None:
        """All parts. What one of them lacks is told there, and does not keep the others from being looked at."""
        parts: dict[str, Callable[[], Iterator[str]]] = {
            "data": self._data, "experiment": self._experiment, "weights": self._weights, "memory": self._memory,
            "time": self._time, "hosts": self._hosts,
        }  # fmt: skip
        for title, part in parts.items():
            print(title, flush=True)
            try:
                for line in part():
                    print(f"  {line}", flush=True)
            except (DataError, ModelError, TrainError, OSError) as error:
                self._error(str(error))

    def _error(self, text: str) -> None:
        if not any(told.endswith(text) for told in self.errors):  # by the part before, with the key in front
            self.errors.append(text)
            print(f"  error: {text}", flush=True)

    def _warning(self, text: str) -> str:
        self.warnings += 1
        return f"warning: {text}"

    def _data(self) -> Iterator[str]:
        cache = FileCache(self.config.data.cache, round(self.config.data.cache_gigabytes * GB))
        sets = {entry.path: "train" for entry in self.config.data.train}
        if self.config.data.val:
            sets[self.config.data.val] = "val"
        for location in sets:
            for problem in verify(location, cache, tars=TARS_READ):
                self._error(f"{problem}; copy it again or build the set again")
        if self.config.data.val:
            self.val = ShardSet.open(self.config.data.val, cache)
        self.train = Mixture.open(self.config.data.train, cache)
        yield f"{len(self.train)} training and {len(self.val) if self.val else 0} validation images of {self._label_set()}"
        yield f"of each set {TARS_READ} tars at most were read against their sha256 (python -m data.inspect reads all)"
        yield from map(self._warning, self.train.label_set.warnings())
        yield from self._classes(self.train)
        for name, shards in self._pictured():
            path = self.config.output_dir / f"doctor_{name}.png"
            save_png(path, example_sheet(shards, PICTURES))
            yield f"look at {path}: on the right, mirrored, a left eye has the colour of a left eye"

    def _label_set(self) -> str:
        return f"{self.train.label_set.name}, {self.train.label_set.num_classes} classes"

    def _pictured(self) -> Iterator[tuple[str, ShardSet]]:
        yield "train", self.train.members[0].shards
        if self.val:
            yield "val", self.val

    def _classes(self, train: Mixture) -> Iterator[str]:
        names, images = train.label_set.classes, train.images_showing()
        for name, count, known in zip(names, images, train.labelled.any(axis=0), strict=True):
            if known and count < few_images(len(train)):
                yield self._warning(
                    f"{name} is in {count} of {len(train)} training images; label more of it, or leave it out of the label set"
                )
        if self.val:
            unseen = [name for name, pixels in zip(names, self.val.pixel_counts, strict=True) if not pixels]
            if unseen:
                yield self._warning(f"{self.val.location} shows no {', '.join(unseen)}: no score will tell how well it is learnt")

    def _experiment(self) -> Iterator[str]:
        config = self.config
        if self.train is None:
            deepspeed_config.resolve(config, self.processes, self.on_gpu)
            yield "not looked at whole: the shards are missing"
            return
        settings = check(config, self.train, self.val, self.processes, self.on_gpu)
        size = "x".join(map(str, config.model.image_size))
        where = f"{self.processes} x {'GPU' if self.on_gpu else 'CPU'}"
        yield f"{config.model.arch} at {size} on {where}, {config.deepspeed}"
        yield (
            f"batch {config.global_batch_size} = {config.micro_batch_size} x {self.processes} x "
            f"{settings['gradient_accumulation_steps']} accumulated"
        )
        found = checkpoint.sources(config.output_dir, config.resume_from)
        yield f"goes on from {found[0]}" if found else f"a new run in {config.output_dir}"

    def _weights(self) -> Iterator[str]:
        config = self.config
        if config.load_from is None:
            yield "fresh: load_from names no file"
            if config.model.arch.startswith("sapiens"):  # of which Meta has released some
                yield self._warning("load_from: names no weights: training from scratch takes far more images and time")
            return
        if config.load_from.startswith(HUB):
            yield f"{config.load_from} is looked at when the run starts: it may have to be fetched"
            return
        classes = self.train.label_set.classes if self.train else ()
        with torch.device("meta"):
            model = build_segmenter(
                config.model.arch, max(2, len(classes)), config.model.image_size, config.model.patch_padding,
                config.model.rope_precision,
            )  # fmt: skip
        _, report = match_weights(model, config.load_from, classes, config.load_partial, config.load_classes)
        yield from report.summary().splitlines()

    def _memory(self) -> Iterator[str]:
        if self.train is None:
            yield "not known: the shards tell the number of classes"
            return
        have = self.args.gpu_memory * GB if self.args.gpu_memory else _memory_here(self.on_gpu)
        all_labelled = bool(self.train.labelled.all())
        remedies = Remedies(self.train.label_set, all_labelled, self.processes, self.on_gpu, have)
        yield from remedies.table(self.config)
        own = remedies.fit(self.config)
        if own is None:  # the experiment's error, told above
            return
        if own.fits:
            yield f"fits into {have / GB:.0f} GB, by {(have - own.needed) / GB:.1f} GB" if have else _smallest(own)
            return
        found = remedies.cheapest(self.config)
        remedy = f"the cheapest change that fits: {found}" if found else "nothing that can be set makes it fit: take more GPUs"
        self._error(f"memory: {own.needed / GB:.1f} GB are needed, {have / GB:.1f} GB are there; {remedy}")

    def _time(self) -> Iterator[str]:
        if self.train is None:
            yield "not known: the shards tell the length of an epoch"
            return
        config, length = self.config, training_order(self.config, self.train).epoch_length
        steps = config.total_steps(length)
        images = steps * config.global_batch_size
        yield f"{steps} steps of {config.global_batch_size} images: {images / length:.1f} epochs of {length}"
        rate, whose = self.args.images_per_second, "as given"
        measured = config.output_dir / "metrics.jsonl"
        if rate is None and measured.exists():
            _, rates = read_metrics(measured).get("speed/images_per_second", ((), ()))
            rate, whose = (rates[-1] if rates else None), f"as measured in {config.output_dir}"
        if rate is None:
            yield "how long: give --images-per-second, which a few steps with schedule.steps=50 tell"
        else:
            yield f"{images / rate / 3600:.1f} hours at {rate:.3g} images/s, {whose}, without validation"

    def _hosts(self) -> Iterator[str]:
        if self.args.hostfile is None:
            yield "none asked: --hostfile names them"
            return
        if not self.args.hostfile.is_file():
            raise TrainError(f"{self.args.hostfile}: no such hostfile; a line of it is `worker-1 slots=8`")
        variables = {
            "HOSTFILE": str(self.args.hostfile.absolute()), "OUTPUT_DIR": str(self.config.output_dir.absolute()),
            "PREFLIGHT_TIMEOUT": str(PREFLIGHT_SECONDS),
        }  # fmt: skip
        done = subprocess.run(
            ["launch/preflight.sh"], env={**os.environ, **variables}, stdin=subprocess.DEVNULL, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        yield from done.stdout.splitlines()
        if done.returncode:
            raise TrainError("launch/preflight.sh found hosts that are not fit, see above; mend them, or leave them out")


def _memory_here(on_gpu: bool) -> float | None:
    """Bytes of this machine's first GPU, or of all it has where the CPU trains; None for GPUs that are elsewhere."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory
    return None if on_gpu else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _smallest(own: Fit) -> str:
    return f"{own.needed / GB:.1f} GB are needed on each GPU; --gpu-memory tells whether they are there"


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m train.doctor", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--gpus", type=whole_number(1), help="of the whole run (default: those here, else the CPU)")
    parser.add_argument("--gpu-memory", type=float, metavar="GB", help="of one GPU (default: of the first one here)")
    parser.add_argument(
        "--images-per-second", type=float, metavar="N", help="of the whole run (default: as OUTPUT_DIR's run had)"
    )
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
    print(f"errors: {len(doctor.errors)}, warnings: {doctor.warnings}{'' if doctor.errors else '; ready'}")
    return 1 if doctor.errors else 0


if __name__ == "__main__":
    sys.exit(main())
