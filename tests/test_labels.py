"""Label sets: what is read from YAML, what is refused, and that mirroring twice changes nothing."""

import copy
import json
from dataclasses import replace

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
    n = draw(st.integers(1, 40) | st.just(255))
    ids = draw(st.permutations(range(n)))
    pairs = draw(st.integers(0, n // 2))
    return LabelSet(
        name="drawn",
        classes=tuple(f"class {i}" for i in range(n)),
        colors=tuple((i, 255 - i, 7) for i in range(n)),
        flip_pairs=tuple((ids[2 * i], ids[2 * i + 1]) for i in range(pairs)),
        ignore_index=draw(st.integers(n, 255)),
        class_weights=draw(st.none() | st.lists(st.floats(0.1, 10), min_size=n, max_size=n).map(tuple)),
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
    assert ("class_weights" in label_set.to_dict()) == (label_set.class_weights is not None)
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
    assert load_label_set(path).warnings() == []


def test_the_packages_sets():
    names = ("face19", "lip20", "cihp20", "goliath28", "sapiens2_29")
    assert [load_label_set(name).num_classes for name in names] == [19, 20, 20, 28, 29]
    goliath = load_label_set("goliath28")
    assert goliath.class_weights[:3] == (0.1, 10, 3) and load_label_set("face19").class_weights is None
    assert len(goliath.flip_pairs) == sum(name.startswith("Left") for name in goliath.classes) == 8


def named(*names: str, flip_pairs=()) -> LabelSet:
    return LabelSet("mine", names, ((0, 0, 0),) * len(names), flip_pairs)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("Left_Eye", "Right_Eye"), ("left-eye", "right-eye"), ("LEFT EYE", "RIGHT EYE"), ("LeftEye", "RightEye"),
        ("eyeL", "eyeR"), ("l_eye", "r_eye"), ("REye", "LEye"), ("eye (left)", "eye (right)"), ("hand.r", "hand.l"),
        ("left_foot_1", "right_foot_1"), ("l-eye", "Right_Eye"),
    ],
)  # fmt: skip
def test_a_side_in_a_name_is_checked_against_the_pairs(a, b):
    assert named(a, b, "Nose", flip_pairs=((0, 1),)).warnings() == []
    with pytest.raises(DataError, match=r"key 'flip_pairs': \[0, 2\] swaps .* with 'Nose', which is not its"):
        named(a, b, "Nose", flip_pairs=((0, 2),))
    with pytest.raises(DataError, match=r"\[2, 1\] swaps 'Nose' with"):
        named(a, b, "Nose", flip_pairs=((2, 1),))
    first, second = named(a, b, "Nose").warnings()
    assert f"{a!r} (0) carries a side" in first and f"its other side is {b!r}; add [0, 1] to flip_pairs" in first
    assert f"{b!r} (1) carries a side" in second and "add [0, 1]" in second and "\n" not in first + second


def test_names_without_a_side_are_free_to_pair():
    without = ("Bright", "Upright", "Leftover", "LR", "Torso", "lip")
    assert named(*without, flip_pairs=((0, 1), (2, 3))).warnings() == []
    (line,) = named("left hand", "Right_Foot_old", flip_pairs=()).warnings()[:1]
    assert "'left hand' (0)" in line and "no class is its other side" in line


def test_pairs_and_names_that_look_wrong_are_warned_of():
    (line,) = named("Hat", "Hair", "Left-arm", "Right-arm", flip_pairs=((0, 1), (2, 3))).warnings()
    assert "'Hat' (0) and 'Hair' (1) change places in a mirror, but carry no side" in line
    (line,) = named("lefteye", "righteye", "nose", flip_pairs=()).warnings()
    assert "'lefteye' (0) is in no flip pair; add [0, 1]" in line


def test_ids_by_colour():
    lip = load_label_set("lip20")
    ids = lip.ids_by_color()
    assert ids.pop((255, 255, 255)) == 255
    assert ids == {color: i for i, color in enumerate(lip.colors)}
    white = LabelSet("mine", ("a", "b"), ((0, 0, 0), (255, 255, 255)), ())
    assert white.ids_by_color() == {(0, 0, 0): 0, (255, 255, 255): 1}
    for labels in (load_label_set("face19"), LabelSet("w", ("Left_Ear", "Headwear"), ((255, 255, 255),) * 2, ())):
        with pytest.raises(DataError, match="'Left_Ear' and 'Headwear' share the colour"):
            labels.ids_by_color()


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
        (edited(classes=["Skin"]), "classes.0': must hold keys with values"),
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
        (edited(flip_pairs=[[3, 6], [5, 4]]), "flip_pairs"),  # a right eye is no left brow
        (edited(flip_pairs=[[2, 3]]), "flip_pairs"),  # ids that are one off
        (edited(class_weights=[1.0] * 18), "class_weights"),
        (edited(class_weights=[0] * 19), "class_weights"),
        (edited(class_weights=[1.0] * 18 + [-1]), "class_weights"),
        (edited(class_weights=[1.0] * 18 + [float("nan")]), "class_weights"),
        (edited(class_weights=[1.0] * 18 + [float("inf")]), "class_weights"),
        (edited(class_weights=[1.0] * 18 + ["heavy"]), "class_weights.18"),
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


def test_refuses_a_key_that_stands_twice(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text((LABEL_SETS / "face19.yaml").read_text() + "flip_pairs: []\n")  # PyYAML alone would take this one
    with pytest.raises(DataError, match="mine.yaml: not valid YAML, line .*'flip_pairs' stands twice"):
        load_label_set(path)


@pytest.mark.parametrize("text", ["classes: [unclosed\nname: x", "- a\n- b\n", "", "\x00", "a: b: c"])
def test_refuses_what_is_no_mapping_in_one_line(tmp_path, text):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(DataError) as refusal:
        load_label_set(str(path))
    assert str(refusal.value).startswith(f"{path}: ") and "\n" not in str(refusal.value)
    assert "not valid YAML" in str(refusal.value) or "holds no `key: value` lines; write name, classes" in str(refusal.value)


def test_names_the_known_sets_and_the_missing_file(tmp_path):
    with pytest.raises(DataError, match="face91.*face19"):
        load_label_set("face91")
    with pytest.raises(DataError, match="absent.yaml"):
        load_label_set(tmp_path / "absent.yaml")


def test_sets_that_mean_the_same_may_look_different():
    face = load_label_set("face19")
    assert face.means_the_same(replace(face, colors=face.colors[::-1], name="mine", flip_pairs=face.flip_pairs[::-1]))
    for change in ({"flip_pairs": ()}, {"ignore_index": 254}, {"classes": face.classes[::-1], "flip_pairs": ()}):
        assert not face.means_the_same(replace(face, **change))
