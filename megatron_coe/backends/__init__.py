"""What the model runs on: Transformer Engine or plain PyTorch modules, on a GPU or a CPU."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

# Not `import torch`: once the module beside this one is imported, that name means it.
from torch import cuda, device

from megatron_coe.backends import compat, cpu
from megatron_coe.backends.compat import have_apex, have_te

if TYPE_CHECKING:
    from megatron.core.models.backends import BackendSpecProvider

__all__ = ["BACKENDS", "have_apex", "have_te", "prepare", "resolve_backend"]

BACKENDS = ("auto", "torch", "te")


def prepare() -> device:
    """Make Megatron-Core run on this machine as it is; call once, before building anything.

    Corrects what Megatron gets wrong without Transformer Engine (:mod:`.compat`) and, without
    CUDA, covers its CUDA-only spots (:mod:`.cpu`). With CUDA, selects the device ``LOCAL_RANK``
    names. Idempotent.

    Returns:
        The device on which to put the model and the data.

    Raises:
        ValueError: ``LOCAL_RANK`` is not the index of a CUDA device.
    """
    compat.install()
    if not cuda.is_available():
        cpu.install()
        return cpu.CPU
    local_rank, devices = os.environ.get("LOCAL_RANK", "0"), cuda.device_count()
    if not local_rank.isdecimal() or int(local_rank) >= devices:
        raise ValueError(
            f"LOCAL_RANK={local_rank} names no CUDA device: this machine shows {devices}. "
            f"Start at most {devices} process(es) per machine"
        )
    cuda.set_device(int(local_rank))
    return device("cuda", int(local_rank))


def resolve_backend(name: str) -> BackendSpecProvider:
    """The provider of modules for a ``backend`` setting.

    Args:
        name: ``"torch"`` (runs anywhere), ``"te"`` (Transformer Engine), or ``"auto"``: Transformer
            Engine where it and CUDA are present, plain PyTorch otherwise.

    Raises:
        ValueError: an unknown name, or ``"te"`` where Transformer Engine cannot be used.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend={name!r} is unknown: choose one of {', '.join(BACKENDS)}")
    te_usable = have_te() and cuda.is_available()
    if name == "te" and not te_usable:
        missing = "a CUDA device" if have_te() else "Transformer Engine, which is not installed"
        raise ValueError(f"backend='te' needs {missing}: set backend='torch' or 'auto'")
    # Imported here so that `prepare` can correct Megatron before either provider builds on it.
    if name == "torch" or not te_usable:
        from megatron_coe.backends.torch import TorchSpecProvider

        return TorchSpecProvider()
    from megatron_coe.backends.te import TESpecProvider

    return TESpecProvider()
