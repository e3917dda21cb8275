"""tools/generate.py as a user runs it, on a small random model in both of its forms."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests import zygote
from tests.unit.conversion.models import write_random_model

ROOT = Path(__file__).parents[2]
POSITIONS = 4000


def environment(home: Path, temporary: Path) -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "1",
        "TMPDIR": str(temporary),
    }


@pytest.fixture
def generate(home: Path, tmp_path: Path):
    """Runs the command in `home`; nothing may be left in the folder of temporary files."""

    def run(*arguments: object, **how: bool) -> subprocess.CompletedProcess[str]:
        variables = environment(home, tmp_path)
        return zygote.run("tools/generate.py", *arguments, cwd=home, environment=variables, **how)

    yield run
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder `hf`, the same model in `checkpoints`, and questions."""
    from megatron_coe.conversion.import_hf import from_hf
    from megatron_coe.conversion.tokenizer import write_tokenizer
    from megatron_coe.data.records import Fields
    from megatron_coe.data.tokenizer import train_tokenizer

    home = tmp_path_factory.mktemp("home")
    weights = write_random_model(home / "hf", seed=1, vocab_size=300)
    weights["lm_head.weight"][:260] = 0  # bytes and special tokens are unlikely: text comes out
    save_file(weights, home / "hf" / "model.safetensors", metadata={"format": "pt"})
    (home / "texts.txt").write_text("query : one two three response : four five six\n" * 20)
    train_tokenizer([home / "texts.txt"], home / "t.model", fields=Fields(), vocab_size=290)
    special = write_tokenizer(home / "t.model", home / "hf")
    path = home / "hf" / "config.json"
    more = {**special, "max_position_embeddings": POSITIONS}
    path.write_text(json.dumps(json.loads(path.read_text()) | more))
    questions = [
        {"q": "one two", "a": "four"},
        {"q": "three", "a": "five\nsix"},
        {"q": "", "a": ""},
    ]
    (home / "qa.jsonl").write_text("".join(json.dumps(line) + "\n" for line in questions))
    from_hf(home / "hf", home / "checkpoints")
    return home


