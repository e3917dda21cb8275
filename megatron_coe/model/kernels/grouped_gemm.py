"""Grouped GEMMs of routed experts, with the gated activation in their epilogues.

Rows are sorted by expert; `ends` [E], int32 on the device, says where each expert's rows end, so
that no product waits for the host. Every tile is computed by one program, in one order, without
atomics: the same inputs give the same bits.

Where `slot` is given, rows are gathered and never copied: row r stands for the assignment
`slot[r]` = token * K + k, whose input is x[token] and whose router weight is probs[slot[r]].

Tiles are numbered expert by expert, so those that run at a time share one expert's weights and rows
in the L2 cache (7 MB at H = 1024, F = 704). There are a few programs more than tiles, as only the
device knows the number; they end at once. Several programs to a multiprocessor hide one's epilogue
under another's products, which makes a persistent loop unnecessary.

Axis letters: T tokens, K choices of a token, R rows, E experts, H hidden, F expert FFN size,
I input width, O output width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Tile(NamedTuple):
    """What one program computes, m x n, in steps of k, and how."""

    m: int
    n: int
    k: int
    num_warps: int
    num_stages: int


class Tiles(NamedTuple):
    """The tiles of the six products of an expert, forward and backward.

    Fixed, not tuned when a run starts: another tile can round a sum otherwise, and a run must be
    repeatable. `tools/benchmark.py --what tiles` measures others.
    """

    fc1: Tile = Tile(128, 64, 64, 8, 3)
    fc2: Tile = Tile(128, 128, 64, 8, 3)
    dfc2: Tile = Tile(128, 64, 64, 8, 4)
    dfc1: Tile = Tile(128, 128, 64, 8, 3)
    dw1: Tile = Tile(128, 128, 64, 8, 7)  # a gathered row takes two stages
    dw2: Tile = Tile(128, 64, 64, 8, 4)


TILES = Tiles()


def fc1_swiglu(
    x: Tensor, probs: Tensor, w1_E2FH: Tensor, ends: Tensor, slot: Tensor | None, tile: Tile
) -> tuple[Tensor, Tensor]:
    """Return fc1's output [R, 2F], gate and up, and silu(gate) * up * probs [R, F].

    Args:
        x: [R, H], or [T, H] with `slot`.
        probs: R numbers of any shape, by row, or by slot with `slot` [R].
    """
    E, width, H = w1_E2FH.shape
    R, F = probs.numel(), width // 2
    hidden_R2F, activated_RF = x.new_empty(R, width), x.new_empty(R, F)
    _fc1_swiglu[_row_grid(R, E, F, tile)](
        *(x, probs, slot, w1_E2FH, ends, hidden_R2F, activated_RF),
        TOP_K=R // len(x),
        H=H,
        F=F,
        **_experts(E),
        **_meta(tile),
    )
    return hidden_R2F, activated_RF


def product(a_RI: Tensor, weight: Tensor, ends: Tensor, transposed: bool, tile: Tile) -> Tensor:
    """Return a[rows of e] @ weight[e] [R, O]; `transposed`: weight is [E, O, I], not [E, I, O]."""
    E = len(weight)
    inputs, outputs = weight.shape[:0:-1] if transposed else weight.shape[1:]
    out_RO = a_RI.new_empty(len(a_RI), outputs)
    _product[_row_grid(len(a_RI), E, outputs, tile)](
        *(a_RI, weight, ends, out_RO),
        INPUTS=inputs,
        OUTPUTS=outputs,
        TRANSPOSED=transposed,
        **_experts(E),
        **_meta(tile),
    )
    return out_RO


def dfc2_dswiglu(
    dy_RH: Tensor,
    hidden_R2F: Tensor,
    probs: Tensor,
    w2_EHF: Tensor,
    ends: Tensor,
    slot: Tensor | None,
    tile: Tile,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of fc2's input, of the activation and of `probs`.

    Returns:
        silu(gate) * up * probs [R, F] once more (fc2's weight gradient needs it), and the gradients
        of fc1's output [R, 2F] and of `probs`, in its shape.
    """
    E, H, F = w2_EHF.shape
    R, columns = len(dy_RH), triton.cdiv(F, tile.n)
    activated_RF, dhidden_R2F = dy_RH.new_empty(R, F), torch.empty_like(hidden_R2F)
    # A sum over F that every program adds its part to would need atomics.
    dprobs_CR = torch.empty(columns, R, dtype=torch.float32, device=dy_RH.device)
    _dfc2_dswiglu[_row_grid(R, E, F, tile)](
        *(dy_RH, hidden_R2F, probs, slot, w2_EHF, ends, activated_RF, dhidden_R2F, dprobs_CR),
        R,
        H=H,
        F=F,
        **_experts(E),
        **_meta(tile),
    )
    return activated_RF, dhidden_R2F, dprobs_CR.sum(0).to(probs.dtype).view_as(probs)


