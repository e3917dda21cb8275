"""Runs that are stopped and resumed three times in a row, and what is not the same at their end."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from megatron_coe.checkpoint.directory import find_checkpoints
from megatron_coe.checkpoint.errors import CheckpointWriteError
from megatron_coe.checkpoint.resume import latest_valid_checkpoint
from megatron_coe.checkpoint.state import load_checkpoint
from megatron_coe.checkpoint.verify import verify_checkpoint
from megatron_coe.config.run_config import Settings
from megatron_coe.distributed.seeds import rng_state
from megatron_coe.training.trainer import Trainer
from tests.distributed import parity
from tests.distributed.layouts import BATCH
from tests.unit.checkpoint.test_checkpointer import largest_file
from tests.unit.checkpoint.test_state import DROPOUT, optimizer_state
from tests.unit.training.runs import make_trainer, weights

STOPS, STEPS = (1, 2, 3), 4


def settings_of(layout: str, folder: str, asynchronous: bool) -> Settings:
    """Dropout draws from every generator; a rising and falling learning rate shows its place.

    Batches of 8, 8, 16 and 16 sequences; the rate falls during the last two.
    """
    assert BATCH == 16
    layout, _, optimizer = layout.partition(" ")
    settings = parity.layout_settings(
        layout,
        steps=STEPS,
        lr=1e-2,
        rampup_batch_size=[8, 8, 16],
        lr_decay_style="WSD",
        lr_wsd_decay_steps=2,
        lr_mult={"*.router.*": 0.5},
        optimizer=optimizer or "adam",
    )
    settings.train.lr_mult = {"*.router.*": 0.5}
    settings.model |= DROPOUT
    settings.checkpoint.save, settings.checkpoint.async_save = folder, asynchronous
    return settings


def go(trainer: Trainer, until: int) -> list[float]:
    losses = []
    while trainer.progress.step < until:
        trainer.checkpointer.poll()
        losses.append(trainer.step().loss)
    return losses


def end_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    """All that a rank carries on from step to step."""
    rng = rng_state()
    generators = {"torch": rng["torch"], "cuda": rng["cuda"], **rng["tracker"]}
    return {
        **{f"weight {name}": tensor for name, tensor in weights(trainer).items()},
        **{f"moment {name}": tensor for name, tensor in optimizer_state(trainer).items()},
        **{f"generator {name}": state.clone() for name, state in generators.items()},
    }


def differences(root: str, layouts: list[str], asynchronous: bool) -> dict[str, list[str]]:
    """Runs on each rank: {layout: what differs between the unbroken run and the resumed one}."""
    return {layout: _difference(root, layout, asynchronous) for layout in layouts}


def _difference(root: str, layout: str, asynchronous: bool) -> list[str]:
    settings = settings_of(layout, f"{root}/{layout}", asynchronous)
    with parity.setup_groups(settings):
        unbroken = _trainer(settings)
        losses, end = go(unbroken, STEPS), end_of(unbroken)
        del unbroken
        resumed = []
        for stop in (*STOPS, STEPS):
            trainer = _trainer(settings)
            settings.train.seed += 1  # the next process starts with other weights and generators
            if stop != STOPS[0]:
                path = latest_valid_checkpoint(settings.checkpoint)
                trainer.progress = load_checkpoint(path, trainer.train_state)
            resumed += go(trainer, stop)
            trainer.save()
            if stop < STEPS:  # what a run does after its last save must not get into it
                trainer.step()
            trainer.checkpointer.finish()
        own = end_of(trainer)
    assert own.keys() == end.keys()
    assert any(name.startswith("moment") for name in own)
    unequal = [name for name, tensor in end.items() if not torch.equal(tensor, own[name])]
    return unequal + ([] if losses == resumed else [f"losses {losses} {resumed}"])


def _trainer(settings: Settings) -> Trainer:
    return make_trainer(settings, torch.device("cpu"), parity.Sequences())


def agreements(root: str) -> list[object]:
    """Runs on each rank."""
    return [
        _fail_on_one_rank(f"{root}/at_once", False),
        _fail_on_one_rank(f"{root}/in_the_background", True),
        _choose_together(f"{root}/damaged"),
    ]


def _fail_on_one_rank(root: str, asynchronous: bool) -> list[str]:
    """The disk of the last one is full in the second save, not in the third.

    Returns: the error's text, and the names of the checkpoints after each save.
    """
    settings = settings_of("EP2", root, asynchronous)
    with parity.setup_groups(settings):
        trainer = _trainer(settings)
        told, names = "", []
        for number in range(3):
            trainer.step()
            is_full = number == 1 and dist.get_rank() == dist.get_world_size() - 1
            try:
                with largest_file(1000 if is_full else -1):
                    trainer.save()
                    trainer.checkpointer.finish()
            except CheckpointWriteError as error:
                told = str(error)
            dist.barrier()
            found = find_checkpoints(Path(root))
            names.append(" ".join(path.name for path in found))
            for path in found:
                verify_checkpoint(path)
            assert not list(Path(root).glob(".*"))
        return [told, *names]


def _choose_together(root: str) -> bool:
    """A bit is flipped in each file of the newest in turn: whether all ranks take the one before,
    and the newest again when all is well."""
    settings = settings_of("EP2", root, False)
    with parity.setup_groups(settings):
        trainer = _trainer(settings)
        for _ in range(2):
            trainer.step()
            trainer.save()
        chosen = []
        newest, older = find_checkpoints(Path(root))
        for file in sorted(newest.iterdir()):
            dist.barrier()
            content = file.read_bytes()
            dist.barrier()
            if dist.get_rank() == 0:
                file.write_bytes(bytes([content[0] ^ 1]) + content[1:])
            dist.barrier()
            chosen.append(latest_valid_checkpoint(settings.checkpoint) == older)
            dist.barrier()
            if dist.get_rank() == 0:
                file.write_bytes(content)
        dist.barrier()
        assert len(chosen) == 6 + 2 * dist.get_world_size()
        return all(chosen) and latest_valid_checkpoint(settings.checkpoint) == newest
