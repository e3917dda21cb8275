"""Signals that ask a run to stop: noted at any moment, harmless to what a run starts for itself."""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Iterator

import psutil
import pytest

from megatron_coe.training import signals
from megatron_coe.training.signals import STOP_SIGNALS, StopRequest, shielded_children
from tests.unit.training.runs import make_settings, make_trainer, weights


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Whatever a test leaves, the test runner's own handlers come back."""
    previous = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in previous.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_the_first_signal_is_noted_and_no_other_changes_the_end(number, capfd):
    stop = StopRequest()
    with stop.listening(process_ends=True):
        assert stop.received is None
        signal.raise_signal(number)
        for other in STOP_SIGNALS:  # within a second: a launcher's echo, also of Ctrl-C
            signal.raise_signal(other)
        assert stop.received is number
    for other in STOP_SIGNALS:
        signal.raise_signal(other)
    assert capfd.readouterr().err.splitlines() == [
        f"{number.name}: ends before the next step (Ctrl-C once more: at once)"
    ]


def test_a_signal_after_the_last_step_does_not_spoil_the_status():
    with StopRequest().listening(process_ends=True):
        pass
    for number in STOP_SIGNALS:
        assert signal.getsignal(number) is signal.SIG_IGN
        signal.raise_signal(number)


def test_the_handlers_of_a_process_that_goes_on_come_back():
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    with StopRequest().listening():
        assert [signal.getsignal(number) for number in STOP_SIGNALS] != before
        signal.raise_signal(signal.SIGUSR1)
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before


def test_a_second_ctrl_c_interrupts_but_no_second_sigterm_does(monkeypatch):
    monkeypatch.setattr(signals, "ECHO_S", 0.0)
    with StopRequest().listening():
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.raise_signal(number)
        time.sleep(0.01)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_signal_that_was_blocked_until_now_is_not_lost():
    stop = StopRequest()
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    signal.raise_signal(signal.SIGUSR1)
    with stop.listening():
        assert stop.received is signal.SIGUSR1


def test_children_started_in_the_shield_survive_what_their_parent_notes():
    """A manager of multiprocessing, as Megatron starts one to save; and this process hears all."""
    stop = StopRequest()
    others = set(psutil.Process().children(recursive=True))  # of earlier tests' saves
    with stop.listening():
        with shielded_children():
            manager = multiprocessing.get_context("spawn").Manager()
        with manager:
            queue = manager.Queue()
            for child in set(psutil.Process().children(recursive=True)) - others:
                for number in STOP_SIGNALS:
                    child.send_signal(number)
            time.sleep(0.2)
            queue.put("alive")
            assert queue.get() == "alive"
            with shielded_children():
                signal.raise_signal(signal.SIGTERM)
        assert stop.received is signal.SIGTERM


def test_a_signal_before_the_first_step_ends_the_run_there(single_rank, tmp_path):
    trainer = make_trainer(make_settings(tmp_path), single_rank)
    before, stop = weights(trainer), StopRequest()
    stop.received = signal.SIGTERM
    assert trainer.run(stop) is signal.SIGTERM
    assert trainer.progress.step == 0
    assert not list(tmp_path.iterdir()), "there is nothing that a new start would not give"
    assert all(value.equal(before[name]) for name, value in weights(trainer).items())
