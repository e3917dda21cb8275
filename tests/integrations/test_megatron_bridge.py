"""Hugging Face folders through Megatron-Bridge's `AutoBridge`, held to the package's converter.

Not part of `make test`: `make test-bridge` makes the environment. On CPUs, with gloo.
"""

from __future__ import annotations

import json
import os
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_coe.conversion.export_hf import to_hf
from megatron_coe.conversion.hf_config import MODEL_TYPE
from megatron_coe.conversion.import_hf import from_hf
from megatron_coe.conversion.initial_checkpoint import STEP_0
from megatron_coe.hf.weight_names import weights
from tests import golden
from tests.builders import tiny_provider
from tests.distributed.launch import launch
from tests.unit.conversion.models import write_folder, write_random_model

pytestmark = pytest.mark.bridge

DEEPSEEK_V2 = "c1_outer_is_standard_moe as deepseek_v2"
RANDOM = {
    "latent queries": {
        "q_lora_rank": 8,
        "moe_layer_freq": [0, 1],
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "share_embeddings_and_output_weights": True,
        "vocab_size": 94,
    },
    "plain attention": {
        "multi_latent_attention": False,
        "num_query_groups": 2,
        "add_qkv_bias": True,
        "qk_layernorm": True,
        "coe_residual": "outer",
        "coe_upcycled": True,
    },
    "multi-token prediction": {"mtp_num_layers": 2},
}
"""What the table of names holds besides the golden models: changed fields of the tiny model."""
CASES = [*golden.CASES, DEEPSEEK_V2, *RANDOM]

LAYOUTS = {
    "one rank": {},
    "EP 2": {"expert_model_parallel_size": 2},
    "TP 2": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "PP 2": {"pipeline_model_parallel_size": 2},
    "TP 2 EP 2": {
        "tensor_model_parallel_size": 2,
        "sequence_parallel": True,
        "expert_model_parallel_size": 2,
        "expert_tensor_parallel_size": 1,
    },
}
SEPARATE = "EP 2, a module per expert"
"""One layout with Megatron's `SequentialMLP`, whose experts have parameters of their own."""
RANKS = {name: 1 if name == "one rank" else 2 for name in [*LAYOUTS, SEPARATE]}


# --- folders ----------------------------------------------------------------------------------


def write_golden(case: str, folder: Path) -> None:
    """A golden model with an eighth expert: two ranks cannot share seven."""
    config = json.loads((golden.GOLDEN / case / "config.json").read_text())
    tensors = load_file(golden.GOLDEN / case / "model.safetensors")
    last = config["n_routed_experts"]
    for name in list(tensors):
        if f".experts.{last - 1}." in name:
            added = name.replace(f".experts.{last - 1}.", f".experts.{last}.")
            tensors[added] = tensors[name].flip(0).contiguous()
        elif ".mlp.gate." in name:
            tensors[name] = torch.cat([tensors[name], tensors[name][:1].neg()])
    write_folder(folder, config | {"n_routed_experts": last + 1}, tensors)


def write_tokenizer(folder: Path) -> None:
    """One of four words: Bridge writes no folder without a tokenizer."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    ids = {"<unk>": 0, "<s>": 1, "</s>": 2, "one": 3}
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(ids, unk_token="<unk>")),
        bos_token="<s>", eos_token="</s>", unk_token="<unk>",
    ).save_pretrained(folder)  # fmt: skip


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> Path:
    """Per case the converter's checkpoint, and the folder that it makes of that."""
    root = tmp_path_factory.mktemp("converted")
    for case in CASES:
        source, _, family = case.partition(" as ")
        home = root / case
        if case in RANDOM:
            write_random_model(home / "source", seed=7, num_moe_experts=8, **RANDOM[case])
        else:
            write_golden(source, home / "source")
        write_tokenizer(home / "source")
        from_hf(home / "source", home / "imported")
        to_hf(home / "imported", home / "hf", family=family or MODEL_TYPE)
        from_hf(home / "hf", home / "checkpoint")
    return root


