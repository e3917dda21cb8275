"""Conversion in both directions is exact, and what is wrong is named before anything is written."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GenerationConfig

from megatron_coe.checkpoint.manifest import digest_folder, write_manifest
from megatron_coe.checkpoint.safe_unpickle import read_index
from megatron_coe.checkpoint.state import load_checkpoint
from megatron_coe.config.loader import load_settings
from megatron_coe.conversion.export_hf import to_hf
from megatron_coe.conversion.import_hf import from_hf
from megatron_coe.data.records import Fields
from megatron_coe.data.tokenizer import train_tokenizer
from megatron_coe.hf import CoeForCausalLM
from megatron_coe.utils.run_files import CONFIG_FILE
from tests.golden import CASES, GOLDEN
from tests.unit.conversion.models import megatron_logits, megatron_loss, write_random_model
from tests.unit.data.texts import random_texts, write_jsonl
from tests.unit.hf.small import NATIVE_HAS_MSCALE
from tests.unit.training.runs import make_settings, make_trainer

TOLERANCE = 1e-5
PLAIN = {"multi_latent_attention": False}
MODELS = {
    "one iteration": {"coe_iterations": 1, "coe_residual": "outer"},
    "two": {"coe_iterations": 2},
    "two, inner_outer, no shared expert": {
        "coe_iterations": 2,
        "coe_residual": "inner_outer",
        "moe_shared_expert_intermediate_size": None,
    },
    "three, addinit, one gate": {
        "coe_iterations": 3,
        "coe_residual": "addinit",
        "coe_independent_gate": False,
        "moe_shared_expert_intermediate_size": 32,
    },
    "four": {"coe_iterations": 4, "q_lora_rank": 12},
    "two, none": {"coe_residual": "none"},
    "dense layer first, sigmoid scores with biases": {
        "moe_layer_freq": [0, 1],
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_topk_scaling_factor": 2.5,
        "layernorm_epsilon": 1e-5,
    },
    "every other layer dense, no yarn": {
        "moe_layer_freq": 2,
        "rope_type": "rope",
        "rotary_scaling_factor": 1.0,
        "coe_residual": "outer",
    },
    "upcycled": {"coe_iterations": 3, "coe_residual": "outer", "coe_upcycled": True},
    "renormalized scores": {"moe_router_pre_softmax": False},
    "scaled scores": {"moe_router_topk_scaling_factor": 1.5, "coe_residual": "outer"},
    "plain attention": {**PLAIN, "coe_residual": "outer"},
    "plain attention, grouped, tied, with biases and norms": {
        **PLAIN,
        "num_query_groups": 2,
        "kv_channels": 16,
        "add_qkv_bias": True,
        "qk_layernorm": True,
        "share_embeddings_and_output_weights": True,
        "moe_layer_freq": [0, 1],
    },
    "multi-token prediction": {"mtp_num_layers": 2, "vocab_size": 90},
    "multi-token prediction, tied, a dense layer last": {
        **PLAIN,
        "mtp_num_layers": 1,
        "share_embeddings_and_output_weights": True,
        "moe_layer_freq": [1, 0],
    },
}


def weights_of(folder) -> dict[str, torch.Tensor]:
    merged = {}
    for path in sorted(folder.glob("model*.safetensors")):
        content = load_file(path)
        assert not merged.keys() & content.keys()
        merged |= content
    return merged


def assert_same_bits(left, right) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype, name
        assert torch.equal(left[name], right[name]), name


@pytest.mark.parametrize("case", CASES)
def test_a_golden_model_goes_through_megatron_unchanged(single_rank, tmp_path, case):
    step = from_hf(GOLDEN / case, tmp_path / "checkpoints")
    expected = load_file(GOLDEN / case / "expected.safetensors")
    logits = megatron_logits(step, expected["input_ids"].long(), single_rank)
    torch.testing.assert_close(logits, expected["logits"], rtol=0, atol=TOLERANCE)

    to_hf(tmp_path / "checkpoints", tmp_path / "hf")
    assert_same_bits(weights_of(tmp_path / "hf"), weights_of(GOLDEN / case))
    original, exported = said_of(GOLDEN / case), said_of(tmp_path / "hf")
    newer_spelling = {"residual"} if "inner_residual" in original else set()
    assert original.items() <= exported.items()
    assert exported.keys() - original.keys() <= newer_spelling


def said_of(folder: Path) -> dict:
    """`config.json` without what only newer exports say: a class more, YaRN under its own name."""
    config = json.loads((folder / "config.json").read_text())
    config.get("auto_map", {}).pop("AutoModelForSequenceClassification", None)
    (config.get("rope_scaling") or {}).pop("rope_type", None)
    return config


@pytest.mark.parametrize("name", MODELS)
def test_both_models_give_the_same_logits(single_rank, tmp_path, name):
    write_random_model(tmp_path / "hf", seed=len(name), **MODELS[name])
    step = from_hf(tmp_path / "hf", tmp_path / "checkpoints")
    ids = torch.randint(90, (2, 20), generator=torch.Generator().manual_seed(1))
    logits = megatron_logits(step, ids, single_rank)

    model, report = CoeForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    with torch.no_grad():
        expected = model.eval()(ids).logits
    assert expected.std() > 0.1
    torch.testing.assert_close(logits, expected, rtol=0, atol=TOLERANCE)

    to_hf(tmp_path / "checkpoints", tmp_path / "again")
    assert_same_bits(weights_of(tmp_path / "again"), weights_of(tmp_path / "hf"))
    assert said_of(tmp_path / "again").items() >= said_of(tmp_path / "hf").items()


@pytest.mark.parametrize("residual", ["inner", "outer", "addinit", "inner_outer", "none"])
@pytest.mark.parametrize("C", [1, 2, 3, 4])
def test_every_coe_model_gives_the_same_logits(single_rank, tmp_path, C, residual):
    """With shared and independent gates, with and without a shared expert, both attentions."""
    ids = torch.randint(96, (2, 20), generator=torch.Generator().manual_seed(C))
    choices = itertools.product((True, False), (16, None), (True, False))
    for number, (independent, shared, latent) in enumerate(choices):
        folder = tmp_path / str(number)
        write_random_model(
            folder,
            seed=number,
            num_layers=1,
            coe_iterations=C,
            coe_residual=residual,
            coe_independent_gate=independent,
            moe_shared_expert_intermediate_size=shared,
            multi_latent_attention=latent,
        )
        step = from_hf(folder, tmp_path / f"{number}-checkpoint")
        logits = megatron_logits(step, ids, single_rank)
        with torch.no_grad():
            expected = CoeForCausalLM.from_pretrained(folder).eval()(ids).logits
        told = f"{independent=} {shared=} {latent=}: {{}}".format
        torch.testing.assert_close(logits, expected, rtol=0, atol=TOLERANCE, msg=told)


def test_a_trained_checkpoint_without_its_layout(single_rank, tmp_path):
    """As training saves it, optimizer and all, with a padded vocabulary."""
    changes = {"vocab_size": 90, "make_vocab_size_divisible_by": 64}
    settings = make_settings(tmp_path / "run", model=changes, train={"steps": 2})
    trainer = make_trainer(settings, single_rank)
    trainer.run()
    to_hf(tmp_path / "run", tmp_path / "hf")
    (chunk,) = trainer.train_state.chunks
    trained = dict(chunk.module.named_parameters())
    exported = weights_of(tmp_path / "hf")
    assert torch.equal(
        exported["model.embed_tokens.weight"], trained["embedding.word_embeddings.weight"][:90]
    )
    # The parity tests compare every weight; here it is enough that it is the trained one.
    assert torch.equal(
        exported["model.layers.1.mlp.gate.1.weight"],
        trained["decoder.layers.1.mlp.router.1.weight"],
    )
    from_hf(tmp_path / "hf", tmp_path / "back")
    to_hf(tmp_path / "back", tmp_path / "again")
    assert_same_bits(weights_of(tmp_path / "again"), exported)


def test_what_a_folder_says_of_generation_survives(tmp_path):
    write_random_model(tmp_path / "hf", seed=7)
    said = {"do_sample": True, "temperature": 0.6, "max_new_tokens": 17, "eos_token_id": [2, 5]}
    (tmp_path / "hf" / "generation_config.json").write_text(json.dumps(said))
    to_hf(from_hf(tmp_path / "hf", tmp_path / "checkpoints"), tmp_path / "out")
    kept = GenerationConfig.from_pretrained(tmp_path / "out")
    assert {name: getattr(kept, name) for name in said} == said


def test_a_run_that_takes_its_vocabulary_from_its_tokenizer(tmp_path):
    texts = write_jsonl(tmp_path / "texts.jsonl", [{"text": text} for text in random_texts(200, 1)])
    tokenizer = tmp_path / "t.model"
    train_tokenizer([texts], tokenizer, fields=Fields(), vocab_size=300)
    write_random_model(tmp_path / "hf", seed=7, vocab_size=300)
    step = from_hf(tmp_path / "hf", tmp_path / "checkpoints")
    settings = load_settings(step / CONFIG_FILE)
    del settings.model["vocab_size"]
    settings.data.tokenizer = str(tokenizer)
    (step / CONFIG_FILE).write_text(settings.to_yaml())
    with pytest.raises(ValueError, match=r"step_00000000 is bad: .*config\.yaml"):
        to_hf(tmp_path / "checkpoints", tmp_path / "out")
    write_manifest(step, 0, digest_folder(step))

    to_hf(tmp_path / "checkpoints", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
    assert config["vocab_size"] == 300
    assert special.items() <= config.items()
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == special
    assert (tmp_path / "out" / "tokenizer.json").is_file()

    tokenizer.unlink()
    with pytest.raises(ValueError, match=r"t\.model does not exist"):
        to_hf(tmp_path / "checkpoints", tmp_path / "second")
    assert not (tmp_path / "second").exists()


@pytest.mark.parametrize(
    "name",
    ["two", "dense layer first, sigmoid scores with biases", "multi-token prediction"],
)
def test_an_import_has_the_keys_of_a_run(single_rank, tmp_path, name):
    """So whatever loads a run's checkpoint, Transformer Engine's modules too, loads an import."""
    write_random_model(tmp_path / "hf", seed=8, **MODELS[name])
    step = from_hf(tmp_path / "hf", tmp_path / "imported")
    settings = load_settings(step / CONFIG_FILE)
    assert settings.model.get("backend", "auto") == "auto"
    settings.checkpoint.save = str(tmp_path / "run")
    make_trainer(settings, single_rank).save()
    imported, trained = (
        {
            key
            for key in read_index(path).state_dict_metadata
            if not key.startswith(("optimizer.", "rng/"))
        }
        for path in (step, tmp_path / "run" / step.name)
    )
    assert imported == trained


def test_small_files_hold_the_same_weights(single_rank, tmp_path):
    weights = write_random_model(tmp_path / "hf", seed=3)
    from_hf(tmp_path / "hf", tmp_path / "checkpoints")
    limit = 20_000
    to_hf(tmp_path / "checkpoints", tmp_path / "small", max_shard_size=limit)
    files = sorted(path.name for path in (tmp_path / "small").glob("*.safetensors"))
    assert len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    for file in files:
        content = load_file(tmp_path / "small" / file)
        assert sum(tensor.nbytes for tensor in content.values()) <= limit
    assert_same_bits(weights_of(tmp_path / "small"), weights)
    index = json.loads((tmp_path / "small" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == weights.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in weights.values())

    from_hf(tmp_path / "small", tmp_path / "back")
    to_hf(tmp_path / "back", tmp_path / "one")
    assert_same_bits(weights_of(tmp_path / "one"), weights)
    loaded = CoeForCausalLM.from_pretrained(tmp_path / "small")
    assert torch.equal(loaded.lm_head.weight, weights["lm_head.weight"])


def test_bf16_rounds_all_but_the_biases_of_routers(single_rank, tmp_path):
    changes = MODELS["dense layer first, sigmoid scores with biases"]
    weights = write_random_model(tmp_path / "hf", seed=4, **changes)
    from_hf(tmp_path / "hf", tmp_path / "checkpoints")
    to_hf(tmp_path / "checkpoints", tmp_path / "narrow", dtype=torch.bfloat16)
    narrow = weights_of(tmp_path / "narrow")
    for name, tensor in weights.items():
        kept = tensor if name.endswith("e_score_correction_bias") else tensor.bfloat16()
        assert torch.equal(narrow[name], kept), name
    assert (
        json.loads((tmp_path / "narrow" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    )

    from_hf(tmp_path / "narrow", tmp_path / "back")
    to_hf(tmp_path / "back", tmp_path / "again")
    assert_same_bits(weights_of(tmp_path / "again"), narrow)


def change_weights(folder, change) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


EXPERT = "model.layers.1.mlp.experts.4.up_proj.weight"
NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda weights: weights.pop(EXPERT), EXPERT),
        (lambda weights: weights.update(surplus=torch.ones(2)), "surplus"),
        (lambda weights: weights[EXPERT].zero_(), EXPERT),
        (lambda weights: weights.update({EXPERT: torch.ones(3, 32)}), rf"{EXPERT}.*\[3, 32\]"),
        (lambda weights: weights.update({EXPERT: torch.ones(16, 32).int()}), EXPERT),
        (lambda weights: weights.update({EXPERT: weights[EXPERT].half()}), f"{EXPERT}.*different"),
        (lambda weights: weights[EXPERT][3].fill_(torch.nan), rf"safetensors: {EXPERT}.*NaN"),
        (lambda weights: weights[NORM][3].fill_(-torch.inf), rf"safetensors: {NORM}.*infinite"),
    ],
    ids=["missing", "surplus", "zero expert", "shape", "type", "two types", "NaN", "infinite"],
)
def test_a_wrong_weight_is_named(tmp_path, change, told):
    write_random_model(tmp_path / "hf", seed=5)
    change_weights(tmp_path / "hf", change)
    with pytest.raises(ValueError, match=told):
        from_hf(tmp_path / "hf", tmp_path / "checkpoints")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """A folder in several files, and the checkpoint made of it."""
    root = tmp_path_factory.mktemp("imported")
    write_random_model(root / "hf", seed=6)
    from_hf(root / "hf", root / "checkpoints")
    to_hf(root / "checkpoints", root / "small", max_shard_size=20_000)
    return root


def test_damaged_files_are_named(imported, tmp_path):
    first = "model-00001-of"
    for damage, told in (
        (lambda path: path.unlink(), rf"{first}.* is missing"),
        (lambda path: path.write_bytes(path.read_bytes()[:-100]), rf"{first}.*not a complete"),
    ):
        folder = tmp_path / "damaged"
        shutil.copytree(imported / "small", folder)
        damage(next(folder.glob(f"{first}*")))
        with pytest.raises(ValueError, match=told):
            from_hf(folder, tmp_path / "checkpoints")
        shutil.rmtree(folder)
    assert not list(tmp_path.iterdir())


def test_a_weight_in_two_files_is_named(imported, tmp_path):
    folder = shutil.copytree(imported / "small", tmp_path / "hf")
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    first, last = min(index.values()), max(index.values())
    twice = next(name for name, file in index.items() if file == first)
    content = load_file(folder / last)
    save_file(content | {twice: load_file(folder / first)[twice]}, folder / last)
    with pytest.raises(ValueError, match=rf"{last}: holds {twice}, which the index says .*{first}"):
        from_hf(folder, tmp_path / "checkpoints")
    save_file(content, folder / last)
    shutil.copy(imported / "hf" / "model.safetensors", folder)
    with pytest.raises(
        ValueError, match=r"model\.safetensors and .*index\.json, which does not name it"
    ):
        from_hf(folder, tmp_path / "checkpoints")


def test_an_index_may_name_files_of_subfolders(imported, tmp_path):
    folder = shutil.copytree(imported / "small", tmp_path / "hf")
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    for number, file in enumerate(sorted(set(index["weight_map"].values()))):
        (folder / f"part{number % 2}").mkdir(exist_ok=True)
        (folder / file).rename(folder / f"part{number % 2}" / file)
        for name, named in index["weight_map"].items():
            if named == file:
                index["weight_map"][name] = f"part{number % 2}/{file}"
    path.write_text(json.dumps(index))
    assert CoeForCausalLM.from_pretrained(folder)
    from_hf(folder, tmp_path / "checkpoints")
    to_hf(tmp_path / "checkpoints", tmp_path / "again")
    assert_same_bits(weights_of(tmp_path / "again"), weights_of(imported / "hf"))
    index["weight_map"][EXPERT] = "../outside.safetensors"
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"index\.json: names \.\./outside\.safetensors"):
        from_hf(folder, tmp_path / "second")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"model_type": "gpt2"}, "model_type='gpt2'"),
        ({"residual": "outer"}, "residual='outer' disagrees"),
        ({"n_routed_experts": 8}, r"experts\.7"),
        ({"n_routed_experts": 6}, r"gate.*\[7, 32\].*\[6, 32\]|experts\.6"),
        ({"inner_iter": 3}, r"gate\.2\.weight"),
        ({"num_experts_per_tok": 9}, "moe_router_topk=9"),
        ({"hidden_act": "relu"}, "hidden_act='relu'"),
        ({"kv_lora_rank": None}, "kv_lora_rank"),
    ],
)
def test_a_configuration_that_disagrees_is_named(imported, tmp_path, change, told):
    shutil.copytree(imported / "hf", tmp_path / "hf")
    path = tmp_path / "hf" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=told):
        from_hf(tmp_path / "hf", tmp_path / "checkpoints")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


def test_a_checkpoint_of_another_model_is_refused(imported, tmp_path):
    shutil.copytree(imported / "checkpoints", tmp_path / "checkpoints")
    path = tmp_path / "checkpoints" / "step_00000000" / "config.yaml"
    original = path.read_text()
    for pattern, change, told in (
        (r"coe_iterations: \d", "coe_iterations: 3", r"lacks .*router\.2\.weight of layer 0"),
        (r"coe_iterations: \d", "coe_iterations: 1", r"holds .*router\.1\.weight"),
        (r"hidden_size: \d+", "hidden_size: 64", r"word_embeddings.*\[128, 32\].*\[128, 64\]"),
        (r"rotary_base: \d+", "rotary_percent: 0.5", "rotary_percent=0.5"),
    ):
        changed, count = re.subn(rf"(?m)^  {pattern}$", f"  {change}", original)
        assert count == 1, pattern
        path.write_text(changed)
        write_manifest(path.parent, 0, digest_folder(path.parent))
        with pytest.raises(ValueError, match=told):
            to_hf(tmp_path / "checkpoints", tmp_path / "hf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints"]


def test_a_damaged_checkpoint_leaves_nothing(imported, tmp_path):
    shutil.copytree(imported / "checkpoints", tmp_path / "checkpoints")
    (data,) = (tmp_path / "checkpoints" / "step_00000000").glob("*.distcp")
    data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"__0_0\.distcp has .* bytes, manifest\.json says"):
        to_hf(tmp_path / "checkpoints", tmp_path / "hf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints"]


def test_an_existing_folder_is_not_touched(imported, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("precious")
    for convert, source in ((to_hf, "checkpoints"), (from_hf, "hf")):
        with pytest.raises(ValueError, match="exists already"):
            convert(imported / source, tmp_path / "mine")
    assert (tmp_path / "mine" / "file").read_text() == "precious"


def test_exported_files(imported):
    """All that a user needs is there, and the code is the package's own."""
    names = {path.name for path in (imported / "small").iterdir()}
    assert {"config.json", "generation_config.json", "README.md"} <= names
    for name in ("configuration_coe.py", "modeling_coe.py"):
        assert "import megatron" not in (imported / "small" / name).read_text()
    with safe_open(next((imported / "small").glob("*.safetensors")), framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


NATIVE = {
    "one iteration": {},
    "dense layer first, low-rank queries": {"moe_layer_freq": [0, 1], "q_lora_rank": 12},
    "scaled scores, two shared experts, no yarn": {
        "moe_router_topk_scaling_factor": 1.5,
        "moe_shared_expert_intermediate_size": 32,
        "rope_type": "rope",
        "rotary_scaling_factor": 1.0,
    },
    "yarn's mscale alone, two dense layers of three": {
        "mscale": 0.707,
        "mscale_all_dim": 0.0,
        "num_layers": 3,
        "moe_layer_freq": [0, 0, 1],
    },
}


@pytest.mark.parametrize("name", NATIVE)
def test_one_iteration_is_a_model_of_transformers(single_rank, tmp_path, name):
    if not NATIVE_HAS_MSCALE and "no yarn" not in name and "mscale alone" not in name:
        pytest.skip("this transformers' deepseek_v2 leaves yarn's mscale out of attention")
    changes = {"coe_iterations": 1, "coe_residual": "outer", **NATIVE[name]}
    weights = write_random_model(tmp_path / "hf", seed=9, **changes)
    step = from_hf(tmp_path / "hf", tmp_path / "checkpoints")
    to_hf(tmp_path / "checkpoints", tmp_path / "native", family="deepseek_v2")
    assert not list((tmp_path / "native").glob("*.py"))

    model, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "native", output_loading_info=True
    )
    assert type(model).__name__ == "DeepseekV2ForCausalLM"
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    ids = torch.randint(96, (2, 20), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = model.eval()(ids).logits
    logits = megatron_logits(step, ids, single_rank)
    torch.testing.assert_close(logits, expected, rtol=0, atol=TOLERANCE)

    # And back, from what transformers itself writes.
    model.save_pretrained(tmp_path / "saved")
    step = from_hf(tmp_path / "saved", tmp_path / "imported")
    logits = megatron_logits(step, ids, single_rank)
    torch.testing.assert_close(logits, expected, rtol=0, atol=TOLERANCE)
    to_hf(tmp_path / "imported", tmp_path / "again", family="deepseek_v2")
    native = weights_of(tmp_path / "native")
    assert_same_bits(weights_of(tmp_path / "again"), native)
    assert len(native) == len(weights)


def test_an_imported_model_has_the_loss_that_transformers_says(single_rank, tmp_path):
    """Though its vocabulary of 90 ids is padded to 128, which would add about ln(128 / 90)."""
    changes = NATIVE["scaled scores, two shared experts, no yarn"]
    one = {"coe_iterations": 1, "coe_residual": "outer", "vocab_size": 90}
    write_random_model(tmp_path / "written", seed=11, **one, **changes)
    to_hf(from_hf(tmp_path / "written", tmp_path / "first"), tmp_path / "hf", family="deepseek_v2")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    assert type(model).__name__ == "DeepseekV2ForCausalLM"
    ids = torch.randint(90, (2, 19), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = model(ids, labels=ids).loss.item()

    loss = megatron_loss(from_hf(tmp_path / "hf", tmp_path / "checkpoints"), ids, single_rank)
    assert loss == pytest.approx(expected, rel=1e-6)


def test_what_transformers_ignores_is_said_at_import(tmp_path, capfd):
    write_random_model(tmp_path / "hf", seed=9, coe_iterations=1, coe_residual="outer")
    from_hf(tmp_path / "hf", tmp_path / "checkpoints")
    to_hf(tmp_path / "checkpoints", tmp_path / "native", family="deepseek_v2")
    from_hf(tmp_path / "native", tmp_path / "plain")
    assert not capfd.readouterr().err
    path = tmp_path / "native" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"norm_topk_prob": True}))
    step = from_hf(tmp_path / "native", tmp_path / "imported")
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"{path}: norm_topk_prob=True")
    assert load_settings(step / CONFIG_FILE).model["moe_router_pre_softmax"] is False


