"""Malformed input of the tools for data, plans, models: command lines, texts, checkpoints."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

from tests.faults.commands import Case
from tests.faults.spoil import Make, also, cut, edit_json, folder_at, remove, write


def cases() -> list[Case]:
    return [
        *_making_data(),
        *_planning(),
        *_converting(),
        *_generating(),
    ]


_PREPARE = "tools/preprocess_data.py --tokenizer {d}/t.model --output-prefix {d}/x"
_LEARN = "tools/train_tokenizer.py --output {d}/x.model"
_ESTIMATE = "tools/estimate.py --config {d}/run.yaml"
_PLAN = "tools/plan.py --config {d}/run.yaml model.vocab_size=290"
_TO_HF = "tools/convert_checkpoint.py to-hf --output {d}/out --input {d}/run/checkpoints"
_FROM_HF = "tools/convert_checkpoint.py from-hf --output {d}/out --input {d}/hf"
_GENERATE = "tools/generate.py --device cpu"
_STEP = "run/checkpoints/step_00000001"


def _making_data() -> Iterator[Case]:
    corpus = "tools/make_corpus.py"
    yield Case("make_corpus: no folder", corpus, ("--output",))
    yield Case(
        "make_corpus: nothing", f"{corpus} --output {{d}}/x --train-size 0", ("train_size=0",)
    )
    yield Case("make_corpus: a word", f"{corpus} --output {{d}}/x --train-size many", ("many",))
    yield Case(
        "make_corpus: output is a file",
        f"{corpus} --output {{d}}/in.txt --train-size 1 --valid-size 1",
        ("{d}/in.txt",),
    )
    yield Case("train_tokenizer: no input", _LEARN, ("--input",))
    yield Case(
        "train_tokenizer: missing input", f"{_LEARN} --input {{d}}/none.txt", ("{d}/none.txt",)
    )
    yield Case(
        "train_tokenizer: empty input",
        f"{_LEARN} --input {{d}}/e.txt",
        ("{d}/e.txt", "no text"),
        write("e.txt", ""),
    )
    yield Case(
        "train_tokenizer: too many pieces",
        f"{_LEARN} --input {{d}}/in.txt --vocab-size 99999",
        ("vocab_size=99999",),
    )
    yield Case(
        "train_tokenizer: pieces below 0",
        f"{_LEARN} --input {{d}}/in.txt --vocab-size -5",
        ("vocab_size=-5",),
    )
    yield Case(
        "train_tokenizer: unknown kind",
        f"{_LEARN} --input {{d}}/in.txt --model-type char",
        ("char", "unigram"),
    )
    yield Case(
        "train_tokenizer: output is a folder",
        "tools/train_tokenizer.py --output {d} --input {d}/in.txt --vocab-size 285",
        ("{d}",),
    )
    yield Case(
        "train_tokenizer: full disk",
        f"{_LEARN} --input {{d}}/in.txt --vocab-size 285",
        ("{d}/x.model", "File too large"),
        plant="tests.faults.commands:small_files",
    )

    def records(name: str, file: str, content: str | bytes, *says: str, keys: str = "") -> Case:
        command = f"{_PREPARE} --input {{d}}/{file} {keys}"
        return Case(f"preprocess: {name}", command, (f"{{d}}/{file}", *says), write(file, content))

    good = '{"text": "one two"}\n'
    yield records("broken line", "b.jsonl", f'{good * 2}{{"text": "x}}\n{good}', ":3: not JSON")
    yield records("cut off at the end", "b.jsonl", f'{good}{{"text": "one', ":2: not JSON")
    yield records("list on a line", "b.jsonl", f"{good}[1]\n", ":2:", "object")
    yield records("no such key", "b.jsonl", '{"body": "x"}\n', ":1: no key 'text'", "'body'")
    yield records("number as text", "b.jsonl", '{"text": 5}\n', ":1:", "int, not a string")
    yield records("nested 100,000 deep", "b.jsonl", "[" * 100_000 + "\n", ":1: not JSON")
    yield records("not UTF-8", "b.jsonl", good.encode() + b'{"text": "\xff"}\n', ":2: not UTF-8")
    yield records("not UTF-8 in a text", "b.txt", b"one\n\xfe\xff\n", ":2: not UTF-8")
    yield records("half a surrogate", "b.jsonl", '{"text": "\\ud800"}\n', ":1:", "surrogate")
    yield records("gzip cut short", "b.jsonl.gz", gzip.compress(good.encode() * 999)[:-20], "gzip")
    yield records("not gzip", "b.jsonl.gz", good, "damaged gzip")
    yield records(
        "gzip with a flaw", "b.jsonl.gz", gzip.compress(good.encode() * 9)[:-5] + b"xxxxx", "gzip"
    )
    yield records("not parquet", "b.parquet", good, "damaged parquet")
    yield records("unknown kind of file", "b.csv", good, "not named .jsonl")
    yield Case(
        "preprocess: no text at all",
        f"{_PREPARE} --input {{d}}/e.jsonl",
        ("nothing to write", "{d}/x"),
        write("e.jsonl", ""),
    )
    yield Case("preprocess: folder as input", f"{_PREPARE} --input {{d}}", ("{d} is not a file",))
    yield Case(
        "preprocess: two kinds of keys",
        f"{_PREPARE} --input {{d}}/in.jsonl --json-keys a --qa-keys b c",
        ("--qa-keys", "--json-keys"),
    )
    yield Case(
        "preprocess: one key of two",
        f"{_PREPARE} --input {{d}}/in.jsonl --qa-keys query",
        ("--qa-keys",),
    )
    yield Case(
        "preprocess: a key twice",
        f"{_PREPARE} --input {{d}}/in.jsonl --json-keys query query",
        ("query", "once"),
    )
    yield Case(
        "preprocess: keys of a text",
        f"{_PREPARE} --input {{d}}/in.txt --qa-keys a b",
        ("{d}/in.txt", "no keys"),
    )
    yield Case(
        "preprocess: no workers", f"{_PREPARE} --input {{d}}/in.txt --workers 0", ("workers=0",)
    )
    yield Case(
        "preprocess: output is a folder",
        "tools/preprocess_data.py --tokenizer {d}/t.model --output-prefix {d} --input {d}/in.txt",
        ("{d}", "is a folder"),
    )
    yield Case(
        "preprocess: output below a file",
        "tools/preprocess_data.py --tokenizer {d}/t.model --output-prefix {d}/in.txt/x "
        "--input {d}/in.txt",
        ("{d}/in.txt/x",),
    )
    yield Case(
        "preprocess: full disk",
        f"{_PREPARE} --input {{d}}/long.txt",
        ("{d}/x_text_document.bin", "File too large"),
        write("long.txt", "one two three four\n" * 2000),
        plant="tests.faults.commands:small_files",
    )


def _planning() -> Iterator[Case]:
    yield Case("estimate: no settings", "tools/estimate.py", ("--config",))
    yield Case("estimate: mistake", f"{_ESTIMATE} train.stepz=1", ("train.stepz",))
    yield Case("estimate: no processes", f"{_ESTIMATE} --world-size 0", ("world-size=0",))
    yield Case("estimate: processes below 0", f"{_ESTIMATE} --world-size -4", ("world-size=-4",))
    yield Case(
        "estimate: layout",
        f"{_ESTIMATE} parallel.expert_model_parallel_size=4",
        ("num_moe_experts=6",),
    )
    yield Case("estimate: unknown device", f"{_ESTIMATE} --device tpu", ("tpu",))
    yield Case("plan: no number of GPUs", _PLAN, ("--gpus",))
    yield Case("plan: no GPUs", f"{_PLAN} --gpus 0", ("--gpus=0",))
    yield Case("plan: half a node", f"{_PLAN} --gpus 12", ("--gpus=12", "whole nodes"))
    yield Case("plan: unknown GPU", f"{_PLAN} --gpus 8 --gpu abacus", ("abacus",))
    yield Case("plan: rank without building", f"{_PLAN} --gpus 8 --rank 3", ("--rank=3", "--build"))
    yield Case(
        "plan: no vocabulary",
        "tools/plan.py --config {d}/run.yaml --gpus 8",
        ("model.vocab_size", "{d}/t.model"),
        remove("t.model"),
    )
    yield Case(
        "plan: broken tokenizer",
        "tools/plan.py --config {d}/run.yaml --gpus 8",
        ("{d}/t.model", "SentencePiece"),
        write("t.model", "no"),
    )
    yield Case(
        "estimate: broken tokenizer",
        _ESTIMATE,
        ("{d}/t.model", "SentencePiece"),
        write("t.model", "no"),
    )
    yield Case(
        "estimate: vocabulary of fewer ids",
        f"{_ESTIMATE} model.vocab_size=7",
        ("model.vocab_size=7", "290 ids"),
    )
    yield Case(
        "plan: vocabulary is a word",
        f"{_PLAN} --gpus 8 model.vocab_size=big",
        ("model.vocab_size",),
    )
    yield Case("plan: millions of GPUs", f"{_PLAN} --gpus 8000000000000000000", ("--gpus",))


def _converting() -> Iterator[Case]:
    tool = "tools/convert_checkpoint.py"
    yield Case("convert: no direction", tool, ("direction",))
    yield Case("convert: unknown direction", f"{tool} sideways", ("sideways",))
    yield Case(
        "convert: no source", f"{tool} to-hf --input {{d}}/none --output {{d}}/out", ("{d}/none",)
    )
    yield Case(
        "convert: folder without checkpoint",
        f"{tool} to-hf --input {{d}} --output {{d}}/out",
        ("{d}", "checkpoint"),
    )
    yield Case(
        "convert: folder without model",
        f"{tool} from-hf --input {{d}} --output {{d}}/out",
        ("{d}/config.json",),
    )
    for word in ("0", "-5MB", "many", "nan", "1e999GB"):
        yield Case(f"convert: files of {word}", f"{_TO_HF} --max-shard-size={word}", (word,))
    checkpoint: dict = {"needs": ("checkpoint",)}
    yield Case(
        "convert: target exists",
        _TO_HF,
        ("{d}/out", "new folder"),
        write("out/x", ""),
        **checkpoint,
    )
    yield Case(
        "convert: target below a file",
        f"{tool} to-hf --input {{d}}/run/checkpoints --output {{d}}/in.txt/out",
        ("{d}/in.txt/out",),
        **checkpoint,
    )
    yield Case(
        "convert: full disk",
        _TO_HF,
        ("{d}/out", "File too large"),
        plant="tests.faults.commands:small_files",
        **checkpoint,
    )
    yield Case(
        "convert: not expressible", f"{_TO_HF} --as deepseek_v2", ("inner_iter=2",), **checkpoint
    )
    model: dict = {"needs": ("hf",)}
    config, weights = "hf/config.json", "hf/model.safetensors"

    def imported(name: str, make: Make, *says: str) -> Case:
        return Case(f"import: {name}", _FROM_HF, says, make, **model)

    yield Case(
        "import: full disk",
        _FROM_HF,
        ("{d}/out", "File too large"),
        plant="tests.faults.commands:small_files",
        **model,
    )
    yield imported("no description", remove(config), "{d}/hf/config.json")
    yield imported("description is no JSON", write(config, "{"), "{d}/hf/config.json", "JSON")
    yield imported("description is a list", write(config, "[]"), "{d}/hf/config.json", "object")
    yield imported("description not UTF-8", write(config, b"\xff{}"), "{d}/hf/config.json")
    yield imported("description nested deep", write(config, "[" * 100_000), "{d}/hf/config.json")
    yield imported(
        "unknown kind", edit_json(config, model_type="llama"), "{d}/hf/config.json", "llama"
    )
    yield imported(
        "size is a word", edit_json(config, hidden_size="32"), "{d}/hf/config.json", "hidden_size"
    )
    yield imported("size below 0", edit_json(config, hidden_size=-32), "hidden_size")
    yield imported(
        "size is missing", edit_json(config, num_hidden_layers=None), "num_hidden_layers"
    )
    yield imported("another size", edit_json(config, vocab_size=999), "{d}/hf/model.safetensors")
    yield imported("no weights", remove(weights), "{d}/hf", "model.safetensors")
    yield imported("weights cut short", cut(weights, 0.6), "{d}/hf/model.safetensors")
    yield imported("weights empty", write(weights, b""), "{d}/hf/model.safetensors")
    yield imported(
        "index is no JSON",
        write("hf/model.safetensors.index.json", "{"),
        "model.safetensors.index.json",
    )
    yield imported(
        "index names a missing file",
        write("hf/model.safetensors.index.json", '{"weight_map": {"a": "none.safetensors"}}'),
        "none.safetensors",
    )
    upcycle = "tools/upcycle.py --input {d}/hf --output {d}/out"
    yield Case(
        "upcycle: no source", "tools/upcycle.py --input {d}/none --output {d}/out", ("{d}/none",)
    )
    yield Case("upcycle: one iteration", f"{upcycle} --iterations 1", ("iterations=1",), **model)
    yield Case("upcycle: iterations are a word", f"{upcycle} --iterations two", ("two",))
    yield Case("upcycle: already a CoE model", upcycle, ("coe_iterations=2",), **model)
    yield Case(
        "upcycle: target exists",
        "tools/upcycle.py --input {d}/hf --output {d}",
        ("{d}", "new folder"),
        **model,
    )
    yield Case("upcycle: no iteration", f"{upcycle} --iterations 0", ("iterations=0",), **model)
    yield Case(
        "upcycle: a file", "tools/upcycle.py --input {d}/in.txt --output {d}/out", ("{d}/in.txt",)
    )
    yield Case(
        "upcycle: folder without model",
        "tools/upcycle.py --input {d} --output {d}/out",
        ("{d}", "checkpoint"),
    )
    yield Case(
        "upcycle: unknown kind",
        upcycle,
        ("{d}/hf/config.json", "llama"),
        edit_json(config, model_type="llama"),
        **model,
    )
    yield Case("upcycle: weights cut short", upcycle, ("{d}/hf",), cut(weights, 0.6), **model)
    yield Case(
        "upcycle: checkpoint of a CoE model",
        "tools/upcycle.py --input {d}/run/checkpoints --output {d}/out",
        ("{d}/run/checkpoints/step_00000001", "coe_iterations=2"),
        **checkpoint,
    )
    moe: dict = {"needs": ("moe",)}
    of_run = "tools/upcycle.py --input {d}/run/checkpoints --output"
    yield Case(
        "upcycle: damaged checkpoint",
        f"{of_run} {{d}}/out",
        ("{d}/run/checkpoints/step_00000001", "common.pt"),
        cut(f"{_STEP}/common.pt", 0.5),
        **moe,
    )
    yield Case(
        "upcycle: checkpoint without settings",
        f"{of_run} {{d}}/out",
        ("{d}/run/checkpoints/step_00000001", "config.yaml"),
        remove(f"{_STEP}/config.yaml"),
        **moe,
    )
    yield Case(
        "upcycle: target below a file",
        f"{of_run} {{d}}/in.txt/out",
        ("{d}/in.txt/out",),
        **moe,
    )
    yield Case(
        "upcycle: full disk",
        f"{of_run} {{d}}/out",
        ("{d}/out", "File too large"),
        plant="tests.faults.commands:small_files",
        **moe,
    )


def _generating() -> Iterator[Case]:
    yield Case("generate: no model", f"{_GENERATE} --prompt x", ("--model",))
    yield Case("generate: no prompt", f"{_GENERATE} --model {{d}}", ("--prompt",))
    yield Case(
        "generate: two kinds of prompts",
        f"{_GENERATE} --model {{d}} --prompt x --input {{d}}/in.txt",
        ("--input",),
    )
    yield Case(
        "generate: folder without model",
        f"{_GENERATE} --model {{d}} --prompt x",
        ("{d}", "no model"),
    )
    yield Case(
        "generate: folder is missing",
        f"{_GENERATE} --model {{d}}/none --prompt x",
        ("{d}/none", "does not exist"),
    )
    model: dict = {"needs": ("hf",)}
    known = f"{_GENERATE} --model {{d}}/hf --prompt x"
    yield Case(
        "generate: empty prompt", f"{_GENERATE} --model {{d}}/hf --prompt ''", ("empty",), **model
    )
    for option, value in (
        ("max-new-tokens", "0"),
        ("temperature", "-1"),
        ("temperature", "nan"),
        ("top-k", "0"),
        ("top-p", "1.5"),
        ("device", "abacus"),
        ("seed", "-1"),
        ("seed", "9" * 30),
        ("samples", "none"),
        ("dtype", "int3"),
    ):
        yield Case(f"generate: {option}={value}", f"{known} --{option} {value}", (value,), **model)
    yield Case(
        "generate: weights cut short", known, ("{d}/hf",), cut("hf/model.safetensors", 0.6), **model
    )
    yield Case(
        "generate: no tokenizer",
        known,
        ("{d}/hf", "tokenizer"),
        also(remove("hf/tokenizer.json"), remove("hf/tokenizer_config.json")),
        **model,
    )
    yield Case(
        "generate: broken tokenizer", known, ("{d}/hf",), write("hf/tokenizer.json", "{"), **model
    )
    yield Case(
        "generate: missing weights",
        known,
        ("{d}/hf",),
        edit_json("hf/config.json", num_hidden_layers=3),
        **model,
    )
    yield Case(
        "generate: broken records",
        f"{_GENERATE} --model {{d}}/hf --input {{d}}/b.jsonl",
        ("{d}/b.jsonl:1",),
        write("b.jsonl", "{\n"),
        **model,
    )
    yield Case(
        "generate: no records",
        f"{_GENERATE} --model {{d}}/hf --input {{d}}/e.jsonl",
        ("{d}/e.jsonl",),
        write("e.jsonl", ""),
        **model,
    )
    yield Case(
        "generate: missing records",
        f"{_GENERATE} --model {{d}}/hf --input {{d}}/none.jsonl",
        ("{d}/none.jsonl",),
        **model,
    )
    yield Case(
        "generate: no such key in the records",
        f"{_GENERATE} --model {{d}}/hf --input {{d}}/in.jsonl --json-keys body",
        ("{d}/in.jsonl:1", "body"),
        **model,
    )
    yield Case("generate: keys of a prompt", f"{known} --json-keys a", ("--json-keys",), **model)
    yield Case(
        "generate: prompt is too long",
        f"{_GENERATE} --model {{d}}/hf --prompt '{'one ' * 30}'",
        ("prompt 1", "max_position_embeddings=16"),
        edit_json("hf/config.json", max_position_embeddings=16),
        **model,
    )
    yield Case(
        "generate: unknown kind",
        known,
        ("{d}/hf", "trust_remote_code"),
        edit_json("hf/config.json", model_type="abacus"),
        **model,
    )
    yield Case(
        "generate: another kind",
        known,
        ("{d}/hf", "mismatched weights"),
        edit_json("hf/config.json", model_type="llama"),
        **model,
    )
    yield Case("generate: broken description", known, ("{d}/hf",), write("hf/config.json", "{"),
               **model)  # fmt: skip
    yield Case("generate: no weights", known, ("{d}/hf",), remove("hf/model.safetensors"), **model)
    checkpoint: dict = {"needs": ("checkpoint",)}
    yield Case(
        "generate: damaged checkpoint",
        f"{_GENERATE} --model {{d}}/run/checkpoints --prompt x",
        ("{d}/run/checkpoints/step_00000001", "common.pt"),
        cut(f"{_STEP}/common.pt", 0.5),
        **checkpoint,
    )
    yield Case(
        "generate: empty checkpoint",
        f"{_GENERATE} --model {{d}}/empty --prompt x",
        ("{d}/empty", "no model"),
        folder_at("empty/step_00000001"),
    )
    yield Case(
        "generate: checkpoint without its tokenizer",
        f"{_GENERATE} --model {{d}}/run/checkpoints --prompt x",
        ("tokenizer",),
        _forget_tokenizer,
        **checkpoint,
    )


def _forget_tokenizer(folder: Path) -> None:
    """Delete the tokenizer from a checkpoint, and write a new manifest."""
    step = folder / _STEP
    config = step / "config.yaml"
    text = config.read_text(encoding="utf-8")
    config.write_text(re.sub(r"tokenizer: .*", f"tokenizer: {folder}/none.model", text))
    manifest = json.loads((step / "manifest.json").read_text(encoding="utf-8"))
    content = config.read_bytes()
    manifest["files"]["config.yaml"] = {
        "sha256": hashlib.sha256(content).hexdigest(),
        "size": len(content),
    }
    text = json.dumps(manifest, indent=1, sort_keys=True) + "\n"
    (step / "manifest.json").write_text(text, encoding="utf-8")
