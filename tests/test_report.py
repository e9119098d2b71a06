"""The page about a run, in a real browser."""

import json
import subprocess
from pathlib import Path

import cv2
import numpy as np
import pytest

from tests.conftest import PATIENCE, python, train
from tests.packages import needed

FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --hide-scrollbars --enable-logging=stderr --virtual-time-budget=15000"
).split()


@pytest.fixture(scope="module")
def reported(shards, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("reported") / "it's a <run> & more"
    run = train(shards, folder, "schedule.steps=8", "evaluate.every_steps=4", "peak_tflops=0.05")
    assert run.code == 0, run.output
    done = python("-m", "train.report", folder)
    assert done.returncode == 0 and done.stdout.strip() == str(folder / "report.html"), done.stderr
    return folder


def opened(page: Path, folder: Path) -> tuple[np.ndarray, str]:
    """RGB uint8 (h, w, 3) of a page in a browser, and what that says, the page's console included."""
    picture = folder / "page.png"
    done = subprocess.run(
        ["chromium", *FLAGS, f"--user-data-dir={folder / 'profile'}", f"--screenshot={picture}", "--window-size=1280,6200",
         page.as_uri()],
        capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    assert picture.exists(), done.stderr
    return cv2.imread(str(picture))[..., ::-1], done.stderr


def test_a_browser_shows_it_without_errors_or_a_network(reported, tmp_path):
    needed("chromium")
    page = tmp_path / "report.html"  # alone: all that it shows is in it
    page.write_bytes((reported / "report.html").read_bytes())
    shown, told = opened(page, tmp_path)
    assert "CONSOLE" not in told, told
    # Not blank: the bars of the classes have their colours, which the rest of the page is far from having as large areas.
    shown = shown.reshape(-1, 3)
    colors = json.loads(next(reported.glob("validation/step_00000008/scores.json")).read_text())["colors"]
    seen = [np.abs(shown[::7].astype(int) - color).max(1) <= 2 for color in colors[1:]]
    assert sum(mask.sum() > 100 for mask in seen) > len(seen) / 2


def test_a_browser_would_tell_of_anything_that_is_fetched(reported, tmp_path):
    """The page's own policy forbids it; a picture from elsewhere is what the test above would see in the console."""
    needed("chromium")
    page = tmp_path / "report.html"
    page.write_text((reported / "report.html").read_text().replace("<main>", '<main><img src="http://127.0.0.1:9/a.png">'))
    assert "violates the following Content Security Policy" in opened(page, tmp_path)[1]


def test_it_tells_the_run(reported):
    text = (reported / "report.html").read_text()
    assert "it&#39;s a &lt;run&gt; &amp; more" in text and "<run>" not in text
    lines = [json.loads(line) for line in (reported / "metrics.jsonl").read_text().splitlines()]
    miou = [line["val/miou"] for line in lines if "val/miou" in line][-1]
    for words in (f"{miou:.4f}", "arch: tiny", "where the pixels of each class went", "Worst validation images", "Throughput"):
        assert words in text, words
    assert text.partition("<main>")[2].count('src="data:image/png;base64,') == 3


def test_a_run_without_validation_or_with_half_a_line(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text('{"step": 0, "samples": 8, "train/loss": 1.5, "speed/mfu": null}\n{"step": 1, "tr')
    assert python("-m", "train.report", folder).returncode == 0
    assert "1.5000" in (folder / "report.html").read_text()


def test_odd_files_do_no_harm(tmp_path):
    """As of a disk that was full, or of other programs."""
    folder = tmp_path / "run"
    (folder / "validation/step_00000001").mkdir(parents=True)
    (folder / "validation/step_00000001/scores.json").write_text('{"confusion": [[1, 0], [0, 1]]}')
    (folder / "metrics.jsonl").write_text('5\n{"no": 1}\n{"step": 0, "train/loss": 1.5, "note": "text"}\n')
    (folder / "environment.json").write_text('{"packages": ["torch"], "processes": 1}')
    (folder / "config.yaml").write_text("model: tiny\n")
    assert python("-m", "train.report", folder).returncode == 0
    assert "1.5000" in (folder / "report.html").read_text()


def test_a_folder_without_a_run_is_told(tmp_path):
    done = python("-m", "train.report", tmp_path)
    assert done.returncode == 1 and done.stderr.startswith(f"error: {tmp_path}/metrics.jsonl: no metrics there; give the output")
