"""tools/upcycle.py as a user runs it, and what follows: training, and back to Hugging Face."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests import zygote
from tests.functional.test_convert import convert
from tests.unit.conversion.models import megatron_logits, write_random_model

STANDARD_MOE = {"coe_iterations": 1, "coe_residual": "outer", "vocab_size": 300}
STEPS = 12


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with a standard MoE model, its tokenizer, and a text to train on."""
    from megatron_coe.conversion.tokenizer import write_tokenizer
    from megatron_coe.data.preprocess import preprocess
    from megatron_coe.data.records import Fields
    from megatron_coe.data.tokenizer import train_tokenizer

    home = tmp_path_factory.mktemp("home")
    write_random_model(home / "moe", seed=1, **STANDARD_MOE)
    texts = home / "texts.txt"
    texts.write_text("one two three\nfour five six\n" * 20)
    train_tokenizer([texts], home / "t.model", fields=Fields(), vocab_size=285)
    write_tokenizer(home / "t.model", home / "moe")
    preprocess([texts], home / "train", home / "t.model", fields=Fields(), quiet=True)
    return home


def upcycle(home: Path, *arguments: object, **how: bool):
    return zygote.run("tools/upcycle.py", *arguments, cwd=home, **how)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_a_standard_moe_is_upcycled_trained_and_exported(home, single_rank, monkeypatch):
    done = upcycle(home, "--input", "moe", "--iterations", "2", "--output", "coe", forked=False)
    assert done.returncode == 0, done.stderr
    step = Path("coe/step_00000000")
    assert done.stdout == f"moe -> {step}; train it with --config {step}/config.yaml\n"

    done = zygote.run(
        "pretrain_coe.py", "--config", step / "config.yaml",
        *(f"data.train=[{home}/train_text_document]", f"train.steps={STEPS}", "train.lr=0.01"),
        *("train.precision=fp32", "train.global_batch_size=4", "train.lr_warmup_fraction=0"),
        *("model.seq_length=16", "log.interval=1"), cwd=home,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"resumed from {step}" in done.stdout
    records = map(json.loads, (home / "coe" / "metrics.jsonl").read_text().splitlines())
    losses = [record["train_loss"] for record in records if "train_loss" in record]
    assert len(losses) == STEPS
    assert losses[-1] < 0.8 * losses[0]

    done = convert(home, "to-hf", "--input", "coe", "--output", "exported")
    assert done.returncode == 0, done.stderr
    exported = weights_of(home / "exported")
    gates = {name: tensor for name, tensor in exported.items() if "coe_weights" in name}
    assert list(gates) == [f"model.layers.{layer}.mlp.coe_weights.1" for layer in (0, 1)]
    assert all(gate.ne(0).all() for gate in gates.values())

    from megatron_coe.conversion.export_hf import to_hf
    from megatron_coe.conversion.import_hf import from_hf
    from megatron_coe.hf import CoeForCausalLM

    monkeypatch.chdir(home)
    ids = torch.randint(300, (2, 16), generator=torch.Generator().manual_seed(1))
    model = CoeForCausalLM.from_pretrained("exported").eval()
    with torch.no_grad():
        expected = model(ids).logits
    trained = Path(f"coe/step_{STEPS:08d}")
    logits = megatron_logits(trained, ids, single_rank)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)

    back = from_hf(Path("exported"), Path("imported"))
    logits = megatron_logits(back, ids, single_rank)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    to_hf(Path("imported"), Path("again"))
    again = weights_of(home / "again")
    assert again.keys() == exported.keys()
    assert all(torch.equal(again[name], exported[name]) for name in exported)


def test_a_mistake_is_one_line(home):
    write_random_model(home / "no moe", seed=2)
    before = sorted(home.iterdir())
    done = upcycle(home, "--input", "no moe", "--output", "out")
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert "no moe/config.json: coe_iterations=2" in done.stderr
    assert sorted(home.iterdir()) == before
