"""What is planted in a run's own process before the script starts: faults that come from inside.

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

PHASES = {
    "start-up": "megatron_coe.backends:prepare",
    "data set": "megatron_coe.training.run:build_datasets",
    "loading": "megatron_coe.training.run:load_checkpoint",
    "step": "megatron_coe.training.loop:Trainer.step",
    "evaluation": "megatron_coe.training.loop:Trainer.evaluate",
    "save": "megatron_coe.training.loop:Trainer.save",
}
"""Where the phases of a run begin and end."""

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
