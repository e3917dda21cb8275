"""Checks of settings before Megatron is imported or a process group made."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import asdict, fields, is_dataclass

from megatron_coe.config.run_config import (
    CheckpointSettings,
    DataSettings,
    LogSettings,
    ParallelSettings,
    Settings,
    TrainSettings,
    held_out_sets,
)
from megatron_coe.config.schedules import lr_spans
from megatron_coe.model import parallelism as layouts
from megatron_coe.model.parallelism import Layout, layout_of
from megatron_coe.utils.value_rules import ValueRule

_LARGEST = 10**12
"""Larger numbers are typing errors that a run would only reveal after a long time."""


def world_size() -> int:
    """Return the number of processes that torchrun has started; 1 without it."""
    text = os.environ.get("WORLD_SIZE", "1")
    if not text.isdecimal() or not 1 <= int(text) <= _LARGEST:
        raise ValueError(f"WORLD_SIZE={text}: must be the number of processes; torchrun sets it")
    return int(text)


def check_values(settings: Settings) -> None:
    """Raise ValueError for a value that no layout could run with."""
    for key, number in _numbers("", asdict(settings)):
        _check_number(key, number)
    for key, value, rule in _ruled_values(settings):
        rule.check(key, value)
    _check_rampup(settings.train)
    _check_lr_schedule(settings.train)
    _check_data(settings.data)
    _check_exports(settings.checkpoint)
    _check_profile(settings.log)


def check_files_named(settings: Settings, held_out: bool = False) -> None:
    """Raise ValueError if tokenizer or data is not named.

    Args:
        held_out: whether held-out data is required.
    """
    data = settings.data
    if not data.tokenizer:
        raise ValueError(
            "data.tokenizer is not set: give a SentencePiece .model file or a tokenizer folder"
        )
    if not data.train:
        raise ValueError("data.train is empty: name at least one data set")
    sets = held_out_sets(data)
    for key, prefixes in (("train", [data.train]), ("valid", list(sets.values()))):
        if not all(of and all(of) for of in prefixes):
            raise ValueError(f"data.{key}={getattr(data, key)}: holds an empty name")
    if held_out and not sets and data.split is None:
        raise ValueError("data.valid is empty: name the held-out data to validate on")


def check_layout(settings: Settings, world_size: int) -> None:
    """Raise ValueError for a layout that the model, the processes or the batch do not allow.

    What the model leaves to its defaults is checked with them.
    """
    parallel = settings.parallel
    layout = layout_of(parallel)
    layouts.check_layout(layout, layouts.extents_of(settings.model, world_size))
    tp = layout.tensor_model_parallel_size
    if tp > 1 and parallel.sequence_parallel is False:
        raise ValueError(
            f"parallel.sequence_parallel=false with tensor_model_parallel_size={tp}: Megatron "
            "trains mixture-of-experts layers only with it; set it to true or leave it out"
        )
    if parallel.overlap_param_gather and not parallel.use_distributed_optimizer:
        raise ValueError(
            "parallel.overlap_param_gather=true needs parallel.use_distributed_optimizer=true"
        )
    if settings.train.optimizer == "muon" and parallel.use_distributed_optimizer:
        raise ValueError(
            "train.optimizer=muon with parallel.use_distributed_optimizer=true: Muon needs whole "
            "matrices, and the distributed optimizer cuts them into ranges; leave one of them out"
        )
    if parallel.overlap_param_gather and settings.train.ema_decay is not None:
        raise ValueError(
            f"train.ema_decay={settings.train.ema_decay} with parallel.overlap_param_gather=true: "
            "weights are gathered only in the next step, after the average has taken them in; "
            "leave one of them out"
        )
    _check_batch(settings.train, layout, world_size)
    if settings.data.mode == "packed_documents":
        _check_packed_documents(settings)
    pp, vpp = layout.pipeline_model_parallel_size, layout.virtual_pipeline_model_parallel_size
    count = num_microbatches(parallel, settings.train, world_size)
    group = settings.model.get("microbatch_group_size_per_vp_stage")
    if type(group) is int and vpp is not None and group % pp:
        raise ValueError(
            f"model.microbatch_group_size_per_vp_stage={group}: must be a multiple of "
            f"parallel.pipeline_model_parallel_size={pp}, or left out"
        )
    if vpp is not None and count % pp:
        raise ValueError(
            f"parallel.virtual_pipeline_model_parallel_size={vpp}: the interleaved schedule needs "
            f"a number of micro-batches ({count}) that is a multiple of "
            f"pipeline_model_parallel_size ({pp}); change train.global_batch_size or "
            "train.micro_batch_size"
        )
    if vpp is not None:
        _check_rampup_divides(settings.train, layout.data_parallel_size(world_size), stages=pp)


def smallest_world_size(parallel: ParallelSettings) -> int:
    """Return the fewest processes that hold the layout."""
    return layout_of(parallel).world_multiple


def num_microbatches(parallel: ParallelSettings, train: TrainSettings, world_size: int) -> int:
    """Return the number of micro-batches that each data-parallel rank runs per step."""
    replicas = layout_of(parallel).data_parallel_size(world_size)
    return train.global_batch_size // (train.micro_batch_size * replicas)


def _check_batch(train: TrainSettings, layout: Layout, world_size: int) -> None:
    replicas = layout.data_parallel_size(world_size)
    if train.global_batch_size % (train.micro_batch_size * replicas):
        raise ValueError(
            f"train.global_batch_size={train.global_batch_size} is not a multiple of "
            f"train.micro_batch_size ({train.micro_batch_size}) x data-parallel size ({replicas})"
        )
    _check_rampup_divides(train, replicas)


def _check_rampup_divides(train: TrainSettings, replicas: int, stages: int = 1) -> None:
    """Raise ValueError for a batch on the way up that does not divide evenly.

    Args:
        stages: pipeline stages, of which the interleaved schedule wants multiples of micro-batches.
    """
    if train.rampup_batch_size is None:
        return
    start, increment, _ = train.rampup_batch_size
    divisor = train.micro_batch_size * replicas * stages
    if start % divisor or increment % divisor:
        of_stages = f" x pipeline_model_parallel_size ({stages})" if stages > 1 else ""
        raise ValueError(
            f"train.rampup_batch_size={train.rampup_batch_size}: start and increment must be "
            f"multiples of train.micro_batch_size ({train.micro_batch_size}) x data-parallel size "
            f"({replicas}){of_stages}, here of {divisor}"
        )


def _check_packed_documents(settings: Settings) -> None:
    """Raise ValueError for what packs with document masks cannot be combined with."""
    data, chunks = settings.data, 2 * settings.parallel.context_parallel_size
    if settings.train.micro_batch_size > 1:
        raise ValueError(
            f"train.micro_batch_size={settings.train.micro_batch_size}: data.mode=packed_documents "
            "makes one sequence of a micro-batch; set it to 1, and model.seq_length longer instead"
        )
    if chunks > 2 and data.pad_seq_to_mult % chunks:
        raise ValueError(
            f"data.pad_seq_to_mult={data.pad_seq_to_mult}: with data.mode=packed_documents and "
            f"context_parallel_size={chunks // 2} each document is cut into {chunks} chunks; set "
            f"it to a multiple of {chunks}"
        )
    length = settings.model.get("seq_length")
    if type(length) is int and length % data.pad_seq_to_mult:
        raise ValueError(
            f"data.pad_seq_to_mult={data.pad_seq_to_mult} does not divide model.seq_length={length}"
        )
    if settings.model.get("mtp_num_layers"):
        raise ValueError(
            f"model.mtp_num_layers={settings.model['mtp_num_layers']}: multi-token prediction "
            "looks beyond the end of a document in data.mode=packed_documents; use data.mode=padded"
        )


def _ruled_values(settings: Settings) -> Iterator[tuple[str, object, ValueRule]]:
    """Yield key, value and rule of each setting whose field has a rule."""
    for section in fields(settings):
        values = getattr(settings, section.name)
        for setting in fields(values) if is_dataclass(values) else ():
            if rule := setting.metadata.get("rule"):
                yield f"{section.name}.{setting.name}", getattr(values, setting.name), rule


def _numbers(key: str, value: object) -> Iterator[tuple[str, int | float]]:
    """Yield every number in nested settings, with its key."""
    if isinstance(value, dict | list):
        for name, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _numbers(f"{key}.{name}" if key else str(name), part)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield key, value


def _check_number(key: str, number: int | float) -> None:
    if isinstance(number, float) and not math.isfinite(number):
        raise ValueError(f"{key}={number}: must be a finite number")
    if isinstance(number, int) and abs(number) > _LARGEST:
        raise ValueError(f"{key}={number}: must be at most {_LARGEST:,}")


def _check_rampup(train: TrainSettings) -> None:
    ramp, most = train.rampup_batch_size, train.global_batch_size
    if ramp is None:
        return
    if len(ramp) != 3 or min(ramp) < 1:
        raise ValueError(
            f"train.rampup_batch_size={ramp}: give [start, increment, samples], each 1 or more"
        )
    start, increment, _ = ramp
    if start >= most or (most - start) % increment:
        raise ValueError(
            f"train.rampup_batch_size={ramp}: must lead from {start} to train.global_batch_size="
            f"{most} in whole increments of {increment}"
        )


def _check_lr_schedule(train: TrainSettings) -> None:
    if train.min_lr > train.lr:
        raise ValueError(f"train.min_lr={train.min_lr} must not exceed train.lr={train.lr}")
    warmup = _given_once(train, "lr_warmup_steps", "lr_warmup_samples")
    decay = _given_once(train, "lr_wsd_decay_steps", "lr_wsd_decay_samples")
    if (decay is None) == (train.lr_decay_style == "WSD"):
        raise ValueError(
            f"train.lr_decay_style={train.lr_decay_style}, {decay or 'without a length'}: set "
            "train.lr_wsd_decay_steps or train.lr_wsd_decay_samples with lr_decay_style=WSD, and "
            "with no other style"
        )
    spans = lr_spans(train)
    if spans.warmup >= spans.total:
        raise ValueError(
            f"{warmup} must be less than train.steps={train.steps}"
            + (f", which are {spans.total:,} sequences" if spans.in_samples else "")
        )
    if spans.warmup + (spans.wsd_decay or 0) > spans.total:
        warmup = warmup or f"train.lr_warmup_fraction={train.lr_warmup_fraction}"
        raise ValueError(
            f"{decay} and {warmup} are together more than train.steps={train.steps}"
            + (f", which are {spans.total:,} sequences" if spans.in_samples else "")
        )


def _given_once(train: TrainSettings, in_steps: str, in_samples: str) -> str | None:
    """Return the one of two settings that is given, as `train.name=value`; None if none is.

    Raises: ValueError: both are.
    """
    given = [
        f"train.{name}={value}"
        for name in (in_steps, in_samples)
        if (value := getattr(train, name)) is not None
    ]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} say the same: give one of them")
    return given[0] if given else None


def _check_data(data: DataSettings) -> None:
    if data.split is not None and data.valid:
        raise ValueError(
            f"data.split={data.split!r} and data.valid={data.valid}: both hold data out; give one"
        )
    weights = data.train_weights
    if weights is None:
        return
    if len(weights) != len(data.train):
        raise ValueError(
            f"data.train_weights has {len(weights)} value(s) for the {len(data.train)} set(s) of "
            "data.train: give one for each"
        )
    if any(not weight >= 0 for weight in weights) or not any(weights):
        raise ValueError(
            f"data.train_weights={weights}: each must be 0 or more, and one of them greater than 0"
        )


def _check_exports(options: CheckpointSettings) -> None:
    exports, saves = options.hf_interval, options.save_interval
    if exports and options.save is None:
        raise ValueError(
            f"checkpoint.hf_interval={exports} exports checkpoints, and checkpoint.save=null "
            "writes none: name a folder"
        )
    if exports and (not saves or exports % saves):
        raise ValueError(
            f"checkpoint.hf_interval={exports}: must be a multiple of checkpoint.save_interval="
            f"{saves}, whose checkpoints are exported"
        )
    if options.score_file is not None and not exports:
        raise ValueError(
            f"checkpoint.score_file={options.score_file} scores exported models: set "
            "checkpoint.hf_interval"
        )


def _check_profile(log: LogSettings) -> None:
    window = log.profile_steps
    if window is not None and not (len(window) == 2 and 1 <= window[0] <= window[1]):
        raise ValueError(f"log.profile_steps={window}: give [first, last] with 1 <= first <= last")
