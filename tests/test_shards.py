"""Shard sets: what is written is read back, by us and by any WebDataset reader, and damage is found."""

import json
import os
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import cv2
import numpy as np
import pytest
import webdataset
from PIL import Image
from torch.utils.data import DataLoader

from data import DataError, shards
from data.labels import load_label_set
from data.shards import ShardSet, verify
from tests.raw_faces import SIZE, draw, run

FACE19 = load_label_set("face19")


@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> Path:
    return draw(tmp_path_factory.mktemp("raw") / "dataset", 20)


@pytest.fixture(scope="module")
def built(raw, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("built") / "face"
    assert run(raw, out, "--samples-per-shard", 7) == 0
    return out


def test_reads_back_the_bytes_of_the_raw_files(raw, built):
    train, val = ShardSet.open(built / "train"), ShardSet.open(built / "val")
    assert (len(train), len(val)) == (18, 2) and train.label_set == FACE19
    counts = np.zeros(256, dtype=np.int64)
    for i in range(len(train)):
        sample = train.read(i)
        assert sample.image == (raw / f"{sample.key}.png").read_bytes()
        assert sample.mask == (raw / f"{sample.key}_seg.png").read_bytes()
        assert (sample.meta["height"], sample.meta["width"]) == SIZE
        counts += np.bincount(cv2.imdecode(np.frombuffer(sample.mask, np.uint8), -1).ravel(), minlength=256)
    np.testing.assert_array_equal(train.pixel_counts, counts[:19])
    index = json.loads((built / "train" / "index.json").read_text())
    assert index["ignored_pixels"] == counts[255] == 3 * 18 and [s["samples"] for s in index["shards"]] == [7, 7, 4]
    keys = [part.read(i).key for part in (train, val) for i in range(len(part))]
    assert sorted(keys) == [f"{i:06d}" for i in range(20)]
    with pytest.raises(IndexError):
        train.read(18)


def test_any_webdataset_reader_reads_the_tars(raw, built):
    tars = sorted(str(path) for path in (built / "train").glob("*.tar"))
    samples = list(webdataset.WebDataset(tars, shardshuffle=False).decode())
    assert len(samples) == 18
    for sample in samples:
        key = sample["__key__"]
        assert sample["png"] == (raw / f"{key}.png").read_bytes()
        assert sample["mask.png"] == (raw / f"{key}_seg.png").read_bytes()
        assert sample["json"] == {
            "key": key, "height": 24, "width": 32, "label_set": "face19", "classes": list(FACE19.classes),
            "flip_pairs": [[3, 4], [5, 6], [7, 8]], "ignore_index": 255,
        }  # fmt: skip


def test_any_webdataset_reader_reads_what_was_encoded_anew(raw, tmp_path):
    assert run(raw, tmp_path, "--encode", "lossless", "--val-fraction", 0) == 0
    tar = str(tmp_path / "train" / "shard-000000.tar")
    for sample in webdataset.WebDataset(tar, shardshuffle=False).decode():
        image = np.asarray(Image.open(BytesIO(sample["qoi"])))
        mask = np.asarray(Image.open(BytesIO(sample["mask.png"])))
        assert np.array_equal(image, np.asarray(Image.open(raw / f"{sample['__key__']}.png")))
        assert np.array_equal(mask, np.asarray(Image.open(raw / f"{sample['__key__']}_seg.png")))


def test_reads_alike_in_threads_and_in_worker_processes(built, tmp_path, raw, monkeypatch):
    monkeypatch.setattr(shards, "MAX_OPEN_SHARDS", 2)
    assert run(raw, tmp_path / "out", "--samples-per-shard", 1) == 0
    train = ShardSet.open(tmp_path / "out" / "train")
    expected = [train.read(i) for i in range(len(train))]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(train.read, list(range(18)) * 20)) == expected * 20
    copy = pickle.loads(pickle.dumps(train))
    assert [copy.read(i) for i in range(18)] == expected and copy.fingerprint == train.fingerprint

    class Reads:
        __len__, __getitem__ = train.__len__, staticmethod(train.read)

    assert list(DataLoader(Reads(), batch_size=None, num_workers=2)) == expected


