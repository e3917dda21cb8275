"""`megatron.training` of the megatron-core wheel trains our model as our own trainer does.

The example script runs as users start it; the layouts of two ranks run one after the other in two
processes. Each is compared with our trainer: same weights, same sequences, fp32.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING
from unittest.mock import patch

import pytest
import torch
from torch.utils.data import Dataset

from megatron_coe.config.run_config import Settings
from megatron_coe.data.corpus import make_corpus
from megatron_coe.data.preprocess import preprocess
from megatron_coe.data.records import Fields
from megatron_coe.data.tokenizer import train_tokenizer
from tests.distributed.launch import launch
from tests.functional.megatron_lm import (
    CLIP,
    DECAY,
    FIELDS,
    LR,
    MODEL,
    SEED,
    STEPS,
    TRAINING,
)
from tests.zygote import REPO

if TYPE_CHECKING:
    from megatron_coe.training.trainer import Trainer

BATCH = shlex.split("--global-batch-size 8 --micro-batch-size 1 --num-workers 0")

pytestmark = [
    pytest.mark.skipif(
        find_spec("megatron.training") is None,
        reason="the wheel of megatron-core 0.16.1 holds no megatron.training",
    ),
    pytest.mark.skipif(
        bool(find_spec("pretrain_gpt")), reason="a Megatron-LM checkout is on the path"
    ),
]


@dataclass(frozen=True)
class Layout:
    """A layout of two ranks, in Megatron's arguments and in our settings."""

    arguments: str
    parallel: dict[str, object]
    model: dict[str, object] = field(default_factory=dict)


