"""Training from weights on the command line: imported ones, moved ones, one's own, and none."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

import pretrain_coe
from megatron_coe import generation
from megatron_coe.config.loader import load_settings
from megatron_coe.conversion.import_hf import from_hf
from megatron_coe.conversion.tokenizer import write_tokenizer
from megatron_coe.conversion.upcycle import upcycle
from megatron_coe.data.preprocess import preprocess
from megatron_coe.data.records import Fields
from megatron_coe.data.tokenizer import load_tokenizer, train_tokenizer
from megatron_coe.fault_tolerance.exit_codes import CONFIG_ERROR
from megatron_coe.utils.metrics_file import read_records
from tests import zygote
from tests.functional.test_convert import convert
from tests.unit.conversion.models import write_random_model

CHAT_TEMPLATE = Path(__file__).parents[2] / "examples" / "finetune" / "chat_template.jinja"
SMALL = ("train.precision=fp32", "train.global_batch_size=4", "model.seq_length=8")
TEXT = "one two three\nfour five six\nseven eight nine ten\n"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A model of others, a standard MoE, their tokenizer, two data sets, and a run of six steps."""
    home = tmp_path_factory.mktemp("home")
    (home / "texts.txt").write_text(TEXT * 20)
    lines = (json.dumps({"text": line}) + "\n" for line in TEXT.splitlines() * 20)
    (home / "my.jsonl").write_text("".join(lines))
    train_tokenizer([home / "texts.txt"], home / "t.model", fields=Fields(), vocab_size=285)
    standard = {"coe_iterations": 1, "coe_residual": "outer"}
    for name, seed, changes in (("my-model", 1, {}), ("moe", 2, standard)):
        write_random_model(home / name, seed=seed, vocab_size=300, **changes)
        write_tokenizer(home / "t.model", home / name)
    for name in ("train", "other"):
        preprocess([home / "texts.txt"], home / name, home / "t.model", fields=Fields(), quiet=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        own_run()
    return home


def own_run() -> None:
    settings = load_settings(from_hf(Path("my-model"), Path("base")) / "config.yaml")
    settings.checkpoint.load, settings.log.dir = None, "runs/mine"
    settings.checkpoint.save = "runs/mine/checkpoints"
    settings.data.tokenizer, settings.data.mode = "t.model", "padded"
    settings.train.lr, settings.train.lr_decay_style = 0.01, "constant"
    settings.train.steps = 6
    Path("my-run.yaml").write_text(settings.to_yaml())
    train("my-run.yaml")


@pytest.fixture
def home(made, tmp_path, monkeypatch) -> Path:
    """A copy of it, in which the command lines run."""
    shutil.copytree(made, tmp_path / "home")
    monkeypatch.chdir(tmp_path / "home")
    return tmp_path / "home"


def train(config: Path | str, *overrides: str) -> None:
    arguments = [*SMALL, "data.train=[train_text_document]", "log.interval=1", *overrides]
    assert pretrain_coe.main(["--config", str(config), *arguments]) == 0


def losses(run: Path | str) -> list[float]:
    records = read_records(Path(run, "metrics.jsonl"))
    return [record["train_loss"] for record in records if "train_loss" in record]


def test_the_whole_way_from_a_folder_of_others(home):
    """Every command as the page has it, in processes of their own."""
    done = convert(home, "from-hf", "--input", "my-model", "--output", "runs/tuned/checkpoints")
    assert done.returncode == 0, done.stderr
    step = Path("runs/tuned/checkpoints/step_00000000")
    prepared = ("--tokenizer", step / "tokenizer", "--output-prefix", "my", "--append-eod")
    done = zygote.run("tools/preprocess_data.py", "--input", "my.jsonl", *prepared, cwd=home)
    assert done.returncode == 0, done.stderr
    done = zygote.run(
        "pretrain_coe.py", "--config", step / "config.yaml", "data.train=[my_text_document]",
        *("train.steps=3", "train.precision=fp32", "train.global_batch_size=4"), cwd=home,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"resumed from {step}" in done.stdout
    done = convert(home, "to-hf", "--input", "runs/tuned/checkpoints", "--output", "my-tuned-model")
    assert done.returncode == 0, done.stderr
    before, after = (Path(folder) for folder in ("my-model", "my-tuned-model"))
    assert (after / "tokenizer.json").read_bytes() == (before / "tokenizer.json").read_bytes()
    kept, written = (
        json.loads((folder / "tokenizer_config.json").read_text()) for folder in (before, after)
    )
    assert written.items() >= kept.items()
    assert written["model_max_length"] == load_settings(step / "config.yaml").model["seq_length"]
    assert (home / "runs/tuned/metrics.jsonl").is_file()


def test_conversations_are_packed_trained_and_exported(home):
    """The page's commands, with weights that stay and a moving average."""
    shutil.copyfile(CHAT_TEMPLATE, "my-model/chat_template.jinja")
    words = [line.split() for line in TEXT.splitlines()]
    turns = [
        ({"role": "user", "content": ask}, {"role": "assistant", "content": " ".join(say)})
        for ask, *say in words
    ]
    chats = [[*first, *second] for first in turns for second in turns]
    Path("chats.jsonl").write_text("".join(json.dumps({"messages": c}) + "\n" for c in chats))
    done = convert(home, "from-hf", "--input", "my-model", "--output", "runs/chat/checkpoints")
    assert done.returncode == 0, done.stderr
    done = zygote.run(
        "tools/preprocess_data.py", "--input", "chats.jsonl", "--messages-key", "messages",
        *("--tokenizer", "my-model", "--output-prefix", "chats"), cwd=home,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "tokens are answers, the targets of the loss" in done.stdout
    step = Path("runs/chat/checkpoints/step_00000000")
    data = IndexedDataset("chats")
    seq_length = max(len(data[number]) for number in range(len(data))) - 1
    arguments = (
        "pretrain_coe.py", "--config", step / "config.yaml", "data.train=[chats]",
        *("data.valid=[chats]", "data.mode=packed_documents", f"model.seq_length={seq_length}"),
        *("train.steps=12", "train.precision=fp32", "train.global_batch_size=4", "train.lr=1e-2"),
        *("log.interval=1", "train.freeze=['*.router.*']", "train.ema_decay=0.5"),
    )  # fmt: skip
    done = zygote.run(*arguments, cwd=home)
    assert done.returncode == 0, done.stderr
    assert f"are longer than model.seq_length={seq_length} and are cut" in done.stdout
    assert losses("runs/chat")[-1] < 0.8 * losses("runs/chat")[0]
    done = zygote.run(*arguments, "--eval-only", cwd=home)
    assert "of the moving average | valid loss" in done.stdout, done.stderr
    for output, more in (("my-chat-model", ()), ("my-average", ("--ema",))):
        done = convert(home, "to-hf", "--input", "runs/chat/checkpoints", "--output", output, *more)
        assert done.returncode == 0, done.stderr
        assert Path(output, "chat_template.jinja").is_file()
    last, average, before = (
        load_file(Path(folder, "model.safetensors"))
        for folder in ("my-chat-model", "my-average", "my-model")
    )
    for name, weight in last.items():
        assert torch.equal(weight, before[name]) is (".gate." in name), name
    head = "lm_head.weight"
    assert 0 < (average[head] - last[head]).abs().max() < (before[head] - last[head]).abs().max()

    refused = zygote.run(*arguments, "train.micro_batch_size=2", cwd=home)
    assert refused.returncode == CONFIG_ERROR
    assert "makes one sequence of a micro-batch" in refused.stderr


def test_what_an_import_begins_with(home):
    """Positions of the model before YaRN, a batch and a rate for a trained model, any backend."""
    scaled = json.loads(Path("my-model/config.json").read_text())
    scaled["rope_scaling"]["original_max_position_embeddings"] = 16
    scaled["max_position_embeddings"] = 640
    Path("my-model/config.json").write_text(json.dumps(scaled))
    for path, folder in (
        (from_hf(Path("my-model"), Path("runs/one/checkpoints")), "runs/one"),
        (upcycle(Path("moe"), Path("runs/two/checkpoints")), "runs/two"),
        (from_hf(Path("my-model"), Path("three")), "three"),
    ):
        assert pretrain_coe.main(["--config", str(path / "config.yaml"), "--dry-run",
                                  "data.train=[train_text_document]"]) == 0  # fmt: skip
        settings = load_settings(path / "config.yaml")
        assert settings.log.dir == folder
        assert settings.train.global_batch_size == 64
        assert (settings.train.lr, settings.train.lr_decay_style) == (2e-5, "cosine")
        assert settings.model.get("backend", "auto") == "auto"
        assert settings.model["seq_length"] == (20 if folder == "runs/two" else 16)


def test_imports_have_a_folder_each_for_their_logs(home):
    for name, steps in (("one", 3), ("two", 2)):
        step = from_hf(Path("my-model"), Path("runs", name, "checkpoints"))
        train(step / "config.yaml", f"train.steps={steps}")
    assert len(losses("runs/one")) == 3
    assert len(losses("runs/two")) == 2


def test_a_moved_import_trains_from_its_weights(home, monkeypatch):
    """Moved; by a relative path from another folder; extended; renamed: the same first loss."""
    step = from_hf(Path("my-model"), Path("imp/checkpoints"))
    data = f"data.train=[{home}/train_text_document]"
    unmoved = Path("kept/checkpoints", step.name)
    shutil.copytree("imp", "kept")
    train(step / "config.yaml", "train.steps=1")
    (expected,) = losses("imp")

    shutil.rmtree("imp")
    Path("mine.yaml").write_text(f"extends: {unmoved}/config.yaml\nlog: {{dir: extended}}")
    Path("there").mkdir()
    monkeypatch.chdir("there")
    train(f"../{unmoved}/config.yaml", "train.steps=1", data)
    assert losses("../kept") == [expected]
    monkeypatch.chdir(home)
    train("mine.yaml", "train.steps=1", "checkpoint.save=extended/checkpoints")
    assert losses("extended") == [expected]
    unmoved.rename("best")
    train("best/config.yaml", "train.steps=1")
    assert losses("runs/best") == [expected]


@pytest.mark.parametrize("gone", ["checkpoint", "weights"])
def test_without_the_weights_that_were_named_nothing_starts(home, capsys, gone, monkeypatch):
    """Before any process group, and in a dry run: a copy of an import's settings and no more."""
    step = from_hf(Path("my-model"), Path("imp/checkpoints"))
    config = Path("copy.yaml")
    shutil.copy(step / "config.yaml", config)
    if gone == "weights":  # only its settings were copied, into a folder of the same name
        config = Path("elsewhere", step.name, "config.yaml")
        config.parent.mkdir(parents=True)
        shutil.copy(step / "config.yaml", config)
    shutil.rmtree("imp")

    before = sorted(Path(".").glob("**/step_*"))

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a process group was made")

    monkeypatch.setattr("torch.distributed.init_process_group", refuse)
    for more in ((), ("--dry-run",)):
        arguments = ["--config", str(config), "data.train=[train_text_document]"]
        arguments.append("data.tokenizer=t.model")
        assert pretrain_coe.main([*arguments, *more]) == CONFIG_ERROR
        assert "checkpoint.load=" in capsys.readouterr().err
    assert sorted(Path(".").glob("**/step_*")) == before


def test_a_folder_of_others_is_no_checkpoint_to_load(home, capsys):
    step = from_hf(Path("my-model"), Path("imp/checkpoints"))
    named = ("checkpoint.load=my-model", "checkpoint.save=new", "data.train=[train_text_document]")
    assert pretrain_coe.main(["--config", str(step / "config.yaml"), *named]) == CONFIG_ERROR
    assert "coe convert from-hf" in capsys.readouterr().err


def test_the_command_can_be_repeated_that_names_a_checkpoints_settings(home, capsys):
    step = from_hf(Path("my-model"), Path("imp/checkpoints"))
    often = ("train.steps=8", "checkpoint.save_interval=1", "checkpoint.keep_latest=1")
    train(step / "config.yaml", *often, "train.exit_step=4")
    kept = sorted(path.name for path in Path("imp/checkpoints").glob("step_*"))
    assert kept == ["step_00000000", "step_00000004"]
    capsys.readouterr()
    train(step / "config.yaml", *often)
    assert "resumed from imp/checkpoints/step_00000004" in capsys.readouterr().out
    assert len(losses("imp")) == 8


def test_another_tokenizer_in_its_place_is_not_taken(home, capsys):
    """The path in the settings leads to a tokenizer of the same size; the copy is what counts."""
    step = from_hf(Path("my-model"), Path("imp/checkpoints"))
    train(step / "config.yaml", "train.steps=1", "data.tokenizer=t.model")
    trained = load_tokenizer("t.model").tokenize(TEXT)
    Path("texts.txt").write_text("eins zwei drei\nvier fünf sechs\n" * 20)
    train_tokenizer([Path("texts.txt")], Path("t.model"), fields=Fields(), vocab_size=285)
    assert load_tokenizer("t.model").tokenize(TEXT) != trained

    done = convert(home, "to-hf", "--input", "imp/checkpoints", "--output", "exported")
    assert done.returncode == 0, done.stderr
    exported = PreTrainedTokenizerFast.from_pretrained("exported")
    assert exported.encode(TEXT, add_special_tokens=False) == trained
    other = ("--load", "imp/checkpoints", "--tokenizer", "t.model")
    for program, *arguments in (
        ("tools/convert_checkpoint.py", "to-hf", *other, "--save", "out"),
        ("tools/generate.py", *other, "--prompt", "one"),
        ("tools/analyze_routing.py", *other, "--data", "texts.txt", "--output", "analysis"),
    ):
        done = zygote.run(program, *arguments, cwd=home)
        assert done.returncode == 2
        assert "is not the one that checkpoint imp/checkpoints/step_0000000" in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    config = "imp/checkpoints/step_00000001/config.yaml"
    arguments = ["data.train=[train_text_document]", "train.steps=9", "data.tokenizer=t.model"]
    assert pretrain_coe.main(["--config", config, *SMALL, *arguments]) == CONFIG_ERROR
    assert "data.tokenizer was '285 ids" in capsys.readouterr().err


def test_own_weights_are_tuned_and_the_same_command_resumes(home, capsys):
    step = Path("runs/mine/checkpoints/step_00000006")
    tuned = (
        *("log.dir=runs/second", "checkpoint.save=runs/second/checkpoints"),
        *("data.train=[other_text_document]", "train.lr=1e-3", "train.seed=7", "train.steps=4"),
        "data.mode=packed",
    )
    capsys.readouterr()
    train(step / "config.yaml", *tuned, "train.exit_step=2")
    told = capsys.readouterr().out
    assert f"runs/second, from the weights of {home / step} and step 0, to step 2" in told
    assert losses("runs/second")[0] < 0.8 * losses("runs/mine")[0], "not initial weights"
    train(step / "config.yaml", *tuned)
    told = capsys.readouterr().out
    assert "resumed from runs/second/checkpoints/step_00000002" in told
    assert f"checkpoint.load={home / step} is not read again" in told
    assert len(losses("runs/second")) == 4
    done = convert(home, "to-hf", "--input", "runs/second/checkpoints", "--output", "again")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("changes", "accepted", "sequences"),
    [
        (("train.steps=12",), None, 48),
        (("train.steps=12", "train.lr_decay_style=cosine"), "train.steps", 48),
        (("train.steps=12", "train.global_batch_size=2"), "train.global_batch_size", 36),
        (("train.steps=8", "train.global_batch_size=6"), "train.global_batch_size", 36),
    ],
    ids=["more steps", "more steps of a schedule", "smaller batch", "larger batch"],
)
def test_more_steps_and_another_batch(home, capsys, changes, accepted, sequences):
    if accepted:
        refused = ["--config", "my-run.yaml", *SMALL, "data.train=[train_text_document]", *changes]
        assert pretrain_coe.main(refused) == CONFIG_ERROR
        assert f"checkpoint.allow_config_changes='[{accepted}]'" in capsys.readouterr().err
        train("my-run.yaml", *changes, f"checkpoint.allow_config_changes=[{accepted}]")
    else:
        train("my-run.yaml", *changes)
    assert "changed since then: train." in capsys.readouterr().out
    records = read_records(Path("runs/mine/metrics.jsonl"))
    assert records[-1]["tokens"] == sequences * 8
    train("my-run.yaml", *changes)  # the accepted change is the checkpoint's now


@pytest.mark.parametrize("begins", [False, True])
def test_a_prompt_begins_as_the_documents_of_training_did(home, begins):
    """From preprocessing over training and export to generation."""
    step = from_hf(Path("my-model"), Path("imp/checkpoints"))
    tokenizer = load_tokenizer(step / "tokenizer")
    prepared = ("--tokenizer", step / "tokenizer", "--output-prefix", "mine", "--append-eod")
    option = ["--prepend-bos"] * begins
    done = zygote.run(
        "tools/preprocess_data.py", "--input", "my.jsonl", *prepared, *option, cwd=home
    )
    assert done.returncode == 0, done.stderr
    train(step / "config.yaml", "train.steps=1", "data.train=[mine_text_document]")
    done = convert(home, "to-hf", "--input", "imp/checkpoints", "--output", "exported")
    assert done.returncode == 0, done.stderr

    expected = [tokenizer.bos] * begins + tokenizer.tokenize("one two")
    assert PreTrainedTokenizerFast.from_pretrained("exported").encode("one two") == expected
    for model in (Path("imp/checkpoints"), Path("exported")):
        _, (prompt,) = generation.load(model, ["one two"], device=torch.device("cpu"))
        assert prompt.tolist() == expected
