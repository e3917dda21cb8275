"""Muon: each matrix of its own, against singular values in fp64 and against torch's Muon."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_coe.checkpoint.resume_policy import Policy, policy_of
from megatron_coe.checkpoint.state import load_checkpoint
from megatron_coe.config.run_config import Settings
from megatron_coe.config.validation import check_layout
from megatron_coe.distributed.muon import Muon, newton_schulz
from tests.unit.training.runs import make_settings, make_trainer, weights

LR, DECAY, BETA, STEPS = 0.02, 0.1, 0.9, 5
H = 32
MODELS = {
    "latent attention": {"q_lora_rank": 12, "moe_layer_freq": [0, 1]},
    "plain attention, MTP": {
        "multi_latent_attention": False,
        "num_query_groups": 2,
        "add_qkv_bias": True,
        "mtp_num_layers": 1,
    },
    "an expert's module each": {"moe_grouped_gemm": False, "num_layers": 1},
}
OF_ADAM = ("embedding", "output_layer", ".router.", "norm", "bias", "coe_weights")


def trainer_of(device, folder=None, model=None, **train):
    train = {"lr": LR, "weight_decay": DECAY, "lr_warmup_fraction": 0.0, "clip_grad": 0.0, **train}
    return make_trainer(make_settings(folder, model=model or {}, train=train), device)


def muon(device, folder=None, model=None, **train):
    train = {"optimizer": "muon", "muon_momentum": BETA, **train}
    return trainer_of(device, folder, model, **train)


# --- the iteration ------------------------------------------------------------------------------


def by_singular_values(matrix: Tensor, steps: int = STEPS) -> Tensor:
    """In fp64, without products of matrices: the polynomial acts on each singular value alone."""
    U, s, Vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / s.square().sum().sqrt().clamp(min=1e-7)
    for _ in range(steps):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return U @ torch.diag(s) @ Vh


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (16, 16)])
@pytest.mark.parametrize("steps", [1, 5])
def test_the_iteration_is_a_polynomial_of_singular_values(shape, steps) -> None:
    generator = torch.Generator().manual_seed(sum(shape))
    matrices = torch.randn(3, *shape, generator=generator) * torch.tensor([1.0, 1e-4, 0.0]).view(
        3, 1, 1
    )
    found = newton_schulz(matrices, steps)
    assert not found[2].any()
    for number in (0, 1):
        expected = by_singular_values(matrices[number], steps)
        torch.testing.assert_close(found[number].double(), expected, rtol=0, atol=2e-5)
    if steps == 5:  # which brings them near 1
        assert ((torch.linalg.svdvals(found[0]) - 1).abs() < 0.4).all()


# --- whole steps --------------------------------------------------------------------------------


def matrices_of(name: str, update: Tensor, groups: int, heads: int = 4) -> list[Tensor]:
    """The matrices in a parameter, told apart by hand, as views."""
    if ".experts." in name and update.dim() == 3:
        return [
            m for expert in update for m in matrices_of(name.replace(".experts", ""), expert, 0)
        ]
    if "linear_fc1" in name:
        return list(update.chunk(2))
    if "linear_qkv" in name:
        grouped = update.view(groups, heads // groups + 2, -1, update.shape[-1])
        return [grouped[:, :-2], grouped[:, -2], grouped[:, -1]]
    return [update]


def reference(name: str, update: Tensor, groups: int) -> Tensor:
    result = update.double().clone()
    for part in matrices_of(name, result, groups):
        flat = part.reshape(-1, part.shape[-1])
        part.copy_((by_singular_values(flat) * 0.2 * max(flat.shape) ** 0.5).view(part.shape))
    return result


@pytest.mark.parametrize("name", MODELS)
def test_steps_are_those_of_fp64(single_rank, monkeypatch, name) -> None:
    """From the gradients that the optimizer is given; the other weights move as AdamW's do."""
    trainer, adam = (make(single_rank, model=MODELS[name]) for make in (muon, trainer_of))
    chunk = trainer.train_state.chunks[0]
    matrices = {n: p for n, p in chunk.named_parameters() if not any(part in n for part in OF_ADAM)}
    parts = [part.optimizer for part in trainer.train_state.optimizer.chained_optimizers]
    assert {p for part in parts if isinstance(part, Muon) for p in part.matrices} == {
        *matrices.values()
    }
    seen: list[dict[str, Tensor]] = []
    prepare = trainer.train_state.optimizer.prepare_grads

    def note() -> bool:
        seen.append({n: p.main_grad.double().clone() for n, p in matrices.items()})
        return prepare()

    monkeypatch.setattr(trainer.train_state.optimizer, "prepare_grads", note)
    expected = {n: p.detach().double().clone() for n, p in matrices.items()}
    momenta = {n: torch.zeros_like(w) for n, w in expected.items()}
    for step in range(3):
        before = weights(trainer)
        trainer.step()
        after = weights(trainer)
        for n, gradient in seen[step].items():
            momenta[n] = BETA * momenta[n] + (1 - BETA) * gradient
            update = (1 - BETA) * gradient + BETA * momenta[n]
            expected[n] = (1 - LR * DECAY) * expected[n]
            expected[n] -= LR * reference(n, update, MODELS[name].get("num_query_groups", 0))
            assert (after[n] - before[n]).abs().max() > 1e-4
            torch.testing.assert_close(after[n].double(), expected[n], rtol=0, atol=2e-5, msg=n)
        if step == 0:  # so far both had the same gradients
            adam.step()
            for n, tensor in weights(adam).items():
                assert torch.equal(tensor, after[n]) is (n not in matrices), n


