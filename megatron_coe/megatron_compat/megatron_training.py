"""Patches of `megatron.training`, to start from the wheel and to run on a CPU; its two signatures.

It is that of the megatron-core wheel, or of a Megatron-LM checkout.

`EVERYWHERE` holds what is wrong on any machine, `ON_CPU` what assumes CUDA.
`install` applies what this machine needs; nothing is patched at import.
"""

from __future__ import annotations

import types
from argparse import ArgumentParser
from collections.abc import Callable
from pathlib import Path

import torch
from megatron.core.enums import ModelType

from megatron_coe.megatron_compat.cpu import TorchOnCpu
from megatron_coe.megatron_compat.modules import load_module, loaded_modules
from megatron_coe.megatron_compat.versions import PARTS_ARE_PARTIALS


def install() -> None:
    """Apply every patch of `EVERYWHERE` and, without CUDA, of `ON_CPU`. Idempotent.

    Call it after `megatron_coe.model.backends.prepare` and before Megatron's arguments are parsed.

    Raises:
        ModuleNotFoundError: there is no `megatron.training`.
    """
    load_module("megatron.training.training")
    tables = [EVERYWHERE] if torch.cuda.is_available() else [EVERYWHERE, ON_CPU]
    for table in tables:
        for patch in table.values():
            patch()


def pretrain(
    datasets_provider: Callable,
    model_provider: Callable,
    forward_step: Callable,
    extra_args_provider: Callable[[ArgumentParser], ArgumentParser],
    **options: object,
) -> None:
    """Parse the command line and call `megatron.training.pretrain` as its version takes it.

    Args:
        datasets_provider, model_provider, forward_step: as Megatron's `pretrain` has them.
        extra_args_provider: adds arguments to Megatron's own.
        options: of Megatron's `pretrain`.
    """
    from megatron.training import pretrain

    model_type = ModelType.encoder_or_decoder
    if not PARTS_ARE_PARTIALS:  # the 0.16 line parses by itself
        parts = (datasets_provider, model_provider, model_type, forward_step)
        pretrain(*parts, extra_args_provider=extra_args_provider, **options)
        return
    from megatron.training.argument_utils import pretrain_cfg_container_from_args
    from megatron.training.arguments import parse_and_validate_args

    config = pretrain_cfg_container_from_args(
        parse_and_validate_args(extra_args_provider=extra_args_provider)
    )
    parts = (config, datasets_provider, model_type, forward_step)
    pretrain(*parts, model_provider=model_provider, **options)


def _patch_dataset_helpers() -> None:
    """Leave out `make`, which Megatron runs among its datasets before training.

    The wheel has the compiled library there but no Makefile: `make` fails, and the run ends.
    """
    utils = load_module("megatron.core.datasets.utils")
    if not Path(utils.__file__).with_name("Makefile").exists():
        utils.compile_helpers = _nothing


EVERYWHERE: dict[str, Callable[[], None]] = {"dataset_helpers": _patch_dataset_helpers}
"""One row per fault. Removing a row brings its symptom back (see the tests)."""


class _OneGpu(types.ModuleType):
    """`torch.cuda`, but one recent GPU answers for this process.

    Megatron asserts that CUDA is there, counts the devices (none: no parallel groups), refuses
    grouped experts on old ones, and before Blackwell wants CUDA_DEVICE_MAX_CONNECTIONS set.
    """

    def __getattr__(self, name: str) -> object:
        return getattr(torch.cuda, name)

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def device_count() -> int:
        return 1

    @staticmethod
    def set_device(device: object) -> None:
        pass

    @staticmethod
    def get_device_capability(device: object = None) -> tuple[int, int]:
        return 10, 0

    @staticmethod
    def get_device_properties(device: object = None) -> types.SimpleNamespace:
        return types.SimpleNamespace(major=10, minor=0)


class _TorchOnOneGpu(TorchOnCpu):
    """`torch` itself, but tensors for CUDA are made on the CPU and `_OneGpu` is its `cuda`."""

    cuda = _OneGpu("torch.cuda")


def _patch_torch() -> None:
    """Give the training modules a view of `torch`; everyone else keeps the truth.

    They write `device="cuda"` out and ask `torch.cuda` about devices.
    """
    view = _TorchOnOneGpu("torch")
    for module in loaded_modules("megatron.training"):
        if getattr(module, "torch", None) is torch:
            module.torch = view


def _patch_kernel_warm_up() -> None:
    """Fused kernels are compiled and run once on the GPU before training."""
    load_module("megatron.training.training").set_jit_fusion_options = _nothing
    initialize = load_module("megatron.training.initialize")
    if hasattr(initialize, "fused_kernels"):  # the 0.16 line also builds some with nvcc
        initialize.fused_kernels.load = _nothing


ON_CPU: dict[str, Callable[[], None]] = {
    "torch": _patch_torch,
    "kernel_warm_up": _patch_kernel_warm_up,
}
"""One row per kind of CUDA-only spot, as `megatron_compat.cpu.PATCHES` has them for the core."""


def _nothing(*args: object, **kwargs: object) -> None:
    pass
