"""Upcycling at the size of DeepSeek-V2-Lite: time, peak memory, and the plan of its training.

    python -m benchmarks.upcycle --directory /tmp/at-size --layers 27 [--plan]

A folder of that shape with random weights is written, upcycled to two iterations by the command
itself, and its training is described on 8 GPUs in the layout of the planner. All of it is removed
at the end; input and output together take 2.3 GB of the disk for each layer, or a tenth of it on a
file system that compresses (`--compressed`): the random values of a weight repeat. `--plan`
describes the training alone, of a model without weights.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from megatron_coe.config.run_config import Settings
from megatron_coe.conversion.hf_config import to_model_fields
from megatron_coe.conversion.import_hf import FINE_TUNING, MAX_SEQ_LENGTH
from megatron_coe.conversion.safetensors_shards import ShardWriter
from megatron_coe.conversion.tokenizer import write_tokenizer
from megatron_coe.data.corpus import make_corpus
from megatron_coe.data.preprocess import preprocess
from megatron_coe.data.records import Fields
from megatron_coe.data.tokenizer import train_tokenizer
from megatron_coe.hf.weight_names import Weight, weights
from megatron_coe.model.provider import CoEModelProvider
from megatron_coe.utils.environment import REPOSITORY

SHAPE = {
    "model_type": "deepseek_v2",
    "vocab_size": 102_400,
    "hidden_size": 2048,
    "intermediate_size": 10_944,
    "moe_intermediate_size": 1408,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "n_shared_experts": 2,
    "n_routed_experts": 64,
    "num_experts_per_tok": 6,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 512,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "topk_method": "greedy",
    "scoring_func": "softmax",
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
    "aux_loss_alpha": 0.001,
    "seq_aux": True,
    "max_position_embeddings": 4096,
    "rope_theta": 10_000,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
SHARD_BYTES = 5 * 10**9
FREE_BYTES = 4 * 10**9
"""Of the disk, that stay free."""
PERIOD = 4096
"""After so many random values a weight repeats them."""
GPUS = 8
MB = 1e6


@dataclass(frozen=True)
class Peak:
    """The memory of a process at its largest, bytes, read every 50 ms."""

    resident: int
    """Mapped pages of files among it."""
    anonymous: int
    """Without them."""


def main() -> int:
    """Run the benchmark; return the exit status of the first command that fails, or 0."""
    options = _parse()
    options.directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.directory) as name:
        home = Path(name)
        if options.plan:
            describe_training(home, write_settings(home, options.layers))
            return 0
        table, each = write_model(home / "moe", options.layers, options.compressed)
        imports, _ = run(home, "-c", "import megatron_coe.conversion.upcycle")
        peak, seconds = run(
            home, "-m", "megatron_coe.cli.main", "upcycle", "--input", "moe", "--output", "coe"
        )
        shutil.rmtree(home / "moe")
        report(options.layers, table, each, imports, peak, seconds, home / "coe")
        describe_training(home, next((home / "coe").glob("step_*/config.yaml")))
    return 0


def write_model(
    folder: Path, layers: int, compressed: bool = False
) -> tuple[list[Weight], dict[str, int]]:
    """Write a folder of random weights in bf16, with a tokenizer of a generated corpus.

    Returns: the table of its weights, and the bytes of each of its files.

    Raises: ValueError when the disk cannot hold it and what becomes of it.
    """
    config = {**SHAPE, "num_hidden_layers": layers}
    table = weights(CoEModelProvider(**to_model_fields(config, folder)))
    size = 2 * sum(torch.Size(shape).numel() for w in table for shape in w.parts.values())
    free = shutil.disk_usage(folder.parent).free
    if not compressed and free < 2 * size + FREE_BYTES:
        raise ValueError(
            f"--layers={layers}: input and output take {2 * size / 1e9:.0f} GB, {free / 1e9:.0f} "
            f"GB are free in {folder.parent}: take fewer layers or another --directory"
        )
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    write_data(folder)
    writer = ShardWriter(folder, SHARD_BYTES)
    generator = torch.Generator().manual_seed(1)
    for weight in table:
        for name, shape in weight.parts.items():
            values = random_values(torch.Size(shape), generator)
            writer.add(name.replace(".gate.0.", ".gate."), values)
    writer.close()
    return table, {path.name: path.stat().st_size for path in folder.glob("*.safetensors")}


def random_values(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Return a weight in bf16 that repeats its first `PERIOD` values."""
    period = torch.empty(PERIOD, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
    return period.repeat(-(-shape.numel() // PERIOD))[: shape.numel()].view(shape)


def write_settings(home: Path, layers: int) -> Path:
    """Write the settings that an upcycled model of that shape begins with, and its data."""
    (home / "moe").mkdir()
    write_data(home / "moe")
    config = to_model_fields({**SHAPE, "num_hidden_layers": layers}, home)
    upcycled = {"coe_iterations": 2, "coe_independent_gate": True, "coe_upcycled": True}
    settings = Settings(
        model={**config, "seq_length": MAX_SEQ_LENGTH, **upcycled}, train=replace(FINE_TUNING)
    )
    settings.data.tokenizer = str(home / "moe")
    settings.log.dir = str(home / "coe")
    path = home / "upcycled.yaml"
    path.write_text(settings.to_yaml(), encoding="utf-8")
    return path


def write_data(folder: Path) -> None:
    """Write a tokenizer into a folder, and token files `train` beside it, of a generated corpus."""
    corpus, _ = make_corpus(folder.parent / "data", train_size=500, valid_size=50)
    fields = Fields(("query", "response"), question_answer=True)
    train_tokenizer([corpus], folder / "tokenizer.model", fields=fields, vocab_size=1024)
    write_tokenizer(folder / "tokenizer.model", folder)
    preprocess([corpus], folder.parent / "train", folder, fields=fields, quiet=True)


def run(home: Path, *arguments: str) -> tuple[Peak, float]:
    """Run Python in `home`; return its largest memory and the seconds that it took."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "CUDA_VISIBLE_DEVICES": ""}
    started_s, peak = time.perf_counter(), Peak(0, 0)
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", *arguments], cwd=home, env=environment
    ) as process:
        status = Path(f"/proc/{process.pid}/status")
        while process.poll() is None:
            lines = (line.split() for line in status.read_text().splitlines())
            found = {line[0]: 1024 * int(line[1]) for line in lines if line[-1] == "kB"}
            peak = Peak(
                max(peak.resident, found.get("VmHWM:", 0)),
                max(peak.anonymous, found.get("RssAnon:", 0)),
            )
            time.sleep(0.05)
    seconds = time.perf_counter() - started_s
    if process.returncode:
        raise SystemExit(process.returncode)
    return peak, seconds


def report(
    layers: int,
    table: list[Weight],
    files: dict[str, int],
    imports: Peak,
    peak: Peak,
    seconds: float,
    output: Path,
) -> None:
    """Print what the command took, beside what it may take."""
    of_layer: dict[int, int] = {}
    for weight in table:
        if weight.layer is not None:
            size = 2 * sum(torch.Size(shape).numel() for shape in weight.parts.values())
            of_layer[weight.layer] = of_layer.get(weight.layer, 0) + size
    shard, layer = max(files.values()), max(of_layer.values())
    written = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    bound = shard + layer + imports.resident
    print(f"layers {layers}, files {len(files)}, input {sum(files.values()) / 1e9:.2f} GB")
    print(f"output {written / 1e9:.2f} GB, {seconds:.0f} s")
    print(f"largest file {shard / MB:,.0f} MB, largest layer {layer / MB:,.0f} MB")
    print(f"imports {imports.resident / MB:,.0f} MB, {imports.anonymous / MB:,.0f} MB anonymous")
    print(f"peak {peak.resident / MB:,.0f} MB, {peak.anonymous / MB:,.0f} MB anonymous")
    print(f"one file + one layer + imports {bound / MB:,.0f} MB")
    print("within the bound" if peak.resident <= bound else "BEYOND THE BOUND")


def describe_training(home: Path, settings: Path) -> None:
    """Print the planner's layout for the upcycled model, and a dry run of training in it."""
    coe = [sys.executable, "-W", "ignore", "-m", "megatron_coe.cli.main"]
    config = ["--config", str(settings)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "CUDA_VISIBLE_DEVICES": ""}
    planned = subprocess.run(
        [*coe, "plan", *config, "--gpus", str(GPUS), "--json"],
        cwd=home, env=environment, check=True, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    found = json.loads(planned.stdout)["layouts"][0]
    overrides = [
        f"{section}.{key}={json.dumps(value)}"
        for section, values in found["settings"].items()
        for key, value in values.items()
    ]
    print(*overrides)
    print({name: round(value / 2**30, 1) for name, value in found["memory"].items()}, "GiB")
    subprocess.run(
        [*coe, "train", *config, "--dry-run", *overrides, "data.train=[train]",
         "train.steps=1000", "train.precision=bf16",
         "checkpoint.allow_config_changes=[model.moe_shared_expert_overlap]"],
        cwd=home, env={**environment, "WORLD_SIZE": str(GPUS)}, check=True,
    )  # fmt: skip


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--directory", type=Path, required=True, help="where the disk has room")
    parser.add_argument("--layers", type=int, default=27)
    parser.add_argument(
        "--compressed", action="store_true", help="do not check that the disk has room for all"
    )
    parser.add_argument("--plan", action="store_true", help="describe the training, and stop")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
