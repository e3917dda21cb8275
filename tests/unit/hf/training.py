"""One step of transformers' Trainer on a small model; run as a program, on a rank of several."""

from __future__ import annotations

import sys

import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments

from tests.unit.hf.small import small_model, tokens

SEQUENCES = 8


def examples() -> list[dict[str, Tensor]]:
    """Sequences of one length, of which different numbers of tokens have a label."""
    ids = tokens(SEQUENCES, 12, seed=5)
    labels = ids.clone()
    for row, masked in enumerate((0, 3, 11, 7, 0, 5, 9, 2)):
        labels[row, :masked] = -100
    return [{"input_ids": x, "labels": y} for x, y in zip(ids, labels, strict=True)]


def update_of_one_step(folder: str, alpha: float, size: int, steps: int, **options) -> dict:
    """What a step of SGD with learning rate 1 takes off each weight: its gradient."""
    model = small_model(aux_loss_alpha=alpha)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    arguments = TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=steps,
        max_steps=1,
        learning_rate=1.0,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0.0,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        **options,
    )
    Trainer(model=model, args=arguments, train_dataset=examples()).train()
    return {name: before[name] - weight.detach() for name, weight in model.named_parameters()}


if __name__ == "__main__":
    home, share = sys.argv[1], SEQUENCES // 2
    updates = [
        update_of_one_step(home, 0.1, size, share // size, ddp_backend="gloo")
        for size in (share, 1)
    ]
    if torch.distributed.get_rank() == 0:
        torch.save(updates, f"{home}/updates.pt")
