"""Every row of `cpu.PATCHES` and `patches.PATCHES` is needed, and all of them together suffice."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

REPO = Path(__file__).resolve().parents[3]
NO_CUDA = "Torch not compiled with CUDA enabled|No CUDA GPUs|Found no NVIDIA driver"

SYMPTOMS = {
    "current_device": NO_CUDA,
    "streams": "requires CUDA support",
    "rng": NO_CUDA,
    "literal_devices": NO_CUDA,
    "pinned_memory": "pin_memory=True requires",
    "tensor_cuda": NO_CUDA,
    "type_strings": "Wrapped parameters must be one of torch.cuda.FloatTensor",
    "split_sizes": "split sizes are still a tensor",
    "uneven_parts": "invalid tensor size",
    "fusions": "torch.compile compiles",
    "have_te": r"isinstance\(\) arg 2 must be a type",
    "router_gemm": "name 'te_general_gemm' is not defined",
    "selective_recompute": "name 'FP8GlobalStateManager' is not defined",
    "distributed_optimizer_load": "KeyError: 'step'",
    "gradient_norm": "a value is read back",
    "foreign_apex": "Apex must be installed",
}

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the patches are for CPUs")


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    foreign = tmp_path_factory.mktemp("path")
    (foreign / "apex").mkdir()
    (foreign / "apex" / "__init__.py").write_text("")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPO), str(foreign)])}
    program = [sys.executable, str(Path(__file__).with_name("rows.py"))]
    done = subprocess.run(
        program, env=environment, cwd=REPO, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("row", SYMPTOMS)
def test_without_the_row_its_symptom_comes_back(outcomes, row):
    without, _ = outcomes[row]
    assert without is not None and re.search(SYMPTOMS[row], without), without


@pytest.mark.parametrize("row", SYMPTOMS)
def test_with_every_row_it_works(outcomes, row):
    _, with_all = outcomes[row]
    assert with_all is None


def test_every_row_has_a_symptom():
    from megatron_coe.megatron_compat import cpu, patches

    assert set(SYMPTOMS) == set(cpu.PATCHES) | set(patches.PATCHES)


def test_modules_with_literal_devices_still_have_them():
    """A list that outlives its reason would hide what is new in Megatron."""
    import importlib

    from megatron_coe.megatron_compat import cpu

    for name in cpu._LITERAL_CUDA:
        source = Path(importlib.import_module(name).__file__).read_text()
        assert re.search(r"device=['\"]cuda['\"]|init_data\(['\"]cuda|device=device", source), name
