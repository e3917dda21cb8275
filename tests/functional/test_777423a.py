"""What commit 777423a left behind is read by this state, which computes the same from it.

`tests/data/777423a/README.md` says what there is. Figures are equal to the last bit where the same
versions run on the same kind of processor, and within 1e-5 elsewhere.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import pretrain_coe
from megatron_coe.checkpoint.directory import find_checkpoints
from megatron_coe.checkpoint.state import load_checkpoint
from megatron_coe.cli import generate
from megatron_coe.config.aliases import DROPPED_FIELDS, FORMER_KEYS
from megatron_coe.config.loader import load_settings
from megatron_coe.config.model_section import build_provider
from megatron_coe.conversion.export_hf import to_hf
from megatron_coe.conversion.import_hf import from_hf
from megatron_coe.data.tokenizer import load_tokenizer
from megatron_coe.distributed.process_groups import process_groups
from megatron_coe.hf import CoeForCausalLM
from megatron_coe.utils.environment import machine, versions
from tests import zygote
from tests.data.make_777423a import (
    LAST,
    NEW_TOKENS,
    PROMPTS,
    RESUMED,
    STOPPED,
    digest,
    statistics,
    tensors_of,
)
from tests.faults.runs import Launch, base_environment, open_store, rank_environment
from tests.unit.training.runs import make_trainer

REPO = Path(__file__).parents[2]
MADE = REPO / "tests" / "data" / "777423a"
EXPECTED = json.loads((MADE / "expected.json").read_text())
STEP = Path("run", "checkpoints", f"step_{STOPPED:08d}")
ONE_RANK = "1 rank, no dropout"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """A copy of the files, in which the command lines run: the settings name files in it."""
    shutil.copytree(MADE, tmp_path / "777423a")
    monkeypatch.chdir(tmp_path / "777423a")
    return tmp_path / "777423a"


def same_machine() -> bool:
    """Whether sums have the order here that they had when the figures were made."""
    here = {
        **versions(),
        "processor": machine(torch.device("cpu"))["processor"],
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }
    decisive = ("torch", "megatron-core", "processor", "cpu_capability")
    return all(here[name] == EXPECTED["made_with"][name] for name in decisive)


def assert_reported(case: str) -> None:
    """The run's figures after its checkpoint are those of the case."""
    reported = statistics(Path("run", "metrics.jsonl"), after=STOPPED)
    expected = EXPECTED["resumed"][case]
    assert reported.keys() == expected.keys()
    for name, steps in expected.items():
        assert reported[name] == (steps if same_machine() else pytest.approx(steps, rel=1e-5)), name
    if same_machine():
        last = Path("run", "checkpoints", f"step_{LAST:08d}")
        assert digest(tensors_of(last)) == EXPECTED["tensors"][case]


