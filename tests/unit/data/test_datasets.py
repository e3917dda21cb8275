from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
from megatron.core.datasets.utils import Split
from torch.utils.data import Dataset

from megatron_coe.data.datasets import (
    VALIDATION_SEED,
    build_dataset_sets,
    build_datasets,
    describe_split,
    samples_per_epoch,
)
from megatron_coe.data.indexed import data_summary, inspect
from megatron_coe.data.tokenizer import SentencePieceTokenizer, load_tokenizer
from tests.distributed.launch import launch
from tests.unit.data.texts import random_texts

MakeData = Callable[..., str]
S = 16


def build(
    tokenizer: SentencePieceTokenizer,
    train: Sequence[str | tuple[str, float]],
    valid: Sequence[str] = (),
    **changes: object,
) -> tuple[Dataset, Dataset | None]:
    options = {"seq_length": S, "mode": "padded", "num_samples": (50, None), "seed": 7}
    return build_datasets(train=train, valid=valid, tokenizer=tokenizer, **(options | changes))


def padded(ids: list[int], length: int) -> list[int]:
    return ids + [3] * (length - len(ids))


def loss_terms(item: dict[str, torch.Tensor]) -> list[tuple[int, int]]:
    """(input, target) of every position that counts."""
    rows = zip(item["tokens"], item["labels"], item["loss_mask"], strict=True)
    return [(int(token), int(label)) for token, label, counts in rows if counts]


@pytest.mark.parametrize("split", [False, True])
def test_examples_are_documents_cut_padded_and_masked(
    make_data: MakeData, tokenizer: SentencePieceTokenizer, split: bool
) -> None:
    # Around the cut: 1, S - 1, S, S + 1 and many tokens ("12" is a space and two digits).
    texts = ["x", "1" * (S - 2), "1" * (S - 1), "1" * S, "1" * 60, *random_texts(40, 1)]
    prefix = make_data("a", texts, split_sentences=split)
    _, valid = build(tokenizer, [prefix], [prefix])
    assert len(valid) == len(texts)
    lengths = set()
    for text, item in zip(texts, valid, strict=True):
        # Each of these texts is one sentence.
        ids = tokenizer.tokenize(text.strip() if split else text)
        lengths.add(len(ids))
        kept = ids[:S]
        terms = min(len(ids), S) - 1
        assert list(item) == ["tokens", "labels", "loss_mask", "position_ids"]
        assert item["tokens"].tolist() == padded(kept, S)
        assert item["labels"].tolist() == padded(kept[1:], S)
        assert item["loss_mask"].tolist() == [1.0] * terms + [0.0] * (S - terms)
        assert item["position_ids"].tolist() == list(range(S))
        assert loss_terms(item) == list(itertools.pairwise(kept))
        dtypes = [value.dtype for value in item.values()]
        assert dtypes == [torch.int64, torch.int64, torch.float32, torch.int64]
    assert lengths >= {S - 1, S, S + 1}


def test_examples_join_the_sentences_of_a_document(
    make_data: MakeData, tokenizer: SentencePieceTokenizer
) -> None:
    sentences = ["One apple.", "Two pears.", "Ten minus three."]
    prefix = make_data("a", [" ".join(sentences), "One."], split_sentences=True)
    ids = [token for sentence in sentences for token in tokenizer.tokenize(sentence)]
    for seq_length in (4, len(ids) - 1, len(ids) + 5):
        _, valid = build(tokenizer, [prefix], [prefix], seq_length=seq_length)
        assert len(valid) == 2
        assert valid[0]["tokens"].tolist() == padded(ids[:seq_length], seq_length)
    with pytest.raises(ValueError, match="has its sentences split"):
        build(tokenizer, [prefix], mode="packed")


def test_padding_follows_the_position_not_the_token(
    make_data: MakeData, tokenizer: SentencePieceTokenizer
) -> None:
    prefix = make_data("a", ["one two"])
    for pad, filler in ((-1, 0), (tokenizer.tokenize("one two")[0],) * 2):
        other = load_tokenizer(tokenizer.path)
        other.pad = pad
        _, valid = build(other, [prefix], [prefix])
        ids = tokenizer.tokenize("one two")
        assert valid[0]["tokens"].tolist() == ids + [filler] * (S - len(ids))
        assert valid[0]["loss_mask"].sum() == len(ids) - 1


def order(dataset: Dataset, tokenizer: SentencePieceTokenizer) -> list[str]:
    """The texts of a dataset of short documents."""
    return [tokenizer.detokenize(dataset[n]["tokens"].tolist()) for n in range(len(dataset))]


