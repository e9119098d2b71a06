"""How fast the processes are, what they use, and which of them holds the others up."""

import math
import os
import resource
import socket
import statistics
from contextlib import suppress

import psutil
import torch
import torch.distributed as dist

from train.clock import StepClock
from train.config import Config
from train.engine import Job
from train.flops import peak_flops, training_flops
from train.logs import log

PHASES = ("data", "wait", "forward", "backward", "optimizer")  # of a step; `wait` is for the others' data
OWN_PHASES = {"data": "for data", "forward": "for the forward pass"}  # in which a process depends on itself
LEAST_SHARE = 0.1  # of a step: a slow process that costs less is not told
REPEAT = 20  # readings in a row, after which the same is told again


class Pace:
    """Every rank must make the same calls: what each has measured is gathered."""

    def __init__(self, config: Config, num_classes: int, stage: int, clock: StepClock, job: Job) -> None:
        self.config, self.stage, self.clock, self.job = config, stage, clock, job
        places: list[tuple[str, str]] = [("", "")] * job.world_size
        dist.all_gather_object(places, (socket.gethostname(), os.environ["LOCAL_RANK"]))
        self.hosts, self.gpus = zip(*places, strict=True)
        self.flops = _flops(config, num_classes) if job.is_main else math.nan
        self.peak = peak_flops(config, job.device)
        self._seen: dict[str, tuple[tuple[bool, ...], int]] = {}  # what was found, in how many readings in a row
        self._first = True
        clock.read()
        psutil.cpu_percent()  # since the last call, from the second one on

    def read(self, steps: int) -> dict[str, float]:
        """Of the `steps` since the last reading, by the names that dashboards show; empty on ranks other than 0.

        speed/*_ms are the means of all ranks for a step, memory/* the largest of any rank in GB (10^9 bytes), node/* each
        host's and GPU's own.
        """
        spent, used = self.clock.read(), _used(self.job)
        seconds = sum(spent.values()) - spent["validation"] - spent["export"]
        rows = self.job.gather([seconds / steps, *(spent[phase] / steps for phase in PHASES), *used.values()])
        if not self.job.is_main:
            return {}
        columns = dict(zip(("step", *PHASES, *used), zip(*rows, strict=True), strict=True))
        step = statistics.mean(columns["step"])
        if not self._first:  # in which the loaders have begun, and libraries have warmed up
            self._look_for_stragglers(columns, step)
            self._look_for_starvation(max(columns["data"]), step)
        self._first = False
        rate = self.config.global_batch_size / step
        each = rate / self.job.world_size
        values = {
            "speed/images_per_second": rate,
            "speed/images_per_second_per_gpu": each,
            "speed/tflops_per_gpu": each * self.flops / 1e12,
            "speed/step_ms": 1e3 * step,
            **{f"speed/{phase}_ms": 1e3 * statistics.mean(columns[phase]) for phase in PHASES},
            "speed/slowest_data_ms": 1e3 * max(columns["data"]),
            "speed/slowest_forward_ms": 1e3 * max(columns["forward"]),
            "memory/peak_gb": max(columns["peak_gb"]),
            "memory/reserved_gb": max(columns["reserved_gb"]),
        }
        if self.peak:
            values["speed/mfu"] = each * self.flops / self.peak
        for rank, (host, gpu) in enumerate(zip(self.hosts, self.gpus, strict=True)):
            for name in used:
                what, _, of = name.partition("_")
                if what in ("gpu", "host"):
                    values[f"node/{host}/{f'gpu{gpu}/' if what == 'gpu' else ''}{of}"] = columns[name][rank]
        return {key: value for key, value in values.items() if not math.isnan(value)}

    def _look_for_stragglers(self, columns: dict[str, tuple[float, ...]], step: float) -> None:
        for phase, what in OWN_PHASES.items():
            if phase == "forward" and self.stage == 3:  # it waits for the weights of the others
                continue
            times = columns[phase]
            slowest = max(range(len(times)), key=times.__getitem__)
            usual = statistics.median(seconds for rank, seconds in enumerate(times) if rank != slowest or len(times) == 1)
            slow = times[slowest] > self.config.guard.straggler_factor * usual and times[slowest] - usual > LEAST_SHARE * step
            who = f"straggler: rank {slowest} on {self.hosts[slowest]}"
            took = f"needs {1e3 * times[slowest]:.0f} ms of a step {what}, the others {1e3 * usual:.0f} ms and wait"
            self._tell(phase, (slow, slowest), f"{who} {took}")

    def _look_for_starvation(self, seconds: float, step: float) -> None:
        text = (
            f"{seconds / step:.0%} of a step's {1e3 * step:.0f} ms are waited for data; raise data.workers (now "
            f"{self.config.data.workers}) up to the cores that each GPU has, or keep the shards on a local disk"
        )
        self._tell("starvation", (seconds > self.config.guard.data_share * step,), text)

    def _tell(self, subject: str, found: tuple[bool, ...], text: str) -> None:
        """When the same is `found` in two readings in a row, and again after every REPEAT of them."""
        before, times = self._seen.get(subject, (found, 0))
        times = times + 1 if found == before else 1
        self._seen[subject] = found, times
        if found[0] and times % REPEAT == 2:
            log.warning("%s", text)


def _flops(config: Config, num_classes: int) -> float:
    try:
        return training_flops(config, num_classes)
    except Exception as error:  # of a model of timm's that does something unusual; the run matters more
        log.warning("the arithmetic of a step could not be counted, there will be no TFLOP/s and no MFU: %s", error)
        return math.nan


def _used(job: Job) -> dict[str, float]:
    """NaN: not to be had. GPU memory is what tensors take, or what torch keeps; on a CPU all of the process."""
    used = dict.fromkeys(("peak_gb", "reserved_gb", "gpu_utilization_percent", "gpu_celsius", "gpu_watts"), math.nan)
    if job.on_gpu:
        used["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
        used["reserved_gb"] = torch.cuda.max_memory_reserved() / 1e9
        told = {"utilization_percent": torch.cuda.utilization, "celsius": torch.cuda.temperature, "watts": torch.cuda.power_draw}
        for name, ask in told.items():
            with suppress(Exception):  # NVML tells of each in its own way that it cannot
                used[f"gpu_{name}"] = ask() / (1e3 if name == "watts" else 1)
    else:
        used["peak_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    return {**used, "host_cpu_percent": psutil.cpu_percent(), "host_memory_percent": psutil.virtual_memory().percent}
