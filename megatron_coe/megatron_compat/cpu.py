"""Run Megatron-Core on a CPU with gloo: an execution backend for development, tests and small runs.

Megatron-Core's Python code assumes CUDA in a handful of spots (a literal `device="cuda"`, a
stream, the CUDA generator, `"torch.cuda.FloatTensor"`). Its mathematics does not. Each row of
`PATCHES` makes one kind of spot work on a CPU; `install` applies them all. Nothing is
patched at import, and nothing ever is where CUDA is available.

No patch stands in a hot path: a literal device is rewritten by giving the few modules that hold
one their own view of `torch`, so every other call costs what it costs in plain PyTorch.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import time
import types
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from megatron_coe.megatron_compat.modules import load_module, loaded_modules, rebind

CPU = torch.device("cpu")

_installed = False


def install() -> None:
    """Apply every patch of `PATCHES`; later calls do nothing.

    Works whether or not Megatron's modules were imported before.

    Raises:
        RuntimeError: CUDA is available, where the patches would send GPU work to the CPU.
    """
    global _installed
    if torch.cuda.is_available():
        raise RuntimeError(
            "megatron_coe.megatron_compat.cpu.install() is for machines without CUDA, but "
            f"torch.cuda.is_available() is true ({torch.cuda.device_count()} device(s)): leave it "
            "out, or hide the devices with CUDA_VISIBLE_DEVICES="
        )
    if _installed:
        return
    for patch in PATCHES.values():
        patch()
    _keep_freed_memory()
    _installed = True


# --- torch.cuda -----------------------------------------------------------------------------------


class Event:
    """A `torch.cuda.Event` for a device that runs everything in order, at once."""

    def __init__(self, enable_timing: bool = False, **_: bool):
        self._recorded_s = 0.0

    def record(self, stream: Stream | None = None) -> None:
        self._recorded_s = time.perf_counter()

    def elapsed_time(self, end_event: Event) -> float:
        """Return the milliseconds between the two records, as `torch.cuda.Event` gives them."""
        return (end_event._recorded_s - self._recorded_s) * 1e3

    def query(self) -> bool:
        return True

    def wait(self, stream: Stream | None = None) -> None:
        pass

    def synchronize(self) -> None:
        pass


class Stream:
    """A `torch.cuda.Stream` for a device that has one queue: there is nothing to wait for."""

    def __init__(self, device: torch.device | int | None = None, priority: int = 0, **_: int):
        self.device = CPU

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def wait_event(self, event: Event) -> None:
        pass

    def wait_stream(self, stream: Stream) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True


_DEFAULT_STREAM = Stream()


def _current_device() -> torch.device:
    # Megatron only ever passes the answer on as `device=`, where a torch.device does as well as
    # an index.
    return CPU


def _stream_context(stream: Stream | None) -> AbstractContextManager[None]:
    return nullcontext()


def _default_stream(device: torch.device | int | None = None) -> Stream:
    return _DEFAULT_STREAM


def _nothing(*args: object, **kwargs: object) -> None:
    pass


def _patch_current_device() -> None:
    cuda: Any = torch.cuda
    cuda.current_device = _current_device


def _patch_streams() -> None:
    cuda: Any = torch.cuda
    cuda.Stream, cuda.Event, cuda.stream = Stream, Event, _stream_context
    cuda.current_stream = cuda.default_stream = _default_stream
    cuda.synchronize = _nothing


# --- random numbers -------------------------------------------------------------------------------


def _get_rng_state(device: object = None) -> torch.Tensor:
    return torch.default_generator.get_state()


def _set_rng_state(new_state: torch.Tensor, device: object = None) -> None:
    torch.default_generator.set_state(new_state)


def _manual_seed(seed: int) -> None:
    torch.default_generator.manual_seed(seed)


def _set_tracked_rng_state(
    new_state: torch.Tensor, device: object = -1, graph_safe: bool = False
) -> None:
    torch.default_generator.set_state(new_state)


def _not_about_the_shared_generator(record: logging.LogRecord) -> bool:
    return "CPU RNG state changed" not in record.getMessage()


def _patch_rng() -> None:
    """Put the CPU generator in the place of CUDA's, for seeds and for the tracker."""
    namespaces: tuple[Any, ...] = (torch.cuda, torch.cuda.random)
    for namespace in namespaces:
        namespace.get_rng_state = _get_rng_state
        namespace.set_rng_state = _set_rng_state
        namespace.manual_seed = _manual_seed
    # Without CUDA this function queues itself for a CUDA start that never comes.
    random = load_module("megatron.core.tensor_parallel.random")
    rebind(random._set_cuda_rng_state, _set_tracked_rng_state)
    # The tracker warns when the CPU generator moves inside a fork; here that is its purpose.
    logging.getLogger(random.__name__).addFilter(_not_about_the_shared_generator)


