"""`CoeForCausalLM` of vLLM's layers: what `megatron_coe.hf.modeling_coe` computes, in its engine.

Axis letters: T tokens, H hidden, N routed experts, K chosen per token and iteration,
C iterations.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import partial
from itertools import islice

import torch
from torch import Tensor, nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group
from vllm.model_executor.layers.fused_moe import FusedMoEFactory, GateLinear
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.deepseek_v2 import DeepseekV2MLP
from vllm.model_executor.models.interfaces import SupportsPP
from vllm.model_executor.models.utils import (
    PPMissingLayer,
    extract_layer_index,
    is_pp_missing_parameter,
    make_empty_intermediate_tensors_factory,
    make_layers,
    maybe_prefix,
)
from vllm.platforms import current_platform
from vllm.sequence import IntermediateTensors

from megatron_coe.hf.configuration_coe import CoeConfig

from .attention import LatentAttention, PlainAttention, Rotary
from .weights import PACKED_MODULES, targets

NOT_CHOSEN = -1.0
"""The weight of an expert that a token is not sent to; every weight of a chosen one is >= 0."""


def expert_weights(config: CoeConfig, logits_TN: Tensor, bias_N: Tensor | None) -> Tensor:
    """Return the weight of every expert for every token [T, N] in fp32: K of them >= 0."""
    sigmoid = config.scoring_func == "sigmoid"
    scores_TN = logits_TN.sigmoid() if sigmoid else logits_TN.softmax(dim=-1)
    ranked_TN = scores_TN if bias_N is None else scores_TN + bias_N
    if config.topk_method == "group_limited_greedy":
        ranked_TN = _limit_groups(config, ranked_TN)
    indices_TK = ranked_TN.topk(config.num_experts_per_tok, dim=-1, sorted=False).indices
    probs_TK = scores_TN.gather(1, indices_TK)
    if config.num_experts_per_tok > 1 and (sigmoid or config.norm_topk_prob):
        probs_TK = probs_TK / (probs_TK.sum(dim=-1, keepdim=True) + 1e-20)
    if sigmoid or config.num_experts_per_tok == 1 or not config.norm_topk_prob:
        probs_TK = probs_TK * config.routed_scaling_factor
    return torch.full_like(scores_TN, NOT_CHOSEN).scatter(1, indices_TK, probs_TK)


def _limit_groups(config: CoeConfig, ranked_TN: Tensor) -> Tensor:
    """Drop all groups of experts but those with the best ones (DeepSeek-V2, section 2.2.2)."""
    groups_TGn = ranked_TN.unflatten(1, (config.n_group, -1))
    best_TG = groups_TGn.amax(dim=-1).topk(config.topk_group, dim=-1, sorted=False).indices
    dropped_TG = torch.ones_like(groups_TGn[..., 0], dtype=torch.bool).scatter(1, best_TG, False)
    return groups_TGn.masked_fill(dropped_TG.unsqueeze(-1), -torch.inf).flatten(1)


class Router(GateLinear):
    """vLLM's router in fp32, and what its logits make of a token's experts."""

    def __init__(self, config: CoeConfig, prefix: str) -> None:
        super().__init__(
            config.hidden_size,
            config.n_routed_experts,
            force_fp32_compute=True,
            out_dtype=torch.float32,
            prefix=prefix,
        )
        self.config = config
        if config.use_expert_bias:
            bias_N = torch.empty(config.n_routed_experts, dtype=torch.float32)
            self.e_score_correction_bias = nn.Parameter(bias_N, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the weight of every expert [T, N] for x [T, H]."""
        bias_N = self.e_score_correction_bias if self.config.use_expert_bias else None
        return expert_weights(self.config, super().forward(x)[0].float(), bias_N)


