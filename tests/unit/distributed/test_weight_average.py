from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from megatron_coe.checkpoint.state import load_checkpoint
from megatron_coe.conversion.export_hf import to_hf
from tests.unit.training.runs import make_settings, make_trainer, weights

DECAY = 0.75


@pytest.mark.parametrize("distributed", [False, True])
def test_the_average_is_saved_resumed_and_exported(single_rank, tmp_path, distributed) -> None:
    def trainer_of(folder=tmp_path, **train):
        train = {"lr_warmup_fraction": 0.0, "freeze": ["*.router.*"], **train}
        parallel = {"use_distributed_optimizer": distributed}
        settings = make_settings(folder, train=train, parallel=parallel)
        return make_trainer(settings, single_rank)

    averaging = trainer_of(ema_decay=DECAY)
    expected = {name: weight.double() for name, weight in weights(averaging).items()}
    for _ in range(3):
        averaging.step()
        for name, weight in weights(averaging).items():
            expected[name] = DECAY * expected[name] + (1 - DECAY) * weight.double()
    averaging.save()
    after = weights(averaging)
    assert any((after[name] - expected[name]).abs().max() > 1e-3 for name in after)

    def assert_average(trainer) -> None:
        before = weights(trainer)
        with trainer.train_state.average.in_place_of_weights():
            for name, weight in weights(trainer).items():
                torch.testing.assert_close(weight.double(), expected[name], rtol=0, atol=1e-6)
        assert all(torch.equal(weight, before[name]) for name, weight in weights(trainer).items())

    assert_average(averaging)
    step = tmp_path / "step_00000003"
    again = trainer_of(ema_decay=DECAY)
    again.progress = load_checkpoint(step, again.train_state)
    assert_average(again)
    plain = trainer_of()  # a run without reads the same checkpoint
    load_checkpoint(step, plain.train_state)
    assert all(torch.equal(weight, after[name]) for name, weight in weights(plain).items())

    to_hf(step, tmp_path / "last")
    to_hf(step, tmp_path / "average", averaged=True)
    last, average = (load_file(tmp_path / n / "model.safetensors") for n in ("last", "average"))
    table = "module.embedding.word_embeddings.weight"
    rows = last["model.embed_tokens.weight"].shape[0]
    exported = average["model.embed_tokens.weight"].double()
    torch.testing.assert_close(exported, expected[table][:rows], rtol=0, atol=1e-6)
    for name, weight in average.items():
        assert torch.equal(weight, last[name]) is (".gate." in name), name  # routers were frozen

    plain.progress.step = 4
    plain.save()
    with pytest.raises(ValueError, match="holds no moving average"):
        to_hf(tmp_path / "step_00000004", tmp_path / "none", averaged=True)
