"""Views made on the training device: from the loader, and in real runs."""

from collections.abc import Iterator
from contextlib import closing
from itertools import chain

import numpy as np
import pytest
import torch

from data.augment import AugmentConfig
from data.batch import Batch
from data.device_render import images_on, with_labels
from data.loader import TrainExamples, train_batches
from data.order import BatchPlan
from data.render import IMAGE_FILL
from tests.conftest import ROOT, Run, experiment, recorded_runs
from tests.plain import configuration, differences, fresh_model, plain_loop
from tests.test_loader import SIZE, one_damaged, train_examples
from train import TrainError
from train.clock import StepClock
from train.config import load_config
from train.engine import Job
from train.peer import Plain

CPU = torch.device("cpu")
EVERYTHING = AugmentConfig(on_device=True, blur_probability=0.2, noise_probability=0.2, background_probability=0.2)
SETTINGS = ["schedule.steps=8", "augment.photometric=true", "augment.rotate_probability=0.5", "evaluate.pictures=0"]


def made(examples: TrainExamples, plan: BatchPlan, *options) -> Iterator[tuple[Batch, torch.Tensor]]:
    """Each micro batch, with its labels, and its images."""
    with closing(train_batches(examples, plan, *options)) as batches:
        for batch in chain.from_iterable(batches):
            batch = with_labels(batch, examples.mixture.label_set, CPU)
            yield batch, images_on(batch, CPU).clone()


def test_the_same_bits_for_any_ranks_workers_and_micro_batches(shards):
    examples = train_examples(shards / "train", config=EVERYTHING)

    def steps(world: int, micro: int, workers: int) -> list[torch.Tensor]:
        ranks = [list(made(examples, BatchPlan(12, micro, rank, world), 0, 3, workers)) for rank in range(world)]
        ordered = [one for step in range(3) for rank in ranks for one in rank[step * len(rank) // 3 :][: len(rank) // 3]]
        kinds = zip(*((images, batch.labels, batch.pixel_counts, batch.seeds) for batch, images in ordered), strict=True)
        return [torch.cat(kind) for kind in kinds]

    whole = steps(1, 12, 0)
    assert whole[0].shape == (36, 3, *SIZE) and whole[1].shape == (36, *SIZE)
    assert len({image.numpy().tobytes() for image in whole[0]}) == 36
    for cut in ((1, 4, 1), (2, 6, 2), (4, 1, 0)):
        assert all(torch.equal(a, b) for a, b in zip(steps(*cut), whole, strict=True)), cut


def test_they_are_the_views_of_the_cpu(shards):
    config = AugmentConfig(rotate_probability=0, photometric=False)
    ours, theirs = (
        next(made(train_examples(shards / "train", config=one), BatchPlan(31, 31, 0, 1), 0, 1, 0))
        for one in (config.model_copy(update={"on_device": True}), config)
    )
    assert ours[0].views and theirs[0].views is None and ours[0].keys == theirs[0].keys
    assert torch.equal(ours[0].labels, theirs[0].labels) and torch.equal(ours[0].pixel_counts, theirs[0].pixel_counts)
    assert (ours[1].int() - theirs[1]).abs().max() <= 1
    assert ours[1].stride() == theirs[1].stride()


def test_a_bad_sample_is_shown_as_nothing(shards, tmp_path, caplog):
    examples = train_examples(one_damaged(shards, tmp_path), config=EVERYTHING)
    for batch, images in made(examples, BatchPlan(31, 31, 0, 1), 0, 2, 1, 0.04):
        blank = [(label == 255).all().item() for label in batch.labels]
        assert sum(blank) == 1 and batch.pixel_counts[blank.index(True)].tolist() == [0] * 255 + [SIZE[0] * SIZE[1]]
        assert (images[blank.index(True)].permute(1, 2, 0) == torch.tensor(IMAGE_FILL)).all()
    assert "bad sample 1" in caplog.text


def test_the_peer_of_the_benchmark_sees_the_same(shards):
    config = configuration(shards, ["augment.on_device=true"])
    examples = train_examples(shards / "train", config=config.augment)
    label_set, losses = examples.mixture.label_set, []
    with closing(train_batches(examples, BatchPlan(4, 4, 0, 1), 0, 1, 0)) as batches:
        (batch,) = next(batches)
        labelled = with_labels(batch, label_set, CPU)
        ready = Batch(batch.keys, images_on(labelled, CPU), labelled.labels, batch.seeds, labelled.pixel_counts)
        for one in (batch, ready):
            torch.manual_seed(0)
            model = fresh_model(config, examples.mixture)
            weights = torch.ones(label_set.num_classes)
            peer = Plain(model, config, weights, label_set, StepClock(on_gpu=False), Job(0, 1, CPU))
            torch.manual_seed(0)
            losses.append(peer.step([one]))
    assert losses[0] == losses[1]


@pytest.fixture(scope="module")
def runs(shards, tmp_path_factory) -> dict[str, Run]:
    """On the CPU's views, and on the device's: alone with two micro batches, again, and in two processes."""
    folder = tmp_path_factory.mktemp("runs")
    options = {"cpu": [], "device": ["augment.on_device=true"], "again": ["augment.on_device=true", "data.workers=1"]}
    jobs = {name: experiment(shards, folder / name, *SETTINGS, *options) for name, options in options.items()}
    pair = {"two": experiment(shards, folder / "two", *SETTINGS, "augment.on_device=true")}
    return recorded_runs(jobs, folder, processes=1) | recorded_runs(pair, folder, processes=2)


def test_real_runs_are_of_one_batch(runs):
    losses = {name: np.array(list(run.losses.values())) for name, run in runs.items()}
    assert all(len(one) == 8 and np.isfinite(one).all() for one in losses.values())
    assert (losses["again"] == losses["device"]).all()
    weights = {name: (runs[name].folder / "model.safetensors").read_bytes() for name in ("device", "again", "cpu")}
    assert weights["again"] == weights["device"] != weights["cpu"]
    np.testing.assert_allclose(losses["two"], losses["device"], rtol=1e-5)
    apart = np.abs(losses["device"] / losses["cpu"] - 1)
    pair = np.abs(losses["two"] / losses["device"] - 1)
    print(f"largest relative difference from the CPU's losses: {apart.max():.1e}; of two processes: {pair.max():.1e}")
    assert 0 < apart[:3].max() < 0.01
    assert losses["device"][-1] < losses["device"][0]


def test_they_train_as_plain_pytorch(runs, shards):
    gradient, loss = differences(runs["two"], plain_loop(shards, [*SETTINGS, "augment.on_device=true"]))
    print(f"largest difference: gradients {gradient:.1e} of the largest, losses {loss:.1e}")
    assert gradient < 1e-5 and loss < 2e-5


def test_faithful_views_are_not_made_there():
    with pytest.raises(TrainError, match="augment: `faithful` views .* set `on_device` or `faithful` to false$"):
        load_config(ROOT / "train/configs/demo.yaml", ["augment.on_device=true", "augment.faithful=true"])
