"""The table of all settings: what `coe train --help` and the JSON Schema are made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from megatron_coe.config.run_config import SECTIONS, Settings
from megatron_coe.config.settings_table import all_settings, describe_settings, json_schema
from megatron_coe.model.field_rules import VALUES
from tests.zygote import REPO

PRESETS = [path for path in (REPO / "examples").rglob("*.yaml") if path.parent.name != "evaluate"]
FILES = [*sorted(PRESETS), *(REPO / "tests/data").rglob("config.yaml")]


@pytest.fixture(scope="module")
def validator() -> jsonschema.Draft7Validator:
    schema = json_schema()
    jsonschema.Draft7Validator.check_schema(schema)
    return jsonschema.Draft7Validator(schema)


def test_every_setting_has_a_description_and_a_default():
    known = all_settings()
    assert [s.name for s in known if not s.description] == []
    names = {setting.name for setting in known}
    assert len(names) == len(known)
    assert {name.partition(".")[0] for name in names} == set(SECTIONS)
    assert {f"model.{name}" for name in VALUES} <= names
    defaults = {s.name: s.default for s in known if not s.name.startswith("model.")}
    sections: dict[str, Any] = vars(Settings())
    for name, default in defaults.items():
        section, key = name.split(".")
        assert getattr(sections[section], key) == default


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(REPO)))
def test_files_that_run_obey_the_schema(validator, path: Path):
    errors = [error.message for error in validator.iter_errors(yaml.safe_load(path.read_text()))]
    assert errors == []


def test_the_defaults_obey_the_schema(validator):
    document: dict[str, dict[str, object]] = {}
    for setting in all_settings():
        if "default" in setting.schema():
            section, key = setting.name.split(".")
            document.setdefault(section, {})[key] = setting.default
    assert [error.json_path for error in validator.iter_errors(document)] == []


@pytest.mark.parametrize(
    ("document", "path"),
    [
        ({"train": {"lr": 0}}, "$.train.lr"),
        ({"train": {"lr": "fast"}}, "$.train.lr"),
        ({"train": {"steps": 1.5}}, "$.train.steps"),
        ({"train": {"seed": 2**32}}, "$.train.seed"),
        ({"train": {"learning_rate": 1e-3}}, "$.train"),
        ({"data": {"mode": "sorted"}}, "$.data.mode"),
        ({"data": {"train": "one"}}, "$.data.train"),
        ({"data": {"valid": "one"}}, "$.data.valid"),
        ({"data": {"valid": {"a b": "one"}}}, "$.data.valid"),
        ({"data": {"split": "100"}}, "$.data.split"),
        ({"model": {"coe_residual": "sum"}}, "$.model.coe_residual"),
        ({"model": {"coe_iterations": 0}}, "$.model.coe_iterations"),
        ({"model": {"coe_iterations": True}}, "$.model.coe_iterations"),
        ({"model": {"moe_aux_loss_coeff": [0.1, -1.0]}}, "$.model.moe_aux_loss_coeff"),
        ({"model": {"init_method": "normal"}}, "$.model.init_method"),
        ({"models": {}}, "$"),
    ],
)
def test_mistakes_do_not(validator, document, path):
    assert [error.json_path for error in validator.iter_errors(document)] == [path]


@pytest.mark.parametrize(
    "document",
    [
        {"train": {"lr": "${train.min_lr}", "stop_step": 3}},
        {"data": {"mode": "examples", "train_weights": None}},
        {"data": {"valid": {"a": "one", "b": ["two", "three"]}, "split": "969, 30, 1"}},
        {"data": {"valid": ["one"]}, "train": {"rampup_batch_size": [1, 1, 8]}},
        {"model": {"moe_aux_loss_coeff": [0.1, 1], "q_lora_rank": None, "moe_layer_freq": [0, 1]}},
        {"extends": "base.yaml", "train": None},
    ],
)
def test_what_is_read_is_allowed(validator, document):
    assert [error.message for error in validator.iter_errors(document)] == []


def test_settings_are_found_by_name_then_by_description():
    assert describe_settings("train.lr_warmup").splitlines() == [
        "train.lr_warmup_fraction = 0.1    in [0, 1)",
        "    Share of `steps` over which the learning rate rises linearly from 0.",
        "train.lr_warmup_steps = null    0 or more, or null",
        "    The same in steps; None: `lr_warmup_fraction` of them.",
        "train.lr_warmup_samples = null    0 or more, or null",
        "    The same in sequences; the schedule then counts them, and not steps.",
    ]
    assert "train.clip_grad = 1.0    0 or more\n" in describe_settings("global L2 norm")
    assert describe_settings("model.num_layers").startswith("model.num_layers (required)    an int")
    assert describe_settings("model.moe_latent_size").endswith("stand outside the iterations.")
    with pytest.raises(ValueError, match=r"'train.warmup'.*mean 'train.lr_warmup_steps'"):
        describe_settings("train.warmup")
