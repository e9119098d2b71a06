"""The command that packs raw folders: all or nothing, every problem named, the same bytes each time."""

import json
import signal
import subprocess
import sys
import time
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from data.build_shards import NEXT, split_examples
from data.prepare import KINDS
from data.shards import ShardSet
from data.sources import RawExample
from tests.conftest import PATIENCE
from tests.raw_faces import SIZE, content, draw, encoded, run, smooth

RGB = smooth(np.random.default_rng(1))
IDS = np.random.default_rng(2).integers(0, 16, SIZE, np.uint8)
OUT_OF_RANGE = np.where(IDS == 3, 19, IDS).astype(np.uint8)


@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> Path:
    return draw(tmp_path_factory.mktemp("raw") / "dataset", 20)


@pytest.fixture(scope="module")
def built(raw, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("built") / "face"
    assert run(raw, out, "--samples-per-shard", 7) == 0
    return out


def test_shards_are_the_same_bytes_for_any_number_of_workers(raw, built, tmp_path):
    assert run(raw, tmp_path / "again", "--samples-per-shard", 7, "--workers", 3) == 0
    assert content(tmp_path / "again") == content(built)
    assert ShardSet.open(tmp_path / "again" / "train").fingerprint == ShardSet.open(built / "train").fingerprint


def test_masks_of_a_users_own_classes(raw, tmp_path, capsys):
    own = Path("data/label_sets/face19.yaml").read_text().replace("name: face19", "name: mine").replace("Nose", "Snout")
    (tmp_path / "mine.yaml").write_text(own)
    assert run(raw, tmp_path / "out", "--label-set", tmp_path / "mine.yaml") == 0
    label_set = ShardSet.open(tmp_path / "out" / "train").label_set
    assert (label_set.name, label_set.classes[2]) == ("mine", "Snout")
    assert run(raw, tmp_path / "other", "--label-set", "nowhere.yaml") == 2
    assert "nowhere.yaml" in capsys.readouterr().err


def damage(root: Path) -> dict[str, str]:
    """One example of each kind of problem in a folder of `draw`; kind -> file at fault."""
    (root / "000001.png").unlink()
    (root / "000002_seg.png").unlink()
    (root / "000003.png").write_bytes((root / "000003.png").read_bytes()[:200])
    (root / "000004_seg.png").write_bytes(encoded(RGB))
    (root / "000005_seg.png").write_bytes(encoded(IDS[:20]))
    (root / "000006_seg.png").write_bytes(encoded(OUT_OF_RANGE))
    (root / "000007_seg.png").write_bytes(encoded(np.full(SIZE, 255, np.uint8)))
    (root / "000008_seg.png").write_bytes(encoded(np.full(SIZE, 3, np.uint8)))
    return {
        "image_missing": "000001_seg.png",
        "mask_missing": "000002.png",
        "undecodable": "000003.png",
        "mask_not_index": "000004_seg.png",
        "size_mismatch": "000005_seg.png",
        "label_out_of_range": "000006_seg.png",
        "mask_empty": "000007_seg.png",
        "mask_constant": "000008_seg.png",
    }


def test_refuses_by_default_and_lists_every_problem(tmp_path, capsys):
    expected = damage(draw(tmp_path / "raw", 20))
    assert expected.keys() == KINDS.keys() - {"mask_color_unknown"}
    out = tmp_path / "out"
    assert run(tmp_path / "raw", out) == 2
    printed, error = capsys.readouterr()
    for kind, file in expected.items():
        assert f"{kind}: 1 " in printed and file in printed
    assert error.startswith("error: ") and error.count("\n") == 1 and "8 of 20" in error and "--on-error skip" in error
    assert not list(out.glob("*/index.json"))
    found = json.loads((out / "build_report.json").read_text())["problems"]
    assert {kind: [Path(p["file"]).name for p in problems] for kind, problems in found.items()} == {
        kind: [file] for kind, file in expected.items()
    }


def test_skip_builds_the_rest_and_tells(tmp_path, capsys):
    expected = damage(draw(tmp_path / "raw", 20))
    out = tmp_path / "out"
    assert run(tmp_path / "raw", out, "--on-error", "skip", "--workers", 2) == 0
    printed = capsys.readouterr().out
    assert all(f"{kind}: 1 " in printed for kind in expected)
    keys = [s.read(i).key for s in map(ShardSet.open, (out / "train", out / "val")) for i in range(len(s))]
    assert sorted(keys) == [f"{i:06d}" for i in range(20) if not 1 <= i <= 8]
    report = json.loads((out / "build_report.json").read_text())
    assert sum(sizes["samples"] for sizes in report["splits"].values()) == 12 and len(report["problems"]) == 8


def test_all_examples_bad(tmp_path, capsys):
    root = draw(tmp_path / "raw", 12)
    for mask in root.glob("*_seg.png"):
        mask.write_bytes(encoded(RGB))
    assert run(root, tmp_path / "out") == 2
    printed, error = capsys.readouterr()
    assert "mask_not_index: 12" in printed and "and 7 more" in printed and "12 of 12" in error
    assert run(root, tmp_path / "out", "--on-error", "skip") == 2
    assert "train: no samples" in capsys.readouterr().err
    assert not list(tmp_path.glob("out/*/index.json"))


def test_prints_sizes_shares_and_a_next_command_that_exists(raw, tmp_path, capsys):
    assert run(raw, tmp_path / "out", "--limit", 10, "--val-fraction", 0) == 0
    printed = capsys.readouterr().out
    assert "10 samples in 1 shards" in printed and "Headwear" in printed and "data.val=null" in printed
    assert not (tmp_path / "out" / "val").exists()
    config = NEXT.split("--config ")[1]
    assert NEXT in printed and (Path(__file__).parent.parent / config).is_file()


def test_refuses_a_second_build_into_the_same_folder(raw, built, capsys):
    before = content(built)
    assert run(raw, built) == 2
    assert "already built; delete" in capsys.readouterr().err and content(built) == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--val-fraction", "1"], "below 1"), (["--workers", "0"], "0 must be a whole number, at least 1"),
        (["--limit", "x"], "x must be a whole number, at least 1"),
        (["--jpeg-quality", "20"], "20 must be a whole number, 50 to 100"),
    ],
)  # fmt: skip
def test_refuses_options_out_of_range(raw, tmp_path, capsys, options, words):
    with pytest.raises(SystemExit) as stop:
        run(raw, tmp_path, *options)
    assert stop.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith(words)


