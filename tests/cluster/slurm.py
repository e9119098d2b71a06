"""A real Slurm of three nodes on this machine: its own munge, ports and folder, so that several can live side by side.

`python -m tests.cluster.slurm FOLDER` is the process that ends one: when its standard input does, be it that the test has
closed it or that pytest was killed.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from tests.cluster.slurm_config import NODES, write
from tests.conftest import PATIENCE, ROOT
from tests.packages import PATH, command

TERMINAL = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "DEADLINE", "OUT_OF_MEMORY", "BOOT_FAIL"}
REQUEUE_SECONDS = 30  # a job that is being requeued shows the state of its end for so long at most
FIELD = re.compile(r"(?:^| )([A-Z][\w:/]*)=(.*?)(?= [A-Z][\w:/]*=|$)")


class Slurm:
    """Runs from its creation to `stop`.

    Args:
        logs: an existing folder, to which the daemons' logs are copied in the end.
    """

    def __init__(self, logs: Path | None = None):
        self.folder = Path(tempfile.mkdtemp(prefix="slurm", dir="/tmp"))  # short: paths of sockets have 100 characters
        self.logs = logs
        self._down: set[str] = set()
        self._end = subprocess.Popen(
            [sys.executable, "-m", __name__, str(self.folder)], cwd=ROOT, start_new_session=True,
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        try:
            write(self.folder)
            self._start()
        except BaseException:
            self.stop()
            raise

    @property
    def environment(self) -> dict[str, str]:
        """What the commands of Slurm need, to be added to os.environ."""
        return _variables(self.folder)

    def run(
        self, *command: object, check: bool = True, timeout: float = PATIENCE, **environment: str
    ) -> subprocess.CompletedProcess:
        """Runs a command in the repository's root as a user of the cluster does."""
        done = _run(self.folder, [str(word) for word in command], timeout, environment)
        if check:
            assert done.returncode == 0, f"{command}: exit code {done.returncode}\n{done.stdout}{done.stderr}"
        return done

    def jobs(self, job: object) -> list[dict[str, str]]:
        """The fields of a job, or of each task of an array; none when there is no such job."""
        shown = self.run("scontrol", "show", "job", "-o", job, check=False)
        lines = [line for line in shown.stdout.splitlines() if line.startswith("JobId=")]
        return [{name: value.strip() for name, value in FIELD.findall(line)} for line in lines]

    def job(self, job: object) -> dict[str, str]:
        found = self.jobs(job)
        assert found, f"there is no job {job}\n{self._tails()}"
        return found[0]

    def state(self, job: object) -> str:
        return self.job(job)["JobState"]

    def restarts(self, job: object) -> int:
        return int(self.job(job)["Restarts"])

    def wait(self, job: object, *states: str, timeout: float = PATIENCE) -> dict[str, str]:
        """Until the job is in one of the states; returns its fields then.

        Raises:
            AssertionError: the time is over, or the job has ended otherwise.
        """
        start = alive = time.monotonic()
        while (fields := self.job(job))["JobState"] not in states:
            now = time.monotonic()
            if fields["JobState"] not in TERMINAL:
                alive = now
            over = now - start > timeout
            assert not over and now - alive < REQUEUE_SECONDS, self._told(job, fields, f"not {' or '.join(states)}", now - start)
            time.sleep(0.2)
        return fields

    def set_node(self, name: str, state: str) -> None:
        """DOWN, or RESUME."""
        reason = ["Reason=test"] if state in ("DOWN", "DRAIN", "FAIL") else []
        self.run("scontrol", "update", f"NodeName={name}", f"State={state}", *reason)
        (self._down.add if reason else self._down.discard)(name)

    def restore_nodes(self) -> None:
        """Brings those back that `set_node` took away."""
        if not self._down:
            return
        for name in sorted(self._down):
            self.set_node(name, "RESUME")
        assert _soon(self._there, 30), f"the nodes are not back after 30 s\n{self._tails()}"

    def cancel(self, seconds: float = 8) -> bool:
        """Cancels all jobs; says whether the queue was empty in time."""
        return _cancel(self.folder, seconds)

    def stop(self) -> None:
        """Ends the daemons and what they have started; leaves no process and no folder."""
        if self.logs and (self.folder / "log").is_dir():
            shutil.copytree(self.folder / "log", self.logs, dirs_exist_ok=True)
        _, told = self._end.communicate(timeout=PATIENCE)
        assert self._end.returncode == 0 and not self.folder.exists(), told

    def _start(self) -> None:
        munge = self.folder / "munge"
        places = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        options = [f"--{option}={munge / name}" for option, name in places.items()]
        self._daemon(command("munged"), "--force", *options)
        config = str(self.folder / "slurm.conf")
        self._daemon(command("slurmctld"), "-f", config, "-c")
        for node in NODES:
            self._daemon(command("slurmd"), "-f", config, "-N", node)
        assert _soon(self._idle, 20), f"the nodes are not idle after 20 s\n{self._tails()}"

    def _daemon(self, *words: str) -> None:
        """Starts one that goes into the background by itself."""
        with (self.folder / "log/start.txt").open("ab") as log:
            done = subprocess.run(
                words, cwd=self.folder, env={**os.environ, "PATH": PATH, **self.environment}, timeout=PATIENCE,
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        assert done.returncode == 0, f"{words}: exit code {done.returncode}\n{self._tails()}"

    def _states(self) -> list[str]:
        return self.run("sinfo", "-hNp", "main", "-o", "%T", check=False, timeout=20).stdout.split()

    def _idle(self) -> bool:
        return self._states() == ["idle"] * len(NODES)

    def _there(self) -> bool:
        states = self._states()  # with a star those that do not answer yet
        return len(states) == len(NODES) and not any(state.startswith(("down", "drain")) or "*" in state for state in states)

    def _told(self, job: object, fields: dict[str, str], what: str, seconds: float) -> str:
        shown = "\n".join(f"  {name}={value}" for name, value in fields.items())
        outputs = {fields.get("StdOut", ""), fields.get("StdErr", "")}
        tails = "".join(_tail(Path(path), 40) for path in sorted(outputs) if path)
        return f"job {job} is {fields['JobState']}, {what}, after {seconds:.0f} s\n{shown}\n{tails}{self._tails()}"

    def _tails(self) -> str:
        return "".join(_tail(path, 30) for path in sorted((self.folder / "log").iterdir()))


def end(folder: Path) -> None:
    """Ends the cluster in `folder`, whatever of it has been started, and removes the folder."""
    try:
        if (folder / "run/slurmctld.pid").exists():
            with suppress(subprocess.TimeoutExpired):
                _cancel(folder, 8)
    finally:
        _kill([pid for path in folder.glob("run/*.pid") if (pid := _pid(path))], 5)
        _kill(_steps(folder), 1)
        _kill([pid for path in folder.glob("munge/pid") if (pid := _pid(path))], 5)
        shutil.rmtree(folder)


def _variables(folder: Path) -> dict[str, str]:
    return {"SLURM_CONF": str(folder / "slurm.conf")}


def _run(folder: Path, words: list[str], timeout: float, environment: dict[str, str]) -> subprocess.CompletedProcess:
    # The tests themselves may run in a job of another cluster.
    outer = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
    return subprocess.run(
        words, cwd=ROOT, env={**outer, **_variables(folder), **environment},
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout,
    )  # fmt: skip


def _cancel(folder: Path, seconds: float) -> bool:
    def queue() -> list[str]:
        return _run(folder, ["squeue", "-ho", "%A"], 10, {}).stdout.split()

    if jobs := sorted(set(queue())):
        _run(folder, ["scancel", *jobs], 10, {})
    return _soon(lambda: not queue(), seconds)


def _steps(folder: Path) -> list[int]:
    """Processes of this cluster's jobs and what guards them."""
    ours = "=".join(*_variables(folder).items()).encode()
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            variables = (process / "environ").read_bytes().split(b"\0")
            guard = (process / "comm").read_text().startswith("slurmstepd")
            if ours in variables and (guard or any(name.startswith(b"SLURM_JOB_ID=") for name in variables)):
                found.append(int(process.name))
    return found


def _tail(path: Path, lines: int) -> str:
    if not path.is_file():
        return f"--- {path}: not there\n"
    return "\n".join([f"--- {path}", *path.read_text(errors="replace").splitlines()[-lines:], ""])


def _soon(true, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def _pid(path: Path) -> int | None:
    with suppress(OSError, ValueError):
        return int(path.read_text())
    return None


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _kill(processes: list[int], seconds: float) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        for pid in filter(_alive, processes):
            with suppress(ProcessLookupError):
                os.kill(pid, number)
        if _soon(lambda: not any(map(_alive, processes)), seconds):
            return


if __name__ == "__main__":
    sys.stdin.read()
    end(Path(sys.argv[1]))
