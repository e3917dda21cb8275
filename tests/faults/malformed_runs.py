"""Malformed runs, and the tools that make, compare, measure and show them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tests.faults.commands import Case
from tests.faults.spoil import append, cut, edit_json, folder_at, remove, write


def cases() -> list[Case]:
    return [
        *_plotting(),
        *_reporting(),
        *_analyzing(),
        *_comparing(),
        *_experimenting(),
        *_benchmarking(),
    ]


_FULL = {"plant": "tests.faults.commands:small_files"}
_PLOT = "tools/plot_runs.py {d}/metrics.jsonl --output {d}/x.png"
_REPORT = "tools/report.py {d}/run --output {d}/x.html"
_ANALYZE = "tools/analyze_routing.py --output {d}/x --tokens 64 --permutations 1 --device cpu"
_COMPARE = "tools/compare.py {d}/run.yaml --output {d}/x"
_EXPERIMENT = "tools/run_experiment.py main --seeds 1 --output {d}/x"
_BENCHMARK = "tools/benchmark.py --scale tiny --what layer --rounds 1"


def _plotting() -> Iterator[Case]:
    def metrics(name: str, content: str | bytes, *says: str) -> Case:
        return Case(f"plot_runs: {name}", _PLOT, says, write("metrics.jsonl", content))

    yield Case("plot_runs: no metrics", _PLOT, ("{d}/metrics.jsonl",), remove("metrics.jsonl"))
    yield Case("plot_runs: a folder", _PLOT, ("{d}/metrics.jsonl",), folder_at("metrics.jsonl"))
    yield metrics("empty", "", "{d}/metrics.jsonl", "no losses")
    yield metrics("broken line", '{"step": 1, "train_loss": 2}\n{"step\n', "{d}/metrics.jsonl:2")
    yield metrics("a list", "[1]\n", "{d}/metrics.jsonl:1")
    yield metrics("no step", '{"train_loss": 2}\n', "{d}/metrics.jsonl:1")
    yield metrics("step is a word", '{"step": "one", "train_loss": 2}\n', "{d}/metrics.jsonl:1")
    yield metrics("loss is a word", '{"step": 1, "train_loss": "low"}\n', "{d}/metrics.jsonl:1")
    yield metrics("loss is a list", '{"step": 1, "valid_loss": [2]}\n', "{d}/metrics.jsonl:1")
    yield metrics("nothing to draw", '{"step": 1, "lr": 2}\n', "{d}/metrics.jsonl", "no losses")
    yield metrics("not UTF-8", b"\xff\xfe\n", "{d}/metrics.jsonl")
    yield metrics("nested 100,000 deep", "[" * 100_000, "{d}/metrics.jsonl:1")
    yield Case("plot_runs: no output", "tools/plot_runs.py {d}/metrics.jsonl", ("--output",))
    yield Case(
        "plot_runs: unknown picture",
        "tools/plot_runs.py {d}/metrics.jsonl --output {d}/x.docx",
        ("x.docx", "png"),
    )
    yield Case(
        "plot_runs: output below a file",
        "tools/plot_runs.py {d}/metrics.jsonl --output {d}/in.txt/x.png",
        ("{d}/in.txt",),
    )
    yield Case(
        "plot_runs: full disk",
        _PLOT,
        ("{d}/x.png", "File too large"),
        plant="tests.faults.commands:small_files",
    )


def _comparing() -> Iterator[Case]:
    yield Case("compare: nothing", "tools/compare.py", ("configs",))
    yield Case(
        "compare: one name twice",
        "tools/compare.py {d}/run.yaml {d}/sub/run.yaml --output {d}/x",
        ("run", "same name"),
        write("sub/run.yaml", ""),
    )
    yield Case(
        "compare: missing settings",
        "tools/compare.py {d}/none.yaml --output {d}/x",
        ("{d}/none.yaml",),
    )
    yield Case(
        "compare: broken settings",
        "tools/compare.py {d}/b.yaml --output {d}/x",
        ("{d}/b.yaml", "train.stepz"),
        write("b.yaml", "train: {stepz: 1}"),
    )
    yield Case(
        "compare: broken override",
        "tools/compare.py {d}/run.yaml --output {d}/x train.stepz=1",
        ("train.stepz",),
    )
    yield Case("compare: seed is a word", "tools/compare.py {d}/run.yaml --seeds one", ("one",))
    yield Case(
        "compare: the same seed twice",
        "tools/compare.py {d}/run.yaml --output {d}/x --seeds 1 1",
        ("seeds", "1"),
    )
    yield Case(
        "compare: no held-out data",
        "tools/compare.py {d}/run.yaml --output {d}/x data.valid=[]",
        ("data.valid",),
    )
    yield Case("compare: no jobs", f"{_COMPARE} --jobs 0", ("--jobs 0",))
    yield Case("compare: no threads", f"{_COMPARE} --threads 0", ("--threads 0",))
    yield Case("compare: seed below 0", f"{_COMPARE} --seeds -1", ("-1",))
    yield Case(
        "compare: directory is a file",
        "tools/compare.py {d}/run.yaml --seeds 1 --output {d}/in.txt",
        ("{d}/in.txt/run_seed-1/settings.yaml",),
    )
    yield Case(
        "compare: run of other settings",
        f"{_COMPARE} --seeds 1",
        ("{d}/x/run_seed-1/settings.yaml", "steps: 3", "--output"),
        write("x/run_seed-1/settings.yaml", "train: {steps: 3}\n"),
    )
    yield Case(
        "compare: run of settings that are no text",
        f"{_COMPARE} --seeds 1",
        ("{d}/x/run_seed-1/settings.yaml", "--output"),
        write("x/run_seed-1/settings.yaml", b"\xff\xfe\0"),
    )


def _experimenting() -> Iterator[Case]:
    tool = "tools/run_experiment.py"
    yield Case("experiment: none", tool, ("experiment",))
    yield Case("experiment: unknown", f"{tool} maine", ("maine", "main"))
    for option, value in (
        ("scale", "huge"),
        ("seeds", "0"),
        ("seeds", "-1"),
        ("seeds", "many"),
        ("jobs", "0"),
        ("threads", "0"),
        ("vocab-size", "0"),
    ):
        yield Case(
            f"experiment: --{option} {value}",
            f"{_EXPERIMENT} --{option} {value}",
            (f"--{option}", value),
        )
    yield Case(
        "experiment: data alone", f"{_EXPERIMENT} --input {{d}}/in.jsonl", ("--valid-input",)
    )
    own = f"{_EXPERIMENT} --valid-input {{d}}/in.jsonl --vocab-size 290 model.vocab_size=290"
    yield Case("experiment: missing data", f"{own} --input {{d}}/none.jsonl", ("{d}/none.jsonl",))
    yield Case("experiment: data is a folder", f"{own} --input {{d}}", ("{d}", "directory"))
    yield Case(
        "experiment: broken data",
        f"{own} --input {{d}}/b.jsonl --qa-keys query response",
        ("{d}/b.jsonl:2",),
        write("b.jsonl", '{"query": "a", "response": "b"}\n{"query\n'),
    )
    yield Case(
        "experiment: no such keys",
        f"{own} --input {{d}}/in.jsonl --qa-keys question answer",
        ("{d}/in.jsonl:1", "'question'"),
    )
    yield Case(
        "experiment: more ids than the model's",
        f"{_EXPERIMENT} --vocab-size 5000",
        ("model.vocab_size=1024", "5000 ids"),
    )
    for name, change, *says in (
        ("no setting", "nonsense", "nonsense"),
        ("unknown key", "train.stepz=1", "train.stepz", "did you mean"),
        ("unknown section", "trane.steps=1", "trane"),
        ("a word", "train.steps=many", "train.steps", "many"),
        ("no steps", "train.steps=0", "train.steps=0"),
        ("unknown key of the model", "model.hiden_size=64", "model.hiden_size"),
        ("size of the model below 0", "model.hidden_size=-64", "model.hidden_size=-64"),
        ("layout for several", "parallel.tensor_model_parallel_size=2", "tensor_model_parallel"),
    ):
        yield Case(f"experiment: {name}", f"{_EXPERIMENT} --dry-run {change}", tuple(says))
    data, runs = "x/generated-1024/data", "x/generated-1024/tiny"
    yield Case(
        "experiment: directory is a file",
        "tools/run_experiment.py main --seeds 1 --output {d}/in.txt",
        ("{d}/in.txt",),
    )
    yield Case(
        "experiment: data of another text",
        _EXPERIMENT,
        (f"{{d}}/{data}/source.json", "another folder"),
        write(f"{data}/source.json", "{}"),
    )
    yield Case(
        "experiment: run of other settings",
        _EXPERIMENT,
        (f"{{d}}/{runs}/moe_8-64_seed-1/settings.yaml", "steps: 3", "--output"),
        write(f"{runs}/moe_8-64_seed-1/settings.yaml", "train: {steps: 3}\n"),
    )
    yield Case(
        "experiment: last run of other settings",
        _EXPERIMENT,
        (f"{{d}}/{runs}/coe-2_3-64_seed-1/settings.yaml", "--output"),
        write(f"{runs}/coe-2_3-64_seed-1/settings.yaml", "train: {steps: 3}\n"),
    )
    yield Case("experiment: full disk", _EXPERIMENT, ("{d}/x", "File too large"), **_FULL)


def _reporting() -> Iterator[Case]:
    run: dict = {"needs": ("run",)}
    metrics, config, summary = "run/metrics.jsonl", "run/config.yaml", "run/analysis/summary.json"
    yield Case("report: no run", "tools/report.py", ("RUN",))
    yield Case("report: missing run", "tools/report.py {d}/none", ("{d}/none/metrics.jsonl",))
    yield Case("report: run is a file", "tools/report.py {d}/in.txt", ("{d}/in.txt",))
    yield Case("report: no metrics", _REPORT, (f"{{d}}/{metrics}",), remove(metrics), **run)
    yield Case("report: empty metrics", _REPORT, (f"{{d}}/{metrics}",), write(metrics, ""), **run)
    yield Case(
        "report: broken metrics", _REPORT, (f"{{d}}/{metrics}:",), append(metrics, "{"), **run
    )
    yield Case("report: no settings", _REPORT, (f"{{d}}/{config}",), remove(config), **run)
    yield Case(
        "report: broken settings", _REPORT, (f"{{d}}/{config}",), write(config, "train: ["), **run
    )
    yield Case(
        "report: settings with an unknown key",
        _REPORT,
        (f"{{d}}/{config}", "train.stepz"),
        write(config, "train: {stepz: 1}"),
        **run,
    )
    yield Case(
        "report: broken analysis",
        _REPORT,
        ("{d}/run/analysis",),
        write(summary, "{"),
        **run,
    )
    yield Case(
        "report: analysis of nothing",
        _REPORT,
        ("{d}/run/analysis", "usage.csv"),
        write(summary, '{"about": {}, "routers": [], "transitions": [], "training": []}'),
        **run,
    )
    yield Case(
        "report: damaged checkpoint",
        _REPORT,
        ("{d}/run/checkpoints/step_00000001", "common.pt"),
        cut("run/checkpoints/step_00000001/common.pt", 0.5),
        **run,
    )
    for name, output in (("is a folder", "{d}"), ("below a file", "{d}/in.txt/x.html")):
        for what in ("--no-analysis", ""):
            yield Case(
                f"report: output {name} {what}".rstrip(),
                f"tools/report.py {{d}}/run --output {output} {what}",
                (output,),
                cut("run/checkpoints/step_00000001/common.pt", 0.5),  # which is not come to
                **run,
            )
    yield Case(
        "report: full disk",
        f"{_REPORT} --no-analysis",
        ("{d}/x.html", "File too large"),
        **run,
        **_FULL,
    )


def _analyzing() -> Iterator[Case]:
    keys = "--qa-keys query response"
    texts = f"--input {{d}}/in.jsonl {keys}"
    yield Case("analyze: no model", f"{_ANALYZE} {texts}", ("--model",))
    yield Case("analyze: no data", f"{_ANALYZE} --model {{d}}/hf", ("--input",))
    yield Case("analyze: missing model", f"{_ANALYZE} {texts} --model {{d}}/none", ("{d}/none",))
    yield Case("analyze: a file", f"{_ANALYZE} {texts} --model {{d}}/in.txt", ("{d}/in.txt",))
    yield Case("analyze: folder without model", f"{_ANALYZE} {texts} --model {{d}}", ("{d}",))
    model: dict = {"needs": ("hf",)}
    known, config, weights = (
        f"{_ANALYZE} --model {{d}}/hf",
        "hf/config.json",
        "hf/model.safetensors",
    )
    for option, value, says in (
        ("tokens", "0", "tokens=0"),
        ("tokens", "some", "some"),
        ("seq-length", "1", "seq_length=1"),
        ("permutations", "0", "permutations=0"),
        ("permutations", "-3", "permutations=-3"),
        ("batch-size", "0", "batch_size=0"),
        ("seed", "-1", "seed=-1"),
        ("device", "abacus", "abacus"),
        ("mode", "whole", "whole"),
    ):
        yield Case(
            f"analyze: --{option} {value}", f"{known} {texts} --{option} {value}", (says,), **model
        )
    yield Case(
        "analyze: sequences longer than the model's",
        f"{known} {texts} --seq-length 17",
        ("seq_length=17", "max_position_embeddings=16"),
        edit_json(config, max_position_embeddings=16),
        **model,
    )
    yield Case("analyze: missing data", f"{known} --input {{d}}/none", ("{d}/none",), **model)
    yield Case("analyze: data is a folder", f"{known} --input {{d}}", ("{d}",), **model)
    yield Case(
        "analyze: empty data",
        f"{known} --input {{d}}/e.txt",
        ("{d}/e.txt", "too little text"),
        write("e.txt", ""),
        **model,
    )
    yield Case(
        "analyze: broken data",
        f"{known} --input {{d}}/b.jsonl",
        ("{d}/b.jsonl:1",),
        write("b.jsonl", "{\n"),
        **model,
    )
    yield Case(
        "analyze: broken data set", f"{known} --input {{d}}/a", ("{d}/a.idx",), cut("a.idx", 0.5),
        **model,
    )  # fmt: skip
    yield Case(
        "analyze: data of another tokenizer",
        f"{known} --input {{d}}/b",
        ("{d}/b", "another tokenizer"),
        _data_of_another_tokenizer,
        **model,
    )
    yield Case(
        "analyze: output is a file",
        f"tools/analyze_routing.py --model {{d}}/hf {texts} --output {{d}}/in.txt",
        ("{d}/in.txt",),
        cut(weights, 0.6),  # which is not come to
        **model,
    )
    yield Case(
        "analyze: output below a file",
        f"tools/analyze_routing.py --model {{d}}/hf {texts} --output {{d}}/in.txt/x",
        ("{d}/in.txt/x",),
        cut(weights, 0.6),  # which is not come to
        **model,
    )
    for name, make, *says in (
        ("description is broken", write(config, "{")),
        ("unknown kind", edit_json(config, model_type="abacus"), "trust_remote_code"),
        ("another kind", edit_json(config, model_type="llama"), "weights"),
        ("no tokenizer", remove("hf/tokenizer.json"), "tokenizer"),
        ("no weights", remove(weights)),
        ("weights cut short", cut(weights, 0.6)),
    ):
        yield Case(f"analyze: {name}", f"{known} {texts}", ("{d}/hf", *says), make, **model)
    of_run = f"{_ANALYZE} --model {{d}}/run {texts}"
    yield Case(
        "analyze: run without checkpoints",
        of_run,
        ("{d}/run", "checkpoints"),
        folder_at("run/checkpoints"),
    )
    yield Case(
        "analyze: damaged checkpoint",
        of_run,
        ("{d}/run/checkpoints/step_00000001", "common.pt"),
        cut("run/checkpoints/step_00000001/common.pt", 0.5),
        needs=("checkpoint",),
    )
    yield Case(
        "analyze: empty checkpoint",
        of_run,
        ("{d}/run/checkpoints/step_00000001",),
        folder_at("run/checkpoints/step_00000001"),
    )


def _benchmarking() -> Iterator[Case]:
    for option, value in (
        ("what", "everything"),
        ("scale", "huge"),
        ("rounds", "0"),
        ("warmup", "-1"),
        ("profiles", "-1"),
        ("steps", "0"),
        ("threads", "-1"),
        ("sequences", "0"),
        ("seq-length", "1"),
        ("num-layers", "0"),
        ("vocab-size", "0"),
        ("clock", "sun"),
        ("vary", "fast"),
        ("set", "fast"),
        ("presets", "{d}/none"),
        ("output", "{d}/in.txt/x.json"),
    ):
        yield Case(
            f"benchmark: --{option} {value.removeprefix('{d}/')}",
            f"{_BENCHMARK} --{option} {value}",
            (value,),
        )
    yield Case("benchmark: processor's clock", f"{_BENCHMARK} --clock processor", ("--threads 1",))
    yield Case(
        "benchmark: output is a folder", f"{_BENCHMARK} --output {{d}}", ("{d}", "is a folder")
    )
    for option in ("vary", "set"):
        yield Case(
            f"benchmark: --{option} unknown key",
            f"{_BENCHMARK} --{option} train.stepz=1",
            ("train.stepz",),
        )
        yield Case(
            f"benchmark: --{option} unknown key of the model",
            f"{_BENCHMARK} --{option} model.hiden_size=64",
            ("model.hiden_size",),
        )
    yield Case("benchmark: several at once", f"{_BENCHMARK} --what parallel", ("torchrun",))


def _data_of_another_tokenizer(folder: Path) -> None:
    """A data set whose ids the model has no embeddings for."""
    import numpy as np

    ids = np.frombuffer((folder / "a.bin").read_bytes(), np.uint16) + 5000
    (folder / "b.bin").write_bytes(ids.astype(np.uint16).tobytes())
    (folder / "b.idx").write_bytes((folder / "a.idx").read_bytes())
