"""Select what the model runs on: Transformer Engine or plain PyTorch modules, a GPU or a CPU.

`auto` takes Transformer Engine for what only it has (FP8, CUDA graphs: `_NEED_TE`), and otherwise
PyTorch's modules and the grouped experts of this package, whatever is installed. On an H200 a step
of the paper's model took 1.7 times as long with Transformer Engine as without (docs/results.md).
What its modules do differently there:

- `TEGroupedMLP` brings the experts' numbers of rows to the host, a wait in every iteration, and
  launches a cuBLAS product per expert, so the host fills a stream that has just run dry;
- it has a parameter per expert, 504 for 8 at that size: without `gradient_accumulation_fusion`
  each iteration's gradients are summed by autograd and then added to `main_grad`, a launch each;
- its attention has fused kernels for heads of 192 and 128 only from cuDNN of some versions, and
  otherwise holds S x S scores.

`te:attention,experts` takes single parts from it; `tools/benchmark.py --what te` measures each.
"""

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

TE_PARTS = ("linear", "attention", "experts")
"""What Transformer Engine can provide by itself: norms with the linear layers after them, core
attention, routed experts. (Its optimizer Megatron takes wherever it is installed.)"""

AUTO_PARTS: tuple[str, ...] = ()
"""What `auto` takes from Transformer Engine where it can be used: what was measured to pay."""

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

_UNSET = (None, False, "none")


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
    parts = te_parts_of(config)
    for name, reason in _NEED_TE.items():
        value = getattr(config, name, None)
        if parts != TE_PARTS and value not in _UNSET:
            raise ValueError(
                f"{name}={value!r} needs Transformer Engine ({reason}), and this run has "
                f"backend={config.backend!r} without it: unset it"
            )
    backend = backend_of(config)
    backend.refuse_unsupported(config)


def backend_of(config: CoEModelProvider) -> TorchSpecProvider | TESpecProvider:
    """Return the provider of modules for a configuration. Raises: ValueError, as `te_parts`."""
    return provider_of(te_parts_of(config))


def resolve_backend(name: str) -> TorchSpecProvider | TESpecProvider:
    """Return the provider of modules for a `backend` setting. Raises: ValueError, as `te_parts`."""
    return provider_of(te_parts(name))


def te_parts_of(config: CoEModelProvider) -> tuple[str, ...]:
    """Return what the model takes from Transformer Engine. Raises: ValueError, as `te_parts`."""
    needed = any(getattr(config, name, None) not in _UNSET for name in _NEED_TE)
    return (
        TE_PARTS if config.backend == "auto" and needed and have_te() else te_parts(config.backend)
    )


def te_parts(name: str) -> tuple[str, ...]:
    """Return what a `backend` setting takes from Transformer Engine.

    Args:
        name: "torch" (nothing: runs anywhere), "te" (all of `TE_PARTS`), "te:" and some of them
            with commas between, or "auto": `AUTO_PARTS`, where it and CUDA are present.

    Raises:
        ValueError: an unknown name, or "te" where Transformer Engine cannot be used.
    """
    kind, colon, listed = name.partition(":")
    parts = tuple(listed.split(",")) if colon else TE_PARTS
    if kind not in BACKENDS or (colon and kind != "te") or not {*parts} <= {*TE_PARTS}:
        raise ValueError(
            f"backend={name!r} is unknown: choose one of {', '.join(BACKENDS)}, or te: and some of "
            f"{', '.join(TE_PARTS)}"
        )
    te_usable = have_te()
    if kind == "te" and not te_usable:
        missing = transformer_engine.import_error()
        reason = f"cannot be imported ({missing})" if missing else "is left aside: no CUDA device"
        raise ValueError(
            f"backend={name!r} needs Transformer Engine, which {reason}. Set backend='torch' or "
            "'auto'"
        )
    if kind == "auto":
        return AUTO_PARTS if te_usable else ()
    return parts if kind == "te" else ()


def provider_of(parts: tuple[str, ...]) -> TorchSpecProvider | TESpecProvider:
    """Return the provider that has these of `TE_PARTS` from Transformer Engine."""
    # Imported here so that `prepare` can correct Megatron before either provider builds on it.
    if "linear" in parts:
        from megatron_coe.model.backends.te import TESpecProvider

        return TESpecProvider(parts)
    from megatron_coe.model.backends.torch import TorchSpecProvider

    return TorchSpecProvider(parts)
