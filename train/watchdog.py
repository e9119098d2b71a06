"""Ends a run that hangs, and names the process that the others wait for.

A thread of each process looks at what its process does. When one has been at the same thing for too long, all of them write
down where they are, with the stacks of their threads, to OUTPUT_DIR/stacks/. They are files, not messages: rank 0, which
would pass those on, may be the one that sleeps.
"""

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from pathlib import Path
from traceback import walk_stack
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d

from train import engine
from train.clock import StepClock
from train.logs import record_error

UNWATCHED = ("checkpoint", "export")  # which take as long as the disk does
SILENT = 30.0  # seconds, after which a process that has written nothing is taken for stopped
LAST_RESORT = 120.0  # seconds: the folder, or the console, may be what hangs


class Watchdog:
    """At work inside a `with` statement. Every rank must make one."""

    def __init__(self, clock: StepClock, minutes: float | None, output_dir: Path, job: engine.Job) -> None:
        """minutes: how long a phase of a step may take; None: for ever."""
        self.clock, self.limit, self.job = clock, 60 * (minutes or 0), job
        started = [time.strftime("%Y%m%d_%H%M%S")]
        dist.broadcast_object_list(started)
        self.folder = output_dir / "stacks" / started[0]  # none has seen it: a network's file system remembers what was there
        self._ended = threading.Event()
        self._nowhere = open(os.devnull, "w")  # now: later there may be no memory for it

    def __enter__(self) -> None:
        if self.limit:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def __exit__(self, *_: object) -> None:
        self._ended.set()

    def _watch(self) -> None:
        interval, awake = min(5.0, self.limit / 4), time.monotonic()
        while not self._ended.wait(interval):
            now, place = time.monotonic(), self.clock.place
            if now - awake > self.limit / 2 + interval:
                awake = now  # the process was suspended, and is not to blame
                continue
            awake = now
            stuck = place.phase not in UNWATCHED and now - place.since > self.limit
            if stuck or self.folder.exists():
                self._give_up()

    def _give_up(self) -> None:
        faulthandler.dump_traceback_later(LAST_RESORT, exit=True, file=self._nowhere)
        place = self.clock.place
        told = {**place._asdict(), "host": socket.gethostname(), "waits": _in_a_collective()}
        self._write(told)
        found, deadline = self._read(told), time.monotonic() + min(SILENT, self.limit)
        while len(found) < self.job.world_size and time.monotonic() < deadline:
            time.sleep(0.5)
            found = self._read(told)
        if self.job.rank == min(found):
            text = f"no progress for {self.limit:.0f} s: {verdict(found, self.job.world_size)}. Stacks: {self.folder}/. "
            text += "If a step may take so long, raise guard.hang_minutes; else start again to continue from the last checkpoint"
            record_error(text)
            print(f"error: {text}", file=sys.stderr, flush=True)
        else:
            time.sleep(2)  # the reason stands first
        os._exit(1)

    def _write(self, told: dict[str, Any]) -> None:
        path = self.folder / f"rank_{self.job.rank:05d}.txt"
        beside = path.with_suffix(".new")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with beside.open("w") as file:
                file.write(json.dumps(told) + "\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
            os.replace(beside, path)
        except OSError:
            faulthandler.dump_traceback(sys.stderr, all_threads=True)

    def _read(self, told: dict[str, Any]) -> dict[int, dict[str, Any]]:
        found = {self.job.rank: told}
        for rank in range(self.job.world_size):
            try:
                with (self.folder / f"rank_{rank:05d}.txt").open() as file:
                    found[rank] = json.loads(file.readline())
            except (OSError, ValueError):
                continue
        return found


def _in_a_collective() -> bool:
    """Whether a thread of this process waits for other processes, as its Python frames tell."""
    files = (distributed_c10d.__file__, engine.__file__)
    frames = sys._current_frames().values()
    return any(frame.f_code.co_filename in files for top in frames for frame, _ in walk_stack(top))


def verdict(found: dict[int, dict[str, Any]], world_size: int) -> str:
    """Who is late, from what each rank has told: a `Place`, its `host`, and whether it `waits` for others."""
    silent = [str(rank) for rank in range(world_size) if rank not in found]
    if silent:
        return f"rank {', '.join(silent)} tells nothing and is waited for: it is stopped, or its host is gone"
    places = {rank: (told["count"], told["waits"]) for rank, told in found.items()}
    late = [rank for rank, place in places.items() if place == min(places.values())]
    where = "`{phase}` of step {step}".format(**found[late[0]])
    if len(late) == world_size:
        waiting = ", and wait for each other: look at the network" if found[late[0]]["waits"] and world_size > 1 else ""
        return f"all ranks are in {where}{waiting}"
    names = ", ".join(f"rank {rank} on {found[rank]['host']}" for rank in late)
    return f"{names} is late, in {where}; the others wait for it"
