"""Patches of what Megatron-Core gets wrong where Transformer Engine cannot be used, on any device.

Its modules each test by themselves for Transformer Engine and Apex, and some conclude wrongly:
names stay undefined, any package called `apex` is taken for NVIDIA's, or a Transformer Engine that
can be imported for one that can run. `install` corrects this. Where Transformer Engine can be used
nothing is changed, but a foreign `apex` is still kept out.
"""

from __future__ import annotations

import functools
import inspect
import logging
import os
import re
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

from megatron_coe.megatron_compat import transformer_engine
from megatron_coe.megatron_compat.modules import load_module, loaded_modules
from megatron_coe.megatron_compat.transformer_engine import have_te

logger = logging.getLogger(__name__)


def have_apex() -> bool:
    """Return whether NVIDIA's Apex is installed with its CUDA extensions.

    The package index's `apex` is an unrelated toolkit of the same name, so the name says nothing:
    what counts are the two modules that Megatron uses.
    """
    return _importable("apex.multi_tensor_apply") and _importable("amp_C")


def install() -> None:
    """Correct what Megatron's modules assume about installed packages. Idempotent.

    Works whether or not Megatron's modules were imported before. Reports once what is ignored: a
    Transformer Engine without a CUDA device (a line on stderr, once per machine), and an importable
    `apex` that is not NVIDIA's (`RuntimeWarning`).

    Raises:
        BrokenTransformerEngineError: Transformer Engine cannot be imported; nothing was patched.
    """
    needed = [row for row in PATCHES if is_needed(row)]
    if "unusable_te" in needed:
        _log_unusable_te()
    if "foreign_apex" in needed:
        _warn_of_foreign_apex()
    for row in needed:
        PATCHES[row]()


def is_needed(row: str) -> bool:
    """Return whether this machine and this line of Megatron-Core need a row of `PATCHES`."""
    if row == "foreign_apex":
        return _importable("apex") and not have_apex()
    if have_te():
        return False
    if row == "unusable_te":
        return transformer_engine.is_installed()
    from megatron_coe.megatron_compat.versions import PARTS_ARE_PARTIALS

    return row not in ONLY_0_16 or not PARTS_ARE_PARTIALS


@functools.cache
def _log_unusable_te() -> None:
    if os.environ.get("LOCAL_RANK", "0") == "0":
        logger.warning(
            "Transformer Engine is installed but left aside: it needs a CUDA device, and there is "
            "none. PyTorch's modules and optimizer are used"
        )


@functools.cache
def _importable(name: str) -> bool:
    """Return whether `import name` works; whatever a broken package raises means no."""
    try:
        load_module(name)
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
    "megatron.core.dist_checkpointing.exchange_utils",
    "megatron.core.dist_checkpointing.strategies.torch",
    "megatron.core.models.backends",
    "megatron.core.models.gpt.gpt_layer_specs",
    "megatron.core.models.gpt.gpt_model",
    "megatron.core.optimizer",
    "megatron.core.optimizer.distrib_optimizer",
    "megatron.core.transformer.attention",
    "megatron.core.transformer.moe.moe_layer",
    "megatron.core.transformer.moe.moe_utils",
    "megatron.core.transformer.multi_latent_attention",
    "megatron.core.transformer.multi_token_prediction",
    "megatron.core.transformer.transformer_block",
)


def _megatron_modules() -> Iterator[Any]:
    for name in _DECIDING:
        load_module(name)
    return loaded_modules("megatron.core")


_TE_FLAG = re.compile(r"HAVE_(TE|GTP|FUSED_QKV_ROPE)")


def _patch_unusable_te() -> None:
    """Decide everything again as if Transformer Engine were absent.

    Megatron takes one that can be imported for one that can run: it builds its optimizer (which
    refuses) and calls its kernels.

    Its classes may stay: what asks for them asks whether a module is one, and none is.
    """
    for module in _megatron_modules():
        if module.__name__.endswith(".transformer_engine"):
            module.HAVE_TE = False
            continue
        for name, value in list(vars(module).items()):
            if value is True and _TE_FLAG.match(name):
                setattr(module, name, False)
            elif inspect.isfunction(value) and _is_of_te(value):
                setattr(module, name, None)
    load_module("megatron.core.transformer.attention").SplitAlongDim = None
    norm = load_module("megatron.core.transformer.torch_norm").WrappedTorchNorm
    load_module("megatron.core.transformer.transformer_block").LayerNormImpl = norm
    _use_torch_optimizers()
    _use_local_multi_tensor_functions()


def _is_of_te(function: types.FunctionType) -> bool:
    """Return whether a function is Transformer Engine's, or Megatron's around one of its."""
    module = function.__module__
    return module == "megatron.core.extensions.transformer_engine" or (
        module.partition(".")[0] == transformer_engine.PACKAGE
    )


