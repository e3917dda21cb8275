"""The Transformer Engine backend on a GPU: the torch backend's numbers, FP8, one another's
checkpoints."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from megatron_coe.checkpoint.directory import find_checkpoints
from megatron_coe.checkpoint.state import load_checkpoint
from megatron_coe.config.run_config import LogSettings
from megatron_coe.megatron_compat.transformer_engine import have_te, import_error
from megatron_coe.training.metrics_logger import NullLogger
from megatron_coe.training.trainer import Trainer
from tests.unit.training.runs import make_settings, make_trainer


def reason() -> str | None:
    """Why nothing here can run, if so."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    return None if have_te() else f"Transformer Engine is absent ({import_error()})"


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(reason() is not None, reason=str(reason()))]

BF16 = 3e-2
"""Relative difference of norms: bf16 keeps 8 bits, and a layer adds a few of its roundings."""

SIZES = {
    # FP8 kernels want multiples of 16 in every dimension of a product, tokens included.
    **{"hidden_size": 64, "num_attention_heads": 4, "ffn_hidden_size": 128, "seq_length": 64},
    **{"moe_ffn_hidden_size": 64, "moe_shared_expert_intermediate_size": 64, "vocab_size": 96},
    # Heads of a size that every attention kernel of Transformer Engine takes.
    **{"kv_lora_rank": 64, "qk_head_dim": 64, "qk_pos_emb_head_dim": 64, "v_head_dim": 128},
    # Experts are chosen from scores, where a rounding may change a choice: all are chosen.
    **{"num_moe_experts": 8, "moe_router_topk": 8},
}


class Sequences:
    """Random sequences of `SIZES`, each a function of its number, without padding."""

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        length = SIZES["seq_length"]
        generator = torch.Generator().manual_seed(number)
        ids = torch.randint(SIZES["vocab_size"], (length + 1,), generator=generator)
        mask, positions = torch.ones(length), torch.arange(length)
        return {
            "tokens": ids[:-1],
            "labels": ids[1:],
            "loss_mask": mask,
            "position_ids": positions,
        }


def trainer_of(device: torch.device, backend: str, folder: Path | None = None, **model) -> Trainer:
    settings = make_settings(
        folder,
        model={**SIZES, "backend": backend, **model},
        train={"precision": "bf16", "micro_batch_size": 4, "lr": 1e-3},
    )
    return make_trainer(settings, device, Sequences())


def saved(device: torch.device, backend: str, folder: Path, steps: int = 1, **model) -> Path:
    """The checkpoint of a backend's model after some steps."""
    trainer = trainer_of(device, backend, folder, **model)
    for _ in range(steps):
        trainer.step()
    trainer.save()
    trainer.checkpointer.finish()
    return find_checkpoints(folder)[0]


def resumed(device: torch.device, backend: str, checkpoint: Path, **model) -> Trainer:
    trainer = trainer_of(device, backend, **model)
    trainer.progress = load_checkpoint(checkpoint, trainer.train_state)
    return trainer


KINDS = {
    "latent attention": {},
    "low-rank queries": {"q_lora_rank": 32},
    "plain attention": {"multi_latent_attention": False},
    "a dense layer": {"moe_layer_freq": [0, 1]},
    "shared router": {"coe_independent_gate": False},
    "outer": {"coe_residual": "outer"},
}


def test_auto_takes_transformer_engine_where_it_is_needed(single_rank) -> None:
    from megatron_coe.model.backends.select import AUTO_PARTS, TE_PARTS, te_parts_of
    from tests.builders import tiny_provider

    assert te_parts_of(tiny_provider(backend="auto")) == AUTO_PARTS
    fp8 = tiny_provider(backend="auto", fp8="hybrid", fp8_recipe="delayed")
    assert te_parts_of(fp8) == TE_PARTS


