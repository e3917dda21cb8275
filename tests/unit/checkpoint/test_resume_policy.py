"""Which changes of settings between a checkpoint and the resumed run are refused or printed."""

from __future__ import annotations

import re
from dataclasses import asdict, fields

import pytest

from megatron_coe.checkpoint.checkpointer import Checkpointer
from megatron_coe.checkpoint.directory import find_checkpoints
from megatron_coe.checkpoint.resume import check_changes
from megatron_coe.checkpoint.resume_policy import Policy, changes, data_change, policy_of
from megatron_coe.checkpoint.tokenizer import identity_of
from megatron_coe.config.loader import load_settings
from megatron_coe.config.run_config import Settings
from megatron_coe.data.tokenizer import Tokenizer
from megatron_coe.model.provider import CoEModelProvider
from megatron_coe.utils.run_files import CONFIG_FILE
from tests.unit.training.runs import make_settings, make_trainer


class Words(Tokenizer):
    """A tokenizer of so many ids, whose content is identified by a word."""

    def __init__(self, vocab_size: int = 96, content: str = "one") -> None:
        super().__init__(None, vocab_size=vocab_size, eod=0, bos=1, pad=2, digest=content)

    def tokenize(self, text):
        return []

    def detokenize(self, ids):
        return ""

    def vocabulary(self):
        return {}


def changed(key: str, value: object) -> Settings:
    settings = make_settings()
    section, name = key.split(".")
    if section == "model":
        settings.model[name] = value
    else:
        assert hasattr(getattr(settings, section), name)
        setattr(getattr(settings, section), name, value)
    return settings


@pytest.mark.parametrize(
    ("key", "value", "policy"),
    [
        ("log.interval", 3, Policy.SILENT),
        ("checkpoint.keep_latest", 9, Policy.SILENT),
        ("parallel.tensor_model_parallel_size", 2, Policy.SILENT),
        ("model.backend", "torch", Policy.SILENT),
        ("model.recompute_granularity", "selective", Policy.SILENT),
        ("train.exit_step", 3, Policy.SILENT),
        ("train.micro_batch_size", 2, Policy.SILENT),
        ("train.eval_interval", 2, Policy.SILENT),
        ("train.on_nonfinite", "skip", Policy.SILENT),
        ("data.valid", ["elsewhere"], Policy.SILENT),
        ("data.split", "99, 1", Policy.REFUSED),
        ("data.tokenizer", "moved.model", Policy.SILENT),
        ("train.lr", 0.5, Policy.PRINTED),
        ("train.clip_grad", 0.5, Policy.PRINTED),
        ("train.weight_decay", 0.5, Policy.PRINTED),
        ("model.hidden_dropout", 0.5, Policy.PRINTED),
        ("model.moe_aux_loss_coeff", 0.5, Policy.PRINTED),
        ("train.seed", 43, Policy.REFUSED),
        ("train.steps", 21, Policy.REFUSED),
        ("train.global_batch_size", 8, Policy.REFUSED),
        ("train.rampup_batch_size", [2, 2, 8], Policy.REFUSED),
        ("train.lr_wsd_decay_steps", 2, Policy.PRINTED),
        ("train.precision", "bf16", Policy.REFUSED),
        ("data.train", ["other"], Policy.REFUSED),
        ("data.train_weights", [1.0], Policy.REFUSED),
        ("data.mode", "padded", Policy.REFUSED),
        ("model.seq_length", 8, Policy.REFUSED),
        ("model.coe_iterations", 3, Policy.REFUSED),
        ("model.coe_residual", "outer", Policy.REFUSED),
        ("model.rotary_base", 500, Policy.REFUSED),
        ("model.moe_router_topk", 1, Policy.REFUSED),
    ],
)
def test_what_becomes_of_a_change(key, value, policy):
    assert policy_of(key) is policy
    found = changes(make_settings(), changed(key, value))
    if policy is Policy.SILENT:
        assert found == []
    else:
        (change,) = found
        assert (change.key, change.now) == (key, value)
        assert change.is_refused == (policy is Policy.REFUSED)
        assert repr(change.before) in str(change)


@pytest.mark.parametrize(
    ("style", "warmup", "step", "steps", "is_refused"),
    [
        ("constant", 0.0, 0, 30, False),
        ("constant", 0.1, 20, 200, False),
        ("constant", 0.1, 19, 200, True),
        ("constant", 0.1, 2, 10, False),
        ("constant", 0.1, 1, 10, True),
        ("cosine", 0.0, 20, 30, True),
        ("linear", 0.0, 20, 30, True),
    ],
)
def test_more_steps_need_no_permission_where_the_rate_stays(style, warmup, step, steps, is_refused):
    """20 steps become others; until 10% of them the learning rate would rise again."""
    train = {"lr_decay_style": style, "lr_warmup_fraction": warmup}
    before, now = make_settings(train=train), make_settings(train={**train, "steps": steps})
    (change,) = changes(before, now, step=step)
    assert (str(change), change.is_refused) == (f"train.steps was 20 and is {steps}", is_refused)


WSD = {"lr_decay_style": "WSD", "lr_wsd_decay_steps": 5, "lr_warmup_steps": 2}


