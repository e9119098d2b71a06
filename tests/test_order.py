from collections import Counter

import numpy as np
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
