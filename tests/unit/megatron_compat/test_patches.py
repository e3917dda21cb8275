"""Every row of `cpu.PATCHES` and `patches.PATCHES` is needed, and all of them together suffice."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_coe.megatron_compat import cpu, patches
from megatron_coe.megatron_compat.versions import PARTS_ARE_PARTIALS
from tests.stub_te import NEEDS_A_GPU, write_te

REPO = Path(__file__).resolve().parents[3]
NO_CUDA = (
    "Torch not compiled with CUDA enabled|No CUDA GPUs|Found no NVIDIA driver"
    # What a CUDA build of torch says without a driver, or when it was asked before the fork.
    "|CUDA driver version is insufficient|Cannot re-initialize CUDA in forked subprocess"
)

SYMPTOMS = {
    "current_device": NO_CUDA,
    "streams": f"requires CUDA support|{NO_CUDA}",
    "rng": NO_CUDA,
    "literal_devices": NO_CUDA,
    "pinned_memory": f"pin_memory=True requires|{NO_CUDA}",
    "tensor_cuda": NO_CUDA,
    "type_strings": "Wrapped parameters must be one of torch.cuda.FloatTensor",
    "split_sizes": "split sizes are still a tensor",
    "uneven_parts": "invalid tensor size",
    "fusions": "torch.compile compiles",
    "unusable_te": "was called: no NVIDIA driver",
    "have_te": r"isinstance\(\) arg 2 must be a type",
    "router_gemm": "name 'te_general_gemm' is not defined",
    "selective_recompute": "name 'FP8GlobalStateManager' is not defined",
    "distributed_optimizer_load": "KeyError: 'step'",
    "distributed_optimizer_state": "^AssertionError: $",
    "gradient_norm": "a value is read back",
    "multi_tensor_scale": "a copy is multiplied into a new tensor",
    "foreign_apex": "Apex must be installed",
}

ONLY_ON_MAIN = {"inference_linear"}
"""Rows whose fault neither line's wheel has, but Megatron-LM's main branch."""

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the patches are for CPUs")


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    te = tmp_path_factory.mktemp("te")
    write_te(te, __init__=NEEDS_A_GPU)
    foreign = tmp_path_factory.mktemp("path")
    (foreign / "apex").mkdir()
    (foreign / "apex" / "__init__.py").write_text("")
    others = [row for row in [*SYMPTOMS, *ONLY_ON_MAIN] if row != "unusable_te"]
    return outcomes_beside(foreign, *others) | outcomes_beside(te, "unusable_te")


def outcomes_beside(packages: Path, *rows: str) -> dict[str, list[str | None]]:
    path = os.pathsep.join([str(REPO), str(packages)])
    # One of the rows needs torch.compile.
    environment = {**os.environ, "PYTHONPATH": path, "TORCHDYNAMO_DISABLE": "0"}
    program = [sys.executable, str(Path(__file__).with_name("rows.py")), *rows]
    done = subprocess.run(
        program, env=environment, cwd=REPO, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("row", SYMPTOMS)
def test_without_the_row_its_symptom_comes_back(outcomes, row):
    without, _ = outcomes[row]
    if row in patches.ONLY_0_16 and PARTS_ARE_PARTIALS:
        assert without is None, "this line has it right"
    else:
        assert without is not None and re.search(SYMPTOMS[row], without), without


@pytest.mark.parametrize("row", [*SYMPTOMS, *ONLY_ON_MAIN])
def test_with_every_row_it_works(outcomes, row):
    _, with_all = outcomes[row]
    assert with_all is None


def test_every_row_has_a_symptom():
    assert set(SYMPTOMS) | ONLY_ON_MAIN == set(cpu.PATCHES) | set(patches.PATCHES)


def test_modules_with_literal_devices_still_have_them():
    """A list that outlives its reason would hide what is new in Megatron."""
    only_0_16 = () if PARTS_ARE_PARTIALS else cpu._LITERAL_CUDA_0_16
    for name in (*cpu._LITERAL_CUDA, *only_0_16):
        source = Path(importlib.import_module(name).__file__).read_text()
        assert re.search(r"device=['\"]cuda['\"]|init_data\(['\"]cuda|device=device", source), name
