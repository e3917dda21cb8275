from __future__ import annotations

import time

import pytest
import torch

from benchmarks.phases import (
    GRADIENT_BUFFERS,
    OTHER,
    largest_first,
    marked,
    measure_phases,
    smallest,
)

CPU = torch.device("cpu")


class Slow(torch.autograd.Function):
    """Sleeps so long forward and so long backward, in seconds."""

    @staticmethod
    def forward(ctx, x, there, back):
        ctx.back = back
        time.sleep(there)
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        time.sleep(ctx.back)
        return dy, None, None


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(3))

    def first(self, x):
        return Slow.apply(x, 0.02, 0.08)

    def second(self, x):
        inner = self.third(x)  # a phase within a phase
        return Slow.apply(inner, 0.06, 0.04)

    def third(self, x):
        return Slow.apply(x, 0.10, 0.02)

    def work(self):
        self.second(self.first(self.weight * 1.0)).sum().backward()


def test_phases_get_their_own_time_forward_and_backward():
    model = Model()
    calls = [(model, name, name) for name in ("first", "second", "third", "absent")]
    found = measure_phases(model.work, calls, CPU)
    expected = {"first": (0.02, 0.08), "second": (0.06, 0.04), "third": (0.10, 0.02)}
    for phase, (there, back) in expected.items():
        # A sleep is never shorter; a busy machine may make it much longer.
        assert found[phase][0] >= there
        assert found[phase][1] >= back
    assert {OTHER, GRADIENT_BUFFERS} <= found.keys()
    assert not vars(model).keys() & set(expected)


def test_marked_methods_are_as_before():
    model = Model()
    own = model.__dict__["hook"] = lambda: 5
    with pytest.raises(RuntimeError), marked([(model, "first", "a"), (model, "hook", "b")]):
        assert "first" in vars(model)
        assert model.hook is not own
        assert model.hook() == 5
        raise RuntimeError
    assert "first" not in vars(model)
    assert model.hook is own


def test_the_least_of_several_runs():
    profiles = [{"a": (3.0, 1.0), "b": (1.0, 0.0)}, {"a": (2.0, 2.0), "b": (5.0, 4.0)}]
    assert smallest(profiles) == {"b": (1.0, 0.0), "a": (2.0, 1.0)}
    assert largest_first(profiles) == ["b", "a"]
