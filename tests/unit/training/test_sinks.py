"""W&B and MLflow get what metrics.jsonl has: the real packages, where they are installed."""

from __future__ import annotations

import io
import json
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from megatron_coe.config.run_config import LogSettings
from megatron_coe.training.metrics_logger import MetricsLogger
from megatron_coe.training.sinks import BackgroundSink, check_sinks
from megatron_coe.utils.metrics_file import Record, read_records

REPO = Path(__file__).parents[3]
LOAD = "load/iteration_1/layer_1"
MISSING = [name for name in ("wandb", "mlflow") if find_spec(name) is None]
with_both = pytest.mark.skipif(bool(MISSING), reason=f"{', '.join(MISSING)}: not installed")


class Recorder:
    """A sink that fails when it is told to, and waits where it is told to."""

    def __init__(self, fails_at: int = 0, gate: threading.Event | None = None) -> None:
        self.fails_at, self.gate, self.seen = fails_at, gate, []

    def record(self, step: int, values: Record) -> None:
        if self.gate:
            self.gate.wait()
        if step == self.fails_at:
            raise ConnectionError("the server\nis gone")
        self.seen.append(step)

    def close(self, failed: bool) -> None:
        self.seen.append(f"closed, {failed=}")


def test_a_sink_that_fails_is_named_once_and_the_rest_goes_on():
    recorder, said = Recorder(fails_at=2), []
    sink = BackgroundSink("log.x", lambda: recorder, said.append)
    for step in range(1, 5):
        sink.record(step, {})
    sink.close()
    sink.wait()
    assert said == ["warning: log.x: no more metrics are sent (the server is gone)"]
    assert recorder.seen == [1]


def test_a_sink_that_cannot_be_opened_is_named_too_and_an_exit_is_none():
    for error, reason in ((OSError("no key"), "no key"), (SystemExit(1), "1")):
        said = []

        def start(error: BaseException = error) -> Recorder:
            raise error

        sink = BackgroundSink("log.x", start, said.append)
        sink.record(1, {})
        sink.close()
        sink.wait()
        assert said == [f"warning: log.x: no more metrics are sent ({reason})"]


def test_a_slow_sink_keeps_nobody_waiting():
    gate = threading.Event()
    recorder = Recorder(gate=gate)
    sink = BackgroundSink("log.x", lambda: recorder, print)
    for step in range(100):
        sink.record(step + 1, {})
    assert recorder.seen == []
    gate.set()
    sink.close(failed=True)
    sink.wait()
    assert recorder.seen == [*range(1, 101), "closed, failed=True"]


def test_a_sink_without_a_record_is_never_opened():
    """A validation alone starts no run anywhere."""
    seen = []  # a thread's failure would not be the test's
    sink = BackgroundSink("log.x", lambda: seen.append("opened"), seen.append)
    sink.close()
    sink.wait()
    assert seen == []


@pytest.mark.parametrize("name", ["wandb_project", "mlflow_experiment"])
def test_a_missing_package_is_explained(name, tmp_path, monkeypatch):
    """Also where a folder has its name, as W&B makes one in the current folder."""
    package = name.partition("_")[0]
    if package not in MISSING:
        pytest.skip(f"{package} is installed")
    (tmp_path / package).mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ValueError, match=rf"log\.{name}='p' needs the package {package}: `pip"):
        check_sinks(LogSettings(**{name: "p"}))
    check_sinks(LogSettings())


@pytest.fixture
def log(tmp_path, monkeypatch) -> LogSettings:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.chdir(tmp_path)  # MLflow keeps files there
    return LogSettings(
        dir=str(tmp_path / "run"),
        interval=1,
        wandb_project="my-project",
        wandb_exp_name="my-run",
        mlflow_experiment="my-experiment",
        mlflow_run_name="my-run",
        mlflow_tracking_uri=f"sqlite:///{tmp_path}/mlflow.db",
    )


def wandb_runs(folder: Path) -> Iterator[tuple[str, list[Record], int]]:
    """Yield id, records and exit code of each start, as W&B's own files have them."""
    from wandb.proto.wandb_internal_pb2 import Record as Stored

    for file in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        name, records, code = "", [], -1
        for stored in map(Stored.FromString, leveldb_records(file.read_bytes())):
            kind = stored.WhichOneof("record_type")
            if kind == "run":
                assert (stored.run.project, stored.run.display_name) == ("my-project", "my-run")
                config = {item.key: item.value_json for item in stored.run.config.update}
                name = stored.run.run_id
                assert json.loads(config["train"])["lr"] == 0.5
            elif kind == "history":
                items = {"/".join(i.nested_key) or i.key: i.value_json for i in stored.history.item}
                found = {key: json.loads(value) for key, value in items.items()}
                found = {key: value for key, value in found.items() if key[0] != "_"}
                bars = {key[: -len("/values")] for key in found if key.endswith("/values")}
                for bar in bars:
                    parts = {
                        part: found.pop(f"{bar}/{part}") for part in ("values", "bins", "_type")
                    }
                    assert parts["bins"] == list(range(len(parts["values"]) + 1))
                    found[bar] = parts["values"]
                records.append(found)
            elif kind == "exit":
                code = stored.exit.exit_code
        yield name, records, code


