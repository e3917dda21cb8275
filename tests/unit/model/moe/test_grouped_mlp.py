"""The experts' autograd function: both kernels, several calls with the same weights, gradients into
autograd or into Megatron's buffers, against the definition differentiated by autograd.

Tolerances, relative to the largest entry: fp64 1e-10, fp32 1e-5, bf16 3e-2 (against fp32).
"""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F

from megatron_coe.model.field_rules import GROUPED_GEMM_BACKENDS
from megatron_coe.model.moe import grouped_linear
from megatron_coe.model.moe.expert_activation import ByAutograd, SwiGLU
from megatron_coe.model.moe.grouped_linear import BACKENDS, Grouping, choose_backend, grouping
from megatron_coe.model.moe.grouped_mlp import SharedWeights, expert_mlp

E, H, WIDTH = 5, 16, 8
COUNTS = {
    "uneven": [3, 8, 1, 5, 2],
    "empty": [0, 9, 0, 4, 0],
    "one_takes_all": [0, 0, 0, 11, 0],
    "one_token": [0, 0, 1, 0, 0],
}
FP64 = (torch.float64, 1e-10, "loop")
FP32 = (torch.float32, 1e-5, "loop")
GROUPED = (torch.float32, 1e-5, "grouped_mm")


def swiglu(hidden, probs):
    gate, up = hidden.chunk(2, dim=-1)
    return (F.silu(gate) * up * probs).to(hidden.dtype)


def groups_of(counts, kernel):
    if kernel == "loop":
        return Grouping(BACKENDS[kernel], counts=list(counts))
    return Grouping(BACKENDS[kernel], ends=torch.tensor(counts).cumsum(0, dtype=torch.int32))


def weights(dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = (E, 2 * WIDTH, H), (E, H, WIDTH)
    return tuple(
        torch.nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) / 3)
        for s in shapes
    )


def inputs(rows, dtype, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, H, generator=generator, dtype=torch.float64).to(dtype)
    probs = torch.rand(rows, 1, generator=generator, dtype=torch.float64).to(dtype)
    upstream = torch.randn(rows, H, generator=generator, dtype=torch.float64).to(dtype)
    return x.requires_grad_(), probs.requires_grad_(), upstream


def oracle(x, probs, w1, w2, counts):
    parts = zip(x.split(counts), probs.split(counts), w1, w2, strict=True)
    return torch.cat([swiglu(x_e @ w1_e.T, p_e) @ w2_e.T for x_e, p_e, w1_e, w2_e in parts])


def iterate(x, probs, w1, w2, calls, passes):
    """x(t) = x(t-1) + experts(x(t-1)), rows in another order for every call."""
    for number, counts in enumerate(calls):
        x = x + passes(x.flip(0), probs + number, w1, w2, counts)
    return x


def ours(kernel, activation=None):
    """The same call by the function under test; one `SharedWeights` for all calls."""
    shared = None

    def run(x, probs, w1, w2, counts):
        nonlocal shared
        shared = shared or SharedWeights(w1, w2)
        return expert_mlp(x, probs, shared, groups_of(counts, kernel), activation or SwiGLU())

    return run


def assert_close(got, want, tolerance):
    assert (got - want).abs().max() <= tolerance * want.abs().max().clamp(min=1e-30)


@pytest.mark.parametrize("activation", [SwiGLU(), ByAutograd(swiglu)], ids=["swiglu", "autograd"])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize(
    ("dtype", "tolerance", "kernel"), [FP64, FP32, GROUPED], ids=["fp64", "fp32", "grouped"]
)
def test_gradients_of_several_calls_match_the_definition(
    dtype, tolerance, kernel, counts, activation
):
    calls = [counts, counts[::-1], [sum(counts), 0, 0, 0, 0]]
    w1, w2 = weights(dtype)
    x, probs, upstream = inputs(sum(counts), dtype)
    leaves = (x, probs, w1, w2)
    want = iterate(*leaves, calls, oracle)
    got = iterate(*leaves, calls, ours(kernel, activation))
    assert_close(got, want, tolerance)
    wanted = torch.autograd.grad(want, leaves, upstream)
    for a, b in zip(torch.autograd.grad(got, leaves, upstream), wanted, strict=True):
        assert_close(a, b, tolerance)