# --- on each rank -----------------------------------------------------------------------------


def convert(root: str, layouts: list[str]) -> list[str]:
    """Read and write every folder by `AutoBridge` in every layout.

    Returns: what is not as in the converter's checkpoint, loaded in the same layout.
    """
    from megatron_coe.config.run_config import ParallelSettings
    from megatron_coe.distributed.process_groups import parallel_groups
    from megatron_coe.integrations.megatron_bridge import register_deepseek_v2

    register_deepseek_v2()
    wrong = []
    for layout in layouts:
        changes = dict(LAYOUTS.get(layout, LAYOUTS["EP 2"]))
        with parallel_groups(ParallelSettings(**changes)):
            for case in CASES:
                found = _convert(Path(root) / case, layout, changes)
                wrong += [f"{layout}, {case}: {what}" for what in found]
    return wrong


def _convert(home: Path, layout: str, changes: dict) -> list[str]:
    from megatron.bridge import AutoBridge

    grouped, padded = layout != SEPARATE, "TP" in layout
    bridge = AutoBridge.from_hf_pretrained(home / "hf", trust_remote_code=True)
    provider = bridge.to_megatron_provider()
    changed = {**changes, "moe_grouped_gemm": grouped, "should_pad_vocab": padded}
    for name, value in changed.items():
        setattr(provider, name, value)
    provider.finalize()
    chunks = provider.provide_distributed_model(wrap_with_ddp=False)
    model = {"moe_grouped_gemm": grouped} | ({} if padded else {"make_vocab_size_divisible_by": 1})
    theirs = _converters_model(home / "checkpoint" / STEP_0, changes, model)
    described = bridge._model_bridge.megatron_to_hf_config(provider)
    wrong = _differences(provider, theirs.config) + _misdescribed(described, home)
    read = chunks[0].state_dict()
    wrong += [
        name
        for name, tensor in theirs.state_dict().items()
        if isinstance(tensor, torch.Tensor) and not torch.equal(tensor, read[name])
    ]
    bridge.save_hf_pretrained(chunks, home / layout, show_progress=False)
    return wrong


def _converters_model(step: Path, changes: dict, fields: dict) -> torch.nn.Module:
    """This rank's part of the converter's checkpoint, as Megatron itself loads it."""
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from megatron_coe.config.loader import load_settings
    from megatron_coe.config.model_section import build_provider
    from megatron_coe.config.run_config import ParallelSettings
    from megatron_coe.utils.run_files import CONFIG_FILE

    settings = load_settings(step / CONFIG_FILE)
    settings.parallel = ParallelSettings(**changes)
    settings.model |= fields
    model_parallel_cuda_manual_seed(1)  # what is drawn with it is loaded over
    model = build_provider(settings, torch.device("cpu")).provide()
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    metadata = {"singleton_local_shards": False, "dp_cp_group": group}
    state = {"model": model.sharded_state_dict(metadata=metadata)}
    model.load_state_dict(dist_checkpointing.load(state, str(step))["model"])
    return model


NO_PART_OF_THE_MODEL = {
    "backend",  # the converter writes for the one without Transformer Engine
    "make_vocab_size_divisible_by",
    "calculate_per_token_loss",
    "perform_initialization",  # Bridge: nothing is drawn where weights are read
    "seq_length",  # the converter leaves it to the run; Bridge takes the longest there is
}


def _differences(provider: object, theirs: object) -> list[str]:
    """Fields of the converter's model configuration that Bridge's provider has otherwise."""
    names = {field.name for field in fields(theirs)} - NO_PART_OF_THE_MODEL
    pairs = {name: (getattr(provider, name), getattr(theirs, name)) for name in sorted(names)}
    return [
        f"{name}={got!r}, not {expected!r}"
        for name, (got, expected) in pairs.items()
        if got != expected and not callable(expected)
    ]