class CoeMoE(nn.Module):
    """CoE layer: one fused MoE of vLLM's, entered with the router of each iteration.

    Routing is done outside of it, since expert biases differ by iteration and one fused MoE has
    room for one: it is given the experts' weights in place of logits, and takes the K largest.
    """

    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        self.config = config = vllm_config.model_config.hf_config
        quant_config, C = vllm_config.quant_config, config.inner_iter
        if vllm_config.parallel_config.use_sequence_parallel_moe:
            raise ValueError(
                "CoeForCausalLM: the experts' sequence parallelism, which data parallelism with "
                "tensor and expert parallelism brings, is not supported. Leave out "
                "data_parallel_size, or expert parallelism."
            )
        self.gate = (
            nn.ModuleList(Router(config, f"{prefix}.gate.{t}") for t in range(C))
            if config.use_igate
            else Router(config, f"{prefix}.gate")
        )
        self.shared_experts = None
        if config.n_shared_experts:
            self.shared_experts = DeepseekV2MLP(
                hidden_size=config.hidden_size,
                intermediate_size=config.moe_intermediate_size * config.n_shared_experts,
                hidden_act=config.hidden_act,
                quant_config=quant_config,
                reduce_results=False,  # with the routed experts' sum
                prefix=f"{prefix}.shared_experts",
            )
        self.experts = FusedMoEFactory(
            num_experts=config.n_routed_experts,
            top_k=config.num_experts_per_tok,
            hidden_size=config.hidden_size,
            intermediate_size=config.moe_intermediate_size,
            renormalize=False,
            custom_routing_function=self._choose,
            router_logits_dtype=torch.float32,
            shared_experts=self.shared_experts,
            quant_config=quant_config,
            prefix=f"{prefix}.experts",
        )
        if config.coe_upcycled:
            scales = {str(t): torch.empty(config.hidden_size) for t in range(1, C)}
            self.coe_weights = nn.ParameterDict(
                {t: nn.Parameter(scale, requires_grad=False) for t, scale in scales.items()}
            )

    def _choose(
        self, hidden_states: Tensor, gating_output: Tensor, topk: int, renormalize: bool
    ) -> tuple[Tensor, Tensor]:
        """Return weights and indices [T, K] of the chosen experts: vLLM's custom routing function.

        With expert parallelism vLLM's experts on a CPU take local indices, and have no way to leave
        an expert out: those of other ranks are given the weight 0.
        """
        weights_TK, indices_TK = gating_output.topk(topk, dim=-1, sorted=False)
        if not current_platform.is_cpu() or (local_N := self.experts.expert_map) is None:
            return weights_TK, indices_TK
        local_TK = local_N[indices_TK]
        return weights_TK.masked_fill(local_TK < 0, 0.0), local_TK.clamp(min=0)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Run all iterations: x(C) [T, H] from the normed residual stream x(0) [T, H]."""
        x_0 = x = hidden_states
        mode = self.config.residual_mode
        for t in range(self.config.inner_iter):
            router = self.gate[t] if self.config.use_igate else self.gate
            # vLLM declares that its experts may overwrite their input, which is needed again.
            update = self.experts(hidden_states=x.clone(), router_logits=router(x))
            if self.config.coe_upcycled:
                x = x + self.coe_weights[str(t)] * update if t else update
            elif mode in ("inner", "inner_outer"):
                x = x + update
            else:
                x = x_0 + update if mode == "addinit" else update
        return x


class CoeDecoderLayer(nn.Module):
    """Attention, then the experts' iterations or, in a dense layer, one feed-forward network."""

    def __init__(self, vllm_config: VllmConfig, rotary: Rotary, prefix: str) -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        attention = LatentAttention if config.attention_type == "mla" else PlainAttention
        self.self_attn = attention(vllm_config, rotary, f"{prefix}.self_attn")
        has_experts = config.has_experts(extract_layer_index(prefix))
        self.mlp: nn.Module
        if has_experts:
            self.mlp = CoeMoE(vllm_config, f"{prefix}.mlp")
        else:
            self.mlp = DeepseekV2MLP(
                hidden_size=config.hidden_size,
                intermediate_size=config.intermediate_size,
                hidden_act=config.hidden_act,
                quant_config=vllm_config.quant_config,
                prefix=f"{prefix}.mlp",
            )
        self.adds_residual = config.adds_stream if has_experts else True
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        attended = self.self_attn(positions, self.input_layernorm(hidden_states))
        residual = hidden_states + attended
        output = self.mlp(self.post_attention_layernorm(residual))
        return residual + output if self.adds_residual else output


