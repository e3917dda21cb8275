"""Learning rates: the search, the rows and seeds it uses, and the file that keeps results."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from experiments.data import Data, Source, make_data
from experiments.learning_rates import best_rate, first_grid, next_rate, search
from experiments.plans import EXPERIMENTS
from experiments.run_results import ResultsFile, RunResult, settings_digest
from experiments.scales import TINY
from experiments.tuned import Tuned, mean_losses, rates_of

FAIR = EXPERIMENTS["fair"]


def tuned(folder: Path, *overrides: str, vocab_size: int = 1024) -> Tuned:
    data = Data.at(folder / "data")
    results = ResultsFile(folder / "runs.jsonl")
    return Tuned(FAIR, TINY, Source(vocab_size), data, folder, overrides, results)


def result(variant: str = "moe", lr: float = 1e-3, seed: int = 1, held_out: str = "report"):
    return RunResult(variant, lr, seed, held_out, ((100, 2.5), (300, 1.25)), 9.5, "d", "c")


@pytest.mark.parametrize("best", [3e-3, 2.4e-2, 3.75e-4])
def test_a_grid_grows_until_its_best_lies_inside(best):
    tried = []

    def evaluate(grids):
        tried.append(grids["moe"])
        return {"moe": {lr: abs(np.log(lr / best)) for lr in grids["moe"]}}

    losses = search({"moe": 3e-3}, evaluate)["moe"]
    assert tried[0] == first_grid(3e-3) == [1.5e-3, 3e-3, 6e-3]
    assert best_rate(losses) == best and min(losses) < best < max(losses)
    assert sorted(losses) == sorted(lr for grid in tried for lr in grid)
    assert next_rate(losses) is None


def test_each_variant_is_searched_by_itself():
    asked = []

    def evaluate(grids):
        asked.append(set(grids))
        return {n: {lr: abs(np.log(lr / bests[n])) for lr in g} for n, g in grids.items()}

    bests = {"moe": 3e-3, "coe": 1.2e-2}
    losses = search({"moe": 3e-3, "coe": 3e-3}, evaluate)
    assert {name: best_rate(own) for name, own in losses.items()} == bests
    assert asked == [{"moe", "coe"}, {"coe"}, {"coe"}]


def test_tuning_and_report_share_neither_seeds_nor_rows(tmp_path):
    experiment = tuned(tmp_path)
    variant = FAIR.variants[0]
    report = experiment.run(variant, 6e-3, 1).job.settings
    tuning = experiment.run(variant, 6e-3, 1001, "tuning").job.settings
    assert report.data.valid == [str(tmp_path / "data" / "report")]
    assert tuning.data.valid == [str(tmp_path / "data" / "tuning")]
    assert report.data.train == tuning.data.train
    assert (report.train.lr, report.train.min_lr, report.train.seed) == (6e-3, 6e-4, 1)
    with pytest.raises(ValueError, match=r"train.lr=1: fair chooses"):
        tuned(tmp_path, "train.lr=1")


def test_held_out_rows_are_halved(tmp_path):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    lines = [{"q": f"{n} and {n}", "a": f"{2 * n}"} for n in range(101)]
    for name in ("train", "held"):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / f"{name}.jsonl").write_text(text)
    paths = [str(tmp_path / f"{name}.jsonl") for name in ("train", "held")]
    data = make_data(Source(300, *paths, ["q", "a"]), tmp_path / "data")
    whole, tuning, report = (
        [tuple(ids) for ids in IndexedDataset(str(prefix))]
        for prefix in (data.valid, data.tuning, data.report)
    )
    assert (tuning, report) == (whole[::2], whole[1::2])
    assert len(set(whole)) == 101


def test_results_are_read_as_they_were_written(tmp_path):
    file = ResultsFile(tmp_path / "new" / "runs.jsonl")
    assert file.read() == {}
    first, second = result(), replace(result(seed=2, held_out="tuning"), passes=8.5)
    file.append(first)
    file.append(second)
    assert file.read() == {first.key: first, second.key: second}
    last = {"step": 300, "valid_loss": 1.25, "seconds": 9.5}
    assert (first.loss, first.records) == (1.25, [{"step": 100, "valid_loss": 2.5}, last])
    with file.path.open("a") as lines:
        lines.write('{"variant": "moe"}\n')
    with pytest.raises(ValueError, match=r"runs.jsonl:3: not the result of a run"):
        file.read()


def test_a_result_of_other_settings_is_refused(tmp_path):
    experiment = tuned(tmp_path)
    run = experiment.run(FAIR.variants[0], 3e-3, 1)
    finished = replace(result(*run.key), settings=run.digest)
    experiment.check(run, {run.key: finished})
    other = tuned(tmp_path, "train.steps=299").run(FAIR.variants[0], 3e-3, 1)
    with pytest.raises(ValueError, match="other settings"):
        experiment.check(other, {run.key: finished})


def test_a_digest_is_of_what_decides_the_loss(tmp_path):
    here, there = (tuned(tmp_path / name) for name in ("one", "two"))
    digest = here.run(FAIR.variants[0], 3e-3, 1).digest
    assert there.run(FAIR.variants[0], 3e-3, 1).digest == digest
    others = {
        here.run(FAIR.variants[1], 3e-3, 1).digest,
        here.run(FAIR.variants[0], 6e-3, 1).digest,
        here.run(FAIR.variants[0], 3e-3, 2).digest,
        here.run(FAIR.variants[0], 3e-3, 1, "tuning").digest,
        tuned(tmp_path, "train.steps=299").run(FAIR.variants[0], 3e-3, 1).digest,
        tuned(tmp_path, vocab_size=300).run(FAIR.variants[0], 3e-3, 1).digest,
    }
    assert len(others | {digest}) == 7
    settings = here.run(FAIR.variants[0], 3e-3, 1).job.settings
    settings.checkpoint.verify = False
    source = here.source.described()
    assert settings_digest(settings, ["report", source]) == digest


def test_rates_are_the_best_of_the_tuning_seeds_mean():
    losses = {1e-3: (3.0, 3.0), 2e-3: (1.0, 2.0), 4e-3: (0.5, 2.75)}
    results = [
        replace(result("moe_8-64_outer", lr, 1001 + n, "tuning"), losses=((300, loss),))
        for lr, own in losses.items()
        for n, loss in enumerate(own)
    ]
    results.append(replace(result("moe_8-64_outer", 4e-3, 1), losses=((300, 0.1),)))
    found = mean_losses(results)
    assert found == {"moe_8-64_outer": {1e-3: 3.0, 2e-3: 1.5, 4e-3: 1.625}}
    one = replace(FAIR, variants=FAIR.variants[:1])
    assert rates_of(found, one, "file") == {"moe_8-64_outer": 2e-3}
    del found["moe_8-64_outer"][1e-3]
    with pytest.raises(ValueError, match="file: the learning rate of moe_8-64_outer"):
        rates_of(found, one, "file")
    with pytest.raises(ValueError, match="coe-2_4-64"):
        rates_of(found, replace(FAIR, variants=FAIR.variants[1:2]), "file")
