"""`tools/estimate.py` and `tools/plot_runs.py` as users start them."""

from __future__ import annotations

import json
from pathlib import Path
from subprocess import CompletedProcess

from megatron_coe.data.records import Fields
from megatron_coe.data.tokenizer import train_tokenizer
from tests import zygote


def run(tool: str, *arguments: object, **how: bool) -> CompletedProcess[str]:
    return zygote.run(f"tools/{tool}", *arguments, **how)


def test_estimate_prints_the_sizes_of_a_preset():
    result = run(
        "estimate.py", "--config", "examples/paper/coe-2_4-64.yaml", "train.seed=1", forked=False
    )
    assert result.returncode == 0, result.stderr
    assert "780,930,048 (571,214,848 without embedding and head)" in result.stdout
    for name in ("active per token", "FLOPs per token", "memory of a rank", "activations"):
        assert name in result.stdout


def test_the_vocabulary_is_that_of_the_tokenizer_or_said_to_be_missing(tmp_path):
    """As it is in training; without it, the tables and the head are a part nobody would miss."""
    texts, model = tmp_path / "texts.txt", tmp_path / "t.model"
    texts.write_text("one two three four five\n" * 50)
    train_tokenizer([texts], model, fields=Fields(), vocab_size=280)  # 384 rows of 128, twice
    quickstart = ("--config", "examples/quickstart.yaml", f"data.tokenizer={model}")
    named = run("estimate.py", *quickstart)
    assert named.returncode == 0, named.stderr
    body, tables = 3_630_464, 2 * 384 * 128
    assert "280 ids, padded to 384" in named.stdout
    assert f"{body + tables:,} ({body:,} without embedding and head)" in named.stdout
    # Per token the tables' rows are read and only the head is multiplied.
    assert f"{9_781_248 + 6 * tables // 2:,} at sequence length 256" in named.stdout
    unset = ("model.vocab_size=0", "train.global_batch_size=1")
    planned = run("plan.py", *quickstart, *unset, "--gpus", 1)
    assert planned.returncode == 0, planned.stderr
    assert f"{body + tables:,} parameters" in planned.stdout
    model.unlink()
    missing = run("estimate.py", *quickstart)
    assert missing.returncode == 0, missing.stderr
    first = missing.stdout.splitlines()[0]
    for words in ("NOTHING BELOW COUNTS EMBEDDING AND HEAD", "data.tokenizer", "model.vocab_size"):
        assert words in first


def test_estimate_names_the_legal_expert_parallel_sizes():
    layout = "parallel.expert_model_parallel_size=4"
    result = run("estimate.py", "--config", "examples/paper/coe-2_4-64.yaml", layout)
    assert (result.returncode, result.stdout) == (2, "")
    assert len(result.stderr.splitlines()) == 1
    assert "1, 3, 7, 9, 21, 63" in result.stderr


def write_run(folder: Path, losses: list[float]) -> Path:
    folder.mkdir()
    records = [{"step": 1, "train_loss": 5.0}]
    records += [{"step": step, "valid_loss": loss} for step, loss in enumerate(losses, start=2)]
    text = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "metrics.jsonl").write_text(text)
    return folder


def test_plot_runs_draws_and_tells_the_end(tmp_path):
    picture, a, b = tmp_path / "loss.png", *(write_run(tmp_path / x, [4.5, 4.25]) for x in "ab")
    for named in (a, a / "metrics.jsonl"):
        result = run("plot_runs.py", named, "--output", picture, forked=named != a)
        assert result.returncode == 0, result.stderr
        assert result.stdout == f"{picture}: validation loss 4.2500 at step 3\n"
        assert picture.read_bytes().startswith(b"\x89PNG")
    c = write_run(tmp_path / "c", [4.0, 3.75])
    result = run("plot_runs.py", f"both={a},{c}", b, "--output", picture)
    told = ["both: validation loss 4.0000 ± 0.3536 at step 3 (2 runs)", "b: validation loss 4.2500"]
    assert result.returncode == 0, result.stderr
    for line, text in zip(result.stdout.splitlines(), told, strict=True):
        assert line.startswith(f"{picture}: {text}")
    (tmp_path / "other").mkdir()
    for arguments, text in (
        ([tmp_path / "none.jsonl"], "none.jsonl"),
        ([a, write_run(tmp_path / "other" / "a", [1.0])], "two curves go by the same name"),
        ([a, "--x", "tokens"], "config.yaml"),
    ):
        wrong = run("plot_runs.py", *arguments, "--output", picture)
        assert (wrong.returncode, wrong.stdout) == (2, "")
        assert text in wrong.stderr and len(wrong.stderr.splitlines()) == 1
