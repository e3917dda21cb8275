"""`tools/run_experiment.py` as users start it: broken off, continued, and answered."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import zygote

REPO = Path(__file__).parents[2]
MINUTE_SCALE = (
    *("train.steps=6", "train.eval_interval=3", "train.eval_samples=4"),
    *("train.global_batch_size=2", "train.micro_batch_size=2"),
    *("checkpoint.save_interval=1", "model.seq_length=32", "model.num_layers=1"),
)


def command(*arguments: object) -> list[str]:
    return [sys.executable, str(REPO / "tools" / "run_experiment.py"), *map(str, arguments)]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return zygote.run("tools/run_experiment.py", *arguments)


def write_texts(path: Path, count: int) -> Path:
    lines = [
        {"question": f"{n} plus {n + 7} is what?", "answer": f"{n} + {n + 7} = {2 * n + 7}"}
        for n in range(count)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_it_goes_on_where_it_was_broken_off(tmp_path):
    texts = write_texts(tmp_path / "train.jsonl", 400), write_texts(tmp_path / "held.jsonl", 40)
    arguments = (
        *("shared", "--seeds", 1, "--jobs", 1, "--output", tmp_path / "out"),
        *("--input", texts[0], "--valid-input", texts[1], "--qa-keys", "question", "answer"),
        *("--vocab-size", 300, *MINUTE_SCALE, "model.vocab_size=300"),
    )
    runs = tmp_path / "out" / "train-300" / "tiny"
    process = subprocess.Popen(
        command(*arguments), cwd=REPO, env=environment(), stdout=subprocess.PIPE, text=True,
        stderr=subprocess.PIPE,
    )  # fmt: skip
    second = runs / "moe_8-64_no-shared_seed-1"
    try:
        while not any((second / "checkpoints").glob("step_*")):
            assert process.poll() is None, process.communicate()
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert said.splitlines()[-1].startswith("interrupted; what was trained is saved")
    first = (runs / "moe_8-64_seed-1" / "metrics.jsonl").stat().st_mtime_ns
    assert not any(record["step"] == 6 for record in records(second))

    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    assert "1 of 4 runs are done already" in done.stdout
    assert "resumed from" in (second / "console.log").read_text()
    assert (runs / "moe_8-64_seed-1" / "metrics.jsonl").stat().st_mtime_ns == first

    told = json.loads((runs / "shared" / "verdict.json").read_text())
    assert told["verdict"] == "cannot be told at this size"
    for variant, (loss,) in told["losses"].items():
        (last,) = [r["valid_loss"] for r in records(runs / f"{variant}_seed-1") if r["step"] == 6]
        assert loss == last
        assert f"{loss:.4f}" in (runs / "shared" / "table.md").read_text()
    assert (runs / "shared" / "plot.png").read_bytes().startswith(b"\x89PNG")

    other = run(*arguments, "train.lr=1e-2")
    assert other.returncode == 2
    assert len(other.stderr.splitlines()) == 1
    for text in ("settings.yaml", "lr: 0.003, now lr: 0.01", "--output"):
        assert text in other.stderr


def test_each_variant_has_its_own_learning_rate(tmp_path):
    texts = write_texts(tmp_path / "train.jsonl", 400), write_texts(tmp_path / "held.jsonl", 40)
    results = tmp_path / "kept" / "fair.jsonl"
    arguments = (
        *("fair", "--variants", "moe_8-64_outer", "coe-2_4-64", "--jobs", 1, "--tuning-seeds", 1),
        *("--input", texts[0], "--valid-input", texts[1], "--qa-keys", "question", "answer"),
        *("--results", results, "--vocab-size", 300, *MINUTE_SCALE, "model.vocab_size=300"),
    )
    done = run(*arguments, "--seeds", 1, "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    kept = [json.loads(line) for line in results.read_text().splitlines()]
    chosen = {}
    for variant in ("moe_8-64_outer", "coe-2_4-64"):
        of_variant = [result for result in kept if result["variant"] == variant]
        tuning = {r["lr"]: r["losses"][-1][1] for r in of_variant if r["held_out"] == "tuning"}
        chosen[variant] = min(tuning, key=tuning.get)
        assert min(tuning) < chosen[variant] < max(tuning)
        (last,) = [result for result in of_variant if result["held_out"] == "report"]
        assert (last["lr"], last["seed"]) == (chosen[variant], 1)
        assert {r["seed"] for r in of_variant if r["held_out"] == "tuning"} == {1001}
    runs = tmp_path / "out" / "train-300" / "tiny"
    told = json.loads((runs / "fair" / "verdict.json").read_text())
    assert told["learning_rates"] == chosen
    for result in kept:
        folder = runs / f"{result['variant']}_seed-{result['seed']}_lr-{result['lr']:g}"
        (last,) = [r["valid_loss"] for r in records(folder) if r["step"] == 6]
        assert result["losses"][-1] == [6, pytest.approx(last, abs=1e-6)]
        data = (folder / "config.yaml").read_text()
        assert f"data/{result['held_out']}\n" in data

    # Another clone, which has the file and no run, trains what is missing.
    done = run(*arguments, "--seeds", 2, "--output", tmp_path / "other")
    assert done.returncode == 0, done.stderr
    assert results.read_text().splitlines()[: len(kept)] == [json.dumps(r) for r in kept]
    new = [json.loads(line) for line in results.read_text().splitlines()[len(kept) :]]
    assert [(r["held_out"], r["seed"]) for r in new] == [("report", 2)] * 2
    trained = (tmp_path / "other" / "train-300" / "tiny").glob("*_seed-*")
    assert len([*trained]) == 2

    # The report alone, without a run; and not with another model's settings.
    (tmp_path / "other" / "train-300" / "tiny" / "fair" / "verdict.json").unlink()
    done = run(*arguments, "--report", "--output", tmp_path / "third")
    assert done.returncode == 0, done.stderr
    told = json.loads((tmp_path / "third/train-300/tiny/fair/verdict.json").read_text())
    assert told["seeds"] == [1, 2]
    assert not [*(tmp_path / "third" / "train-300" / "tiny").glob("*_seed-*")]
    other = run(*arguments, "--report", "--output", tmp_path / "fourth", "model.num_layers=2")
    assert other.returncode == 2
    assert "fair.jsonl" in other.stderr and "other settings" in other.stderr


def test_designs_are_screened_each_at_its_best_learning_rate(tmp_path):
    texts = write_texts(tmp_path / "train.jsonl", 400), write_texts(tmp_path / "held.jsonl", 40)
    results = tmp_path / "screen.jsonl"
    arguments = (
        *("--designs", "moe", "stream", "--input", texts[0], "--valid-input", texts[1]),
        *("--qa-keys", "question", "answer", "--vocab-size", 300, "--output", tmp_path / "out"),
        *("--results", results, *MINUTE_SCALE, "model.vocab_size=300"),
    )
    done = zygote.run("tools/screen_designs.py", *arguments, "--seeds", 1)
    assert done.returncode == 0, done.stderr
    kept = [json.loads(line) for line in results.read_text().splitlines()]
    for design, passes in (("moe", 9), ("stream", 10)):
        own = [r for r in kept if r["variant"] == design]
        tuning = {r["lr"]: r["losses"][-1][1] for r in own if r["held_out"] == "tuning"}
        (last,) = [r for r in own if r["held_out"] == "report"]
        assert last["lr"] == min(tuning, key=tuning.get)
        assert min(tuning) < last["lr"] < max(tuning)
        assert (last["seed"], last["passes"]) == (1, passes)
        assert f"{last['losses'][-1][1]:.4f}" in done.stdout
    done = zygote.run("tools/screen_designs.py", *arguments, "--seeds", 2, "--report")
    assert done.returncode == 0, done.stderr
    assert [json.loads(line) for line in results.read_text().splitlines()] == kept
    assert done.stdout.count("| 1 |") == 2
    done = zygote.run("tools/screen_designs.py", *arguments, "--designs", "best")
    assert (done.returncode, "--designs best" in done.stderr) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["best"], "best"),
        (["main", "--scale", "huge"], "huge"),
        (["main", "--seeds", "0"], "--seeds 0"),
        (["main", "--input", "none.jsonl"], "--valid-input"),
        (["main", "--input", "none.jsonl", "--valid-input", "none.jsonl"], "none.jsonl"),
        (["main", "train.stepz=1"], "train.stepz"),
        (["main", "--dry-run", "model.moe_router_topk=99"], "moe_router_topk=99"),
        (["fair", "train.lr=1e-3"], "train.lr=1e-3"),
        (["fair", "--variants", "moe_8-64"], "--variants moe_8-64"),
        (["fair", "--rates-from", "none.jsonl"], "none.jsonl"),
        (["main", "--report"], "--report"),
    ],
    ids=[
        *("experiment", "scale", "seeds", "half of the data", "no data", "a setting", "a model"),
        *("a learning rate", "no claim", "no rates", "report"),
    ],
)
def test_mistakes_are_told_in_one_message(tmp_path, arguments, named):
    done = run(*arguments, "--output", tmp_path / "out")
    assert (done.returncode, done.stdout) == (2, "")
    assert named in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_dry_run_prints_sizes_and_trains_nothing(tmp_path):
    done = run("layers", "--dry-run", "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "MoE(8/64), 3 x layers | moe_8-64_12-layers" in done.stdout
    assert "9 runs" in done.stdout and " min " in done.stdout
    assert not (tmp_path / "out").exists()


def test_the_verdict_page_shows_what_the_results_say(tmp_path):
    """Every row that a command of the page prints from the committed results stands on the page."""
    page = (REPO / "docs" / "verdict.md").read_text()
    lines = page.replace("\\\n", " ")
    commands = re.findall(r"^    python (tools/\S+) (.*--report.*)$", lines, re.M)
    assert commands
    for tool, arguments in commands:
        done = zygote.run(tool, *shlex.split(arguments), "--output", tmp_path, cwd=REPO)
        assert done.returncode == 0, done.stderr
        rows = [line for line in done.stdout.splitlines() if line.startswith("| ")]
        assert len(rows) > 3
        missing = [row for row in rows if row not in page]
        assert not missing, "\n".join(missing)
