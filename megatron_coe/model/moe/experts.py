"""`GroupedExperts`: all local experts as two grouped linear layers, without Transformer Engine.

Takes the place of Megatron's `SequentialMLP` and `TEGroupedMLP`
(megatron/core/transformer/moe/experts.py): same calls, same arithmetic, same checkpoint keys and
shapes, so a checkpoint written with either of them loads here and the other way round.

Axis letters: T tokens (permuted: sorted by expert), E local experts, N all routed experts,
H hidden, F expert FFN size (of this rank, if expert-tensor-parallel).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.activations import quick_gelu, squared_relu
from megatron.core.dist_checkpointing.mapping import (
    ReplicaId,
    ShardedStateDict,
    ShardedTensor,
    ShardedTensorFactory,
)
from megatron.core.fusions.fused_bias_geglu import weighted_bias_quick_geglu_impl
from megatron.core.fusions.fused_bias_swiglu import weighted_bias_swiglu_impl
from megatron.core.fusions.fused_weighted_squared_relu import weighted_squared_relu_impl
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.random import (
    get_cuda_rng_tracker,
    get_expert_parallel_rng_tracker_name,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_object_for_checkpoint
from torch import Tensor

from megatron_coe.model.moe.dispatcher import Order
from megatron_coe.model.moe.expert_activation import ByAutograd, ExpertActivation, SwiGLU
from megatron_coe.model.moe.grouped_linear import BACKENDS, Backend, choose_backend, grouping
from megatron_coe.model.moe.grouped_mlp import SharedWeights, expert_mlp

Offsets = tuple[tuple[int, int, int], ...]
"""Megatron's sharded offsets: (axis, index of this fragment, number of fragments) each."""