def test_a_wrong_root_is_one_line_and_no_traceback(tmp_path):
    (tmp_path / "empty").mkdir()
    for name, words in (("absent", "no such folder"), ("empty", "no .png files")):
        command = [sys.executable, "-m", "data.build_shards", "--dataset", "facesynthetics"]
        command += ["--root", str(tmp_path / name), "--out", str(tmp_path / "out")]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and done.stdout == ""
        assert str(tmp_path / name) in done.stderr and words in done.stderr and "NNNNNN_seg.png" in done.stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 130), (signal.SIGKILL, -signal.SIGKILL)])
def test_a_killed_build_leaves_no_index_and_no_processes(tmp_path, number, code):
    rng = np.random.default_rng(0)
    (tmp_path / "image").write_bytes(encoded(rng.integers(0, 256, (512, 512, 3), np.uint8)))
    (tmp_path / "mask").write_bytes(encoded(rng.integers(0, 19, (512, 512), np.uint8)))
    (tmp_path / "raw").mkdir()
    for i in range(2000):  # seconds of work
        (tmp_path / "raw" / f"{i:06d}.png").symlink_to(tmp_path / "image")
        (tmp_path / "raw" / f"{i:06d}_seg.png").symlink_to(tmp_path / "mask")
    command = [sys.executable, "-m", "data.build_shards", "--dataset", "facesynthetics", "--workers", "2"]
    command += ["--root", str(tmp_path / "raw"), "--out", str(tmp_path / "out"), "--samples-per-shard", "100"]
    build = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + PATIENCE
    while not list(tmp_path.glob("out/train/*.tar")):
        assert time.monotonic() < deadline and build.poll() is None
        time.sleep(0.05)
    build.send_signal(number)
    build.communicate(timeout=PATIENCE)  # ends when the last process that holds the pipe does
    assert build.returncode == code
    assert not list(tmp_path.glob("out/*/index.json"))


