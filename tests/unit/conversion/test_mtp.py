"""Layers of multi-token prediction: DeepSeek-V3's names for them, with and without them."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_coe.checkpoint.resume_policy import changes
from megatron_coe.checkpoint.state import load_checkpoint
from megatron_coe.cli import convert
from megatron_coe.config.loader import load_settings
from megatron_coe.conversion.export_hf import to_hf
from megatron_coe.conversion.import_hf import from_hf
from megatron_coe.hf import CoeForCausalLM
from megatron_coe.hf.modeling_coe import CoeDecoderLayer, CoeRMSNorm
from megatron_coe.megatron_compat.versions import clear_aux_losses
from megatron_coe.utils.run_files import CONFIG_FILE
from tests.unit.conversion.models import write_random_model
from tests.unit.training.runs import make_trainer

MODEL = {"num_layers": 2, "mtp_num_layers": 2, "vocab_size": 90}
FIRST = "model.layers.2."


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder with MTP layers, its checkpoint, and the folder without them."""
    root = tmp_path_factory.mktemp("mtp")
    write_random_model(root / "hf", seed=5, **MODEL)
    from_hf(root / "hf", root / "checkpoints")
    arguments = ["to-hf", "--input", str(root / "checkpoints"), "--output", str(root / "without")]
    assert convert.main([*arguments, "--without-mtp"]) == 0
    return root


def weights_of(folder) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def config_of(folder) -> dict:
    return json.loads((folder / "config.json").read_text())


def change_weights(folder, change) -> None:
    weights = weights_of(folder)
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_the_names_are_deepseek_v3s(folders) -> None:
    """Those of its folder on the hub, with a router per iteration."""
    own = {name.removeprefix(FIRST) for name in weights_of(folders / "hf") if FIRST in name}
    outer = {"enorm.weight", "hnorm.weight", "eh_proj.weight", "embed_tokens.weight"}
    outer |= {"shared_head.norm.weight", "shared_head.head.weight"}
    assert outer <= own
    decoder = {name.partition("layers.1.")[2] for name in weights_of(folders / "hf")} - {""}
    assert own - outer == decoder
    assert config_of(folders / "hf")["num_nextn_predict_layers"] == 2


def test_both_folders_generate_the_same(folders) -> None:
    with_mtp, without = weights_of(folders / "hf"), weights_of(folders / "without")
    assert without.keys() == {n for n in with_mtp if "layers.2." not in n and "layers.3." not in n}
    assert all(torch.equal(without[name], with_mtp[name]) for name in without)
    assert "num_nextn_predict_layers" not in config_of(folders / "without")
    ids = torch.randint(90, (2, 5), generator=torch.Generator().manual_seed(1))
    made = []
    for folder in ("hf", "without"):
        model, report = CoeForCausalLM.from_pretrained(folders / folder, output_loading_info=True)
        assert not report["missing_keys"] and not report["unexpected_keys"]
        made.append(model.generate(ids, max_new_tokens=12, do_sample=False))
    assert torch.equal(*made)


def test_an_import_without_them_is_that_of_the_smaller_model(folders, tmp_path) -> None:
    arguments = ["from-hf", "--input", str(folders / "hf"), "--output", str(tmp_path / "plain")]
    assert convert.main([*arguments, "--without-mtp"]) == 0
    step = from_hf(folders / "without", tmp_path / "other")
    settings = load_settings(tmp_path / "plain" / step.name / CONFIG_FILE)
    assert settings.model == load_settings(step / CONFIG_FILE).model
    to_hf(tmp_path / "plain", tmp_path / "again")
    again = weights_of(tmp_path / "again")
    expected = weights_of(folders / "without")
    assert again.keys() == expected.keys()
    assert all(torch.equal(again[name], expected[name]) for name in again)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            lambda weights: weights.pop(f"{FIRST}eh_proj.weight"),
            rf"lacks {FIRST}eh_proj.weight, which .*: --without-mtp",
        ),
        (
            lambda weights: weights[f"{FIRST}shared_head.head.weight"].mul_(2),
            rf"{FIRST}shared_head.head.weight differs from lm_head.weight.*--without-mtp",
        ),
        (
            lambda weights: weights.update({f"{FIRST}embed_tokens.weight": torch.ones(3, 32)}),
            rf"{FIRST}embed_tokens.weight has shape \[3, 32\]",
        ),
        (
            lambda weights: weights.update({"model.layers.4.enorm.weight": torch.ones(32)}),
            r"holds model.layers.4.enorm.weight, which is no weight",
        ),
    ],
    ids=["missing", "another head", "shape", "one more"],
)
def test_wrong_layers_are_named(folders, tmp_path, change, told) -> None:
    write_random_model(tmp_path / "hf", seed=5, **MODEL)
    change_weights(tmp_path / "hf", change)
    with pytest.raises(ValueError, match=told):
        from_hf(tmp_path / "hf", tmp_path / "checkpoints")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_copies_may_be_left_out(folders, tmp_path) -> None:
    """Other software writes them once."""
    write_random_model(tmp_path / "hf", seed=5, **MODEL)
    for layer in ("model.layers.2.", "model.layers.3."):
        for name in ("embed_tokens.weight", "shared_head.head.weight"):
            change_weights(tmp_path / "hf", lambda weights, key=layer + name: weights.pop(key))
    from_hf(tmp_path / "hf", tmp_path / "checkpoints")
    to_hf(tmp_path / "checkpoints", tmp_path / "again")
    again, expected = weights_of(tmp_path / "again"), weights_of(folders / "hf")
    assert again.keys() == expected.keys()
    assert all(torch.equal(again[name], expected[name]) for name in again)


