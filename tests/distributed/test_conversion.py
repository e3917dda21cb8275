"""A checkpoint converts to the same weights whatever the layout it was saved in."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_coe.checkpoint.checkpointer import Checkpointer
from megatron_coe.checkpoint.state import Progress, load_checkpoint
from megatron_coe.config.loader import load_settings
from megatron_coe.config.run_config import CheckpointSettings, ParallelSettings
from megatron_coe.conversion.export_hf import to_hf
from megatron_coe.conversion.import_hf import from_hf
from megatron_coe.conversion.initial_checkpoint import STEP_0
from megatron_coe.distributed.process_groups import parallel_groups
from megatron_coe.utils.run_files import CONFIG_FILE
from tests.distributed.launch import launch
from tests.unit.conversion.models import write_random_model
from tests.unit.training.runs import make_trainer

# 4 layers make 2 x 2 interleaved chunks; 8 experts, 4 heads and 2 query groups divide by 2.
MODELS = {
    "mla": {"num_layers": 4, "num_moe_experts": 8, "vocab_size": 90},
    "plain": {
        "num_layers": 4,
        "num_moe_experts": 8,
        "multi_latent_attention": False,
        "num_query_groups": 2,
        "add_qkv_bias": True,
        "moe_layer_freq": [0, 1, 1, 1],
    },
    "mtp": {"num_layers": 4, "num_moe_experts": 8, "vocab_size": 90, "mtp_num_layers": 2},
}
LAYOUTS = {
    "tensor": {"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 2},
    "tensor and expert": {
        "tensor_model_parallel_size": 2,
        "expert_model_parallel_size": 2,
        "expert_tensor_parallel_size": 1,
        "use_distributed_optimizer": True,
    },
    "pipeline": {"pipeline_model_parallel_size": 2, "use_distributed_optimizer": True},
    "interleaved pipeline": {
        "pipeline_model_parallel_size": 2,
        "virtual_pipeline_model_parallel_size": 2,
    },
    "expert": {"expert_model_parallel_size": 2, "use_distributed_optimizer": True},
}
CASES = [
    *(("mla", layout) for layout in LAYOUTS),
    ("plain", "tensor and expert"),
    ("plain", "pipeline"),
    *(("mtp", layout) for layout in ("tensor", "tensor and expert", "pipeline", "expert")),
]


def folder_of(root: str, model: str, layout: str) -> Path:
    return Path(root) / f"{model}, {layout}"


def save_in_every_layout(root: str) -> None:
    """Runs on each rank: loads the imported checkpoints and saves them, optimizer and all."""
    for model, layout in CASES:
        step = Path(root) / model / STEP_0
        settings = load_settings(step / CONFIG_FILE)
        settings.parallel = ParallelSettings(**LAYOUTS[layout])
        with parallel_groups(settings.parallel):
            trainer = make_trainer(settings, torch.device("cpu"))
            load_checkpoint(step, trainer.train_state)
            folder = str(folder_of(root, model, layout))
            checkpointer = Checkpointer(CheckpointSettings(save=folder), settings.to_yaml())
            checkpointer.save(trainer.train_state, Progress())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    root = tmp_path_factory.mktemp("layouts")
    weights = {}
    for number, (model, changes) in enumerate(MODELS.items()):
        weights[model] = write_random_model(root / f"{model}_hf", seed=number, **changes)
        from_hf(root / f"{model}_hf", root / model)
    launch("tests.distributed.test_conversion:save_in_every_layout", 2, str(root))
    return root, weights


@pytest.mark.parametrize(("model", "layout"), CASES)
def test_every_layout_gives_the_same_bits(saved, tmp_path, model, layout):
    root, weights = saved
    to_hf(folder_of(str(root), model, layout), tmp_path / "hf")
    converted = load_file(tmp_path / "hf" / "model.safetensors")
    assert converted.keys() == weights[model].keys()
    for name, tensor in converted.items():
        assert torch.equal(tensor, weights[model][name]), name
