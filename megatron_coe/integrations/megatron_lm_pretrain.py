"""Batches, loss and datasets for Megatron's own `pretrain`, which takes them from the program.

A Megatron-LM checkout has them in its `pretrain_gpt.py`. The megatron-core wheel has only
`megatron.training`: pass `forward_step` and `train_valid_test_datasets_provider` of this module to
its `pretrain`.

Every rank of a model-parallel group reads the same sequences, so nothing is broadcast. (Pipeline
stages in the middle read none.)
"""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import fields
from functools import partial
from typing import Any

import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.training import get_args, get_timers, get_tokenizer
from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage
from torch import Tensor
from torch.utils.data import Dataset

from megatron_coe.integrations.megatron_lm import coe_builder
from megatron_coe.megatron_compat.versions import get_batch_on_this_cp_rank
from megatron_coe.training.batch_source import FIELDS

LossFunction = Callable[[Tensor], tuple[Tensor, Tensor, dict[str, Tensor]]]

_IGNORED = {
    "sft": "documents are joined and cut every --seq-length tokens",
    "fim_data": "documents are read as they stand",
    "dataloader_inter_document_masking": "attention is causal over whole sequences",
    "reset_attention_mask": "attention is causal over whole sequences",
    "reset_position_ids": "rotary positions count from the beginning of the sequence",
    "hybrid_context_parallel": "all sequences have the same length",
    "logits_load_dir": "the loss is the cross-entropy of the labels",
}
"""Arguments of Megatron's that `pretrain_gpt.py` reads and this module does not, and why."""


def model_provider(*args: Any, **kwargs: Any) -> GPTModel:
    """Build a pipeline stage of the CoE model; `pretrain` calls it first of all these functions.

    Raises:
        ValueError: as `coe_builder`, or an argument asks for other batches than `get_batch` reads.
    """
    _refuse_ignored(get_args())
    return coe_builder(get_args(), *args, **kwargs)


def forward_step(
    data_iterator: Iterator[dict[str, Tensor]] | None, model: torch.nn.Module
) -> tuple[Tensor, LossFunction]:
    """Run one micro-batch through one model chunk, as Megatron's schedules call it."""
    timer = get_timers()("batch-generator", log_level=2)
    timer.start()
    batch = get_batch(data_iterator)
    timer.stop()
    output = model(
        batch["tokens"],
        batch["position_ids"],
        None,  # attention is causal in the kernel
        labels=batch["labels"],
        loss_mask=batch["loss_mask"],
    )
    return output, partial(loss_function, batch["loss_mask"])


def get_batch(data_iterator: Iterator[dict[str, Tensor]] | None) -> dict[str, Any]:
    """Read this rank's part of the next micro-batch, on its device.

    Token ids, labels and positions [B, S] (int64) and loss mask [B, S] (float32), with
    S = sequence length / context-parallel size; all None on a stage that reads no data.
    """
    if data_iterator is None:
        return dict.fromkeys(FIELDS)
    batch = next(data_iterator)
    on_device = {name: batch[name].cuda(non_blocking=True) for name in FIELDS}
    return get_batch_on_this_cp_rank(on_device)


def loss_function(loss_mask_BS: Tensor, losses_BS: Tensor) -> tuple[Tensor, Tensor, dict]:
    """Sum the cross-entropy of the valid positions: (sum, number of them, logged values).

    Megatron divides: by the positions of the micro-batch or, with `--calculate-per-token-loss`,
    the sum of all gradients by those of the global batch.
    """
    loss = (losses_BS.float() * loss_mask_BS).sum()
    num_tokens = loss_mask_BS.sum().int()
    if get_args().check_for_nan_in_loss_and_grad:
        get_rerun_state_machine().validate_result(
            result=loss,
            rejection_func=lambda loss: not loss.isfinite(),
            message="the loss of a micro-batch is not finite",
            tolerance=0.0,  # forward passes are deterministic
            fatal=True,
        )
    return loss, num_tokens, {"lm loss": torch.stack([loss.detach(), num_tokens])}


def train_valid_test_datasets_provider(
    train_val_test_num_samples: list[int | None], vp_stage: int | None = None
) -> list[Dataset | None]:
    """Build Megatron's GPT datasets (training, validation, test) that the arguments describe."""
    args = get_args()
    return BlendedMegatronDatasetBuilder(
        MockGPTDataset if args.mock_data else GPTDataset,
        train_val_test_num_samples,
        partial(is_first_or_last_pipeline_stage, vp_stage),
        dataset_config_from_args(args),
    ).build()


train_valid_test_datasets_provider.is_distributed = True  # type: ignore[attr-defined]
"""Makes Megatron call it on every rank, not only on the first of a tensor-parallel group."""


def dataset_config_from_args(args: Namespace) -> GPTDatasetConfig:
    """Translate Megatron's arguments for data; fields keep their names where they have one."""
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    known = {field.name for field in fields(GPTDatasetConfig) if field.init}
    values = {name: value for name, value in vars(args).items() if name in known}
    values.update(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        tokenizer=get_tokenizer(),
        path_to_cache=args.data_cache_path,
        fast_cache_load=args.dataloader_fast_cache_load,
        defer_npy_index_mmap=args.dataloader_defer_npy_index_mmap,
        sequences_per_dataset=_sequences_per_dataset(args.per_dataset_sequences_path),
        create_attention_mask=False,
    )
    return GPTDatasetConfig(**values)


def _refuse_ignored(args: Namespace) -> None:
    """Refuse arguments that would be ignored."""
    for name, reason in _IGNORED.items():
        if value := getattr(args, name, None):
            raise ValueError(
                f"--{name.replace('_', '-')} {value} is read by the pretrain_gpt.py of a "
                f"Megatron-LM checkout; without one {reason}. Leave it out, or put a checkout on "
                "PYTHONPATH."
            )


def _sequences_per_dataset(path: str | None) -> dict | None:
    if path is None:
        return None
    with open(path, encoding="utf-8") as file:
        return json.load(file)
