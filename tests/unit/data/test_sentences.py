from __future__ import annotations

import pickle
from pathlib import Path

import nltk
import pytest

from megatron_coe.data.sentences import load_splitter

TEXT = "We met Fr. Brown. He asked Fr. Green. Is it true? Yes."
SENTENCES = ["We met Fr. Brown.", "He asked Fr. Green.", "Is it true?", "Yes."]


@pytest.fixture(autouse=True)
def without_models(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])


def test_learns_abbreviations_from_the_texts() -> None:
    names = ["Brown", "Green", "Black", "White"]
    texts = [f"They saw Fr. {name} in the park with a dog. It was late." for name in names * 10]
    splitter, origin = load_splitter(texts)
    assert list(splitter.tokenize(TEXT)) == SENTENCES
    assert "trained on" in origin
    # Workers get it pickled.
    assert list(pickle.loads(pickle.dumps(splitter)).tokenize(TEXT)) == SENTENCES


def test_splits_without_any_training_text() -> None:
    splitter, _ = load_splitter([])
    assert list(splitter.tokenize("One is it. Two is not.")) == ["One is it.", "Two is not."]
    assert list(splitter.tokenize("  ")) == []


def test_takes_the_english_model_where_it_is_installed(tmp_path: Path) -> None:
    # The files of NLTK's punkt_tab, with "fr" as its only abbreviation.
    model = tmp_path / "tokenizers" / "punkt_tab" / "english"
    model.mkdir(parents=True)
    for name in ("collocations.tab", "sent_starters.txt", "ortho_context.tab"):
        (model / name).write_text("")
    (model / "abbrev_types.txt").write_text("fr\n")
    splitter, origin = load_splitter(["never read"])
    assert origin.startswith("NLTK's punkt_tab")
    assert list(splitter.tokenize(TEXT)) == SENTENCES
    assert list(pickle.loads(pickle.dumps(splitter)).tokenize(TEXT)) == SENTENCES
