"""The presets of examples/scale: the sizes they claim, on the GPUs of their names, built."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_coe.config.loader import load_settings
from megatron_coe.config.model_section import build_provider
from megatron_coe.config.validation import check_layout, check_values
from megatron_coe.planning.build import build_rank
from megatron_coe.planning.hardware import GPUS, Cluster
from megatron_coe.planning.layout_search import usable_memory
from megatron_coe.planning.memory import peak_memory_stage, rank_memory
from megatron_coe.planning.plan import Plan
from megatron_coe.planning.run_summary import plan_of

SCALE = Path(__file__).parents[3] / "examples" / "scale"
LAID_OUT = sorted(SCALE.glob("*-gpus.yaml"))
MODELS = sorted(set(SCALE.glob("*.yaml")) - set(LAID_OUT))
H100 = Cluster(GPUS["h100"])


def plan(preset: Path) -> Plan:
    """The plan of a preset on the number of GPUs that its name ends with; one without."""
    settings = load_settings(preset)
    check_values(settings)
    gpus = int(preset.stem.split("_")[-1].removesuffix("-gpus")) if preset in LAID_OUT else 1
    check_layout(settings, gpus)
    return plan_of(
        build_provider(settings, torch.device("cuda")),
        settings.parallel,
        settings.train,
        gpus,
        on_gpu=True,
    )


def lite() -> int:
    """Parameters of DeepSeek-V2-Lite's shape with one shared expert and two routers a layer."""
    H, attention = 2048, 2048 * 16 * 192 + 2048 * 576 + 512 + 512 * 16 * 256 + 16 * 128 * 2048
    moe = 65 * 3 * H * 1408 + 2 * 64 * H
    return 2 * 102_400 * H + H + 27 * (attention + 2 * H) + 26 * moe + 3 * H * 10_944


def test_the_models_are_as_large_as_they_say() -> None:
    sizes = {preset.stem: plan(preset).model.num_params() for preset in MODELS}
    assert set(sizes) == {
        "coe-2_4-65",
        "moe_8-65",
        "medium_coe-2_4-65",
        "lite_coe-2_3-65",
        "large_coe-2_4-129",
    }
    assert sizes["lite_coe-2_3-65"] == lite()
    assert round(sizes["medium_coe-2_4-65"] / 1e9, 1) == 4.7
    assert round(sizes["large_coe-2_4-129"] / 1e9) == 117


def test_each_model_has_layouts_for_a_node_a_rack_and_a_hall() -> None:
    for model in ("coe-2_4-65", "medium_coe-2_4-65", "lite_coe-2_3-65"):
        assert {SCALE / f"{model}_{gpus}-gpus.yaml" for gpus in (8, 64, 512)} < set(LAID_OUT)
    # The large one's weights, gradients and optimizer alone are more than 8 GPUs hold.
    large = {SCALE / f"large_coe-2_4-129_{gpus}-gpus.yaml" for gpus in (64, 512, 1024)}
    assert large < set(LAID_OUT)
    states = plan(SCALE / "large_coe-2_4-129.yaml").model.num_params() * (2 + 4 + 12)
    assert states > 8 * H100.gpu.memory


@pytest.mark.parametrize("preset", LAID_OUT, ids=lambda path: path.stem)
def test_the_layout_fits_and_is_built_as_predicted(device: torch.device, preset: Path) -> None:
    layout = plan(preset)
    assert rank_memory(layout).total <= usable_memory(H100)
    assert layout.overlap_grad_reduce and layout.overlap_param_gather
    assert layout.model.moe_shared_expert_overlap
    each = layout.world_size // layout.model.pipeline_model_parallel_size
    assert build_rank(layout, peak_memory_stage(layout) * each).agrees


@pytest.mark.slow
@pytest.mark.parametrize("gpus", [64, 512, 1024])
def test_every_stage_of_the_large_one_is_built_as_predicted(
    device: torch.device, gpus: int
) -> None:
    layout = plan(SCALE / f"large_coe-2_4-129_{gpus}-gpus.yaml")
    stages = layout.model.pipeline_model_parallel_size
    ranks = [gpus // stages * (stage + 1) - 1 for stage in range(stages)]
    assert all(build_rank(layout, rank).agrees for rank in ranks)
