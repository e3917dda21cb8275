"""Streaming, sampling and the checks before generation, on small Hugging Face folders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, set_seed

from megatron_coe import generation
from megatron_coe.conversion.tokenizer import write_tokenizer
from megatron_coe.data.records import Fields, question_prompt
from megatron_coe.data.tokenizer import load_tokenizer, train_tokenizer
from megatron_coe.generation import Sampling
from tests.unit.hf.small import small_model

CPU = torch.device("cpu")
TEXT = "  one two\n    three: é 🙂👩‍👩‍👧 ﬁ\n\n four\t你好"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 60 positions with a tokenizer; its own generation settings would sample."""
    home = tmp_path_factory.mktemp("generation")
    (home / "texts.txt").write_text("query : one two three response : four five six\n" * 20)
    train_tokenizer([home / "texts.txt"], home / "t.model", fields=Fields(), vocab_size=290)
    model = small_model(vocab_size=300, max_position_embeddings=60)
    model.generation_config.update(do_sample=True, temperature=5.0, top_k=7, eos_token_id=[2])
    with torch.no_grad():  # bytes and special tokens are unlikely: text comes out
        model.lm_head.weight[:260] = 0
    model.save_pretrained(home / "hf")
    write_tokenizer(home / "t.model", home / "hf")
    return home / "hf"


@pytest.fixture(scope="module")
def loaded(folder: Path) -> tuple[generation.TextGenerator, torch.Tensor]:
    generator, (ids,) = generation.load(folder, ["one two"], device=CPU)
    return generator, ids


def continued(loaded: tuple, sampling: Sampling) -> list[str]:
    pieces: list[str] = []
    generator, ids = loaded
    generator.stream(ids, sampling, pieces.append)
    return pieces