def add_outer(
    dy_RO: Tensor,
    x: Tensor,
    ends: Tensor,
    slot: Tensor | None,
    out_EOI: Tensor,
    accumulate: bool,
    tile: Tile,
) -> None:
    """Add dy[rows of e]^T @ x[rows of e] to out[e] in place, in out's dtype.

    Args:
        x: [R, I], or [T, I] with `slot` [R].
        accumulate: False: overwrite `out` instead, with zeros where an expert has no rows.
    """
    E, outputs, inputs = out_EOI.shape
    grid = (E * triton.cdiv(outputs, tile.m) * triton.cdiv(inputs, tile.n),)
    _add_outer[grid](
        *(dy_RO, x, slot, ends, out_EOI),
        TOP_K=len(dy_RO) // max(len(x), 1),
        INPUTS=inputs,
        OUTPUTS=outputs,
        ACCUMULATE=accumulate,
        **_meta(tile),
    )


def _row_grid(rows: int, experts: int, columns: int, tile: Tile) -> tuple[int]:
    """Return as many programs as there can be tiles: each expert's last may be partly filled."""
    return ((rows // tile.m + experts) * triton.cdiv(columns, tile.n),)


def _experts(number: int) -> dict[str, int]:
    return {"E": number, "E_POWER": triton.next_power_of_2(number)}


def _meta(tile: Tile) -> dict[str, Any]:
    blocks = {"BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k}
    return {**blocks, "num_warps": tile.num_warps, "num_stages": tile.num_stages}


# --- on the device --------------------------------------------------------------------------------


@triton.jit
def _find_rows(  # type: ignore[no-untyped-def]  # compiled by Triton
    ends,
    tile,
    E: tl.constexpr,
    E_POWER: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Return the expert of a tile of rows, its first row, and the end of the expert's rows.

    The expert is at least E, and the two others 0, past the last tile.
    """
    e = tl.arange(0, E_POWER)
    end = tl.load(ends + e, mask=e < E, other=0)
    start = tl.load(ends + e - 1, mask=(e > 0) & (e < E), other=0)
    tiles = tl.where(e < E, tl.cdiv(end - start, BLOCK_M), 0)
    last = tl.cumsum(tiles, 0)
    expert = tl.sum((last <= tile).to(tl.int32), 0)
    first = start + (tile - last + tiles) * BLOCK_M
    chosen = e == expert
    return expert, tl.sum(tl.where(chosen, first, 0), 0), tl.sum(tl.where(chosen, end, 0), 0)


@triton.jit
def _swiglu_parts(  # type: ignore[no-untyped-def]  # compiled by Triton
    gate,
    up,
):
    """Return sigmoid(gate), silu(gate) and silu(gate) * up, in fp32."""
    sigmoid = tl.sigmoid(gate)
    return sigmoid, gate * sigmoid, gate * sigmoid * up


@triton.jit
def _fc1_swiglu(  # type: ignore[no-untyped-def]  # compiled by Triton
    x,
    probs,
    slot,
    w1,
    ends,
    hidden,
    activated,
    E: tl.constexpr,
    E_POWER: tl.constexpr,
    TOP_K: tl.constexpr,
    H: tl.constexpr,
    F: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile of gate and the tile of up that belongs to it, so that both are here at the end."""
    columns: tl.constexpr = tl.cdiv(F, BLOCK_N)
    expert, first, end = _find_rows(ends, tl.program_id(0) // columns, E, E_POWER, BLOCK_M)
    if expert >= E:
        return
    rows = first + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) % columns * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    loaded = tl.minimum(rows, end - 1)  # the rows past the end are computed, and not stored
    if slot is not None:
        loaded = tl.load(slot + loaded)
    a = x + (loaded // TOP_K).to(tl.int64)[:, None] * H + k[None, :]
    b = w1 + expert.to(tl.int64) * (2 * F * H) + n[None, :] * H + k[:, None]
    gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, H, BLOCK_K):
        inside = (start + k < H)[:, None] & (n < F)[None, :]
        a_tile = tl.load(a, mask=(start + k < H)[None, :], other=0.0)
        gate = tl.dot(a_tile, tl.load(b, mask=inside, other=0.0), gate, input_precision="ieee")
        up = tl.dot(a_tile, tl.load(b + F * H, mask=inside, other=0.0), up, input_precision="ieee")
        a += BLOCK_K
        b += BLOCK_K
    # As the backward pass will see them.
    gate = gate.to(hidden.dtype.element_ty)
    up = up.to(hidden.dtype.element_ty)
    _, _, y = _swiglu_parts(gate.to(tl.float32), up.to(tl.float32))
    y *= tl.load(probs + loaded).to(tl.float32)[:, None]

    stored = (rows < end)[:, None] & (n < F)[None, :]
    into = hidden + rows.to(tl.int64)[:, None] * (2 * F) + n[None, :]
    tl.store(into, gate, mask=stored)
    tl.store(into + F, up, mask=stored)
    tl.store(activated + rows.to(tl.int64)[:, None] * F + n[None, :], y, mask=stored)


@triton.jit
def _rows_times_weight(  # type: ignore[no-untyped-def]  # compiled by Triton
    a,
    weight,
    rows,
    n,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Return a[rows] @ weight[:, n] in fp32, weight[n]^T if TRANSPOSED, for one expert."""
    k = tl.arange(0, BLOCK_K)
    PER_K: tl.constexpr = 1 if TRANSPOSED else OUTPUTS
    PER_N: tl.constexpr = INPUTS if TRANSPOSED else 1
    a += rows.to(tl.int64)[:, None] * INPUTS + k[None, :]
    b = weight + k[:, None] * PER_K + n[None, :] * PER_N
    total = tl.zeros((rows.shape[0], n.shape[0]), tl.float32)
    for start in range(0, INPUTS, BLOCK_K):
        a_tile = tl.load(a, mask=(start + k < INPUTS)[None, :], other=0.0)
        b_tile = tl.load(b, mask=(start + k < INPUTS)[:, None] & (n < OUTPUTS)[None, :], other=0.0)
        total = tl.dot(a_tile, b_tile, total, input_precision="ieee")
        a += BLOCK_K
        b += BLOCK_K * PER_K
    return total


@triton.jit
def _product(  # type: ignore[no-untyped-def]  # compiled by Triton
    a,
    weight,
    ends,
    out,
    E: tl.constexpr,
    E_POWER: tl.constexpr,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    columns: tl.constexpr = tl.cdiv(OUTPUTS, BLOCK_N)
    expert, first, end = _find_rows(ends, tl.program_id(0) // columns, E, E_POWER, BLOCK_M)
    if expert >= E:
        return
    rows = first + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) % columns * BLOCK_N + tl.arange(0, BLOCK_N)
    weight += expert.to(tl.int64) * (INPUTS * OUTPUTS)
    total = _rows_times_weight(
        a, weight, tl.minimum(rows, end - 1), n, INPUTS, OUTPUTS, TRANSPOSED, BLOCK_K
    )
    stored = (rows < end)[:, None] & (n < OUTPUTS)[None, :]
    tl.store(out + rows.to(tl.int64)[:, None] * OUTPUTS + n[None, :], total, mask=stored)


@triton.jit
def _dfc2_dswiglu(  # type: ignore[no-untyped-def]  # compiled by Triton
    dy,
    hidden,
    probs,
    slot,
    w2,
    ends,
    activated,
    dhidden,
    dprobs,
    R,
    E: tl.constexpr,
    E_POWER: tl.constexpr,
    H: tl.constexpr,
    F: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    columns: tl.constexpr = tl.cdiv(F, BLOCK_N)
    expert, first, end = _find_rows(ends, tl.program_id(0) // columns, E, E_POWER, BLOCK_M)
    if expert >= E:
        return
    rows = first + tl.arange(0, BLOCK_M)
    column = tl.program_id(0) % columns
    n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    w2 += expert.to(tl.int64) * (H * F)
    total = _rows_times_weight(dy, w2, tl.minimum(rows, end - 1), n, H, F, False, BLOCK_K)
    prob_at = rows
    if slot is not None:
        prob_at = tl.load(slot + rows, mask=rows < end, other=0)
    prob = tl.load(probs + prob_at, mask=rows < end, other=0.0).to(tl.float32)
    # By halves, for a half's intermediate results fit into registers.
    halves = tl.permute(tl.reshape(total, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1))
    left, right = tl.split(halves)
    n = column * BLOCK_N + tl.arange(0, BLOCK_N // 2)
    dprob = _dswiglu(left, prob, hidden, activated, dhidden, rows, end, n, F)
    dprob += _dswiglu(right, prob, hidden, activated, dhidden, rows, end, n + BLOCK_N // 2, F)
    tl.store(dprobs + column * R + prob_at, dprob, mask=rows < end)


@triton.jit
def _dswiglu(  # type: ignore[no-untyped-def]  # compiled by Triton
    dy_weighted,
    prob,
    hidden,
    activated,
    dhidden,
    rows,
    end,
    n,
    F: tl.constexpr,
):
    """Store the activation of a tile and fc1's gradient; return the tile's part of dprobs."""
    stored = (rows < end)[:, None] & (n < F)[None, :]
    gate_at = rows.to(tl.int64)[:, None] * (2 * F) + n[None, :]
    gate = tl.load(hidden + gate_at, mask=stored, other=0.0).to(tl.float32)
    up = tl.load(hidden + gate_at + F, mask=stored, other=0.0).to(tl.float32)
    sigmoid, silu, y = _swiglu_parts(gate, up)
    activated_at = rows.to(tl.int64)[:, None] * F + n[None, :]
    tl.store(activated + activated_at, y * prob[:, None], mask=stored)
    dy = dy_weighted * prob[:, None]
    tl.store(dhidden + gate_at, dy * up * sigmoid * (1 + gate * (1 - sigmoid)), mask=stored)
    tl.store(dhidden + gate_at + F, dy * silu, mask=stored)
    return tl.sum(y * dy_weighted, 1)


@triton.jit
def _add_outer(  # type: ignore[no-untyped-def]  # compiled by Triton
    dy,
    x,
    slot,
    ends,
    out,
    TOP_K: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    columns: tl.constexpr = tl.cdiv(INPUTS, BLOCK_N)
    tiles: tl.constexpr = tl.cdiv(OUTPUTS, BLOCK_M) * columns
    expert = tl.program_id(0) // tiles
    end = tl.load(ends + expert)
    begin = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    m = tl.program_id(0) % tiles // columns * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) % columns * BLOCK_N + tl.arange(0, BLOCK_N)
    at = out + expert.to(tl.int64) * (OUTPUTS * INPUTS) + m[:, None] * INPUTS + n[None, :]
    stored = (m < OUTPUTS)[:, None] & (n < INPUTS)[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if ACCUMULATE:
        if begin == end:
            return
        # Not at the end: that would hold two tiles in registers.
        total += tl.load(at, mask=stored, other=0.0).to(tl.float32)
    for start in range(begin, end, BLOCK_K):
        rows = start + tl.arange(0, BLOCK_K)
        of_x = rows
        if slot is not None:
            of_x = tl.load(slot + rows, mask=rows < end, other=0) // TOP_K
        dy_at = dy + rows.to(tl.int64)[None, :] * OUTPUTS + m[:, None]
        x_at = x + of_x.to(tl.int64)[:, None] * INPUTS + n[None, :]
        dy_tile = tl.load(dy_at, mask=(rows < end)[None, :] & (m < OUTPUTS)[:, None], other=0.0)
        x_tile = tl.load(x_at, mask=(rows < end)[:, None] & (n < INPUTS)[None, :], other=0.0)
        total = tl.dot(dy_tile, x_tile, total, input_precision="ieee")
    tl.store(at, total, mask=stored)