@pytest.mark.skipif(
    not NATIVE_HAS_MSCALE,
    reason="this transformers' deepseek_v2 leaves yarn's mscale out, and has no groups",
)
def test_limited_groups_route_every_token_as_transformers_does(single_rank, tmp_path):
    """8 groups, 3 kept, top-6: where DeepSeek-V2's rule and Megatron's own choose differently."""
    groups = {"moe_router_num_groups": 8, "moe_router_group_topk": 3, "moe_router_topk": 6}
    write_random_model(
        tmp_path / "written",
        seed=10,
        coe_iterations=1,
        coe_residual="outer",
        num_moe_experts=32,
        moe_router_group_score="max",
        **groups,
    )
    from_hf(tmp_path / "written", tmp_path / "checkpoints")
    to_hf(tmp_path / "checkpoints", tmp_path / "native", family="deepseek_v2")
    config = json.loads((tmp_path / "native" / "config.json").read_text())
    assert config["topk_method"] == "group_limited_greedy"
    assert (config["n_group"], config["topk_group"]) == (8, 3)

    native = AutoModelForCausalLM.from_pretrained(tmp_path / "native").eval()
    theirs = []
    for layer in native.model.layers:
        layer.mlp.gate.register_forward_hook(lambda _gate, _args, out: theirs.append(out[2]))
    ids = torch.randint(96, (8, 20), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = native(ids).logits

    step = from_hf(tmp_path / "native", tmp_path / "imported")
    settings = load_settings(step / CONFIG_FILE)
    trainer = make_trainer(settings, single_rank)
    load_checkpoint(step, trainer.train_state)
    (model,) = trainer.train_state.chunks
    ours, by_sum = [], []
    for layer in model.module.decoder.layers:
        layer.mlp.router.register_forward_hook(lambda _router, _args, out: ours.append(out[1]))
        layer.mlp.router.register_forward_hook(
            lambda router, args, _out: by_sum.append(_megatrons_choice(router, args[0]))
        )
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    with torch.no_grad():
        logits = model.eval()(ids, positions, None)[..., : config["vocab_size"]]
    torch.testing.assert_close(logits, expected, rtol=0, atol=TOLERANCE)
    assert len(ours) == len(theirs) == len(by_sum) == 2
    for mine_TK, chosen, other_TN in zip(ours, theirs, by_sum, strict=True):
        # Megatron's tokens are sequence first.
        chosen_TK = chosen.view(*ids.shape, -1).transpose(0, 1).flatten(0, 1)
        assert torch.equal(mine_TK.sort().values, chosen_TK.sort().values)
        other_TK = other_TN.nonzero()[:, 1].view(-1, 6)
        assert (mine_TK.sort().values != other_TK).any(dim=1).float().mean() > 0.1


def _megatrons_choice(router, x_SBH: torch.Tensor) -> torch.Tensor:
    """The map of Megatron's own rule for the same scores [T, N]."""
    logits = router.gating(x_SBH).flatten(0, 1)
    return topk_routing_with_score_function(
        logits, router.topk, use_pre_softmax=True, num_groups=8, group_topk=3
    )[1]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"coe_residual": "inner"}, "residual='inner'"),
        ({"coe_iterations": 2}, "inner_iter=2"),
        ({"moe_shared_expert_intermediate_size": None}, "n_shared_experts=0"),
        ({"moe_router_pre_softmax": False}, "norm_topk_prob=True"),
        ({"moe_router_score_function": "sigmoid"}, "norm_topk_prob=True"),
        ({"multi_latent_attention": False}, "attention_type='mha'"),
        ({"layernorm_epsilon": 1e-5}, "latent_norm_eps=1e-05"),
    ],
)
def test_what_transformers_class_cannot_be_is_refused(tmp_path, changes, told):
    changes = {"coe_iterations": 1, "coe_residual": "outer"} | changes
    write_random_model(tmp_path / "hf", seed=9, **changes)
    from_hf(tmp_path / "hf", tmp_path / "checkpoints")
    with pytest.raises(ValueError, match=rf"{told} cannot be expressed as deepseek_v2"):
        to_hf(tmp_path / "checkpoints", tmp_path / "native", family="deepseek_v2")
    assert not (tmp_path / "native").exists()
