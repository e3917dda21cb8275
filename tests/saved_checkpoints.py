"""Checkpoints that pass between versions of Python, torch and Megatron-Core.

    python -m tests.saved_checkpoints save FOLDER    with one interpreter
    python -m tests.saved_checkpoints load FOLDER    with another

The first saves two steps of a tiny model with the distributed optimizer, and what has to come out
of them under any other versions: the SHA-256 of each weight, moment, generator and exported tensor
as it was in memory, and the loss of the third step. The second compares. Folders of
`tests/data` that are named after versions were made by the first.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from safetensors.torch import load_file

from megatron_coe.checkpoint.resume import latest_valid_checkpoint
from megatron_coe.checkpoint.state import load_checkpoint, run_state
from megatron_coe.config.run_config import CheckpointSettings, Settings
from megatron_coe.conversion.export_hf import to_hf
from megatron_coe.training.trainer import Trainer
from tests.unit.training.runs import make_settings, make_trainer

DATA = Path(__file__).parent / "data"
NAMES = ("core-0.16.1", "core-0.19.2", "torch-2.15.0")
STEP = 2
EXPECTED_FILE = "expected.json"
TOLERANCE = 1e-5
"""Of the next loss, relative: kernels of other versions sum in other orders."""
SMALL = {
    "num_layers": 1,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "kv_lora_rank": 8,
    "qk_head_dim": 4,
    "qk_pos_emb_head_dim": 4,
    "v_head_dim": 8,
    "ffn_hidden_size": 16,
    "moe_ffn_hidden_size": 8,
    "num_moe_experts": 4,
    "moe_shared_expert_intermediate_size": 8,
}


def settings() -> Settings:
    """Return the settings of the run that was saved; dropout draws from the generators."""
    return make_settings(
        model={**SMALL, "coe_residual": "outer", "hidden_dropout": 0.2},
        parallel={"use_distributed_optimizer": True},
    )


def state_digests(trainer: Trainer) -> dict[str, str]:
    """Return the SHA-256 of each weight, moment and generator of a process's only rank."""
    state = run_state(trainer.train_state, trainer.progress)
    rng = state["rng"].data
    found = {
        "rng.torch": digest(rng["torch"]),
        **{f"rng.{name}": digest(generator) for name, generator in rng["tracker"].items()},
    }
    for part in _flat(save_preprocess(state)[0]):
        if isinstance(part, ShardedTensor):
            found[f"{part.key} at {list(part.global_offset)}"] = digest(part.data)
    return found


def export_digests(checkpoint: Path, folder: Path) -> dict[str, str]:
    """Export a checkpoint and return the SHA-256 of each tensor of the Hugging Face folder."""
    to_hf(checkpoint, folder)
    tensors = load_file(folder / "model.safetensors")
    return {name: digest(tensor) for name, tensor in tensors.items()}


def digest(tensor: torch.Tensor) -> str:
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(data.numpy().tobytes()).hexdigest()


def save(folder: Path) -> None:
    """Write a checkpoint and `expected.json`."""
    trainer = make_trainer(settings(), torch.device("cpu"))
    trainer.checkpointer.options = CheckpointSettings(save=str(folder))
    for _ in range(STEP):
        trainer.step()
    trainer.save()
    expected = {"state": state_digests(trainer)}
    with tempfile.TemporaryDirectory() as temporary:
        expected["export"] = export_digests(folder, Path(temporary, "export"))
    expected["next_loss"] = trainer.step().loss
    (folder / EXPECTED_FILE).write_text(json.dumps(expected, indent=1, sort_keys=True) + "\n")


def load(folder: Path) -> list[str]:
    """Load a checkpoint and return what is not as `expected.json` says."""
    expected = json.loads((folder / EXPECTED_FILE).read_text())
    changed = settings()
    changed.train.seed += 1  # other weights and generators, until those of the checkpoint are there
    trainer = make_trainer(changed, torch.device("cpu"))
    checkpoint = latest_valid_checkpoint(CheckpointSettings(save=str(folder)))
    trainer.progress = load_checkpoint(checkpoint, trainer.train_state)
    wrong = _differences(state_digests(trainer), expected["state"])
    with tempfile.TemporaryDirectory() as temporary:
        exported = export_digests(folder, Path(temporary, "export"))
    wrong += _differences(exported, expected["export"])
    loss = trainer.step().loss
    if abs(loss - expected["next_loss"]) > TOLERANCE * expected["next_loss"]:
        wrong.append(f"loss {loss} for {expected['next_loss']}")
    return wrong


def _differences(found: dict[str, str], expected: dict[str, str]) -> list[str]:
    names = sorted(found.keys() | expected.keys())
    return [name for name in names if found.get(name) != expected.get(name)]


def _flat(part: Any) -> list[Any]:
    if isinstance(part, dict):
        return [leaf for value in part.values() for leaf in _flat(value)]
    if isinstance(part, list):
        return [leaf for value in part for leaf in _flat(value)]
    return [part]


def main() -> None:
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from megatron_coe.model.backends import prepare

    parser = argparse.ArgumentParser()
    parser.add_argument("action", choices=("save", "load"))
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    prepare()
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1234)
    wrong = save(options.folder) if options.action == "save" else load(options.folder)
    torch.distributed.destroy_process_group()
    sys.exit("differs: " + ", ".join(wrong) if wrong else None)


if __name__ == "__main__":
    main()