def test_a_matrix_is_updated_as_by_torchs_muon(single_rank) -> None:
    """Torch's iteration is in bf16."""
    generator = torch.Generator().manual_seed(3)
    start, *gradients = (torch.randn(24, 40, generator=generator) for _ in range(4))
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    how = {"lr": LR, "weight_decay": DECAY, "momentum": BETA}
    own = Muon([{"params": [ours]}], **how, steps=STEPS, scale=0.2)

    class Whole:
        def orthogonalized(self, update: Tensor, steps: int) -> Tensor:
            return newton_schulz(update, steps) * max(update.shape) ** 0.5

    own.matrices[ours] = Whole()
    own.complete_state()
    other = torch.optim.Muon([theirs], **how, adjust_lr_fn="match_rms_adamw")
    for gradient in gradients:
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        own.step(), other.step()
    moved, expected = ours.detach() - start, theirs.detach() - start
    assert (moved - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_resumed_run_ends_in_the_same_bits(single_rank, tmp_path, precision) -> None:
    how = {"precision": precision, "freeze": ["*.layers.0.*"], "lr_mult": {"*.linear_proj.*": 0.5}}
    model = {"num_layers": 2, "moe_layer_freq": [1, 1]}
    run = muon(single_rank, tmp_path, model, **how)
    run.step()
    run.save()
    run.step()
    again = muon(single_rank, tmp_path, model, seed=7, **how)
    again.progress = load_checkpoint(tmp_path / "step_00000001", again.train_state)
    again.step()
    expected, found = weights(run), weights(again)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    states = [
        list(part.optimizer.state.values())
        for trainer in (run, again)
        for part in trainer.train_state.optimizer.chained_optimizers
        if isinstance(part.optimizer, Muon)
    ]
    own, others = states[: len(states) // 2], states[len(states) // 2 :]
    for one, other in zip(own, others, strict=True):
        assert len(one) == len(other) > 0
        for a, b in zip(one, other, strict=True):
            assert torch.equal(a["momentum_buffer"], b["momentum_buffer"])


def test_a_checkpoint_before_the_first_step_resumes(single_rank, tmp_path) -> None:
    run = muon(single_rank, tmp_path)
    run.save()
    run.step()
    again = muon(single_rank, tmp_path, seed=7)
    again.progress = load_checkpoint(tmp_path / "step_00000000", again.train_state)
    again.step()
    expected, found = weights(run), weights(again)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_factors_on_the_learning_rate_scale_the_update(single_rank) -> None:
    plain = muon(single_rank, weight_decay=0.0)
    scaled = muon(single_rank, weight_decay=0.0, lr_mult={"*.linear_proj.*": 0.25})
    before = weights(plain)
    plain.step(), scaled.step()
    for name, tensor in weights(scaled).items():
        factor = 0.25 if ".linear_proj." in name else 1.0
        expected = factor * (weights(plain)[name] - before[name])
        torch.testing.assert_close(tensor - before[name], expected, rtol=1e-4, atol=1e-7)


def test_another_optimizer_is_refused_on_resume() -> None:
    assert policy_of("train.optimizer") is Policy.REFUSED


def test_the_distributed_optimizer_is_refused() -> None:
    settings = Settings(model={"num_moe_experts": 8})
    settings.train.optimizer, settings.parallel.use_distributed_optimizer = "muon", True
    with pytest.raises(ValueError, match=r"train.optimizer=muon with parallel.use_distributed_opt"):
        check_layout(settings, world_size=2)
