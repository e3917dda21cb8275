"""What a rank is doing: the phase, step, micro-batch, layer and iteration of its main thread."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer

from megatron_coe.model.moe.router import CoERouter

START, DATA, MODEL, LOADING = "start-up", "building datasets", "building the model", "loading"
STEP, EVALUATION, SAVING, DONE = "step", "validation", "saving", "done"


class Heartbeat:
    """Written by the main thread, read by the watchdog's; an update takes about a microsecond.

    It is updated between steps, and at each micro-batch, layer and iteration of a forward pass.
    """

    def __init__(self) -> None:
        self.updates = 0
        """Grows with every sign of progress."""
        self.phase = START
        self.step = 0
        """The current step, or the last one done; 0 before the first."""
        self.microbatch = 0
        self.layer = 0
        self.iteration = 0

    def enter(self, phase: str, step: int | None = None) -> None:
        """Note that a phase begins.

        Args:
            step: that it belongs to; None: the same as before.
        """
        self.phase = phase
        if step is not None:
            self.step = step
        self.microbatch = self.layer = self.iteration = 0
        self.updates += 1

    def next_microbatch(self) -> None:
        """Note that the next micro-batch begins."""
        self.microbatch += 1
        self.layer = self.iteration = 0
        self.updates += 1

    def track(self, chunks: Iterable[torch.nn.Module]) -> None:
        """Note from now on each layer and iteration that a forward pass reaches.

        Args:
            chunks: the model chunks of this rank.
        """
        for chunk in chunks:
            for module in chunk.modules():
                if isinstance(module, TransformerLayer):
                    module.register_forward_pre_hook(self._enter_layer)
                elif isinstance(module, CoERouter):
                    module.register_forward_pre_hook(self._enter_iteration)

    def __str__(self) -> str:
        parts = [self.phase if self.phase != STEP else f"step {self.step}"]
        if self.phase not in (START, STEP) and self.step:
            parts[0] += f" at step {self.step}"
        for name in ("microbatch", "layer", "iteration"):
            if number := getattr(self, name):
                parts.append(f"{name.replace('microbatch', 'micro-batch')} {number}")
        return ", ".join(parts)

    def _enter_layer(self, module: TransformerLayer, args: tuple[Any, ...]) -> None:
        self.layer, self.iteration = module.layer_number, 0
        self.updates += 1

    def _enter_iteration(self, module: CoERouter, args: tuple[Any, ...]) -> None:
        self.iteration = args[2] + 1 if len(args) > 2 else 1
        self.updates += 1
