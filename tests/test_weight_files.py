import os
import resource

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError

from model.trained import load_segmenter
from model.weight_files import read_metadata, read_weights, save_safetensors
from tests.model_cases import METADATA, build_tiny, refused, write_segmentation


@pytest.fixture(scope="module")
def segmentation(tmp_path_factory):
    return write_segmentation(tmp_path_factory.mktemp("golden") / "segmentation.pth")


@pytest.fixture(scope="module")
def saved_tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny") / "tiny.safetensors"
    save_safetensors(path, build_tiny().state_dict(), METADATA)
    return path


class Trap:
    """Makes a folder when unpickled: what a foreign class in a checkpoint could do."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_code_is_refused_and_not_run(tmp_path, zipped):
    path = tmp_path / "runner.pth"
    content = {"state_dict": {"backbone.pos_embed": torch.zeros(1)}, "message_hub": Trap(tmp_path / "sprung")}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    message = refused(read_weights, path, match="runner.pth.*state_dict")
    assert not zipped or "mkdir" in message
    assert not (tmp_path / "sprung").exists()


def test_legacy_files_without_code_load(tmp_path):
    torch.save({"pos_embed": torch.ones(1, 4, 8)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert torch.equal(read_weights(tmp_path / "old.pth")["backbone.pos_embed"], torch.ones(1, 4, 8))


def test_unusable_files_are_refused_in_one_line(tmp_path, segmentation, saved_tiny):
    refused(read_weights, tmp_path / "none.pth", match="none.pth: no such")
    refused(read_weights, tmp_path, match="no such weight file")
    refused(load_segmenter, tmp_path / "none.safetensors", match="none.safetensors: no such")
    for name, content in {
        "text.pth": b"hello\n",
        "text.safetensors": b"hello\n",
        "empty.pt": b"",
        "cut.pth": segmentation.read_bytes()[:-5000],
        "cut.safetensors": saved_tiny.read_bytes()[:-5000],
        "weights.ckpt": b"anything",
    }.items():
        (tmp_path / name).write_bytes(content)
        refused(read_weights, tmp_path / name, match=name)
    refused(read_metadata, tmp_path / "cut.safetensors", match="cut.safetensors")
    for number, content in enumerate(([1, 2], {"epoch": 3}, {}, {0: torch.zeros(1)})):
        torch.save(content, tmp_path / f"{number}.pth")
        refused(read_weights, tmp_path / f"{number}.pth", match="no state dict")


def test_a_save_that_fails_half_way_leaves_the_old_file(tmp_path, saved_tiny):
    path = tmp_path / "model.safetensors"
    path.write_bytes(saved_tiny.read_bytes())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # as a disk that fills up
    try:
        with pytest.raises(SafetensorError):
            save_safetensors(path, build_tiny(1).state_dict(), METADATA)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == saved_tiny.read_bytes()


def test_a_saved_file_is_as_readable_as_any_other(tmp_path, saved_tiny):
    (tmp_path / "plain").touch()
    assert saved_tiny.stat().st_mode == (tmp_path / "plain").stat().st_mode


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=40)
@given(value=JSON | st.sampled_from(["12", "true", "null", '"quoted"', "[1", "NaN", "Infinity", ""]))
def test_metadata_comes_back_as_it_was(tmp_path_factory, value):
    path = tmp_path_factory.getbasetemp() / "metadata.safetensors"
    save_safetensors(path, {"x": torch.zeros(1)}, {"value": value})
    assert read_metadata(path) == {"value": value}
