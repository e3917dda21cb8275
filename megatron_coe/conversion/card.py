"""The model card of an exported model."""

from __future__ import annotations

from megatron_coe.provider import CoEModelProvider

_CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags:
- chain-of-experts
- mixture-of-experts
{code_tag}---

# {name}

A Chain-of-Experts language model ([arXiv 2506.18945](https://arxiv.org/abs/2506.18945)), trained
with `megatron_coe`: in every layer a token passes {iterations} through the same experts, each time
by another choice of them.

| | |
|---|---|
| parameters | {params:,} |
| active per token, at most | {active:,} |
| layers, hidden size | {layers}, {hidden} |
| routed experts, chosen per iteration | {experts}, {topk} |
| iterations, residual mode | {C}, `{residual}` |
| vocabulary | {vocab:,} |

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{name}"{trust})
```
"""


def model_card(provider: CoEModelProvider, name: str, remote_code: bool = True) -> str:
    """A README.md that says what the model is and how it is loaded.

    Args:
        name: of the model, usually of its folder.
        remote_code: whether the model's code lies beside it, or transformers has it.
    """
    C = provider.coe_iterations
    return _CARD.format(
        name=name,
        code_tag="- custom_code\n" if remote_code else "",
        trust=", trust_remote_code=True" if remote_code else "",
        iterations="once" if C == 1 else f"{C} times",
        params=provider.num_params(),
        active=provider.num_active_params(),
        layers=provider.num_layers,
        hidden=provider.hidden_size,
        experts=provider.num_moe_experts,
        topk=provider.moe_router_topk,
        C=C,
        residual=provider.coe_residual,
        vocab=provider.vocab_size,
    )
