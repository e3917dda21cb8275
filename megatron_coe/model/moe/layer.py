"""`CoELayer`: a Megatron MoE layer whose tokens pass through its experts C times in sequence.

Plugs into megatron/core/transformer/moe/moe_layer.py by overriding `forward` over the parent's
named phases (route, preprocess, dispatch, routed_experts_compute, combine, postprocess). One
dispatcher serves all iterations: autograd keeps each pass's permutation and split sizes, and
between two passes nothing reads what the dispatcher remembers of the former.

Axis letters: S sequence, B batch, H hidden, C iterations.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher
from torch import Tensor

from megatron_coe.model.config import CoEConfig
from megatron_coe.model.moe.dispatcher import AsyncDispatcher, LocalDispatcher
from megatron_coe.model.moe.experts import GroupedExperts


class CoELayer(MoELayer):
    """C iterations x(t) = base + f_t(x(t-1)) over one pool of experts (paper, section 3).

    f_t is one MoE pass: router t, K routed experts per token, and the shared expert. `base` depends
    on `config.coe_residual` (see `CoEConfig`); whether the residual stream h is added is the layer
    spec's business (`megatron_coe.model.layer_specs`).

    An upcycled layer has iteration scales, `coe_weights.{t}` [H] for t = 1 ... C - 1, from 0.
    """

    def __init__(
        self,
        config: CoEConfig,
        submodules: MoESubmodules | None = None,
        layer_number: int | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **later: bool | str | None,
    ) -> None:
        """`later`: what only Megatron's later versions give and take (`is_mtp_layer`, `name`)."""
        with config.known_dispatcher():
            super().__init__(config, submodules, layer_number, pg_collection, **later)
        self._choose_dispatcher(pg_collection or get_default_pg_collection())
        for parameter in self.experts.parameters():
            # Megatron reduces expert gradients over all data-parallel ranks only if EP > 1; with
            # TP > 1 and EP = ETP = 1 it forgets the TP ranks (tensor_parallel/layers.py, line 829).
            parameter.allreduce = False
        if config.coe_upcycled:
            self.coe_weights = torch.nn.ParameterDict(
                {str(t): _iteration_scale(config) for t in range(1, config.coe_iterations)}
            )

    def forward(
        self,
        hidden_states: Tensor,
        intermediate_tensors: tuple | None = None,
        padding_mask: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        """Run the C iterations on x(0), the normed residual stream.

        Args:
            hidden_states: x(0) [S, B, H]; with sequence parallelism this rank's part of S.
            intermediate_tensors: None; Megatron's CUDA-graph capture of part of a layer uses it.
            padding_mask: [B, S], bool, True at padding, which the auxiliary losses then leave out.

        Returns:
            x(C) [S, B, H] and None, the absent bias.

        Raises:
            ValueError: training with tensor but without sequence parallelism, as in the parent.
        """
        if intermediate_tensors is not None:
            raise ValueError("CoELayer: a layer captured in part by a CUDA graph cannot iterate.")
        if self.training and self.attn_tp_group.size() > 1 and not self.config.sequence_parallel:
            raise ValueError(
                f"sequence_parallel=False with tensor_model_parallel_size="
                f"{self.attn_tp_group.size()}: an MoE layer trains under tensor parallelism only "
                "with sequence parallelism. Set sequence_parallel=true."
            )
        if padding_mask is not None:
            padding_mask = padding_mask.transpose(0, 1).bool()

        residual, upcycled = self.config.coe_residual, self.config.coe_upcycled
        x_0 = x = hidden_states
        with self._weights_shared():
            for t in range(self.config.coe_iterations):
                if upcycled and t > 0:
                    x = x + self.coe_weights[str(t)] * self._iterate(t, x, None, padding_mask)
                elif residual in ("inner", "inner_outer"):
                    x = self._iterate(t, x, x, padding_mask)
                elif residual == "addinit":
                    x = self._iterate(t, x, x_0, padding_mask)
                else:  # "outer", "none"
                    x = self._iterate(t, x, None, padding_mask)
        return x, None

    def _weights_shared(self) -> AbstractContextManager[None]:
        """Let the iterations share one node of the graph for the experts' weights.

        An iteration that is recomputed by itself has a graph of its own, and shares nothing.
        """
        if isinstance(self.experts, GroupedExperts) and not self.moe_layer_recompute:
            return self.experts.shared_weights()
        return nullcontext()

    def route(
        self, hidden_states: Tensor, padding_mask: Tensor | None = None, iteration: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Run the parent's phase with the router of iteration t = `iteration` + 1.

        Returns probabilities and assignment as the dispatcher takes them: see `CoERouter.forward`.
        """
        as_indices = self.config.dispatches_locally
        return self.router(hidden_states, padding_mask, iteration, as_indices)

    def _choose_dispatcher(self, groups: ProcessGroupCollection) -> None:
        """Take one of ours in place of the parent's, where there is one for the layout."""
        if self.config.dispatches_locally:
            overlapped = self.token_dispatcher.shared_experts
            self.token_dispatcher: MoETokenDispatcher = LocalDispatcher(self.config, groups)
            if isinstance(self.experts, GroupedExperts):
                self.token_dispatcher.experts_gather = self.experts.gathers_rows
            if overlapped is not None:
                self.token_dispatcher.set_shared_experts(overlapped)
        elif self.config.dispatches_asynchronously:
            self.token_dispatcher = AsyncDispatcher(
                self.num_local_experts, self.local_expert_indices, self.config, groups
            )

    def _iterate(
        self, t: int, x: Tensor, base: Tensor | None, padding_mask: Tensor | None
    ) -> Tensor:
        """Return base + f_t(x(t-1)), recomputed going back if `recompute_modules` has "moe".

        Each iteration is recomputed by itself, so that the activations of only one are alive.
        """
        if not self.moe_layer_recompute:
            return self._experts_pass(t, x, base, padding_mask)
        run = partial(self._experts_pass, t)
        if self.config.fp8 or self.config.fp4:
            from megatron.core.extensions.transformer_engine import te_checkpoint

            tracker = tensor_parallel.random.get_cuda_rng_tracker
            group = parallel_state.get_tensor_model_parallel_group()
            return te_checkpoint(run, False, tracker, group, x, base, padding_mask)
        return tensor_parallel.checkpoint(run, False, x, base, padding_mask)

    def _experts_pass(
        self, t: int, x: Tensor, base: Tensor | None, padding_mask: Tensor | None
    ) -> Tensor:
        """One pass of Megatron's phases, with router t, added to `base`."""
        is_async = self.config.dispatches_asynchronously
        shared_output = None if is_async else self.shared_experts_compute(x)
        probs, routing_map = self.route(x, padding_mask, iteration=t)
        hidden_states, probs = self.preprocess(x, probs, routing_map)
        dispatched, probs = self.dispatch(hidden_states, probs)
        if is_async:
            shared_output = self.shared_experts_compute(x)
        if isinstance(self.token_dispatcher, LocalDispatcher) and not self.config.moe_latent_size:
            addends = [addend for addend in (shared_output, base) if addend is not None]
            self.token_dispatcher.addends = tuple(addends)
            shared_output = base = None
        output, _ = self.routed_experts_compute(dispatched, probs)
        output = self.postprocess(self.combine(output), shared_output)
        return output if base is None else base + output


def _iteration_scale(config: CoEConfig) -> torch.nn.Parameter:
    """Return an upcycled iteration's scale [H] as it starts: the iteration adds nothing yet."""
    scale = torch.nn.Parameter(torch.zeros(config.hidden_size, dtype=config.params_dtype))
    # Each rank sees its part of the sequence: Megatron sums such gradients over the TP ranks.
    scale.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]  # a mark
    return scale


def get_bias_add_without_residual(training: bool, fused: bool) -> Callable[..., Tensor]:
    """Return the `mlp_bda` of modes without residual stream: the output is x(C), h is not added.

    Has the interface of `get_bias_dropout_add` (megatron/core/fusions/fused_bias_dropout.py);
    `CoEConfig` has made sure that there is no dropout to apply.
    """

    def output_of(
        x_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, prob: float
    ) -> torch.Tensor:
        x, bias = x_with_bias
        return x if bias is None else x + bias

    return output_of