@pytest.mark.parametrize(
    ("train", "step", "is_refused"),
    [
        (WSD, 1, True),  # of 20 steps it falls after 15, of 40 after 35
        (WSD, 2, False),
        (WSD, 15, False),
        (WSD, 16, True),
        ({**WSD, "rampup_batch_size": [2, 2, 8]}, 15, False),
        ({**WSD, "rampup_batch_size": [2, 2, 8]}, 16, True),
        ({"lr_decay_style": "inverse-square-root", "lr_warmup_steps": 2}, 9, False),
        ({"lr_decay_style": "inverse-square-root", "lr_warmup_fraction": 0.1}, 9, True),
    ],
)
def test_more_steps_need_no_permission_before_the_rate_falls(train, step, is_refused):
    before, now = make_settings(train=train), make_settings(train={**train, "steps": 40})
    (change,) = changes(before, now, step=step)
    assert (change.key, change.is_refused) == ("train.steps", is_refused)


def test_a_default_that_is_spelled_out_is_no_change():
    assert changes(make_settings(), changed("model.layernorm_epsilon", 1e-6)) == []
    assert changes(changed("model.rotary_percent", 1.0), make_settings()) == []


def test_every_setting_has_its_place():
    """New settings are refused (model, data) or printed (train) until the table says otherwise."""
    for section, values in asdict(Settings()).items():
        for name in values:
            assert policy_of(f"{section}.{name}") in Policy
    assert all(policy_of(f"model.{f.name}") in Policy for f in fields(CoEModelProvider))
    assert policy_of("data.something_new") is Policy.REFUSED
    assert policy_of("model.something_new") is Policy.REFUSED


def test_the_content_of_training_sets_decides_in_its_order():
    one, two = (
        {"name": name, "documents": 1000, "tokens": 20_000, "sha256": name * 64} for name in "ab"
    )
    assert data_change([one, two], [one | {"name": "moved"}, two]) is None
    for before, now, told in (
        ([one, two], [one, two | {"tokens": 19_999}], r"^data.train was 'b: .* 20,000 .*19,999"),
        ([one, two], [two, one], "was 'a: .*; b: .* and is 'b: .*; a: "),
        ([one], [one, two], "was 'a: 1,000 documents, [^;]*' and is 'a: .*; b: "),
    ):
        change = data_change(before, now)
        assert change.is_refused
        assert re.search(told, str(change))


@pytest.fixture(scope="module")
def saved(single_rank, tmp_path_factory):
    """Checkpoints of steps 0 and 1, made with a tokenizer of 96 ids."""
    folder = tmp_path_factory.mktemp("saved")
    settings = make_settings(folder, model={"num_layers": 1})
    trainer = make_trainer(settings, single_rank)
    trainer.checkpointer = Checkpointer(
        settings.checkpoint, settings.to_yaml(), identity_of(Words())
    )
    trainer.save()
    trainer.step()
    trainer.save()
    return settings, find_checkpoints(folder)


def test_the_same_settings_go_unsaid(saved):
    settings, (path, start) = saved
    assert check_changes(path, settings, Words()) == []
    assert check_changes(start, settings, Words()) == []


def test_refused_changes_are_named_together_and_can_be_accepted(saved):
    _, (path, start) = saved
    changed = make_settings(model={"num_layers": 1}, train={"seed": 7, "lr": 0.5, "steps": 9})
    told = (
        r"step_00000001 was made with other settings: train\.seed was 42 and is 7; "
        r"train\.steps was 20 and is 9\. Set back .*config_changes='\[train\.seed,train\.steps\]'"
    )
    with pytest.raises(ValueError, match=told):
        check_changes(path, changed, Words())
    assert check_changes(start, changed, Words()) == [], "step 0 has seen no data"
    assert check_changes(path, changed, Words(), model_only=True) == []
    changed.checkpoint.allow_config_changes = ["train.seed"]
    with pytest.raises(ValueError, match=r"settings: train\.steps was"):
        check_changes(path, changed, Words())
    changed.checkpoint.allow_config_changes = ["train.seed", "train.steps"]
    assert len(check_changes(path, changed, Words())) == 3


@pytest.mark.parametrize("other", [Words(97), Words(96, "two")])
def test_another_vocabulary_is_refused(saved, other):
    settings, (path, start) = saved
    for checkpoint in (path, start):
        with pytest.raises(ValueError, match=r"data\.tokenizer was '96 ids, SHA-256 one"):
            check_changes(checkpoint, settings, other)


def test_settings_that_cannot_be_read_are_named(saved, tmp_path):
    settings, _ = saved
    (tmp_path / CONFIG_FILE).write_text("train: {lr: [}")
    with pytest.raises(ValueError, match=r"config\.yaml: not valid YAML"):
        check_changes(tmp_path, settings, Words())


def test_former_names_of_settings_are_no_changes(tmp_path):
    old, new = tmp_path / "old.yaml", tmp_path / "new.yaml"
    old.write_text(
        "data: {mode: examples}\ntrain: {stop_step: 3, nonfinite: skip}\n"
        "checkpoint: {keep: 4, accept_changes: [train.steps]}\nlog: {dir: run}"
    )
    before = load_settings(old)
    new.write_text(before.to_yaml())
    assert load_settings(new) == before
    assert changes(before, load_settings(new)) == []
