"""The golden models (numbers of the authors' own code) as Megatron models."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from megatron_coe.model.provider import CoEModelProvider

GOLDEN = Path(__file__).parent / "data" / "golden"
CASES = sorted(path.parent.name for path in GOLDEN.glob("*/config.json"))
RESIDUAL_OF_BOOLEANS = {
    (True, False): "inner",
    (False, True): "outer",
    (True, True): "inner_outer",
    (False, False): "none",
}


def provider_of(case: str, **changes) -> CoEModelProvider:
    """The provider that the case's Hugging Face config.json describes."""
    hf = json.loads((GOLDEN / case / "config.json").read_text())
    yarn = hf["rope_scaling"]
    booleans = (hf.get("inner_residual"), hf.get("outer_residual"))
    fields = {
        "num_layers": hf["num_hidden_layers"],
        "hidden_size": hf["hidden_size"],
        "num_attention_heads": hf["num_attention_heads"],
        "ffn_hidden_size": hf["intermediate_size"],
        "q_lora_rank": hf["q_lora_rank"],
        "kv_lora_rank": hf["kv_lora_rank"],
        "qk_head_dim": hf["qk_nope_head_dim"],
        "qk_pos_emb_head_dim": hf["qk_rope_head_dim"],
        "v_head_dim": hf["v_head_dim"],
        "num_moe_experts": hf["n_routed_experts"],
        "moe_router_topk": hf["num_experts_per_tok"],
        "moe_ffn_hidden_size": hf["moe_intermediate_size"],
        "moe_shared_expert_intermediate_size": (hf["n_shared_experts"] or 0)
        * hf["moe_intermediate_size"]
        or None,
        "moe_aux_loss_coeff": hf["aux_loss_alpha"],
        "layernorm_epsilon": hf["rms_norm_eps"],
        "rotary_base": hf["rope_theta"],
        "rotary_scaling_factor": yarn["factor"],
        "mscale": yarn["mscale"],
        "mscale_all_dim": yarn["mscale_all_dim"],
        "original_max_position_embeddings": yarn["original_max_position_embeddings"],
        "vocab_size": hf["vocab_size"],
        "make_vocab_size_divisible_by": 1,
        "coe_iterations": hf["inner_iter"],
        "coe_residual": hf.get("residual") or RESIDUAL_OF_BOOLEANS[booleans],
        "coe_independent_gate": hf["use_igate"],
    }
    return CoEModelProvider(**{**fields, **changes})


def as_megatron(hf: dict[str, Tensor], config: CoEModelProvider) -> dict[str, Tensor]:
    """Weights (or their gradients) by Megatron's names, experts stacked as `GroupedExperts` has."""
    result = {
        "embedding.word_embeddings.weight": hf["model.embed_tokens.weight"],
        "decoder.final_layernorm.weight": hf["model.norm.weight"],
        "output_layer.weight": hf["lm_head.weight"],
    }
    for layer in range(config.num_layers):
        of, to = f"model.layers.{layer}.", f"decoder.layers.{layer}."
        result |= {
            to + "input_layernorm.weight": hf[of + "input_layernorm.weight"],
            to + "pre_mlp_layernorm.weight": hf[of + "post_attention_layernorm.weight"],
        }
        attention = {
            "linear_q_proj": "q_proj",
            "linear_kv_down_proj": "kv_a_proj_with_mqa",
            "kv_layernorm": "kv_a_layernorm",
            "linear_kv_up_proj": "kv_b_proj",
            "linear_proj": "o_proj",
        }
        for ours, theirs in attention.items():
            name = f"self_attn.{theirs}.weight"
            result[f"{to}self_attention.{ours}.weight"] = hf[of + name]
        gates = range(config.coe_iterations) if config.coe_independent_gate else ()
        for t in gates:
            result[f"{to}mlp.router.{t}.weight"] = hf[f"{of}mlp.gate.{t}.weight"]
        if not gates:
            result[f"{to}mlp.router.weight"] = hf[of + "mlp.gate.weight"]
        if config.moe_shared_expert_intermediate_size:
            gate_up, down = feed_forward(hf, of + "mlp.shared_experts.")
            result[to + "mlp.shared_experts.linear_fc1.weight"] = gate_up
            result[to + "mlp.shared_experts.linear_fc2.weight"] = down
        experts = [feed_forward(hf, f"{of}mlp.experts.{e}.") for e in range(config.num_moe_experts)]
        result[to + "mlp.experts.gate_up"] = torch.stack([gate_up for gate_up, _ in experts])
        result[to + "mlp.experts.down"] = torch.stack([down for _, down in experts])
    return result


def feed_forward(hf: dict[str, Tensor], prefix: str) -> tuple[Tensor, Tensor]:
    """(gate over up, down) of one expert."""
    gate, up, down = (hf[f"{prefix}{name}_proj.weight"] for name in ("gate", "up", "down"))
    return torch.cat([gate, up]), down
