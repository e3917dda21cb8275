"""Train and export the small models that tests/serve serves, one folder each: `OUTPUT/NAME/hf`.

    python tests/serve/train_models.py runs/serve-models [NAME ...]

It needs Megatron and not vLLM, whose environment has none. A model that is there is kept.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
STEPS = 120

PLAIN = {"multi_latent_attention": "false", "num_query_groups": 2}
SIGMOID = {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": "true"}
GROUPS = {
    "moe_router_num_groups": 4,
    "moe_router_group_topk": 2,
    "moe_router_group_score": "max",
    "moe_router_topk": 4,
    "moe_router_topk_scaling_factor": 1.5,
}
LIVELY = {"init_method_std": 0.1}
"""Experts that no residual passes by: at 0.02 their output, an input again, is lost in the norm."""
UPCYCLED = "upcycled"
MODELS: dict[str, dict[str, object]] = {
    "quickstart": {},
    "latent_512": {
        "kv_lora_rank": 512,
        "qk_pos_emb_head_dim": 64,
        "qk_head_dim": 64,
        "v_head_dim": 64,
    },
    "c3_addinit": {"coe_iterations": 3, "coe_residual": "addinit", **PLAIN},
    "c4_outer": {
        "coe_iterations": 4,
        "coe_residual": "outer",
        "moe_layer_freq": "[0,1,1]",
        **GROUPS,
        **LIVELY,
    },
    "c2_inner_outer": {"coe_residual": "inner_outer", "q_lora_rank": 32, **SIGMOID},
    "c2_none": {
        "coe_residual": "none",
        "moe_layer_freq": "[0,0,1]",
        "coe_independent_gate": "false",
        "moe_shared_expert_intermediate_size": "null",
        "add_qkv_bias": "true",
        "qk_layernorm": "true",
        **PLAIN,
        **LIVELY,
    },
    "moe": {"coe_iterations": 1, "coe_residual": "outer"},
    UPCYCLED: {},
}
"""What each model has unlike the quickstart's; `upcycled` starts from `moe`."""


def run(*command: object) -> None:
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"{command[0]}: {done.stderr}\n{done.stdout}")


def make_data(home: Path) -> None:
    if (home / "valid.idx").exists():
        return
    run("tools/make_corpus.py", "--output", home, "--train-size", 4000, "--valid-size", 100)
    text = ("--qa-keys", "query", "response")
    tokenizer = home / "tokenizer.model"
    run(
        "tools/train_tokenizer.py", "--input", home / "train.jsonl", *text,
        *("--vocab-size", 1024, "--output", tokenizer),
    )  # fmt: skip
    for split in ("train", "valid"):
        run(
            "tools/preprocess_data.py", "--input", home / f"{split}.jsonl", *text, "--append-eod",
            *("--tokenizer", tokenizer, "--output-prefix", home / split),
        )  # fmt: skip


def train(home: Path, name: str) -> None:
    folder = home / name
    if (folder / "hf" / "config.json").exists():
        return
    config, model = ROOT / "examples/quickstart.yaml", MODELS[name]
    if name == UPCYCLED:
        train(home, "moe")
        run(
            "tools/upcycle.py", "--input", home / "moe" / "checkpoints",
            *("--output", folder / "checkpoints", "--iterations", 3),
        )  # fmt: skip
        config = next((folder / "checkpoints").glob("step_*")) / "config.yaml"
    else:
        model = {"num_layers": 3, "seq_length": 192, **model}
    run(
        "pretrain_coe.py", "--config", config,
        *(f"data.{split}=[{home / split}]" for split in ("train", "valid")),
        f"data.tokenizer={home / 'tokenizer.model'}",
        *(f"model.{field}={value}" for field, value in model.items()),
        *(f"train.steps={STEPS}", f"train.eval_interval={STEPS}", f"log.dir={folder}"),
    )  # fmt: skip
    run(
        "tools/convert_checkpoint.py", "to-hf", "--input", folder / "checkpoints",
        *("--output", folder / "hf"),
    )  # fmt: skip


if __name__ == "__main__":
    home = Path(sys.argv[1]).absolute()
    home.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
    make_data(home)
    for name in sys.argv[2:] or MODELS:
        train(home, name)
        print(name, flush=True)
