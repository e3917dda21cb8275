"""Faults planted in a run's own process before the script starts.

The product has no hooks for tests. A plant wraps a function of it in the process of one rank; what
it is to do stands in the environment variables FAULT_….
"""

from __future__ import annotations

import functools
import importlib
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_coe.model.moe.layer import CoELayer

PHASES = {
    "start-up": "megatron_coe.model.backends:prepare",
    "data set": "megatron_coe.training.build:build_dataset_sets",
    "loading": "megatron_coe.training.build:load_checkpoint",
    "step": "megatron_coe.training.trainer:Trainer.step",
    "evaluation": "megatron_coe.training.trainer:Trainer.evaluate",
    "save": "megatron_coe.training.trainer:Trainer.save",
}
"""The functions that are the phases of a run."""

IN_PHASE, AFTER = "in the phase", "just after it"


def wrap(place: str, around: Callable[[Callable], Callable]) -> None:
    """Put `around(function)` in the place of `module:[Class.]function`."""
    module, _, path = place.partition(":")
    owner: object = importlib.import_module(module)
    *outer, name = path.split(".")
    for part in outer:
        owner = getattr(owner, part)
    function = getattr(owner, name)
    setattr(owner, name, functools.wraps(function)(around(function)))


def signal_in_phase() -> None:
    """Signal this process FAULT_DELAY seconds after a phase was entered for the FAULT_NTH time."""
    number = signal.Signals[os.environ["FAULT_SIGNAL"]]
    delay_s, nth = float(os.environ["FAULT_DELAY"]), int(os.environ["FAULT_NTH"])
    mark = Path(os.environ["FAULT_MARK"])
    entered, inside = 0, False

    def strike() -> None:
        mark.write_text(IN_PHASE if inside else AFTER)
        os.kill(os.getpid(), number)

    def around(function: Callable) -> Callable:
        def phase(*args: object, **kwargs: object) -> object:
            nonlocal entered, inside
            entered += 1
            inside = True
            if entered == nth:
                timer = threading.Timer(delay_s, strike)
                timer.daemon = True
                timer.start()
            try:
                return function(*args, **kwargs)
            finally:
                inside = False

        return phase

    wrap(PHASES[os.environ["FAULT_PHASE"]], around)


def stall() -> None:
    """Make every step take FAULT_DELAY seconds longer."""
    delay_s = float(os.environ["FAULT_DELAY"])

    def around(step: Callable) -> Callable:
        def slow(*args: object, **kwargs: object) -> object:
            end_s = time.monotonic() + delay_s
            while time.monotonic() < end_s:
                time.sleep(0.05)
            return step(*args, **kwargs)

        return slow

    wrap(PHASES["step"], around)


def loop() -> None:
    """Hang in step FAULT_STEP."""

    def around(step: Callable) -> Callable:
        def endless(trainer: object, *args: object, **kwargs: object) -> object:
            while _is_due(trainer):
                time.sleep(0.01)
            return step(trainer, *args, **kwargs)

        return endless

    wrap(PHASES["step"], around)


def fail() -> None:
    """Raise an error in step FAULT_STEP."""

    def around(step: Callable) -> Callable:
        def failing(trainer: object, *args: object, **kwargs: object) -> object:
            if _is_due(trainer):
                raise RuntimeError("planted")
            return step(trainer, *args, **kwargs)

        return failing

    wrap(PHASES["step"], around)


def not_finite() -> None:
    """FAULT_VALUE in the first iteration of layer 2, in every attempt at step FAULT_STEP.

    FAULT_PLACE says where: in what the experts give (`output`), or in the router's `gradient`.
    """
    value, place = float(os.environ["FAULT_VALUE"]), os.environ["FAULT_PLACE"]
    due, calls = False, 0

    def poisoned(tensor: torch.Tensor) -> torch.Tensor:
        bad = tensor.clone()
        bad.view(-1)[:1] = value
        return bad

    def enter(layer: object, args: object) -> None:
        nonlocal calls
        calls = 0

    def leave(experts: object, args: object, output: tuple) -> tuple | None:
        nonlocal calls
        calls += 1
        return (poisoned(output[0]), *output[1:]) if due and calls == 1 else None

    def around(step: Callable) -> Callable:
        def bad_step(trainer: Any, *args: object, **kwargs: object) -> object:
            nonlocal due
            if _is_due(trainer):
                layer = _coe_layers(trainer)[1]
                if place == "output":
                    layer.register_forward_pre_hook(enter)
                    layer.experts.register_forward_hook(leave)
                else:
                    weight = next(layer.router.parameters())
                    weight.register_hook(lambda gradient: poisoned(gradient) if due else None)
            due = _is_due(trainer)
            try:
                return step(trainer, *args, **kwargs)
            finally:
                due = False

        return bad_step

    wrap(PHASES["step"], around)


def _is_due(trainer: Any) -> bool:
    return trainer.progress.step + 1 == int(os.environ["FAULT_STEP"])


def _coe_layers(trainer: Any) -> list[CoELayer]:
    chunks = trainer.train_state.chunks
    return [m for chunk in chunks for m in chunk.modules() if isinstance(m, CoELayer)]
