"""The CoE model in vLLM, by its entry point `vllm.general_plugins`; nothing here imports Megatron.

`weights` needs no vLLM; `limits`, `attention` and `model` do.
"""

from __future__ import annotations


def register() -> None:
    """Register configuration and model with vLLM, which calls this in each of its processes."""
    from transformers import AutoConfig
    from vllm import ModelRegistry
    from vllm.transformers_utils.model_arch_config_convertor import MODEL_ARCH_CONFIG_CONVERTORS

    from megatron_coe.hf.configuration_coe import CoeConfig

    from .limits import CoeModelArchConvertor

    AutoConfig.register(CoeConfig.model_type, CoeConfig, exist_ok=True)
    MODEL_ARCH_CONFIG_CONVERTORS[CoeConfig.model_type] = CoeModelArchConvertor
    ModelRegistry.register_model("CoeForCausalLM", f"{__name__}.model:CoeForCausalLM")