def test_training_order_is_a_fresh_permutation_per_epoch(
    make_data: MakeData, tokenizer: SentencePieceTokenizer
) -> None:
    texts = [f"{number}" for number in range(100, 120)]
    prefix = make_data("a", texts)
    read, valid = build(tokenizer, [prefix], [prefix], num_samples=(50, None))
    first = order(read, tokenizer)
    assert len(first) == 50
    assert sorted(first[:20]) == sorted(first[20:40]) == texts
    assert first[:20] != texts
    assert first[:20] != first[20:40]
    assert len(set(first[40:])) == 10
    # The same seed gives the same order, and more samples only go on from it.
    longer, _ = build(tokenizer, [prefix], num_samples=(75, None))
    assert order(longer, tokenizer)[:50] == first
    other, other_valid = build(tokenizer, [prefix], [prefix], seed=8)
    assert order(other, tokenizer) != first
    # Validation: the documents in their order, whatever the seed.
    assert order(valid, tokenizer) == order(other_valid, tokenizer) == texts
    _, part = build(tokenizer, [prefix], [prefix], num_samples=(50, 7))
    assert order(part, tokenizer) == texts[:7]
    _, capped = build(tokenizer, [prefix], [prefix], num_samples=(50, 700))
    assert order(capped, tokenizer) == texts


def packed_by_hand(documents: list[list[int]], epochs: int, seed: int) -> list[list[int]]:
    """All samples of S + 1 tokens of a stream of shuffled documents, in shuffled order."""
    rng = np.random.RandomState(seed)
    numbers = list(range(len(documents))) * epochs
    rng.shuffle(numbers)
    stream = [token for number in numbers for token in documents[number]]
    samples = [stream[at : at + S + 1] for at in range(0, len(stream) - S, S)]
    places = list(range(len(samples)))
    rng.shuffle(places)
    return [samples[place] for place in places]