# --- literal devices ------------------------------------------------------------------------------

# Modules of the training path that write device="cuda" out.
_LITERAL_CUDA = (
    "megatron.core.dist_checkpointing.exchange_utils",
    "megatron.core.dist_checkpointing.mapping",
    "megatron.core.dist_checkpointing.strategies.state_dict_saver",
    "megatron.core.optimizer.clip_grads",
    "megatron.core.optimizer.grad_scaler",
    "megatron.core.optimizer.optimizer",
    "megatron.core.pipeline_parallel.schedules",
    "megatron.core.rerun_state_machine",
    "megatron.core.tensor_parallel.data",
    "megatron.core.transformer.utils",
    "megatron.core.utils",
)
_LITERAL_CUDA_0_16 = ("megatron.core.transformer.moe.moe_utils",)
"""Those of the 0.16 line alone, which go when it goes."""
_FACTORIES = frozenset({"empty", "empty_like", "full", "ones", "tensor", "zeros", "zeros_like"})


class TorchOnCpu(types.ModuleType):
    """`torch` itself, but its tensor factories read `device="cuda"` as the CPU."""

    def __getattr__(self, name: str) -> object:
        value = getattr(torch, name)
        return _on_cpu(value) if name in _FACTORIES else value


@functools.cache
def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def create(*args: Any, **kwargs: Any) -> torch.Tensor:
        if torch.device(kwargs.get("device") or CPU).type == "cuda":
            kwargs["device"] = CPU
        return factory(*args, **kwargs)

    return create


def _patch_literal_devices() -> None:
    from megatron_coe.megatron_compat.versions import PARTS_ARE_PARTIALS

    view = TorchOnCpu("torch")
    for name in _LITERAL_CUDA if PARTS_ARE_PARTIALS else (*_LITERAL_CUDA, *_LITERAL_CUDA_0_16):
        load_module(name).torch = view


def _patch_pinned_memory() -> None:
    """Rotary positions of context-parallel ranks come from a pinned tensor."""
    view = _TorchUnpinned("torch")
    load_module("megatron.core.models.common.embeddings.rope_utils").torch = view


