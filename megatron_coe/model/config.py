"""`CoEConfig`: Megatron's transformer configuration plus the fields of Chain-of-Experts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as F
from megatron.core.activations import quick_gelu, squared_relu
from megatron.core.transformer.transformer_config import MLATransformerConfig
from megatron.core.utils import init_method_normal

from megatron_coe.megatron_compat.versions import no_graph_scopes
from megatron_coe.model import field_rules, flops
from megatron_coe.model.parallelism import check_layout, extents_of, layout_of
from megatron_coe.utils.value_rules import one_of

RESIDUAL_STREAM_MODES = ("outer", "inner_outer")
"""The modes whose layer adds the residual stream h to the last iteration's result."""

ACTIVATIONS: dict[str, Callable] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "relu": F.relu,
    "quick_gelu": quick_gelu,
    "squared_relu": squared_relu,
}


@dataclass
class CoEConfig(MLATransformerConfig):
    """Configuration of a Chain-of-Experts transformer; all inherited fields keep Megatron's names.

    Megatron's own defaults describe a 2020 GPT; those overridden here are the paper's model
    (DeepSeek-V2-Lite shape, arXiv 2506.18945) as far as they do not depend on the size.

    The residual modes, for x(0) = norm(h), f_t = routed and shared experts of iteration t, and the
    residual stream h after attention (paper, section 3 and equation 10):

    | mode          | x(t)               | layer output |
    |---------------|--------------------|--------------|
    | `inner`       | x(t-1) + f_t(x(t-1)) | x(C)       |
    | `outer`       | f_t(x(t-1))        | h + x(C)     |
    | `addinit`     | x(0) + f_t(x(t-1)) | x(C)         |
    | `inner_outer` | x(t-1) + f_t(x(t-1)) | h + x(C)   |
    | `none`        | f_t(x(t-1))        | x(C)         |

    Raises:
        ValueError: a field is out of range or does not fit another; the message names the field,
            its value and what would be legal.
    """

    coe_iterations: int = 2
    """C: how often a token passes through the layer's experts. 1 is a standard MoE."""

    coe_residual: str = "inner"
    """How iterations are joined, one of `field_rules.RESIDUAL_MODES`."""

    coe_independent_gate: bool = True
    """True: a router per iteration. False: one router for all, asked again on every x(t-1)."""

    coe_upcycled: bool = False
    """The model is upcycled from a standard MoE (C = 1, `outer`): later iterations enter through
    learnable iteration scales a_t [H], which start at zero, where the layer is still that MoE:
    x(1) = f_1(x(0)), x(t) = x(t-1) + a_t * f_t(x(t-1)) for t >= 2, output h + x(C)."""

    vocab_size: int = 0
    """Number of token ids. 0 while it is not known: the tables then count nothing."""

    make_vocab_size_divisible_by: int = 128
    """The embedding tables are padded to a multiple of this and of the tensor-parallel size."""

    share_embeddings_and_output_weights: bool = False
    """Tie the output layer to the embedding table."""

    moe_router_group_score: str = "sum"
    """What ranks a group where `moe_router_group_topk` limits a token to some: `sum` of its
    K // moe_router_group_topk best experts (Megatron's, DeepSeek-V3's), or its `max` (V2's)."""

    # Megatron's fields with the defaults of this family of models.
    add_bias_linear: bool = False
    gated_linear_unit: bool = True
    activation_func: Callable | str = "silu"
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    layernorm_epsilon: float = 1e-6
    q_lora_rank: int | None = None
    qk_layernorm: bool | None = None
    """None: as the attention is usually built, with the latent norm for MLA, without otherwise."""
    rope_type: str | None = None
    """None: `yarn` for MLA and `rope` otherwise, the only type plain attention has here."""
    mscale: float = 0.707
    mscale_all_dim: float = 0.707
    moe_grouped_gemm: bool = True
    moe_grouped_gemm_backend: str = "auto"
    """What multiplies in grouped experts that are not Transformer Engine's modules: `grouped_mm`
    (torch), `triton` (this package's kernels), `te` (Transformer Engine's products), `loop`, or
    `auto`, what was measured to be the fastest (`megatron_coe.model.moe.grouped_linear`)."""

    moe_token_dispatcher_type: str = "alltoall"
    """`alltoall`: those of `megatron_coe.model.moe.dispatcher`, without communication where a rank
    holds all experts whole, with all-to-alls that run under the shared expert where experts are
    sharded. `megatron_alltoall`: Megatron's own, for comparison; the numbers are the same."""

    cross_entropy_loss_fusion: bool | None = None
    """Fuse the loss with what stands before it. None: if `cross_entropy_fusion_impl` is `linear`
    and the model on a GPU."""

    cross_entropy_fusion_impl: str = "linear"
    """What is fused: `linear`, output layer and loss, chunk by chunk, without ever holding all
    logits (`megatron_coe.model.linear_cross_entropy`, any device); or the loss of logits alone, as
    Megatron (`native`) or Transformer Engine (`te`) does it."""

    moe_router_topk: int = 4
    moe_router_pre_softmax: bool = True
    moe_router_dtype: str | None = "fp32"
    moe_router_load_balancing_type: str | list[str] = "seq_aux_loss"
    moe_aux_loss_coeff: float | list[float] = 1e-3
    cuda_graph_scope: str | list | None = field(default_factory=no_graph_scopes)

    def __post_init__(self) -> None:
        field_rules.check_fields(self)
        if isinstance(self.activation_func, str):
            one_of(*ACTIVATIONS).check("activation_func", self.activation_func)
            self.activation_func = ACTIVATIONS[self.activation_func]
        if getattr(self, "cuda_graph_modules", None) == "full":
            # What 0.19 calls its own default, which it warns about.
            self.cuda_graph_modules: list[str] = []
        self._check_iterations()
        self._check_experts()
        self._check_layout()
        if self.qk_layernorm is None:
            self.qk_layernorm = self.multi_latent_attention
        if self.rope_type is None:
            self.rope_type = "yarn" if self.multi_latent_attention else "rope"
        self._check_plain_attention()
        self._check_rope()
        if self.output_layer_init_method is None:
            # The authors draw every linear with one std; Megatron would scale the output ones down.
            self.output_layer_init_method: Any = init_method_normal(self.init_method_std)
        with self.known_dispatcher():
            super().__post_init__()

    @contextmanager
    def known_dispatcher(self) -> Iterator[None]:
        """Name Megatron's own dispatcher as Megatron does, while its code reads the field."""
        kind = self.moe_token_dispatcher_type
        self.moe_token_dispatcher_type = kind.removeprefix("megatron_")
        try:
            yield
        finally:
            self.moe_token_dispatcher_type = kind

    # -- what it describes -------------------------------------------------------------------

    @property
    def adds_residual(self) -> bool:
        """Return whether the layer's output is h + x(C) (True) or x(C) alone."""
        return self.coe_residual in RESIDUAL_STREAM_MODES

    @property
    def dispatches_locally(self) -> bool:
        """Return whether the local dispatcher serves: it drops and pads no token."""
        one_rank = self.expert_model_parallel_size == self.expert_tensor_parallel_size == 1
        dense_map = (
            self.moe_router_fusion
            or self.moe_expert_capacity_factor is not None
            or self.moe_router_padding_for_quantization
        )
        return self.moe_token_dispatcher_type == "alltoall" and one_rank and not dense_map

    @property
    def dispatches_asynchronously(self) -> bool:
        """Return whether tokens go to other ranks while the shared expert computes.

        Megatron's `moe_shared_expert_overlap` is its own way to do so, on CUDA streams.
        """
        spread = self.expert_model_parallel_size > 1 and not self.moe_shared_expert_overlap
        return self.moe_token_dispatcher_type == "alltoall" and spread

    def fuses_output_layer(self, on_gpu: bool) -> bool:
        """Return whether a model on such a device computes its losses without all logits."""
        if self.cross_entropy_fusion_impl != "linear":
            return False
        if self.cross_entropy_loss_fusion is None:
            return on_gpu and not field_rules.needs_logits(self)
        return self.cross_entropy_loss_fusion

    @property
    def padded_vocab_size(self) -> int:
        """Return the rows of the embedding tables: alike where TP divides the padding."""
        multiple = math.lcm(self.make_vocab_size_divisible_by, self.tensor_model_parallel_size)
        return -(-self.vocab_size // multiple) * multiple

    @property
    def moe_layer_pattern(self) -> list[int]:
        """Return 1 for each CoE layer and 0 for each dense one, by `moe_layer_freq` [L]."""
        if isinstance(self.moe_layer_freq, int):
            return [int(i % self.moe_layer_freq == 0) for i in range(self.num_layers)]
        return list(self.moe_layer_freq)

    def num_params(self, embeddings: bool = True) -> int:
        """Count the parameters, with or without embedding table and output layer."""
        return flops.decoder_work(self).stored + embeddings * flops.embedding_params(self)

    def num_active_params(self, embeddings: bool = True) -> int:
        """Count the parameters that one token can touch, each once.

        A token reaches at most C * K distinct routed experts of a layer: that bound is counted.
        """
        return flops.decoder_work(self).active + embeddings * flops.embedding_params(self)

    def flops_per_token(self, seq_length: int) -> int:
        """Return the floating-point operations of training on one token, forward and backward."""
        return flops.flops_per_token(self, seq_length)

    # -- checks --------------------------------------------------------------------------------

    def _check_iterations(self) -> None:
        if self.coe_upcycled and self.coe_residual != "outer":
            raise ValueError(
                f"coe_upcycled=True with coe_residual={self.coe_residual!r}: an upcycled layer "
                "adds its result to the residual stream, as the MoE it came from, and scales later "
                "iterations. Set coe_residual='outer'."
            )
        if self.hidden_dropout > 0 and not self.adds_residual:
            raise ValueError(
                f"hidden_dropout={self.hidden_dropout} with coe_residual={self.coe_residual!r}: "
                "the layer's output is the residual stream itself, which dropout would destroy. "
                f"Set hidden_dropout=0, or coe_residual to one of {RESIDUAL_STREAM_MODES}."
            )

    def _check_experts(self) -> None:
        N, K = self.num_moe_experts, self.moe_router_topk
        if N is None:
            raise ValueError(
                "num_moe_experts=None: a CoE model needs the number of routed experts."
            )
        if K > N:
            raise ValueError(
                f"moe_router_topk={K} is larger than num_moe_experts={N} (routed experts, the "
                f"shared one not counted): choose at most {N}."
            )
        self._check_groups()
        frequency = self.moe_layer_freq
        if not isinstance(frequency, int) and len(frequency) != self.num_layers:
            raise ValueError(
                f"moe_layer_freq={frequency}: give an integer, or a list of num_layers="
                f"{self.num_layers} entries, 1 for a CoE layer and 0 for a dense one."
            )

    def _check_layout(self) -> None:
        check_layout(layout_of(self), extents_of(vars(self)))
        self._check_uneven_stages()
        if self.tensor_model_parallel_size == 1 and self.sequence_parallel:
            raise ValueError(
                "sequence_parallel=True with tensor_model_parallel_size=1: there is nothing to "
                "divide the sequence over. Set it to false."
            )

    def _check_uneven_stages(self) -> None:
        """Check what Megatron, which checks these fields' other values, finds in building."""
        first = self.num_layers_in_first_pipeline_stage or 0
        last = self.num_layers_in_last_pipeline_stage or 0
        if first + last > self.num_layers:
            raise ValueError(
                f"num_layers_in_first_pipeline_stage={first or None}, "
                f"num_layers_in_last_pipeline_stage={last or None}: more than num_layers="
                f"{self.num_layers} together. Lower them."
            )
        chunks = self.pipeline_model_parallel_size * (
            self.virtual_pipeline_model_parallel_size or 1
        )
        entries = self.num_layers + self.account_for_embedding_in_pipeline_split + 1  # the loss
        if self.mtp_num_layers and self.account_for_loss_in_pipeline_split and entries == chunks:
            raise ValueError(
                f"account_for_loss_in_pipeline_split=True with num_layers={self.num_layers} over "
                f"{chunks} stages and mtp_num_layers={self.mtp_num_layers}: the last stage has no "
                "decoder layer for the predicted tokens. Set it to false, or use fewer stages."
            )

    def _check_groups(self) -> None:
        N, K = self.num_moe_experts, self.moe_router_topk
        groups, kept = self.moe_router_num_groups, self.moe_router_group_topk
        if not kept:
            return
        if not groups or N % groups or not kept <= groups or kept * (N // groups) < K:
            raise ValueError(
                f"moe_router_num_groups={groups}, moe_router_group_topk={kept}: num_moe_experts="
                f"{N} must divide into the groups, and the kept ones hold at least "
                f"moe_router_topk={K} experts."
            )
        if self.moe_router_group_score == "sum" and kept > K:
            raise ValueError(
                f"moe_router_group_topk={kept} is larger than moe_router_topk={K}: a group would "
                "be ranked by the sum of no expert. Keep at most as many groups as experts, or set "
                "moe_router_group_score='max'."
            )
        if self.moe_router_group_score == "max" and self.moe_router_fusion:
            raise ValueError(
                "moe_router_fusion=True with moe_router_group_score='max': the fused kernel ranks "
                "groups by a sum. Set moe_router_fusion=false."
            )

    def _check_plain_attention(self) -> None:
        """Check what Megatron's module finds out in the first step."""
        if self.multi_latent_attention:
            return
        heads, groups = self.num_attention_heads, self.num_query_groups
        if groups and heads % groups:
            raise ValueError(
                f"num_query_groups={groups} does not divide num_attention_heads={heads}: each "
                "group serves the same number of heads."
            )
        width = self.kv_channels or self.hidden_size // heads
        turned = int(width * self.rotary_percent)
        if turned + turned % 2 > width:
            raise ValueError(
                f"kv_channels={width} (hidden_size / num_attention_heads, if it is not set): must "
                "be even, rotary embeddings turn pairs."
            )

    def _check_rope(self) -> None:
        legal = ("rope", "yarn") if self.multi_latent_attention else ("rope",)
        if self.rope_type not in legal:
            raise ValueError(
                f"rope_type={self.rope_type!r} with "
                f"multi_latent_attention={self.multi_latent_attention}: choose "
                f"{' or '.join(map(repr, legal))}."
            )