def _patch_have_te() -> None:
    """Tell `multi_latent_attention` that there is no Transformer Engine.

    It imports only Megatron's wrappers, which import without Transformer Engine (as `None`), and
    concludes that it is there: `isinstance(x, None)` follows.
    """
    for module in _megatron_modules():
        if getattr(module, "HAVE_TE", False):
            module.HAVE_TE = False


def _patch_inference_linear() -> None:
    """Answer that no layer is Transformer Engine's for inference.

    Megatron-LM's main branch asks, as `multi_latent_attention` of 0.16 asks for others.
    """
    for module in _megatron_modules():
        if hasattr(module, "is_inference_column_parallel_linear"):
            module.is_inference_column_parallel_linear = _never


def _never(module: object) -> bool:
    return False


def _patch_router_gemm() -> None:
    """`moe_utils` leaves `te_general_gemm` undefined, then compares it with `None`."""
    moe_utils = load_module("megatron.core.transformer.moe.moe_utils")
    moe_utils.te_general_gemm = None


def _patch_selective_recompute() -> None:
    """Make `CheckpointWithoutOutput` run without fp8 by default.

    `fp8=False`, its default, means "with fp8" and calls Transformer Engine; only `None` means
    without.
    """
    random = load_module("megatron.core.tensor_parallel.random")
    cls = random.CheckpointWithoutOutput
    fp8, *others = cls.__init__.__defaults__  # fp8 is the first parameter
    if fp8 is False:
        cls.__init__.__defaults__ = (None, *others)


def _patch_distributed_optimizer_load() -> None:
    """Keep the step count that the distributed optimizer has restored.

    Torch's Adam keeps one per parameter, which is restored first. Then the distributed optimizer
    leaves the count out of a checkpoint's tensors and asks for it all the same (`KeyError`) or, of
    checkpoints that are sharded as its buffers are (`dp_reshardable`, the default of Megatron's
    `pretrain`), copies the count from before loading: 0, so that Adam takes trained moments for
    new ones.
    """
    module = load_module("megatron.core.optimizer.distrib_optimizer")
    set_states = module.DistributedOptimizer._set_main_param_and_optimizer_states
    if hasattr(set_states, "__wrapped__"):
        return

    @functools.wraps(set_states)
    def keep_step(self: Any, model_param: torch.Tensor, tensors: dict[str, Any]) -> None:
        group, order = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
        restored = {"step": state["step"]} if "step" in state else {}
        set_states(self, model_param, {**tensors, **restored})

    module.DistributedOptimizer._set_main_param_and_optimizer_states = keep_step


def _patch_distributed_optimizer_state() -> None:
    """Complete Adam's state before it is saved and after it is loaded.

    Torch's Adam has no state before its first step, where the distributed optimizer asserts that
    all parameters have made the same number of steps; so it cannot be loaded. Loading then gives
    them all one tensor as their step count, which counts once per parameter and step: the updates
    that follow are wrong, without a word. And fp32 weights are loaded through views that need
    gradients, which torch refuses outside of `no_grad`.
    """
    module = load_module("megatron.core.optimizer.distrib_optimizer")
    optimizer_class = module.DistributedOptimizer
    state_dict, load_state_dict = optimizer_class.state_dict, optimizer_class.load_state_dict
    if hasattr(state_dict, "__wrapped__"):
        return

    @functools.wraps(state_dict)
    def complete_before(self: Any) -> dict[str, Any]:
        complete_adam_state(self.optimizer)
        return state_dict(self)

    @functools.wraps(load_state_dict)
    @torch.no_grad()
    def complete_after(self: Any, state: dict[str, Any]) -> None:
        load_state_dict(self, state)
        complete_adam_state(self.optimizer)

    optimizer_class.state_dict, optimizer_class.load_state_dict = complete_before, complete_after


def complete_adam_state(optimizer: torch.optim.Optimizer) -> None:
    """Give each parameter of torch's Adam all its state, and a step count of its own.

    Nothing for other optimizers: Transformer Engine's and Apex's count per group.
    """
    if not isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW):
        return
    for group in optimizer.param_groups:
        # Where such an update counts.
        on_device = group.get("fused") or group.get("capturable")
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            step = torch.zeros((), device=parameter.device if on_device else "cpu")
            state["step"] = state.get("step", step).to(step, copy=True)
            for moment in ("exp_avg", "exp_avg_sq"):
                if moment not in state:
                    state[moment] = torch.zeros_like(parameter)


