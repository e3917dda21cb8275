"""Rows of measures for planted routing, and what is left of them in a folder."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from megatron_coe.analysis import routing_tables
from megatron_coe.analysis.collect import Routing
from megatron_coe.analysis.heldout import CLASSES
from megatron_coe.analysis.results import SUMMARY, Analysis
from megatron_coe.analysis.routing_tables import PermutationTest, Text

N, T, S = 6, 480, 20
GENERATOR = np.random.default_rng(0)
TEXT = Text(
    ids=GENERATOR.integers(0, 40, T),
    sequences=np.repeat(np.arange(T // S), S),
    classes=GENERATOR.integers(0, len(CLASSES), T),
)
TEST = PermutationTest(permutations=99, seed=1)


def routing(*layers: list[np.ndarray], name: str = "it", first: int = 1) -> Routing:
    """One choice per token, given for each layer and iteration."""
    choices = np.array(layers)[..., None]
    numbers = tuple(range(first, first + len(layers)))
    return Routing(name, N, numbers, choices, np.full(choices.shape, 0.25))


def draw() -> np.ndarray:
    return GENERATOR.integers(0, N, T)


def test_transitions_of_planted_structure():
    """Layer 2 goes from each expert to the next one, layer 3 anywhere, layer 4 by the token."""
    turning, by_token = draw(), TEXT.ids % N
    layers = [turning, (turning + 1) % N], [draw(), draw()], [by_token, (by_token + 2) % N]
    rows = list(routing_tables.transition_rows(routing(*layers, first=2), TEXT, TEST))
    assert [(row["layer"], row["iteration"]) for row in rows] == [(2, 1), (3, 1), (4, 1)]
    planted, free, of_token = rows
    for name in ("any_token", "shifted", "same_token"):
        assert planted[f"{name}_p"] == 0.01
        assert free[f"{name}_p"] > 0.01
    assert (of_token["any_token_p"], of_token["same_token_p"]) == (0.01, 1)
    assert planted["information"] == pytest.approx(math.log(N), abs=0.02)
    assert (planted["overlap"], planted["diagonal"], planted["asymmetry"]) == (0, 0, 1)


def test_routers_of_planted_structure():
    """The first iteration follows the token, the second its class, the third the one before it."""
    runs = np.repeat(GENERATOR.integers(0, N, T // S), S)
    rows = list(
        routing_tables.router_rows(routing([TEXT.ids % N, TEXT.classes % N, runs]), TEXT, TEST)
    )
    of_token, of_class, of_run = rows
    assert [row["iteration"] for row in rows] == [1, 2, 3]
    assert of_token["token_information"] == pytest.approx(of_token["entropy"] * math.log(N))
    assert (of_token["token_p"], of_class["class_p"], of_run["token_p"] > 0.01) == (0.01, 0.01, 1)
    assert of_class["class_information"] == pytest.approx(of_class["entropy"] * math.log(N))
    assert [of_run[f"consistency_{d}"] for d in routing_tables.DISTANCES] == [1] * 5
    assert of_token["consistency_1"] < 0.3
    assert {row["weight"] for row in rows} == {0.25}


def test_usage_counts_tokens_by_class():
    choices = draw()
    rows = list(routing_tables.usage_rows(routing([choices]), TEXT))
    for row in rows:
        mine = choices == row["expert"]
        assert row["tokens"] == mine.sum()
        assert row["share"] == pytest.approx(mine.mean())
        for number, name in enumerate(CLASSES):
            assert row[name] == (mine & (TEXT.classes == number)).sum()
    assert len(rows) == N


def test_training_tells_change_and_saturation():
    first, second = draw(), draw()
    last = np.where(np.arange(T) < T // 4, second, first)
    models = [
        routing([choices], name=name)
        for name, choices in zip("abc", (first, second, last), strict=True)
    ]
    a, b, c = routing_tables.training_rows(models)
    assert [row["model"] for row in (a, b, c)] == ["a", "b", "c"]
    assert (a["agreement"], a["divergence"]) == (1, pytest.approx(0, abs=1e-12))
    assert b["agreement"] == pytest.approx((first == second).mean())
    assert c["agreement"] == pytest.approx((last == second).mean())
    assert b["saturation"] == pytest.approx((last == second).mean())
    assert (c["saturation"], a["saturation"]) == (1, pytest.approx((last == first).mean()))
    assert 0 < b["divergence"] < math.log(2)
    with pytest.raises(ValueError, match="a and it are not of one model"):
        list(routing_tables.training_rows([models[0], routing([first, first])]))


@pytest.mark.parametrize("iterations", [1, 3])
def test_a_folder_holds_the_analysis(tmp_path, iterations):
    layers = routing(*([draw() for _ in range(iterations)] for _ in range(2)), name="my_layer-2")
    about = {"models": [layers.name, layers.name], "experts": N}
    written = Analysis(
        about,
        routers=list(routing_tables.router_rows(layers, TEXT, TEST)),
        transitions=list(routing_tables.transition_rows(layers, TEXT, TEST)),
        training=list(routing_tables.training_rows([layers])),
        usage=list(routing_tables.usage_rows(layers, TEXT)),
    )
    for place, _, _, matrix in routing_tables.coactivations(layers):
        written.matrices.setdefault((layers.name, place["layer"]), []).append(matrix)
    written.routers[0]["consistency_16"] = math.nan
    assert len(written.matrices) == (2 if iterations > 1 else 0)
    written.write(tmp_path)
    read = Analysis.read(tmp_path)
    assert math.isnan(read.routers[0].pop("consistency_16"))
    del written.routers[0]["consistency_16"]
    for name in ("about", "routers", "transitions", "training", "usage"):
        assert getattr(read, name) == getattr(written, name), name
    assert read.matrices.keys() == written.matrices.keys()
    for key, matrices in written.matrices.items():
        assert all(np.array_equal(*pair) for pair in zip(read.matrices[key], matrices, strict=True))
    for content in ("{", "{}", json.dumps({"about": 1})):
        (tmp_path / SUMMARY).write_text(content)
        with pytest.raises(ValueError, match="holds no analysis of routing"):
            Analysis.read(tmp_path)
