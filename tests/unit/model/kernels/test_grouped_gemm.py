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
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="PyTorch's CPU build brings no triton")

from benchmarks.expert_products import CANDIDATES, Call
from benchmarks.expert_products import launch as launch_product
from megatron_coe.model.moe.dispatcher import Order
from megatron_coe.model.moe.fused_mlp import fused_backward, fused_forward
from megatron_coe.model.moe.grouped_linear import BACKENDS, Grouping
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
    assert len(found) == 8
    for case, errors in found.items():
        dtype = case.split(", ")[1]
        assert set(errors) == {*("y", "dx", "dprobs", "dw1", "dw2"), *MAIN_GRADS}
        for name, error in errors.items():
            assert error < TOLERANCES[dtype], (case, name)


MAIN_GRADS = ("main_grad of w1", "main_grad of w2")


def at_paper_size(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


@pytest.fixture(scope="module", params=[4, 8], ids=["K=4", "K=8"])
def launches(request: pytest.FixtureRequest) -> Iterator[list[Launch]]:
    """What one call launches, forward and backward."""
    K, meta = request.param, at_paper_size
    rows = T * K
    index = {"dtype": torch.int32}
    order = Order(meta(rows, **index), meta(rows, **index), meta(T, K, **index), meta(E))
    groups = Grouping(BACKENDS["triton"], ends=meta(E, **index), order=order)
    x, probs = meta(T, H), meta(T, K, dtype=torch.float32)
    weights = meta(E, 2 * WIDTH, H), meta(E, H, WIDTH)
    main_grads = tuple(meta(*w.shape, dtype=torch.float32) for w in weights)
    with compiled_launches() as launched:
        y, hidden = fused_forward(x, probs, *weights, groups)
        assert y.shape == (rows, H) and hidden.shape == (rows, 2 * WIDTH)
        fused_backward(x, probs, hidden, y, *weights, groups, main_grads, wants_dw=True)
    yield launched


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
