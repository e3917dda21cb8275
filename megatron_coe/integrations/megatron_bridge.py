"""CoE models in Megatron-Bridge: a model provider, and Hugging Face folders by its `AutoBridge`.

Needs Megatron-Bridge (`megatron.bridge`), which no other module of the package imports. Importing
this module registers `CoEBridge` for `coe_deepseekv2` folders. See docs/megatron_bridge.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from copy import copy, deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from megatron.bridge.models.conversion.mapping_registry import MegatronMappingRegistry
from megatron.bridge.models.conversion.model_bridge import (
    MegatronModelBridge,
    WeightConversionTask,
)
from megatron.bridge.models.conversion.param_mapping import MegatronParamMapping
from megatron.bridge.models.hf_pretrained.causal_lm import PreTrainedCausalLM
from megatron.bridge.models.model_provider import ModelProviderMixin
from megatron.bridge.utils.instantiate_utils import register_allowed_target_prefix
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor
from transformers import PretrainedConfig

import megatron_coe.hf.auto  # noqa: F401 - lets AutoConfig read a folder without its remote code
from megatron_coe.conversion import hf_config
from megatron_coe.hf.weight_names import LAYERS, MTP_MODEL_LAYER, Weight, weights
from megatron_coe.model.provider import CoEModelProvider

# A checkpoint's run_config.yaml names its provider, which Bridge builds from allowed modules only.
register_allowed_target_prefix(f"{__name__}.")


@dataclass
class CoEBridgeProvider(CoEModelProvider, ModelProviderMixin[GPTModel]):
    """`CoEModelProvider` with the fields that Megatron-Bridge's training adds to a provider.

    As with Bridge's own providers, nothing is checked or derived on construction: recipes and
    command lines change fields first, and `finalize` follows.
    """

    vocab_size: int | None = None  # type: ignore[assignment]  # until Bridge fills it in
    """Number of token ids; None: the tokenizer's, filled in by Bridge."""

    should_pad_vocab: bool = False
    """Whether embedding tables are padded, which Bridge sets when it fills in `vocab_size`."""

    init_model_with_meta_device: bool = False
    """Bridge's: build the model on the meta device."""

    tp_comm_overlap_cfg: str | dict | None = None
    """Bridge's: user buffers of `tp_comm_overlap`, a file or its content."""

    hf_model_id: str | None = None
    """Bridge's: where an export finds the tokenizer and other files beside the weights."""

    def __post_init__(self) -> None:
        self._pg_collection: ProcessGroupCollection | None = None

    def __deepcopy__(self, memo: dict[int, object]) -> CoEBridgeProvider:
        """Copy on the same process groups: Megatron's modules copy configurations."""
        memo[id(self._pg_collection)] = self._pg_collection
        memo[id(self)] = other = copy(self)
        other.__dict__ = {name: deepcopy(value, memo) for name, value in vars(self).items()}
        return other

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding tables."""
        if self.should_pad_vocab:
            return super().padded_vocab_size
        return self.vocab_size  # type: ignore[return-value]  # filled in by then

    def provide(  # type: ignore[override]  # Bridge's interface: the groups are set before
        self,
        pre_process: bool | None = None,
        post_process: bool | None = None,
        vp_stage: int | None = None,
    ) -> GPTModel:
        """Build the part of the model that belongs to this pipeline stage, on Bridge's groups."""
        return super().provide(pre_process, post_process, vp_stage, self._pg_collection)


# --- weights ----------------------------------------------------------------------------------


