"""Where a process's time goes, and what it is doing now."""

import time
from collections import defaultdict
from itertools import pairwise
from typing import NamedTuple

import torch


class Place(NamedTuple):
    """Where in the run a process is: all ranks go through the same phases in the same order."""

    count: int  # of the phases so far
    step: int
    phase: str
    since: float  # time.monotonic()


class StepClock:
    """Laps from one phase of a step to the next.

    On a GPU the marks are events in its stream, so that the laps are the device's and nothing waits for being timed. Each
    step ends with the host waiting for the device: what the host does between two steps, as fetching data, counts in full.

    Attributes:
        place: for those who look from another thread.
    """

    def __init__(self, on_gpu: bool) -> None:
        self._on_gpu = on_gpu
        self._laps: list[tuple[str, float | torch.cuda.Event]] = []
        self.step = 0
        self.place = Place(0, 0, "other", time.monotonic())
        self.enter("other")

    def enter(self, phase: str) -> None:
        """Here the phase before ends and this one begins."""
        self.place = Place(self.place.count + 1, self.step, phase, time.monotonic())
        event = torch.cuda.current_stream().record_event(torch.cuda.Event(enable_timing=True)) if self._on_gpu else None
        self._laps.append((phase, event or self.place.since))

    def read(self) -> dict[str, float]:
        """Seconds of each phase since the last reading. The phase that goes on has its share in the next one."""
        laps, self._laps = self._laps, self._laps[-1:]
        if self._on_gpu:
            laps[-1][1].synchronize()
        seconds: dict[str, float] = defaultdict(float)
        for (phase, start), (_, end) in pairwise(laps):
            seconds[phase] += start.elapsed_time(end) / 1e3 if self._on_gpu else end - start
        return seconds
