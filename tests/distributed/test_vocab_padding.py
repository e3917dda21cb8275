"""Padding of the vocabulary changes nothing, however tensor-parallel ranks and stages divide it.

40 ids are padded to 64 rows, and with 3 tensor-parallel ranks to 192: some ranks hold tokens and
padding, some hold padding alone. What every layout is held to is one process without any padding,
whose cross-entropy is over the vocabulary as it is.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_coe.checkpoint.directory import find_checkpoints
from megatron_coe.checkpoint.state import load_checkpoint
from megatron_coe.config.run_config import Settings
from megatron_coe.training.trainer import Trainer
from tests.distributed import parity
from tests.distributed.launch import launch
from tests.unit.training.runs import make_settings, make_trainer

VOCAB, SEQ, MULTIPLE, STEPS, STOP = 40, 12, 64, 4, 1
TOLERANCE = 1e-5  # fp32; the padding would add about ln(64 / 40) to a loss of 4
# All widths divide by 3 and by 4.
MODEL = {
    "multi_latent_attention": False,
    "hidden_size": 48,
    "num_attention_heads": 12,
    "ffn_hidden_size": 48,
    "moe_ffn_hidden_size": 24,
    "moe_shared_expert_intermediate_size": 24,
    "num_moe_experts": 6,
    "vocab_size": VOCAB,
    "seq_length": SEQ,
}
VARIANTS = {
    "untied": {},
    "tied": {"share_embeddings_and_output_weights": True},
    "MTP": {"mtp_num_layers": 1},
}
LINEAR = "linear"
"""Added to a variant: output layer and loss in one, held to the unfused one."""
TP_3 = {"tensor_model_parallel_size": 3, "expert_tensor_parallel_size": 1}
LAYOUTS = {
    "TP 2": {"tensor_model_parallel_size": 2},
    "PP 2": {"pipeline_model_parallel_size": 2},
    "TP 3": TP_3,
    "TP 4": {"tensor_model_parallel_size": 4, "use_distributed_optimizer": True},
    "TP 2, PP 2": {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2},
}
ON_THREE_RANKS = [("TP 3", "untied"), ("TP 3", "MTP"), ("TP 3", f"MTP, {LINEAR}")]
ON_FOUR_RANKS = [
    *[("TP 4", "untied"), ("TP 2, PP 2", "tied"), ("TP 2", "tied"), ("PP 2", "MTP")],
    *[("TP 2, PP 2", f"tied, {LINEAR}"), ("TP 2", f"tied, {LINEAR}"), ("PP 2", f"MTP, {LINEAR}")],
]
OPTIMIZERS = {"plain": {}, "distributed": {"use_distributed_optimizer": True}}


class Sequences:
    """Random ids, each sequence a function of its number."""

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(VOCAB, (SEQ + 1,), generator=torch.Generator().manual_seed(number))
        return {
            "tokens": ids[:-1],
            "labels": ids[1:],
            "loss_mask": torch.ones(SEQ),
            "position_ids": torch.arange(SEQ),
        }


def settings(variant: str, multiple: int = MULTIPLE, **parallel: object) -> Settings:
    name, _, linear = variant.partition(", ")
    model = {**MODEL, **VARIANTS[name], "make_vocab_size_divisible_by": multiple}
    model["cross_entropy_loss_fusion"] = linear == LINEAR
    train = {"lr": 1e-3, "lr_warmup_fraction": 0.0, "clip_grad": 0.1, "micro_batch_size": 2}
    return make_settings(model=model, train=train, parallel=parallel)


def trainer_of(described: Settings) -> Trainer:
    """At the weights of one seed; the padding has some, too."""
    return make_trainer(described, torch.device("cpu"), Sequences())


def steps_of(trainer: Trainer, until: int = STEPS) -> list[list[float]]:
    """[loss, gradient norm] of each step."""
    steps = []
    while trainer.progress.step < until:
        step = trainer.step()
        steps.append([step.loss, step.grad_norm])
    return steps


@pytest.fixture(scope="module")
def unpadded(single_rank) -> dict[str, list[list[float]]]:
    return {variant: steps_of(trainer_of(settings(variant, multiple=1))) for variant in VARIANTS}


@pytest.fixture(scope="module")
def folder(single_rank, tmp_path_factory) -> Path:
    """What a process with padding has saved after step `STOP`, in `one process`."""
    folder = tmp_path_factory.mktemp("checkpoints")
    trainer = trainer_of(saving(settings("untied"), folder / "one process"))
    steps_of(trainer, STOP)
    train_padding(trainer)
    trainer.save()
    return folder


def saving(described: Settings, folder: Path) -> Settings:
    described.checkpoint.save, described.checkpoint.async_save = str(folder), False
    return described


def train_padding(trainer: Trainer) -> None:
    """Leave the padding as training did where it stood in the softmax, with moments of its own."""
    (chunk,) = trainer.train_state.chunks
    states = {
        weight: state
        for part in trainer.train_state.optimizer.chained_optimizers
        for weight, state in part.optimizer.state.items()
    }
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        weight = chunk.module.get_parameter(name)
        for tensor in (weight.data, states[weight]["exp_avg"], states[weight]["exp_avg_sq"]):
            tensor[VOCAB:] = 1.0


def load(described: Settings, folder: Path) -> Trainer:
    trainer = make_trainer(described, torch.device("cpu"), Sequences())
    (checkpoint,) = find_checkpoints(folder)
    trainer.progress = load_checkpoint(checkpoint, trainer.train_state)
    return trainer


@pytest.fixture(scope="module")
def on_ranks(folder) -> dict[object, list[list[float]]]:
    """Steps in each (layout, variant), and of the run that goes on, by its optimizer."""
    here = "tests.distributed.test_vocab_padding"
    three = launch(f"{here}:on_three_ranks", 3, str(folder))[0]
    four = launch(f"{here}:in_layouts", 4, ON_FOUR_RANKS)[0]
    cases = [*OPTIMIZERS, *ON_THREE_RANKS, *ON_FOUR_RANKS]
    return dict(zip(cases, three + four, strict=True))


def on_three_ranks(folder: str) -> list[list[list[float]]]:
    """Runs on each rank."""
    resumed = []
    for optimizer, option in OPTIMIZERS.items():
        described = saving(settings("untied", **TP_3, **option), Path(folder, optimizer))
        with parity.setup_groups(described):
            trainer = load(described, Path(folder, "one process"))
            resumed.append(steps_of(trainer, STOP + 1))
            trainer.save()
    return resumed + in_layouts(ON_THREE_RANKS)


def in_layouts(cases: list[tuple[str, str]]) -> list[list[list[float]]]:
    """Runs on each rank: the steps of each (layout, variant)."""
    results = []
    for layout, variant in cases:
        described = settings(variant, **LAYOUTS[layout])
        with parity.setup_groups(described):
            results.append(steps_of(trainer_of(described)))
    return results


@pytest.mark.parametrize("case", [*ON_THREE_RANKS, *ON_FOUR_RANKS], ids=", ".join)
def test_a_layout_trains_as_one_process_without_padding(unpadded, on_ranks, case):
    assert len(on_ranks[case]) == STEPS
    variant, _, _ = case[1].partition(", ")
    for step, expected in zip(on_ranks[case], unpadded[variant], strict=True):
        assert step == pytest.approx(expected, rel=TOLERANCE)
        assert expected[1] > 0.1  # so that clipping was part of it


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_run_goes_on_where_the_padding_is_another(unpadded, on_ranks, folder, optimizer):
    """From one process on 3 tensor-parallel ranks (192 rows for 64), then in one process again."""
    described = settings("untied", **OPTIMIZERS[optimizer])
    steps = on_ranks[optimizer] + steps_of(load(described, folder / optimizer))
    assert len(steps) == STEPS - STOP
    for step, expected in zip(steps, unpadded["untied"][STOP:], strict=True):
        assert step == pytest.approx(expected, rel=TOLERANCE)
