from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.order import BatchPlan, Order, validation_positions


@given(st.integers(1, 300), st.integers(0, 10**6), st.integers(0, 3))
def test_every_sample_exactly_once_an_epoch(num_samples, seed, epoch):
    order = Order(num_samples, seed)
    taken = [order.sample_at(epoch * num_samples + i) for i in range(num_samples)]
    assert sorted(taken) == list(range(num_samples))


def test_epochs_and_seeds_differ():
    order = Order(100, seed=1)
    first, second = ([order.sample_at(e * 100 + i) for i in range(100)] for e in (0, 1))
    assert first != second
    assert first != [Order(100, seed=2).sample_at(i) for i in range(100)]


def test_generator_belongs_to_the_position():
    order = Order(10, seed=3)
    draws = [order.generator(p).integers(2**63) for p in range(30)]
    assert len(set(draws)) == 30
    assert draws == [Order(10, seed=3).generator(p).integers(2**63) for p in range(30)]


@given(st.integers(1, 6), st.integers(1, 5), st.integers(1, 4), st.integers(0, 1000))
def test_ranks_and_micro_batches_cut_the_same_global_batch(world, micro, accumulation, step):
    batch = world * micro * accumulation
    plans = [BatchPlan(batch, micro, rank, world) for rank in range(world)]
    positions = [p for plan in plans for chunk in plan.positions(step) for p in chunk]
    assert positions == list(range(step * batch, (step + 1) * batch))
    assert {plan.accumulation for plan in plans} == {accumulation}
    assert all(len(chunk) == micro for plan in plans for chunk in plan.positions(step))


@given(st.integers(1, 200), st.integers(1, 9))
def test_validation_takes_each_once_and_ranks_get_equally_many(num_samples, world):
    shares = [validation_positions(num_samples, rank, world) for rank in range(world)]
    assert len({len(share) for share in shares}) == 1
    counts = Counter(p for share in shares for p in share)
    assert all(counts[i] == 1 for i in range(num_samples)) and max(counts.values()) == 1
    assert sum(p >= num_samples for p in counts) < world


def test_shuffle_is_uniform():
    firsts = Counter(Order(4, seed).sample_at(0) for seed in range(2000))
    assert np.allclose([firsts[i] for i in range(4)], 500, atol=100)


SHARDS = np.arange(0, 100_000, 1000)


def test_a_window_reads_few_shards_at_a_time_and_each_sample_once():
    order = Order(100_000, seed=1, window=5000, shard_starts=SHARDS)
    epochs = [np.array([order.sample_at(e * 100_000 + i) for i in range(100_000)]) for e in (0, 1)]
    for samples in epochs:
        assert sorted(samples) == list(range(100_000))
        shards_at_a_time = [len(set(samples[i : i + 5000] // 1000)) for i in range(0, 95_000, 5000)]
        assert max(shards_at_a_time) <= 2 * 5 + 2  # a window begins and ends within shards; so does what we look at
    assert (epochs[0] != epochs[1]).mean() > 0.99


def test_a_window_of_some_shards_is_nearly_as_uncorrelated_as_a_uniform_shuffle():
    """Serial correlation of the source indices: neighbours in the order should come from anywhere in the set."""

    def correlation(order: Order) -> float:
        samples = np.array([order.sample_at(i) for i in range(order.num_samples)], np.float64)
        return float(np.corrcoef(samples[:-1], samples[1:])[0, 1])

    assert abs(correlation(Order(100_000, seed=1))) < 0.01
    # Even wide windows show neighbours of the same shards: with windows of k of 100 shards about 1/k of the variance is shared.
    found = [correlation(Order(100_000, 1, window, SHARDS)) for window in (1000, 10_000, 50_000)]
    assert found[0] > found[1] > found[2] and found[1] < 0.2 and found[2] < 0.06


@given(st.integers(1, 200), st.integers(0, 50), st.integers(0, 5), st.sampled_from([None, 1, 7, 1000]), st.data())
def test_repeats_are_kept_within_one_in_every_epoch(num_samples, seed, epoch, window, data):
    wanted = data.draw(st.lists(st.floats(0.1, 4), min_size=num_samples, max_size=num_samples))
    order = Order(num_samples, seed, window, np.arange(0, num_samples, 10), np.float32(wanted))
    length = order.epoch_length
    assert length == max(1, round(float(np.float32(wanted).sum(dtype=np.float64))))
    counts = Counter(order.sample_at(epoch * length + i) for i in range(length))
    scale = length / sum(wanted)
    for i, times in enumerate(wanted):
        assert abs(counts[i] - scale * times) < 1 + 1e-4


@pytest.mark.parametrize("times", [0.5, 1.0, 2.0, 2.25])
def test_repeats_are_exact_on_average(times):
    order = Order(64, seed=0, repeats=np.full(64, times, np.float32))
    counts = Counter(order.sample_at(i) for i in range(8 * order.epoch_length))
    assert all(abs(counts[i] - 8 * times) <= 1 for i in range(64))
    if times == 2:
        assert set(counts.values()) == {16}


def test_a_position_needs_no_other_position():
    orders = [Order(500, 3, 60, np.arange(0, 500, 50), np.linspace(0.5, 2, 500)) for _ in range(2)]
    positions = np.random.default_rng(0).integers(0, 5000, 300).tolist()
    assert {p: orders[0].sample_at(p) for p in positions} == {p: orders[1].sample_at(p) for p in sorted(positions)}
