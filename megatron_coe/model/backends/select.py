"""Select what the model runs on: Transformer Engine or plain PyTorch modules, a GPU or a CPU."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch

from megatron_coe.megatron_compat import cpu, mtp, patches, recompute, transformer_engine
from megatron_coe.megatron_compat.transformer_engine import have_te
from megatron_coe.model.field_rules import NEEDS_TE

if TYPE_CHECKING:
    from megatron_coe.model.backends.te import TESpecProvider
    from megatron_coe.model.backends.torch import TorchSpecProvider
    from megatron_coe.model.provider import CoEModelProvider

BACKENDS = ("auto", "torch", "te")

_NEED_TE = {
    **dict.fromkeys(NEEDS_TE, "the kernels are its own"),
    "tp_comm_overlap": "without it nothing would overlap",
    "apply_rope_fusion": "the fused kernels are its own",
    "gradient_accumulation_fusion": "the linear layers that have it are its own",
    "use_te_activation_func": "the function is its own",
    "cpu_offloading": "it moves the activations",
    "fine_grained_activation_offloading": "it moves the activations",
    "enable_cuda_graph": "its generator states can be captured, torch's cannot",
    "external_cuda_graph": "its generator states can be captured, torch's cannot",
    "cuda_graph_impl": "its generator states can be captured, torch's cannot",
}
"""Fields of Megatron's configuration that do nothing or fail late without Transformer Engine.
(Those of `NEEDS_TE` `CoEConfig` refuses already, where it is not even installed.)"""


def prepare() -> torch.device:
    """Make Megatron-Core run on this machine; call once, before building anything.

    Patches what Megatron gets wrong where Transformer Engine cannot be used
    (`megatron_compat.patches`) and, without CUDA, its CUDA-only spots (`megatron_compat.cpu`). With
    CUDA, selects the device that `LOCAL_RANK` names. Idempotent.

    Returns:
        The device on which to put the model and the data.

    Raises:
        ValueError: `LOCAL_RANK` is not the index of a CUDA device, or Transformer Engine is
            installed and cannot be imported.
    """
    patches.install()
    mtp.install()
    recompute.install()
    if not torch.cuda.is_available():
        cpu.install()
        return cpu.CPU
    local_rank, devices = os.environ.get("LOCAL_RANK", "0"), torch.cuda.device_count()
    if not local_rank.isdecimal() or int(local_rank) >= devices:
        raise ValueError(
            f"LOCAL_RANK={local_rank} names no CUDA device: this machine shows {devices}. "
            f"Start at most {devices} process(es) per machine"
        )
    torch.cuda.set_device(int(local_rank))
    return torch.device("cuda", int(local_rank))


def refuse_unusable(config: CoEModelProvider) -> None:
    """Refuse a configuration that asks for what this machine's backend has not.

    To be called before process groups are made. (A configuration for other machines can be made and
    planned with anywhere.)

    Raises:
        ValueError: the message names the field, its value and the fix.
    """
    backend = resolve_backend(config.backend)
    te = backend.fuse_layernorm_and_linear()
    for name, reason in _NEED_TE.items():
        value = getattr(config, name, None)
        if not te and value not in (None, False, "none"):
            raise ValueError(
                f"{name}={value!r} needs Transformer Engine ({reason}), and this run has "
                f"backend={config.backend!r} without it: unset it"
            )
    backend.refuse_unsupported(config)


def resolve_backend(name: str) -> TorchSpecProvider | TESpecProvider:
    """Return the provider of modules for a `backend` setting.

    Args:
        name: "torch" (runs anywhere), "te" (Transformer Engine), or "auto": Transformer Engine
            where it and CUDA are present, plain PyTorch otherwise.

    Raises:
        ValueError: an unknown name, or "te" where Transformer Engine cannot be used.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend={name!r} is unknown: choose one of {', '.join(BACKENDS)}")
    te_usable = have_te()
    if name == "te" and not te_usable:
        missing = transformer_engine.import_error()
        reason = f"cannot be imported ({missing})" if missing else "is left aside: no CUDA device"
        raise ValueError(
            f"backend='te' needs Transformer Engine, which {reason}. Set backend='torch' or 'auto'"
        )
    # Imported here so that `prepare` can correct Megatron before either provider builds on it.
    if name == "torch" or not te_usable:
        from megatron_coe.model.backends.torch import TorchSpecProvider

        return TorchSpecProvider()
    from megatron_coe.model.backends.te import TESpecProvider

    return TESpecProvider()
