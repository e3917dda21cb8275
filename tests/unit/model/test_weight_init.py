"""Initial weights: distributed as Megatron draws them, no two alike, decided by seed and place."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.utils import init_method_normal, scaled_init_method_normal

from megatron_coe.config.run_config import ParallelSettings
from megatron_coe.distributed.seeds import seed_everything
from megatron_coe.distributed.train_state import build_model
from megatron_coe.model.provider import CoEModelProvider
from megatron_coe.model.weight_init import BLOCK_ROWS, initialize_weights
from tests.builders import tiny_provider

LATENT = {"q_lora_rank": 16, "mtp_num_layers": 1, "coe_iterations": 2}
PLAIN = {
    "multi_latent_attention": False,
    "num_query_groups": 2,
    "add_qkv_bias": True,
    "moe_layer_freq": [0, 1],
    "moe_shared_expert_gate": True,
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "coe_iterations": 2,
    "coe_residual": "outer",
    "coe_upcycled": True,
    "coe_independent_gate": False,
}
METHODS = {
    "init_method_std": 0.03,
    "embedding_init_method_std": 0.5,
    "output_layer_init_method": scaled_init_method_normal(0.03, num_layers=2),
}


def build(provider: CoEModelProvider, seed: int = 1) -> torch.nn.Module:
    """A model as training begins with it."""
    cpu = torch.device("cpu")
    seed_everything(seed)
    (chunk,) = build_model(provider, ParallelSettings(), cpu, seed)
    return chunk.module


def parameters(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in module.named_parameters()}


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """Kolmogorov and Smirnov's, in units that do not depend on the sizes of the samples."""
    one, other = (sample.flatten().sort().values for sample in (one, other))
    points = torch.cat([one, other])
    shares = [torch.searchsorted(s, points, right=True) / len(s) for s in (one, other)]
    size = len(one) * len(other) / (len(one) + len(other))
    return (shares[0] - shares[1]).abs().max().item() * size**0.5


@pytest.mark.parametrize("model", [LATENT, PLAIN], ids=["latent attention", "plain attention"])
def test_distributions_are_those_of_megatrons_modules(single_rank, model) -> None:
    """Chance alone makes a distance above 2.2 once in 8,000 pairs of samples, a spread that is off
    by 5 standard errors once in a million."""
    changes = {**model, **METHODS, "hidden_size": 64, "moe_ffn_hidden_size": 48}
    theirs = parameters(tiny_provider(**changes).provide())
    ours = parameters(build(tiny_provider(**changes)))
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        if theirs[name].std() == 0:  # norms, biases, gates
            assert torch.equal(weight, theirs[name]), name
        else:
            error = weight.numel() ** -0.5
            assert abs(weight.std() / theirs[name].std() - 1) < 5 * error, name
            assert distance(weight, theirs[name]) < 2.2, name
            assert not torch.equal(weight, theirs[name])


def test_a_model_is_initialized_that_was_told_not_to_be(single_rank) -> None:
    """Megatron 0.16 would leave tensor-parallel weights unmarked, of which the gradients' norm then
    counts one rank's shard, and biases as the memory was."""
    told = tiny_provider(**PLAIN, perform_initialization=False)
    weights = build(told).state_dict(keep_vars=True)
    for name, weight in build(tiny_provider(**PLAIN)).named_parameters():
        assert torch.equal(weights[name], weight), name
        marks = [getattr(w, "tensor_model_parallel", None) for w in (weights[name], weight)]
        assert marks[0] == marks[1], name
    assert not told.perform_initialization


def test_no_two_blocks_of_rows_are_alike(single_rank) -> None:
    """Of whatever layer, iteration, expert or parameter."""
    seen = {}
    for name, weight in parameters(build(tiny_provider(**LATENT, ffn_hidden_size=200))).items():
        if weight.ndim < 2:
            continue
        scaled = weight / weight.std()
        for index, matrix in enumerate(scaled.flatten(0, -3) if weight.ndim > 2 else scaled[None]):
            for row in range(0, len(matrix), BLOCK_ROWS // 2):
                start = tuple(matrix[row, :8].mul(1e3).round().tolist())
                assert start not in seen, (name, index, row, seen.get(start))
                seen[start] = (name, index, row)
    assert len(seen) > 50


def test_nothing_but_the_seed_decides(single_rank) -> None:
    first = parameters(build(tiny_provider(), seed=7))
    torch.manual_seed(99)
    (chunk,) = build_model(tiny_provider(), ParallelSettings(), torch.device("cpu"), 7)
    again = parameters(chunk.module)
    other = parameters(build(tiny_provider(), seed=8))
    for name, weight in first.items():
        assert torch.equal(weight, again[name]), name
        assert torch.equal(weight, other[name]) == (weight.std() == 0), name


def test_a_narrower_model_starts_from_the_rounded_weights(single_rank) -> None:
    wide = parameters(build(tiny_provider()))
    narrow = parameters(build(tiny_provider(bf16=True, params_dtype=torch.bfloat16)).module)
    for name, weight in wide.items():
        assert torch.equal(narrow[name], weight.bfloat16()), name


def test_how_a_file_says_that_all_layers_are_alike_does_not_matter(single_rank) -> None:
    """Megatron then has one tensor for all layers in a checkpoint, or one for each."""
    one, each = (parameters(build(tiny_provider(moe_layer_freq=f))) for f in (1, [1, 1]))
    assert all(torch.equal(weight, each[name]) for name, weight in one.items())


def test_a_rank_draws_its_own_rows_only() -> None:
    """Of a table that no machine could hold; in two parts as in one."""
    rows = 4096
    shape = (2**40 * rows, 8)

    def part(number: int, count: int) -> torch.Tensor:
        data = torch.empty(rows * count, shape[1])
        offset = (0, number, shape[0] // len(data))
        key = "embedding.word_embeddings.weight"
        piece = ShardedTensor.from_rank_offsets(key, data, offset)
        config = SimpleNamespace(embedding_init_method=init_method_normal(1.0))
        initialize_weights(
            SimpleNamespace(config=config, sharded_state_dict=lambda metadata: {"": piece}), seed=1
        )
        return data

    halves = torch.cat([part(2**40 - 2, 1), part(2**40 - 1, 1)])
    assert torch.equal(part(2**39 - 1, 2), halves)
    assert len(halves.unique()) > 0.99 * halves.numel()


@pytest.mark.parametrize(
    "method", [torch.nn.init.xavier_uniform_, partial(torch.nn.init.normal_, mean=1.0, std=0.1)]
)
def test_another_distribution_is_refused_by_name(single_rank, method) -> None:
    with pytest.raises(ValueError, match="output_layer_init_method"):
        build(tiny_provider(output_layer_init_method=method))
