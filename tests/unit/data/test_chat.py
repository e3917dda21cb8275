"""Which tokens of a conversation are answers, against transformers' own mask."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset
from transformers import AutoTokenizer

from megatron_coe.conversion.tokenizer import write_tokenizer
from megatron_coe.data.chat import ChatFields, encode_messages
from megatron_coe.data.datasets import build_datasets, truncation
from megatron_coe.data.indexed import identify, inspect
from megatron_coe.data.preprocess import preprocess
from megatron_coe.data.tokenizer import SentencePieceTokenizer, load_tokenizer
from tests.unit.data.texts import random_texts, write_jsonl

TAGGED = (
    "{{ bos_token }}{% for m in messages %}{{ '\\n' + m.role + ': ' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content + eos_token }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\nassistant: ' }}{% endif %}"
)
PLAIN = TAGGED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
REWRITING = (
    "{% for m in messages %}{{ m.role + ': ' }}"
    "{{ m.content if loop.last else m.content[:3] }}{% endfor %}"
)


@pytest.fixture(scope="module")
def folder(tokenizer: SentencePieceTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    write_tokenizer(tokenizer.path, folder)
    (folder / "chat_template.jinja").write_text(PLAIN)
    return folder


def conversations(count: int) -> list[list[dict[str, str]]]:
    """Of one to three turns, some with a system message, of texts that were not trained on."""
    texts = iter(random_texts(8 * count, 77))
    random = np.random.default_rng(5)
    made = []
    for _ in range(count):
        messages = [{"role": "system", "content": next(texts)}] if random.random() < 0.5 else []
        for _ in range(random.integers(1, 4)):
            messages.append({"role": "user", "content": next(texts)})
            messages.append({"role": "assistant", "content": next(texts)})
        made.append(messages)
    return made


def test_answers_are_those_that_transformers_marks(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for messages in conversations(60):
        tokenizer.chat_template = TAGGED
        expected = tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        want = (expected["input_ids"], expected["assistant_masks"])
        assert sum(want[1]) > 0
        assert encode_messages(tokenizer, messages) == want
        tokenizer.chat_template = PLAIN
        ids, answers = encode_messages(tokenizer, messages)
        assert ids == tokenizer.apply_chat_template(messages, tokenize=True)["input_ids"]
        assert (ids, answers) == want


def test_conversations_become_tokens_and_their_answers(tmp_path: Path, folder: Path) -> None:
    chats = conversations(700)  # more than a chunk
    path = write_jsonl(tmp_path / "in.jsonl", [{"messages": chat} for chat in chats])
    fields = ChatFields(("messages",))
    written = []
    for workers in (1, 2):
        prefix = tmp_path / f"out{workers}"
        summary = preprocess([path], prefix, folder, fields=fields, workers=workers, quiet=True)
        written.append([Path(f"{prefix}{end}").read_bytes() for end in (".bin", "_answers.bin")])
    assert written[0] == written[1]
    tokens, answers = (IndexedDataset(f"{prefix}{end}") for end in ("", "_answers"))
    tokenizer = load_tokenizer(folder).tokenizer
    for number, chat in enumerate(chats):
        ids, marks = encode_messages(tokenizer, chat)
        assert (tokens[number].tolist(), answers[number].tolist()) == (ids, marks)
    assert summary.answers == sum(int(answers[n].sum()) for n in range(len(chats)))


def test_responses_follow_the_very_ids_of_their_prompts(
    tmp_path: Path, tokenizer: SentencePieceTokenizer
) -> None:
    pairs = list(zip(*[iter(random_texts(40, 3))] * 2, strict=True))
    path = write_jsonl(tmp_path / "in.jsonl", [{"q": q, "a": a} for q, a in pairs])
    fields = ChatFields(("q", "a"))
    preprocess([path], tmp_path / "out", tokenizer.path, fields=fields, quiet=True)
    tokens, answers = (IndexedDataset(str(tmp_path / f"out{end}")) for end in ("", "_answers"))
    for number, (prompt, response) in enumerate(pairs):
        asked, said = tokenizer.tokenize(prompt), [*tokenizer.tokenize(response), tokenizer.eod]
        assert tokens[number].tolist() == asked + said
        assert answers[number].tolist() == [0] * len(asked) + [1] * len(said)


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ('{"messages": "hello"}', "no list of messages under 'messages'"),
        ('{"messages": [{"role": "user"}]}', "message 0 of 'messages' has no text 'content'"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "nothing to learn"),
        ("[1]", "no list of messages"),
        ("{", "not JSON"),
    ],
)
def test_a_record_without_an_answer_is_named(
    tmp_path: Path, folder: Path, record: str, reason: str
) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text(record + "\n")
    with pytest.raises(ValueError, match=rf"in.jsonl:1: .*{reason}"):
        preprocess([path], tmp_path / "out", folder, fields=ChatFields(), quiet=True)
    assert sorted(tmp_path.iterdir()) == [path]


def test_a_template_that_rewrites_answers_is_refused(folder: Path) -> None:
    from megatron_coe.data.records import RecordError

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = REWRITING
    twice = 2 * [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two three"}]
    with pytest.raises(RecordError, match=r"message 1 otherwise .* generation"):
        encode_messages(tokenizer, twice)


def test_a_tokenizer_without_a_template_is_refused(
    tmp_path: Path, tokenizer: SentencePieceTokenizer
) -> None:
    path = write_jsonl(tmp_path / "in.jsonl", [{"messages": chat} for chat in conversations(1)])
    with pytest.raises(ValueError, match=r"t.model has no chat template"):
        preprocess([path], tmp_path / "out", tokenizer.path, fields=ChatFields(), quiet=True)


def test_only_answers_are_targets(tmp_path: Path, folder: Path) -> None:
    chats = conversations(50)
    path = write_jsonl(tmp_path / "in.jsonl", [{"messages": chat} for chat in chats])
    preprocess([path], tmp_path / "out", folder, fields=ChatFields(), quiet=True)
    prefix, tokenizer = str(tmp_path / "out"), load_tokenizer(folder)
    marked = [encode_messages(tokenizer.tokenizer, chat) for chat in chats]
    S = sorted(len(ids) for ids, _ in marked)[40]
    options = {"tokenizer": tokenizer, "seq_length": S, "seed": 3, "train": [prefix]}
    _, valid = build_datasets(valid=[prefix], mode="padded", num_samples=(9, None), **options)
    for (ids, answers), item in zip(marked, valid, strict=True):
        targets = [i for a, i in zip(answers[1:S], ids[1:S], strict=True) if a]
        assert item["labels"][item["loss_mask"] > 0].tolist() == targets

    long = [answers for ids, answers in marked if len(ids) > S]
    lost = sum(sum(answers[S:]) for answers in long)
    mute = sum(not any(answers[1:S]) for answers in long)
    said = truncation([inspect(prefix)], S)
    assert said is not None and said.startswith(f"{len(long)} of 50 documents are longer than")
    assert f"{lost:,} tokens of answers" in said and f"{mute} documents have none left" in said
    assert truncation([inspect(prefix)], max(len(ids) for ids, _ in marked)) is None

    with pytest.raises(ValueError, match="out has its answers marked"):
        build_datasets(valid=[], mode="packed", num_samples=(9, None), **options)
    before = identify(inspect(prefix))
    flipped = 1 - np.fromfile(f"{prefix}_answers.bin", dtype=np.uint8)
    flipped.tofile(f"{prefix}_answers.bin")
    assert identify(inspect(prefix)) != before
    preprocess([path], tmp_path / "other", folder, fields=ChatFields(), quiet=True)
    for end in (".idx", ".bin"):
        Path(f"{prefix}_answers{end}").write_bytes(b"")
    with pytest.raises(ValueError, match=r"out_answers.idx"):
        inspect(prefix)


@pytest.mark.parametrize("multiple", [1, 4])
def test_packs_hold_whole_documents_and_where_they_begin(
    tmp_path: Path, folder: Path, multiple: int
) -> None:
    chats = conversations(60)
    path = write_jsonl(tmp_path / "in.jsonl", [{"messages": chat} for chat in chats])
    preprocess([path], tmp_path / "out", folder, fields=ChatFields(), quiet=True)
    prefix, tokenizer = str(tmp_path / "out"), load_tokenizer(folder)
    marked = [encode_messages(tokenizer.tokenizer, chat) for chat in chats]
    S = -(-max(len(ids) for ids, _ in marked) // 4) * 4
    options = {
        "tokenizer": tokenizer, "seq_length": S, "train": [prefix], "valid": [prefix],
        "mode": "packed_documents", "pad_seq_to_mult": multiple,
    }  # fmt: skip
    train, valid = build_datasets(num_samples=(200, None), seed=1, **options)
    expected = sorted((ids, [*answers[1:], 0]) for ids, answers in marked)
    per_epoch = len(valid)
    epochs = [valid, [train[n] for n in range(per_epoch)]]
    epochs.append([train[n] for n in range(per_epoch, 2 * per_epoch)])
    for epoch in epochs:
        found = []
        for item in epoch:
            offsets = sorted(set(item["cu_seqlens"].tolist()))
            assert (offsets[0], offsets[-1]) == (0, S)
            assert all(offset % multiple == 0 for offset in offsets)
            for start, end in itertools.pairwise(offsets):
                assert item["position_ids"][start:end].tolist() == list(range(end - start))
                part = {name: item[name][start:end].tolist() for name in ("tokens", "loss_mask")}
                if any(part["loss_mask"]):
                    found.append((part["tokens"], [int(mask) for mask in part["loss_mask"]]))
        pad = tokenizer.pad
        stripped = []
        for ids, mask in found:
            count = max(n for n, token in enumerate(ids) if token != pad) + 1
            stripped.append((ids[:count], mask[:count]))
        assert sorted(stripped) == expected
    orders = [[item["tokens"].tolist() for item in epoch] for epoch in epochs]
    assert orders[0] != orders[1] != orders[2]
    longer, _ = build_datasets(num_samples=(400, None), seed=1, **options)
    assert all((longer[n]["tokens"] == train[n]["tokens"]).all() for n in range(200))


def test_preprocessing_texts_again_forgets_the_answers(tmp_path: Path, folder: Path) -> None:
    from megatron_coe.data.records import Fields

    chats = conversations(5)
    records = [{"messages": chat, "query": "1", "response": "2"} for chat in chats]
    path = write_jsonl(tmp_path / "in.jsonl", records)
    preprocess([path], tmp_path / "out", folder, fields=ChatFields(), quiet=True)
    assert inspect(str(tmp_path / "out")).answers is not None
    fields = Fields(("query", "response"), question_answer=True)
    preprocess([path], tmp_path / "out", folder, fields=fields, quiet=True)
    assert inspect(str(tmp_path / "out")).answers is None
