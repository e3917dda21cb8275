"""The experts' Triton kernels: in Triton's interpreter against the definition in fp64, gradients
included, and compiled for an H100 at the paper's sizes.

Tolerances, relative to the largest entry: fp32 1e-5, fp16 3e-3. (The interpreter multiplies no
bf16; `tests/gpu` has it.)
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="PyTorch's CPU build brings no triton")

from benchmarks.expert_products import CANDIDATES, Call
from benchmarks.expert_products import launch as launch_product
from megatron_coe.model.moe.dispatcher import Order
from megatron_coe.model.moe.expert_activation import SwiGLU
from megatron_coe.model.moe.grouped_linear import BACKENDS, grouping
from megatron_coe.model.moe.grouped_mlp import SharedWeights, expert_mlp
from tests.sm90 import MOST_REGISTERS, MOST_SHARED, Launch, compiled_launches

TOLERANCES = {"torch.float32": 1e-5, "torch.float16": 3e-3}
ROOT = Path(__file__).resolve().parents[4]

T, E, H, WIDTH = 32_768, 63, 1024, 704
"""The paper's sizes; 704 is no multiple of 128."""


def test_the_definition_in_the_interpreter() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "tests.unit.model.kernels.interpreted"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert len(found) == 9
    layer = found.pop("layer")
    assert len(layer) == 6 and max(layer.values()) < TOLERANCES["torch.float32"], layer
    for case, errors in found.items():
        dtype = case.split(", ")[1]
        assert set(errors) == {*("y", "dx", "dprobs", "dw1", "dw2"), *MAIN_GRADS}
        for name, error in errors.items():
            assert error < TOLERANCES[dtype], (case, name)


MAIN_GRADS = ("main_grad of w1", "main_grad of w2")


def at_paper_size(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


class Pass(NamedTuple):
    """A call forward and backward, as autograd runs it, on tensors without values."""

    choices: int
    launches: list[Launch]
    saved: int
    """Bytes kept for the backward pass, the weights' not among them."""


@pytest.fixture(scope="module", params=[4, 8], ids=["K=4", "K=8"])
def one_pass(request: pytest.FixtureRequest) -> Pass:
    K, meta = request.param, at_paper_size
    index = {"dtype": torch.int32}
    order = Order(*(meta(*shape, **index) for shape in ((T * K,), (T * K,), (T, K), (E,))))
    x, probs = meta(T, H).requires_grad_(), meta(T, K, dtype=torch.float32).requires_grad_()
    weights = [torch.nn.Parameter(meta(*s)) for s in ((E, 2 * WIDTH, H), (E, H, WIDTH))]
    for weight in weights:
        weight.main_grad = meta(*weight.shape, dtype=torch.float32)
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    backend = BACKENDS["triton"]
    with (
        compiled_launches() as launches,
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        shared = SharedWeights(*weights, backend)
        y = expert_mlp(x, probs, shared, grouping(backend, x, order.counts, order), SwiGLU())
        assert y.shape == (T * K, H)
        y.backward(meta(T * K, H))
    assert x.grad is not None and x.grad.shape == x.shape and probs.grad.shape == probs.shape
    of_weights = sum(weight.untyped_storage().nbytes() for weight in weights)
    return Pass(K, launches, sum(kept.values()) - of_weights)


@pytest.fixture
def launches(one_pass: Pass) -> list[Launch]:
    return one_pass.launches


def test_rows_are_saved_only_behind_the_first_product(one_pass: Pass) -> None:
    """Tokens, probabilities and fc1's output: no row of the input, nor its activation. (That no
    value was asked for, a host sync on a GPU, the tensors without values have shown.)"""
    rows = T * one_pass.choices
    assert one_pass.saved == 2 * T * H + 4 * rows + 2 * rows * 2 * WIDTH


def test_a_call_is_six_launches(launches: list[Launch]) -> None:
    forward, backward = ["_fc1_swiglu", "_product"], ["_dfc2_dswiglu", "_product"]
    assert [launch.name for launch in launches] == [*forward, *backward, *["_add_outer"] * 2]


def test_an_h100_can_run_them_without_spilling(launches: list[Launch]) -> None:
    for launch in launches:
        assert launch.shared <= MOST_SHARED, launch.name
        assert launch.registers * launch.num_warps * 32 <= MOST_REGISTERS, launch.name
        assert launch.spilled == 0, launch.name


def test_products_are_on_tensor_cores_and_loads_asynchronous(launches: list[Launch]) -> None:
    for launch in launches:
        assert "wgmma.mma_async" in launch.instructions, launch.name
        assert "cp.async.cg" in launch.instructions, launch.name  # 16 bytes at a time
        assert not re.search(r"\b(atom|red)\.", launch.instructions), launch.name


@pytest.mark.parametrize("product", CANDIDATES)
def test_every_candidate_of_the_benchmark_fits(product: str) -> None:
    """None is timed that spills, and so would be judged by its spilling."""
    K, meta = 4, at_paper_size
    index = {"dtype": torch.int32}
    order = Order(*(meta(T * K, **index) for _ in range(3)), meta(E))
    weights = meta(E, 2 * WIDTH, H), meta(E, H, WIDTH)
    main_grads = tuple(meta(*w.shape, dtype=torch.float32) for w in weights)
    probs = meta(T, K, dtype=torch.float32)
    call = Call(meta(T, H), probs, meta(T * K, H), *weights, main_grads, order)
    with compiled_launches() as launches:
        for tile in CANDIDATES[product]:
            launch_product(call, product, tile)
    for tile, launched in zip(CANDIDATES[product], launches, strict=True):
        assert launched.shared <= MOST_SHARED and launched.spilled == 0, tile