def test_transformers_own_class_has_none(tmp_path) -> None:
    changes = {"coe_iterations": 1, "coe_residual": "outer", "mtp_num_layers": 1}
    write_random_model(tmp_path / "hf", seed=9, **changes)
    from_hf(tmp_path / "hf", tmp_path / "checkpoints")
    with pytest.raises(
        ValueError, match=r"num_nextn_predict_layers=1 .* deepseek_v2.*--without-mtp"
    ):
        to_hf(tmp_path / "checkpoints", tmp_path / "native", family="deepseek_v2")
    to_hf(tmp_path / "checkpoints", tmp_path / "native", family="deepseek_v2", mtp=False)
    assert "num_nextn_predict_layers" not in config_of(tmp_path / "native")


def test_a_run_with_them_starts_from_no_checkpoint_without(folders, tmp_path) -> None:
    step = from_hf(folders / "without", tmp_path / "checkpoints")
    settings = load_settings(step / CONFIG_FILE)
    settings.model["mtp_num_layers"] = 1
    (change,) = changes(load_settings(step / CONFIG_FILE), settings, model_only=True)
    assert str(change) == "model.mtp_num_layers was None and is 1" and change.is_refused


def test_a_layer_means_what_megatrons_does(folders, single_rank) -> None:
    """DeepSeek-V3, eq. 21 to 23, in plain torch on the folder's names: final states [B, S, H]."""
    model = CoeForCausalLM.from_pretrained(folders / "hf").eval()
    weights = weights_of(folders / "hf")
    ids_BS = torch.randint(90, (2, 12), generator=torch.Generator().manual_seed(2))
    expected = _megatrons_states(folders / "checkpoints" / "step_00000000", ids_BS, single_rank)
    assert len(expected) == 2
    with torch.no_grad():
        x_BSH = model.model(ids_BS).last_hidden_state
        positions = torch.arange(12).expand_as(ids_BS)
        for depth, theirs_BSH in enumerate(expected):
            own = {n.removeprefix(f"model.layers.{2 + depth}."): w for n, w in weights.items()}
            seen_BS = torch.nn.functional.pad(ids_BS[:, depth + 1 :], (0, depth + 1))
            x_BSH = _mtp_layer(model, own, x_BSH, seen_BS, positions)
            known = slice(0, 12 - depth - 1)
            torch.testing.assert_close(x_BSH[:, known], theirs_BSH[:, known], rtol=0, atol=1e-5)


def _mtp_layer(model, own: dict[str, Tensor], x: Tensor, seen_BS: Tensor, positions) -> Tensor:
    config = model.config

    def norm(name: str, value: Tensor) -> Tensor:
        module = CoeRMSNorm(config.hidden_size, config.rms_norm_eps)
        module.weight.data = own[f"{name}.weight"]
        return module(value)

    embedded = torch.nn.functional.embedding(seen_BS, own["embed_tokens.weight"])
    joined = torch.cat([norm("enorm", embedded), norm("hnorm", x)], dim=-1)
    layer = CoeDecoderLayer(config, config.num_hidden_layers - 1).eval()
    layer.load_state_dict({name: own[name] for name in layer.state_dict()})
    rotary = model.model.rotary_emb(x, positions)
    return norm(
        "shared_head.norm", layer(joined @ own["eh_proj.weight"].T, position_embeddings=rotary)
    )


def _megatrons_states(step, ids_BS: Tensor, device) -> list[Tensor]:
    clear_aux_losses()
    trainer = make_trainer(load_settings(step / CONFIG_FILE), device)
    load_checkpoint(step, trainer.train_state)
    (chunk,) = trainer.train_state.chunks
    states: list[Tensor] = []
    for layer in chunk.module.mtp.layers:
        layer.register_forward_hook(lambda _module, _args, out: states.append(out[0]))
    positions = torch.arange(ids_BS.shape[1]).expand_as(ids_BS)
    with torch.no_grad():
        chunk.eval()(ids_BS, positions, None, labels=ids_BS)
    return [state.transpose(0, 1) for state in states]
