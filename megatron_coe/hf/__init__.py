"""The CoE model for transformers and the table of its weight names, without Megatron.

Importing one of its classes registers the model with transformers' Auto classes, so that no remote
code is needed:

    from megatron_coe.hf import CoeForCausalLM
    model = CoeForCausalLM.from_pretrained(folder)

A folder that `save_pretrained` writes has the two files of model code beside the weights. The
table, `megatron_coe.hf.weight_names`, needs torch only: the first class imports transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .auto import CoeConfig, CoeForCausalLM, CoeForSequenceClassification, CoeModel

__all__ = ["CoeConfig", "CoeForCausalLM", "CoeForSequenceClassification", "CoeModel"]


def __getattr__(name: str) -> type:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import auto

    return getattr(auto, name)
