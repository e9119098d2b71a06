"""Raw layouts: which image goes with which mask, in what split, under what key."""

import json
import os
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data import DataError
from data.sources import SOURCES, Pairs, RawExample, Sapiens2, pair, safe_key


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def listed(examples: list[RawExample], root: Path) -> list[tuple]:
    """(split, image, mask) by their paths under the root."""
    return [(e.split, os.path.relpath(e.image, root), e.mask and os.path.relpath(e.mask, root)) for e in examples]


def test_facesynthetics(tmp_path):
    touch(tmp_path, "000002.png", "000001_seg.png", "000000.png", "000000_seg.PNG", "000000_ldmks.txt", "._000000.png")
    touch(tmp_path, "000003.jpg", "other/000004.png")
    assert listed(SOURCES["facesynthetics"]().examples(tmp_path), tmp_path) == [
        (None, "000000.png", "000000_seg.PNG"), (None, "000001.*", "000001_seg.png"), (None, "000002.png", None)
    ]  # fmt: skip


LAYOUTS = {
    "lip": ("images/{0}_images/{1}.jpg", "segmentations/{0}_segmentations/{1}.png", ("train", "val")),
    "cihp": ("{0}/Images/{1}.jpg", "{0}/Category_ids/{1}.png", ("Training", "Validation")),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_with_their_own_splits(tmp_path, name):
    image, mask, parts = LAYOUTS[name]
    touch(tmp_path, *(form.format(parts[0], key) for form in (image, mask) for key in ("1_2", "1_1")))
    touch(tmp_path, "Training/Categories/1_1.png", "Testing/Images/9.jpg")  # colour pictures, no labels
    expected = [("train", image.format(parts[0], key), mask.format(parts[0], key)) for key in ("1_1", "1_2")]
    assert listed(SOURCES[name]().examples(tmp_path), tmp_path) == expected  # of Training alone
    touch(tmp_path, image.format(parts[1], "1_2"), mask.format(parts[1], "1_2"))
    expected.append(("val", image.format(parts[1], "1_2"), mask.format(parts[1], "1_2")))
    examples = SOURCES[name]().examples(tmp_path)
    assert listed(examples, tmp_path) == expected and [e.key for e in examples] == ["1_1", "1_2", "1_2"]
    (tmp_path / mask.format(parts[1], "1_2")).unlink()
    (tmp_path / mask.format(parts[1], "1_2")).parent.rmdir()
    folder = Path(mask.format(parts[1], "")).parent
    with pytest.raises(DataError, match=f"{folder}: no such folder; expected {name.upper()}:"):
        SOURCES[name]().examples(tmp_path)


@pytest.mark.parametrize("name", SOURCES)
def test_a_root_without_the_layout_is_named_with_what_was_expected(tmp_path, name):
    source = SOURCES[name]()
    for root in (tmp_path, tmp_path / "absent", touch(tmp_path, "notes.txt") / "notes.txt"):
        with pytest.raises(DataError) as refusal:
            source.examples(root)
        message = str(refusal.value)
        assert message.startswith(str(root)) and message.endswith(f"expected {source.layout}") and "\n" not in message


def annotated(root: Path, **splits: object) -> Path:
    for split, records in splits.items():
        touch(root, f"annotations/{split}.json").joinpath(f"annotations/{split}.json").write_text(json.dumps(records))
    return root


def test_sapiens2_takes_what_its_annotations_list(tmp_path):
    annotated(
        tmp_path,
        train=[{"image": "images/b.jpg", "mask": "m/b_m.png", "sample_id": 1}, {"image": "x/a.jpg", "mask": "a.png"}],
        val=[{"image": "./images/b.jpg", "mask": "masks/../masks/b.png"}],
    )
    examples = Sapiens2().examples(tmp_path)
    assert listed(examples, tmp_path) == [
        ("train", "images/b.jpg", "m/b_m.png"), ("train", "x/a.jpg", "a.png"), ("val", "images/b.jpg", "masks/b.png")
    ]  # fmt: skip
    assert [examples[0].key, examples[2].key] == ["b", "b"] and examples[1].key == safe_key("x/a")


GOOD = {"image": "images/a.jpg", "mask": "masks/a.png"}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[{", "annotations/train.json: Expecting"),
        (json.dumps({"images": []}), "annotations/train.json: not a JSON list"),
        (json.dumps([GOOD, {"image": "images/b.jpg"}]), "annotations/train.json: record 1: key 'mask': Field required"),
        (json.dumps([GOOD, {**GOOD, "image": 7}]), "annotations/train.json: record 1: key 'image'"),
        (json.dumps(["images/a.jpg"]), "annotations/train.json: record 0: "),
        (json.dumps([{**GOOD, "mask": "../masks/a.png"}]), "record 0: key 'mask': '../masks/a.png' leaves"),
        (json.dumps([{**GOOD, "image": "images/../../a.jpg"}]), "record 0: key 'image': 'images/../../a.jpg' leaves"),
        (json.dumps([{**GOOD, "image": "/a.jpg"}]), "record 0: key 'image': '/a.jpg' leaves"),
        (json.dumps([GOOD, GOOD]), "give the same key 'a'"),
    ],
)
def test_sapiens2_names_file_and_record(tmp_path, monkeypatch, content, words):
    touch(tmp_path, "annotations/train.json").joinpath("annotations/train.json").write_text(content)
    monkeypatch.chdir(tmp_path)
    for root in (tmp_path, Path(".")):
        with pytest.raises(DataError) as refusal:
            Sapiens2().examples(root)
        message = str(refusal.value)
        assert words in message and "\n" not in message


ODD = ["photo (1).v2", "[a] b", "脸", "a.b", "sub/a.b", "sub/deep/x y"]


def test_pairs_of_any_names_and_types(tmp_path):
    touch(tmp_path, *(f"images/{name}.JPEG" for name in ODD), *(f"masks/{name}.tif" for name in ODD))
    touch(tmp_path, "images/only.png", "masks/alone.png", "images/a.b.json", "masks/.hidden/x.png", "images/.DS_Store")
    examples = Pairs().examples(tmp_path)
    rows = {row[1]: row[2] for row in listed(examples, tmp_path)}
    assert rows == {f"images/{name}.JPEG": f"masks/{name}.tif" for name in ODD} | {
        "images/only.png": None, "images/alone.*": "masks/alone.png"
    }  # fmt: skip
    assert {e.split for e in examples} == {None} and [e.key for e in examples] == sorted({e.key for e in examples})
    assert all(len(e.key) <= 80 and "." not in e.key and e.key.isascii() for e in examples)


def test_pairs_by_case_and_accents_where_that_leaves_no_choice(tmp_path):
    composed, apart = (unicodedata.normalize(form, "é") for form in ("NFC", "NFD"))
    touch(tmp_path, "images/DSC_0003.JPG", "masks/dsc_0003.png", f"images/{apart}.jpg", f"masks/{composed}.png")
    touch(tmp_path, "images/a.jpg", "images/A.jpg", "masks/A.png")  # A has its own; none is left for a
    touch(tmp_path, "images/xy.jpg", "images/Xy.jpg", "masks/XY.png")  # two could have it
    assert sorted(listed(Pairs().examples(tmp_path), tmp_path)) == sorted([
        (None, "images/DSC_0003.JPG", "masks/dsc_0003.png"), (None, f"images/{apart}.jpg", f"masks/{composed}.png"),
        (None, "images/A.jpg", "masks/A.png"), (None, "images/a.jpg", None),
        (None, "images/xy.jpg", None), (None, "images/Xy.jpg", None), (None, "images/XY.*", "masks/XY.png"),
    ])  # fmt: skip


NAMES = st.sets(st.text("aAbBé", min_size=1, max_size=3))


@given(NAMES, NAMES, st.randoms())
def test_pairing_does_not_depend_on_the_order_of_files(images, masks, random):
    def shuffled(names: set[str], suffix: str) -> dict[str, Path]:
        return {name: Path(name + suffix) for name in random.sample(sorted(names), len(names))}

    examples = set(pair(shuffled(images, ".jpg"), shuffled(masks, ".png"), Path("images")))
    assert examples == set(pair(shuffled(images, ".jpg"), shuffled(masks, ".png"), Path("images")))
    with_mask = {e.image.stem: e.mask.stem for e in examples if e.mask and not e.image.name.endswith("*")}
    assert all(with_mask[name] == name for name in images & masks)
    assert all(image.casefold() == mask.casefold() for image, mask in with_mask.items())
    assert sorted(e.mask.stem for e in examples if e.mask) == sorted(masks)  # each mask once
    assert {e.image.stem for e in examples if e.image.suffix == ".jpg"} == images
    assert len({e.key for e in examples}) == len(examples)


@pytest.mark.parametrize("folder", ["images", "masks"])
def test_two_files_of_one_name_are_refused(tmp_path, folder):
    touch(tmp_path, "images/a.jpg", "masks/a.png", f"{folder}/a.bmp")
    with pytest.raises(DataError, match=f"{folder}: a.bmp and a.(jpg|png) give the same key; rename"):
        Pairs().examples(tmp_path)


def test_pairs_of_named_folders(tmp_path):
    touch(tmp_path, "root/rgb/a.jpg", "root/rgb/a_seg.jpg", "else/a_seg.png", "else/a_colour.png", "else/a_seg_seg.png")
    for masks in (tmp_path / "else", "../else"):
        examples = Pairs(images="rgb", masks=str(masks), mask_suffix="_seg").examples(tmp_path / "root")
        names = [(e.image.name, e.mask.name) for e in examples]
        assert names == [("a.jpg", "a_seg.png"), ("a_seg.jpg", "a_seg_seg.png")]


def test_pairs_in_one_folder_or_one_in_the_other(tmp_path):
    touch(tmp_path, "a.jpg", "a_seg.png", "masks/a.png", "sub/b.jpg", "sub/b_seg.png")
    one = Pairs(images=".", masks=".", mask_suffix="_seg").examples(tmp_path / "sub")
    assert [(e.image.name, e.mask.name) for e in one] == [("b.jpg", "b_seg.png")]
    (tmp_path / "a_seg.png").rename(tmp_path / "sub" / "c_seg.png")
    inside = Pairs(images=".").examples(tmp_path)
    assert ("a.jpg", "masks/a.png") in [row[1:] for row in listed(inside, tmp_path)] and len(inside) == 4
    with pytest.raises(DataError, match="share this folder; tell masks apart by their mask suffix"):
        Pairs(images="masks").examples(tmp_path)


def test_linked_folders_are_followed_but_not_in_circles(tmp_path):
    touch(tmp_path, "far/a.jpg", "near/masks/linked/a.png")
    (tmp_path / "near" / "images").mkdir()
    (tmp_path / "near" / "images" / "linked").symlink_to(tmp_path / "far")
    (tmp_path / "far" / "up").symlink_to(tmp_path / "far")
    (example,) = Pairs().examples(tmp_path / "near")
    assert example.image.name == "a.jpg" and example.mask.name == "a.png"


MANIFESTS = {
    "csv": '\ufeffimage, mask,key,split,person\nsub/a b.jpg,m/a.png,,train,1\n"c,d.jpg",,second,val,2\n',
    "jsonl": '{"image": "sub/a b.jpg", "mask": "m/a.png", "split": "train"}\n\n'
    '{"image": "c,d.jpg", "mask": null, "key": "second", "split": "val"}\n',
}  # fmt: skip


@pytest.mark.parametrize("suffix", MANIFESTS)
def test_pairs_listed_in_a_file(tmp_path, suffix):
    file = tmp_path / f"list.{suffix}"
    file.write_text(MANIFESTS[suffix])
    assert Pairs().examples(file) == [
        RawExample(safe_key("sub/a b"), tmp_path / "sub/a b.jpg", tmp_path / "m/a.png", "train"),
        RawExample("second", tmp_path / "c,d.jpg", None, "val"),
    ]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", "image;mask\na.jpg;a.png\n", "line 2: key 'image': Field required"),
        ("a.csv", "image,mask\na,b.jpg,a.png\n", "line 2: more cells than columns"),
        ("a.csv", "image,mask\n,a.png\n", "line 2: key 'image'"),
        ("a.csv", 'image,mask\n"a.jpg,a.png\n', "unexpected end of data"),
        ("a.csv", "image,mask,split\na,a,train\nb,b,test\n", "line 3: key 'split'"),
        ("a.csv", "image,mask,split\na,a,train\nb,b,\n", "line 3: key 'split': only some examples have one"),
        ("a.csv", "image,mask\na.jpg,a\na.png,b\n", "give the same key 'a'; give each its own in a column 'key'"),
        ("a.csv", "image,mask,key\na.jpg,a,k\nb.png,b,k\n", "give the same key 'k'; give each its own in a column 'key'"),
        ("a.csv", "image,mask\n", "no images or masks here"),
        ("a.jsonl", '{"image": "a", "mask": "a"}\n{"image"\n', "line 2: Expecting"),
        ("a.jsonl", '{"image": "a"}\n', "line 1: key 'mask': Field required"),
        ("a.jsonl", "[1]\n", "line 1: must hold keys with values, found [1]; expected two folders"),
        ("a.jsonl", "\xff\n", "codec can't decode"),
        ("absent.csv", None, "cannot be read"),
    ],
)
def test_a_bad_list_is_named_with_its_line(tmp_path, name, content, words):
    if content is not None:
        (tmp_path / name).write_bytes(content.encode("latin-1"))
    with pytest.raises(DataError) as refusal:
        Pairs().examples(tmp_path / name)
    message = str(refusal.value)
    assert message.startswith(f"{tmp_path / name}: ") and words in message and "\n" not in message


def test_keys_are_safe_and_tell_all_names_apart():
    names = ["a b", "a_b", "a.b", "a/b", "photo (1).v2", "脸", "x" * 200, "000001", "\udcff", "\ud800", ""]
    keys = [safe_key(name) for name in names]
    assert len(set(keys)) == len(keys) and all(len(key) <= 80 and "." not in key and key.isascii() for key in keys)
    assert keys[1] == "a_b" and keys[7] == "000001"


@pytest.mark.parametrize("column", ["splt", "Split", "keys"])
def test_a_misspelt_column_of_a_list_is_not_passed_over(tmp_path, column):
    (tmp_path / "list.csv").write_text(f"image,mask,{column},weather\na.jpg,a.png,val,rain\n")
    with pytest.raises(DataError, match=f"list.csv: .*key '{column}': unknown, did you mean"):
        Pairs().examples(tmp_path / "list.csv")
    (tmp_path / "list.csv").write_text("image,mask,split,weather\na.jpg,a.png,val,rain\n")
    assert Pairs().examples(tmp_path / "list.csv")[0].split == "val"
