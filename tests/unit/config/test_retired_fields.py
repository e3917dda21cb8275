"""Fields of section `model` that settings and checkpoints of before may hold."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_coe.config.loader import load_settings
from megatron_coe.config.model_section import build_provider
from tests.unit.training.runs import make_settings


def load(folder: Path, overrides: list[str]):
    (folder / "run.yaml").write_text(make_settings().to_yaml())
    return load_settings(folder / "run.yaml", [f"model.{override}" for override in overrides])


@pytest.mark.parametrize(
    ("overrides", "dispatcher"),
    [
        (["coe_own_dispatchers=false"], "megatron_alltoall"),
        (["coe_own_dispatchers=true"], "alltoall"),
        (["coe_own_dispatchers=false", "moe_token_dispatcher_type=allgather"], "allgather"),
        (["moe_token_dispatcher_type=allgather", "coe_own_dispatchers=false"], "allgather"),
        (["coe_own_dispatchers=false", "moe_token_dispatcher_type=alltoall"], "megatron_alltoall"),
        (["coe_merge_weight_gradients=true"], "alltoall"),
    ],
)
def test_old_settings_mean_what_they_meant(tmp_path, overrides: list[str], dispatcher: str) -> None:
    settings = load(tmp_path, overrides)
    provider = build_provider(settings, torch.device("cpu"), 96)
    assert provider.moe_token_dispatcher_type == dispatcher
    assert not {"coe_own_dispatchers", "coe_merge_weight_gradients"} & settings.model.keys()


def test_a_value_that_chose_nothing_is_refused(tmp_path) -> None:
    with pytest.raises(
        ValueError, match=r"model\.coe_own_dispatchers='never': must be true or false"
    ):
        load(tmp_path, ["coe_own_dispatchers=never"])