def greedy(loaded: tuple, count: int) -> list[int]:
    """The likeliest continuation, by its definition."""
    generator, ids = loaded
    ids = ids.tolist()
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(generator.model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids


# --- text out of tokens ---------------------------------------------------------------------------


def streamed(tokenizer, prompt: list[int], new: list[int]) -> list[str]:
    pieces: list[str] = []
    streamer = generation._TextStreamer(tokenizer, pieces.append)
    streamer.put(torch.tensor([prompt]))
    for token in new:
        streamer.put(torch.tensor([token]))
    streamer.end()
    return pieces


@pytest.mark.parametrize("cut", range(1, 12))
def test_pieces_are_the_text_and_none_ends_in_half_a_character(folder, cut):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.encode(TEXT)
    shown = tokenizer.decode(ids[:cut])
    pieces = streamed(tokenizer, ids[:cut], ids[cut:])
    assert shown + "".join(pieces) == f" {TEXT}"  # decoding keeps the space before a text
    assert len(pieces) > 10
    assert not any(piece.endswith("�") for piece in pieces)


def test_pieces_of_tokens_without_sense_are_their_text_too(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    generator = torch.Generator().manual_seed(3)
    words = [token for token in range(4, 290) if not 130 < token < 260]  # no lone high bytes
    for _ in range(50):
        choice = torch.randint(len(words), (40,), generator=generator)
        ids = [words[number] for number in choice]
        told = tokenizer.decode(ids[:3]) + "".join(streamed(tokenizer, ids[:3], ids[3:]))
        assert told == tokenizer.decode(ids)


def test_a_character_that_is_never_finished_is_told_at_the_end(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    half = tokenizer.encode("é")[:-1]
    assert "".join(streamed(tokenizer, tokenizer.encode("one"), half)) == " �"


@pytest.mark.parametrize("answer", ["four five", "42", "$\\frac{1}{2}$", "é", " x", "#### 7"])
def test_a_question_is_put_as_in_training(folder, answer):
    tokenizer = load_tokenizer(folder.parent / "t.model")
    fields = Fields(("q", "a"), question_answer=True)
    (text,) = fields.texts(json.dumps({"q": "one + 2?", "a": answer}).encode())
    prompt = question_prompt("one + 2?")
    assert text == f"{prompt} {answer}"
    ids = tokenizer.tokenize(prompt)
    assert tokenizer.tokenize(text)[: len(ids)] == ids
    assert AutoTokenizer.from_pretrained(folder).encode(prompt) == ids


# --- the choice of tokens -------------------------------------------------------------------------


def test_the_likeliest_unless_asked_otherwise(loaded):
    generator, ids = loaded
    expected = generator.tokenizer.decode(greedy(loaded, 20))
    for sampling in (
        Sampling(20),
        Sampling(20, temperature=0.0, top_p=0.9),
        Sampling(20, top_k=1),
        Sampling(20, top_p=1e-6),
        Sampling(20, temperature=1e-6),
    ):
        set_seed(5)
        told = generator.tokenizer.decode(ids) + "".join(continued(loaded, sampling))
        assert told == expected, sampling


def test_chosen_among_the_likeliest_by_seed(loaded):
    generator, ids = loaded
    texts = []
    for seed in (1, 1, 2):
        set_seed(seed)
        texts.append("".join(continued(loaded, Sampling(30, temperature=3.0))))
    assert texts[0] == texts[1] != texts[2]
    kept: list[torch.Tensor] = []
    hook = generator.model.lm_head.register_forward_hook(lambda *a: kept.append(a[-1][0, -1]))
    chosen: list[int] = []
    put = generation._TextStreamer.put
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            generation._TextStreamer,
            "put",
            lambda s, v: (chosen.extend(v.flatten().tolist()), put(s, v)),
        )
        continued(loaded, Sampling(30, temperature=3.0, top_k=2))
    hook.remove()
    ranks = [
        logits.argsort(descending=True).tolist().index(token)
        for logits, token in zip(kept, chosen[len(ids) :], strict=True)
    ]
    assert set(ranks) == {0, 1}


def test_ends_at_the_end_token_and_at_the_last_position(loaded, monkeypatch):
    generator, ids = loaded
    expected = greedy(loaded, 60 - len(ids))
    everything = generator.tokenizer.decode(ids) + "".join(continued(loaded, Sampling(10**9)))
    assert everything == generator.tokenizer.decode(expected)
    new = expected[len(ids) :]
    last = next(n for n, token in enumerate(new) if n > 3 and token not in new[:n])
    monkeypatch.setattr(generator.model.generation_config, "eos_token_id", [new[last]])
    told = generator.tokenizer.decode(ids) + "".join(continued(loaded, Sampling(50)))
    assert told == generator.tokenizer.decode(expected[: len(ids) + last + 1])


@pytest.mark.parametrize(
    "fields",
    [
        {"max_new_tokens": 0},
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_k": 0},
        {"top_p": 0.0},
        {"top_p": 1.5},
    ],
)
def test_a_wrong_setting_is_named(fields):
    with pytest.raises(ValueError, match=f"{next(iter(fields))}="):
        Sampling(**fields)


# --- what is refused ------------------------------------------------------------------------------


def test_the_stored_type_or_another(folder):
    for dtype, expected in ((None, torch.float32), (torch.bfloat16, torch.bfloat16)):
        generator, _ = generation.load(folder, [], dtype=dtype, device=CPU)
        assert generator.model.dtype == expected
        assert not generator.model.training


@pytest.mark.parametrize(
    ("prompts", "told"),
    [
        (["one", ""], "prompt 2 is empty"),
        (["one " * 100], r"prompt 1 has \d+ tokens: with max_position_embeddings=60"),
    ],
)
def test_a_prompt_is_refused_before_weights_are_read(folder, tmp_path, prompts, told):
    copy = shutil.copytree(folder, tmp_path / "hf")
    (copy / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=told):
        generation.load(copy, prompts, device=CPU)


def without_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


def without_a_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.experts.3.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def cut_off(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])


def of_another_family(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "nobody_knows"}))


def with_a_small_vocabulary(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vocab_size": 100}))


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (without_tokenizer, "has no tokenizer"),
        (without_a_weight, "1 missing weights, such as model.layers.1.mlp.experts.3.up_proj"),
        (cut_off, "cannot be loaded"),
        (of_another_family, "trust_remote_code"),
        (with_a_small_vocabulary, "vocab_size=100: the tokenizer is of another model"),
        (shutil.rmtree, "does not exist"),
        (lambda folder: (folder / "config.json").unlink(), "is no model"),
    ],
)
def test_a_damaged_folder_is_told_in_one_line(folder, tmp_path, damage, told):
    copy = shutil.copytree(folder, tmp_path / "hf")
    damage(copy)
    with pytest.raises(ValueError) as raised:
        generation.load(copy, ["one"], device=CPU)
    message = str(raised.value)
    assert told in message
    assert str(copy) in message
    assert "\n" not in message


def test_devices():
    assert generation.choose_device("cpu") == CPU
    assert generation.choose_device("auto").type in ("cpu", "cuda")
    with pytest.raises(ValueError, match="device=nonsense cannot be used"):
        generation.choose_device("nonsense")