def assert_same_tensors(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype, name
        assert torch.equal(tensor, right[name]), name


# --- settings and options -------------------------------------------------------------------------


def test_every_setting_is_read_under_its_name():
    written = yaml.safe_load(Path("config.yaml").read_text())
    log = written["log"]["dir"]
    settings = load_settings(Path("config.yaml"))
    for section, values in written.items():
        for name, value in values.items():
            if section == "model" and name in DROPPED_FIELDS:
                continue
            key = FORMER_KEYS.get(f"{section}.{name}", f"{section}.{name}")
            name = key.partition(".")[2]
            read = getattr(settings, section)
            read = read[name] if isinstance(read, dict) else getattr(read, name)
            expected = value.replace("${log.dir}", log) if isinstance(value, str) else value
            assert read == expected, f"{section}.{name}"
    provider = build_provider(settings, torch.device("cpu"))
    for name, value in written["model"].items():
        if name in DROPPED_FIELDS:  # translated: tests/unit/config/test_retired_fields.py
            continue
        if name != "activation_func" and value is not None:  # a function; Megatron's own choice
            assert getattr(provider, name) == value, name


def test_every_setting_can_be_overridden_under_its_name():
    settings = load_settings(Path("config.yaml"))
    Path("empty.yaml").write_text("{}")
    overrides = [
        f"{section}.{name}={json.dumps(value)}"
        for section, values in yaml.safe_load(Path("config.yaml").read_text()).items()
        for name, value in values.items()
    ]
    assert load_settings(Path("empty.yaml"), overrides) == settings


def test_every_option_is_accepted():
    ask = (
        "import json, pathlib; from tests.data.make_777423a import options_of; "
        "print(json.dumps(options_of(pathlib.Path.cwd())))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ask],
        cwd=REPO,
        env={**os.environ, "PYTHONPATH": str(REPO)},
        capture_output=True,
        text=True,
        check=True,
    )
    today = json.loads(done.stdout.splitlines()[-1])
    for program, options in json.loads((MADE / "options.json").read_text()).items():
        for option, choices in options.items():
            assert option in today[program], f"{program} {option}"
            offered = today[program][option]
            assert offered is None or set(choices or offered) <= set(offered), f"{program} {option}"


# --- the checkpoint -------------------------------------------------------------------------------


def test_weights_and_moments_are_loaded_bit_for_bit(device):
    """What is written again at once holds the tensors of the checkpoint."""
    again = ["checkpoint.save=again", "checkpoint.async_save=false"]
    settings = load_settings(Path("config.yaml"), [*RESUMED[ONE_RANK], *again])
    with process_groups(settings.parallel, device):
        trainer = make_trainer(settings, device)
        trainer.progress = load_checkpoint(STEP, trainer.train_state)
        trainer.save()
    assert (trainer.progress.step, trainer.progress.samples) == (STOPPED, STOPPED * 8)
    (written,) = find_checkpoints(Path("again"))
    expected = tensors_of(STEP)
    assert sum(name.startswith("optimizer.") for name in expected) > len(expected) / 2
    assert_same_tensors(tensors_of(written), expected)


def test_one_rank_resumes_what_two_have_left():
    arguments = ["--config", "config.yaml", "train.stop_step=null", *RESUMED[ONE_RANK]]
    assert pretrain_coe.main(arguments) == 0
    assert_reported(ONE_RANK)


def test_two_ranks_resume_on_the_command_line():
    """With dropout where the generators' states mean the same: on the same engine."""
    same = versions()["megatron-core"] == EXPECTED["made_with"]["megatron-core"]
    case = "2 ranks" if same else "2 ranks, no dropout"
    arguments = ["--config", "config.yaml", "train.stop_step=null", *RESUMED[case]]
    store, here = open_store(), Path.cwd()
    environments = (
        {**base_environment(REPO), **rank_environment(rank, 2, store.port)} for rank in range(2)
    )
    ranks = [
        zygote.shared().start("pretrain_coe.py", arguments, here, environment, cwd=here)
        for environment in environments
    ]
    with Launch(ranks, store) as launch:
        assert launch.wait() == [0, 0], launch.complained()
        assert f"resumed from {STEP}" in launch.said()
    assert_reported(case)


# --- the export -----------------------------------------------------------------------------------


def assert_same_ids(*folders: Path) -> None:
    """Of texts of the data, and of some that SentencePiece spells in bytes."""
    tokenizers = [load_tokenizer(folder) for folder in folders]
    for text in (*PROMPTS, " one  two\n", "naïve <0x41> \t"):
        first, second = (tokenizer.tokenize(text) for tokenizer in tokenizers)
        assert first == second != []


def test_the_checkpoint_is_exported_bit_for_bit(folder):
    to_hf(folder / "run" / "checkpoints", folder / "again")
    for name in ("config.json", "generation_config.json"):
        read = [json.loads((folder / side / name).read_text()) for side in ("again", "export")]
        now, before = read
        if name == "config.json":
            # What is said since: another class, YaRN by its own name too, the trained length.
            assert now["auto_map"].items() >= before["auto_map"].items()
            assert now["rope_scaling"].pop("rope_type") == "deepseek_yarn"
            assert (
                now["max_position_embeddings"]
                == load_settings(STEP / "config.yaml").model["seq_length"]
            )
            for key in ("auto_map", "max_position_embeddings"):
                del now[key], before[key]
        assert now == before, name
    assert_same_ids(folder / "again", folder / "export")
    weights = [load_file(folder / side / "model.safetensors") for side in ("again", "export")]
    assert_same_tensors(*weights)


def test_its_tokenizer_is_named_where_it_has_moved(folder):
    (folder / "tokenizer.model").rename(folder / "moved.model")
    with pytest.raises(ValueError, match=r"holds no copy of its tokenizer.*name it with --tok"):
        to_hf(folder / "run" / "checkpoints", folder / "again")
    to_hf(folder / "run" / "checkpoints", folder / "again", tokenizer=folder / "moved.model")
    assert_same_ids(folder / "again", folder / "export")


def test_the_export_becomes_a_checkpoint_and_comes_back(folder):
    from_hf(folder / "export", folder / "imported")
    to_hf(folder / "imported", folder / "again")
    weights = [load_file(folder / side / "model.safetensors") for side in ("again", "export")]
    assert_same_tensors(*weights)


@pytest.mark.parametrize("load", ["export", "run/checkpoints"])
def test_the_same_text_is_generated(load, capsys):
    prompts = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    options = ["--load", load, *prompts, "--max-new-tokens", str(NEW_TOKENS)]
    generate.command(generate.parse(options, None))
    assert capsys.readouterr().out == EXPECTED["generated"]


def test_the_export_computes_the_same(folder):
    expected = load_file(folder / "expected.safetensors")
    model = CoeForCausalLM.from_pretrained(folder / "export").eval()
    ids = expected["input_ids"]
    with torch.no_grad():
        output = model(ids, labels=ids)
        tokens = model.generate(
            ids, do_sample=False, max_new_tokens=NEW_TOKENS, eos_token_id=None, pad_token_id=0
        )
    assert torch.equal(tokens, expected["tokens"])
    torch.testing.assert_close(output.logits, expected["logits"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output.loss, expected["loss"], rtol=1e-5, atol=1e-5)
