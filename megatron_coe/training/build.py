"""From settings to a trainer at its next step, and to what a dry run prints."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from omegaconf import OmegaConf
from torch.utils.data import Dataset

from megatron_coe.checkpoint.assets import documents_content, tokenizer_content
from megatron_coe.checkpoint.checkpointer import Checkpointer
from megatron_coe.checkpoint.errors import CheckpointWriteError
from megatron_coe.checkpoint.resume import Start, check_changes, select_start
from megatron_coe.checkpoint.safe_unpickle import read_common
from megatron_coe.checkpoint.state import Progress, load_checkpoint
from megatron_coe.checkpoint.tokenizer import identity_of
from megatron_coe.config.run_config import Settings
from megatron_coe.data.datasets import build_datasets
from megatron_coe.data.indexed import IndexedFile, data_summary, documents_begin_with, identify
from megatron_coe.data.tokenizer import Tokenizer
from megatron_coe.distributed.process_groups import lone_process, process_groups, rendezvous
from megatron_coe.distributed.seeds import seed_everything, use_deterministic_kernels
from megatron_coe.distributed.train_state import build_train_state
from megatron_coe.fault_tolerance.exceptions import RunEndedError
from megatron_coe.fault_tolerance.heartbeat import DATA, LOADING, MODEL, Heartbeat
from megatron_coe.fault_tolerance.signals import StopRequest
from megatron_coe.fault_tolerance.watchdog import group_timeout, watched
from megatron_coe.planning.run_summary import describe_sizes, plan_of
from megatron_coe.training.banner import banner
from megatron_coe.training.batch_source import BatchSource
from megatron_coe.training.metrics_logger import MetricsLogger
from megatron_coe.training.out_of_memory import explained
from megatron_coe.training.preflight import (
    check_run,
    data_arguments,
    training_sets,
)
from megatron_coe.training.trainer import Trainer, Validation
from megatron_coe.utils.environment import write_machine
from megatron_coe.utils.ranks import is_rank_0
from megatron_coe.utils.run_files import CONFIG_FILE


def describe(settings: Settings, world_size: int) -> str:
    """Settings, sizes and data of a run. Raises as `trainer` does, without building anything."""
    found = check_run(settings, dry=True)
    plan = plan_of(settings, found.provider, world_size, found.device.type == "cuda")
    lines = [settings.to_yaml(), describe_sizes(plan), ""]
    lines += _describe_data(settings, found.tokenizer)
    with lone_process():
        if start := select_start(settings.checkpoint, repair=False):
            data = [identify(file) for file in found.files]
            changed = check_changes(start.path, settings, found.tokenizer, data, start.weights_only)
            lines += [str(start), *(f"changed since then: {change}" for change in changed)]
    lines += [f"warning: {warning}" for warning in found.warnings]
    return "\n".join(lines)


@contextmanager
def trainer(
    settings: Settings,
    must_resume: bool = False,
    stop: StopRequest | None = None,
    sources: Sequence[Path] = (),
) -> Iterator[Trainer]:
    """A trainer at the newest checkpoint, or at step 0; its process groups last as long as it.

    Args:
        must_resume: there has to be a checkpoint.
        stop: heeded after each part of the work; a hang or an error of a rank ends all of them.
        sources: files of the settings, which may lie in checkpoints: those are never deleted.

    Raises:
        ValueError, OSError: settings, data or checkpoint cannot be used.
        StoppedError: `stop` has received a signal, on any rank.
    """
    stop, heartbeat = stop or StopRequest(), Heartbeat()
    found = check_run(settings, saves=not must_resume)
    device, tokenizer, provider = found.device, found.tokenizer, found.provider
    if settings.train.deterministic and device.type == "cuda":
        use_deterministic_kernels()
    data = [identify(file) for file in found.files]
    checkpointer = Checkpointer(
        settings.checkpoint,
        settings.to_yaml(),
        identity_of(tokenizer),
        data,
        _carried(settings, tokenizer) if is_rank_0() else None,
        [*sources, tokenizer.path, *map(Path, filter(None, [settings.checkpoint.load]))],
    )
    timeout_s = settings.train.hang_timeout_s
    store, saves = rendezvous(), settings.checkpoint.save is not None
    with (
        watched(store, timeout_s, heartbeat, raised_together=(RunEndedError, CheckpointWriteError)),
        explained(settings, heartbeat),
        process_groups(settings.parallel, device, store, group_timeout(timeout_s)),
    ):
        stop.raise_if_stopped(device, "the data were looked at", saves)
        heartbeat.enter(LOADING)
        start = select_start(settings.checkpoint, must_resume)
        changed = []
        if start:
            model_only = must_resume or start.weights_only
            changed = check_changes(start.path, settings, tokenizer, data, model_only)
            checkpointer.keep_hf_files_of(start.path)
            if not start.weights_only:
                checkpointer.resume_from(start.path)
        seed_everything(settings.train.seed)
        heartbeat.enter(DATA)
        arguments = data_arguments(settings, tokenizer, provider.seq_length)
        arguments["num_samples"] = (_num_samples(settings, start), settings.train.eval_samples)
        train_set, valid_set = build_datasets(**arguments, cache_dir=settings.data.cache)
        stop.raise_if_stopped(device, "the model was built", saves)
        heartbeat.enter(MODEL)
        train_state = build_train_state(
            provider, settings.parallel, settings.train, device, trains=not must_resume
        )
        stop.raise_if_stopped(device, "the checkpoint was loaded", saves)
        heartbeat.enter(LOADING)
        progress = Progress()
        if start:
            progress = load_checkpoint(start.path, train_state, start.weights_only)
        if not must_resume:
            if progress.step < settings.train.steps:
                checkpointer.check(train_state)
            else:
                checkpointer.remove_leftovers()
        per_epoch = _samples_per_epoch(found.files, settings.data.mode, provider.seq_length)
        train = _source(train_set, settings, device, per_epoch)
        validation = None
        if valid_set is not None:
            validation = Validation(_source(valid_set, settings, device), len(valid_set))
        metrics_logger = None
        if is_rank_0():
            metrics_logger, machine = _open_reports(settings, progress, device)
            plan = plan_of(settings, provider, dist.get_world_size(), device.type == "cuda")
            reads = _summarize_data(settings, found.files, per_epoch, validation)
            metrics_logger.log(banner(settings, plan, machine, reads, _start_of(settings, start)))
            for warning in found.warnings:
                metrics_logger.log(f"warning: {warning}")
            if start and start.skipped:
                metrics_logger.log(f"checkpoint.load={start.skipped} is not read again")
            for change in changed:
                metrics_logger.log(f"changed since then: {change}")
        try:
            yield Trainer(
                settings,
                train_state,
                train,
                validation,
                progress,
                metrics_logger,
                heartbeat,
                checkpointer,
            )
        finally:
            if metrics_logger:
                metrics_logger.close()


def _carried(settings: Settings, tokenizer: Tokenizer) -> dict[str, bytes]:
    """What each checkpoint holds besides its state."""
    begins = documents_begin_with(settings.data.train, tokenizer.bos)
    return tokenizer_content(tokenizer.path) | documents_content(begins)


def _describe_data(settings: Settings, tokenizer: Tokenizer) -> Iterator[str]:
    data = settings.data
    yield f"tokenizer {data.tokenizer}: {tokenizer.vocab_size:,} ids"
    yield f"training data\n{data_summary(training_sets(data))}"
    if data.valid:
        yield f"validation data\n{data_summary(data.valid)}"
    sequences = settings.train.steps * settings.train.global_batch_size
    yield f"{sequences:,} sequences in {settings.train.steps:,} steps, mode {data.mode}"


def _summarize_data(
    settings: Settings,
    files: Sequence[IndexedFile],
    per_epoch: float,
    validation: Validation | None,
) -> str:
    train = settings.train
    documents, tokens = sum(f.documents for f in files), sum(f.tokens for f in files)
    epochs = train.steps * train.global_batch_size / per_epoch
    held_out = f"{validation.samples:,} sequences held out" if validation else "no held-out set"
    return (
        f"{len(files)} set(s), {documents:,} documents, {tokens:,} tokens, {settings.data.mode}; "
        f"{epochs:.2f} epochs in {train.steps:,} steps; {held_out}"
    )


def _start_of(settings: Settings, start: Start | None) -> str:
    train = settings.train
    last = min(train.steps, train.stop_step or train.steps)
    return f"{settings.log.dir}, {start or 'from step 0'}, to step {last:,}"


def _num_samples(settings: Settings, start: Start | None) -> int:
    """Training sequences that the run reads in all, steps before it had other batches included."""
    train = settings.train
    planned = train.steps * train.global_batch_size
    if start is None or start.weights_only:
        return planned
    progress = read_common(start.path)["progress"]
    left = (train.steps - progress["step"]) * train.global_batch_size
    return max(planned, progress.get("samples", 0) + left)


def _samples_per_epoch(files: Sequence[IndexedFile], mode: str, seq_length: int) -> float:
    """Sequences that one pass over all the training data holds."""
    if mode == "packed":
        return sum(file.tokens for file in files) / seq_length
    return sum(file.documents for file in files)


def _source(
    dataset: Dataset,
    settings: Settings,
    device: torch.device,
    samples_per_epoch: float | None = None,
) -> BatchSource:
    return BatchSource(
        dataset,
        micro_batch_size=settings.train.micro_batch_size,
        rank=parallel_state.get_data_parallel_rank(),
        replicas=parallel_state.get_data_parallel_world_size(),
        device=device,
        samples_per_epoch=samples_per_epoch,
    )


def _open_reports(
    settings: Settings, progress: Progress, device: torch.device
) -> tuple[MetricsLogger, dict[str, object]]:
    """Where figures go, and what the run's machine is."""
    config = OmegaConf.to_container(OmegaConf.structured(settings))
    metrics_logger = MetricsLogger(settings.log, settings.train.steps, progress.step, config)
    (metrics_logger.directory / CONFIG_FILE).write_text(settings.to_yaml(), encoding="utf-8")
    return metrics_logger, write_machine(metrics_logger.directory, device, dist.get_world_size())