def test_open_refuses_what_is_no_whole_shard_set(built, tmp_path):
    def refusal(break_it) -> str:
        folder = shutil.copytree(built / "train", tmp_path / str(len(list(tmp_path.iterdir()))))
        break_it(folder)
        with pytest.raises(DataError) as error:
            ShardSet.open(folder)
        assert str(folder) in str(error.value) and "\n" not in str(error.value)
        return str(error.value)

    def edit(folder: Path, **changes) -> None:
        index = json.loads((folder / "index.json").read_text())
        (folder / "index.json").write_text(json.dumps(index | changes))

    assert "python -m data.build_shards" in refusal(lambda f: (f / "index.json").unlink())
    assert "key 'format'" in refusal(lambda f: edit(f, format=1))
    assert "key 'shards.0" in refusal(lambda f: edit(f, shards=[{"file": "shard-000000.tar"}]))
    assert "key 'label_set'" in refusal(lambda f: edit(f, label_set=3))
    assert "index.json" in refusal(lambda f: (f / "index.json").write_text("{"))
    assert "shard-000001.tar: missing" in refusal(lambda f: (f / "shard-000001.tar").unlink())
    assert "shard-000001.tar" in refusal(lambda f: os.truncate(f / "shard-000001.tar", 5000))
    assert "samples.npy" in refusal(lambda f: (f / "samples.npy").unlink())
    assert "samples.npy" in refusal(lambda f: os.truncate(f / "samples.npy", 300))
    assert "samples.npy" in refusal(lambda f: edit(f, num_samples=17))
    assert "pixel_counts.npy" in refusal(lambda f: np.save(f / "pixel_counts.npy", np.zeros((18, 19))))
    with pytest.raises(DataError, match="no such folder.*python -m data.build_shards"):
        ShardSet.open(tmp_path / "absent")


def test_verify_finds_a_flipped_byte_a_cut_and_a_missing_file(raw, tmp_path):
    run(raw, tmp_path, "--samples-per-shard", 5)
    train = ShardSet.open(tmp_path / "train")
    assert verify(tmp_path / "train") == []
    first, second, third = (tmp_path / "train" / f"shard-00000{i}.tar" for i in range(3))
    data = bytearray(first.read_bytes())
    data[len(data) // 2] ^= 1
    first.write_bytes(data)
    os.truncate(second, 600)
    third.unlink()
    problems = verify(tmp_path / "train")
    assert len(problems) == 3
    assert [problem for problem in problems if "sha256" not in problem] == verify(tmp_path / "train", checksums=False)
    with pytest.raises(DataError, match=r"shard-000001.tar: 600 bytes, .* \(and 1 more, named by: python -m data.inspect "):
        ShardSet.open(tmp_path / "train")
    for path, word in ((first, "sha256"), (second, "600 bytes"), (third, "missing")):
        assert any(str(path) in problem and word in problem for problem in problems)
    with pytest.raises(DataError, match="shard-000001.tar: sample 5 ends early"):
        train.read(5)
    with pytest.raises(DataError, match="shard-000002.tar: sample 10 cannot be read"):
        train.read(10)


@pytest.mark.parametrize(
    ("column", "value"),
    [("shard", 7), ("shard", 2**32 - 1), ("image_offset", 2**63), ("json_size", 2**62), ("mask_offset", 10**9)],
)
def test_a_table_that_points_outside_is_told(built, tmp_path, column, value):
    folder = shutil.copytree(built / "train", tmp_path / "train")
    rows = np.load(folder / "samples.npy")
    rows[column][4] = value
    np.save(folder / "samples.npy", rows)
    train = ShardSet.open(folder)
    assert train.read(3).key
    with pytest.raises(DataError, match="samples.npy: row 4 does not belong to index.json; "):
        train.read(4)


def test_a_location_that_is_no_folder(built):
    for location, words in ((built / "train" / "index.json", "is a file; name the folder"), ("file:///tmp/x", "write the path")):
        with pytest.raises(DataError, match=f"^{location}: .*{words}"):
            ShardSet.open(location)