def _patch_gradient_norm() -> None:
    """Compute the L2 norm of many tensors on the device.

    Megatron's own reads one value per tensor back to the host, so that a GPU waits as often in
    every step.
    """
    clip_grads = load_module("megatron.core.optimizer.clip_grads")
    if clip_grads.l2_norm_impl.__module__ == "megatron.core.utils":
        clip_grads.l2_norm_impl = _l2_norm


def _l2_norm(
    chunk_size: int,
    overflow: torch.Tensor,
    tensor_lists: list[list[torch.Tensor]],
    per_tensor: bool,
) -> tuple[torch.Tensor, None]:
    """Return the norm of all tensors together [1], fp32, on their device.

    The interface is `amp_C.multi_tensor_l2norm`'s, without a norm per tensor.
    """
    norm = torch.nn.utils.get_total_norm(tensor_lists[0])
    return norm.float().reshape(1), None


def _patch_multi_tensor_scale() -> None:
    """Copy many tensors in one pass.

    Megatron's own multiplies each by 1 into a tensor of its own first: more than twice the bytes
    that fp32 weights and their bf16 copies are, in every step.
    """
    optimizer = load_module("megatron.core.optimizer.optimizer")
    if optimizer.multi_tensor_scale_impl.__module__ == "megatron.core.utils":
        optimizer.multi_tensor_scale_impl = _scale


def _scale(
    chunk_size: int, overflow: torch.Tensor, tensor_lists: list[list[torch.Tensor]], scale: float
) -> None:
    """Write `scale` times the first list's tensors into the second's, of any dtypes.

    The interface is `amp_C.multi_tensor_scale`'s, without a check for overflow.
    """
    sources, targets = tensor_lists
    if sources:
        torch._foreach_copy_(targets, sources)
        if scale != 1.0:
            torch._foreach_mul_(targets, scale)


def _patch_foreign_apex() -> None:
    """Any importable `apex` makes Megatron choose its FusedLayerNorm, which then refuses."""
    apex_norm = load_module("megatron.core.fusions.fused_layer_norm").FusedLayerNorm
    torch_norm = load_module("megatron.core.transformer.torch_norm").WrappedTorchNorm
    for module in _megatron_modules():
        if getattr(module, "HAVE_APEX", False):
            module.HAVE_APEX = False
        for name in ("LNImpl", "LayerNormImpl"):
            if getattr(module, name, None) is apex_norm:
                setattr(module, name, torch_norm)
    if not have_te():
        # An Apex built without its extensions still offers `FusedAdam`, which then refuses.
        _use_torch_optimizers()


def _use_torch_optimizers() -> None:
    optimizer = load_module("megatron.core.optimizer")
    optimizer.Adam, optimizer.SGD = torch.optim.AdamW, torch.optim.SGD
    optimizer.USING_PYTORCH_OPTIMIZER = True
    distributed = load_module("megatron.core.optimizer.distrib_optimizer")
    distributed.Adam = torch.optim.Adam
    distributed.HAVE_APEX_OR_TE = False
    distributed.USING_APEX_OPTIMIZER = distributed.USING_TE_OPTIMIZER = False


def _use_local_multi_tensor_functions() -> None:
    """Copy, scale and measure many tensors by Megatron's own functions."""
    utils = load_module("megatron.core.utils")
    clip_grads = load_module("megatron.core.optimizer.clip_grads")
    for module in (clip_grads, load_module("megatron.core.optimizer.optimizer")):
        module.multi_tensor_applier = utils.local_multi_tensor_applier
        module.multi_tensor_scale_impl = utils.local_multi_tensor_scale
    clip_grads.l2_norm_impl = utils.local_multi_tensor_l2_norm
    clip_grads.multi_tensor_scale_tensor_impl = None  # 0.16 has none


PATCHES: dict[str, Callable[[], None]] = {
    "unusable_te": _patch_unusable_te,  # first: the others are about Megatron without it
    "selective_recompute": _patch_selective_recompute,
    "distributed_optimizer_load": _patch_distributed_optimizer_load,
    "distributed_optimizer_state": _patch_distributed_optimizer_state,
    "gradient_norm": _patch_gradient_norm,
    "multi_tensor_scale": _patch_multi_tensor_scale,
    "foreign_apex": _patch_foreign_apex,
    "have_te": _patch_have_te,
    "router_gemm": _patch_router_gemm,
    "inference_linear": _patch_inference_linear,
}
"""One row per fault. Removing a row brings its symptom back (see the tests)."""

ONLY_0_16 = frozenset({"have_te", "router_gemm"})
"""Rows of the 0.16 line alone, which go when it goes: 0.19 has these right.

Of the others `inference_linear` is of Megatron-LM's main branch (after 0.19), where it finds what
it patches; all the rest both lines need.
"""