def test_packed_samples_equal_a_plain_recomputation(
    make_data: MakeData, tokenizer: SentencePieceTokenizer
) -> None:
    texts = random_texts(80, 4)
    prefix = make_data("a", texts, append_eod=True)
    documents = [[*tokenizer.tokenize(text), tokenizer.eod] for text in texts]
    tokens = sum(map(len, documents))
    wanted = 2 * (tokens // S) - 1  # nearly all of a second epoch: shuffled as one
    read, valid = build(tokenizer, [prefix], [prefix], mode="packed", num_samples=(wanted, None))
    for dataset, epochs, seed in ((read, 2, 7), (valid, 1, VALIDATION_SEED)):
        expected = packed_by_hand(documents, epochs, seed)
        assert len(dataset) == len(expected)
        for item, sample in zip((dataset[n] for n in range(len(dataset))), expected, strict=True):
            assert list(item) == ["tokens", "labels", "loss_mask", "position_ids"]
            assert item["tokens"].tolist() == sample[:-1]
            assert item["labels"].tolist() == sample[1:]
            assert item["loss_mask"].tolist() == [1.0] * S
            assert item["position_ids"].tolist() == list(range(S))


def write_sequences(
    prefix: Path, documents: list[list[list[int]]], modes: bool = False, keep_empty: bool = False
) -> str:
    """Megatron's own writer: each document's sequences, with a mode each; `keep_empty` writes one
    of length 0 where a document has none."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", np.uint16, multimodal=modes)
    for document in documents:
        sequences = document or [[]] * keep_empty
        ids = [token for sequence in sequences for token in sequence]
        lengths = [len(sequence) for sequence in sequences]
        builder.add_document(ids, lengths, [1] * len(lengths) if modes else None)
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def megatrons_samples(
    prefix: str, samples: int, tokenizer: SentencePieceTokenizer, folder: Path
) -> list[dict[str, list]]:
    """What Megatron's own data set gives of a file, without anything of this package's."""
    config = GPTDatasetConfig(
        random_seed=7,
        sequence_length=S,
        blend=([prefix], None),
        split="1,0,0",
        path_to_cache=str(folder),
        tokenizer=tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    stored = IndexedDataset(prefix)
    indices = np.arange(len(stored), dtype=np.int32)
    return as_lists(GPTDataset(stored, prefix, indices, samples, Split.train, config))


def as_lists(dataset: Dataset) -> list[dict[str, list]]:
    items = (dataset[number] for number in range(len(dataset)))
    return [{key: value.tolist() for key, value in item.items()} for item in items]


# Empty ones at both ends, beside one another and alone.
EMPTY_AT = (0, 3, 4, 9, 40)


@pytest.mark.parametrize("modes", [False, True], ids=["", "modes"])
@pytest.mark.parametrize("keep_empty", [False, True], ids=["no sequence", "length 0"])
def test_empty_documents(
    tmp_path: Path, tokenizer: SentencePieceTokenizer, keep_empty: bool, modes: bool
) -> None:
    texts = random_texts(36, 12)
    documents = [[tokenizer.tokenize(text)] for text in texts]
    with_empty = list(documents)
    for place in EMPTY_AT:
        with_empty.insert(place, [])
    whole = write_sequences(tmp_path / "whole", documents)
    empty = write_sequences(tmp_path / "empty", with_empty, modes, keep_empty)
    assert Path(f"{whole}.bin").read_bytes() == Path(f"{empty}.bin").read_bytes()
    file = inspect(empty)
    assert (file.documents, file.empty, file.tokens) == (36, 5, inspect(whole).tokens)
    assert data_summary([empty]).startswith(f"{empty}: 36 documents and 5 empty ones, left out, ")

    read, valid = build(tokenizer, [empty], [empty], mode="packed", num_samples=(90, None))
    assert as_lists(read) == megatrons_samples(empty, 90, tokenizer, tmp_path / "theirs")
    if not keep_empty:  # the same sequences, and so the same order as without empty documents
        assert as_lists(read) == megatrons_samples(whole, 90, tokenizer, tmp_path / "theirs")
    _, expected = build(tokenizer, [whole], [whole], mode="packed")
    assert sum(len(item["tokens"]) for item in as_lists(valid)) == len(expected) * S

    for prefixes in ([empty], [empty, whole]):
        ours = build(tokenizer, prefixes, prefixes, num_samples=(80, None))
        theirs = build(
            tokenizer, [whole] * len(prefixes), [whole] * len(prefixes), num_samples=(80, None)
        )
        for one, other in zip(ours, theirs, strict=True):
            assert as_lists(one) == as_lists(other)


def test_empty_documents_do_not_hide_split_sentences(
    tmp_path: Path, tokenizer: SentencePieceTokenizer
) -> None:
    """As many sequences as documents, but not one of each."""
    split = write_sequences(tmp_path / "a", [[[5], [6, 7]], [], [[8, 9]]])
    assert inspect(split).sequences == 3
    with pytest.raises(ValueError, match="has its sentences split"):
        build(tokenizer, [split], mode="packed")
    _, valid = build(tokenizer, [split], [split])
    assert [item["tokens"][:3] for item in as_lists(valid)] == [[5, 6, 7], [8, 9, 3]]


def test_rewritten_data_is_indexed_again(
    tmp_path: Path, make_data: MakeData, tokenizer: SentencePieceTokenizer
) -> None:
    for seed in (5, 6):
        prefix = make_data("a", random_texts(30, seed))
        documents = [tokenizer.tokenize(text) for text in random_texts(30, seed)]
        _, valid = build(tokenizer, [prefix], [prefix], mode="packed", cache_dir=tmp_path / "cache")
        samples = [item["tokens"].tolist() for item in (valid[n] for n in range(len(valid)))]
        assert samples == [s[:-1] for s in packed_by_hand(documents, 1, VALIDATION_SEED)]


def test_index_files_stay_in_one_folder(
    tmp_path: Path, make_data: MakeData, tokenizer: SentencePieceTokenizer
) -> None:
    a, b = make_data("a", random_texts(30, 5)), make_data("b", random_texts(30, 6))
    before = sorted(tmp_path.iterdir())
    build(tokenizer, [a, b], [a, b], mode="padded")
    assert sorted(tmp_path.iterdir()) == before
    build(tokenizer, [a, b], [a, b], mode="packed", cache_dir=tmp_path / "elsewhere" / "cache")
    assert sorted(tmp_path.iterdir()) == sorted([*before, tmp_path / "elsewhere"])
    build(tokenizer, [a, b], [a, b], mode="packed")
    assert (tmp_path / "index_cache").is_dir()


def sources(dataset: Dataset, tokenizer: SentencePieceTokenizer) -> Counter[str]:
    """How many samples begin with each set's letter."""
    return Counter(text[0] for text in order(dataset, tokenizer))


@pytest.mark.parametrize(
    ("weights", "samples"), [((1, 1), 40), ((3, 1), 400), ((8, 1, 0.5, 0.5), 1), ((5, 2), 1)]
)
def test_blend_follows_the_weights(
    make_data: MakeData,
    tokenizer: SentencePieceTokenizer,
    weights: tuple[float, ...],
    samples: int,
) -> None:
    sizes = (10, 50, 7, 2)
    prefixes = [
        make_data(letter, [f"{letter}{number}" for number in range(size)])
        for letter, size in zip("abcd", sizes, strict=True)
    ][: len(weights)]
    pairs = list(zip(prefixes, weights, strict=True))
    read, _ = build(tokenizer, pairs, num_samples=(samples, None))
    assert samples <= len(read) <= samples + len(weights)
    counts = sources(read, tokenizer)
    for letter, weight in zip("abcd", weights, strict=False):
        assert abs(counts[letter] - len(read) * weight / sum(weights)) <= 1
    again, _ = build(tokenizer, pairs, num_samples=(samples, None))
    assert order(again, tokenizer) == order(read, tokenizer)


def test_blend_without_weights_is_by_size_and_repeats(
    make_data: MakeData, tokenizer: SentencePieceTokenizer
) -> None:
    a = make_data("a", [f"a{number}" for number in range(30)])
    b = make_data("b", [f"b{number}" for number in range(10)])
    read, valid = build(tokenizer, [a, b], [a, b], num_samples=(200, None))
    assert sources(read, tokenizer) == {"a": 150, "b": 50}
    assert Counter(order(valid, tokenizer)) == Counter(
        [f"a{n}" for n in range(30)] + [f"b{n}" for n in range(10)]
    )


SPLIT = "6, 3, 1"


@pytest.mark.parametrize("mode", ["padded", "packed_documents", "packed"])
def test_a_split_cuts_each_set_as_megatron_does(
    make_data: MakeData, tokenizer: SentencePieceTokenizer, mode: str
) -> None:
    """The first documents train, the next are held out, and the last are left alone."""
    sizes = {"a": 37, "b": 11}
    prefixes = [
        make_data(letter, [f"{letter}{n:02}" for n in range(size)])
        for letter, size in sizes.items()
    ]
    options = {"mode": mode, "split": SPLIT, "seq_length": 8, "num_samples": (300, None)}
    train, valid = build(tokenizer, prefixes, **options)
    ends = {letter: (round(0.6 * size), round(0.9 * size)) for letter, size in sizes.items()}
    assert ends == {"a": (22, 33), "b": (7, 10)}

    def read(dataset: Dataset) -> set[str]:
        texts = [tokenizer.detokenize(item["tokens"]) for item in as_lists(dataset)]
        return set(re.findall("[ab][0-9]{2}", " ".join(texts)))

    assert read(train) == {f"{x}{n:02}" for x, (end, _) in ends.items() for n in range(end)}
    held_out = {f"{x}{n:02}" for x, (begin, end) in ends.items() for n in range(begin, end)}
    # Packed samples leave the last tokens of an epoch out.
    assert read(valid) == held_out if mode != "packed" else read(valid) <= held_out
    assert len(read(valid)) > 0.6 * len(held_out)
    files = [inspect(prefix) for prefix in prefixes]
    assert describe_split(files, mode, SPLIT) == (
        f"split {SPLIT}: 29 documents to train on, {len(held_out)} held out"
    )
    per_epoch = samples_per_epoch(files, mode, 8, split=SPLIT)
    tokens = sum(len(tokenizer.tokenize(text)) for text in read(train))
    if mode == "padded":
        assert per_epoch == 29
    elif mode == "packed":
        assert per_epoch == tokens / 8
    else:  # two documents side by side, from each set
        assert per_epoch == 11 + 4


def test_a_split_is_that_of_megatrons_builder(
    make_data: MakeData, tokenizer: SentencePieceTokenizer, tmp_path: Path
) -> None:
    prefix = make_data("a", random_texts(50, 3))
    train, valid = build(tokenizer, [prefix], mode="packed", split=SPLIT)
    config = GPTDatasetConfig(
        random_seed=VALIDATION_SEED,
        sequence_length=S,
        blend=([prefix], None),
        split=SPLIT,
        tokenizer=tokenizer,
        path_to_cache=str(tmp_path / "theirs"),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    of_valid = BlendedMegatronDatasetBuilder(GPTDataset, [0, None, 0], lambda: True, config)
    assert as_lists(valid) == as_lists(of_valid.build()[1])
    config = replace(config, random_seed=7)
    of_train = BlendedMegatronDatasetBuilder(GPTDataset, [50, 0, 0], lambda: True, config)
    assert as_lists(train) == as_lists(of_train.build()[0])


def test_a_split_that_leaves_nothing_is_refused(
    make_data: MakeData, tokenizer: SentencePieceTokenizer
) -> None:
    prefix = make_data("a", ["1 2 3"] * 9)
    for split, expected in (
        ("1000,1", r"data.split='1000,1' holds out none of the 9 documents of .*a"),
        ("1,1000", "trains on none of the 9 documents"),
    ):
        with pytest.raises(ValueError, match=expected):
            build(tokenizer, [prefix], split=split)
    with pytest.raises(ValueError, match=r"has \d+ tokens held out, too few for one packed sample"):
        build(tokenizer, [prefix], split="8,1", mode="packed")
    assert build(tokenizer, [prefix], split="8,0,1")[1] is None


def test_sets_are_built_apart(make_data: MakeData, tokenizer: SentencePieceTokenizer) -> None:
    a, b, c = (make_data(letter, [f"{letter}{n}" for n in range(9)]) for letter in "abc")
    options = {"seq_length": S, "mode": "padded", "num_samples": (9, 12), "seed": 7}
    sets = {"one": [a], "two": [b, c]}
    _, valid = build_dataset_sets(train=[a], valid=sets, tokenizer=tokenizer, **options)
    assert {name: len(each) for name, each in valid.items()} == {"one": 9, "two": 12}
    assert set(sources(valid["one"], tokenizer)) == {"a"}
    assert set(sources(valid["two"], tokenizer)) == {"b", "c"}


def test_a_set_of_weight_0_is_left_out(
    make_data: MakeData, tokenizer: SentencePieceTokenizer
) -> None:
    a, b = (make_data(letter, [f"{letter}{n}" for n in range(9)]) for letter in "ab")
    gone = f"{a}-gone"
    for mode in ("padded", "packed"):
        alone, _ = build(tokenizer, [(a, 1.0), (b, 3.0)], mode=mode, seq_length=4)
        read, _ = build(tokenizer, [(gone, 0), (a, 2.0), (b, 6.0)], mode=mode, seq_length=4)
        assert as_lists(read) == as_lists(alone)
    single, _ = build(tokenizer, [(gone, 0), (b, 0.5)])
    assert sources(single, tokenizer) == {"b": 50}


def test_errors(make_data: MakeData, tokenizer: SentencePieceTokenizer) -> None:
    a, b = make_data("a", ["one two three"]), make_data("b", ["ten"])
    for message, train, changes in (
        ("mode='both'", [a], {"mode": "both"}),
        ("seq_length=1", [a], {"seq_length": 1}),
        ("seed=-1", [a], {"seed": -1}),
        ("num_samples", [a], {"num_samples": (0, None)}),
        ("num_samples", [a], {"num_samples": (1, 0)}),
        ("train is empty", [], {}),
        ("a weight, or none", [(a, 1.0), b], {}),
        ("weight of .* is -1", [(a, 1.0), (b, -1)], {}),
        ("a weight above 0", [(a, 0.0), (b, 0)], {}),
        ("weight of .* is nan", [(a, float("nan"))], {}),
        ("too few for one packed sample", [a], {"mode": "packed", "valid": [b]}),
        ("does not exist", [a], {"valid": [b + "x"]}),
    ):
        with pytest.raises(ValueError, match=message):
            build(tokenizer, train, **changes)


def read_all(folder: Path, prefixes: list[str], model: str) -> list[list[list[int]]]:
    """The tokens of every sample, for both modes, alone and blended."""
    samples = []
    for mode in ("packed", "padded"):
        for train in ([prefixes[0]], [(prefixes[0], 1.0), (prefixes[1], 1.0)]):
            for dataset in build(
                load_tokenizer(model), train, prefixes, mode=mode, cache_dir=folder / "cache"
            ):
                samples.append([dataset[n]["tokens"].tolist() for n in range(len(dataset))])
    return samples


def read_on_rank(folder: str, prefixes: list[str], model: str) -> list[list[list[int]]]:
    """Runs on each rank."""
    return read_all(Path(folder), prefixes, model)


def test_every_rank_reads_what_one_process_reads(
    tmp_path: Path, make_data: MakeData, tokenizer: SentencePieceTokenizer
) -> None:
    prefixes = [make_data("a", random_texts(40, 8)), make_data("b", random_texts(60, 9))]
    model = str(tokenizer.path)
    function = "tests.unit.data.test_datasets:read_on_rank"
    ranks = launch(function, 2, str(tmp_path), prefixes, model)
    (tmp_path / "alone").mkdir()
    alone = read_all(tmp_path / "alone", prefixes, model)
    assert len(alone) == 8
    assert ranks == [alone, alone]