def leveldb_records(content: bytes) -> Iterator[bytes]:
    """Yield the records of LevelDB's log format, after the 7 bytes that W&B begins with."""
    at, whole, block = 7, b"", 1 << 15
    while at + 7 <= len(content):
        if block - at % block < 7:
            at += block - at % block
            continue
        _, size, kind = struct.unpack_from("<IHB", content, at)
        whole += content[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or its last part
            yield whole
            whole = b""


def mlflow_run(log: LogSettings, records: list[Record]) -> tuple[object, dict[tuple, list]]:
    """Return the only run of the experiment, and the values of each step and metric."""
    from mlflow import MlflowClient

    client = MlflowClient(log.mlflow_tracking_uri)
    (run,) = client.search_runs([client.get_experiment_by_name("my-experiment").experiment_id])
    assert run.info.run_name == "my-run" and run.data.params["train.lr"] == "0.5"
    found: dict[tuple, list] = {}
    for name in {name for record in records for name in record} - {"step"}:
        for metric in client.get_metric_history(run.info.run_id, name):
            found.setdefault((metric.step, name), []).append(metric.value)
    stored = Path(client.download_artifacts(run.info.run_id, "metrics.jsonl", log.dir + "/.."))
    assert stored.read_bytes() == Path(log.dir, "metrics.jsonl").read_bytes()
    return run, found


def numbers(records: list[Record]) -> dict[tuple, list]:
    return {
        (record["step"], name): [value]
        for record in records
        for name, value in record.items()
        if name != "step" and not isinstance(value, list)
    }


@with_both
def test_both_get_what_the_file_has_and_a_resumed_run_goes_on_there(log):
    config = {"train": {"lr": 0.5}}

    def start(completed: int) -> MetricsLogger:
        return MetricsLogger(log, 9, completed, config, io.StringIO())

    def record(metrics_logger: MetricsLogger, step: int) -> None:
        load = [0.25, 0.5, 0.125 * step, 0.0]
        metrics_logger.record(step, {"train_loss": 1 / step, "lr": 0.5, LOAD: load})

    first = start(0)
    for step in (1, 2, 3, 4):
        record(first, step)
    first.record(2, {"exact_match": 0.75})  # known later
    first.close(failed=True)  # after step 4 was recorded, and before it was saved
    second = start(3)
    record(second, 4)
    record(second, 5)
    second.close()

    records = read_records(Path(log.dir, "metrics.jsonl"))
    assert [r["step"] for r in records] == [1, 2, 3, 4, 5] and records[1]["exact_match"] == 0.75
    run, found = mlflow_run(log, records)
    assert found == numbers(records), "each once"
    assert run.info.status == "FINISHED"
    (name, before, failed), (again, after, ended) = wandb_runs(Path(log.dir))
    assert name == again and (failed, ended) == (1, 0)
    sent = [record for record in [*before, *after] if len(record) > 1]
    of_steps = [record for record in sent if "lr" in record]
    assert of_steps == [{k: v for k, v in r.items() if k != "exact_match"} for r in records]
    assert [r for r in sent if "lr" not in r] == [{"step": 2, "exact_match": 0.75}]

    third = start(0)  # from the beginning: another run
    record(third, 1)
    third.close()
    assert len({name for name, _, _ in wandb_runs(Path(log.dir))}) == 2


@with_both
def test_a_server_that_is_not_there_ends_nothing(log, monkeypatch, tmp_path):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    log.wandb_project, log.mlflow_tracking_uri = None, "http://127.0.0.1:9"
    stream = io.StringIO()
    metrics_logger = MetricsLogger(log, 9, 0, {}, stream)
    for step in (1, 2):
        metrics_logger.record(step, {"lr": 0.5})
    metrics_logger.close()
    assert stream.getvalue().count("warning: log.mlflow_experiment: no more metrics") == 1
    assert len(read_records(metrics_logger.path)) == 2


RUN = """
model: {{num_layers: 2, hidden_size: 32, num_attention_heads: 4, seq_length: 32,
  num_moe_experts: 4, moe_router_topk: 2, moe_ffn_hidden_size: 16, coe_iterations: 2}}
data: {{tokenizer: {data}/tokenizer.model, train: ["{data}/train"]}}
train: {{steps: 4, global_batch_size: 4, lr: 0.5}}
parallel: {{expert_model_parallel_size: 2}}
"""


@with_both
def test_one_of_two_ranks_writes_and_a_resumed_run_has_one_run(log, tmp_path):
    """A real run of two ranks, stopped and continued by the same command."""
    from megatron_coe.data.corpus import make_corpus
    from megatron_coe.data.preprocess import preprocess
    from megatron_coe.data.records import Fields
    from megatron_coe.data.tokenizer import train_tokenizer

    fields = Fields(("query", "response"), question_answer=True)
    train, _ = make_corpus(tmp_path, train_size=60, valid_size=1, seed=5)
    train_tokenizer([train], tmp_path / "tokenizer.model", fields=fields, vocab_size=400)
    preprocess([train], tmp_path / "train", tmp_path / "tokenizer.model", fields=fields, workers=1)
    config = tmp_path / "run.yaml"
    config.write_text(RUN.format(data=tmp_path))
    names = ("dir", "interval", "wandb_project", "wandb_exp_name", "mlflow_experiment")
    names += ("mlflow_run_name", "mlflow_tracking_uri")
    arguments = [f"log.{name}={getattr(log, name)}" for name in names]
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    for exit_step in ("2", "null"):
        command = [*torchrun, REPO / "pretrain_coe.py", "--config", config, *arguments]
        done = subprocess.run(
            [sys.executable, *map(str, command), f"train.exit_step={exit_step}"],
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        assert "warning: log." not in done.stdout
    records = read_records(Path(log.dir, "metrics.jsonl"))
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    _, found = mlflow_run(log, records)
    assert found == numbers(records)
    (name, before, _), (again, after, _) = wandb_runs(Path(log.dir))
    assert name == again
    assert [*before, *after] == records
