"""tools/convert_checkpoint.py as a user runs it, and the exported folder as a user loads it."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import zygote
from tests.unit.conversion.models import write_random_model

ROOT = Path(__file__).parents[2]
LOAD = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
assert not any(name.startswith("megatron") for name in sys.modules), "the code stands alone"
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
inputs = tokenizer("one two", return_tensors="pt")
written, without_cache = (
    model.generate(**inputs, max_new_tokens=8, do_sample=False, use_cache=cache)[0].tolist()
    for cache in (True, False)
)
assert written == without_cache and len(written) > inputs["input_ids"].shape[1]
print(type(model).__name__, model.generation_config.eos_token_id, *written)
"""


def run(home: Path, *command: object) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "1",
    }
    return subprocess.run(
        [sys.executable, *map(str, command)],
        env=environment,
        capture_output=True,
        text=True,
        cwd=home,
    )


def convert(home: Path, *arguments: object, **how: bool) -> subprocess.CompletedProcess[str]:
    offline = {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    program = "tools/convert_checkpoint.py"
    return zygote.run(program, *arguments, cwd=home, environment=offline, **how)


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """A folder with a tokenizer, and the checkpoint made of it by the command."""
    from megatron_coe.conversion.tokenizer import write_tokenizer
    from megatron_coe.data.records import Fields
    from megatron_coe.data.tokenizer import train_tokenizer

    home = tmp_path_factory.mktemp("home")
    write_random_model(home / "hf", seed=1, vocab_size=300)
    (home / "texts.txt").write_text("one two three\nfour five six\n" * 20)
    model = home / "t.model"
    train_tokenizer([home / "texts.txt"], model, fields=Fields(), vocab_size=285)
    special = write_tokenizer(model, home / "hf")
    path = home / "hf" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | special))
    done = convert(home, "from-hf", "--input", "hf", "--output", "checkpoints")
    assert done.returncode == 0, done.stderr
    return home


def test_there_and_back_and_loaded_with_remote_code(imported):
    done = convert(
        imported, "to-hf", "--input", "checkpoints", "--output", "again",
        *("--dtype", "bf16"), *("--max-shard-size", "0.05MB"), forked=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "checkpoints/step_00000000 -> again" in done.stdout
    original = load_file(imported / "hf" / "model.safetensors")
    index = json.loads((imported / "again" / "model.safetensors.index.json").read_text())
    files = {
        name: load_file(imported / "again" / name) for name in set(index["weight_map"].values())
    }
    assert len(files) > 1
    for name, file in index["weight_map"].items():
        assert torch.equal(files[file][name], original[name].bfloat16()), name

    card = (imported / "again" / "README.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    loaded = run(imported, "-c", LOAD + example, "again")
    assert loaded.returncode == 0, loaded.stderr
    assert loaded.stdout.split()[:2] == ["CoeForCausalLM", "2"]
    assert "Once upon a time" in loaded.stdout.splitlines()[1], "the card's example"


def test_an_older_export_runs_by_the_package_and_is_refreshed_by_two_files(imported):
    """The code in the folder does not run in this transformers, as that of 777423a in 5.24."""
    from megatron_coe.hf import CoeForCausalLM

    old = shutil.copytree(imported / "hf", imported / "old")
    CoeForCausalLM.from_pretrained(imported / "hf").save_pretrained(old)
    code = old / "modeling_coe.py"
    code.write_text(code.read_text() + "\nraise RuntimeError('the code of the folder was run')\n")
    done = run(imported, "-c", LOAD, "old")
    assert done.returncode != 0
    assert "the code of the folder was run" in done.stderr

    generate = ("--prompt", "one two", "--max-new-tokens", 8)
    texts = []
    for folder in ("hf", "old"):
        done = zygote.run("tools/generate.py", "--model", folder, *generate, cwd=imported)
        assert done.returncode == 0, done.stderr
        texts.append(done.stdout)
    assert texts[0] == texts[1] != ""

    for name in ("configuration_coe.py", "modeling_coe.py"):
        shutil.copy(ROOT / "megatron_coe" / "hf" / name, old)
    done = run(imported, "-c", LOAD, "old")
    assert done.returncode == 0, done.stderr


def test_training_starts_from_an_imported_model(imported):
    from megatron_coe.data.preprocess import preprocess
    from megatron_coe.data.records import Fields

    texts = imported / "texts.txt"
    preprocess([texts], imported / "train", imported / "t.model", fields=Fields(), quiet=True)
    config = imported / "checkpoints" / "step_00000000" / "config.yaml"
    data = imported / "train_text_document"
    done = zygote.run(
        "pretrain_coe.py", "--config", config, f"data.train=[{data}]", f"data.valid=[{data}]",
        *("train.steps=2", "train.precision=fp32", "model.seq_length=8"), cwd=imported,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "resumed from checkpoints/step_00000000" in done.stdout
    assert (imported / "checkpoints" / "step_00000002").is_dir()

    done = convert(imported, "to-hf", "--input", "checkpoints", "--output", "trained")
    assert done.returncode == 0, done.stderr
    kept = json.loads((imported / "hf" / "config.json").read_text())
    exported = json.loads((imported / "trained" / "config.json").read_text())
    assert exported["bos_token_id"] == kept["bos_token_id"] == 1
    source, copy = (imported / name / "tokenizer.json" for name in ("hf", "trained"))
    assert source.read_bytes() == copy.read_bytes()
    names = (imported / name / "tokenizer_config.json" for name in ("hf", "trained"))
    kept, exported = (json.loads(path.read_text()) for path in names)
    assert exported == kept | {"model_max_length": 20}, "the positions of the imported model"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["from-hf", "--input", "nowhere", "--output", "out"], "nowhere/config.json"),
        (["to-hf", "--input", "checkpoints", "--output", "hf"], "hf exists already"),
        (
            ["to-hf", "--input", "checkpoints", "--output", "out", "--as", "deepseek_v2"],
            "inner_iter=2",
        ),
    ],
    ids=["no folder", "taken", "no standard MoE"],
)
def test_a_mistake_is_one_line(imported, arguments, told):
    before = sorted(imported.iterdir())
    done = convert(imported, *arguments)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert told in done.stderr
    assert sorted(imported.iterdir()) == before


