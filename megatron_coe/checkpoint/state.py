"""The state of a run as one sharded state dict, and back.

    model, optimizer, average sharded tensors
    rng                       an object per rank
    schedule, progress, layout, tokenizer, data     values that all ranks share

Any other layout of the same model can load it, with or without the distributed optimizer, but
without the RNG states, which belong to ranks. `megatron_coe.checkpoint.checkpointer` writes it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedObject, is_main_replica
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.utils import unwrap_model
from torch.distributed.checkpoint.api import CheckpointException

from megatron_coe.checkpoint.collective import check_on_all_ranks
from megatron_coe.checkpoint.errors import BadCheckpointError
from megatron_coe.checkpoint.optimizer_state import OptimizerState
from megatron_coe.checkpoint.safe_unpickle import check_pickles, read_index
from megatron_coe.checkpoint.versions import unreadable_error
from megatron_coe.distributed.seeds import rng_state, set_rng_state
from megatron_coe.distributed.train_state import TrainState
from megatron_coe.distributed.weight_average import PREFIX as AVERAGE
from megatron_coe.megatron_compat.checkpoints import load_sharded_state


@dataclass
class Progress:
    """How far a run has trained."""

    step: int = 0
    """Steps done: updates of the weights, and steps skipped because they were not finite."""
    samples: int = 0
    """Training sequences consumed: the position in the data."""
    skipped: int = 0
    """Steps without an update."""
    skipped_in_row: int = 0
    """Steps skipped since the latest update."""

    @property
    def updates(self) -> int:
        """Return the updates of the weights, as Adam's bias correction counts them."""
        return self.step - self.skipped


MODEL_ONLY = {
    "progress": {"step": 0, "samples": 0},
    "layout": None,
}
"""What a checkpoint of an imported or upcycled model holds beside its weights."""


