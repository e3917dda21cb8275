"""`tools/plan.py` as users start it."""

from __future__ import annotations

import json

import pytest
import yaml

from tests.functional.test_training_tools import run

CONFIG = ("--config", "examples/scale/coe-2_4-65.yaml", "train.global_batch_size=64")


def test_a_layout_is_recommended_built_and_read_back(tmp_path) -> None:
    result = run("plan.py", *CONFIG, "--gpus", 16, "--top", 3, "--build", forked=False)
    assert result.returncode == 0, result.stderr
    head, text = result.stdout.split("\n\nmodel:\n")
    assert "789,588,992 parameters" in head and "16 x H100" in head
    assert "equal" in head and "DIFFERENT" not in head
    for word in ("weights", "gradients", "optimizer", "activations", "iteration 2", "MFU"):
        assert word in head
    preset = tmp_path / "layout.yaml"
    settings = yaml.safe_load("model:\n" + text)
    preset.write_text(yaml.safe_dump(settings))
    again = run(
        "plan.py", *CONFIG, "--gpus", 16, "--keep-layout", "--json",
        *(f"{section}.{name}={'null' if value is None else value}"
          for section, values in settings.items() for name, value in values.items()),
    )  # fmt: skip
    assert again.returncode == 0, again.stderr
    (layout,) = json.loads(again.stdout)["layouts"]
    assert layout["settings"]["parallel"] == settings["parallel"]
    step = f"step {layout['time']['total'] * 1e3:.1f} ms"
    assert step in head


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((*CONFIG, "--gpus", 0), ["--gpus=0", "1 or more"]),
        ((*CONFIG, "--gpus", 12), ["--gpus=12", "--gpus-per-node=8", "whole nodes"]),
        ((*CONFIG, "--gpus", 8, "--rank", 3), ["--rank=3", "--build"]),
        ((*CONFIG, "--gpus", 8, "--build", "--rank", 8), ["--rank=8", "0 … 7"]),
        (
            (*CONFIG, "--gpus", 8, "model.vocab_size=0", "data.tokenizer=none.model"),
            ["model.vocab_size", "not set", "data.tokenizer=none.model"],
        ),
        (("--config", "none.yaml", "--gpus", 8), ["none.yaml"]),
        (
            (*CONFIG, "--gpus", 8, "--keep-layout", "parallel.expert_model_parallel_size=3"),
            ["num_moe_experts=64", "expert_model_parallel_size=3", "1, 2, 4, 8"],
        ),
    ],
)
def test_mistakes_are_answered_in_one_line(arguments, words) -> None:
    result = run("plan.py", *arguments)
    assert (result.returncode, result.stdout) == (2, "")
    assert len(result.stderr.splitlines()) == 1
    for word in words:
        assert word in result.stderr
