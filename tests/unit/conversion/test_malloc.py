"""A conversion holds one file and one layer at most, above the interpreter with its imports."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_coe.conversion.import_hf import from_hf
from tests.unit.conversion.models import write_random_model

ROOT = Path(__file__).parents[3]
MB = 10**6
SIZES = {  # of a file, hidden size, size of an expert
    "8MB": (8 * MB, 256, 512),
    "500MB": (500 * MB, 1024, 1536),
}
LAYERS = 10


def peak(small: Path, *arguments: object) -> int:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.unit.conversion.peak"]
        + [str(argument) for argument in (small, *arguments)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout.splitlines()[-1])


@pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="peaks are measured by Linux's /proc"
)
@pytest.mark.parametrize("size", ["8MB", pytest.param("500MB", marks=pytest.mark.slow)])
def test_one_file_and_one_layer_at_most(tmp_path, size):
    shard, hidden, expert = SIZES[size]
    weights = write_random_model(
        tmp_path / "one",
        seed=1,
        num_layers=LAYERS,
        hidden_size=hidden,
        moe_ffn_hidden_size=expert,
        moe_shared_expert_intermediate_size=expert,
    )
    total = sum(tensor.nbytes for tensor in weights.values())
    layer = sum(
        tensor.nbytes for name, tensor in weights.items() if name.startswith("model.layers.1.")
    )
    del weights
    limit = shard + layer
    assert total > 2 * limit, "or a conversion that holds the whole model would pass"
    small = tmp_path / "small"
    write_random_model(small, seed=2)
    from_hf(tmp_path / "one", tmp_path / "checkpoint")

    there = peak(
        small, "to-hf", "--input", tmp_path / "checkpoint", "--output", tmp_path / "several",
        "--max-shard-size", size,
    )  # fmt: skip
    back = peak(small, "from-hf", "--input", tmp_path / "several", "--output", tmp_path / "again")
    files = [path.stat().st_size for path in (tmp_path / "several").glob("*.safetensors")]
    assert len(files) > 1
    assert max(files) <= 1.01 * shard, "the head of the file comes on top"
    told = f"a file and a layer: {limit:,} bytes, to-hf: {there:,}, from-hf: {back:,}"
    assert max(there, back) <= limit, told
