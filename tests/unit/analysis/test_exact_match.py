"""Replies to questions: as the model alone gives them, one token and one question at a time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_coe.analysis.exact_match import exact_match
from megatron_coe.cli.score import main
from megatron_coe.conversion.tokenizer import write_tokenizer
from megatron_coe.data.questions import Question, read_questions
from megatron_coe.data.records import Fields
from megatron_coe.data.tokenizer import train_tokenizer
from tests.unit.conversion import models

TEXT = "one two three\nfour five six\nseven eight nine ten\n"
TEMPLATE = (
    "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}assistant{% endif %}"
)
PROMPTS = ("one two", "one", "four five six seven", "ten nine", "seven")
NEW = 4


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    (folder / "texts.txt").write_text(TEXT * 20)
    train_tokenizer([folder / "texts.txt"], folder / "t.model", fields=Fields(), vocab_size=285)
    with pytest.MonkeyPatch.context() as patch:  # larger weights, or it says the same to all
        patch.setattr(models, "_spread", lambda name: 2.0 if "embed" in name else 0.48)
        models.write_random_model(folder / "hf", seed=11, vocab_size=300)
    write_tokenizer(folder / "t.model", folder / "hf")
    path = folder / "hf" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_position_embeddings": 64}))
    return folder / "hf"


def reply(folder: Path, ids: list[int]) -> str:
    """The oracle: the likeliest token of the whole sequence so far, again and again."""
    network = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer, asked = AutoTokenizer.from_pretrained(folder), len(ids)
    for _ in range(NEW):
        with torch.no_grad():
            ids = [*ids, int(network(torch.tensor([ids])).logits[0, -1].argmax())]
        if ids[-1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(ids[asked:], skip_special_tokens=True).strip()


def test_replies_are_the_models_and_the_true_ones_are_counted(model, tmp_path, capsys):
    tokenizer = AutoTokenizer.from_pretrained(model)
    replies = [reply(model, tokenizer.encode(f"query : {text} response :")) for text in PROMPTS]
    assert len({*replies}) == len(replies)
    path = tmp_path / "questions.jsonl"
    true = [replies[0], f"it is so #### {replies[1]}", "never", replies[3], f"{replies[4]} 1"]
    lines = [{"query": q, "response": r} for q, r in zip(PROMPTS, true, strict=True)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    score = exact_match(model, read_questions(path), NEW, torch.device("cpu"))
    assert score.replies == replies
    assert (score.right, score.exact_match) == (3, 0.6)

    limits = ["--max-new-tokens", str(NEW), "--device", "cpu"]
    arguments = ["--model", str(model), str(model), "--input", str(path), *limits]
    assert main([*arguments, "--json"]) == 0
    one = json.dumps({"exact_match": 0.6, "right": 3, "of": 5})
    assert capsys.readouterr().out == f"{one}\n{one}\n"
    assert main([*arguments, "--samples", "2", "--show", "1"]) == 0
    said = capsys.readouterr().out
    assert said.count(f"{model}: 2 of 2 right, exact match 1.000\n") == 2
    assert said.count(f"  answer:   {replies[0]}\n  true:     {replies[0]}\n") == 2


def test_chats_are_asked_by_the_template(model, tmp_path):
    chats = [[{"role": "user", "content": text}] for text in PROMPTS[:3]]
    questions = [Question(chat, "never") for chat in chats]
    with pytest.raises(ValueError, match="no chat template"):
        exact_match(model, questions, NEW, torch.device("cpu"))
    (model / "chat_template.jinja").write_text(TEMPLATE)
    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
        asked = [f"user {text} assistant" for text in PROMPTS[:3]]
        expected = [reply(model, tokenizer.encode(t, add_special_tokens=False)) for t in asked]
        assert exact_match(model, questions, NEW, torch.device("cpu")).replies == expected
    finally:
        (model / "chat_template.jinja").unlink()


def test_a_question_without_room_is_named(model):
    questions = [Question("one", "two"), Question("one two three " * 30, "four")]
    with pytest.raises(ValueError, match=r"question 2 has \d+ tokens.*embeddings=64"):
        exact_match(model, questions, NEW, torch.device("cpu"))