class TableMapping(MegatronParamMapping[dict[str, Tensor]]):
    """One parameter of a model and the Hugging Face weights that it consists of, by the table.

    A tensor-parallel rank's parameter consists of a shard of each of them, along the axis in which
    it is shorter than the unsharded one. Every rank reads and shards the weights itself, so import
    needs no communication. Export gathers a parameter in full: for stacked experts, the tensor of
    all experts of a layer.
    """

    def __init__(self, name: str, weight: Weight, expert: int | None = None) -> None:
        """Map a parameter to a weight of the table, or to a part of it.

        Args:
            name: of the parameter in a model, with the layer's number.
            expert: its number over all ranks, where each expert has a parameter of its own; None
                where one holds all experts of a rank, or none.
        """
        self.weight, self.expert = weight, expert
        super().__init__(name, {})

    @property
    def hf_param(self) -> str | dict[str, str]:
        """Names of the weights that this rank's parameter consists of."""
        names = list(self._part(self.ep_rank).parts)
        return names[0] if len(names) == 1 else {name: name for name in names}

    @hf_param.setter
    def hf_param(self, _: object) -> None:
        """Ignored: the table and the expert-parallel rank determine it, the base class sets it."""

    def _validate_patterns(self) -> None:
        """Nothing to check: the table's names have no wildcards."""

    def resolve(self, captures: tuple[str, ...]) -> TableMapping:
        """Return a mapping of the same parameter; there are no wildcards to fill in."""
        return TableMapping(self.megatron_param, self.weight, self.expert)

    def hf_to_megatron(
        self, hf_weights: Tensor | dict[str, Tensor], megatron_module: torch.nn.Module
    ) -> Tensor:
        """Build this rank's parameter, with the shape, dtype and device of the module's own.

        Raises: ValueError when an embedding table has too few rows.
        """
        parts = list(hf_weights.values()) if isinstance(hf_weights, dict) else [hf_weights]
        name = self.megatron_param.rpartition(".")[2]
        if self.expert is not None:  # Transformer Engine's number the experts of a rank from 0
            name = self._normalize_expert_param_name(name)
        target = getattr(megatron_module, name)
        if self.weight.padded:
            missing = len(target) * self.tp_size - len(parts[0])
            if missing < 0:
                raise ValueError(
                    f"{self.megatron_param} has {len(target) * self.tp_size} rows for the "
                    f"{len(parts[0])} token ids of {self.hf_param}: raise vocab_size"
                )
            parts = [F.pad(parts[0], (0, 0, 0, missing))]
        part = self._part(self.ep_rank)
        axis = _sharded_axis(part, target)
        if axis is not None:
            parts = [each.chunk(self.tp_size, axis)[self.tp_rank] for each in parts]
        joined = part.join(parts)
        return (joined if self.expert is None else joined[0]).to(target)

    def megatron_to_hf(
        self, megatron_weights: Tensor | None, megatron_module: torch.nn.Module | None
    ) -> dict[str, Tensor]:
        """Gather the parameter over all ranks, by name of the weights that it consists of."""
        if megatron_weights is not None:
            megatron_weights = self.maybe_dequantize(megatron_weights)
        shard = self.broadcast_from_pp_rank(megatron_weights, cache_key=self.megatron_param)
        part = self._part(self.ep_rank)
        axis = _sharded_axis(part, shard)
        if self.expert is not None:
            shard = shard[None]
        if axis is None:
            full = shard
        else:
            shards = zip(*map(part.split, self.gather_from_tp_ranks(shard)), strict=True)
            full = part.join([torch.cat(list(each), axis) for each in shards])
        if not self.weight.experts:
            return _named(part, full)
        result: dict[str, Tensor] = {}
        for rank, experts in enumerate(self._gather_from_ep_ranks(full)):
            result |= _named(self._part(rank), experts)
        return result

    def _part(self, ep_rank: int) -> Weight:
        """Return the part of the weight that an expert-parallel rank holds in this parameter."""
        if not self.weight.experts:
            return self.weight
        count = self.weight.experts // self.ep_size
        first = ep_rank * count
        if self.expert is None:
            return self.weight.of_experts(first, count)
        return self.weight.of_experts(first + self.expert % count, 1)

    def _gather_from_ep_ranks(self, tensor: Tensor) -> list[Tensor]:
        if self.ep_size == 1:
            return [tensor]
        gathered = [torch.empty_like(tensor) for _ in range(self.ep_size)]
        torch.distributed.all_gather(gathered, tensor.contiguous(), group=self.ep_group)
        return gathered


class TableRegistry(MegatronMappingRegistry):
    """The table of weight names for one model, looked up by the name of a parameter."""

    def __init__(self, table: Iterable[Weight]) -> None:
        self.table = list(table)
        mappings = [
            TableMapping(name, weight, expert)
            for weight in self.table
            for name, expert in _parameters(weight)
        ]
        super().__init__(*mappings)
        self._by_name = {mapping.megatron_param: mapping for mapping in mappings}

    def megatron_to_hf_lookup(self, megatron_param_name: str) -> TableMapping | None:
        """Look a parameter up as the base class does, which tries every mapping in turn."""
        mapping = self._by_name.get(megatron_param_name)
        return mapping and self._prepare_mapping(mapping)


def _parameters(weight: Weight) -> Iterator[tuple[str, int | None]]:
    """Return the parameters that hold a weight, for every backend: (name, expert)."""
    for key in weight.keys:
        name = key.replace(LAYERS, f"{LAYERS}{weight.layer}.", 1)
        name = name.replace(".transformer_layer.", MTP_MODEL_LAYER)
        if not weight.experts:
            yield name, None
            continue
        name = name.replace(".experts.experts.", ".experts.")
        yield name, None
        for expert in range(weight.experts):
            yield f"{name}{expert}", expert  # Transformer Engine's
            yield name.replace(".experts.", f".experts.local_experts.{expert}."), expert


def _sharded_axis(weight: Weight, shard: Tensor) -> int | None:
    """Return the axis, counted from the last, along which TP ranks shard a weight."""
    full = weight.join([torch.empty(shape, device="meta") for shape in weight.parts.values()])
    axes = range(-shard.ndim, 0)
    return next((axis for axis in axes if full.shape[axis] != shard.shape[axis]), None)


def _named(weight: Weight, full: Tensor) -> dict[str, Tensor]:
    parts = dict(zip(weight.parts, weight.split(full), strict=True))
    return parts | {copy: part.clone() for copy in weight.copies for part in parts.values()}


