"""`tools/benchmark.py` as users start it, on models of a few thousand weights."""

from __future__ import annotations

import json
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import torch

from tests import zygote
from tests.zygote import REPO


def benchmark(*arguments: object, **how: bool) -> CompletedProcess[str]:
    return zygote.run("tools/benchmark.py", *arguments, **how)


def test_every_benchmark_of_one_process(tmp_path):
    """Variants that must agree are held to it by the tool itself: it would end with an error."""
    benchmarks = (
        *("experts", "layer", "head", "step", "transformers", "memory", "host_syncs"),
        "long",
    )
    output = tmp_path / "benchmark.json"
    result = benchmark(
        *("--scale", "tiny", "--rounds", 2, "--warmup", 1, "--profiles", 1, "--steps", 2),
        *("--threads", 1, "--clock", "processor", "--output", output, "--what", *benchmarks),
        forked=False,
    )
    assert result.returncode == 0, result.stderr
    document = json.loads(output.read_text())
    found = {outcome["benchmark"]: outcome for outcome in document["outcomes"]}
    assert tuple(found) == benchmarks

    head_variants = ["linear, then Megatron's loss", "in chunks, weights known"]
    head_variants += ["in chunks, recomputed", "products alone"]
    if hasattr(torch.nn.functional, "linear_cross_entropy"):
        head_variants.append("torch's linear_cross_entropy")
    for name, variants in {
        "experts": {
            "coe-2_4-64",
            "moe_8-64",
            "SequentialMLP",
            "transformers' deepseek_v2",
            "dense matmul",
            "1024-cubed product",
        },
        "layer": {"coe-2_4-64", "moe_8-64", "stock MoELayer, C times"},
        "head": set(head_variants),
        "step": {"coe-2_4-64", "moe_8-64"},
        "transformers": {"moe_8-64", "transformers deepseek_v2"},
    }.items():
        samples = found[name]["samples"]
        assert set(samples) == variants
        for parts in samples.values():
            assert all(len(seconds) == 2 and min(seconds) > 0 for seconds in parts.values())
            total = [sum(values) for values in zip(*_parts(parts), strict=True)]
            assert max(abs(a - b) for a, b in zip(total, parts["total"], strict=True)) < 1e-9
    for name in ("experts", "layer", "transformers"):
        differences = found[name]["details"]["differences"]
        assert 0 <= max(differences.values()) < 1e-3
        assert len(differences) >= 4
    assert 0 < max(found["head"]["details"]["differences"].values()) < 1e-5

    (phases,) = found["step"]["further"]
    of_coe = phases["details"]["phases"]["coe-2_4-64"]
    expected = {"route", "permute", "experts", "combine", "shared", "attention", "head"}
    assert expected | {"optimizer", "gradient buffers", "norms"} <= set(of_coe)
    assert all(of_coe[phase][1] > 0 for phase in expected)  # backward, too
    memory = found["memory"]["details"]
    assert memory["coe-2_4-64"]["held"] > memory["moe_8-64"]["held"]  # a router more
    for benchmark_name in ("step", "layer", "experts", "transformers", "memory", "host_syncs"):
        assert f"`--what {benchmark_name}`" in result.stdout
    assert result.stdout.count("not measured (needs a GPU)") == 9


def test_values_of_a_setting_are_variants(tmp_path):
    output, setting = tmp_path / "benchmark.json", "model.moe_router_pre_softmax"
    result = benchmark(
        *("--what", "experts", "--vary", f"{setting}=on,off", "--clock", "processor"),
        *("--threads", 1, "--scale", "tiny", "--rounds", 2, "--output", output),
    )
    assert result.returncode == 0, result.stderr
    (outcome,) = json.loads(output.read_text())["outcomes"]
    variants = {f"coe-2_4-64 {setting}={value}" for value in ("true", "false")}
    assert variants < set(outcome["samples"])


def _parts(parts: dict[str, list[float]]) -> list[list[float]]:
    return [seconds for part, seconds in parts.items() if part != "total"]


def test_mistakes_are_told_in_one_line():
    for arguments, told in (
        (("--clock", "processor"), "--threads 1"),
        (("--vary", "coe_iterations"), "section.key=A,B"),
        (("--against", "nowhere", "--what", "step"), "nowhere: no tools/benchmark.py"),
        (("--quick", "--te-path", "docs"), "docs: no transformer_engine"),
        (("--against", REPO), "such as --what step memory"),
        (("--quick", "--vary", "train.deterministic=on,off"), "--vary compares"),
    ):
        result = benchmark(*arguments)
        assert (result.returncode, result.stdout) == (2, "")
        assert told in result.stderr
        assert len(result.stderr.splitlines()) == 1


def other_checkout(folder: Path, program: str) -> Path:
    """Write a checkout that holds nothing but its `tools/benchmark.py`."""
    (folder / "tools").mkdir(parents=True)
    (folder / "tools/benchmark.py").write_text(program, encoding="utf-8")
    return folder


def test_another_checkout_takes_turns(tmp_path):
    """The other side is this commit behind a launcher of its own, which notes when it ran."""
    runs = tmp_path / "runs"
    other = other_checkout(
        tmp_path / "other",
        f"import os, runpy, sys\nassert os.getcwd() == {str(tmp_path / 'other')!r}\n"
        f"open({str(runs)!r}, 'a').write(os.environ['PYTHONPATH'] + '\\n')\n"
        f"sys.path.insert(0, {str(REPO)!r})\n"
        f"runpy.run_path({str(REPO / 'tools/benchmark.py')!r}, run_name='__main__')\n",
    )
    output = tmp_path / "benchmark.json"
    result = benchmark(
        *("--what", "step", "memory", "--against", other, "--turns", 1, "--rounds", 1),
        *("--warmup", 0, "--profiles", 0, "--scale", "tiny", "--output", output),
    )
    assert result.returncode == 0, result.stderr
    assert [line.split(":")[0] for line in runs.read_text().splitlines()] == [str(other)]
    theirs, ours = json.loads(output.read_text())["against"]
    rows = [line.split(" | ") for line in result.stdout.splitlines() if "moe_8-64" in line]
    assert [row[0] for row in rows] == ["| step", "| memory"]
    for row, benchmark_name in zip(rows, ("step", "memory"), strict=True):
        values = [_figure(document, benchmark_name) for document in (theirs, ours)]
        assert float(row[-1].split()[0]) == pytest.approx(values[1] / values[0], abs=6e-4)


def _figure(document: dict[str, Any], benchmark_name: str) -> float:
    (outcome,) = (o for o in document["outcomes"] if o["benchmark"] == benchmark_name)
    if benchmark_name == "memory":
        return outcome["details"]["moe_8-64"]["peak"]
    (seconds,) = outcome["samples"]["moe_8-64"]["total"]
    return seconds


def test_a_part_that_fails_costs_its_own_rows(tmp_path):
    broken = other_checkout(tmp_path / "broken", "raise SystemExit('no CUDA here')")
    arguments = ("--quick", "--scale", "tiny", "--seconds", 0.5)
    result = benchmark(*arguments, "--against", broken)
    assert result.returncode == 0, result.stderr
    assert "against: not measured: broken: status 1: no CUDA here" in result.stdout
    assert "this commit: not measured: this commit: took more than 0" in result.stdout
    assert "deterministic: not measured: no time was left" in result.stdout
    assert "te: not measured: give --te-path DIR" in result.stdout
