"""Fixtures shared by every test."""

from __future__ import annotations

import gc
import json
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--outcomes", help="write each test's outcome there (tests/engine_lines.py)")


def pytest_configure(config: pytest.Config) -> None:
    """A suite that a shell starts in the background ignores Ctrl-C, and so would all it starts."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    gc.disable()  # until the tests are collected: of what is imported nothing is garbage
    path = config.getoption("--outcomes")
    if path and not hasattr(config, "workerinput"):  # xdist's controller sees every report
        config.pluginmanager.register(Outcomes(Path(path)))


def pytest_collection_finish() -> None:
    """Leave what has been imported, half a million objects, out of collections of garbage."""
    gc.enable()
    gc.collect()
    gc.freeze()


class Outcomes:
    """Writes what became of each test: passed, skipped or failed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.outcomes: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.outcomes[report.nodeid] = report.outcome

    def pytest_sessionfinish(self) -> None:
        self.path.write_text(json.dumps(self.outcomes, indent=0, sort_keys=True))


@pytest.fixture(scope="module", autouse=True)
def released() -> Iterator[None]:
    """No thread of a file's process groups is left to those that come after it."""
    yield
    if "megatron.core.parallel_state" in sys.modules:
        from tests.threads import release_groups

        release_groups()


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Megatron-Core made ready for this machine, once; the device to test on."""
    from megatron_coe.model.backends import prepare

    return prepare()


@pytest.fixture(scope="module")
def single_rank(device: torch.device) -> Iterator[torch.device]:
    """One rank with Megatron's parallel state and seeds; all of it is gone afterwards.

    The rendezvous is in memory: no port, no file.
    """
    import torch
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
    from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

    from megatron_coe.megatron_compat.versions import clear_aux_losses

    clear_aux_losses()  # sized by the first model of other tests
    MTPLossLoggingHelper.tracker.clear()  # likewise
    backend = "nccl" if device.type == "cuda" else "gloo"
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    try:
        parallel_state.initialize_model_parallel()
        model_parallel_cuda_manual_seed(1234)
        yield device
    finally:
        MoEAuxLossAutoScaler.main_loss_backward_scale = None  # set by a training step, for good
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()
