"""A checkpoint's tokenizer is its own copy; another one has to give the same ids."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
import transformers

from megatron_coe.checkpoint.assets import hf_content, tokenizer_content, write_content
from megatron_coe.checkpoint.errors import BadCheckpointError
from megatron_coe.checkpoint.manifest import (
    digest_folder,
    read_manifest,
    unlisted,
    verify_files,
    write_manifest,
)
from megatron_coe.checkpoint.tokenizer import (
    find_tokenizer,
    identity_of,
    tokenizer_difference,
)
from megatron_coe.conversion.tokenizer import write_tokenizer
from megatron_coe.data.records import Fields
from megatron_coe.data.tokenizer import load_tokenizer, tokenizer_files, train_tokenizer
from megatron_coe.utils.run_files import COMMON_FILE, own_tokenizer

TEXTS = {
    "t.model": "one two three four five six seven\n",
    "other.model": "eins zwei drei vier fünf sechs sieben\n",
}


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """Two tokenizers of one size, and the first one's Hugging Face form."""
    home = tmp_path_factory.mktemp("home")
    for name, text in TEXTS.items():
        (home / "in.txt").write_text(text * 20)
        train_tokenizer([home / "in.txt"], home / name, fields=Fields(), vocab_size=285)
    (home / "hf").mkdir()
    write_tokenizer(home / "t.model", home / "hf")
    return home


@pytest.fixture
def step(home, tmp_path) -> Path:
    """The parts of a checkpoint that tell its tokenizer, as an earlier version wrote them."""
    step = tmp_path / "step_00000006"
    step.mkdir()
    identity = identity_of(load_tokenizer(home / "t.model"))
    torch.save({"tokenizer": identity}, step / COMMON_FILE)
    return step


@pytest.mark.parametrize("source", ["t.model", "hf"])
def test_the_copy_is_what_counts(home, step, source):
    write_content(step, tokenizer_content(home / source))
    own = own_tokenizer(step)
    assert own in (step / "tokenizer.model", step / "tokenizer")
    text = "two seven, eins"
    assert load_tokenizer(own).tokenize(text) == load_tokenizer(home / source).tokenize(text)
    assert find_tokenizer(step, "gone.model") == own
    assert find_tokenizer(step, str(home / "other.model")) == own
    assert find_tokenizer(step, "", home / "t.model") == own
    assert find_tokenizer(step, "", home / "hf") == own, "the same ids in another form"
    with pytest.raises(
        ValueError, match=r"other\.model .*is not the one that checkpoint .*has its"
    ):
        find_tokenizer(step, "", home / "other.model")


def test_without_a_copy_the_one_named_or_configured_is_taken(home, step):
    known = str(home / "t.model")
    assert find_tokenizer(step, known) == home / "t.model"
    assert find_tokenizer(step, "gone.model", home / "t.model") == home / "t.model"
    with pytest.raises(ValueError, match=r"gone\.model does not exist here: name it with --tok"):
        find_tokenizer(step, "gone.model")
    with pytest.raises(ValueError, match=r"tokenizer gone\.model does not exist"):
        find_tokenizer(step, known, Path("gone.model"))
    for configured, named in (("other.model", None), ("t.model", "other.model")):
        with pytest.raises(ValueError, match=r"other\.model .*is not the one that checkpoint"):
            find_tokenizer(step, str(home / configured), named and home / named)


def test_a_checkpoint_that_knows_of_no_tokenizer_takes_any(home, step):
    torch.save({}, step / COMMON_FILE)
    assert find_tokenizer(step, "") is None
    assert find_tokenizer(step, "", home / "other.model") == home / "other.model"
    write_content(step, tokenizer_content(home / "hf"))  # but for a copy, as an import has it
    assert tokenizer_difference(step, load_tokenizer(home / "t.model")) is None
    assert tokenizer_difference(step, load_tokenizer(home / "other.model"))


def test_the_manifest_covers_what_a_checkpoint_carries(home, step):
    (step / "hf").mkdir()
    (step / "hf" / "config.json").write_text('{"kept": 1}')
    templates = home / "with templates"
    shutil.copytree(home / "hf", templates)
    (templates / "additional_chat_templates").mkdir()
    (templates / "additional_chat_templates" / "tools.jinja").write_text("{{ messages }}")
    (templates / "model.safetensors").write_bytes(b"no part of a tokenizer")
    write_content(step, tokenizer_content(templates))
    write_manifest(step, 6, digest_folder(step))
    manifest = read_manifest(step)
    names = {
        "tokenizer/additional_chat_templates/tools.jinja",
        "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json",
        "hf/config.json",
    }
    assert names == manifest.files.keys() - {COMMON_FILE}
    verify_files(step, manifest)
    assert hf_content(step) == {"hf/config.json": b'{"kept": 1}'}

    for name in sorted(names):
        content = (step / name).read_bytes()
        (step / name).write_bytes(content[:-1] + b"#")
        with pytest.raises(BadCheckpointError, match=f"of {name} is not the one"):
            verify_files(step, manifest)
        (step / name).write_bytes(content)
    for name in ("tokenizer/added_tokens.json", "tokenizer.model", "hf/generation_config.json"):
        (step / name).write_text("{}")
        assert unlisted(step, manifest) == [name]
        with pytest.raises(BadCheckpointError, match=f"does not list {name}"):
            verify_files(step, manifest)
        (step / name).unlink()


@pytest.mark.parametrize(
    "name", ["other/tokenizer.json", "tokenizer/../../x", "/etc/passwd", ".", "", "tokenizer//x"]
)
def test_a_manifest_lists_no_file_elsewhere(step, name):
    write_manifest(step, 6, {name: digest_folder(step)[COMMON_FILE]})
    with pytest.raises(BadCheckpointError, match=r"manifest\.json is damaged"):
        read_manifest(step)


def test_the_files_of_every_tokenizer_of_transformers_are_copied(tmp_path):
    """Their names are read in its source."""
    sources = Path(transformers.__file__).parent.glob("models/*/tokenization_*.py")
    tables = (
        found[1]
        for source in sources
        for found in re.finditer(r"^VOCAB_FILES_NAMES = {([^}]*)}", source.read_text(), re.M)
    )
    names = {name for table in tables for name in re.findall(r':\s*"([^"]+)"', table)}
    assert len(names) > 15
    for name in names:
        (tmp_path / name).touch()
    assert {path.name for path in tokenizer_files(tmp_path)} == names
    for name in ("model.safetensors", "pytorch_model.bin", "train.bin", "text.jsonl", "a.py"):
        (tmp_path / name).touch()
    (tmp_path / "config.json").write_text("{}")
    assert {path.name for path in tokenizer_files(tmp_path)} == names | {"config.json"}
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    assert {path.name for path in tokenizer_files(tmp_path)} == names | {"tokenizer_config.json"}