def expected(home: Path, prompt: str, count: int, folder: str = "hf") -> str:
    """The likeliest continuation, computed in this process."""
    from transformers import AutoTokenizer

    from megatron_coe.hf import CoeForCausalLM

    model = CoeForCausalLM.from_pretrained(home / folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(home / folder)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    whole = model.generate(ids, max_new_tokens=count, do_sample=False, use_cache=False)
    text = tokenizer.decode(whole[0], skip_special_tokens=True)
    return text.removeprefix(" ")  # that which SentencePiece sets before a text


@pytest.mark.parametrize("form", ["hf", "checkpoints"])
def test_the_likeliest_text_of_either_form(home: Path, generate, form: str) -> None:
    done = generate(
        *("--model", form, "--prompt", "one two", "--prompt", "six", "--max-new-tokens", 25),
        forked=form != "hf",
    )
    assert (done.returncode, done.stderr) == (0, "")
    texts = [expected(home, prompt, 25) for prompt in ("one two", "six")]
    assert done.stdout == "\n\n".join(texts) + "\n"
    assert len(set(texts)) == 2


def test_layers_that_predict_later_tokens_change_nothing(home: Path, generate) -> None:
    """From a checkpoint with them, which is exported without, and from folders with and without."""
    from megatron_coe.conversion.export_hf import to_hf
    from megatron_coe.conversion.import_hf import from_hf

    weights = write_random_model(home / "mtp", seed=3, vocab_size=300, mtp_num_layers=1)
    for name in ("lm_head.weight", "model.layers.2.shared_head.head.weight"):
        weights[name][:260] = 0  # as above
    save_file(weights, home / "mtp" / "model.safetensors", metadata={"format": "pt"})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(home / "hf" / name, home / "mtp")
    from_hf(home / "mtp", home / "mtp-checkpoints")
    to_hf(home / "mtp-checkpoints", home / "mtp-without", mtp=False)
    texts = set()
    for form in ("mtp", "mtp-without", "mtp-checkpoints"):
        done = generate("--model", form, "--prompt", "one two", "--max-new-tokens", 12)
        assert (done.returncode, done.stderr) == (0, "")
        texts.add(done.stdout)
    assert texts == {expected(home, "one two", 12, "mtp") + "\n"}


def test_questions_beside_the_true_answers(home: Path, generate) -> None:
    done = generate(
        *("--model", "hf", "--input", "qa.jsonl", "--qa-keys", "q", "a"),
        *("--samples", 2, "--max-new-tokens", 5),
    )
    assert (done.returncode, done.stderr) == (0, "")
    blocks = []
    for question, answer in (("one two", "four"), ("three", "five\nsix")):
        prompt = f"query : {question} response :"
        generated = expected(home, prompt, 5).removeprefix(prompt)
        blocks.append(f"question:  {question}\ngenerated:{generated}\ntrue:      {answer}\n")
    assert done.stdout == "\n".join(blocks)


def test_a_seed_makes_sampling_repeatable(home: Path, generate) -> None:
    texts = []
    for _ in range(2):
        done = generate(
            *("--model", "hf", "--prompt", "one", "--max-new-tokens", 30),
            *("--temperature", 1.5, "--top-k", 20, "--top-p", 0.99, "--seed", 1),
        )
        assert (done.returncode, done.stderr) == (0, "")
        texts.append(done.stdout)
    assert texts[0] == texts[1] != expected(home, "one", 30) + "\n"


@contextmanager
def piped(home: Path, tmp_path: Path) -> Iterator[tuple[zygote.Process, int]]:
    """The command while it writes into a pipe, and the pipe's other end."""
    files, temporary = tmp_path / "files", tmp_path / "temporary"
    files.mkdir()
    temporary.mkdir()
    os.mkfifo(files / "out0")
    process = zygote.shared().start(
        "tools/generate.py",
        ["--model", "hf", "--prompt", "one", "--max-new-tokens", POSITIONS],
        files,
        environment(home, temporary),
        cwd=home,
    )
    try:
        yield process, os.open(files / "out0", os.O_RDONLY)
    finally:
        process.end()


def test_text_comes_while_more_is_made_and_ctrl_c_ends_it(home: Path, tmp_path: Path) -> None:
    with piped(home, tmp_path) as (process, out):
        pieces = [os.read(out, 1 << 16) for _ in range(6)]
        assert process.send(signal.SIGINT)
        rest = b"".join(iter(lambda: os.read(out, 1 << 16), b""))
        assert (process.wait(120), process.complained()) == (130, "interrupted\n")
    assert all(pieces)
    assert b"".join(pieces).startswith(b"one")
    assert not rest.endswith(b"\n")  # which follows the last token


def test_ctrl_c_leaves_no_temporary_folder(home: Path, tmp_path: Path) -> None:
    files, temporary = tmp_path / "files", tmp_path / "temporary"
    files.mkdir()
    temporary.mkdir()
    process = zygote.shared().start(
        "tools/generate.py",
        ["--model", "checkpoints", "--prompt", "one", "--max-new-tokens", POSITIONS],
        files,
        environment(home, temporary),
        cwd=home,
    )
    while not list(temporary.glob("megatron_coe-*/description/tokenizer.json")):
        assert process.poll() is None
        time.sleep(0.005)
    assert process.send(signal.SIGINT)
    assert (process.wait(120), process.complained()) == (130, "interrupted\n")
    assert list(temporary.iterdir()) == []


def test_a_reader_that_has_enough_is_no_error(home: Path, tmp_path: Path) -> None:
    with piped(home, tmp_path) as (process, out):
        assert os.read(out, 10)
        os.close(out)
        assert (process.wait(120), process.complained()) == (141, "")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--model", "nowhere", "--prompt", "one"), "nowhere does not exist"),
        (
            ("--model", "checkpoints", "--prompt", "one " * POSITIONS),
            "max_position_embeddings=4000",
        ),
        (("--model", "hf", "--input", "qa.jsonl"), "qa.jsonl:1: no key 'text'"),
        (("--model", "hf", "--prompt", "one", "--samples", 1), "belong to --input"),
    ],
    ids=["no folder", "too long", "no key", "no input"],
)
def test_a_mistake_is_one_line(generate, arguments: tuple, told: str) -> None:
    done = generate(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert told in done.stderr


def test_a_checkpoint_that_lacks_a_tokenizer_is_told(home: Path, generate) -> None:
    from megatron_coe.conversion.import_hf import from_hf

    bare = home / "bare"
    bare.mkdir()
    config = json.loads((home / "hf" / "config.json").read_text())
    (bare / "config.json").write_text(json.dumps(config))
    save_file(load_file(home / "hf" / "model.safetensors"), bare / "model.safetensors")
    from_hf(bare, home / "bare-checkpoints")
    step = "bare-checkpoints/step_00000000"
    done = generate("--model", step, "--prompt", "one")
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {step} has no tokenizer")
