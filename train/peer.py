"""The training step that one would write without this repository, for train.benchmark to compare with."""

from copy import deepcopy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.batch import Batch
from data.device_render import images_on, with_labels
from data.labels import LabelSet
from model.backbone import GroupedAttention, draw_drop_path
from model.head import InstanceNorm2d, PointwiseConv2d
from model.segmenter import Segmenter, has_weight_decay, normalize
from train.clock import StepClock
from train.config import Config
from train.engine import Job
from train.optim import freeze


class Plain:
    """timm's backbone and the head of PyTorch's own modules, eager, with autocast, and fused AdamW; begins with the weights that
    `model` has.

    All its blocks are recomputed if the experiment recomputes any: else it would not fit where the experiment does. Its loss
    is the mean over each micro batch's valid pixels, weighted by class.
    """

    def __init__(
        self, model: Segmenter, config: Config, weights: Tensor, label_set: LabelSet, clock: StepClock, job: Job
    ) -> None:
        model = deepcopy(model)
        freeze(model, config.model.freeze)
        head = model.decode_head
        self.backbone = model.backbone.to(job.device).train()
        self.backbone.set_grad_checkpointing(config.model.recompute not in ("none", "head"))
        dropout = nn.Dropout2d(config.model.dropout)
        self.head = nn.Sequential(*head.deconv_layers, *head.conv_layers, dropout, head.conv_seg).to(job.device).train()
        for module in [*self.backbone.modules(), *self.head.modules()]:
            if isinstance(module, GroupedAttention | InstanceNorm2d | PointwiseConv2d):  # as they are without this repository
                module.__class__ = type(module).__base__
        named = [*self.backbone.named_parameters(), *self.head.named_parameters()]
        named = [(name, parameter) for name, parameter in named if parameter.requires_grad]
        self.parameters = [parameter for _, parameter in named]
        wanted = config.optimizer
        groups = [
            {"params": [p for name, p in named if has_weight_decay(name, p.ndim) == decays], "weight_decay": decay}
            for decays, decay in ((True, wanted.weight_decay), (False, 0.0))
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=wanted.lr, betas=wanted.betas, fused=True)
        self.clip_norm, self.weights, self.label_set = wanted.clip_norm, weights.to(job.device), label_set
        half = config.precision == "bf16" or (config.precision == "auto" and job.on_gpu)
        self.autocast = torch.autocast(job.device.type, torch.bfloat16, enabled=half)
        self.clock, self.device = clock, job.device

    def step(self, micro_batches: list[Batch]) -> float:
        """An optimizer step; returns its loss."""
        total = 0.0
        for batch in micro_batches:
            self.clock.enter("forward")
            batch = with_labels(batch, self.label_set, self.device)
            images, labels = images_on(batch, self.device), batch.labels.to(self.device, non_blocking=True).long()
            draw_drop_path(self.backbone, batch.seeds)
            with self.autocast:
                logits = self.head(self.backbone(normalize(images)))
            logits = F.interpolate(logits.float(), labels.shape[-2:], mode="bilinear", align_corners=False)
            loss = F.cross_entropy(logits, labels, self.weights, ignore_index=self.label_set.ignore_index) / len(micro_batches)
            self.clock.enter("backward")
            loss.backward()
            total += loss.detach()
        self.clock.enter("optimizer")
        if self.clip_norm:
            nn.utils.clip_grad_norm_(self.parameters, self.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(total)
