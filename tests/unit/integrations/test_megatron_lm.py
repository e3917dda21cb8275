"""What the builder for Megatron-LM says by itself; tests/functional trains with a checkout."""

from __future__ import annotations

from argparse import ArgumentParser
from dataclasses import fields
from types import SimpleNamespace

import pytest
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_coe.integrations.megatron_lm import add_coe_args, coe_builder
from megatron_coe.model.provider import CoEModelProvider
from tests.builders import tiny_provider

ARGS = {"transformer_impl": "local", "position_embedding_type": "rope"}


def test_a_coe_model_has_arguments_of_its_own() -> None:
    parser = add_coe_args(ArgumentParser())
    own = vars(parser.parse_args([])).keys() - {"coe_megatron_dispatcher"}
    assert own <= {f.name for f in fields(CoEModelProvider)}
    assert vars(parser.parse_args([])) == {
        "coe_iterations": 2,
        "coe_residual": "inner",
        "coe_independent_gate": True,
        "coe_upcycled": False,
        "coe_megatron_dispatcher": False,
        "moe_router_group_score": "sum",
    }
    given = parser.parse_args(["--coe-shared-gate", "--coe-residual", "addinit"])
    assert (given.coe_independent_gate, given.coe_residual) == (False, "addinit")


def test_a_given_provider_is_built(single_rank) -> None:
    model = coe_builder(SimpleNamespace(**ARGS), False, True, config=tiny_provider())
    assert isinstance(model, GPTModel)
    assert not hasattr(model, "embedding") and hasattr(model, "output_layer")


def test_another_configuration_is_refused(single_rank) -> None:
    other = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1)
    with pytest.raises(ValueError, match="config is a TransformerConfig"):
        coe_builder(SimpleNamespace(**ARGS), True, True, config=other)


def test_a_complaint_names_the_argument(single_rank) -> None:
    with pytest.raises(ValueError, match=r"backend='jax' .*--transformer-impl local"):
        coe_builder(SimpleNamespace(**ARGS), True, True, config=tiny_provider(backend="jax"))


def test_what_needs_transformer_engine_is_refused_without_it(single_rank) -> None:
    fused = tiny_provider(gradient_accumulation_fusion=True, backend="torch")
    with pytest.raises(ValueError, match=r"needs Transformer Engine .*--no-gradient-accum"):
        coe_builder(SimpleNamespace(**ARGS), True, True, config=fused)


def test_the_name_that_scripts_of_users_import_stays() -> None:
    from megatron_coe import megatron_lm

    assert megatron_lm.coe_builder is coe_builder and megatron_lm.add_coe_args is add_coe_args
