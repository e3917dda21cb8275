"""From settings to a trainer at its next step, and to what a dry run prints."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from omegaconf import OmegaConf
from torch.utils.data import Dataset

from megatron_coe import backends
from megatron_coe.checkpoints.errors import CheckpointWriteError
from megatron_coe.checkpoints.folder import CONFIG_FILE
from megatron_coe.data.datasets import build_datasets, check_datasets
from megatron_coe.data.indexed import IndexedFile, data_summary, identify
from megatron_coe.data.tokenizer import Tokenizer, load_tokenizer
from megatron_coe.machine import write_machine
from megatron_coe.training import setup
from megatron_coe.training.activity import DATA, LOADING, MODEL, Activity
from megatron_coe.training.batches import BatchSource
from megatron_coe.training.checkpoint import Progress, load_checkpoint
from megatron_coe.training.endings import RunEndedError
from megatron_coe.training.estimate import describe_sizes, plan_of
from megatron_coe.training.loop import Trainer, Validation
from megatron_coe.training.metrics import Reporter
from megatron_coe.training.model import build_provider
from megatron_coe.training.preflight import check_files, data_arguments, training_sets
from megatron_coe.training.resume import check_changes, choose_checkpoint
from megatron_coe.training.resume_policy import identity_of
from megatron_coe.training.saving import Saver
from megatron_coe.training.settings import Settings
from megatron_coe.training.signals import StopRequest
from megatron_coe.training.watchdog import group_timeout, watched


def describe(settings: Settings, world_size: int) -> str:
    """Settings, sizes and data of a run. Raises as `trainer` does, without building anything."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = load_tokenizer(settings.data.tokenizer)
    provider = build_provider(settings, device, tokenizer.vocab_size)
    check_datasets(**data_arguments(settings, tokenizer, provider.seq_length))
    sizes = describe_sizes(plan_of(settings, provider, world_size, device.type == "cuda"))
    return "\n".join([settings.to_yaml(), sizes, "", *_describe_data(settings, tokenizer)])


@contextmanager
def trainer(
    settings: Settings, must_resume: bool = False, stop: StopRequest | None = None
) -> Iterator[Trainer]:
    """A trainer at the newest checkpoint, or at step 0; its process groups last as long as it.

    Args:
        must_resume: there has to be a checkpoint.
        stop: heeded after each part of the work; a hang or an error of a rank ends all of them.

    Raises:
        ValueError, OSError: settings, data or checkpoint cannot be used.
        StoppedError: `stop` has received a signal, on any rank.
    """
    stop, activity = stop or StopRequest(), Activity()
    device = backends.prepare()
    if settings.train.deterministic and device.type == "cuda":
        setup.use_deterministic_kernels()
    tokenizer = load_tokenizer(settings.data.tokenizer)
    provider = build_provider(settings, device, tokenizer.vocab_size)
    backends.refuse_unusable(provider)
    files = check_files(settings, tokenizer, provider.seq_length, saves=not must_resume)
    data = [identify(file) for file in files]
    saver = Saver(settings.checkpoint, settings.to_yaml(), identity_of(tokenizer), data)
    timeout_s = settings.train.hang_timeout_s
    store, saves = setup.rendezvous(), settings.checkpoint.save is not None
    with (
        watched(store, timeout_s, activity, agreed=(RunEndedError, CheckpointWriteError)),
        setup.process_groups(settings.parallel, device, store, group_timeout(timeout_s)),
    ):
        stop.heed(device, "the data were looked at", saves)
        activity.enter(LOADING)
        checkpoint = choose_checkpoint(settings.checkpoint, must_resume)
        changed = []
        if checkpoint:
            changed = check_changes(checkpoint, settings, tokenizer, data, model_only=must_resume)
            saver.resume_from(checkpoint)
        setup.seed_everything(settings.train.seed)
        activity.enter(DATA)
        train_set, valid_set = _build_data(settings, tokenizer, provider.seq_length)
        stop.heed(device, "the model was built", saves)
        activity.enter(MODEL)
        trainee = setup.build_trainee(provider, settings, device, trains=not must_resume)
        stop.heed(device, "the checkpoint was loaded", saves)
        activity.enter(LOADING)
        progress = load_checkpoint(checkpoint, trainee) if checkpoint else Progress()
        if not must_resume:
            if progress.step < settings.train.steps:
                saver.check(trainee)
            else:
                saver.tidy()
        per_epoch = _samples_per_epoch(files, settings.data.mode, provider.seq_length)
        train = _source(train_set, settings, device, per_epoch)
        validation = None
        if valid_set is not None:
            validation = Validation(_source(valid_set, settings, device), len(valid_set))
        reporter = _open_reports(settings, progress, device) if dist.get_rank() == 0 else None
        if reporter and checkpoint:
            reporter.say(f"resumed from {checkpoint}")
            for change in changed:
                reporter.say(f"changed since then: {change}")
        try:
            yield Trainer(settings, trainee, train, validation, progress, reporter, activity, saver)
        finally:
            if reporter:
                reporter.close()


def _describe_data(settings: Settings, tokenizer: Tokenizer) -> Iterator[str]:
    data = settings.data
    yield f"tokenizer {data.tokenizer}: {tokenizer.vocab_size:,} ids"
    yield f"training data\n{data_summary(training_sets(data))}"
    if data.valid:
        yield f"validation data\n{data_summary(data.valid)}"
    sequences = settings.train.steps * settings.train.global_batch_size
    yield f"{sequences:,} sequences in {settings.train.steps:,} steps, mode {data.mode}"


def _build_data(
    settings: Settings, tokenizer: Tokenizer, seq_length: int
) -> tuple[Dataset, Dataset | None]:
    arguments = data_arguments(settings, tokenizer, seq_length)
    return build_datasets(**arguments, cache_dir=settings.data.cache)


def _samples_per_epoch(files: Sequence[IndexedFile], mode: str, seq_length: int) -> float:
    """Sequences that one pass over all the training data holds."""
    if mode == "examples":
        return sum(file.documents for file in files)
    return sum(file.tokens for file in files) / seq_length


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


def _open_reports(settings: Settings, progress: Progress, device: torch.device) -> Reporter:
    config = OmegaConf.to_container(OmegaConf.structured(settings))
    reporter = Reporter(settings.log, settings.train.steps, progress.step, config)
    (reporter.directory / CONFIG_FILE).write_text(settings.to_yaml(), encoding="utf-8")
    write_machine(reporter.directory, device, dist.get_world_size())
    return reporter
