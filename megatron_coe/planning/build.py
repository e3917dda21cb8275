"""Build one rank's model of any layout in one process, without memory, as Megatron builds it.

Torch's fake process group plays the other ranks, and every tensor is on the meta device: shapes
without storage. So what a rank of a thousand would hold is counted on a laptop, by the code that
will run there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch.distributed as dist
from megatron.core import parallel_state
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

from megatron_coe.planning.memory import stage_params
from megatron_coe.planning.plan import Plan


@dataclass(frozen=True)
class Built:
    """Parameters of a rank: outside the routed experts and in them, built and predicted."""

    rank: int
    stage: int
    dense: int
    expert: int
    predicted: tuple[int, int]

    @property
    def agrees(self) -> bool:
        return (self.dense, self.expert) == self.predicted


def build_rank(plan: Plan, rank: int) -> Built:
    """Build the model chunks of one rank of `plan.world_size` and count their parameters.

    The process must have no process groups of its own. Always with the `torch` backend, whose
    modules are those that the prediction counts.

    Raises:
        ValueError: there is no such rank.
    """
    if not 0 <= rank < plan.world_size:
        raise ValueError(f"rank {rank} is none of the {plan.world_size}: give 0 … world size - 1")
    # Initializing would spend minutes on drawing numbers that nobody can see.
    model = plan.model.with_fields(backend="torch", perform_initialization=False)
    stages = model.virtual_pipeline_model_parallel_size
    with _fake_ranks(plan, rank), _OnMeta():
        stage = parallel_state.get_pipeline_model_parallel_rank()
        chunks = [model.provide(vp_stage=vp) for vp in (range(stages) if stages else [None])]
    dense = expert = 0
    for parameter in (p for chunk in chunks for p in chunk.parameters()):
        # Experts' gradients are not reduced over the data-parallel group of the others.
        if getattr(parameter, "allreduce", True):
            dense += parameter.numel()
        else:
            expert += parameter.numel()
    return Built(rank, stage, dense, expert, stage_params(plan, stage))


@contextmanager
def _fake_ranks(plan: Plan, rank: int) -> Iterator[None]:
    """Make Megatron's parallel groups of one rank among others that do not exist."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    model = plan.model
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=plan.world_size)
    try:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=model.tensor_model_parallel_size,
            pipeline_model_parallel_size=model.pipeline_model_parallel_size,
            virtual_pipeline_model_parallel_size=model.virtual_pipeline_model_parallel_size,
            context_parallel_size=model.context_parallel_size,
            expert_model_parallel_size=model.expert_model_parallel_size,
            expert_tensor_parallel_size=model.expert_tensor_parallel_size,
            create_gloo_process_groups=False,
        )
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


class _OnMeta(TorchFunctionMode):
    """Makes every new tensor on the meta device, also where the code names another.

    Megatron names the current CUDA device, which `torch.device("meta")` as a context would leave
    alone.
    """

    def __torch_function__(
        self, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        kwargs = dict(kwargs or {})
        if func in _device_constructors():
            kwargs["device"] = "meta"
        return func(*args, **kwargs)
