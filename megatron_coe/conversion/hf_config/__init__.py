"""A model's configuration as Hugging Face's `config.json`, and as section `model` of a run.

    keys.py         every key: the field of the same value, its default, or why it may be ignored
    convert.py      the configuration, both ways
    attention.py    attention and rotary embedding
    experts.py      experts, layers and routers
    residual.py     the two spellings of the residual mode
    deepseek_v2.py  a standard MoE model for transformers' own class

The keys are DeepSeek-V2's plus those of the authors' models (`inner_iter`, `use_igate`, and two
spellings of the residual mode), so that code made for their checkpoints reads ours. Keys of our own
stand only where theirs cannot express it: see `megatron_coe/hf/configuration_coe.py`.
"""

from megatron_coe.conversion.hf_config.convert import (
    import_notices,
    to_hf_config,
    to_model_fields,
)
from megatron_coe.conversion.hf_config.deepseek_v2 import deepseek_v2_notes, to_deepseek_v2_config
from megatron_coe.conversion.hf_config.keys import DEEPSEEK_V2, JSON, MODEL_TYPE, Config

__all__ = [
    "DEEPSEEK_V2",
    "JSON",
    "MODEL_TYPE",
    "Config",
    "deepseek_v2_notes",
    "import_notices",
    "to_deepseek_v2_config",
    "to_hf_config",
    "to_model_fields",
]