def _misdescribed(config: dict, home: Path) -> list[str]:
    """Keys of the model that the converter's config.json has otherwise, or alone.

    Apart from what is added as a folder is written: the tokenizer's ids, and the name of YaRN.
    """
    written = json.loads((home / "hf" / "config.json").read_text())
    theirs = _without_rope_type(written, "bos_token_id", "eos_token_id")
    config = _without_rope_type(config)
    kept = json.loads((home / "source" / "config.json").read_text())
    if home.name in RANDOM:  # theirs is the imported folder's own, which no model of this shape has
        config = config | {"max_position_embeddings": theirs["max_position_embeddings"]}
    wrong = [key for key, value in config.items() if key not in theirs or theirs[key] != value]
    return [f"key {key}" for key in wrong + sorted(theirs.keys() - config.keys() - kept.keys())]


def _without_rope_type(config: dict, *others: str) -> dict:
    rope = {key: v for key, v in (config["rope_scaling"] or {}).items() if key != "rope_type"}
    kept = {key: value for key, value in config.items() if key not in others}
    return kept | {"rope_scaling": rope or None}


# --- tests ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def read(converted) -> list[str]:
    """What was not right as the folders were read; they are written again on the way."""
    os.environ["HF_MODULES_CACHE"] = str(converted / "modules")
    wrong = []
    for ranks in sorted(set(RANKS.values())):
        layouts = [layout for layout, needed in RANKS.items() if needed == ranks]
        results = launch(
            "tests.integrations.test_megatron_bridge:convert", ranks, str(converted), layouts,
            timeout_s=1800.0,
        )  # fmt: skip
        wrong += [what for of_rank in results for what in of_rank]
    return wrong


@pytest.mark.parametrize("layout", RANKS)
@pytest.mark.parametrize("case", CASES)
def test_it_reads_what_the_converter_reads(read, case, layout) -> None:
    assert [what for what in read if what.startswith(f"{layout}, {case}: ")] == []


@pytest.mark.parametrize("layout", RANKS)
@pytest.mark.parametrize("case", CASES)
def test_it_writes_what_the_converter_writes(read, converted, case, layout) -> None:
    ours, bridges = converted / case / "hf", converted / case / layout
    expected = load_file(ours / "model.safetensors")
    written = load_file(bridges / "model.safetensors")
    assert written.keys() == expected.keys()
    for name, tensor in written.items():
        assert tensor.dtype == expected[name].dtype and torch.equal(tensor, expected[name]), name
    assert _description(bridges, case) == _description(ours, case)


def _description(folder: Path, case: str) -> dict:
    """All of `config.json` but what transformers notes of itself and of the folder.

    As it stands for the golden models. In its own family transformers writes other spellings, and
    where a key may be left out its default: the others are compared as it reads them. Bridge has
    the class write its configuration, which leaves out the `rope_type` that the converter adds.
    """
    from transformers import AutoConfig

    import megatron_coe.hf.auto  # noqa: F401 - registers

    if case in golden.CASES:
        keys = json.loads((folder / "config.json").read_text())
    else:
        keys = AutoConfig.from_pretrained(folder).to_dict()
    keys = _without_rope_type(keys) if keys.get("rope_scaling") else keys
    return {key: keys[key] for key in keys.keys() - {"_name_or_path", "transformers_version"}}


# --- what is refused ----------------------------------------------------------------------------


@pytest.fixture
def bridge(single_rank, tmp_path):
    """`AutoBridge` of a small folder of random weights."""
    write_random_model(tmp_path / "hf", seed=3)
    return lambda: _auto_bridge(tmp_path / "hf")


def _auto_bridge(folder: Path):
    from megatron.bridge import AutoBridge

    import megatron_coe.integrations.megatron_bridge  # noqa: F401 - registers

    return AutoBridge.from_hf_pretrained(folder)


