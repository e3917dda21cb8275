"""Every row for `megatron.training` is needed, and all of them together suffice."""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Callable

import pytest
import torch

from megatron_coe.megatron_compat import megatron_training
from megatron_coe.megatron_compat.modules import loaded_modules

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the patches are for CPUs")


def dataset_helpers() -> None:
    from megatron.core.datasets import utils

    try:
        utils.compile_helpers()
    except SystemExit as stop:
        raise RuntimeError(f"the process ends with status {stop.code}") from stop


def torch_view() -> None:
    from megatron.training import initialize
    from megatron.training.utils import common_utils

    assert common_utils._compute_norm_2([]).device.type == "cpu"
    assert initialize.torch.cuda.device_count() == 1
    assert common_utils.get_device_arch_version() >= 10
    assert torch.cuda.device_count() == 0, "everyone else keeps the truth"


def kernel_warm_up() -> None:
    from megatron.training import training

    training.set_jit_fusion_options()


NO_CUDA = "Torch not compiled with CUDA enabled|No CUDA GPUs|Found no NVIDIA driver"
ROWS: dict[str, tuple[Callable[[], None], str]] = {
    "dataset_helpers": (dataset_helpers, "ends with status 1|No such file or directory: 'make'"),
    "torch": (torch_view, NO_CUDA),
    "kernel_warm_up": (kernel_warm_up, NO_CUDA),
}


@pytest.fixture(autouse=True)
def unpatched(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """`megatron.training` as it was installed, before a test and after it."""
    training = pytest.importorskip(
        "megatron.training.training", reason="the wheel of megatron-core 0.16.1 has none"
    )
    from megatron.core.datasets import utils
    from megatron.training import global_vars

    for module in loaded_modules("megatron.training"):
        if hasattr(module, "torch"):
            monkeypatch.setattr(module, "torch", torch)
    monkeypatch.setattr(utils, "compile_helpers", utils.compile_helpers)
    monkeypatch.setattr(training, "set_jit_fusion_options", training.set_jit_fusion_options)
    sizes = Namespace(bf16=False, fp16=False, ffn_hidden_size=8, tensor_model_parallel_size=1)
    sizes.seq_length = sizes.context_parallel_size = sizes.micro_batch_size = 1
    monkeypatch.setattr(global_vars, "_GLOBAL_ARGS", sizes)


@pytest.mark.parametrize("row", ROWS)
def test_without_the_row_its_symptom_comes_back(row, monkeypatch) -> None:
    for table in (megatron_training.EVERYWHERE, megatron_training.ON_CPU):
        monkeypatch.delitem(table, row, raising=False)
    megatron_training.install()
    exercise, symptom = ROWS[row]
    with pytest.raises((RuntimeError, AssertionError, OSError)) as fault:
        exercise()
    assert re.search(symptom, str(fault.value)), fault.value


@pytest.mark.parametrize("row", ROWS)
def test_with_every_row_it_works(row) -> None:
    megatron_training.install()
    exercise, _ = ROWS[row]
    exercise()


def test_every_row_has_a_symptom() -> None:
    assert set(ROWS) == set(megatron_training.EVERYWHERE) | set(megatron_training.ON_CPU)


def test_a_makefile_is_used(monkeypatch, tmp_path) -> None:
    """A checkout compiles its own."""
    from megatron.core.datasets import utils

    (tmp_path / "Makefile").touch()
    monkeypatch.setattr(utils, "__file__", str(tmp_path / "utils.py"))
    before = utils.compile_helpers
    megatron_training.install()
    assert utils.compile_helpers is before


def test_with_cuda_only_what_is_wrong_everywhere_is_patched(monkeypatch) -> None:
    from megatron.training import initialize

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    megatron_training.install()
    assert initialize.torch is torch
