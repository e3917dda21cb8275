"""Ending the threads of process groups that are no longer used.

A gloo group keeps three threads, which wake a hundred times a second, until nothing refers to it.
"""

from __future__ import annotations

import gc

from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher


def release_groups() -> None:
    """Let go of destroyed groups that trained models hold.

    A dispatcher remembers tensors of its last pass, whose graph ends in the hooks of Megatron's
    DistributedDataParallel, which owns the model: a circle through autograd's C++ nodes, which
    Python's collector cannot see.
    """
    for thing in gc.get_objects():
        if isinstance(thing, MoETokenDispatcher):
            vars(thing).clear()
    gc.collect()
