"""Small Hugging Face models of every kind, with weights large enough to show."""

from __future__ import annotations

import inspect

import torch
from transformers.models.deepseek_v2 import modeling_deepseek_v2

from megatron_coe.hf import CoeConfig, CoeForCausalLM

NATIVE_HAS_MSCALE = "mscale" in inspect.getsource(modeling_deepseek_v2)
"""Whether transformers' deepseek_v2 has YaRN's mscale in attention; 4.57.6 and 5.12.1 leave it out.
Nor can theirs rank groups of experts."""

YARN = {
    "type": "yarn",
    "factor": 40,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
    "original_max_position_embeddings": 4096,
}
SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "n_routed_experts": 7,
    "num_experts_per_tok": 2,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "rope_scaling": YARN,
}
KINDS = {
    "plain": {},
    "shared gate, no shared expert": {
        "use_igate": False,
        "n_shared_experts": None,
        "inner_iter": 3,
    },
    "dense first layer, q-LoRA": {
        "first_k_dense_replace": 1,
        "q_lora_rank": 12,
        "v_head_dim": 4,
        "rope_scaling": None,
        "residual": "addinit",
    },
    "sigmoid with bias": {"scoring_func": "sigmoid", "use_expert_bias": True, "residual": "outer"},
    "plain attention": {
        "attention_type": "mha",
        "num_key_value_heads": 2,
        "head_dim": 12,
        "qkv_bias": True,
        "use_qk_norm": True,
        "rope_scaling": None,
    },
    "upcycled, tied": {"residual": "outer", "coe_upcycled": True, "tie_word_embeddings": True},
}


def small_config(**changes: object) -> CoeConfig:
    return CoeConfig(**{**SMALL, **changes})


def small_model(seed: int = 0, **changes: object) -> CoeForCausalLM:
    """A model in evaluation mode; biases, norms and gates are random too."""
    generator = torch.Generator().manual_seed(seed)
    model = CoeForCausalLM(small_config(**changes)).eval()
    randomize(model, generator)
    return model


@torch.no_grad()
def randomize(module: torch.nn.Module, generator: torch.Generator) -> None:
    """Fresh weights: norms around 1, everything else around 0."""
    for name, parameter in module.named_parameters():
        noise = 0.2 * torch.randn(parameter.shape, generator=generator)
        parameter.copy_(noise + 1.0 if "norm" in name else noise)


def tokens(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(1, 96, shape, generator=torch.Generator().manual_seed(seed))
