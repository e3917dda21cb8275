"""Router scores, top-k experts and the sums that auxiliary losses need, in one pass over logits.

A program takes tokens of one sequence and writes their sums to a place of its own, which are added
up afterwards in one order: no atomics, the same inputs give the same bits. For the backward pass
nothing is saved but logits and choices: scores are computed again.

Axis letters: S sequence, B batch, T = S * B tokens (s * B + b), N routed experts, K chosen.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

SOFTMAX, SOFTMAX_OF_CHOSEN, SIGMOID = 0, 1, 2
"""How probabilities are made: of all scores, of the chosen logits, or of their sum."""

_EPS = tl.constexpr(1e-20)
"""As Megatron's, for scores that all underflow."""
_LOWEST = tl.constexpr(-3.4e38)
_TILE = 1024
"""Logits that a program holds, 8 a thread: with the sums over them all fit in registers."""


def route_tokens(
    logits_TN: Tensor, batch: int, topk: int, kind: int, scaling: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Choose the K experts of each token.

    Args:
        logits_TN: fp32, contiguous.
        batch: B.
        kind: `SOFTMAX`, `SOFTMAX_OF_CHOSEN` or `SIGMOID`.
        scaling: factor on the probabilities.

    Returns:
        Probabilities [T, K], fp32; expert indices [T, K], int64, best first; and by sequence, fp32:
        assignments [B, N], sums of all scores [B, N] (sigmoid's divided by a token's sum), and sums
        of the share of their scores that tokens' chosen experts hold [B].
    """
    T, N = logits_TN.shape
    sizes = _sizes(N, topk, kind)
    blocks = triton.cdiv(T // batch, sizes["TOKENS"])
    probs_TK = logits_TN.new_empty(T, topk)
    chosen_TK = torch.empty(T, topk, dtype=torch.int64, device=logits_TN.device)
    sums = logits_TN.new_empty(batch, blocks, 2 * N + 1)
    route_kernel[(batch, blocks)](
        *(logits_TN, probs_TK, chosen_TK, sums),
        *(T // batch, batch, N, scaling),
        **sizes,
    )
    counts_BN, scores_BN, mass_B1 = sums.sum(1).split([N, N, 1], dim=1)
    return probs_TK, chosen_TK, counts_BN, scores_BN, mass_B1.squeeze(1)


def route_tokens_backward(
    logits_TN: Tensor,
    chosen_TK: Tensor,
    dprobs_TK: Tensor,
    dscores_BN: Tensor | None,
    kind: int,
    scaling: float,
) -> Tensor:
    """Return the gradient of the logits from those of probabilities and of summed scores."""
    (T, N), topk = logits_TN.shape, chosen_TK.shape[1]
    batch = 1 if dscores_BN is None else len(dscores_BN)
    sizes = _sizes(N, topk, kind)
    dlogits_TN = torch.empty_like(logits_TN)
    route_backward_kernel[(batch, triton.cdiv(T // batch, sizes["TOKENS"]))](
        *(logits_TN, chosen_TK, dprobs_TK, dscores_BN, dlogits_TN),
        *(T // batch, batch, N, scaling),
        **sizes,
    )
    return dlogits_TN


def _sizes(num_experts: int, topk: int, kind: int) -> dict[str, int]:
    experts = max(triton.next_power_of_2(num_experts), 16)
    return {"K": topk, "KIND": kind, "TOKENS": max(_TILE // experts, 1), "EXPERTS": experts}


@triton.jit
def _load_logits(pointers, is_token, is_expert):  # type: ignore[no-untyped-def]
    """Return logits, -inf beyond the experts; 0 beyond the tokens, which makes no NaN."""
    logits = tl.load(pointers, is_token[:, None] & is_expert[None, :], 0.0)
    return tl.where(is_expert[None, :], logits, float("-inf"))


@triton.jit
def _scores(logits, is_expert, KIND: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return softmax or sigmoid of all logits, 0 beyond the experts."""
    if KIND == 2:
        scores = tl.where(is_expert[None, :], tl.sigmoid(logits), 0.0)
    else:
        scores = tl.exp(logits - tl.max(logits, 1)[:, None])
        scores = scores / tl.sum(scores, 1)[:, None]
    return scores


@triton.jit
def _probabilities(logits, scores, is_chosen, K: tl.constexpr, KIND: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the probabilities of chosen experts, unscaled; 0 or nothing of use elsewhere."""
    if KIND == 1:  # the best of all is among the chosen
        probs = tl.where(is_chosen, tl.exp(logits - tl.max(logits, 1)[:, None]), 0.0)
        probs = probs / tl.sum(probs, 1)[:, None]
    elif KIND == 2 and K > 1:
        probs = scores / (tl.sum(tl.where(is_chosen, scores, 0.0), 1) + _EPS)[:, None]
    else:
        probs = scores
    return probs


@triton.jit
def _softmax_backward(probs, dprobs):  # type: ignore[no-untyped-def]
    return probs * (dprobs - tl.sum(probs * dprobs, 1)[:, None])


@triton.jit
def _share_backward(scores, dshares):  # type: ignore[no-untyped-def]
    """Go back through scores / (their sum + eps)."""
    total = tl.sum(scores, 1) + _EPS
    return (dshares - (tl.sum(dshares * scores, 1) / total)[:, None]) / total[:, None]


@triton.jit
def route_kernel(  # type: ignore[no-untyped-def]  # compiled by Triton
    logits_ptr,
    probs_ptr,
    chosen_ptr,
    sums_ptr,
    length,
    batch,
    num_experts,
    scaling,
    K: tl.constexpr,
    KIND: tl.constexpr,
    TOKENS: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    sequence, block = tl.program_id(0), tl.program_id(1)
    position = block * TOKENS + tl.arange(0, TOKENS)
    token = position.to(tl.int64) * batch + sequence
    expert = tl.arange(0, EXPERTS)
    is_token, is_expert = position < length, expert < num_experts
    inside = is_token[:, None] & is_expert[None, :]
    at = token[:, None] * num_experts + expert[None, :]
    logits = _load_logits(logits_ptr + at, is_token, is_expert)
    scores = _scores(logits, is_expert, KIND)

    # As torch orders them: NaN before all. What is chosen or no expert comes after any score.
    left = logits if KIND != 2 else scores
    left = tl.where(left == left, tl.maximum(left, _LOWEST), float("inf"))
    left = tl.where(is_expert[None, :], left, float("-inf"))
    rank = tl.zeros([TOKENS, EXPERTS], tl.int32)  # of a chosen expert, from 1; 0 of the others
    for k in tl.static_range(K):
        index = tl.argmax(left, 1)
        is_it = expert[None, :] == index[:, None]
        rank = tl.where(is_it, k + 1, rank)
        left = tl.where(is_it, float("-inf"), left)
        tl.store(chosen_ptr + token * K + k, index.to(tl.int64), is_token)
    probs = _probabilities(logits, scores, rank > 0, K, KIND) * scaling
    tl.store(probs_ptr + token[:, None] * K + rank - 1, probs, (rank > 0) & is_token[:, None])

    is_counted = (rank > 0) & inside
    mass = tl.sum(tl.where(is_counted, scores, 0.0), 1)
    if KIND == 2:
        total = tl.sum(scores, 1) + _EPS
        mass = mass / total
        scores = scores / total[:, None]
    sums = sums_ptr + (sequence * tl.num_programs(1) + block) * (2 * num_experts + 1)
    tl.store(sums + expert, tl.sum(is_counted.to(tl.float32), 0), is_expert)
    tl.store(sums + num_experts + expert, tl.sum(tl.where(inside, scores, 0.0), 0), is_expert)
    tl.store(sums + 2 * num_experts, tl.sum(tl.where(is_token, mass, 0.0), 0))


@triton.jit
def route_backward_kernel(  # type: ignore[no-untyped-def]  # compiled by Triton
    logits_ptr,
    chosen_ptr,
    dprobs_ptr,
    dsums_ptr,
    dlogits_ptr,
    length,
    batch,
    num_experts,
    scaling,
    K: tl.constexpr,
    KIND: tl.constexpr,
    TOKENS: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    sequence, block = tl.program_id(0), tl.program_id(1)
    position = block * TOKENS + tl.arange(0, TOKENS)
    token = position.to(tl.int64) * batch + sequence
    expert = tl.arange(0, EXPERTS)
    is_token, is_expert = position < length, expert < num_experts
    inside = is_token[:, None] & is_expert[None, :]
    at = token[:, None] * num_experts + expert[None, :]
    logits = _load_logits(logits_ptr + at, is_token, is_expert)
    scores = _scores(logits, is_expert, KIND)

    dprobs = tl.zeros([TOKENS, EXPERTS], tl.float32)
    is_chosen = tl.zeros([TOKENS, EXPERTS], tl.int1)
    for k in tl.static_range(K):
        index = tl.load(chosen_ptr + token * K + k, is_token, 0)
        is_it = expert[None, :] == index[:, None]
        dprob = tl.load(dprobs_ptr + token * K + k, is_token, 0.0) * scaling
        dprobs += tl.where(is_it, dprob[:, None], 0.0)
        is_chosen = is_chosen | is_it
    dscores = tl.zeros([TOKENS, EXPERTS], tl.float32)
    if dsums_ptr is not None:
        dsums = tl.load(dsums_ptr + sequence * num_experts + expert, is_expert, 0.0)
        dscores += dsums[None, :]

    if KIND == 0:
        dlogits = _softmax_backward(scores, dscores + dprobs)
    elif KIND == 1:
        probs = _probabilities(logits, scores, is_chosen, K, KIND)
        dlogits = _softmax_backward(scores, dscores) + _softmax_backward(probs, dprobs)
    else:
        dscores = _share_backward(scores, dscores)
        if K > 1:
            chosen_scores = tl.where(is_chosen, scores, 0.0)
            dprobs = tl.where(is_chosen, _share_backward(chosen_scores, dprobs), 0.0)
        dlogits = (dscores + dprobs) * scores * (1.0 - scores)
    tl.store(dlogits_ptr + at, dlogits, inside)