def test_a_size_that_is_none_is_told(imported):
    done = convert(
        imported, "to-hf", "--input", "checkpoints", "--output", "out", "--max-shard-size", "big"
    )
    assert done.returncode == 2
    assert "'big' is no size" in done.stderr


EXPERT = "model.layers.1.mlp.experts.4.up_proj.weight"
GATE = "model.layers.0.mlp.gate.1.weight"


def change_config(folder: Path, **keys: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Rewrite the file that holds `EXPERT`."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    path = folder / index["weight_map"][EXPERT]
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def first_file(folder: Path) -> Path:
    return min(folder.glob("*.safetensors"))


DAMAGES = {
    # what is done to the folder, and all that the message must name
    "missing shard": (lambda f: first_file(f).unlink(), ["model-00001-of", "missing"]),
    "truncated safetensors": (
        lambda f: os.truncate(first_file(f), first_file(f).stat().st_size - 64),
        ["model-00001-of", "not a complete"],
    ),
    "wrong shape": (
        lambda f: change_weights(f, lambda w: w.update({EXPERT: torch.ones(3, 32)})),
        [EXPERT, "[3, 32]"],
    ),
    "an expert missing": (lambda f: change_weights(f, lambda w: w.pop(EXPERT)), [EXPERT]),
    "an expert all zero": (lambda f: change_weights(f, lambda w: w[EXPERT].zero_()), [EXPERT]),
    "unknown architecture": (
        lambda f: change_config(f, model_type="gpt2"),
        ["config.json", "model_type='gpt2'"],
    ),
    "fewer iterations than weights": (lambda f: change_config(f, inner_iter=1), [GATE]),
    "more experts than weights": (
        lambda f: change_config(f, n_routed_experts=8),
        ["hf: lacks model.layers.", "mlp.experts.7."],
    ),
    "configuration cut off": (
        lambda f: os.truncate(f / "config.json", 40),
        ["config.json"],
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_one_line(imported, tmp_path, monkeypatch, capfd, damage):
    """In this process, for speed: Megatron's import would take most of each case's time."""
    from megatron_coe.cli import convert
    from megatron_coe.conversion.export_hf import to_hf

    monkeypatch.chdir(tmp_path)
    to_hf(imported / "checkpoints", tmp_path / "hf", max_shard_size=20_000)
    damaging, told = DAMAGES[damage]
    damaging(tmp_path / "hf")
    capfd.readouterr()
    handler = signal.getsignal(signal.SIGTERM)
    try:
        status = convert.main(["from-hf", "--input", "hf", "--output", "out"])
    finally:
        signal.signal(signal.SIGTERM, handler)
    error = capfd.readouterr().err
    assert status == 2
    assert error.startswith("error: ")
    assert len(error.strip().splitlines()) == 1, error
    for words in told:
        assert words in error
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
