"""What a run says on a terminal, and where there is none."""

import os
import pty
import re
import subprocess
import termios

from tests.conftest import ROOT, train, train_command, train_environment


def on_a_terminal(command: list[str]) -> tuple[int, str]:
    """Exit code, and what a terminal of 160 columns was sent."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (40, 160))
    process = subprocess.Popen(command, cwd=ROOT, env=train_environment(), stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    sent = b""
    try:
        while block := os.read(ours, 1 << 16):
            sent += block
    except OSError:  # EIO: the last process has closed it
        pass
    finally:
        os.close(ours)
    return process.wait(60), sent.decode()


def test_a_terminal_has_one_live_line(shards, tmp_path):
    code, sent = on_a_terminal(train_command(shards, tmp_path / "run", "schedule.steps=12", "log_every=2"))
    assert code == 0, sent
    live = [line for line in re.split(r"[\r\n]", sent) if re.search(r"\d+/12 \[", line)]
    assert len(live) > 1 and "12/12" in live[-1] and "loss" in live[-1] and "images/s" in live[-1], live
    assert "step 2/12" not in sent  # on the live line instead
    assert f"model          {tmp_path}/run/model.safetensors" in sent
    assert f"python -m train.report {tmp_path}/run" in sent
    assert "step 2/12  loss" in (tmp_path / "run/log.txt").read_text()


def test_elsewhere_there_is_a_plain_line_every_so_many_steps(shards, tmp_path):
    """Of rank 0 alone."""
    run = train(shards, tmp_path / "run", "schedule.steps=12", "log_every=4", processes=2)
    assert run.code == 0, run.output
    told = re.findall(r"^step (\d+)/12  loss [\d.]+  lr \S+  [\d.]+ images/s  ETA \d+:\d\d:\d\d$", run.output, re.MULTILINE)
    assert told == ["4", "8", "12"], run.output
    assert "\r" not in run.output and "step/s" not in run.output
