"""An exponential moving average of the weights, in shards where DeepSpeed shards the optimizer's fp32 weights."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from torch.optim.swa_utils import get_ema_multi_avg_fn

from train.masters import Masters, Read, State

AVERAGE = "average"


class Ema:
    """The average of the trained weights, in fp32; each rank keeps that of the part whose optimizer it runs.

    Takes 4 bytes for each trained parameter at ZeRO stage 0, at stages 1-3 that over the number of processes, and no
    communication but for showing it. Step t (0, 1, ...) moves it by 1 - min(decay, (1 + t) / (10 + t)) of the way to the
    weights: with `decay` from the start on, the untrained head would be in it for some 3 / (1 - decay) steps.
    """

    def __init__(self, masters: Masters, decay: float) -> None:
        """Starts at the present weights."""
        self.decay, self.masters = decay, masters
        self.average = [weight.clone() for weight in masters.read()]

    def update(self, step: int) -> None:
        """Take in the weights after optimizer step `step` (0, 1, ...)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        get_ema_multi_avg_fn(decay)(self.average, self.masters.read(), None)

    @contextmanager
    def in_model(self) -> Iterator[None]:
        """The model has the average for its weights inside, and its own ones, bit for bit, afterwards. Every rank must
        enter and leave it: both gather the weights."""
        self._exchange()
        yield  # no `finally`: a rank that leaves by an exception would wait for the others for ever
        self._exchange()

    def state(self) -> State:
        """As `Masters.state`."""
        return self.masters.share(AVERAGE, self.average)

    def restore(self, read: Read) -> None:
        """As `Masters.restore`."""
        for fragment, average in zip(self.masters.fragments, self.average, strict=True):
            average.copy_(read(AVERAGE, fragment.name, fragment.start, fragment.numel))

    def _exchange(self) -> None:
        weights = [weight.clone() for weight in self.masters.read()]
        self.masters.write(self.average)
        self.masters.update_model()
        self.average = weights


def averaged(ema: Ema | None) -> AbstractContextManager[None]:
    """`ema.in_model()`, or nothing for none."""
    return ema.in_model() if ema else nullcontext()
