"""`Plan`: a model parallelized over a number of processes, with the batch that they share."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.transformer_block import get_num_layers_to_build

from megatron_coe.model.parallelism import Layout, layout_of
from megatron_coe.model.provider import CoEModelProvider

Chunk = list[bool]
"""Decoder layers of one model chunk: whether each is a CoE layer (True) or dense."""


@dataclass(frozen=True)
class Plan:
    """What decides the cost of a step; the layout itself is in `model`, under Megatron's names.

    The quantities below are of one rank. Experts are taken to be equally loaded.
    """

    model: CoEModelProvider
    world_size: int = 1
    micro_batch_size: int = 1
    global_batch_size: int = 1
    use_distributed_optimizer: bool = False
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False
    on_gpu: bool = True
    """Which kernels run: a CPU's save some tensors more for the backward pass."""
    averages: bool = False
    """Whether a moving average of the weights is kept."""
    freeze: tuple[str, ...] = ()
    """Patterns of the weights that are not trained (`model.freezing`)."""
    optimizer: str = "adam"

    @property
    def element_size(self) -> int:
        """Return the bytes of a weight or an activation."""
        return self.model.params_dtype.itemsize

    @cached_property
    def layout(self) -> Layout:
        """Return the parallel sizes."""
        return layout_of(self.model)

    @property
    def data_parallel(self) -> int:
        """Return the number of data-parallel ranks, which read different sequences."""
        return self.layout.data_parallel_size(self.world_size)

    @property
    def dense_data_parallel_size(self) -> int:
        """Return how many ranks hold the same dense weights and shard their optimizer state."""
        return self.data_parallel * self.model.context_parallel_size

    @property
    def expert_data_parallel_size(self) -> int:
        """Return how many ranks hold the same experts and shard their optimizer state."""
        return self.world_size // self.layout.expert_ranks

    @property
    def num_microbatches(self) -> int:
        """Return the micro-batches that each data-parallel rank runs per step."""
        return max(1, self.global_batch_size // (self.micro_batch_size * self.data_parallel))

    @property
    def tokens(self) -> int:
        """Return the tokens of a micro-batch in this rank's attention heads: S * B / CP."""
        model = self.model
        return self.micro_batch_size * model.seq_length // model.context_parallel_size

    @property
    def own_tokens(self) -> int:
        """Return those it holds between the matrix products: under TP, S is sharded again."""
        return self.tokens // self.model.tensor_model_parallel_size

    @property
    def routed_rows(self) -> int:
        """Return the dispatched tokens of one iteration of one micro-batch on this rank."""
        return self.own_tokens * self.model.moe_router_topk * self.layout.expert_tp

    @cached_property
    def chunks(self) -> list[list[Chunk]]:
        """Return the layers by pipeline stage and, within it, model chunk [PP][VPP][layers]."""
        model = self.model
        stages = model.pipeline_model_parallel_size
        vp_stages = model.virtual_pipeline_model_parallel_size or 1
        chunks: list[list[Chunk]] = [[] for _ in range(stages)]
        pattern = iter(model.moe_layer_pattern)
        for vp_stage in range(vp_stages):
            for stage in range(stages):
                count = self._num_layers(stage, vp_stage)
                chunks[stage].append([bool(next(pattern)) for _ in range(count)])
        return chunks

    @cached_property
    def layer_numbers(self) -> list[set[int]]:
        """Return the numbers of the decoder layers of each pipeline stage."""
        model, first = self.model, 0
        numbers: list[set[int]] = [set() for _ in self.chunks]
        for vp_stage in range(model.virtual_pipeline_model_parallel_size or 1):
            for stage, chunks in enumerate(self.chunks):
                count = len(chunks[vp_stage])
                numbers[stage] |= set(range(first, first + count))
                first += count
        return numbers

    @cached_property
    def distinct_stages(self) -> list[int]:
        """Return the first pipeline stage of each kind.

        Later ones with the same layers take the same time and, with fewer micro-batches in flight,
        no more memory.
        """
        last = len(self.chunks) - 1
        if self.freeze:  # which may tell layers of one kind apart
            return list(range(len(self.chunks)))
        kinds: dict[tuple, int] = {}
        for stage, chunks in enumerate(self.chunks):
            layers = tuple(tuple(chunk) for chunk in chunks)
            kinds.setdefault((layers, stage == 0, stage == last), stage)
        return list(kinds.values())

    def recomputes(self, module: str) -> bool:
        """Return whether selective recomputation covers a module, a name of Megatron's."""
        model = self.model
        modules = model.recompute_modules or ()
        return model.recompute_granularity == "selective" and module in modules

    def layers(self, stage: int) -> Chunk:
        """Return all layers of a pipeline stage, with multi-token prediction's on the last."""
        layers = [is_moe for chunk in self.chunks[stage] for is_moe in chunk]
        if stage == len(self.chunks) - 1:
            layers += [bool(self.model.moe_layer_pattern[-1])] * (self.model.mtp_num_layers or 0)
        return layers

    def _num_layers(self, stage: int, vp_stage: int) -> int:
        layout = self.model.pipeline_model_parallel_layout
        if layout is not None:  # Megatron's function would ask for this process's own stage
            return layout.layout[stage][vp_stage].count(LayerType.decoder)
        return get_num_layers_to_build(self.model, vp_stage=vp_stage, pp_rank=stage)