def run_state(
    train_state: TrainState,
    progress: Progress,
    tokenizer: dict[str, Any] | None = None,
    data: list[dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Return the sharded state of a run, with its live tensors. A collective of all ranks.

    Args:
        train_state: what is trained.
        progress: how far.
        tokenizer: what identifies the tokenizer of the run's data.
        data: what identifies each of its training sets.
    """
    assert train_state.optimizer is not None and train_state.schedule is not None
    with _gathered_parameters(train_state):
        state = _model_state(train_state)
        averages = {}
        if train_state.average is not None:
            averages["average"] = train_state.average.sharded_state(state)
        state["optimizer"] = OptimizerState(train_state.optimizer, state).tensors
    return (
        state
        | averages
        | {
            "schedule": train_state.schedule.state_dict(),
            "progress": asdict(progress),
            "layout": _layout(),
            "tokenizer": tokenizer,
            "data": data,
            "rng": _sharded_rng(rng_state()),
        }
    )


def state_size(train_state: TrainState) -> int:
    """Estimate the bytes of a checkpoint that this rank writes, before the first step.

    A weight that is trained has two fp32 moments, an fp32 master if it is narrower, and maybe an
    average.
    """
    total = 0
    for value in nested_values(_model_state(train_state)):
        if not isinstance(value, ShardedBase) or not is_main_replica(value.replica_id):
            continue
        if isinstance(value.data, torch.Tensor):
            width = value.data.itemsize
            if value.data.requires_grad:
                width += 8 + (4 if width < 4 else 0) + (4 if train_state.average else 0)
            total += value.data.numel() * width
    return total


def load_checkpoint(path: Path, train_state: TrainState, weights_only: bool = False) -> Progress:
    """Load a checkpoint into a new `TrainState`. A collective of all ranks.

    What training changes is restored; hyperparameters stay those of the present settings. A
    `TrainState` without an optimizer gets the weights alone.

    Args:
        path: of the checkpoint.
        train_state: changed in place.
        weights_only: leave optimizer, schedule, RNG states and progress as those of a new run.

    Returns: how far the checkpoint has trained; with `weights_only` that of a new run.

    Raises: ValueError: the checkpoint is of another model, or holds what could execute code.
    """
    try:
        contents = check_on_all_ranks(
            partial(check_pickles, path, dist.get_rank(), dist.get_world_size())
        )
    except BadCheckpointError as error:
        raise BadCheckpointError(f"checkpoint {path}: {error}") from error
    common = contents.common
    try:
        progress = Progress(**common["progress"])
    except TypeError as error:
        reason = unreadable_error(path, BadCheckpointError(f"it is of another version: {error}"))
        raise BadCheckpointError(f"checkpoint {path}: {reason}") from error
    if weights_only:
        progress = Progress()
    state = _model_state(train_state)
    absent = _take_absent_extra_states(path, state)
    optimizer_state = None
    average = train_state.average
    holds_average = average is not None and not weights_only and _holds_average(path)
    if average is not None and holds_average:
        averages = average.sharded_state(state)
    # Before the first step the optimizer has no state.
    if train_state.optimizer is not None and progress.step > 0:
        optimizer_state = OptimizerState(train_state.optimizer, state, is_loading=True)
        state["optimizer"] = optimizer_state.tensors
    if holds_average:
        state["average"] = averages
    same_layout = common["layout"] == _layout() and not weights_only
    if same_layout:
        state["rng"] = _sharded_rng(None)
    try:
        loaded = load_sharded_state(state, path, contents.index, common)
    except (CheckpointingException, CheckpointException) as error:
        cause = str(error).strip().split("\n")[-1]
        raise ValueError(f"checkpoint {path} does not fit this model: {cause}") from error
    for key, chunk in _chunks(train_state):
        chunk.load_state_dict({**loaded[key], **dict.fromkeys(absent[key])})
    if optimizer_state is not None:
        optimizer_state.restore(loaded["optimizer"], progress.updates)
    elif train_state.optimizer is not None:
        train_state.optimizer.reload_model_params()
    if average is not None and holds_average:
        average.load(loaded["average"])
    elif average is not None:
        average.reset()
    if train_state.schedule is not None:
        train_state.schedule.move_to(progress.step, progress.samples)
    if same_layout:
        set_rng_state(loaded["rng"])
    return progress


def _holds_average(path: Path) -> bool:
    """Return whether a run with `train.ema_decay` has saved a checkpoint."""
    return any(name.startswith(AVERAGE) for name in read_index(path).state_dict_metadata)


def _take_absent_extra_states(path: Path, state: dict[str, Any]) -> dict[str, list[str]]:
    """Remove from each chunk's state the extra states that a checkpoint lacks; return their names.

    Transformer Engine's norms have one, always empty; the torch backend's have none.
    """
    stored = read_index(path).state_dict_metadata
    absent = {
        key: [
            name
            for name, value in chunk.items()
            if "_extra_state" in name
            and isinstance(value, ShardedObject)
            and value.unique_key not in stored
        ]
        for key, chunk in state.items()
    }
    for key, names in absent.items():
        for name in names:
            del state[key][name]
    return absent


def _chunks(train_state: TrainState) -> list[tuple[str, GPTModel]]:
    """Return the unwrapped model chunks by Megatron's names: `model`, or `model0`, `model1`, …"""
    modules = unwrap_model(train_state.chunks)
    if len(modules) == 1:
        return [("model", modules[0])]
    return [(f"model{index}", module) for index, module in enumerate(modules)]


def _model_state(train_state: TrainState) -> dict[str, Any]:
    return {
        key: chunk.sharded_state_dict(metadata=_metadata()) for key, chunk in _chunks(train_state)
    }


def _metadata() -> dict[str, Any]:
    """Return how Megatron shards the model's state."""
    return {
        "singleton_local_shards": False,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }


@contextmanager
def _gathered_parameters(train_state: TrainState) -> Iterator[None]:
    """Gather weights that would otherwise be stale until the next forward pass gathers them."""
    overlapped = [chunk for chunk in train_state.chunks if chunk.ddp_config.overlap_param_gather]
    for chunk in overlapped:
        chunk.disable_forward_pre_hook(param_sync=True)
    yield
    for chunk in overlapped:
        chunk.enable_forward_pre_hook()


def _layout() -> dict[str, int]:
    """Return the parallel sizes, which give a rank number its meaning."""
    return {
        "world": dist.get_world_size(),
        "tp": parallel_state.get_tensor_model_parallel_world_size(),
        "pp": parallel_state.get_pipeline_model_parallel_world_size(),
        "cp": parallel_state.get_context_parallel_world_size(),
        "ep": parallel_state.get_expert_model_parallel_world_size(),
        "etp": parallel_state.get_expert_tensor_parallel_world_size(),
    }


def _sharded_rng(state: dict[str, Any] | None) -> ShardedObject:
    return ShardedObject("rng", state, (dist.get_world_size(),), (dist.get_rank(),), replica_id=0)