@support_torch_compile(
    dynamic_arg_dims=dict.fromkeys(
        ("input_ids", "positions", "intermediate_tensors", "inputs_embeds"), 0
    )
)
class CoeModel(nn.Module):
    """The layers of this pipeline stage: token ids to hidden states [T, H]."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        stage = get_pp_group()
        self.embed_tokens: nn.Module = PPMissingLayer()
        if stage.is_first_rank or (config.tie_word_embeddings and stage.is_last_rank):
            self.embed_tokens = VocabParallelEmbedding(
                config.vocab_size,
                config.hidden_size,
                quant_config=vllm_config.quant_config,
                prefix=f"{prefix}.embed_tokens",
            )
        layer = partial(CoeDecoderLayer, vllm_config, Rotary(vllm_config))
        self.start_layer, self.end_layer, self.layers = make_layers(
            config.num_hidden_layers, lambda prefix: layer(prefix), prefix=f"{prefix}.layers"
        )
        self.norm: nn.Module = PPMissingLayer()
        if stage.is_last_rank:
            self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor | IntermediateTensors:
        if not get_pp_group().is_first_rank:
            assert intermediate_tensors is not None
            hidden_states = intermediate_tensors["hidden_states"]
        elif inputs_embeds is None:
            hidden_states = self.embed_tokens(input_ids)
        else:
            hidden_states = inputs_embeds
        for layer in islice(self.layers, self.start_layer, self.end_layer):
            hidden_states = layer(positions, hidden_states)
        if not get_pp_group().is_last_rank:
            return IntermediateTensors({"hidden_states": hidden_states})
        return self.norm(hidden_states)


class CoeForCausalLM(nn.Module, SupportsPP):
    """Language model; the protocol is vLLM's."""

    packed_modules_mapping = PACKED_MODULES

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        self.config = config = vllm_config.model_config.hf_config
        self.model = CoeModel(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        self.lm_head: nn.Module = PPMissingLayer()
        if get_pp_group().is_last_rank:
            head = ParallelLMHead(
                config.vocab_size,
                config.hidden_size,
                quant_config=vllm_config.quant_config,
                prefix=maybe_prefix(prefix, "lm_head"),
            )
            tied = config.tie_word_embeddings
            self.lm_head = head.tie_weights(self.model.embed_tokens) if tied else head
        self.logits_processor = LogitsProcessor(config.vocab_size)
        self.make_empty_intermediate_tensors = make_empty_intermediate_tensors_factory(
            ["hidden_states"], config.hidden_size
        )

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        return self.model.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor | IntermediateTensors:
        return self.model(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load a folder's weights, all or some; return the names of the parameters they fill.

        Raises: ValueError naming a weight that the model has no place for.
        """
        table, parameters = targets(self.config), dict(self.named_parameters())
        loaded, mtp = set(), self.config.mtp_weights
        for name, tensor in weights:
            if name == "lm_head.weight" and self.config.tie_word_embeddings:
                continue
            if mtp and re.match(mtp, name):
                continue
            module, _, kind = name.rpartition(".")
            target = table.get(module)
            if target is None:
                raise ValueError(f"{name}: config.json describes a model without this weight.")
            parameter = target.parameter(kind)
            if is_pp_missing_parameter(parameter, self):
                continue
            if parameter not in parameters:
                raise ValueError(f"{name}: config.json describes a model without this weight.")
            weight = parameters[parameter]
            load = getattr(weight, "weight_loader", default_weight_loader)
            if target.expert is not None:
                load(weight, tensor, parameter, shard_id=target.shard, expert_id=target.expert)
            elif target.shard is not None:
                load(weight, tensor, target.shard)
            else:
                load(weight, tensor)
            loaded.add(parameter)
        return loaded
