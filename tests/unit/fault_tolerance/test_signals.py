"""Signals that ask a run to stop: noted at any moment, acted on where nothing is lost."""

from __future__ import annotations

import io
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_coe.checkpoint.state import load_checkpoint
from megatron_coe.fault_tolerance import signals
from megatron_coe.fault_tolerance.exceptions import StoppedError
from megatron_coe.fault_tolerance.exit_codes import PREEMPTED
from megatron_coe.fault_tolerance.signals import STOP_SIGNALS, StopRequest
from megatron_coe.training.metrics_logger import MetricsLogger
from megatron_coe.training.validation import MICRO_BATCHES_AT_ONCE, HeldOutSet, Validator
from megatron_coe.utils.metrics_file import read_records
from tests.unit.training.runs import Sequences, make_settings, make_trainer, weights


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
        f"{number.name}: stopping before the next step (Ctrl-C again: at once)"
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


def test_a_signal_before_the_first_step_ends_the_run_there(single_rank, tmp_path):
    trainer = make_trainer(make_settings(tmp_path), single_rank)
    before, stop = weights(trainer), StopRequest()
    stop.received = signal.SIGTERM
    assert trainer.run(stop) is signal.SIGTERM
    assert trainer.progress.step == 0
    assert not list(tmp_path.iterdir()), "there is nothing that a new start would not give"
    assert all(value.equal(before[name]) for name, value in weights(trainer).items())


def test_a_signal_between_two_parts_of_a_start_says_whether_the_command_goes_on(single_rank):
    stop = StopRequest()
    stop.raise_if_stopped(single_rank, "the model was built", saves=True)
    stop.received = signal.SIGUSR1
    for saves, status in ((True, PREEMPTED), (False, 128 + signal.SIGUSR1)):
        with pytest.raises(StoppedError, match="SIGUSR1 before the model was built") as stopped:
            stop.raise_if_stopped(single_rank, "the model was built", saves)
        assert stopped.value.status == status


class HeldOut(Sequences):
    """Held-out sequences of which one brings a signal, if `stop` is there to take it."""

    def __init__(self, stop: StopRequest | None, length: int) -> None:
        super().__init__(2)
        self.stop, self.length, self.read = stop, length, 0

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, number: int) -> dict:
        self.read += 1
        if self.stop and self.read == MICRO_BATCHES_AT_ONCE:
            self.stop.received = signal.SIGTERM
        return super().__getitem__(number)


@pytest.mark.parametrize("length", [3, 1], ids=["within a set", "between two sets"])
def test_a_validation_is_cut_short_and_made_up_for(single_rank, tmp_path, length):
    """The step before it is kept, and the resumed run reports what an unbroken one would."""

    def run(name: str, stop: StopRequest | None = None, resume: Path | None = None):
        log = {"dir": str(tmp_path / name), "interval": 1}
        settings = make_settings(
            tmp_path / name / "saved", train={"steps": 3, "eval_interval": 2}, log=log
        )
        trainer = make_trainer(settings, single_rank)
        held_out = HeldOut(stop, length * MICRO_BATCHES_AT_ONCE)
        sets = {
            name: HeldOutSet(replace(trainer.source, dataset=each), len(each))
            for name, each in {"first": held_out, "second": HeldOut(None, 3)}.items()
        }
        trainer.validator = Validator(settings.train, trainer.train_state, sets, trainer.heartbeat)
        if resume:
            trainer.progress = load_checkpoint(resume, trainer.train_state)
        trainer.metrics_logger = MetricsLogger(
            settings.log, 3, trainer.progress.step, {}, io.StringIO()
        )
        reason = trainer.run(stop)
        trainer.metrics_logger.close()
        records = read_records(tmp_path / name / "metrics.jsonl")
        kept = ("train_loss", "valid_loss", "valid_loss/first", "valid_loss/second")
        metrics = {(r["step"], k): r[k] for r in records for k in kept if k in r}
        return reason, held_out.read, metrics

    _, _, expected = run("unbroken")
    for name in ("valid_loss", "valid_loss/first", "valid_loss/second"):
        assert [key for key in expected if key[1] == name] == [(2, name), (3, name)]
    reason, read, metrics = run("broken", StopRequest())
    assert reason is signal.SIGTERM
    assert read == MICRO_BATCHES_AT_ONCE, "the rest waits for the resumed run"
    assert (2, "train_loss") in metrics and (2, "valid_loss") not in metrics
    resumed = run("broken", resume=tmp_path / "broken" / "saved" / "step_00000002")
    assert resumed[0] is None
    assert resumed[2] == expected
