"""Reports: records on disk, on the console, and after a resume."""

from __future__ import annotations

import io
import json

import pytest

from megatron_coe.config.run_config import LogSettings
from megatron_coe.config.schedules import BatchSchedule
from megatron_coe.training.metrics_logger import MetricsLogger, console_line
from megatron_coe.utils.metrics_file import drop_records_after, read_records


def test_records_go_to_file_console_and_tensorboard(tmp_path):
    stream = io.StringIO()
    metrics_logger = MetricsLogger(LogSettings(dir=str(tmp_path)), 20, 0, {}, stream)
    metrics_logger.record(1, {"train_loss": 2.5, "lr": 1e-3})
    metrics_logger.record(10, {"train_loss": 2.0, "valid_loss": 2.25, "valid_loss/code": 2.5})
    metrics_logger.close()
    assert read_records(tmp_path / "metrics.jsonl") == [
        {"step": 1, "train_loss": 2.5, "lr": 1e-3},
        {"step": 10, "train_loss": 2.0, "valid_loss": 2.25, "valid_loss/code": 2.5},
    ]
    lines = stream.getvalue().splitlines()
    assert lines == [
        "step  1/20 | loss 2.5000 | lr 1.000e-03",
        "step 10/20 | loss 2.0000 | valid loss 2.2500 | valid loss/code 2.5000",
    ]
    assert list((tmp_path / "tensorboard").glob("events.*"))


def test_a_terminal_gets_a_progress_bar_and_the_same_lines(tmp_path):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    metrics_logger = MetricsLogger(LogSettings(dir=str(tmp_path)), 20, 5, {}, stream)
    for step in range(6, 21):
        metrics_logger.advance()
        if step == 10:
            metrics_logger.record(10, {"train_loss": 2.0})
    metrics_logger.close()
    assert "step 10/20 | loss 2.0000\n" in stream.getvalue()
    assert " 5/20 " in stream.getvalue() and " 20/20 " in stream.getvalue()


def test_the_console_shows_how_long_it_has_taken_and_how_long_it_will(tmp_path):
    """The estimate has what happens between the steps, and none of what was before the first."""
    now, stream = [1000.0], io.StringIO()
    log = LogSettings(dir=str(tmp_path))
    metrics_logger = MetricsLogger(log, 90, 20, {}, stream, last_step=80, clock=lambda: now[0])
    for step, second in ((30, 1100.0), (40, 1160.0), (50, 4760.0)):
        now[0] = second
        metrics_logger.record(step, {"flops_per_second": 1.26e13, "seconds": 7.0})
        metrics_logger.record(25, {"exact_match": 0.5})
    metrics_logger.close()
    of_steps = stream.getvalue().splitlines()[::2]
    assert of_steps == [
        "step 30/90 | 12.6 TFLOP/s | elapsed 0:01:40",
        "step 40/90 | 12.6 TFLOP/s | elapsed 0:02:40 | left 0:04:00",
        "step 50/90 | 12.6 TFLOP/s | elapsed 1:02:40 | left 1:31:30",
    ]


def test_what_is_left_of_a_ramp_is_counted_in_sequences(tmp_path):
    """Two steps of 2 sequences took 10 s each, and six of 4 are left."""
    now, stream = [0.0], io.StringIO()
    metrics_logger = MetricsLogger(
        LogSettings(dir=str(tmp_path)),
        10,
        0,
        {},
        stream,
        samples_after=BatchSchedule(2, 2, 8, 4).samples_after,
        clock=lambda: now[0],
    )
    for step in (2, 4):
        now[0] += 20.0
        metrics_logger.record(step, {"seconds": now[0]})
    metrics_logger.close()
    assert stream.getvalue().splitlines()[-1].endswith("| elapsed 0:00:40 | left 0:02:00")


@pytest.mark.parametrize(
    ("rate", "shown"),
    [(12, "12.0 FLOP/s"), (4.5e9, "4.5 GFLOP/s"), (1e15, "1.0 PFLOP/s"), (2e21, "2000.0 EFLOP/s")],
)
def test_the_console_shows_flops_with_a_prefix(rate, shown):
    assert console_line({"flops_per_second": rate}) == shown


def test_the_console_shows_balance_by_iteration_but_not_by_layer():
    line = console_line(
        {
            "balance/seq_aux_loss/iteration_1": 1.0625,
            "balance/seq_aux_loss/iteration_1/layer_1": 9.0,
            "balance/seq_aux_loss/iteration_2": 1.25,
            "tokens_per_second": 12345.6,
        }
    )
    assert line == "tokens/s 12,346 | balance 1.062 1.250"


def test_a_resume_drops_what_it_will_write_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": n}) + "\n" for n in (1, 5, 10, 15)) + '{"step": 2')
    MetricsLogger(LogSettings(dir=str(tmp_path)), 20, 10, {}, io.StringIO()).close()
    assert [record["step"] for record in read_records(path)] == [1, 5, 10]
    dropped = drop_records_after(path, 0)
    assert [record["step"] for record in dropped] == [1, 5, 10]
    assert read_records(path) == []


def test_what_is_known_later_belongs_to_its_step(tmp_path):
    """A score of step 10 comes after step 20; a resume from step 15 keeps it."""
    path = tmp_path / "metrics.jsonl"
    lines = ({"step": 10, "lr": 1}, {"step": 20}, {"step": 10, "exact_match": 0.5}, {"step": 30})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_records(path)[0] == {"step": 10, "lr": 1, "exact_match": 0.5}
    assert [record["step"] for record in read_records(path)] == [10, 20, 30]
    assert [record["step"] for record in drop_records_after(path, 15)] == [20, 30]
    assert read_records(path) == [{"step": 10, "lr": 1, "exact_match": 0.5}]


def test_loads_are_lists_and_bars(tmp_path):
    """Bar number i of TensorBoard's histogram is expert i, as high as its load."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    load, name = [0.5, 0.0, 0.3, 0.2], "load/iteration_2/layer_1"
    metrics_logger = MetricsLogger(LogSettings(dir=str(tmp_path)), 20, 0, {}, io.StringIO())
    metrics_logger.record(7, {name: load, "load_entropy/iteration_2": 0.75})
    metrics_logger.close()
    assert read_records(metrics_logger.path) == [
        {"step": 7, name: load, "load_entropy/iteration_2": 0.75}
    ]
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (histogram,) = events.Histograms(name)
    assert histogram.step == 7
    assert histogram.histogram_value.bucket == load
    assert histogram.histogram_value.bucket_limit == [0.5, 1.5, 2.5, 3.5]
    assert events.Scalars("load_entropy/iteration_2")[0].value == 0.75


def test_the_newest_value_of_a_figure(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "seconds": 3}\n{"step": 2, "seconds": 5}\n{"step": 3}\n')
    metrics_logger = MetricsLogger(LogSettings(dir=str(tmp_path)), 20, 2, {}, io.StringIO())
    assert (metrics_logger.latest("seconds"), metrics_logger.latest("lr")) == (5, None)
    metrics_logger.close()
