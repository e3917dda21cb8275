"""Registration with transformers' Auto classes on import, so that no remote code is needed."""

from __future__ import annotations

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)

from .configuration_coe import CoeConfig
from .modeling_coe import CoeForCausalLM, CoeForSequenceClassification, CoeModel

__all__ = ["CoeConfig", "CoeForCausalLM", "CoeForSequenceClassification", "CoeModel"]

AutoConfig.register(CoeConfig.model_type, CoeConfig, exist_ok=True)
AutoModel.register(CoeConfig, CoeModel, exist_ok=True)
AutoModelForCausalLM.register(CoeConfig, CoeForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(CoeConfig, CoeForSequenceClassification, exist_ok=True)

CoeConfig.register_for_auto_class()
CoeModel.register_for_auto_class("AutoModel")
CoeForCausalLM.register_for_auto_class("AutoModelForCausalLM")
CoeForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
