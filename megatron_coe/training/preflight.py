"""Checks of a run before its process groups are made, by each process for itself.

So a mistake is one message, and not a rank that others wait for.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from megatron_coe.config.run_config import (
    CheckpointSettings,
    DataSettings,
    ParallelSettings,
    TrainSettings,
    held_out_sets,
)
from megatron_coe.config.schedules import batch_schedule
from megatron_coe.config.validation import num_microbatches, smallest_world_size, world_size
from megatron_coe.data.tokenizer import Tokenizer
from megatron_coe.model.freezing import check_patterns, is_frozen
from megatron_coe.model.learning_rates import check_factors
from megatron_coe.model.provider import CoEModelProvider
from megatron_coe.planning.memory import trainable_params
from megatron_coe.planning.run_summary import plan_of
from megatron_coe.utils.run_files import METRICS_FILE


def check_frozen(
    provider: CoEModelProvider, parallel: ParallelSettings, train: TrainSettings
) -> None:
    """Raise ValueError for frozen weights that the model or its pipeline stages do not allow.

    And for factors on the learning rates of others that have no effect.
    """
    patterns = train.freeze
    check_patterns(provider, patterns)
    check_factors(provider, train.lr_mult, patterns)
    plan = plan_of(provider, parallel, train, world_size(), on_gpu=False)
    for stage in range(provider.pipeline_model_parallel_size) if patterns else ():
        if not sum(trainable_params(plan, stage)):
            raise ValueError(
                f"train.freeze={patterns}: leaves pipeline stage {stage} nothing to train; take "
                "fewer stages (parallel.pipeline_model_parallel_size)"
            )
    tied = provider.share_embeddings_and_output_weights
    is_shared = tied or provider.mtp_num_layers
    staged = provider.pipeline_model_parallel_size > 1
    if is_shared and staged and is_frozen("embedding.word_embeddings.weight", patterns):
        kind = "is the output layer too" if tied else "MTP layers share"
        raise ValueError(
            f"train.freeze={patterns}: an embedding that {kind} cannot be frozen with "
            "parallel.pipeline_model_parallel_size > 1, where Megatron sums its gradients"
        )


def aux_loss_warning(
    provider: CoEModelProvider, parallel: ParallelSettings, train: TrainSettings
) -> str | None:
    """Warn of a global auxiliary loss over several micro-batches; None if there is no need to."""
    kinds = provider.moe_router_load_balancing_type
    # A dry run may be of more processes than there are.
    ranks = max(world_size(), smallest_world_size(parallel))
    count = num_microbatches(parallel, train, ranks)
    if "global_aux_loss" in ([kinds] if isinstance(kinds, str) else kinds) and count > 1:
        return (
            f"model.moe_router_load_balancing_type={kinds}: with {count} micro-batches per step "
            "global_aux_loss counts those of a step so far, as Megatron defines it, and not the "
            "global batch; a larger train.micro_batch_size comes nearer to that"
        )
    return None


def check_questions(options: CheckpointSettings) -> None:
    """Raise ValueError if `checkpoint.score_file` cannot be read or does not hold questions."""
    if options.score_file is None:
        return
    from megatron_coe.data.questions import read_questions  # others do without its imports

    try:
        read_questions(Path(options.score_file), options.score_samples)
    except (ValueError, OSError) as error:
        raise ValueError(f"checkpoint.score_file: {error}") from error


def training_sets(data: DataSettings) -> list[str]:
    """Return the prefixes that training reads: those whose weight is not 0."""
    weights = data.train_weights or [1.0] * len(data.train)
    return [prefix for prefix, weight in zip(data.train, weights, strict=True) if weight]


def data_arguments(
    data: DataSettings, train: TrainSettings, tokenizer: Tokenizer, seq_length: int
) -> dict[str, Any]:
    """Return the arguments of `check_datasets` and `build_dataset_sets`."""
    sources: list[Any] = data.train
    if data.train_weights is not None:
        sources = list(zip(data.train, data.train_weights, strict=True))
    return {
        "train": sources,
        "valid": held_out_sets(data),
        "tokenizer": tokenizer,
        "seq_length": seq_length,
        "mode": data.mode,
        "num_samples": (batch_schedule(train).samples_after(train.steps), train.eval_samples),
        "seed": train.seed,
        "pad_seq_to_mult": data.pad_seq_to_mult,
        "split": data.split,
    }


def check_folders(save: str | None, log: str, dry: bool) -> None:
    """Check that the folders of a run can be written.

    Args:
        save: that of the checkpoints; None if the run writes none.
        log: that of its records.
        dry: folders that are made are removed.

    Raises: ValueError, OSError naming the setting or the file.
    """
    if save:
        _check_folder("checkpoint.save", save, dry)
    _check_folder("log.dir", log, dry)
    metrics = Path(log, METRICS_FILE)
    if metrics.exists() and not metrics.is_file():
        raise ValueError(f"{metrics} is no file: the run writes its metrics there; move it away")


def _check_folder(key: str, folder: str, dry: bool) -> None:
    """Make a folder and a file in it, and remove the file; after a dry run the folder, too."""
    probe = Path(folder, f".writable-{os.getpid()}")
    made = [parent for parent in probe.parents if not parent.exists()]
    try:
        probe.parent.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
        for parent in made if dry else ():
            parent.rmdir()
    except OSError as error:
        reason = error.strerror or error
        raise OSError(
            f"{key}={folder}: cannot be written ({reason}): name another folder"
        ) from error