class _TorchUnpinned(types.ModuleType):
    """`torch` itself, but `torch.tensor` pins nothing: there is no device to copy to."""

    def __getattr__(self, name: str) -> object:
        return getattr(torch, name)

    @staticmethod
    def tensor(data: object, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        return torch.tensor(data, **options)


def _patch_tensor_cuda() -> None:
    def cuda(self: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        return self

    tensor: Any = torch.Tensor
    tensor.cuda = cuda


# --- single functions -----------------------------------------------------------------------------


class _CudaTypeStrings(TorchFunctionMode):
    """`Tensor.type()` answers as it would for the same tensor on a GPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        answer = func(*args, **(kwargs or {}))
        if func is torch.Tensor.type and isinstance(answer, str):
            return answer.replace("torch.", "torch.cuda.", 1)
        return answer


def _with_cuda_type_strings(function: Callable) -> Callable:
    @functools.wraps(function)
    def call(*args: object, **kwargs: object) -> object:
        with _CudaTypeStrings():
            return function(*args, **kwargs)

    return call


def _patch_type_strings() -> None:
    """Answer `"torch.cuda.FloatTensor"` and its like, by which the optimizers sort parameters.

    All three run once at set-up or once per step, so the mode costs training nothing.
    """
    optimizer = load_module("megatron.core.optimizer.optimizer")
    distributed = load_module("megatron.core.optimizer.distrib_optimizer")
    for cls in (optimizer.Float16OptimizerWithFloat16Params, distributed.DistributedOptimizer):
        cls.__init__ = _with_cuda_type_strings(cls.__init__)
    clip = load_module("megatron.core.optimizer.clip_grads")
    function = clip.clip_grad_by_total_norm_fp32
    rebind(function, _with_cuda_type_strings(function))


def _to_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> object:
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def _patch_split_sizes() -> None:
    """Turn split sizes into numbers, as the dispatcher does for CUDA tensors only."""
    load_module("megatron.core.transformer.moe.token_dispatcher")
    moe_utils = load_module("megatron.core.transformer.moe.moe_utils")
    rebind(moe_utils.maybe_move_tensor_to_cpu, _to_host)


def _patch_uneven_parts() -> None:
    """Gloo gathers and scatters parts of one size; experts divided over EP and ETP have others."""
    mappings = load_module("megatron.core.tensor_parallel.mappings")
    gather = mappings._gather_along_first_dim
    reduce_scatter = mappings._reduce_scatter_along_first_dim

    @functools.wraps(gather)
    def gather_parts(
        input_: torch.Tensor,
        group: torch.distributed.ProcessGroup,
        output_split_sizes: list[int] | None = None,
        use_global_buffer: bool = False,
    ) -> torch.Tensor:
        if output_split_sizes is None or group.size() == 1:
            return gather(input_, group, None, use_global_buffer)
        output = input_.new_empty(sum(output_split_sizes), *input_.shape[1:])
        copies = torch.cat([input_] * group.size())
        sent = [len(input_)] * group.size()
        torch.distributed.all_to_all_single(output, copies, output_split_sizes, sent, group=group)
        return output

    @functools.wraps(reduce_scatter)
    def scatter_sum(
        input_: torch.Tensor,
        group: torch.distributed.ProcessGroup,
        input_split_sizes: list[int] | None = None,
        use_global_buffer: bool = False,
    ) -> torch.Tensor:
        if input_split_sizes is None or group.size() == 1:
            return reduce_scatter(input_, group, None, use_global_buffer)
        total = input_.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total, group=group)
        return total.split(input_split_sizes)[group.rank()].clone()

    rebind(gather, gather_parts)
    rebind(reduce_scatter, scatter_sum)


# Where torch.compile leaves the function it was given.
_COMPILED_FROM = "_torchdynamo_orig_callable"


def _patch_fusions() -> None:
    """Run the functions of Megatron's `jit_fuser` eagerly.

    It is `torch.compile`: on a CPU that is a C++ build per function and process, and a new one as
    routing changes the shapes.
    """
    jit = load_module("megatron.core.jit")
    rebind(jit.jit_fuser, jit.noop_decorator)
    for module in loaded_modules("megatron.core"):
        classes = [v for v in vars(module).values() if isinstance(v, type)]
        for namespace in (module, *(c for c in classes if c.__module__ == module.__name__)):
            for name, value in list(vars(namespace).items()):
                if isinstance(value, types.FunctionType) and hasattr(value, _COMPILED_FROM):
                    setattr(namespace, name, getattr(value, _COMPILED_FROM))


PATCHES: dict[str, Callable[[], None]] = {
    "current_device": _patch_current_device,
    "streams": _patch_streams,
    "rng": _patch_rng,
    "literal_devices": _patch_literal_devices,
    "pinned_memory": _patch_pinned_memory,
    "tensor_cuda": _patch_tensor_cuda,
    "type_strings": _patch_type_strings,
    "split_sizes": _patch_split_sizes,
    "uneven_parts": _patch_uneven_parts,
    "fusions": _patch_fusions,
}
"""One row per kind of CUDA-only spot. Removing a row brings its symptom back (see the tests)."""


def _keep_freed_memory() -> None:
    """Let glibc reuse large blocks instead of returning each to the system when it is freed.

    A training step asks for the same large tensors again and again; fresh pages for them cost the
    experts' forward and backward pass about a fifth of its time (63 experts of 1024 x 704, 256
    rows each, one core: 98 GFLOP/s before, 125 after). Other C libraries are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h
    mallopt(mmap_max, 0)
    mallopt(trim_threshold, 2**31 - 1)
