"""A run wired from its settings: its checks, its trainer, and what a dry run prints."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Sized
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

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
from megatron_coe.config.model_section import build_provider
from megatron_coe.config.run_config import Settings, TrainSettings
from megatron_coe.config.schedules import batch_schedule
from megatron_coe.data.datasets import (
    build_dataset_sets,
    check_datasets,
    samples_per_epoch,
    truncation,
)
from megatron_coe.data.fast_tokenizer import export_warning
from megatron_coe.data.indexed import IndexedFile, documents_begin_with, identify
from megatron_coe.data.tokenizer import Tokenizer, load_tokenizer
from megatron_coe.distributed.process_groups import lone_process, process_groups, rendezvous
from megatron_coe.distributed.seeds import seed_everything, use_deterministic_kernels
from megatron_coe.distributed.train_state import build_train_state
from megatron_coe.fault_tolerance.exceptions import RunEndedError
from megatron_coe.fault_tolerance.heartbeat import DATA, LOADING, MODEL, Heartbeat
from megatron_coe.fault_tolerance.signals import StopRequest
from megatron_coe.fault_tolerance.watchdog import group_timeout, watched
from megatron_coe.model import backends
from megatron_coe.model.backends.select import refuse_unusable
from megatron_coe.model.provider import CoEModelProvider
from megatron_coe.planning.run_summary import describe_sizes, plan_of
from megatron_coe.training.banner import banner, describe_data, summarize_data
from megatron_coe.training.batch_source import BatchSource, explained_worker_deaths
from megatron_coe.training.hf_export import HfExporter
from megatron_coe.training.metrics_logger import MetricsLogger, NullLogger
from megatron_coe.training.out_of_memory import explained, memory_remedies
from megatron_coe.training.preflight import (
    aux_loss_warning,
    check_folders,
    check_frozen,
    check_questions,
    data_arguments,
)
from megatron_coe.training.profiling import StepProfiler
from megatron_coe.training.sinks import check_sinks
from megatron_coe.training.trainer import Trainer, last_step
from megatron_coe.training.validation import HeldOutSet, Validator
from megatron_coe.utils.environment import refuse_unused_gpus, write_machine
from megatron_coe.utils.ranks import is_rank_0
from megatron_coe.utils.run_files import CONFIG_FILE


@dataclass(frozen=True)
class Preflight:
    """What the checks of a run have loaded and found valid."""

    device: torch.device
    tokenizer: Tokenizer
    provider: CoEModelProvider
    data: dict[str, Any]
    """Arguments of `build_dataset_sets`."""
    files: list[IndexedFile]
    """The training sets."""
    warnings: list[str]
    """What a user may not know of and should; empty on ranks other than 0."""


def check_run(settings: Settings, saves: bool = True, dry: bool = False) -> Preflight:
    """Check everything about a run that one process can see.

    Args:
        saves: whether the run writes checkpoints.
        dry: nothing is left behind.

    Raises: ValueError, OSError naming the setting or the file.
    """
    data, parallel, train = settings.data, settings.parallel, settings.train
    warnings = [refuse_unused_gpus()]
    check_sinks(settings.log)
    check_questions(settings.checkpoint)
    device = backends.prepare()
    tokenizer = load_tokenizer(data.tokenizer)
    provider = build_provider(settings, device, tokenizer.vocab_size)
    refuse_unusable(provider)
    check_frozen(provider, parallel, train)
    arguments = data_arguments(data, train, tokenizer, provider.seq_length)
    files, _, _ = check_datasets(**arguments)
    if is_rank_0():
        check_folders(settings.checkpoint.save if saves else None, settings.log.dir, dry)
        warnings += [export_warning(tokenizer), aux_loss_warning(provider, parallel, train)]
        if cut := truncation(files, provider.seq_length):
            warnings.append(f"data.train: {cut}")
    return Preflight(
        device, tokenizer, provider, arguments, files, [text for text in warnings if text]
    )


def describe(settings: Settings, world_size: int) -> str:
    """Describe settings, sizes and data of a run. Raises as `trainer` does; nothing is built."""
    found = check_run(settings, dry=True)
    train, on_gpu = settings.train, found.device.type == "cuda"
    plan = plan_of(found.provider, settings.parallel, train, world_size, on_gpu)
    lines = [settings.to_yaml(), describe_sizes(plan), ""]
    lines += describe_data(settings.data, train, found.tokenizer, found.files)
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
    """Build a trainer at the latest checkpoint, or at step 0; its process groups last as long.

    Args:
        must_resume: there has to be a checkpoint.
        stop: checked after each part of the work; a hang or an error of a rank ends all of them.
        sources: files of the settings, which may lie in checkpoints: those are never deleted.

    Raises:
        ValueError, OSError: settings, data or checkpoint cannot be used.
        StoppedError: `stop` has received a signal, on any rank.
    """
    stop, heartbeat = stop or StopRequest(), Heartbeat()
    found = check_run(settings, saves=not must_resume)
    device, parallel, train = found.device, settings.parallel, settings.train
    if train.deterministic and device.type == "cuda":
        use_deterministic_kernels()
    data = [identify(file) for file in found.files]
    checkpointer = _make_checkpointer(settings, found.tokenizer, data, sources)
    timeout_s, store = train.hang_timeout_s, rendezvous()

    def begin(phase: str, before: str) -> None:
        stop.raise_if_stopped(device, before, settings.checkpoint.save is not None)
        heartbeat.enter(phase)

    with (
        ExitStack() as outlasting,  # what comes after the processes have parted
        watched(store, timeout_s, heartbeat, raised_together=(RunEndedError, CheckpointWriteError)),
        explained(heartbeat, memory_remedies(settings.model, parallel, train)),
        explained_worker_deaths(settings.data.num_workers),
        process_groups(parallel, device, store, group_timeout(timeout_s)),
    ):
        begin(LOADING, "the data were looked at")
        start = select_start(settings.checkpoint, must_resume)
        changes = _prepare_start(start, checkpointer, settings, found.tokenizer, data, must_resume)
        seed_everything(train.seed)
        heartbeat.enter(DATA)
        samples = (_num_samples(train, start), train.eval_samples)
        train_set, valid_sets = build_dataset_sets(
            **found.data | {"num_samples": samples}, cache_dir=settings.data.cache
        )
        begin(MODEL, "the model was built")
        train_state = build_train_state(
            found.provider, parallel, train, device, trains=not must_resume
        )
        begin(LOADING, "the checkpoint was loaded")
        progress = Progress()
        if start:
            progress = load_checkpoint(start.path, train_state, start.weights_only)
        if not must_resume:
            checkpointer.prepare(train_state, saves=progress.step < train.steps)
        validator = None
        if valid_sets:
            held_out = {
                name: HeldOutSet(_make_source(each, train, device), len(cast("Sized", each)))
                for name, each in valid_sets.items()
            }
            validator = Validator(train, train_state, held_out, heartbeat)
        per_epoch = samples_per_epoch(
            found.files,
            settings.data.mode,
            found.provider.seq_length,
            settings.data.pad_seq_to_mult,
            settings.data.split,
        )
        train_source = _make_source(train_set, train, device, per_epoch)
        train_source.num_workers = settings.data.num_workers
        metrics_logger = _open_logger(settings, progress)
        if metrics_logger.is_enabled:
            for text in _describe_begin(settings, found, per_epoch, validator, start, changes):
                metrics_logger.log(text)
        built = Trainer(
            settings=train,
            train_state=train_state,
            source=train_source,
            validator=validator,
            progress=progress,
            metrics_logger=metrics_logger,
            checkpointer=checkpointer,
            profiler=StepProfiler(settings.log, enabled=is_rank_0()),
            heartbeat=heartbeat,
            exporter=None if must_resume else _make_exporter(settings, metrics_logger, progress),
        )
        if built.exporter:
            checkpointer.on_complete = built.exporter.offer
        try:
            yield built
        except BaseException:
            if built.exporter:
                built.exporter.cancel()
            metrics_logger.close(failed=True)
            raise
        finally:
            train_source.close()
        outlasting.callback(metrics_logger.close)
        outlasting.callback(built.record_exports, lambda: stop.received is not None)


def _make_exporter(
    settings: Settings, metrics_logger: NullLogger, progress: Progress
) -> HfExporter | None:
    """Return what exports checkpoints, on rank 0, with what an earlier start owes under way."""
    options = settings.checkpoint
    if not (options.hf_interval and is_rank_0()):
        return None
    run, last = Path(settings.log.dir), settings.train.steps
    exporter = HfExporter(options, run, last, metrics_logger.log)
    exporter.resume(progress.step, metrics_logger.has)
    return exporter


def _make_checkpointer(
    settings: Settings, tokenizer: Tokenizer, data: list[dict[str, Any]], sources: Sequence[Path]
) -> Checkpointer:
    content = {}
    if is_rank_0():
        begins = documents_begin_with(settings.data.train, tokenizer.bos)
        content = tokenizer_content(tokenizer.path) | documents_content(begins)
    load = [Path(settings.checkpoint.load)] if settings.checkpoint.load else []
    return Checkpointer(
        settings.checkpoint,
        settings.to_yaml(),
        identity_of(tokenizer),
        data,
        content,
        [*sources, tokenizer.path, *load],
    )


def _prepare_start(
    start: Start | None,
    checkpointer: Checkpointer,
    settings: Settings,
    tokenizer: Tokenizer,
    data: list[dict[str, Any]],
    must_resume: bool,
) -> list[str]:
    """Prepare to start from a checkpoint; return the changes since then that are allowed."""
    if start is None:
        return []
    model_only = must_resume or start.weights_only
    changes = check_changes(start.path, settings, tokenizer, data, model_only)
    checkpointer.keep_hf_files_of(start.path)
    if not start.weights_only:
        checkpointer.resume_from(start.path)
    return changes


def _describe_begin(
    settings: Settings,
    found: Preflight,
    per_epoch: float,
    validator: Validator | None,
    start: Start | None,
    changes: Sequence[str],
) -> Iterator[str]:
    """Yield what a run logs before its first step."""
    device, ranks, train = found.device, dist.get_world_size(), settings.train
    machine = write_machine(Path(settings.log.dir), device, ranks)
    plan = plan_of(found.provider, settings.parallel, train, ranks, device.type == "cuda")
    held_out = validator.samples if validator else {}
    reads = summarize_data(settings.data, train, found.files, per_epoch, held_out)
    begins = f"{settings.log.dir}, {start or 'from step 0'}, to step {last_step(train):,}"
    yield banner(settings.parallel, train, plan, machine, reads, begins)
    yield from (f"warning: {warning}" for warning in found.warnings)
    if start and start.skipped:
        yield f"checkpoint.load={start.skipped} is not read again"
    yield from (f"changed since then: {change}" for change in changes)


def _num_samples(train: TrainSettings, start: Start | None) -> int:
    """Return the training sequences that the run reads in all, those of earlier batch sizes too."""
    batches = batch_schedule(train)
    planned = batches.samples_after(train.steps)
    if start is None or start.weights_only:
        return planned
    progress = read_common(start.path)["progress"]
    left = train.steps - progress["step"]
    return max(planned, batches.samples_after(left, progress.get("samples", 0)))


def _make_source(
    dataset: Dataset,
    train: TrainSettings,
    device: torch.device,
    samples_per_epoch: float | None = None,
) -> BatchSource:
    return BatchSource(
        dataset,
        micro_batch_size=train.micro_batch_size,
        rank=parallel_state.get_data_parallel_rank(),
        replicas=parallel_state.get_data_parallel_world_size(),
        device=device,
        samples_per_epoch=samples_per_epoch,
    )


def _open_logger(settings: Settings, progress: Progress) -> NullLogger:
    """Open the metrics logger, on rank 0, and write the settings into the run's folder."""
    last = last_step(settings.train)
    if not is_rank_0():
        return NullLogger(settings.log, last)
    config: Any = OmegaConf.to_container(OmegaConf.structured(settings))
    metrics_logger = MetricsLogger(
        settings.log,
        settings.train.steps,
        progress.step,
        config,
        last_step=last,
        samples_after=batch_schedule(settings.train).samples_after,
    )
    (metrics_logger.directory / CONFIG_FILE).write_text(settings.to_yaml(), encoding="utf-8")
    return metrics_logger
