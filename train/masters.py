"""What this rank keeps of the training's state, whatever the ZeRO stage: fp32 weights and AdamW's moments of them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from train.engine import DeepSpeedEngine
from train.optim import MOMENTS, LayerwiseAdamW

WEIGHT, FROZEN = "weight", "frozen"


@dataclass(frozen=True)
class Fragment:
    """`numel` elements, from `start` on, of a parameter laid flat."""

    name: str
    start: int
    numel: int
    parameter: torch.nn.Parameter


# What reads `numel` elements, from `start` on, of a parameter's WEIGHT or other kind: (kind, name, start, numel) -> Tensor.
Read = Callable[[str, str, int, int], Tensor]
State = dict[tuple[str, str, int], Tensor]  # (kind, name, start) -> a flat tensor


class Masters:
    """The fp32 weights that this rank's optimizer steps: all of them at ZeRO stage 0, else its part.

    At stages 1 to 3 they lie in DeepSpeed's flat partitions, which its `_hp_mapping` and `grad_position` tell about.
    """

    def __init__(self, engine: DeepSpeedEngine, lr_scales: dict[str, float]) -> None:
        """lr_scales: of each parameter by its name, for AdamW, which needs them before its first step."""
        self.stage, self.optimizer = engine.zero_optimization_stage(), engine.optimizer
        named = list(engine.module.named_parameters())
        self.fragments = [f for name, p in named if p.requires_grad and (f := self._fragment(name, p)).numel > 0]
        self.frozen = [f for name, p in named if not p.requires_grad and (f := self._kept(name, p)).numel > 0]
        self.groups: dict[int | None, list[Fragment]] = {}  # those on NVMe by the optimizer's groups; else None
        for fragment in self.fragments:
            self.groups.setdefault(self._swapped(fragment), []).append(fragment)
        self.adamw.assign((*self.place(fragment), lr_scales[fragment.name]) for fragment in self.fragments)

    def read(self) -> list[Tensor]:
        """The weights of each fragment: flat fp32 tensors, which are no copies. Not of an optimizer on NVMe."""
        return [self._view(fragment, WEIGHT) for fragment in self.fragments]

    def write(self, values: list[Tensor]) -> None:
        """Set them; `update_model` brings them to the model."""
        for view, value in zip(self.read(), values, strict=True):
            view.copy_(value)

    def update_model(self) -> None:
        """Give the model the weights that were written, as an optimizer step does. Every rank must call it."""
        if self.stage == 3:
            self.optimizer.checkpoint_event_prologue()  # lets go of the small parameters, which stay gathered
            for group, fragments in self.groups.items():
                with self._in_memory(group):
                    for fragment in fragments:
                        fragment.parameter.ds_tensor.data[: fragment.numel].copy_(self._view(fragment, WEIGHT))
            self.optimizer.checkpoint_event_epilogue()  # and gathers them anew
        elif self.stage > 0:
            self.optimizer.update_lp_params()

    @property
    def loss_scale(self) -> float:
        """fp16's; else 1."""
        return float(getattr(self.optimizer, "loss_scale", 1))

    @loss_scale.setter
    def loss_scale(self, value: float) -> None:
        if self.loss_scale != 1 and value != 1:  # of a run that was fp16, and is
            self.optimizer.loss_scale = value

    @property
    def updates(self) -> int:
        """How many AdamW has made: fewer than the run's steps where some were passed over."""
        return max((int(state["step"]) for state in self.adamw.state.values()), default=0)

    def state(self) -> State:
        """This rank's share of what a checkpoint holds."""
        frozen = [self._frozen(fragment) for fragment in self.frozen]
        state = self._share(FROZEN, self.frozen, frozen, self.stage < 3)
        for group, fragments in self.groups.items():
            with self._in_memory(group):
                for kind in (WEIGHT, *MOMENTS) if self.updates else (WEIGHT,):
                    views = [self._view(fragment, kind) for fragment in fragments]
                    views = views if group is None else [view.clone() for view in views]
                    state |= self._share(kind, fragments, views, self.stage == 0)
        return state

    def share(self, kind: str, tensors: list[Tensor]) -> State:
        """Of these, one for each fragment, the ones that this rank saves."""
        return self._share(kind, self.fragments, tensors, self.stage == 0)

    @staticmethod
    def _share(kind: str, fragments: list[Fragment], tensors: list[Tensor], on_every_rank: bool) -> State:
        """What is on every rank is dealt out among them."""
        mine = slice(dist.get_rank(), None, dist.get_world_size()) if on_every_rank else slice(None)
        return {(kind, f.name, f.start): tensor for f, tensor in list(zip(fragments, tensors, strict=True))[mine]}

    @torch.no_grad()
    def restore(self, read: Read, updates: int) -> None:
        """Take back what `state` gave, on so many ranks and at whatever stage it was. Every rank must call it."""
        for fragment in self.frozen:
            self._frozen(fragment).copy_(read(FROZEN, fragment.name, fragment.start, fragment.numel))
        for group, fragments in self.groups.items():
            with self._in_memory(group, changed=True):
                if updates:
                    self._start_moments(fragments, updates)
                for kind in (WEIGHT, *MOMENTS) if updates else (WEIGHT,):
                    for fragment in fragments:
                        self._view(fragment, kind).copy_(read(kind, fragment.name, fragment.start, fragment.numel))
        self.update_model()

    def _start_moments(self, fragments: list[Fragment], updates: int) -> None:
        for tensor in {self.place(fragment)[0] for fragment in fragments}:
            # A counter of its own for each: AdamW counts it up in place.
            count = torch.tensor(float(updates), device=tensor.device)
            self.adamw.state[tensor] = {"step": count, **{kind: torch.zeros_like(tensor) for kind in MOMENTS}}

    def _swapped(self, fragment: Fragment) -> int | None:
        """The optimizer's group that it belongs to, if that lies on NVMe between two steps."""
        if self.stage < 3:
            return None
        group, _, _ = self.optimizer.grad_position[self.optimizer.get_param_id(fragment.parameter)]
        return group if self.optimizer._swappable_optimizer_subgroup(group) else None

    @contextmanager
    def _in_memory(self, group: int | None, changed: bool = False) -> Iterator[None]:
        """Reads a group from NVMe for as long as it is needed, and writes it back if it is changed."""
        if group is not None:
            self.optimizer._optimizer_states_and_gradient_swap_in(group)
        yield
        if group is not None and changed:
            self.optimizer._optimizer_states_and_gradient_swap_out(group)
        elif group is not None:
            self.optimizer._release_swap_buffers(group)

    @property
    def adamw(self) -> LayerwiseAdamW:
        return self.optimizer if self.stage == 0 else self.optimizer.optimizer

    def place(self, fragment: Fragment) -> tuple[Tensor, int, int]:
        """Where it lies: in which of the tensors that AdamW steps, from which element on, and how many."""
        parameter = fragment.parameter
        if self.stage == 0:
            return parameter, 0, fragment.numel
        if self.stage == 3:
            group, start, _ = self.optimizer.grad_position[self.optimizer.get_param_id(parameter)]
            return self.optimizer.fp32_partitioned_groups_flat[group], start, fragment.numel
        (tensor,) = self.optimizer.param_groups[parameter._hp_mapping.param_group_index]["params"]
        return tensor, parameter._hp_mapping.hp_fragment_address.start, fragment.numel

    def _view(self, fragment: Fragment, kind: str) -> Tensor:
        tensor, start, numel = self.place(fragment)
        return (tensor if kind == WEIGHT else self.adamw.state[tensor][kind]).detach().view(-1).narrow(0, start, numel)

    def _fragment(self, name: str, parameter: torch.nn.Parameter) -> Fragment:
        if self.stage in (0, 3):
            return self._kept(name, parameter)
        if parameter._hp_mapping is None:
            return Fragment(name, 0, 0, parameter)
        place = parameter._hp_mapping.lp_fragment_address
        return Fragment(name, place.start, place.numel, parameter)

    def _kept(self, name: str, parameter: torch.nn.Parameter) -> Fragment:
        """What this rank has of a parameter of the model: at stage 3 a partition, of which the last one is filled up."""
        if self.stage < 3:
            return Fragment(name, 0, parameter.numel(), parameter)
        size = parameter.ds_tensor.ds_numel
        start = dist.get_rank() * size
        return Fragment(name, start, min(size, parameter.ds_numel - start), parameter)

    def _frozen(self, fragment: Fragment) -> Tensor:
        parameter = fragment.parameter
        return parameter.ds_tensor.data[: fragment.numel] if self.stage == 3 else parameter.detach().view(-1)
