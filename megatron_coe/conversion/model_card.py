"""The model card of an exported model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import cast

from megatron_coe.checkpoint.safe_unpickle import read_common
from megatron_coe.checkpoint.versions import VERSIONS_FILE
from megatron_coe.config.run_config import DataSettings
from megatron_coe.conversion.tokenizer import Usage, describe_tokenizer
from megatron_coe.model.provider import CoEModelProvider
from megatron_coe.utils.metrics_file import read_records
from megatron_coe.utils.run_files import METRICS_FILE, step_of

_CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
license: unknown  # to be chosen by whoever publishes the model
tags:
- chain-of-experts
- mixture-of-experts
{code_tag}---

# {name}

A Chain-of-Experts language model ([arXiv 2506.18945](https://arxiv.org/abs/2506.18945)), trained
with `megatron_coe`: in every layer a token passes {iterations} through the same experts, routed
separately each time.

| | |
|---|---|
{rows}

## How to use it

```python
{example}```

Tested with transformers 4.57 to 5.24. It continues text; it follows instructions only if it was
trained on data that does.
"""

_GENERATE = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}"{trust})
model = AutoModelForCausalLM.from_pretrained("{name}"{trust})
inputs = tokenizer("Once upon a time", return_tensors="pt")
output = model.generate(**inputs, max_new_tokens=20)
print(tokenizer.decode(output[0], skip_special_tokens=True))
"""
_LOAD = """\
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{name}"{trust})
"""


def model_card(
    provider: CoEModelProvider,
    step: Path,
    name: str,
    usage: Usage,
    *,
    data: DataSettings,
    steps: int,
    run: Path,
    remote_code: bool = True,
) -> str:
    """Return a README.md with the model, its training and how it is used.

    Args:
        step: the checkpoint.
        name: of the model, usually of its folder.
        usage: the use of the tokenizer in training.
        data: of the run, with the tokenizer where it is now.
        steps: that the run was to train in all.
        run: the folder of its records.
        remote_code: whether the model's code is in the folder, not in transformers.
    """
    C = provider.coe_iterations
    rows = [*_model_rows(provider, usage), *_training_rows(step, data, steps, run)]
    if data.tokenizer:
        rows.append(("tokenizer", describe_tokenizer(Path(data.tokenizer), usage)))
    rows.append(("software", _software(step)))
    example = _GENERATE if data.tokenizer else _LOAD
    return _CARD.format(
        name=name,
        code_tag="- custom_code\n" if remote_code else "",
        iterations="once" if C == 1 else f"{C} times",
        rows="\n".join(f"| {what} | {value} |" for what, value in rows),
        example=example.format(name=name, trust=", trust_remote_code=True" if remote_code else ""),
    )


def _model_rows(provider: CoEModelProvider, usage: Usage) -> Iterator[tuple[str, str]]:
    yield "parameters", f"{provider.num_params():,}"
    yield "active per token, at most", f"{provider.num_active_params():,}"
    yield "layers, hidden size", f"{provider.num_layers}, {provider.hidden_size}"
    experts = f"{provider.num_moe_experts}, {provider.moe_router_topk}"
    yield "routed experts, top-k per iteration", experts
    residual = f"{provider.coe_iterations}, `{provider.coe_residual}`"
    yield "iterations, residual mode", residual
    if layers := provider.mtp_num_layers:
        yield "layers of multi-token prediction", f"{layers}, which transformers does not run"
    yield "vocabulary", f"{provider.vocab_size:,}"
    yield "context length", f"{usage.max_length:,} tokens"


def _training_rows(
    step: Path, data: DataSettings, steps: int, run: Path
) -> Iterator[tuple[str, str]]:
    """Yield the rows about the run; none for a model that was imported and not trained since."""
    number = step_of(step)
    if not number:
        return
    yield "run", run.name
    names = ", ".join(f"`{Path(prefix).name}`" for prefix in data.train)
    yield "training data", f"{names} (mode `{data.mode}`)"
    sequences = read_common(step)["progress"]["samples"]
    yield "steps, sequences", f"{number:,} of {steps:,}, {sequences:,}"
    path = run / METRICS_FILE
    records = read_records(path) if path.is_file() else []
    for key, what in (("train_loss", "training"), ("valid_loss", "validation")):
        known = [r for r in records if key in r and cast("int", r["step"]) <= number]
        if known:
            value = f"{known[-1][key]:.4f} (step {known[-1]['step']:,})"
            yield f"{what} loss, nats per token", value


def _software(step: Path) -> str:
    """Return the packages that trained the model and that exported it."""
    path = step / VERSIONS_FILE
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    trained = [f"{name} {found[name]}" for name in found if found[name]]
    exported = []
    for package in ("transformers", "tokenizers", "safetensors"):
        with suppress(PackageNotFoundError):
            exported.append(f"{package} {version(package)}")
    parts = {"trained with": trained, "exported with": exported}
    return "; ".join(f"{what} {', '.join(names)}" for what, names in parts.items() if names)
