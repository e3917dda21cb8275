"""A few malformed and hostile inputs of each kind (all of them: `make test-faults`)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.faults import hostile, malformed
from tests.faults.commands import REPO, Bench, run_case
from tests.zygote import Zygote

FEW = (
    "yaml: nested 2,000 deep",
    "yaml: billion laughs",
    "value: train.lr=.inf",
    "layout: EP beside the experts",
    "model: hiden_size=32",
    "command: override with the environment",
    "data: .bin cut short",
    "data: offset beyond the end",
    "data: id beyond the vocabulary",
    "output: checkpoint.save cannot be written",
    "preprocess: full disk",
    "plot_runs: loss is a word",
    "settings: an object made by a call",
    "tokenizer: a pickle as .model",
    "checkpoint: .metadata, a dotted name in torch",
    "checkpoint: common.pt, zip",
    "checkpoint: generators' state",
)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """Under -O, where no assertion is left to catch a mistake."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONOPTIMIZE", "1")
        with Zygote(REPO) as zygote:
            yield Bench(zygote, tmp_path_factory.mktemp("bench"))


@pytest.mark.parametrize("name", FEW)
def test_it_is_refused_in_one_message(bench: Bench, name: str) -> None:
    (case,) = (case for case in [*malformed.cases(), *hostile.cases()] if case.name == name)
    assert run_case(bench, case) is None


def test_there_are_enough_of_them() -> None:
    broken, planted = malformed.cases(), hostile.cases()
    assert len(broken) >= 100
    assert len(planted) >= 20
    names = [case.name for case in broken + planted]
    assert len(set(names)) == len(names)
