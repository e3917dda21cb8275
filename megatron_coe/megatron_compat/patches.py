"""Patches of what Megatron-Core gets wrong where Transformer Engine is absent, on any device.

Its modules each guess for themselves whether Transformer Engine and Apex are there, and some guess
wrong: names stay undefined, or a package that happens to be called ``apex`` is taken for NVIDIA's.
:func:`install` corrects the guesses. With Transformer Engine present nothing is changed, save that
a foreign ``apex`` is still kept out.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
import types
import warnings
from collections.abc import Callable, Iterator

import torch


def have_te() -> bool:
    """Whether Transformer Engine's PyTorch part can be imported."""
    return _importable("transformer_engine.pytorch")


def have_apex() -> bool:
    """Whether NVIDIA's Apex is here with its CUDA extensions.

    The package index's ``apex`` is an unrelated toolkit of the same name, so the name says nothing:
    what counts are the two modules that Megatron uses.
    """
    return _importable("apex.multi_tensor_apply") and _importable("amp_C")


def install() -> None:
    """Correct what Megatron's modules guessed about the packages around them. Idempotent.

    Works whether or not Megatron's modules were imported before. Warns once (``RuntimeWarning``)
    about an importable ``apex`` that is not NVIDIA's.
    """
    foreign_apex = _importable("apex") and not have_apex()
    if foreign_apex:
        _warn_of_foreign_apex()
    for name, patch in PATCHES.items():
        if foreign_apex if name == "foreign_apex" else not have_te():
            patch()


@functools.cache
def _importable(name: str) -> bool:
    """Whether ``import name`` works; whatever a broken package raises means that it does not."""
    try:
        importlib.import_module(name)
    except Exception:
        return False
    return True


@functools.cache
def _warn_of_foreign_apex() -> None:
    location = getattr(sys.modules["apex"], "__file__", None) or "a namespace package"
    warnings.warn(
        f"the importable package 'apex' ({location}) is not NVIDIA Apex with its CUDA extensions "
        "(it lacks apex.multi_tensor_apply or amp_C); it is ignored and PyTorch's norms and "
        "optimizers are used. `pip uninstall apex` silences this",
        RuntimeWarning,
        stacklevel=3,
    )


# Modules that decide at import, and must have decided before their decision can be corrected.
_DECIDING = (
    "megatron.core.models.backends",
    "megatron.core.models.gpt.gpt_layer_specs",
    "megatron.core.optimizer",
    "megatron.core.optimizer.distrib_optimizer",
    "megatron.core.transformer.attention",
    "megatron.core.transformer.moe.moe_utils",
    "megatron.core.transformer.multi_latent_attention",
    "megatron.core.transformer.multi_token_prediction",
    "megatron.core.transformer.transformer_block",
)


def _megatron_modules() -> Iterator[types.ModuleType]:
    for name in _DECIDING:
        importlib.import_module(name)
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.core") and module is not None:
            yield module


def _patch_have_te() -> None:
    """``multi_latent_attention`` imports only Megatron's wrappers, which import without Transformer
    Engine (as ``None``), and concludes that it is there: ``isinstance(x, None)`` follows. Later
    versions ask in the same way whether a layer is one for inference, which is Transformer
    Engine's."""
    for module in _megatron_modules():
        if getattr(module, "HAVE_TE", False):
            module.HAVE_TE = False
        if hasattr(module, "is_inference_column_parallel_linear"):
            module.is_inference_column_parallel_linear = _never


def _never(module: object) -> bool:
    return False


def _patch_router_gemm() -> None:
    """``moe_utils`` leaves ``te_general_gemm`` undefined, then compares it with ``None``."""
    moe_utils = importlib.import_module("megatron.core.transformer.moe.moe_utils")
    moe_utils.te_general_gemm = None


def _patch_selective_recompute() -> None:
    """``CheckpointWithoutOutput(fp8=False)``, its default, means "with fp8" and calls Transformer
    Engine; only ``None`` means without."""
    random = importlib.import_module("megatron.core.tensor_parallel.random")
    cls = random.CheckpointWithoutOutput
    fp8, *others = cls.__init__.__defaults__  # fp8 is the first parameter
    if fp8 is False:
        cls.__init__.__defaults__ = (None, *others)


def _patch_distributed_optimizer_load() -> None:
    """Torch's Adam keeps a step count per parameter, which the distributed optimizer restores
    first, then leaves out of a checkpoint's tensors and asks for all the same (``KeyError``)."""
    module = importlib.import_module("megatron.core.optimizer.distrib_optimizer")
    set_states = module.DistributedOptimizer._set_main_param_and_optimizer_states
    if hasattr(set_states, "__wrapped__"):
        return

    @functools.wraps(set_states)
    def keep_step(self, model_param, tensors):
        group, order = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
        restored = {"step": state["step"]} if "step" in state else {}
        set_states(self, model_param, {**restored, **tensors})

    module.DistributedOptimizer._set_main_param_and_optimizer_states = keep_step


def _patch_gradient_norm() -> None:
    """Megatron's own L2 norm of many tensors reads one value per tensor back to the host, so that a
    GPU waits as often in every step."""
    clip_grads = importlib.import_module("megatron.core.optimizer.clip_grads")
    if clip_grads.l2_norm_impl.__module__ == "megatron.core.utils":
        clip_grads.l2_norm_impl = _l2_norm


def _l2_norm(
    chunk_size: int,
    overflow: torch.Tensor,
    tensor_lists: list[list[torch.Tensor]],
    per_tensor: bool,
) -> tuple[torch.Tensor, None]:
    """The norm of all tensors together [1], fp32, where they are; as `amp_C.multi_tensor_l2norm`
    is called without a norm per tensor."""
    norm = torch.nn.utils.get_total_norm(tensor_lists[0])
    return norm.float().reshape(1), None


def _patch_foreign_apex() -> None:
    """Any importable ``apex`` makes Megatron choose its FusedLayerNorm, which then refuses."""
    apex_norm = importlib.import_module("megatron.core.fusions.fused_layer_norm").FusedLayerNorm
    torch_norm = importlib.import_module("megatron.core.transformer.torch_norm").WrappedTorchNorm
    for module in _megatron_modules():
        if getattr(module, "HAVE_APEX", False):
            module.HAVE_APEX = False
        for name in ("LNImpl", "LayerNormImpl"):
            if getattr(module, name, None) is apex_norm:
                setattr(module, name, torch_norm)
    if not have_te():
        _use_torch_optimizers()


def _use_torch_optimizers() -> None:
    """An Apex built without its extensions still offers ``FusedAdam``, which then refuses."""
    optimizer = importlib.import_module("megatron.core.optimizer")
    optimizer.Adam, optimizer.SGD = torch.optim.AdamW, torch.optim.SGD
    optimizer.USING_PYTORCH_OPTIMIZER = True
    distributed = importlib.import_module("megatron.core.optimizer.distrib_optimizer")
    distributed.Adam = torch.optim.Adam
    distributed.HAVE_APEX_OR_TE = distributed.USING_APEX_OPTIMIZER = False


PATCHES: dict[str, Callable[[], None]] = {
    "have_te": _patch_have_te,
    "router_gemm": _patch_router_gemm,
    "selective_recompute": _patch_selective_recompute,
    "distributed_optimizer_load": _patch_distributed_optimizer_load,
    "gradient_norm": _patch_gradient_norm,
    "foreign_apex": _patch_foreign_apex,
}
"""One row per fault. Removing a row brings its symptom back (see the tests)."""
