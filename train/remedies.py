"""Does a run fit into a GPU, and if not, what is the cheapest change that makes it?"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

from data.labels import LabelSet
from train import TrainError, deepspeed_config
from train.config import Config
from train.memory import Estimate
from train.zero_memory import Memory

GB = 1e9
CUDA_BYTES = 1.5e9  # what CUDA, cuDNN and NCCL take for themselves; a guess
FRAGMENTS = 1.05  # of what tensors take, PyTorch keeps so much: a guess
STAGES = ("zero0", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload")  # of ds_configs/
# What a change costs in a step's time, as a share of it: benchmarks/recomputation.py for what is computed again, guesses for the
# rest. Only their order matters.
RECOMPUTED = {"none": 0.0, "head": 0.02, "blocks": 0.25}
SHARDED = {"zero0": 0.0, "zero1": 0.0, "zero2": 0.01, "zero3": 0.2, "zero2_offload": 0.6, "zero3_offload": 1.0}
SINGLE = 0.05  # for each image less in a micro batch
VALIDATED_ALONE = 0.001  # one image at a time
# DeepSpeed's file, micro batch, what is recomputed, batch of validation.
Changes = tuple[Path, int, str | int, int]


@dataclass(frozen=True)
class Fit:
    """What a process needs, and whether it is there; where nobody knows what is there, it fits."""

    memory: Memory
    needed: float  # bytes
    fits: bool


class Remedies:
    """Asks `Estimate` about one experiment and its neighbours.

    Args:
        have: bytes of one GPU, or of the machine that trains on its CPU; None: not known.
    """

    def __init__(self, label_set: LabelSet, all_labelled: bool, processes: int, on_gpu: bool, have: float | None) -> None:
        self.estimate = Estimate(label_set, all_labelled, processes)
        self.processes, self.on_gpu, self.have = processes, on_gpu, have

    def fit(self, config: Config) -> Fit | None:
        """None for what cannot be trained so, as ZeRO-3 with `compile`."""
        try:
            settings = deepspeed_config.resolve(config, self.processes, self.on_gpu)
        except TrainError:
            return None
        return self._judge(self.estimate.memory(config, settings))

    def _judge(self, memory: Memory) -> Fit:
        needed = memory.device * FRAGMENTS + CUDA_BYTES if self.on_gpu else memory.device + memory.host + memory.copies
        return Fit(memory, needed, self.have is None or needed <= self.have)

    def table(self, config: Config) -> Iterator[str]:
        """Lines: the parts of a process's memory in GB, at every ZeRO stage; the experiment's own is marked."""
        parts = ("weights", "gradients", "optimizer", "activations", "buffers")
        yield f"GB of each process   {''.join(f'{part:>13}' for part in parts)}{'in all':>10}{'host':>8}"
        others = [Path(f"ds_configs/{name}.json") for name in STAGES]
        for path in others if config.deepspeed in others else [config.deepspeed, *others]:
            own = path == config.deepspeed
            found = self.fit(config.model_copy(update={"deepspeed": path}))
            line = f"{'*' if own else ' '} {path.stem:<19}"
            if found is None:
                yield f"{line}cannot be had with this experiment"
                continue
            told = "".join(f"{getattr(found.memory, part) / GB:>13.2f}" for part in parts)
            host = (found.memory.host + found.memory.copies) / GB
            fits = "" if self.have is None else "   fits" if found.fits else "   too much"
            yield f"{line}{told}{found.needed / GB:>10.2f}{host:>8.2f}{fits}"

    def cheapest(self, config: Config) -> tuple[str, Fit] | None:
        """The overrides that make it fit, in the way that costs the least time, and what it needs then; None if none does."""
        for changes in sorted(self._changes(config), key=_cost(config)):
            path, batch, recomputed, validated = changes
            model = config.model.model_copy(update={"recompute": recomputed})
            evaluate = config.evaluate.model_copy(update={"batch_size": validated})
            update = {"deepspeed": path, "micro_batch_size": batch, "model": model, "evaluate": evaluate}
            changed = config.model_copy(update=update)
            found = self.fit(changed) if self._may_fit(changed, config) else None
            if found and found.fits:
                was = config.deepspeed, config.micro_batch_size, config.model.recompute, config.evaluate.batch_size
                names = ("deepspeed", "micro_batch_size", "model.recompute", "evaluate.batch_size")
                told = (f"{name}={new}" for name, old, new in zip(names, was, changes, strict=True) if new != old)
                return " ".join(told), found
        return None

    def _may_fit(self, changed: Config, config: Config) -> bool:
        """Whether to look closer at smaller batches, which takes seconds for each: a batch takes its share of a larger one's
        memory or more, and that was measured."""
        size, validated = config.micro_batch_size, config.evaluate.batch_size
        whole = self.fit(changed.model_copy(update={"micro_batch_size": size, "evaluate": config.evaluate}))
        if whole is None:
            return False
        activations = whole.memory.activations * changed.micro_batch_size // size
        validation = whole.memory.validation * changed.evaluate.batch_size // validated
        return self._judge(replace(whole.memory, activations=activations, validation=validation)).fits

    def _changes(self, config: Config) -> Iterator[Changes]:
        """Each part what it is, or something that takes less memory."""
        known = list(SHARDED)
        stem = config.deepspeed.stem
        files = [Path(f"ds_configs/{name}.json") for name in known[known.index(stem) + 1 if stem in known else 0 :]]
        batches = [size for size in range(1, config.micro_batch_size + 1) if config.micro_batch_size % size == 0]
        levels, recomputed = list(RECOMPUTED), config.model.recompute
        stronger = levels[levels.index(recomputed) + 1 :] if recomputed in levels else ["blocks"]
        return product([config.deepspeed, *files], batches, [recomputed, *stronger], sorted({1, config.evaluate.batch_size}))


def _cost(config: Config):
    def cost(changes: Changes) -> float:
        path, batch, recomputed, validated = changes
        sharded = SHARDED.get(path.stem, 0.0) if path != config.deepspeed else 0.0
        again = RECOMPUTED.get(recomputed, 0.25) if recomputed != config.model.recompute else 0.0
        return (
            sharded
            + again
            + SINGLE * (config.micro_batch_size - batch)
            + VALIDATED_ALONE * (validated != config.evaluate.batch_size)
        )

    return cost
