"""What vLLM's kernels can run of a CoE model, said before any process starts or weight is read."""

from __future__ import annotations

from typing import Any

from vllm import envs
from vllm.config.model_arch import ModelArchitectureConfig
from vllm.platforms import current_platform
from vllm.transformers_utils.model_arch_config_convertor import ModelArchConfigConvertorBase

from megatron_coe.hf.configuration_coe import CoeConfig

LATENT = (512, 64)
"""Latent and rotary sizes that all of vLLM's MLA kernels have; on a CPU the only ones."""

HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Head sizes of vLLM's attention on a CPU; the GPU's kernels have those up to 256, and more."""

CPU_ALIGNMENT = 32
"""What vLLM's experts on a CPU need the hidden size to be a multiple of."""


class CoeModelArchConvertor(ModelArchConfigConvertorBase):
    """What vLLM's configuration is told of a CoE model; the KV cache is sized by it."""

    def convert(self, *arguments: Any, **keywords: Any) -> ModelArchitectureConfig:
        check_supported(self.hf_config, on_cpu=current_platform.is_cpu())
        return super().convert(*arguments, **keywords)

    def is_deepseek_mla(self) -> bool:
        return has_latent_kernel(self.hf_config)

    def get_head_size(self) -> int:
        if self.is_deepseek_mla():
            return super().get_head_size()
        return padded_head_size(self.hf_config)

    def get_total_num_kv_heads(self) -> int:
        config = self.hf_config
        latent = config.attention_type == "mla"  # its keys and values are projected for every head
        return config.num_attention_heads if latent else config.num_key_value_heads


def has_latent_kernel(config: CoeConfig) -> bool:
    """Return whether vLLM's MLA runs this attention; plain attention runs every other one."""
    sizes = (config.kv_lora_rank, config.qk_rope_head_dim)
    return config.attention_type == "mla" and sizes == LATENT and not envs.VLLM_MLA_DISABLE


def padded_head_size(config: CoeConfig) -> int:
    """Return the size to which plain attention pads the heads of q, k and v with zeros.

    Raises: ValueError when vLLM has none that large.
    """
    latent = config.attention_type == "mla"
    widest = max(config.head_dim, config.v_head_dim) if latent else config.head_dim
    for size in HEAD_SIZES:
        if size >= widest:
            return size
    keys = "qk_nope_head_dim + qk_rope_head_dim and v_head_dim" if latent else "head_dim"
    raise ValueError(
        f"{keys}: heads of {widest} are larger than vLLM's attention has ({HEAD_SIZES[-1]}): serve "
        "this model with transformers."
    )


def check_supported(config: CoeConfig, on_cpu: bool) -> None:
    """Refuse what vLLM cannot run. Raises: ValueError naming the key of `config.json`."""
    if config.hidden_act != "silu":
        raise ValueError(
            f"hidden_act={config.hidden_act!r}: vLLM's experts have silu only; serve this model "
            "with transformers."
        )
    if on_cpu and config.hidden_size % CPU_ALIGNMENT:
        raise ValueError(
            f"hidden_size={config.hidden_size}: vLLM's experts on a CPU need a multiple of "
            f"{CPU_ALIGNMENT}; serve this model on a GPU, or with transformers."
        )
    if not has_latent_kernel(config):
        padded_head_size(config)
