"""From scratch every layout starts from the weights of one process, bit for bit.

They are put together by the global offsets of Megatron's checkpoints. (That the first step then
computes the same is `test_layouts.py`'s, whose cases start from the seed too.)
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.distributed import parity
from tests.distributed.launch import launch
from tests.unit.training.runs import make_trainer

# No width is a multiple of the rows that are drawn at once, whole or divided over ranks.
WIDTHS = {"ffn_hidden_size": 200, "moe_ffn_hidden_size": 136}
MODELS = {
    "latent attention": {},
    "MTP": {"mtp_num_layers": 2},
    "dense layer, grouped queries, biases": {
        "multi_latent_attention": False,
        "q_lora_rank": None,
        "num_query_groups": 2,
        "add_qkv_bias": True,
        "moe_layer_freq": [0, 1, 1, 1],
    },
    # 195 rows on one process, 196 on two or four.
    "odd vocabulary": {"vocab_size": 195, "make_vocab_size_divisible_by": 1},
    "tied, odd vocabulary": {
        "vocab_size": 195,
        "make_vocab_size_divisible_by": 1,
        "share_embeddings_and_output_weights": True,
    },
}
CASES = {
    2: [
        ("TP2·ETP1", "latent attention"),
        ("TP2·ETP2", "odd vocabulary"),
        ("TP2·ETP1·DO", "dense layer, grouped queries, biases"),
        ("PP2·VPP2", "dense layer, grouped queries, biases"),
        ("PP2", "tied, odd vocabulary"),
        ("PP2·DO", "MTP"),
        ("EP2·DO", "latent attention"),
        ("CP2·EP2", "MTP"),
    ],
    4: [
        ("TP2·PP2·EP2·ETP1", "tied, odd vocabulary"),
        ("TP2·EP2·ETP2·DO", "MTP"),
        ("TP4·EP2·ETP2", "odd vocabulary"),
        ("DP2·PP2·VPP2·DO", "latent attention"),
        ("PP4", "dense layer, grouped queries, biases"),
    ],
}


def initial_weights(layout: str, model: str) -> dict[str, torch.Tensor]:
    """Every parameter of a trainer at step 0, on rank 0."""
    settings = parity.layout_settings(layout)
    settings.model |= WIDTHS | MODELS[model]
    with parity.setup_groups(settings):
        trainer = make_trainer(settings, torch.device("cpu"), parity.Sequences())
        return parity.gather(trainer.train_state.chunks, lambda parameter: parameter.data)


def differing(cases: list[tuple[str, str]], folder: str) -> dict[str, list[str]]:
    """Runs on each rank: the parameters of each case that are not one process's."""
    found = {}
    for layout, model in cases:
        weights = initial_weights(layout, model)
        if dist.get_rank() == 0:
            expected = torch.load(Path(folder) / f"{model}.pt", weights_only=True)
            names = weights.keys() ^ expected.keys()
            for name in weights.keys() & expected.keys():
                rows = len(expected[name])  # one process pads the vocabulary least
                if not torch.equal(weights[name][:rows], expected[name]):
                    names.add(name)
            found[f"{layout}, {model}"] = sorted(names)
    return found


@pytest.fixture(scope="module")
def one_process(single_rank, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("one_process")
    for model in MODELS:
        torch.save(initial_weights("", model), folder / f"{model}.pt")
    return folder


@pytest.mark.parametrize("world_size", CASES)
def test_every_layout_starts_from_one_processs_weights(one_process, world_size) -> None:
    found = launch(
        "tests.distributed.test_initial_weights:differing",
        world_size,
        CASES[world_size],
        str(one_process),
    )[0]
    assert found == {", ".join(case): [] for case in CASES[world_size]}
