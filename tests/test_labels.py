"""Label sets: what is read from YAML, what is refused, and that mirroring twice changes nothing."""

import copy
import json

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from data import DataError
from data.labels import LABEL_SETS, LabelSet, load_label_set

FACE19 = yaml.safe_load((LABEL_SETS / "face19.yaml").read_text())


@st.composite
def label_sets(draw):
    n = draw(st.integers(1, 255))
    ids = draw(st.permutations(range(n)))
    pairs = draw(st.integers(0, n // 2))
    return LabelSet(
        name="drawn",
        classes=tuple(f"class {i}" for i in range(n)),
        colors=tuple((i, 255 - i, 7) for i in range(n)),
        flip_pairs=tuple((ids[2 * i], ids[2 * i + 1]) for i in range(pairs)),
        ignore_index=draw(st.integers(n, 255)),
    )


@given(label_sets())
def test_mirroring_labels_twice_changes_nothing(label_set):
    table = label_set.flip_table()
    assert table.dtype == np.uint8 and table.shape == (256,)
    np.testing.assert_array_equal(table[table], np.arange(256))
    paired = {i for pair in label_set.flip_pairs for i in pair}
    assert {i for i in range(256) if table[i] != i} == paired
    assert all(table[a] == b for a, b in label_set.flip_pairs)
    assert table[label_set.ignore_index] == label_set.ignore_index and table[255] == 255


@given(label_sets())
def test_survives_json(label_set):
    assert LabelSet.from_dict(json.loads(json.dumps(label_set.to_dict()))) == label_set


@given(st.integers(1, 6), st.lists(st.tuples(st.integers(-1, 6), st.integers(-1, 6)), max_size=4))
def test_accepts_exactly_the_flip_pairs_that_are_a_swap(n, pairs):
    ids = [i for pair in pairs for i in pair]
    is_swap = len(set(ids)) == len(ids) and all(0 <= i < n for i in ids)
    names, colors = tuple("abcdef"[:n]), ((0, 0, 0),) * n
    if is_swap:
        LabelSet("drawn", names, colors, tuple(pairs))
    else:
        with pytest.raises(DataError, match="flip_pairs"):
            LabelSet("drawn", names, colors, tuple(pairs))


def test_face19():
    face = load_label_set("face19")
    assert face.num_classes == 19 and face.ignore_index == 255
    assert [[face.classes[i] for i in pair] for pair in face.flip_pairs] == [
        ["Right_Eye", "Left_Eye"], ["Right_Brow", "Left_Brow"], ["Right_Ear", "Left_Ear"]
    ]  # fmt: skip
    palette = face.palette()
    assert palette.dtype == np.uint8 and palette.shape == (256, 3)
    assert tuple(palette[1]) == (128, 200, 255) and tuple(palette[255]) == (255, 255, 255)


@pytest.mark.parametrize("path", sorted(LABEL_SETS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_set_of_the_package_loads_by_its_name(path):
    assert load_label_set(path.stem).name == path.stem
    assert load_label_set(path) == load_label_set(path.stem)


def edited(**changes):
    return copy.deepcopy(FACE19) | changes


def with_class(i, **changes):
    raw = copy.deepcopy(FACE19)
    raw["classes"][i] |= changes
    return raw


@pytest.mark.parametrize(
    ("raw", "key"),
    [
        (with_class(4, id=20), "classes"),
        (with_class(4, id=3), "classes"),
        (with_class(4, id=True), "classes.4.id"),
        (with_class(4, name="Skin"), "classes"),
        (with_class(4, name=""), "classes"),
        (with_class(4, name=False), "classes.4.name"),  # an unquoted `No` or `Off` in YAML
        (with_class(4, color=[0, 0, 256]), "classes.4.color"),
        (with_class(4, color=[0, 0]), "classes.4.color"),
        (with_class(4, colour=[0, 0, 0]), "classes.4.colour"),
        (edited(classes=[], num_classes=0), "classes"),
        (edited(num_classes=20), "num_classes"),
        (edited(flip_pairs=[[3, 19]]), "flip_pairs"),
        (edited(flip_pairs=[[-1, 3]]), "flip_pairs"),
        (edited(flip_pairs=[[3, 3]]), "flip_pairs"),
        (edited(flip_pairs=[[3, 4], [4, 5]]), "flip_pairs"),
        (edited(flip_pairs=[[3, 4, 5]]), "flip_pairs.0"),
        (edited(ignore_index=18), "ignore_index"),
        (edited(ignore_index=256), "ignore_index"),
        (edited(flip_pair=[[3, 4]]), "flip_pair"),
        ({key: value for key, value in FACE19.items() if key != "classes"}, "classes"),
    ],
)
def test_refuses_by_file_and_key(tmp_path, raw, key):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(raw))
    with pytest.raises(DataError) as refusal:
        load_label_set(path)
    message = str(refusal.value)
    assert message.startswith(f"{path}: ") and f"key '{key}" in message and "\n" not in message


@pytest.mark.parametrize("text", ["classes: [unclosed\nname: x", "- a\n- b\n", "", "\x00", "a: b: c"])
def test_refuses_what_is_no_mapping_in_one_line(tmp_path, text):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(DataError) as refusal:
        load_label_set(str(path))
    assert str(refusal.value).startswith(f"{path}: ") and "\n" not in str(refusal.value)


def test_names_the_known_sets_and_the_missing_file(tmp_path):
    with pytest.raises(DataError, match="face91.*face19"):
        load_label_set("face91")
    with pytest.raises(DataError, match="absent.yaml"):
        load_label_set(tmp_path / "absent.yaml")
