"""Selective recomputation needs no compiler, and its gradients are autograd's."""

from __future__ import annotations

import pytest
import torch
from megatron.core.tensor_parallel import random
from megatron.core.tensor_parallel.random import CheckpointWithoutOutput

from megatron_coe.megatron_compat import recompute
from megatron_coe.megatron_compat.versions import PARTS_ARE_PARTIALS
from tests.builders import tiny_config


def chained(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """Two recomputed activations, one after the other, seen through a view."""
    for _ in range(2):
        checkpoint = CheckpointWithoutOutput(fp8=None)
        hidden = checkpoint.checkpoint(torch.tanh, x)
        x = hidden.view(-1, w.shape[0]) @ w
        checkpoint.discard_output_and_register_recompute(x)
    return x


def test_gradients_are_those_without_recomputation(single_rank) -> None:
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(6, 4, generator=generator, dtype=torch.float64) for _ in range(2)]
    w = torch.randn(4, 4, generator=generator, dtype=torch.float64)
    results = []
    for function in (chained, lambda x, w: torch.tanh(torch.tanh(x) @ w) @ w):
        leaves = [values[0].clone().requires_grad_(), w.clone().requires_grad_()]
        function(*leaves).backward(values[1])
        results.append([leaf.grad for leaf in leaves])
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-14)


@pytest.mark.skipif(not PARTS_ARE_PARTIALS, reason="0.16.1 compiles nothing here")
def test_a_node_without_a_compiler_copies_and_says_so(device, monkeypatch) -> None:
    def build():
        raise RuntimeError("Ninja is required to load C++ extensions\nmore")

    monkeypatch.setattr(random, "_get_share_storage", build)
    recompute.install()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    config = tiny_config(recompute_granularity="selective", recompute_modules=["moe_act"])
    with pytest.warns(RuntimeWarning, match=r"Ninja is required.*copied instead"):
        recompute.prepare_recompute(config)
    assert random._get_share_storage() is recompute.copy_storage


@pytest.mark.skipif(not PARTS_ARE_PARTIALS, reason="0.16.1 compiles nothing here")
def test_nothing_is_compiled_without_a_gpu(device, monkeypatch) -> None:
    from torch.utils import cpp_extension

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a C++ extension is built")

    monkeypatch.setattr(cpp_extension, "_jit_compile", refuse)
    random._get_share_storage.cache_clear()
    recompute.prepare_recompute(tiny_config(recompute_granularity="selective"))
    assert random._get_share_storage() is recompute.copy_storage
