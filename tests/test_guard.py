"""Losses that jump, numbers that are not finite, and memory that does not suffice."""

import logging
import math
import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from train import TrainError
from train import __main__ as main
from train.config import GuardConfig
from train.guard import Guard

BATCHES = [SimpleNamespace(keys=["a", "b"]), SimpleNamespace(keys=["c"])]


@pytest.fixture
def said(caplog, monkeypatch):
    logger = logging.getLogger("train")
    monkeypatch.setattr(logger, "propagate", False)  # else told twice, unless a run in this process has begun to log
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


def test_a_loss_that_jumps_is_told_with_its_samples(said):
    guard = Guard(GuardConfig())
    for step in range(300):
        guard.look(step, 1 - step / 4000 + 0.02 * math.sin(step), 0.5, 0, BATCHES)
    assert not said.messages
    guard.look(300, 1.2, 0.5, 0, BATCHES)
    (told,) = said.messages
    assert "step 300: loss 1.2000 jumps from 0.9" in told and "a, b, c" in told


@given(st.lists(st.booleans(), max_size=40), st.integers(0, 5))
def test_ends_after_so_many_in_a_row(finite, most):
    guard, row = Guard(GuardConfig(skipped_in_a_row=most)), 0
    for step, good in enumerate(finite):
        row = 0 if good else row + 1
        engine = finite[: step + 1].count(False)
        if row > most:
            with pytest.raises(TrainError, match=f"step {step}: loss 1.0, gradient norm nan: not finite .*a, b, c"):
                guard.look(step, 1.0, math.nan, engine, BATCHES)
            return
        guard.look(step, 1.0, 1.0 if good else math.nan, engine, BATCHES)
    assert guard.skipped == finite.count(False)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=40))
def test_what_the_engine_passes_over_is_counted_once(steps):
    """fp16's engine counts; the numbers need not show it, and it need not count what they show."""
    guard, engine = Guard(GuardConfig(skipped_in_a_row=99)), 0
    for step, (counted, finite) in enumerate(steps):
        engine += counted
        guard.look(step, 1.0, 1.0 if finite else math.inf, engine, BATCHES)
        assert (guard.in_a_row == 0) == (finite and not counted)
    assert guard.skipped == sum(counted or not finite for counted, finite in steps)


@pytest.mark.parametrize(
    "error", [None, MemoryError(), RuntimeError("CUDA error: out of memory"), RuntimeError("CUBLAS_STATUS_ALLOC_FAILED")]
)
def test_out_of_memory_comes_with_a_remedy(monkeypatch, error):
    def run(*arguments: object) -> None:
        if error:
            raise error
        torch.empty(1 << 50)

    monkeypatch.setattr(main, "run", run)
    monkeypatch.setattr(sys, "argv", ["train", "--config", "train/configs/demo.yaml"])
    with pytest.raises(SystemExit, match="out of memory .*micro_batch_size .*model.recompute=blocks.*ZeRO stage or offload"):
        main.main()
