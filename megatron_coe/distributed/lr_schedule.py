"""The learning rate schedule of a run."""

from __future__ import annotations

from typing import Any

from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_coe.config.run_config import TrainSettings
from megatron_coe.config.schedules import lr_spans


class LRSchedule(OptimizerParamScheduler):
    """Megatron's schedule, with the spans that the settings ask for, in their unit.

    Args:
        optimizer: what has the `param_groups` whose learning rates are set.
    """

    def __init__(self, optimizer: Any, train: TrainSettings) -> None:
        self.spans = lr_spans(train)
        super().__init__(
            optimizer,
            init_lr=0.0,
            max_lr=train.lr,
            min_lr=train.min_lr,
            lr_warmup_steps=self.spans.warmup,
            lr_decay_steps=self.spans.total,
            lr_decay_style=train.lr_decay_style,
            start_wd=train.weight_decay,
            end_wd=train.weight_decay,
            wd_incr_steps=self.spans.total,
            wd_incr_style="constant",
            wsd_decay_steps=self.spans.wsd_decay,
            lr_wsd_decay_style=train.lr_wsd_decay_style,
        )

    def move_to(self, step: int, samples: int) -> None:
        """Set the learning rate of the step that follows `step` ones and `samples` sequences."""
        self.step(self.spans.position(step, samples) - self.num_steps)