@pytest.mark.parametrize("part", ["linear", "attention", "experts", "attention,experts"])
def test_a_part_by_itself_agrees_with_none(single_rank, tmp_path, part: str) -> None:
    """The losses of three steps from the same weights, in the same checkpoint."""
    checkpoint = saved(single_rank, "torch", tmp_path)
    losses = []
    for backend in ("torch", f"te:{part}"):
        trainer = resumed(single_rank, backend, checkpoint)
        losses.append([trainer.step().loss for _ in range(3)])
    assert losses[1] == pytest.approx(losses[0], rel=BF16 / 10)


@pytest.mark.parametrize("kind", KINDS)
def test_the_backends_start_from_the_same_weights(single_rank, tmp_path, kind: str) -> None:
    torch_, te = (
        tensors(saved(single_rank, backend, tmp_path / backend, steps=0, **KINDS[kind]))
        for backend in ("torch", "te")
    )
    assert torch_.keys() == te.keys() and len(te) > 20
    for key, tensor in torch_.items():
        assert torch.equal(tensor, te[key]), key


@pytest.mark.parametrize("kind", KINDS)
def test_the_backends_agree(single_rank, tmp_path, kind: str) -> None:
    """From the same weights: loss, the gradient norm of every group of weights, and the next
    losses after updates of the same optimizer."""
    checkpoint = saved(single_rank, "torch", tmp_path, **KINDS[kind])
    steps = {}
    for backend in ("torch", "te"):
        trainer = resumed(single_rank, backend, checkpoint, **KINDS[kind])
        trainer.metrics_logger = NullLogger(LogSettings(interval=1), 100)  # each step's norms
        steps[backend] = [trainer.step() for _ in range(3)]
    for ours, want in zip(steps["te"], steps["torch"], strict=True):
        assert ours.loss == pytest.approx(want.loss, rel=BF16 / 10)
        assert ours.grad_norm == pytest.approx(want.grad_norm, rel=BF16)
        assert ours.grad_norms.keys() == want.grad_norms.keys() and want.grad_norms
        for group, norm in want.grad_norms.items():
            assert ours.grad_norms[group] == pytest.approx(norm, rel=2 * BF16), group


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise"])
def test_fp8_trains(single_rank, tmp_path, recipe: str) -> None:
    """The losses stay with bf16's from the same weights, and fall on sequences seen before."""
    checkpoint = saved(single_rank, "te", tmp_path)
    fp8 = {"fp8": "hybrid", "fp8_recipe": recipe}
    losses = {}
    for name, model in (("bf16", {}), ("fp8", fp8)):
        trainer = resumed(single_rank, "te", checkpoint, **model)
        losses[name] = []
        for _ in range(12):
            trainer.progress.samples = 0  # the same four sequences in every step
            losses[name].append(trainer.step().loss)
    assert losses["fp8"] == pytest.approx(losses["bf16"], rel=0.05)
    assert losses["fp8"] != losses["bf16"], "no product was made in FP8"
    assert losses["fp8"][-1] < losses["fp8"][0] - 0.3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("first", "second"), [("torch", "te"), ("te", "torch")])
def test_checkpoints_pass_between_backends(
    single_rank, tmp_path, kind: str, first: str, second: str
) -> None:
    """Weights, moments and the step come through whole: saved again they are the same bits."""
    one = saved(single_rank, first, tmp_path / "one", steps=2, **KINDS[kind])
    trainer = resumed(single_rank, second, one, **KINDS[kind])
    assert trainer.progress.step == 2
    trainer.checkpointer.options.save = str(tmp_path / "two")
    trainer.save()
    trainer.checkpointer.finish()
    two = find_checkpoints(tmp_path / "two")[0]
    before, after = tensors(one), tensors(two)
    assert before.keys() == after.keys() and len(before) > 20
    for key, tensor in before.items():
        assert torch.equal(tensor, after[key]), key


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, read by torch alone."""
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    reader = FileSystemReader(os.fspath(checkpoint))
    stored = reader.read_metadata().state_dict_metadata
    state = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in stored.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    _load_state_dict(state, reader, no_dist=True)
    return state