class GroupedLinear(torch.nn.Module):
    """The weight [E, out, in] of the same linear layer of every local expert, no bias.

    Args:
        blocks: equal parts the full weight consists of along the output axis, each sharded over
            the expert-tensor-parallel ranks by itself: 2 where a gate lies over an up projection.
        shard_axis: 1 (outputs) or 2 (inputs), what expert-tensor-parallel ranks divide.

    The parameter carries `allreduce=False`: its gradients are summed over the
    expert-data-parallel group, also with expert parallelism of 1. (Megatron's own experts then
    claim `True` and miss the sum over tensor-parallel ranks, which hold different tokens.)
    """

    def __init__(
        self,
        num_local_experts: int,
        in_features: int,
        out_features: int,
        *,
        config: TransformerConfig,
        init_method: Callable[[Tensor], object],
        shard_axis: int,
        blocks: int,
        pg_collection: ProcessGroupCollection,
    ):
        super().__init__()
        self.shape = (num_local_experts, out_features, in_features)
        self.shard_axis = shard_axis
        self.blocks = blocks
        self.ep, self.tp = pg_collection.ep, pg_collection.expt_tp
        self.dp = pg_collection.expt_dp
        shape = list(self.shape)
        shape[shard_axis] //= self.tp.size()
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = torch.nn.Parameter(
            torch.empty(shape, dtype=config.params_dtype, device=device)
        )
        self.weight.allreduce = False  # type: ignore[attr-defined]  # a mark
        set_tensor_model_parallel_attributes(self.weight, True, shard_axis, stride=1)
        if config.perform_initialization:
            with torch.no_grad():
                if config.use_cpu_initialization:
                    self._initialize_like_one_rank(init_method)
                else:
                    self._initialize(init_method)

    def _initialize(self, init_method: Callable[[Tensor], object]) -> None:
        # Each expert-model-parallel rank has a generator state of its own under this name.
        with get_cuda_rng_tracker().fork(get_expert_parallel_rng_tracker_name()):
            for expert in self.weight:
                init_method(expert)

    def _initialize_like_one_rank(self, init_method: Callable[[Tensor], object]) -> None:
        """Draw every expert of the layer in fp32 on every rank and keep one's own part.

        As `use_cpu_initialization` promises: the same model whatever the layout.
        """
        num_local_experts, *full_shape = self.shape
        first = self.ep.rank() * num_local_experts
        for index in range(self.ep.size() * num_local_experts):
            full = torch.empty(full_shape)
            init_method(full)
            if first <= index < first + num_local_experts:
                self.weight[index - first] = self._local_part(full)

    def _local_part(self, full: Tensor) -> Tensor:
        parts = full.chunk(self.blocks, dim=0)
        own = [p.chunk(self.tp.size(), dim=self.shard_axis - 1)[self.tp.rank()] for p in parts]
        return torch.cat(own)

    def forward(self) -> torch.nn.Parameter:
        """Return the weight, ready to be read.

        Reading the attribute would not do: where the gathering of updated weights overlaps the
        forward pass (`overlap_param_gather`), DDP's hook on the module's call waits for them.
        """
        return self.weight

    def sharded_weight(
        self, key: str, offsets: Offsets, one_key_per_expert: bool
    ) -> ShardedTensor | ShardedTensorFactory:
        """Return the weight as Megatron's experts save it.

        One tensor [N, out, in] under `key`; or, for `one_key_per_expert` (Megatron's
        `singleton_local_shards`), N tensors under `key` with `{}` replaced by the expert's index,
        gate and up apart as `_w` and `_v`.
        """
        replica_id = (0, 0, self.dp.rank())
        if self.blocks == 1 and not one_key_per_expert:
            return self._stacked_shard(0, key, self.weight, replica_id, offsets)
        shard = self._separate_shards if one_key_per_expert else self._stacked_shard

        @torch.no_grad()
        def build(key: str, weight: Tensor, replica_id: ReplicaId, _range: slice | None) -> list:
            blocks: Sequence[Tensor] = weight.chunk(self.blocks, dim=1)
            if not one_key_per_expert:  # an expert by itself is contiguous
                blocks = [block.contiguous() for block in blocks]
            return [shard(b, key, t, replica_id, offsets) for b, t in enumerate(blocks)]

        @torch.no_grad()
        def merge(blocks: list) -> Tensor:
            return torch.cat([torch.stack(b) if one_key_per_expert else b for b in blocks], dim=1)

        return ShardedTensorFactory(key, self.weight, build, merge, replica_id)

    def _stacked_shard(
        self, block: int, key: str, data: Tensor, replica_id: ReplicaId, offsets: Offsets
    ) -> ShardedTensor:
        """Return this rank's experts as one shard of the tensor [N, out, in]."""
        axis = len(offsets)
        rank, size = self.tp.rank(), self.tp.size()
        return ShardedTensor.from_rank_offsets(
            key,
            data,
            *offsets,
            (axis, self.ep.rank(), self.ep.size()),
            (axis + self.shard_axis, rank + block * size, size * self.blocks),
            replica_id=replica_id,
            prepend_axis_num=axis,
        )

    def _separate_shards(
        self, block: int, key: str, data: Tensor, replica_id: ReplicaId, offsets: Offsets
    ) -> list[ShardedTensor]:
        """Each of this rank's experts as a piece of its own tensor [out, in]."""
        axis, first = len(offsets), self.ep.rank() * len(data)
        suffix = ("_w", "_v")[block] if self.blocks == 2 else ""
        return [
            ShardedTensor.from_rank_offsets(
                key.format(first + index) + suffix,
                expert,
                *offsets,
                (axis + self.shard_axis - 1, self.tp.rank(), self.tp.size()),
                replica_id=replica_id,
                prepend_axis_num=axis,
            )
            for index, expert in enumerate(data)
        ]


