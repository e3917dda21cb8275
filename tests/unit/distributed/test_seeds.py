"""Deterministic mode costs nothing: no operation of a step has a slower form in it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.host_syncs import _caller
from megatron_coe.config.model_section import build_provider
from megatron_coe.distributed.seeds import use_deterministic_kernels
from megatron_coe.distributed.train_state import build_model
from tests.unit.training.planted import everything, same
from tests.unit.training.runs import make_settings, make_trainer

SORTED = {
    *("scatter.src", "scatter_.src", "scatter_add", "scatter_add_", "scatter_reduce.two"),
    *("index_add", "index_add_", "index_copy", "index_copy_", "put_", "masked_scatter_"),
}
"""Operations that CUDA makes by sorting indices in deterministic mode (torch's
`use_deterministic_algorithms`); `index_put_` with them, but for a single value."""

WARNED_OF = {"bincount", "histc", "kthvalue", "median", "_embedding_bag_backward", "grid_sampler"}
"""Operations that have no deterministic form there; `cumsum` of floats with them."""


@pytest.fixture
def deterministic(monkeypatch) -> Iterator[None]:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    monkeypatch.setenv("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0")
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    use_deterministic_kernels()
    yield
    torch.use_deterministic_algorithms(False)


class Slower(TorchDispatchMode):
    """Counts, by place, operations that deterministic mode makes slower or warns of on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        overload = f"{name}.{func._schema.overload_name}".removesuffix(".")
        puts = name in ("index_put", "index_put_") and args[2].numel() > 1
        sums = name in ("cumsum", "cumsum_") and args[0].is_floating_point()
        if {name, overload} & (SORTED | WARNED_OF) or puts or sums:
            self.found[f"{overload} at {_caller()}"] += 1
        return func(*args, **(kwargs or {}))


MODELS = {
    "softmax": {},
    "of the chosen": {"moe_router_pre_softmax": False},
    "sigmoid": {"moe_router_score_function": "sigmoid"},
    "batch-wise loss": {"moe_router_load_balancing_type": "aux_loss"},
    "upcycled": {"coe_residual": "outer", "coe_upcycled": True},
}


@pytest.mark.parametrize("model", MODELS)
def test_no_operation_of_a_step_is_slower_for_it(single_rank, deterministic, model: str) -> None:
    settings = make_settings(model=MODELS[model], train={"micro_batch_size": 4})
    trainer = make_trainer(settings, single_rank)
    trainer.step()
    with Slower() as mode:
        trainer.step()
    ours = [place for place in mode.found if "tensor_parallel/cross_entropy.py" not in place]
    assert not ours
    assert sum(mode.found.values()) <= 1, "Megatron's loss, once per micro-batch"


def test_embeddings_are_looked_up_whatever_megatron_thinks(single_rank) -> None:
    settings = make_settings()
    provider = build_provider(settings, single_rank)
    provider.deterministic_mode = True
    (chunk,) = build_model(provider, settings.parallel, single_rank, seed=1)
    embedding = chunk.module.embedding.word_embeddings
    with Slower() as mode:
        embedding(torch.zeros(2, 3, dtype=torch.int64, device=single_rank)).sum().backward()
    assert not mode.found


def test_the_mode_finds_what_it_looks_for() -> None:
    x, index = torch.zeros(4, 3, requires_grad=True), torch.tensor([[0, 1], [1, 2]])
    with Slower() as mode:
        x.gather(0, index).sum().backward()
        torch.zeros(3).scatter(0, index[0], torch.ones(2))
        torch.zeros(3).index_put_((index[0],), torch.ones(2))
        torch.zeros(3).index_put_((index[0],), torch.ones(()))
        torch.zeros(3).scatter(0, index[0], 1.0)
        torch.ones(3).cumsum(0)
    assert sum(mode.found.values()) == 4


def test_nothing_is_read_before_it_is_written(single_rank, deterministic) -> None:
    """New memory full of NaN, or left as it is: the same bits. So it need not be filled.

    They are those of the other mode, too, on a CPU.
    """
    assert not torch.utils.deterministic.fill_uninitialized_memory
    states = []
    for mode, filled in ((True, False), (True, True), (False, False)):
        torch.use_deterministic_algorithms(mode)
        torch.utils.deterministic.fill_uninitialized_memory = filled
        trainer = make_trainer(make_settings(train={"micro_batch_size": 2}), single_rank)
        for _ in range(3):
            trainer.step()
        states.append(everything(trainer))
    assert same(states[0], states[1])
    assert same(states[0], states[2])
