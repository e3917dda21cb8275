"""vLLM's quantization reaches the model's linear layers, fused ones too: int8 on this CPU."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.serve import engine
from tests.serve.test_vllm import compare, reference

pytestmark = pytest.mark.serve

KEPT = (".mlp.experts.", ".mlp.gate.", "embed_tokens", "lm_head")
"""vLLM quantizes experts on CPUs with AMX only; routers stay in fp32."""
BOUND = 1.0
"""Of log-probabilities: inputs are rounded to 8 bits, which the oracle's are not."""


def quantize(folder: Path, quantized: Path) -> dict[str, torch.Tensor]:
    """Write a folder with int8 linear layers, in the format of compressed-tensors.

    Returns: the weights that it stands for.
    """
    shutil.copytree(folder, quantized)
    tensors = load_file(folder / "model.safetensors")
    stored, meant = {}, {}
    for name, tensor in tensors.items():
        if tensor.dim() < 2 or any(part in name for part in KEPT):  # norms and biases are vectors
            stored[name] = meant[name] = tensor
            continue
        scale = tensor.float().abs().amax(dim=1, keepdim=True) / 127
        stored[name] = (tensor.float() / scale).round().to(torch.int8)
        stored[f"{name}_scale"] = scale
        meant[name] = stored[name].float() * scale
    save_file(stored, quantized / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    each = {"num_bits": 8, "type": "int", "symmetric": True}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "ignore": ["lm_head", r"re:.*mlp\.experts.*", r"re:.*mlp\.gate\..*"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**each, "strategy": "channel", "dynamic": False},
                "input_activations": {**each, "strategy": "token", "dynamic": True},
            }
        },
    }
    (quantized / "config.json").write_text(json.dumps(config))
    return meant


@pytest.mark.parametrize("name", ["c2_inner_outer", "c2_none"])
def test_int8_weights_are_loaded_into_fused_layers(name, home, prompts, tmp_path):
    folder, quantized = home / name / "hf", tmp_path / "int8"
    meant = quantize(folder, quantized)
    oracle = tmp_path / "oracle"
    shutil.copytree(folder, oracle)
    save_file(meant, oracle / "model.safetensors", metadata={"format": "pt"})
    (served,) = engine.run(quantized, prompts[:20], (engine.TOGETHER,), tmp_path, dtype="bfloat16")
    found = compare(oracle, prompts[:20], served, torch.float32)
    print(f"\n{name}: int8, {found}")
    assert found.worst < BOUND and found.equal >= 10
    reference.cache_clear()