class GroupedExperts(MegatronModule):
    """The routed experts of this rank: fc2(activation(fc1(x)) * router probability), grouped.

    Parameters: `linear_fc1.weight` [E, 2F, H], gate over up (F rows if not gated), and
    `linear_fc2.weight` [E, H, F]; the sums over expert-tensor-parallel ranks are the dispatcher's.

    Args:
        num_local_experts: E
        pg_collection: needs `ep`, `expt_tp` and `expt_dp`; None for Megatron's global groups.

    Raises:
        ValueError: the configuration asks for what needs Transformer Engine or for biases; the
            message names the field and its value.
    """

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection | None = None,
        name: str | None = None,  # later versions of Megatron tell a module its place in the model
    ):
        super().__init__(config=config)
        groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups(
            ["ep", "expt_tp", "expt_dp"]
        )
        refuse_unsupported(config, groups.expt_tp.size())
        self.num_local_experts = num_local_experts
        self.ep_group = groups.ep
        width = config.moe_latent_size or config.hidden_size
        blocks = 2 if config.gated_linear_unit else 1
        self.linear_fc1 = GroupedLinear(
            num_local_experts,
            width,
            config.moe_ffn_hidden_size * blocks,
            config=config,
            init_method=config.init_method,
            shard_axis=1,
            blocks=blocks,
            pg_collection=groups,
        )
        self.linear_fc2 = GroupedLinear(
            num_local_experts,
            config.moe_ffn_hidden_size,
            width,
            config=config,
            init_method=config.output_layer_init_method,
            shard_axis=2,
            blocks=1,
            pg_collection=groups,
        )
        self.activation = _activation(config)
        self._shared: SharedWeights | None = None
        self.register_load_state_dict_post_hook(_forget_extra_states)

    def forward(
        self,
        permuted_local_hidden_states: Tensor,
        tokens_per_expert: Tensor | Order,
        permuted_probs: Tensor,
    ) -> tuple[Tensor, None]:
        """Run each row through its expert.

        Args:
            permuted_local_hidden_states: [T, H], sorted by local expert
            tokens_per_expert: [E], integers that sum to T; on the host or the device. Or, where
                `gathers_rows`, the order of rows; the other arguments are then those of the tokens
                in their own order, [tokens, H] and [tokens, K].
            permuted_probs: [T], the router's weight of each row

        Returns:
            [T, H] in the dtype of the hidden states, and None for the bias there is none of.
        """
        order, counts = None, tokens_per_expert
        if isinstance(counts, Order):
            order, counts = counts, counts.counts
        x_TH = permuted_local_hidden_states
        probs_T1 = permuted_probs if order else permuted_probs.unsqueeze(-1)
        if self.config.moe_apply_probs_on_input:
            x_TH = (x_TH * probs_T1).to(x_TH.dtype)
            probs_T1 = torch.ones_like(probs_T1)
        groups = grouping(self.backend(), x_TH, counts, order)
        weights = self._shared or self._share_weights()
        fp8_hidden = self.config.activation_func_fp8_input_store
        return expert_mlp(x_TH, probs_T1, weights, groups, self.activation, fp8_hidden), None

    def backend(self) -> Backend:
        """Return what multiplies, for the weights where they are now.

        Raises:
            ValueError: as `choose_backend`.
        """
        w1, w2 = self.linear_fc1.weight, self.linear_fc2.weight
        name = _backend_name(self.config)
        return choose_backend(name, w1.device, w1.dtype, (*w1.shape[1:], *w2.shape[1:]))

    def gathers_rows(self, tokens_TH: Tensor) -> bool:
        """Return whether `forward` takes tokens in their own order, with the order of rows."""
        fused = self.backend() is BACKENDS["triton"] and isinstance(self.activation, SwiGLU)
        return fused and len(tokens_TH) > 0 and not self.config.moe_apply_probs_on_input

    def _share_weights(self) -> SharedWeights:
        return SharedWeights(self.linear_fc1(), self.linear_fc2(), self.backend())

    @contextmanager
    def shared_weights(self) -> Iterator[None]:
        """Let all calls within share one node of the graph for their weights: `SharedWeights`."""
        self._shared = self._share_weights()
        try:
            yield
        finally:
            self._shared = None  # the graph has what it needs of it

    def backward_dw(self) -> None:
        """Do nothing: weight gradients are never delayed here."""

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Offsets = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """Return the keys and shapes of `SequentialMLP` and `TEGroupedMLP`, in both formats."""
        one_key_per_expert = bool((metadata or {}).get("singleton_local_shards"))
        placeholder = "experts.{}." if one_key_per_expert else "experts."
        state: ShardedStateDict = {}
        for name, linear in (("linear_fc1", self.linear_fc1), ("linear_fc2", self.linear_fc2)):
            key = f"{prefix}{placeholder}{name}."
            state[f"{prefix}{name}.weight"] = linear.sharded_weight(
                f"{key}weight", sharded_offsets, one_key_per_expert
            )
            state.update(self._extra_states(f"{prefix}{name}.", key, sharded_offsets))
        return state

    def _extra_states(self, prefix: str, key: str, offsets: Offsets) -> ShardedStateDict:
        """Return the empty extra states, one per expert, that other experts look for on loading."""
        first = self.ep_group.rank() * self.num_local_experts
        total = self.ep_group.size() * self.num_local_experts
        replica_id = (0, self.linear_fc1.tp.rank(), self.linear_fc1.dp.rank())
        one_key_per_expert = "{}" in key
        return {
            f"{prefix}_extra_state{expert}": make_sharded_object_for_checkpoint(
                None,
                f"{key.format(expert)}_extra_state",
                offsets if one_key_per_expert else (*offsets, (len(offsets), expert, total)),
                replica_id,
            )
            for expert in range(first, first + self.num_local_experts)
        }


