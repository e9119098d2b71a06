"""Label maps: mapping and mirroring commute in every map that is accepted, and a map that is wrong is named."""

from dataclasses import replace

import numpy as np
import pytest
import yaml
from hypothesis import assume, given
from hypothesis import strategies as st

from data import DataError
from data.labels import LabelSet, load_label_set
from data.mapping import LABEL_MAPS, LabelMap, load_label_map, reached
from data.yaml_files import read_yaml


def label_set(name: str, middle: int, pairs: int, ignore_index: int) -> LabelSet:
    """`pairs` pairs of sides first, then `middle` classes that have none."""
    names = [f"{side}_{i}" for i in range(pairs) for side in ("left", "right")] + [f"middle_{i}" for i in range(middle)]
    flip_pairs = tuple((2 * i, 2 * i + 1) for i in range(pairs))
    return LabelSet(name, tuple(names), ((0, 0, 0),) * len(names), flip_pairs, ignore_index)


def drawn_set(draw, name: str) -> LabelSet:
    middle, pairs = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    return label_set(name, middle, pairs, draw(st.integers(middle + 2 * pairs, 255)))


def other_side(labels: LabelSet, name: str | None) -> str | None:
    return name and labels.classes[labels.flip_table()[labels.classes.index(name)]]


@st.composite
def commuting(draw) -> tuple[LabelMap, LabelSet, LabelSet]:
    """A map that treats both sides alike: whatever the left class becomes, the right one becomes its mirror image."""
    source, target = drawn_set(draw, "from"), drawn_set(draw, "to")
    whole = [name for name in target.classes if name.startswith("middle")]
    pairs = {name: draw(st.sampled_from([None, *whole])) for name in source.classes}
    for a, b in source.flip_pairs:
        mapped = draw(st.sampled_from([None, *target.classes]))
        pairs |= {source.classes[a]: mapped, source.classes[b]: other_side(target, mapped)}
    return LabelMap("drawn", "from", "to", pairs), source, target


@given(commuting(), st.integers(0, 2**32 - 1))
def test_mirroring_commutes_with_every_accepted_map(drawn, seed):
    mapping, source, target = drawn
    table = mapping.table(source, target)
    assert table.dtype == np.uint8 and table.shape == (256,)
    values = [*range(source.num_classes), source.ignore_index]
    mask = np.random.default_rng(seed).choice(values, (5, 7)).astype(np.uint8)
    mirrored_first = table[source.flip_table()[mask[:, ::-1]]]
    mapped_first = target.flip_table()[table[mask][:, ::-1]]
    np.testing.assert_array_equal(mirrored_first, mapped_first)
    for i, name in enumerate(source.classes):
        mapped = mapping.pairs[name]
        assert table[i] == (target.ignore_index if mapped is None else target.classes.index(mapped))
    assert set(table[source.num_classes :]) == {target.ignore_index}
    labels = {target.classes.index(mapped) for mapped in mapping.pairs.values() if mapped is not None}
    assert reached(table, range(source.num_classes), target) == tuple(sorted(labels))


@given(commuting(), st.data())
def test_a_map_that_treats_one_side_differently_is_refused(drawn, data):
    mapping, source, target = drawn
    name = data.draw(st.sampled_from(source.classes))
    changed = data.draw(st.sampled_from([None, *target.classes]))
    if other_side(source, name) == name:
        assume(other_side(target, changed) != changed)
    else:
        assume(changed != mapping.pairs[name])
    with pytest.raises(DataError, match="label map 'drawn': key 'map[.].*mirrored"):
        replace(mapping, pairs={**mapping.pairs, name: changed}).table(source, target)


def test_names_the_class_and_both_results():
    source, target = label_set("from", 1, 1, 255), label_set("to", 1, 1, 255)
    mapping = LabelMap("one_sided", "from", "to", {"left_0": "left_0", "right_0": None, "middle_0": "middle_0"})
    with pytest.raises(DataError, match="'map.left_0': .* this class is ignored; .*it is 'right_0'; map both"):
        mapping.table(source, target)