# --- models -----------------------------------------------------------------------------------


@MegatronModelBridge.register_bridge(
    source="CoeForCausalLM",
    target=GPTModel,
    provider=CoEBridgeProvider,
    model_type=hf_config.MODEL_TYPE,
)
class CoEBridge(MegatronModelBridge):
    """Bridge of CoE models between Hugging Face's format and `CoEBridgeProvider`.

    Stricter than Bridge's own: a weight that is missing, left over or unknown is an error, where
    those log a warning and leave the parameter as it was.
    """

    def provider_bridge(self, hf_pretrained: PreTrainedCausalLM) -> CoEBridgeProvider:
        """Return the provider for a Hugging Face configuration.

        Raises: ValueError for a key that is missing, contradicts another or is not supported.
        """
        config = hf_pretrained.config
        dtype = self.dtype_from_hf(config, default=torch.float32)
        return CoEBridgeProvider(
            **_model_fields(config),
            seq_length=config.max_position_embeddings,
            fp16=dtype == torch.float16,
            bf16=dtype == torch.bfloat16,
            params_dtype=dtype,
            pipeline_dtype=dtype,
        )

    @classmethod
    def megatron_to_hf_config(cls, provider: CoEModelProvider) -> hf_config.Config:
        """Return `config.json` of a model, without what only a tokenizer knows.

        Raises: ValueError naming a field that the format cannot express.
        """
        config = {"max_position_embeddings": provider.seq_length, **cls._describe(provider)}
        return config | {"torch_dtype": str(provider.params_dtype).removeprefix("torch.")}

    _describe = staticmethod(hf_config.to_hf_config)

    def mapping_registry(self) -> TableRegistry:
        """Return the table of weight names for the model of `hf_config`."""
        return TableRegistry(weights(CoEBridgeProvider(**_model_fields(self.hf_config))))

    def build_conversion_tasks(
        self,
        hf_pretrained: PreTrainedCausalLM | PretrainedConfig,
        megatron_model: list[GPTModel],
        weight_dtype: torch.dtype | None = None,
    ) -> list[WeightConversionTask]:
        """List the tasks of the base class, once all weights of both sides are accounted for.

        Raises: ValueError naming the first weight that is missing, left over or unknown.
        """
        self.hf_pretrained = hf_pretrained
        self.hf_config = getattr(hf_pretrained, "config", hf_pretrained)
        registry = self.mapping_registry()
        if not isinstance(hf_pretrained, PretrainedConfig):
            _account_for(registry.table, hf_pretrained)
        for name in self._megatron_global_param_names_all_pp_ranks(megatron_model):
            name = self._get_lora_unwrapped_name(name)
            tied = self.hf_config.tie_word_embeddings and "output_layer" in name
            if registry.megatron_to_hf_lookup(name) is None and not tied:
                raise ValueError(
                    f"the model has {name}, which is no weight of the model that the Hugging Face "
                    "configuration describes"
                )
        return super().build_conversion_tasks(hf_pretrained, megatron_model, weight_dtype)


class CoEDeepseekV2Bridge(CoEBridge):
    """Bridge of standard MoE models (one iteration, residual mode `outer`), as DeepSeek-V2."""

    _describe = staticmethod(hf_config.to_deepseek_v2_config)

    def mapping_registry(self) -> TableRegistry:
        """Return the base class's table; a model with independent routers numbers its only one."""
        table = super().mapping_registry().table
        return TableRegistry([*table, *filter(None, map(_with_numbered_router, table))])


def register_deepseek_v2() -> None:
    """Register `CoEDeepseekV2Bridge` for folders of DeepSeek-V2, in this process.

    A call of its own, since it replaces Bridge's own bridge for the family.
    """
    MegatronModelBridge.register_bridge(
        source="DeepseekV2ForCausalLM",
        target=GPTModel,
        provider=CoEBridgeProvider,
        model_type=hf_config.DEEPSEEK_V2,
    )(CoEDeepseekV2Bridge)


def _with_numbered_router(weight: Weight) -> Weight | None:
    keys = [key for key in weight.keys if ".mlp.router." in key]
    numbered = tuple(key.replace(".mlp.router.", ".mlp.router.0.") for key in keys)
    return replace(weight, keys=numbered) if numbered else None


def _account_for(table: Iterable[Weight], hf_pretrained: PreTrainedCausalLM) -> None:
    expected = {name for weight in table for name in weight.parts}
    copies = {name for weight in table for name in weight.copies}
    present = set(hf_pretrained.state.source.get_all_keys()) - copies
    where = hf_pretrained.model_name_or_path
    for name in sorted(expected - present):
        raise ValueError(f"{where}: lacks {name}, which its configuration implies")
    for name in sorted(present - expected):
        raise ValueError(
            f"{where}: holds {name}, which is no weight of the model that its configuration "
            "describes"
        )


def _model_fields(config: PretrainedConfig) -> dict[str, Any]:
    return hf_config.to_model_fields(config.to_dict(), config.name_or_path or "configuration")
