"""One process set up by the package, and the names that the package itself has."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from megatron.core import parallel_state

import megatron_coe
from tests.builders import TINY

REPO = Path(__file__).resolve().parents[3]


def draw(seed: int) -> torch.Tensor:
    with megatron_coe.single_process(seed=seed) as device:
        assert parallel_state.get_expert_model_parallel_world_size() == 1
        provider = megatron_coe.CoEModelProvider(**TINY)
        assert isinstance(provider, megatron_coe.CoEConfig)
        model = provider.provide().to(device)
        ids = torch.arange(8, device=device)[None]
        return model(ids, ids, None).detach().cpu()


def test_a_seed_decides_the_model_and_nothing_is_left_behind(monkeypatch) -> None:
    """The variables of a launcher that started the process are another run's."""
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("RANK", "3")
    first, again, other = draw(1), draw(1), draw(2)
    assert first.isfinite().all()
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert not torch.distributed.is_initialized()
    assert not parallel_state.model_parallel_is_initialized()


def test_importing_the_package_imports_no_torch() -> None:
    code = (
        "import sys, megatron_coe; assert 'CoEConfig' in dir(megatron_coe); "
        "assert not {'torch', 'megatron.core'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], cwd=REPO, check=True, timeout=60)


def test_other_names_are_not_there() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'CoEModel'"):
        _ = megatron_coe.CoEModel
