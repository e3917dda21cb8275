"""Plain-PyTorch modules behind Megatron's ``BackendSpecProvider``, for a GPU or a CPU.

They need neither Transformer Engine nor Apex.

Linear layers are Megatron's own tensor-parallel ones. Norm, core attention and grouped experts
stand in for what Megatron has only in Transformer Engine: its local norm refuses sequence
parallelism, its local attention takes no separate key and value widths (so no MLA) and holds S x S
scores, and its local grouped experts need a CUDA source build.

Axis letters: S sequence (queries), Sk (keys), B batch, N heads, G key/value groups, D key width,
E value width, H hidden.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    get_cuda_rng_tracker,
)
from megatron.core.tensor_parallel.mappings import (
    all_to_all_hp2sp,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor

from megatron_coe.megatron_compat.versions import ExpertModules, expert_modules
from megatron_coe.model.backends.mla import LatentAttention
from megatron_coe.model.config import CoEConfig
from megatron_coe.model.documents import positions_of_rank
from megatron_coe.model.moe import experts

if TYPE_CHECKING:
    from megatron_coe.model.backends.te import TESpecProvider


class TorchSpecProvider(BackendSpecProvider):
    """Modules for Megatron's layer specs (megatron/core/models/backends.py).

    Args:
        te_parts: of `select.TE_PARTS`, what is Transformer Engine's instead; never `linear`.
    """

    def __init__(self, te_parts: Sequence[str] = ()) -> None:
        self.te_parts = te_parts

    def refuse_unsupported(self, config: CoEConfig) -> None:
        """Raise ValueError for a field that this backend's modules refuse when built."""
        if "attention" not in self.te_parts:
            self.refuse_attention(config)
        if "experts" not in self.te_parts:
            self.refuse_experts(config)

    def refuse_attention(self, config: CoEConfig) -> None:
        """Raise ValueError for a field that the attention refuses."""
        for layer_number in range(1, config.num_layers + 1):
            _refuse_unsupported(config, layer_number)

    def refuse_experts(self, config: CoEConfig) -> None:
        """Raise ValueError for a field that the grouped experts refuse."""
        if config.moe_grouped_gemm:
            experts.refuse_unsupported(config, config.expert_tensor_parallel_size)

    def column_parallel_linear(self) -> type:
        return ColumnParallelLinear

    def row_parallel_linear(self) -> type:
        return RowParallelLinear

    def fuse_layernorm_and_linear(self) -> bool:
        return False

    def column_parallel_layer_norm_linear(self) -> type | None:
        return None

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False) -> type:
        """Return `Norm` for all: like Transformer Engine's it follows `config.normalization`."""
        return Norm

    def core_attention(self) -> type:
        return self._te().core_attention() if "attention" in self.te_parts else SDPACoreAttention

    def mla_self_attention(self) -> type:
        """Return what replaces Megatron's `MLASelfAttention` (not in the protocol)."""
        return TensorParallelMLA

    def grouped_mlp_modules(
        self, moe_use_grouped_gemm: bool, moe_use_legacy_grouped_gemm: bool = False
    ) -> ExpertModules:
        """Return grouped experts, or Megatron's loop over expert modules without grouped GEMM."""
        if "experts" in self.te_parts:
            return self._te().grouped_mlp_modules(moe_use_grouped_gemm)
        if moe_use_grouped_gemm:
            return expert_modules(experts.GroupedExperts)
        linears = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
        return expert_modules(SequentialMLP, linears)

    def activation_func(self) -> type | None:
        return None

    def _te(self) -> TESpecProvider:
        from megatron_coe.model.backends.te import TESpecProvider

        return TESpecProvider()


# --- norms ----------------------------------------------------------------------------------------


class Norm:
    """Builds the norm that `config.normalization` names; the counterpart of Megatron's `TENorm`."""

    def __new__(
        cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5
    ) -> Any:  # RMSNorm or LayerNorm
        """Build it.

        Raises:
            ValueError: `config.normalization` is neither "RMSNorm" nor "LayerNorm".
        """
        if config.normalization == "RMSNorm":
            return RMSNorm(config, hidden_size, eps)
        if config.normalization == "LayerNorm":
            return LayerNorm(config, hidden_size, eps)
        raise ValueError(
            f"normalization={config.normalization!r} is not available with backend='torch': "
            "choose 'RMSNorm' or 'LayerNorm'"
        )


