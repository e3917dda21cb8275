"""Documents side by side in a sequence, against each by itself, in fp64."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from megatron_coe.config.model_section import build_provider
from megatron_coe.distributed.seeds import seed_everything
from megatron_coe.model.documents import packed_seq_params, positions_of_rank
from tests.unit.training.runs import make_settings

KINDS = {
    "latent attention": {"multi_latent_attention": True, "q_lora_rank": 16},
    "plain attention": {"multi_latent_attention": False, "num_query_groups": 2},
    "recomputed": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
}
LENGTHS = [5, 1, 9, 2, 7]
S, VOCAB = sum(LENGTHS), 96


def build(kind: str, device: torch.device) -> torch.nn.Module:
    model = {"seq_length": S, "vocab_size": VOCAB, "backend": "torch", "init_method_std": 0.2}
    settings = make_settings(model=model | {"moe_aux_loss_coeff": 0.0} | KINDS[kind])
    seed_everything(3)
    provider = build_provider(settings, device)
    provider.params_dtype = provider.autocast_dtype = torch.float64
    provider.moe_router_dtype = "fp64"
    return provider.provide().to(device).train()


def gradients(model: torch.nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()  # what recomputation asks for
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def loss_of(model: torch.nn.Module, ids: torch.Tensor, labels: torch.Tensor, packed=None):
    """The summed cross-entropy of [1, S] ids, with plain torch: Megatron's own is in fp32."""
    logits = model(ids, torch.arange(ids.shape[1])[None], None, packed_seq_params=packed)
    return F.cross_entropy(logits.transpose(1, 2), labels, reduction="sum")


@pytest.mark.parametrize("kind", KINDS)
def test_packed_documents_are_each_by_itself(single_rank, kind: str) -> None:
    model = build(kind, single_rank)
    generator = torch.Generator().manual_seed(1)
    ids, labels = torch.randint(VOCAB, (2, 1, S), generator=generator)
    offsets = torch.tensor([0, *LENGTHS]).cumsum(0).tolist()
    parts = list(itertools.pairwise(offsets))
    alone = sum(loss_of(model, ids[:, a:b], labels[:, a:b]) for a, b in parts)
    expected = gradients(model, alone)
    packed = loss_of(model, ids, labels, packed_seq_params(offsets, single_rank))
    torch.testing.assert_close(packed, alone, rtol=1e-12, atol=0)
    for name, gradient in gradients(model, packed).items():
        scale = expected[name].abs().max()
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=1e-11 * float(scale))
    joined = loss_of(model, ids, labels)
    assert abs(joined - alone) > 1e-3  # without the masks it is something else


def test_ranks_hold_two_chunks_of_each_document() -> None:
    held = [positions_of_rank([0, 8, 12], rank, 2).tolist() for rank in (0, 1)]
    assert held == [[0, 1, 6, 7, 8, 11], [2, 3, 4, 5, 9, 10]]
    with pytest.raises(ValueError, match=r"a document of 6 positions .* data.pad_seq_to_mult"):
        positions_of_rank([0, 8, 14], 0, 2)
