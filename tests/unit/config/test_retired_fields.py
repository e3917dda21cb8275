"""Fields of section `model` that settings and checkpoints of before may hold."""

from __future__ import annotations

import pytest
import torch

from megatron_coe.config.model_section import build_provider
from tests.unit.training.runs import make_settings


@pytest.mark.parametrize(
    ("model", "dispatcher"),
    [
        ({"coe_own_dispatchers": False}, "megatron_alltoall"),
        ({"coe_own_dispatchers": True}, "alltoall"),
        ({"coe_own_dispatchers": False, "moe_token_dispatcher_type": "allgather"}, "allgather"),
        ({"coe_merge_weight_gradients": True}, "alltoall"),
    ],
)
def test_old_settings_mean_what_they_meant(model: dict, dispatcher: str) -> None:
    provider = build_provider(make_settings(model=model), torch.device("cpu"), 96)
    assert provider.moe_token_dispatcher_type == dispatcher


def test_a_value_that_chose_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model\.coe_own_dispatchers='no': must be true or false"):
        build_provider(make_settings(model={"coe_own_dispatchers": "no"}), torch.device("cpu"), 96)