class _NormBase(torch.nn.Module):
    """What both norms share: a weight, stored as 1 + weight under `layernorm_zero_centered_gamma`.

    Under sequence parallelism each rank sees a part of the sequence only; the mark on the
    parameters makes Megatron sum their gradients over the tensor-parallel group.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float):
        super().__init__()
        self.hidden_size = hidden_size
        self.eps = eps
        self.zero_centered_gamma = config.layernorm_zero_centered_gamma
        self.weight = self._parameter(config, float(not self.zero_centered_gamma))

    def _parameter(self, config: TransformerConfig, fill: float) -> torch.nn.Parameter:
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        values = torch.full((self.hidden_size,), fill, dtype=config.params_dtype, device=device)
        parameter = torch.nn.Parameter(values)
        parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]  # a mark
        return parameter

    def _gain(self) -> Tensor:
        return 1 + self.weight if self.zero_centered_gamma else self.weight

    def extra_repr(self) -> str:
        return f"{self.hidden_size}, eps={self.eps}"


class RMSNorm(_NormBase):
    """y = x / sqrt(mean(x^2) + eps) * weight over the last axis.

    Computed in fp32 for 16-bit inputs and in the input's own precision otherwise.
    """

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (self.hidden_size,), self._gain(), self.eps)


class LayerNorm(_NormBase):
    """y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias over the last axis."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float):
        super().__init__(config, hidden_size, eps)
        self.bias = self._parameter(config, 0.0)

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (self.hidden_size,), self._gain(), self.bias, self.eps)


# --- attention ------------------------------------------------------------------------------------


