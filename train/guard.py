"""What a step's numbers tell: updates that were passed over, and losses that jump."""

import math

from data.loader import Batch
from train import TrainError
from train.config import GuardConfig
from train.logs import log


class Guard:
    """Looks at every step, on every rank; the numbers are the same on all of them.

    Gradients that are not finite update nothing: the optimizer passes over the step, without a word. fp16 passes over steps
    while it looks for its loss scale.
    """

    def __init__(self, config: GuardConfig) -> None:
        self.config = config
        self.skipped = 0  # steps passed over since the start
        self.told = 0  # those that the engine told
        self.in_a_row = 0
        self.mean = self.variance = 0.0
        self.seen = 0
        self.spikes = 0  # losses that jumped since the start

    def look(self, step: int, loss: float, norm: float, skipped: int, batches: list[Batch]) -> None:
        """Args:
            norm: the gradient's, before clipping.
            skipped: the steps that the engine says it has passed over.

        Raises:
            TrainError: too many steps in a row were passed over.
        """
        finite = math.isfinite(loss) and math.isfinite(norm) and norm >= 0
        passed_over, self.told = skipped > self.told, skipped
        if finite and not passed_over:
            self.in_a_row = 0
            self._spike(step, loss, batches)
            return
        self.skipped += 1
        self.in_a_row += 1
        what = f"step {step}: loss {loss}, gradient norm {norm}: not finite (this rank's samples: {_keys(batches)})"
        if self.in_a_row > self.config.skipped_in_a_row:
            raise TrainError(f"{what}; lower optimizer.lr, then start again to continue from the last checkpoint")
        log.warning("%s; passed over, %d so far, %d in a row", what, self.skipped, self.in_a_row)

    def _spike(self, step: int, loss: float, batches: list[Batch]) -> None:
        deviation = math.sqrt(self.variance)
        if self.seen >= self.config.spike_after and loss > self.mean + self.config.spike_deviations * deviation:
            self.spikes += 1
            usual = f"{self.mean:.4f} +- {deviation:.4f}"
            log.warning("step %d: loss %.4f jumps from %s (this rank's samples: %s)", step, loss, usual, _keys(batches))
        # Over the last 50 or so; from the first one on as exact as so few can be.
        self.seen += 1
        share = max(1 / self.seen, 0.02)
        off = loss - self.mean
        self.mean += share * off
        self.variance = (1 - share) * (self.variance + share * off * off)


def _keys(batches: list[Batch]) -> str:
    return ", ".join(key for batch in batches for key in batch.keys)
