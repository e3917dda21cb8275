"""Run a script over a Megatron-LM checkout's `pretrain` and record what it did.

    python tests/functional/record_megatron_lm.py RECORD SCRIPT ARGUMENTS

RECORD gets rank 0's weights before the first step, its micro-batches, what Megatron-LM's loss
function reported of each, and the tokenizer's number of ids.
"""

from __future__ import annotations

import functools
import importlib
import os
import runpy
import sys
from collections.abc import Callable, Iterator

import torch


class Recorder:
    """Stands in for `pretrain_gpt.forward_step`: calls it, and notes training's part of it."""

    def __init__(self, forward_step: Callable) -> None:
        self.forward_step = forward_step
        self.weights: dict[str, torch.Tensor] = {}
        self.batches: list[dict[str, torch.Tensor]] = []
        self.reports: list[list[float]] = []

    def __call__(self, data: Iterator, model: torch.nn.Module, *args: object) -> tuple:
        if not model.training:
            return self.forward_step(data, model, *args)
        if not self.weights:
            named = model.module.named_parameters()
            self.weights = {name: weight.detach().clone() for name, weight in named}
        output, loss_func = self.forward_step(self.noted(data), model, *args)
        return output, functools.partial(self.noted_loss, loss_func)

    def noted(self, data: Iterator) -> Iterator:
        """The next micro-batch of `data`; not asked for on ranks that are sent theirs."""
        batch = next(data)
        self.batches.append({key: batch[key] for key in ("tokens", "labels", "loss_mask")})
        yield batch

    def noted_loss(self, loss_func: Callable, output: torch.Tensor) -> tuple:
        loss, num_tokens, report = loss_func(output)
        self.reports.append(report["lm loss"].tolist())
        return loss, num_tokens, report

    def save(self, path: str) -> None:
        from megatron.training import get_tokenizer

        kept = {"weights": self.weights, "batches": self.batches, "reports": self.reports}
        torch.save({**kept, "vocab_size": get_tokenizer().vocab_size}, path)


def main() -> None:
    from megatron_coe.model.backends import prepare

    record, *sys.argv = sys.argv[1:]
    prepare()  # as the script does, before Megatron's training modules are imported
    gpt = importlib.import_module("pretrain_gpt")
    gpt.forward_step = recorder = Recorder(gpt.forward_step)
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as stop:
        if stop.code:
            raise
    if os.environ["RANK"] == "0":
        recorder.save(record)


if __name__ == "__main__":
    main()
