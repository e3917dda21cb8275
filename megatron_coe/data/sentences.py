"""Sentence splitting with NLTK's Punkt, without any download.

Punkt's English model (`punkt_tab`) is used where NLTK finds it. Elsewhere Punkt, which needs no
labels, learns abbreviations from the texts at hand.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

TRAINING_CHARACTERS = 2_000_000


class SentenceSplitter(Protocol):
    """A sentence splitter, as NLTK's."""

    def tokenize(self, text: str) -> Iterable[str]:
        """Return the sentences of a text, without the white space between them."""


def load_splitter(texts: Iterable[str]) -> tuple[SentenceSplitter, str]:
    """Return a picklable splitter and a description of it.

    Args:
        texts: read only as far as the splitter has to be trained.
    """
    from nltk.tokenize.punkt import PunktSentenceTokenizer, PunktTokenizer, PunktTrainer

    try:
        return PunktTokenizer("english"), "NLTK's punkt_tab model for English"
    except LookupError:
        pass
    trainer, characters = PunktTrainer(), 0
    for text in texts:
        trainer.train(text, finalize=False)
        characters += len(text)
        if characters >= TRAINING_CHARACTERS:
            break
    trainer.finalize_training()
    origin = f"Punkt, trained on {characters:,} characters of the input"
    return PunktSentenceTokenizer(trainer.get_params()), origin