class SDPACoreAttention(MegatronModule):
    """softmax(Q K^T * scale) V by PyTorch's `scaled_dot_product_attention`, without S x S scores.

    Has the interface of Megatron's `DotProductAttention`
    (megatron/core/transformer/dot_product_attention.py) and the key and value widths that MLA
    asks for. Heads are those of this tensor-parallel rank, as the inputs bring them.

    Under context parallelism a rank holds chunks r and 2 CP - 1 - r of the sequence's 2 CP
    (`megatron.core.utils.get_batch_on_this_cp_rank`): it gathers all ranks' keys and values, and
    each of its chunks of queries attends to those up to its own position.

    Packed documents (`packed_seq_params` of the format "thd") attend each to itself alone, one
    after another; under context parallelism each is cut into 2 CP chunks (`model.documents`).

    Args:
        attn_mask_type: which keys a query may see when `forward` is not told otherwise.
        softmax_scale: factor on Q K^T; None for 1 / sqrt(width of a key).
        k_channels, v_channels: width of a key and of a value head; None for `kv_channels`.

    Raises:
        ValueError: the configuration asks for what this module cannot do (a sliding window, a
            softmax offset, keys passed round a ring); the message names the field and its value.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        k_channels: int | None = None,
        v_channels: int | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ):
        super().__init__(config=config)
        _refuse_unsupported(config, layer_number)
        self.attn_mask_type = attn_mask_type
        self.k_channels = k_channels or config.kv_channels
        self.v_channels = v_channels or config.kv_channels
        self.softmax_scale = softmax_scale or 1.0 / math.sqrt(self.k_channels)
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.cp_group: torch.distributed.ProcessGroup | None = None
        if config.context_parallel_size > 1:
            groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups(["cp"])
            self.cp_group = groups.cp

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attend from each query to the keys it may see.

        Args:
            query: [S, B, N, D]
            key: [Sk, B, G, D], N a multiple of G
            value: [Sk, B, G, E]
            attention_mask: boolean, True where a query must NOT see a key (Megatron's sense), of
                a shape that broadcasts to [B, N, S, Sk]; or None.
            attn_mask_type: overrides the module's. Under a causal type the mask comes on top.
            packed_seq_params: the documents of a pack, whose inputs are [S, N, D], [S, G, D] and
                [S, G, E].

        Returns:
            [S, B, N * E]; of a pack [S, N * E]

        Raises:
            ValueError: an attention bias, or no mask where the type needs one; with context
                parallelism or a pack, anything but causal attention of a sequence to itself.
        """
        if attention_bias is not None:
            raise ValueError("attention_bias is not None: backend='torch' takes no attention bias")
        mask_type = attn_mask_type or self.attn_mask_type
        if packed_seq_params is not None:
            offsets = _document_offsets(packed_seq_params, attention_mask, mask_type)
            return self._attend_within_documents(query, key, value, offsets)
        lengths = (query.shape[0], key.shape[0])
        if self.cp_group is not None:
            self._refuse_beyond_causal(attention_mask, mask_type, lengths)
            context_BNSE = self._attend_across_ranks(query, key, value, self.cp_group)
        else:
            keep, is_causal = _visible_keys(attention_mask, mask_type, lengths, query.device)
            context_BNSE = self._attend(query, key, value, keep, is_causal)
        return context_BNSE.permute(2, 0, 1, 3).flatten(2)

    def _refuse_beyond_causal(
        self, mask: Tensor | None, mask_type: AttnMaskType, lengths: tuple[int, int]
    ) -> None:
        plain = mask is None and mask_type is AttnMaskType.causal and lengths[0] == lengths[1]
        if not plain:
            raise ValueError(
                f"context_parallel_size={self.config.context_parallel_size} with attn_mask_type="
                f"{mask_type.name}, {'no' if mask is None else 'an'} attention_mask and "
                f"{lengths[0]} queries for {lengths[1]} keys: backend='torch' shards causal "
                "attention of a sequence to itself only; set context_parallel_size=1"
            )

    def _attend_across_ranks(
        self, query: Tensor, key: Tensor, value: Tensor, group: torch.distributed.ProcessGroup
    ) -> Tensor:
        """Attend from this rank's two chunks of queries to all keys: [B, N, S / CP, E]."""
        both = _gather_in_order(torch.cat([key, value], dim=-1), group)
        return self._attend_in_chunks(query, both, (key.shape[-1], value.shape[-1]), group)

    def _attend_within_documents(
        self, query: Tensor, key: Tensor, value: Tensor, offsets: list[int]
    ) -> Tensor:
        """[S / CP, N * E]: each document's queries over its own keys.

        Args:
            query, key, value: of this rank's share of the pack, [S / CP, heads, width].
            offsets: of the documents in the pack, from 0 to S.
        """
        group, widths = self.cp_group, (key.shape[-1], value.shape[-1])
        ranks = 1 if group is None else group.size()
        both = torch.cat([key, value], dim=-1)[:, None]
        if group is not None:
            both = _gather_documents(both, offsets, group)
        contexts = []
        for start, end in itertools.pairwise(offsets):
            own = query[start // ranks : end // ranks, None]
            document = both[start:end]
            if group is None:
                key, value = document.split(widths, dim=-1)
                contexts.append(self._attend(own, key, value, None, is_causal=True))
            else:
                contexts.append(self._attend_in_chunks(own, document, widths, group))
        return torch.cat(contexts, dim=2)[0].transpose(0, 1).flatten(1)

    def _attend_in_chunks(
        self,
        query: Tensor,
        both: Tensor,
        widths: tuple[int, int],
        group: torch.distributed.ProcessGroup,
    ) -> Tensor:
        """[B, N, S / CP, E]: this rank's two chunks of queries over all of `both`.

        Args:
            both: keys and values [S, B, G, D + E], of these `widths`.
        """
        rank, last = group.rank(), 2 * group.size() - 1
        contexts = []
        for chunk, part in zip((rank, last - rank), query.chunk(2), strict=True):
            seen = (chunk + 1) * part.shape[0]
            key, value = both[:seen].split(widths, dim=-1)
            causal = (part.shape[0], seen)
            keep, is_causal = _visible_keys(None, AttnMaskType.causal, causal, query.device)
            contexts.append(self._attend(part, key, value, keep, is_causal))
        return torch.cat(contexts, dim=2)

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, keep: Tensor | None, is_causal: bool
    ) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        width = value.shape[-1]
        if not query.is_cuda and width < query.shape[-1]:
            # The CPU's flash kernel wants one width for all; without it S x S scores are stored.
            value = F.pad(value, (0, query.shape[-1] - width))
        # As Megatron does: sequence parallelism has already entered the model-parallel generator,
        # which gives each tensor-parallel rank its own heads' dropout.
        fork = dropout > 0 and not self.config.sequence_parallel
        with get_cuda_rng_tracker().fork() if fork else nullcontext():
            context = F.scaled_dot_product_attention(
                query.permute(1, 2, 0, 3),
                key.permute(1, 2, 0, 3),
                value.permute(1, 2, 0, 3),
                attn_mask=keep,
                dropout_p=dropout,
                is_causal=is_causal,
                scale=self.softmax_scale,
                enable_gqa=query.shape[2] != key.shape[2],
            )
        return context[..., :width]


class TensorParallelMLA(LatentAttention):
    """Megatron's MLA with the right gradient of the rotary keys under tensor parallelism.

    All heads share the rotary half of the key, so its gradient is a sum over every rank's heads.
    Megatron (transformer/multi_latent_attention.py) forms that sum where the latent projection is
    Transformer Engine's; with `ColumnParallelLinear` it gathers the latents and keeps, going back,
    each rank's own share: the projection and all before it get wrong gradients. Here the
    projection hands on the whole latents of this rank's tokens, as Transformer Engine's does, by
    one all-to-all instead of gathering them all. Weights and checkpoints are unchanged.

    Raises:
        ValueError: tensor parallelism without sequence parallelism.
    """

    def __init__(self, config: TransformerConfig, *args: object, **kwargs: object):
        super().__init__(config, *args, **kwargs)
        if config.tensor_model_parallel_size == 1:
            return
        if not config.sequence_parallel:
            raise ValueError(
                f"sequence_parallel=False with tensor_model_parallel_size="
                f"{config.tensor_model_parallel_size}: latent attention with backend='torch' needs "
                "it; set sequence_parallel=True"
            )
        self.linear_kv_down_proj.register_forward_hook(self._own_tokens)

    def _own_tokens(
        self, _linear: torch.nn.Module, _args: tuple, output: tuple[Tensor, Tensor | None]
    ) -> tuple[Tensor, Tensor | None]:
        """Turn [S, B, width / TP] of all tokens into [S / TP, B, width] of this rank's."""
        latents, bias = output
        own_TW = all_to_all_hp2sp(latents, group=self.pg_collection.tp)
        return own_TW.unflatten(0, (-1, latents.shape[1])), bias