DISTRIBUTED = "--expert-model-parallel-size 2 --use-distributed-optimizer"
LAYOUTS = {
    "EP 2, distributed optimizer": Layout(
        DISTRIBUTED,
        {"expert_model_parallel_size": 2, "use_distributed_optimizer": True},
    ),
    "TP 2, sequence parallel": Layout(
        "--tensor-model-parallel-size 2 --sequence-parallel --expert-tensor-parallel-size 1",
        {"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 1},
    ),
    "PP 2, interleaved": Layout(
        "--num-layers 4 --pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2",
        {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
        {"num_layers": 4},
    ),
    "CP 2, MTP, per-token loss": Layout(
        "--context-parallel-size 2 --cp-comm-type all_gather --mtp-num-layers 1"
        " --calculate-per-token-loss",
        {"context_parallel_size": 2},
        {"mtp_num_layers": 1},
    ),
}


RESUMED = {
    "sharded as its buffers": DISTRIBUTED,
    "fully reshardable": f"{DISTRIBUTED} --dist-ckpt-optim-fully-reshardable",
    "plain optimizer": "--expert-model-parallel-size 2",
}
"""Optimizers whose checkpoints are resumed from."""


def settings(**sections: dict[str, object]) -> Settings:
    """What MODEL, TRAINING and BATCH describe, as a run of our trainer."""
    described = Settings(model={**FIELDS, **sections.pop("model", {})})
    train = {
        "steps": STEPS,
        "seed": SEED,
        "global_batch_size": 8,
        "micro_batch_size": 1,
        "lr": LR,
        "lr_warmup_fraction": 0.0,
        "weight_decay": DECAY,
        "clip_grad": CLIP,
    }
    for section, values in {"train": train, "checkpoint": {"save": None}, **sections}.items():
        for name, value in values.items():
            setattr(getattr(described, section), name, value)
    return described


# --- the script, on one rank ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training and a validation set with their tokenizer."""
    folder = tmp_path_factory.mktemp("data")
    fields = Fields(("query", "response"), question_answer=True)
    tokenizer = folder / "tokenizer.model"
    for source in make_corpus(folder, train_size=60, valid_size=20, seed=5):
        if not tokenizer.exists():
            train_tokenizer([source], tokenizer, fields=fields, vocab_size=400)
        preprocess(
            [source], folder / source.stem, tokenizer, fields=fields, workers=1, append_eod=True
        )
    return folder


def train_sh(folder: Path, *arguments: str, **variables: object) -> subprocess.CompletedProcess:
    """Run the example as users start it."""
    others = {name: value for name, value in os.environ.items() if "MEGATRON_LM" not in name}
    environment = {
        **others,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",  # torchrun's
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "DEVICE": "cpu",
        "SAVE": str(folder),
        **{name: str(value) for name, value in variables.items()},
    }
    return subprocess.run(
        ["examples/megatron_lm/train.sh", *arguments],
        cwd=REPO,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )


def logged(output: str, name: str) -> list[float]:
    """A value that Megatron prints per step."""
    return [float(value) for value in re.findall(rf"\| {name}: ([-+.\dE]+) \|", output)]


def test_the_script_trains_as_pretrain_coe_does(data, tmp_path) -> None:
    """From the same files and Megatron's initial weights: order of the data and losses agree."""
    from megatron_coe.training import build

    arguments = [*MODEL, *TRAINING, *BATCH, "--lr-warmup-fraction", "0"]
    arguments += ["--tokenizer-type", "SentencePieceTokenizer"]
    arguments += ["--data-cache-path", str(tmp_path / "cache")]
    done = train_sh(
        tmp_path / "run",
        *arguments,
        DATA=data / "train",
        VALID=data / "valid",
        TOKENIZER=data / "tokenizer.model",
    )
    assert done.returncode == 0, done.stderr[-4000:]
    described = settings(
        model={"vocab_size": 0},  # the tokenizer's
        data={
            "tokenizer": str(data / "tokenizer.model"),
            "train": [str(data / "train")],
            "cache": str(tmp_path / "our_cache"),
        },
        log={"dir": str(tmp_path / "log")},
    )
    with build.trainer(described) as trainer:
        _start_as_megatron(trainer, described)
        steps = [trainer.step() for _ in range(STEPS)]
    # Megatron prints seven digits of a loss and three decimals of a norm; in its second line, the
    # mean of the first two losses.
    expected = [step.loss for step in steps]
    expected[1] = (expected[0] + expected[1]) / 2
    assert logged(done.stdout, "lm loss") == pytest.approx(expected, rel=2e-6)
    expected = [step.grad_norm for step in steps]
    assert logged(done.stdout, "grad norm") == pytest.approx(expected, abs=6e-4)
    assert "validation loss at iteration 4" in done.stdout


def _start_as_megatron(trainer: Trainer, settings: Settings) -> None:
    """Give one rank the weights that Megatron draws, from its generators, for the same seed."""
    from megatron.core.utils import unwrap_model

    from megatron_coe.config.model_section import build_provider
    from megatron_coe.distributed.seeds import seed_everything

    seed_everything(SEED)
    vocab_size = trainer.train_state.provider.vocab_size
    theirs = build_provider(settings, torch.device("cpu"), vocab_size).provide()
    (model,) = unwrap_model(trainer.train_state.chunks)
    model.load_state_dict(theirs.state_dict())


# --- two ranks ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What `_train_everything` returns on each rank."""
    folder = tmp_path_factory.mktemp("checkpoints")
    return launch(
        "tests.functional.test_megatron_training:_train_everything", 2, str(folder), timeout_s=500
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_trains_as_our_trainer_does(ranks, layout) -> None:
    for rank in ranks:
        theirs, ours = rank[layout]
        assert len(theirs) == STEPS
        for their_step, (our_loss, our_norm) in zip(theirs, ours, strict=True):
            their_loss, their_norm = their_step
            assert their_norm == pytest.approx(our_norm, rel=1e-5)
            if their_loss is not None:  # the last stage has it
                assert their_loss == pytest.approx(our_loss, rel=1e-5)
    theirs, _ = ranks[-1][layout]
    losses, norms = zip(*theirs, strict=True)
    assert losses[-1] < losses[0] - 0.05
    assert max(norms) > CLIP  # so that the clipping was part of the comparison


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_padding_of_the_vocabulary_is_not_trained(ranks, layout) -> None:
    """Without a gradient Adam changes nothing: what there is comes from the weight decay."""
    heads = [rank["padding"][layout] for rank in ranks]
    assert sum(len(head) for head in heads) > 0
    for ratios in heads:
        assert ratios == pytest.approx([(1 - LR * DECAY) ** STEPS] * len(ratios), rel=1e-6)


def test_layouts_train_the_same_model(ranks) -> None:
    """Each reads whole sequences; the two start from the same weights."""
    (experts, _), (tensors, _) = (ranks[-1][layout] for layout in list(LAYOUTS)[:2])
    for step, other in zip(experts, tensors, strict=True):
        assert step == pytest.approx(other, rel=1e-5)


@pytest.mark.parametrize("optimizer", RESUMED)
def test_a_resumed_run_goes_on_as_one_without_a_break(ranks, optimizer) -> None:
    for rank in ranks:
        unbroken, _ = rank["EP 2, distributed optimizer"]
        before, after = rank[optimizer]
        # The plain optimizer sums the gradients' norm in another order.
        tolerance = 1e-5 if optimizer == "plain optimizer" else 0
        for step, expected in zip(before + after, unbroken, strict=True):
            assert step == pytest.approx(expected, rel=tolerance, abs=0)
        assert len(before) == 2


@dataclass
class _Record:
    """What one call of `pretrain` did on this rank."""

    weights: list[dict[str, torch.Tensor]] = field(default_factory=list)
    """Of each model chunk, before the first step."""
    steps: list[tuple[float | None, float]] = field(default_factory=list)
    """Loss (None before the last stage) and gradient norm."""
    padding: list[float] = field(default_factory=list)
    """What each of the output layer's weights for padding was multiplied by since the first."""
    data: Dataset | None = None


def _train_everything(folder: str) -> dict[str, list]:
    """Runs on every rank: all layouts by Megatron and by our trainer, and one resumed."""
    from megatron_coe.megatron_compat import megatron_training

    megatron_training.install()
    figures = {"padding": {}}
    for name, layout in LAYOUTS.items():
        record = _pretrain(layout.arguments)
        figures[name] = [record.steps, _train_ours(layout, record)]
        figures["padding"][name] = record.padding
    for number, (name, arguments) in enumerate(RESUMED.items()):
        saves = f"{arguments} --ckpt-format torch_dist --save-interval 2"
        saves += f" --save {folder}/{number} --load {folder}/{number}"
        figures[name] = [_pretrain(f"{saves} --exit-interval 2").steps, _pretrain(saves).steps]
    return figures


def _pretrain(arguments: str) -> _Record:
    """Megatron's `pretrain` on random tokens, as the example script calls it."""
    from megatron.core.parallel_state import get_tensor_model_parallel_rank
    from megatron.core.utils import unwrap_model
    from megatron.training import training

    from megatron_coe.integrations import megatron_lm_pretrain as gpt
    from megatron_coe.integrations.megatron_lm import add_coe_args
    from megatron_coe.megatron_compat import megatron_training

    record = _Record()
    train_step = training.train_step

    def noted_step(forward_step, data_iterator, model, *others, **options):
        if not record.weights:
            record.weights = [
                {name: weight.detach().clone() for name, weight in chunk.named_parameters()}
                for chunk in unwrap_model(model)
            ]
        result = train_step(forward_step, data_iterator, model, *others, **options)
        losses, _, _, _, _, grad_norm, *_ = result
        record.steps.append((losses["lm loss"].item() if losses else None, grad_norm))
        before = record.weights[-1].get("output_layer.weight")
        if before is not None:
            start = max(FIELDS["vocab_size"] - get_tensor_model_parallel_rank() * len(before), 0)
            now = unwrap_model(model)[-1].output_layer.weight.detach()
            record.padding = (now / before)[start:].flatten().tolist()
        return result

    def noted_data(num_samples, vp_stage=None):
        data, *others = gpt.train_valid_test_datasets_provider(num_samples, vp_stage)
        record.data = data or record.data  # chunks in the middle read none
        return data, *others

    noted_data.is_distributed = True
    command_line = ["program", *MODEL, *TRAINING, *BATCH, "--mock-data", "--eval-iters", "0"]
    command_line += shlex.split(arguments)
    with (
        _global_state_of_its_own(),
        patch.object(training, "train_step", noted_step),
        patch.object(sys, "argv", command_line),
    ):
        try:
            megatron_training.pretrain(
                noted_data, gpt.model_provider, gpt.forward_step, add_coe_args
            )
        except SystemExit as stop:  # --exit-interval
            assert not stop.code
    return record


@contextmanager
def _global_state_of_its_own() -> Iterator[None]:
    """Megatron's global variables are made by a call of `pretrain` and gone after it."""
    from megatron.training.training import destroy_global_state

    _forget_models()
    try:
        yield
    finally:
        destroy_global_state()
        _forget_models()


def _forget_models() -> None:
    """Megatron logs losses in tables of the process, sized for the first model that it saw."""
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
    from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

    from megatron_coe.megatron_compat.versions import clear_aux_losses

    clear_aux_losses()
    MTPLossLoggingHelper.tracker.clear()
    MoEAuxLossAutoScaler.main_loss_backward_scale = None


def _train_ours(layout: Layout, record: _Record) -> list[tuple[float, float]]:
    """Loss and gradient norm of our trainer's steps, from the weights and sequences of `record`."""
    from megatron.core.utils import unwrap_model

    from megatron_coe.distributed.process_groups import parallel_groups
    from tests.unit.training.runs import make_trainer

    _forget_models()
    described = settings(model=layout.model, parallel=layout.parallel)
    with parallel_groups(described.parallel):
        trainer = make_trainer(described, torch.device("cpu"), record.data)
        chunks = unwrap_model(trainer.train_state.chunks)
        for chunk, weights in zip(chunks, record.weights, strict=True):
            assert {name for name, _ in chunk.named_parameters()} == weights.keys()
            chunk.load_state_dict(weights, strict=False)
        steps = [trainer.step() for _ in range(STEPS)]
    return [(step.loss, step.grad_norm) for step in steps]