def test_what_was_done_to_images_is_told_with_the_first_names(tmp_path, capsys):
    root = draw(tmp_path / "raw", 30)
    for i in range(2, 27):
        (root / f"{i:06d}.png").write_bytes(encoded(Image.fromarray(RGB).convert("L")))
    assert run(root, tmp_path / "out", "--samples-per-shard", 4, "--val-fraction", 0) == 0
    printed = capsys.readouterr().out
    assert "image_converted: 25 (" in printed and "000002.png, 000003.png, 000004.png, 000005.png, 000006.png ..." in printed
    notes = json.loads((tmp_path / "out" / "build_report.json").read_text())["notes"]
    names = [str(root / f"{i:06d}.png") for i in range(2, 22)]
    assert notes == {"image_converted": {"count": 25, "images": names}}


def test_examples_that_all_validate_are_told_with_their_root(tmp_path, capsys):
    (tmp_path / "list.csv").write_text("image,mask,split\na.png,a_seg.png,val\n")
    assert run(tmp_path / "list.csv", tmp_path / "out", "--dataset", "pairs", "--label-set", "face19") == 2
    assert f"error: {tmp_path / 'list.csv'}: all examples are of its val split; --val-fraction 0" in capsys.readouterr().err


def examples(n: int) -> list[RawExample]:
    return [RawExample(f"{i:06d}", Path(f"{i}.png"), None) for i in range(n)]


def test_the_split_hardly_moves_when_a_sample_is_added_and_ignores_order():
    before, after = split_examples(examples(100), 0.1), split_examples(examples(101), 0.1)
    val = {e.key for e in before["val"]}
    assert len(before["train"]) == 90 and len(val) == 10
    assert val == set(sorted((f"{i:06d}" for i in range(100)), key=lambda key: sha256(key.encode()).hexdigest())[:10])
    assert len(val ^ {e.key for e in after["val"]}) <= 2
    assert {e.key for e in split_examples(examples(100)[::-1], 0.1)["val"]} == val
    assert before["train"] == sorted(before["train"], key=lambda e: e.key)


@pytest.mark.parametrize(
    ("n", "fraction", "train", "val"), [(1, 0.9, 1, 0), (3, 0.99, 1, 2), (4, 0.1, 4, 0), (9, 0, 9, 0)]
)
def test_train_is_never_empty(n, fraction, train, val):
    parts = split_examples(examples(n), fraction)
    assert (len(parts["train"]), len(parts.get("val", []))) == (train, val)


def test_odd_names_are_packed_under_keys_that_webdataset_reads(tmp_path):
    for name in ("a b", "photo (1).v2"):
        (tmp_path / f"{name}.png").write_bytes(encoded(RGB))
        (tmp_path / f"{name}_seg.PNG").write_bytes(encoded(IDS))
    (tmp_path / "._a b.png").write_bytes(b"left by a Mac")
    assert run(tmp_path, tmp_path / "out", "--val-fraction", 0) == 0
    tar = str(tmp_path / "out" / "train" / "shard-000000.tar")
    assert len(list(webdataset.WebDataset(tar, shardshuffle=False))) == 2


def test_the_data_sets_own_split_holds_unless_a_fraction_is_given(tmp_path):
    own = [RawExample(f"{i:03d}", Path("x"), None, "val" if i < 30 else "train") for i in range(100)]
    parts = split_examples(own, None)
    assert [e.key for e in parts["val"]] == [f"{i:03d}" for i in range(30)] and len(parts["train"]) == 70
    assert len(split_examples(own, 0.1)["val"]) == 10
    assert split_examples(own[30:], None).keys() == {"train"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--dataset", "pairs"], "--label-set"),
        (["--mask-suffix", "_m"], "--mask-suffix: belongs to --dataset pairs"),
        (["--label-map", "lip20_to_goliath28"], "the map is for 'lip20', not 'face19'"),
        (["--mask-colors"], "Left_Ear"),  # has the colour of Headwear
    ],
)
def test_options_that_do_not_fit_are_told(raw, tmp_path, capsys, options, words):
    assert run(raw, tmp_path / "out", *options) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1 and not (tmp_path / "out").exists()