@pytest.mark.parametrize("name", ["lip20_to_goliath28", "cihp20_to_goliath28"])
def test_packaged_maps_between_packaged_sets(name):
    mapping = load_label_map(name)
    source, target = load_label_set(mapping.source), load_label_set(mapping.target)
    table = mapping.table(source, target)
    classes = {name: i for i, name in enumerate(source.classes)}
    mapped = {name: target.classes[table[i]] for name, i in classes.items() if table[i] != 255}
    assert mapped == {name: to for name, to in mapping.pairs.items() if to} and mapped["Left-shoe"] == "Left_Shoe"
    assert [target.classes[i] for i in reached(table, range(source.num_classes), target)] == [
        "Background", "Face_Neck", "Hair", "Left_Shoe", "Lower_Clothing", "Right_Shoe", "Upper_Clothing"
    ]  # fmt: skip


@pytest.mark.parametrize("path", sorted(LABEL_MAPS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_map_of_the_package_loads_by_its_name_and_fits_its_target(path):
    mapping = load_label_map(path.stem)
    assert mapping == load_label_map(path) and mapping.name == path.stem == f"{mapping.source}_to_{mapping.target}"
    assert set(mapping.pairs.values()) - {None} <= set(load_label_set(mapping.target).classes)


def written(tmp_path, **changes):
    _, raw = read_yaml("lip20_to_goliath28", LABEL_MAPS, "label map")
    raw["map"] |= changes.pop("map", {})
    raw["map"] = {key: value for key, value in raw["map"].items() if value != "absent"}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(raw | changes))
    return tmp_path / "mine.yaml"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"map": {"Hat": "absent", "Coat": "absent"}}, "key 'map': leaves out 'Hat', 'Coat' of 'lip20'; add a line"),
        ({"map": {"Hat": "absent", "Hatt": None}}, "key 'map.Hatt': 'lip20' has no class 'Hatt'; did you mean 'Hat'?"),
        ({"map": {"Zebra": None}}, "key 'map.Zebra': 'lip20' has no class 'Zebra'; its classes are Background, Hat"),
        ({"map": {"Hair": "Hairs"}}, "key 'map.Hair': 'goliath28' has no class 'Hairs'; did you mean 'Hair'?"),
        ({"source": "cihp20"}, "key 'source': the map is for 'cihp20', not 'lip20'; choose"),
        ({"target": "sapiens2_29"}, "key 'target': the map is for 'sapiens2_29', not 'goliath28'; choose"),
        ({"map": {"Left-arm": "Left_Hand"}}, "key 'map.Left-arm': "),
        ({"map": {"Hair": 3}}, "key 'map.Hair': "),
        ({"map": {3: "Hair"}}, "key 'map.3"),
        ({"pairs": {}}, "key 'pairs': unknown key"),
    ],
)
def test_refuses_by_file_and_key(tmp_path, changes, words):
    path = written(tmp_path, **changes)
    with pytest.raises(DataError) as refusal:
        load_label_map(path).table(load_label_set("lip20"), load_label_set("goliath28"))
    assert str(refusal.value).startswith(f"{path}: {words}") and "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("map: {a: b, a: c}", "line 1: the key 'a' stands twice"),  # PyYAML alone would take the last one
        ("map: [unclosed\n", "not valid YAML, line 2"),
        ("- a\n", "found ['a']"),
        ("", "found None"),
        ("map: \xff", "not valid YAML"),
    ],
)
def test_refuses_a_file_that_is_no_map(tmp_path, text, words):
    (tmp_path / "mine.yaml").write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError) as refusal:
        load_label_map(tmp_path / "mine.yaml")
    message = str(refusal.value)
    assert message.startswith(f"{tmp_path / 'mine.yaml'}: ") and words in message and "\n" not in message


def test_names_the_known_maps_and_the_missing_file(tmp_path):
    with pytest.raises(DataError, match="label map 'lip20': unknown; name one of .*lip20_to_goliath28"):
        load_label_map("lip20")
    with pytest.raises(DataError, match="absent.yaml: the label map cannot be read"):
        load_label_map(tmp_path / "absent.yaml")


def test_sides_that_are_exchanged_are_warned_of():
    mapping = LabelMap("swap", "a", "b", {"Left_Eye": "Right_Eye", "Right_Eye": "Left_Eye", "Nose": "Left_Eye", "Bright": "Left"})
    assert [line.split(": ")[2] for line in mapping.warnings()] == [
        "'Left_Eye' becomes 'Right_Eye', of the other side", "'Right_Eye' becomes 'Left_Eye', of the other side"
    ]  # fmt: skip
    assert load_label_map("lip20_to_goliath28").warnings() == []
