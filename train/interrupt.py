"""When a run has to leave early: it is asked to, or the processes that it belongs to are gone.

Asked by SIGTERM, SIGUSR1 or SIGINT to any rank, by a file `stop` in the output folder, or by the end of the launcher, all
ranks save at the same step and exit with INTERRUPTED; the same command continues the run. A second signal ends at once.
"""

import os
import select
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path

import psutil

from train.logs import log

INTERRUPTED = 75  # EX_TEMPFAIL: try again
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
SAME = 3.0  # seconds: launchers pass a signal on that the whole process group has had already
LAUNCHER_GONE = 60.0  # seconds to save in
FELLOW_GONE = 10.0  # seconds for the collective that waits for it to raise


class Interrupt:
    """Watches in a thread of its own: the main one may be waiting in a collective, where Python handles no signal."""

    def __init__(self, output_dir: Path, is_main: bool) -> None:
        self.stop_file = output_dir / "stop" if is_main else None
        self.reason = ""
        self._leaving = False
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        for number in SIGNALS:
            signal.signal(number, lambda *_: None)  # what counts is the byte in the pipe
        parents = psutil.Process().parents()
        self._launchers = [process for process in parents[:2] if _is_launcher(process)]
        self._fellows = parents[0].children() if parents and parents[0] in self._launchers else []
        self._launchers += [process for process in parents if str(process.pid) == os.environ.get("NODE_SH_PID")]
        threading.Thread(target=self._watch, args=(reading,), name="interrupt-watch", daemon=True).start()

    @property
    def requested(self) -> bool:
        """Whether this rank has been asked to leave; the others learn of it by a sum."""
        with suppress(OSError):  # of a file system that is away for a moment
            if self.stop_file and self.stop_file.exists():
                self.reason = f"{self.stop_file} is there"
                self.stop_file.unlink(missing_ok=True)
        return bool(self.reason)

    def leaving(self) -> None:
        """From now on the end of the others is in order, and signals are passed over."""
        self._leaving = True

    def a_fellow_is_gone(self, seconds: float = 3.0) -> bool:
        """Whether another process of this launcher has ended, or does so within so many seconds."""
        deadline = time.monotonic() + seconds
        while all(map(_is_alive, self._fellows)):
            if time.monotonic() > deadline or not self._fellows:
                return False
            time.sleep(0.1)
        return True

    def _watch(self, signals: int) -> None:
        first = launcher_gone = fellow_gone = None
        while not self._leaving:
            ready, _, _ = select.select([signals], [], [], 1.0)
            now = time.monotonic()
            for number in os.read(signals, 64) if ready else b"":
                if number not in SIGNALS:  # of a loader's worker that has ended, for example
                    continue
                if first is not None and now - first > SAME:
                    os._exit(128 + number)
                if first is None:
                    first, self.reason = now, f"received {signal.Signals(number).name}"
                    log.warning("%s: saves after this step and ends; once more ends it at once", self.reason)
            if launcher_gone is None and not all(map(_is_alive, self._launchers)):
                log.warning("the launcher is gone: saves after this step and ends")  # whoever notices it first: rank 0 may not
                launcher_gone, self.reason = now, "the launcher is gone"
            if fellow_gone is None and self.a_fellow_is_gone(seconds=0):
                fellow_gone = now
            for since, seconds, what in (
                (launcher_gone, LAUNCHER_GONE, "its launcher"),
                (fellow_gone, FELLOW_GONE, "another process of the run"),
            ):
                if since is not None and now - since > seconds and not self._leaving:
                    log.error("leaves: %s has been gone for %d s", what, seconds)
                    os._exit(143)


def _is_launcher(process: psutil.Process) -> bool:
    """Whether it is one of DeepSpeed's: another parent may well end before its training does."""
    try:
        command = process.cmdline()
        return any(os.path.basename(part) == "deepspeed" or part.startswith("deepspeed.launcher.") for part in command[:5])
    except psutil.Error:
        return False


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
