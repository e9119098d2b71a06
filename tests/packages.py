"""Programs of the system that these tests need."""

import fcntl
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

# Of each Debian package one command that is there when the package is.
COMMANDS = {
    "slurmctld": "slurmctld", "slurmd": "slurmd", "slurm-client": "sbatch", "munge": "munged", "openssh-server": "sshd",
    "openssh-client": "ssh", "iproute2": "ip", "shellcheck": "shellcheck",
    "chromium": "chromium",
}  # fmt: skip
PATH = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
SECONDS = 120


def needed(*names: str) -> None:
    """Packages or commands of COMMANDS: those that are missing are installed if that is possible, else the test is skipped."""
    packages = {command: package for package, command in COMMANDS.items()}
    packages = [packages.get(name, name) for name in names]
    if not _missing(packages):
        return
    with (Path(tempfile.gettempdir()) / f"packages-{os.getuid()}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several workers of pytest-xdist ask at once
        missing = _missing(packages)
        reason = _install(missing) if missing else ""
    if missing := _missing(packages):
        pytest.skip(f"needs {' '.join(missing)}, {reason}; apt-get install {' '.join(missing)}")


def command(name: str) -> str:
    """The path of a command, which may be one for administrators."""
    found = shutil.which(name, path=PATH)
    assert found, f"{name}: not found in {PATH}"
    return found


def _missing(packages: list[str]) -> list[str]:
    return [package for package in packages if not shutil.which(COMMANDS.get(package, package), path=PATH)]


def _install(packages: list[str]) -> str:
    """Returns why they could not be installed."""
    apt = shutil.which("apt-get")
    if not apt or os.getuid() != 0:
        return "which only root can install by apt-get"
    # With RUNLEVEL=1 their services are not started.
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}
    for arguments in (["update"], ["install", "-y", "--no-install-recommends", *packages]):
        try:
            done = subprocess.run([apt, *arguments], env=environment, capture_output=True, text=True, timeout=SECONDS)
        except subprocess.TimeoutExpired:
            return f"and apt-get {arguments[0]} took more than {SECONDS} s"
    return "" if done.returncode == 0 else f"and apt-get said: {(done.stderr.strip().splitlines() or ['nothing'])[-1]}"