@pytest.mark.parametrize("counts", [COUNTS["empty"], [0] * E], ids=["empty", "no_rows"])
def test_megatrons_buffers_get_the_sum_of_micro_batches_in_flight(counts):
    """Two graphs alive at once, as under a pipeline; the hook that reduces gradients fires once for
    each and finds the buffer complete."""
    w1, w2 = parameters = weights(torch.float64)
    calls = [counts, counts[::-1]]
    batches = [inputs(sum(counts), torch.float64, seed) for seed in (3, 4)]
    expected, partial_sums = [torch.zeros_like(w) for w in parameters], []
    for x, probs, upstream in batches:
        output = iterate(x, probs, w1, w2, calls, oracle)
        grads = torch.autograd.grad(output, parameters, upstream, allow_unused=True)
        for total, grad in zip(expected, grads, strict=True):
            total += 0 if grad is None else grad
        partial_sums.append([total.clone() for total in expected])
    seen = []
    for weight in parameters:
        weight.main_grad, weight.grad_added_to_main_grad = torch.zeros_like(weight), False
        accumulate = weight.expand_as(weight).grad_fn.next_functions[0][0]
        accumulate.register_hook(
            lambda *_, w=weight: seen.append((w.grad is None, w.main_grad.clone()))
        )
    outputs = [iterate(x, p, w1, w2, calls, ours("loop")) for x, p, _ in batches]
    for output, (_, _, upstream) in zip(outputs, batches, strict=True):
        output.backward(upstream)
        for weight in parameters:
            weight.grad = None
    assert len(seen) == 4 and not any(missing for missing, _ in seen)
    for number, (_, buffer) in enumerate(seen):
        wants = partial_sums[number // 2]
        want = wants[0] if buffer.shape == w1.shape else wants[1]
        assert_close(buffer, want, 1e-10)
    assert all(w.grad_added_to_main_grad for w in parameters)


def test_parts_of_a_graph_can_be_differentiated_in_any_order():
    """First the input's gradient alone, then the first call's part, then all of it, twice."""
    counts = COUNTS["uneven"]
    w1, w2 = weights(torch.float64)
    x, probs, upstream = inputs(sum(counts), torch.float64)

    def gradients(passes):
        middle = x + passes(x, probs, w1, w2, counts)
        end = middle + passes(middle, probs, w1, w2, counts)
        parts = ((end, (x,)), (middle, (w1, w2)), (end, (x, w1, w2)), (end, (w1,)))
        for output, leaves in parts:
            yield from torch.autograd.grad(output, leaves, upstream, retain_graph=True)

    for got, want in zip(gradients(ours("loop")), gradients(oracle), strict=True):
        assert_close(got, want, 1e-10)


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_projection_gets_no_gradient(frozen):
    counts = COUNTS["uneven"]
    w1, w2 = parameters = weights(torch.float64)
    x, probs, upstream = inputs(sum(counts), torch.float64)
    oracle(x, probs, w1, w2, counts).backward(upstream)
    want, parameters[1 - frozen].grad = parameters[1 - frozen].grad, None
    parameters[frozen].grad = None
    parameters[frozen].requires_grad_(False)
    ours("loop")(x, probs, w1, w2, counts).backward(upstream)
    assert parameters[frozen].grad is None
    assert_close(parameters[1 - frozen].grad, want, 1e-10)


@pytest.mark.parametrize("kernel", ["loop", "grouped_mm"])
def test_sixteen_bits_with_fp32_probabilities(kernel):
    counts = COUNTS["empty"]
    w1, w2 = weights(torch.bfloat16)
    x, probs, upstream = inputs(sum(counts), torch.bfloat16)
    probs = probs.detach().float().requires_grad_()
    leaves = (x, probs, w1, w2)
    exact = [leaf.detach().float().requires_grad_() for leaf in leaves]
    want = oracle(*exact, counts)
    got = ours(kernel)(*leaves, counts)
    assert got.dtype == torch.bfloat16
    assert_close(got.float(), want, 3e-2)
    wanted = torch.autograd.grad(want, exact, upstream.float())
    for leaf, a, b in zip(leaves, torch.autograd.grad(got, leaves, upstream), wanted, strict=True):
        assert a.dtype == leaf.dtype
        assert_close(a.float(), b, 3e-2)


def test_a_sum_can_be_differentiated():
    """Its gradient has stride zero, which grouped_mm alone refuses."""
    counts = [4, 0, 8, 4, 0]
    x, probs, _ = inputs(16, torch.float32)
    leaves = (x, probs, *weights(torch.float32))
    wanted = torch.autograd.grad(oracle(*leaves, counts).sum(), leaves)
    for kernel in ("loop", "grouped_mm"):
        got = torch.autograd.grad(ours(kernel)(*leaves, counts).sum(), leaves)
        for a, b in zip(got, wanted, strict=True):
            assert_close(a, b, 1e-5)


def test_many_experts_share_a_block_and_large_ones_have_their_own(monkeypatch):
    from megatron_coe.model.moe import grouped_mlp as module

    counts = [3, 8, 1, 0, 5]
    x, probs, upstream = inputs(sum(counts), torch.float64)
    leaves = (x, probs, *weights(torch.float64))
    wanted = torch.autograd.grad(oracle(*leaves, counts), leaves, upstream)
    for rows, blocks in ((1, [1, 1, 2, 1]), (4, [1, 1, 2, 1]), (9, [1, 3, 1]), (99, [5])):
        monkeypatch.setattr(module, "_BLOCK_BYTES", rows * 2 * WIDTH * 8)
        taken = module._expert_blocks(counts, leaves[2])
        assert [len(block.counts) for block in taken] == blocks
        got = torch.autograd.grad(ours("loop")(*leaves, counts), leaves, upstream)
        for a, b in zip(got, wanted, strict=True):
            assert_close(a, b, 1e-10)


def test_only_inputs_and_the_first_projection_are_kept():
    counts = COUNTS["uneven"]
    rows = sum(counts)
    w1, w2 = weights(torch.float32)
    x, probs, _ = inputs(rows, torch.float32)
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = ours("loop")(x, probs, w1, w2, counts)
    assert sum(kept.values()) == 4 * (rows * (H + 1 + 2 * WIDTH) + w1.numel() + w2.numel())
    with torch.no_grad():
        assert torch.equal(y, ours("loop")(x, probs, w1, w2, counts))


def test_an_eight_bit_copy_can_be_kept_instead():
    counts = COUNTS["uneven"]
    x, probs, upstream = inputs(sum(counts), torch.float32)
    w1, w2 = weights(torch.float32)

    def rounded(hidden, p):
        eight = hidden + (hidden.to(torch.float8_e4m3fn).float() - hidden).detach()
        return swiglu(eight, p)

    pairs = zip(x.split(counts), probs.split(counts), w1, w2, strict=True)
    want = torch.cat([rounded(a @ u.T, p) @ v.T for a, p, u, v in pairs])
    got = expert_mlp(
        x, probs, SharedWeights(w1, w2), groups_of(counts, "loop"), SwiGLU(), fp8_hidden=True
    )
    assert_close(got, oracle(x, probs, w1, w2, counts), 1e-5)  # forward in full
    leaves = (x, probs, w1, w2)
    wanted = torch.autograd.grad(want, leaves, upstream)
    for a, b in zip(torch.autograd.grad(got, leaves, upstream), wanted, strict=True):
        assert_close(a, b, 1e-5)


def test_nothing_waits_for_the_garbage_collector():
    counts = COUNTS["uneven"]
    x, probs, upstream = inputs(sum(counts), torch.float32)
    w1, w2 = weights(torch.float32)
    gc.collect()
    gc.disable()
    try:
        shared = SharedWeights(w1, w2)
        y = expert_mlp(x, probs, shared, groups_of(counts, "loop"), SwiGLU())
        alive = [weakref.ref(shared), weakref.ref(shared.fc1)]
        y.backward(upstream)
        del shared, y
        assert not any(ref() for ref in alive)
    finally:
        gc.enable()


CPU = torch.device("cpu")


def test_a_cpu_takes_the_loop():
    loop = choose_backend("auto", CPU, torch.bfloat16, (8, 8))
    assert loop is BACKENDS["loop"]
    assert grouping(loop, torch.empty(4, 8), torch.tensor([1, 3])).counts == [1, 3]


@pytest.mark.parametrize("kernel", BACKENDS)
def test_no_rows_take_the_loop(kernel):
    """On any device, for libraries refuse empty products."""
    groups = grouping(BACKENDS[kernel], torch.empty(0, 8), torch.tensor([0, 0]))
    assert groups.backend is BACKENDS["loop"] and groups.counts == [0, 0]


H100 = {"capability": (9, 0)}
CHOICES = {
    "paper, bf16": (H100, torch.bfloat16, (1024, 704), "grouped_mm"),
    "fp32": (H100, torch.float32, (1024, 704), "loop"),
    "rows of half a vector": (H100, torch.bfloat16, (1024, 4), "loop"),
    "A100": ({"capability": (8, 0)}, torch.bfloat16, (1024, 704), "loop"),
    "Blackwell": ({"capability": (10, 0)}, torch.bfloat16, (1024, 704), "grouped_mm"),
}


@pytest.mark.parametrize(("device", "dtype", "widths", "chosen"), CHOICES.values(), ids=CHOICES)
def test_auto_takes_what_was_measured(monkeypatch, device, dtype, widths, chosen):
    monkeypatch.setattr(grouped_linear, "_capability", lambda _device: device["capability"])
    got = choose_backend("auto", torch.device("cuda"), dtype, widths)
    assert got is BACKENDS[chosen]


@pytest.mark.parametrize("kernel", [name for name in BACKENDS if name != "loop"])
def test_a_backend_that_cannot_be_used_is_refused(kernel):
    with pytest.raises(ValueError, match=f"moe_grouped_gemm_backend='{kernel}' needs a GPU"):
        choose_backend(kernel, CPU, torch.bfloat16, (8, 8))


def test_every_backend_has_a_name_in_the_configuration():
    assert set(GROUPED_GEMM_BACKENDS) == {"auto", *BACKENDS}