def _gather_in_order(own: Tensor, group: torch.distributed.ProcessGroup) -> Tensor:
    """Put chunks r and 2 CP - 1 - r of each rank r, [S / CP, ...], in order: [S, ...].

    Going back, each rank's part is the sum of what all ranks' queries ask of it.
    """
    chunks = gather_from_sequence_parallel_region(own, group=group).chunk(2 * group.size())
    return torch.cat(chunks[::2] + chunks[::-2])


def _gather_documents(
    own: Tensor, offsets: list[int], group: torch.distributed.ProcessGroup
) -> Tensor:
    """[S / CP, ...] of this rank -> [S, ...] as the pack runs; back as `_gather_in_order`."""
    ranks = range(group.size())
    held = torch.cat([positions_of_rank(offsets, rank, group.size()) for rank in ranks])
    gathered = gather_from_sequence_parallel_region(own, group=group)
    return gathered[held.argsort().to(own.device)]


def _document_offsets(
    packed: PackedSeqParams, mask: Tensor | None, mask_type: AttnMaskType
) -> list[int]:
    """Return `cu_seqlens`; ValueError unless it says of documents that each attends to itself."""
    causal = mask_type in (AttnMaskType.causal, AttnMaskType.padding_causal)
    others = (packed.cu_seqlens_kv, packed.cu_seqlens_q_padded, packed.cu_seqlens_kv_padded)
    offsets = [] if packed.cu_seqlens_q is None else packed.cu_seqlens_q.tolist()
    alike = all(o is None or o is packed.cu_seqlens_q or o.tolist() == offsets for o in others)
    if packed.qkv_format != "thd" or not causal or mask is not None or not alike:
        raise ValueError(
            f"packed_seq_params with qkv_format={packed.qkv_format!r}, attn_mask_type="
            f"{mask_type.name}, {'no' if mask is None else 'an'} attention_mask and "
            f"{'the same' if alike else 'several'} cu_seqlens: backend='torch' takes packs of "
            "'thd' whose documents attend causally to themselves, with the same cu_seqlens for all"
        )
    return offsets


def _visible_keys(
    attention_mask: Tensor | None,
    mask_type: AttnMaskType,
    lengths: tuple[int, int],
    device: torch.device,
) -> tuple[Tensor | None, bool]:
    """Return the mask of the keys that each query sees (None: all), and whether it is causal."""
    causal = mask_type in (AttnMaskType.causal, AttnMaskType.padding_causal)
    if attention_mask is None:
        if mask_type in (AttnMaskType.padding, AttnMaskType.arbitrary):
            raise ValueError(f"attn_mask_type={mask_type.name} needs an attention_mask")
        if causal and lengths[0] != lengths[1]:
            return _causal_mask(lengths, device), False
        return None, causal
    keep = ~attention_mask.bool()
    return (keep & _causal_mask(lengths, device) if causal else keep), False


def _causal_mask(lengths: tuple[int, int], device: torch.device) -> Tensor:
    """Return the causal mask [S, Sk], whose first Sk - S keys come from a cache."""
    queries, keys = lengths
    all_visible = torch.ones(queries, keys, dtype=torch.bool, device=device)
    return all_visible.tril(diagonal=keys - queries)


def _refuse_unsupported(config: TransformerConfig, layer_number: int) -> None:
    if config.context_parallel_size > 1 and config.cp_comm_type not in (None, "all_gather"):
        raise ValueError(
            f"cp_comm_type={config.cp_comm_type!r}: backend='torch' shares keys and values by "
            "'all_gather' only; set it so, leave it out, or use backend='te'"
        )
    if is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number):
        raise ValueError(
            f"window_size={config.window_size}: backend='torch' has no sliding window; unset it "
            "or use backend='te'"
        )
    if config.softmax_type != "vanilla":
        raise ValueError(
            f"softmax_type={config.softmax_type!r}: backend='torch' has only 'vanilla'; set it or "
            "use backend='te'"
        )
    if config.qk_clip or config.log_max_attention_logit:
        raise ValueError(
            f"qk_clip={config.qk_clip}, log_max_attention_logit={config.log_max_attention_logit}: "
            "backend='torch' never holds the attention logits; unset both or use backend='te'"
        )
