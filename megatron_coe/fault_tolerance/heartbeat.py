"""What a rank is doing, for those who want to know why it does not go on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer

from megatron_coe.model.moe.router import CoERouter

START, DATA, MODEL, LOADING = "start-up", "building datasets", "building the model", "loading"
STEP, EVALUATION, SAVING, DONE = "step", "validation", "saving", "done"


class Heartbeat:
    """Written by the main thread as it goes, read by another; each mark costs about a microsecond.

    Marks stand between steps, at every micro-batch, layer and iteration of a forward pass.
    """

    def __init__(self) -> None:
        self.marks = 0
        """Grows with every sign of progress."""
        self.phase = START
        self.step = 0
        """The one that is being made, or the last one done; 0 before there is any."""
        self.microbatch = 0
        self.layer = 0
        self.iteration = 0

    def enter(self, phase: str, step: int | None = None) -> None:
        """Something else begins."""
        self.phase = phase
        if step is not None:
            self.step = step
        self.microbatch = self.layer = self.iteration = 0
        self.marks += 1

    def next_microbatch(self) -> None:
        self.microbatch += 1
        self.layer = self.iteration = 0
        self.marks += 1

    def follow(self, chunks: Iterable[torch.nn.Module]) -> None:
        """Note each layer and each iteration that a forward pass comes to, from now on."""
        for chunk in chunks:
            for module in chunk.modules():
                if isinstance(module, TransformerLayer):
                    module.register_forward_pre_hook(self._at_layer)
                elif isinstance(module, CoERouter):
                    module.register_forward_pre_hook(self._at_iteration)

    def __str__(self) -> str:
        parts = [self.phase if self.phase != STEP else f"step {self.step}"]
        if self.phase not in (START, STEP) and self.step:
            parts[0] += f" at step {self.step}"
        for name in ("microbatch", "layer", "iteration"):
            if number := getattr(self, name):
                parts.append(f"{name.replace('microbatch', 'micro-batch')} {number}")
        return ", ".join(parts)

    def _at_layer(self, module: TransformerLayer, args: tuple[Any, ...]) -> None:
        self.layer, self.iteration = module.layer_number, 0
        self.marks += 1

    def _at_iteration(self, module: CoERouter, args: tuple[Any, ...]) -> None:
        self.iteration = args[2] + 1 if len(args) > 2 else 1
        self.marks += 1