def _backend_name(config: TransformerConfig) -> str:
    return getattr(config, "moe_grouped_gemm_backend", "auto")  # Megatron's own has no such field


def _activation(config: TransformerConfig) -> ExpertActivation:
    plain = config.activation_func_clamp_value is None and not config.glu_linear_offset
    eager = not config.bias_activation_fusion
    if config.gated_linear_unit and config.activation_func is F.silu and plain and eager:
        return SwiGLU()
    return ByAutograd(partial(_activate, config))


def _activate(config: TransformerConfig, hidden_TF: Tensor, probs_T1: Tensor) -> Tensor:
    """Return activation(hidden) * probs, by Megatron's rules.

    The product is in the wider dtype of the two, the result in that of the hidden states.
    """
    if config.bias_activation_fusion and config.activation_func is F.silu:
        return weighted_bias_swiglu_impl(hidden_TF, None, probs_T1)
    if config.bias_activation_fusion and config.activation_func is quick_gelu:
        return weighted_bias_quick_geglu_impl(
            hidden_TF,
            None,
            probs_T1,
            linear_offset=config.glu_linear_offset,
            clamp_value=config.activation_func_clamp_value,
        )
    if config.use_fused_weighted_squared_relu and config.activation_func is squared_relu:
        return weighted_squared_relu_impl(hidden_TF, probs_T1)
    if config.gated_linear_unit:
        gate, up = hidden_TF.chunk(2, dim=-1)
        if (limit := config.activation_func_clamp_value) is not None:
            gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        if config.glu_linear_offset:
            up = up + config.glu_linear_offset
        activated = config.activation_func(gate) * up
    else:
        activated = config.activation_func(hidden_TF)
    return (activated * probs_T1).to(hidden_TF.dtype)


def _forget_extra_states(module: torch.nn.Module, incompatible_keys: Any) -> None:
    unexpected = incompatible_keys.unexpected_keys
    unexpected[:] = [key for key in unexpected if "_extra_state" not in key]


def refuse_unsupported(config: TransformerConfig, expert_tp: int) -> None:
    """Refuse what these experts cannot do.

    Raises:
        ValueError: for the first field found that grouped experts cannot honor.
    """

    def refuse(field: str, fix: str) -> None:
        raise ValueError(f"{field}={getattr(config, field)!r}: {fix}")

    if config.add_bias_linear:
        refuse("add_bias_linear", "grouped experts have no biases; set it to False")
    for field in ("fp8", "fp4", "use_te_activation_func"):
        if getattr(config, field):
            refuse(field, "needs Transformer Engine's experts; unset it or use backend='te'")
    if config.delay_wgrad_compute:
        refuse("delay_wgrad_compute", "needs Transformer Engine's experts; set it to False")
    offloaded = {"expert_fc1", "moe_act"} & set(config.offload_modules or ())
    if config.fine_grained_activation_offloading and offloaded:
        refuse("offload_modules", f"grouped experts offload nothing; leave out {sorted(offloaded)}")
    if config.moe_ffn_hidden_size % expert_tp:
        refuse(
            "moe_ffn_hidden_size",
            f"must be a multiple of expert_tensor_parallel_size={expert_tp}",
        )
    if config.moe_apply_probs_on_input and config.moe_router_topk != 1:
        refuse("moe_router_topk", "moe_apply_probs_on_input works with moe_router_topk=1 only")
    grouped_gemm_of(config)  # refuses what cannot be used
    if config.bias_activation_fusion:
        fusable = config.gated_linear_unit and config.activation_func in (F.silu, quick_gelu)
        if not fusable:
            refuse(
                "bias_activation_fusion",
                "experts fuse gated silu and gated quick_gelu only; set it to False",
            )


def grouped_gemm_of(config: TransformerConfig) -> str:
    """Return the backend of `BACKENDS` that the grouped experts will use on this machine.

    Raises:
        ValueError: as `choose_backend`.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ffn = config.moe_ffn_hidden_size // (config.expert_tensor_parallel_size or 1)
    widths = (config.moe_latent_size or config.hidden_size, ffn)
    return choose_backend(_backend_name(config), device, config.params_dtype, widths).name