def _rewrite(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_missing_weight_is_named(bridge, tmp_path) -> None:
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    _rewrite(tmp_path / "hf", lambda tensors: tensors.pop(name))
    with pytest.raises(ValueError, match=rf"hf: lacks {name}, which"):
        bridge().to_megatron_model(wrap_with_ddp=False)


def test_a_weight_left_over_is_named(bridge, tmp_path) -> None:
    _rewrite(tmp_path / "hf", lambda tensors: tensors.update(more=torch.ones(2)))
    with pytest.raises(ValueError, match=r"hf: holds more, which is no weight of the model"):
        bridge().to_megatron_model(wrap_with_ddp=False)


def test_a_model_of_another_kind_is_refused(bridge) -> None:
    provider = bridge().to_megatron_provider()
    provider.coe_independent_gate = False
    provider.finalize()
    with pytest.raises(ValueError, match=r"the model has decoder.layers.0.mlp.router.weight"):
        provider.provide_distributed_model(wrap_with_ddp=False)


def test_too_small_a_vocabulary_is_refused(bridge) -> None:
    provider = bridge().to_megatron_provider()
    provider.vocab_size = 90
    provider.finalize()
    with pytest.raises(ValueError, match=r"has 90 rows for the 96 token ids of .*vocab_size"):
        provider.provide_distributed_model(wrap_with_ddp=False)


def test_deepseek_v2_stays_bridges_own_until_it_is_asked_for(single_rank) -> None:
    from megatron.bridge import AutoBridge
    from transformers import DeepseekV2Config

    from megatron_coe.integrations.megatron_bridge import register_deepseek_v2

    config = DeepseekV2Config(architectures=["DeepseekV2ForCausalLM"])
    assert type(AutoBridge.from_hf_config(config)._model_bridge).__name__ == "DeepSeekV2Bridge"
    register_deepseek_v2()
    assert type(AutoBridge.from_hf_config(config)._model_bridge).__name__ == "CoEDeepseekV2Bridge"


def test_a_numbered_router_is_written_as_the_only_one(single_rank) -> None:
    """A CoE model of one iteration has one router, numbered 0 where routers are independent."""
    from megatron.bridge import AutoBridge
    from transformers import DeepseekV2Config

    from megatron_coe.integrations.megatron_bridge import (
        CoEBridgeProvider,
        CoEDeepseekV2Bridge,
        register_deepseek_v2,
    )
    from tests.builders import TINY

    register_deepseek_v2()
    provider = CoEBridgeProvider(**{**TINY, "coe_iterations": 1, "coe_residual": "outer"})
    provider.finalize()
    (model,) = provider.provide_distributed_model(wrap_with_ddp=False)
    keys = CoEDeepseekV2Bridge.megatron_to_hf_config(provider)
    exported = dict(AutoBridge.from_hf_config(DeepseekV2Config(**keys)).export_hf_weights([model]))
    for layer in range(2):
        router = model.state_dict()[f"decoder.layers.{layer}.mlp.router.0.weight"]
        assert torch.equal(exported[f"model.layers.{layer}.mlp.gate.weight"], router)


def test_transformer_engines_experts_go_by_their_number(single_rank) -> None:
    """Its grouped linear layer, which needs a GPU, has a parameter for each expert of a rank."""
    from megatron_coe.integrations.megatron_bridge import TableRegistry

    registry = TableRegistry(weights(tiny_provider(num_moe_experts=8)))
    mapping = registry.megatron_to_hf_lookup("decoder.layers.1.mlp.experts.linear_fc1.weight3")
    names = [f"model.layers.1.mlp.experts.3.{half}_proj.weight" for half in ("gate", "up")]
    assert list(mapping.hf_param.values()) == names
    gate_up = {name: torch.randn(16, 32) for name in names}
    layer = torch.nn.Module()
    layer.weight0 = torch.nn.Parameter(torch.zeros(32, 32))
    made = mapping.hf_to_megatron(gate_up, layer)
    assert torch.equal(made, torch.cat(list(gate_up.values())))
    again = mapping.megatron_to_hf(made, layer)
    assert list(again) == names
    assert all(torch.equal(again[name], gate_up[name]) for name in names)
