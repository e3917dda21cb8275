"""Malformed settings: files, values, layouts, models, and the command line of a run."""

from __future__ import annotations

from collections.abc import Iterator

from tests.faults.commands import TRAIN, Case
from tests.faults.spoil import also, folder_at, remove, write


def cases() -> list[Case]:
    return [*_yaml(), *_values(), *_layouts(), *_models(), *_command_lines()]


# --- files of settings ----------------------------------------------------------------------------

_LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n"
    for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


def _yaml() -> Iterator[Case]:
    def text(name: str, content: str | bytes, *says: str) -> Case:
        return Case(f"yaml: {name}", TRAIN, ("{d}/run.yaml", *says), write("run.yaml", content))

    yield Case("yaml: empty file", TRAIN, ("data.tokenizer",), write("run.yaml", ""))
    yield Case("yaml: no file", TRAIN, ("{d}/run.yaml",), remove("run.yaml"))
    yield Case("yaml: a folder", TRAIN, ("{d}/run.yaml",), folder_at("run.yaml"))
    yield text("binary", bytes(range(256)) * 4, "not valid YAML")
    yield text("UTF-16", "train: {steps: 1}".encode("utf-16-be"), "not valid YAML")
    yield text("a NUL byte", "train: {steps: 1\0}", "not valid YAML")
    yield text("bracket left open", "train: {steps: 1", "not valid YAML", "line")
    yield text("tab as indentation", "train:\n\tsteps: 1\n", "not valid YAML", "line 2")
    yield text("two colons", "a: b: c", "not valid YAML")
    yield text("list instead of sections", "- train\n", "must hold sections", "list")
    yield text("a word instead of sections", "hello\n", "unknown key 'hello'", "train")
    yield text("a number instead of sections", "17\n", "must hold sections")
    yield text("two documents", "train: {}\n---\ntrain: {}\n", "not valid YAML")
    yield text("same key twice", "train: {steps: 1, steps: 2}", "steps", "duplicate key")
    yield text("same section twice", "train: {steps: 1}\ntrain: {lr: 1}", "duplicate key")
    yield text("nested 2,000 deep", f"model: {{x: {'[' * 2000}{']' * 2000}}}", "nested")
    yield text(
        "billion laughs", f"model:\n  {_LAUGHS.replace(chr(10), chr(10) + '  ')}", "expansion"
    )
    yield text("alias of itself", "model: &m {x: *m}", "alias")
    yield text("number as key", "1: 2\n", "unknown key", "'1'")
    yield text("nothing as key", "null: 2\n", "NoneType")
    yield text("number as key of the model", "model: {5: 2}\n", "model", "5")
    yield text("date as steps", "train: {steps: 2020-01-01}", "train", "2020-01-01")
    yield text("set as model", "model: !!set {a, b}", "refused by OmegaConf")
    yield text("bytes as steps", "train: {steps: !!binary aGVsbG8=}", "train.steps")
    yield text("Python's tag", "train: !!python/tuple [1, 2]", "refused by OmegaConf")
    yield text("unknown section", "trane: {steps: 1}", "'trane'", "did you mean 'train'?")
    yield text("unknown key", "train: {stepz: 1}", "train.stepz", "did you mean 'steps'?")
    yield text("unknown key in data", "data: {vocab: 1}", "data.vocab")
    yield text("section is a number", "train: 3", "train")
    yield text("section is a list", "train: [1, 2]", "train")
    yield text("section is empty", "train:\n", "train")
    yield text("model is a list", "model: [1]", "model")
    yield text(
        "model's value to be filled in", "model: {num_layers: '???'}", "num_layers", "Missing"
    )
    yield text("extends nothing", "extends: gone.yaml", "gone.yaml")
    yield text("extends a list", "extends: [a.yaml, b.yaml]", "'extends'", "one file")
    yield text("extends itself", "extends: run.yaml", "circle")
    yield text("extends a folder", "extends: .", "{d}")
    yield Case(
        "yaml: extends in a circle",
        TRAIN,
        ("circle", "b.yaml"),
        also(write("run.yaml", "extends: b.yaml"), write("b.yaml", "extends: run.yaml")),
    )
    yield Case(
        "yaml: mistake in the extended file",
        TRAIN,
        ("{d}/b.yaml", "train.stepz"),
        also(write("run.yaml", "extends: b.yaml"), write("b.yaml", "train: {stepz: 1}")),
    )
    yield text("reference to nothing", "log: {dir: '${log.nowhere}'}", "log.nowhere")
    yield text("reference to a section", "log: {dir: '${train}'}", "${train}")
    yield text(
        "references in a circle",
        "log: {dir: '${log.wandb_exp_name}', wandb_exp_name: '${log.dir}'}",
        "Recursive",
    )
    yield text("reference to itself", "log: {dir: '${log.dir}'}", "Recursive")
    yield text("reference left open", "log: {dir: '${log.dir'}", "log.dir")


# --- values ---------------------------------------------------------------------------------------


def _set(override: str, *says: str) -> Case:
    """The usual settings with one value changed on the command line."""
    return Case(f"value: {override}", f"{TRAIN} '{override}'", says)


def _values() -> Iterator[Case]:
    for key in ("train.steps", "train.micro_batch_size", "log.interval", "checkpoint.keep_latest"):
        yield _set(f"{key}=0", f"{key}=0", "greater than 0")
    for value in ("-1", "1.5", "ten", "true", "[1]", "{a: 1}", "null", ".nan", ".inf", "1e400"):
        yield _set(f"train.steps={value}", "train.steps")
    yield _set("train.steps=" + "9" * 40, "train.steps", "at most")
    yield _set("train.global_batch_size=" + "9" * 30, "train.global_batch_size", "at most")
    for value in ("0", "-1", ".nan", ".inf", "-.inf", "true", "fast", "null"):
        yield _set(f"train.lr={value}", "train.lr")
    for value in ("1", "-0.1", "2"):
        yield _set(f"train.adam_beta1={value}", "train.adam_beta1", "[0, 1)")
    yield _set("train.adam_beta1=.nan", "train.adam_beta1", "finite")
    yield _set("train.adam_beta2=1.0", "train.adam_beta2=1.0")
    yield _set("train.adam_eps=0", "train.adam_eps")
    yield _set("train.adam_eps=.inf", "train.adam_eps")
    yield _set("train.lr_warmup_fraction=1.5", "train.lr_warmup_fraction=1.5")
    for key in ("train.weight_decay", "train.clip_grad", "train.min_lr"):
        for value in ("-1", ".nan", ".inf"):
            yield _set(f"{key}={value}", key)
    yield _set("train.min_lr=1", "train.min_lr=1.0", "train.lr=")
    yield _set("train.lr_decay_style=exponential", "train.lr_decay_style", "cosine")
    yield _set("train.precision=fp8", "train.precision", "bf16")
    yield _set("train.seed=-1", "train.seed=-1")
    yield _set("train.seed=4294967296", "train.seed=4294967296", "4294967295")
    yield _set("train.eval_interval=-1", "train.eval_interval=-1")
    yield _set("train.eval_samples=0", "train.eval_samples=0")
    yield _set("train.exit_step=0", "train.exit_step=0")
    yield Case(
        "value: batch that does not divide",
        f"{TRAIN} train.global_batch_size=3 train.micro_batch_size=2",
        ("train.global_batch_size=3", "multiple"),
    )
    yield _set("checkpoint.save_interval=-1", "checkpoint.save_interval=-1")
    yield _set("log.profile_steps=[3,1]", "log.profile_steps=[3, 1]")
    yield _set("log.profile_steps=[1]", "log.profile_steps=[1]")
    yield _set("log.profile_steps=[0,1]", "log.profile_steps=[0, 1]")
    yield _set("data.mode=raw", "data.mode", "packed")
    yield _set("data.train={d}/a", "data.train")
    yield _set("data.train=[]", "data.train")
    yield _set("data.train_weights=[1,2]", "data.train_weights", "2 value(s)")
    yield _set("data.train_weights=[0]", "data.train_weights=[0.0]")
    yield _set("data.train_weights=[.nan]", "data.train_weights")
    yield _set("data.train_weights=[.inf]", "data.train_weights")


# --- layouts --------------------------------------------------------------------------------------


def _layouts() -> Iterator[Case]:
    def layout(name: str, sizes: str, *says: str, world: str | None = None) -> Case:
        given = " ".join(f"parallel.{size}" for size in sizes.split())
        environment = {} if world is None else {"WORLD_SIZE": world, "RANK": "0", "LOCAL_RANK": "0"}
        return Case(f"layout: {name}", f"{TRAIN} {given}", says, environment=environment)

    tp, pp = "tensor_model_parallel_size", "pipeline_model_parallel_size"
    ep, cp = "expert_model_parallel_size", "context_parallel_size"
    vpp, etp = "virtual_pipeline_model_parallel_size", "expert_tensor_parallel_size"
    yield layout("more than the processes", f"{tp}=2", tp, "processes")
    yield layout("TP beside the heads", f"{tp}=3", "num_attention_heads=4", "1, 2, 4", world="3")
    yield layout("EP beside the experts", f"{ep}=4", "num_moe_experts=6", "1, 2, 3, 6", world="4")
    yield layout("PP beside the layers", f"{pp}=3", "num_layers=2", world="3")
    yield layout("ETP beside the experts' size", f"{etp}=3", "moe_ffn_hidden_size=16", world="3")
    yield layout("CP beside the sequence", f"{cp}=3", "seq_length=16", world="3")
    yield layout("interleaving without stages", f"{vpp}=2", vpp, pp)
    yield layout("interleaving of one", f"{pp}=2 {vpp}=1", f"{vpp}=1", "leave it out", world="2")
    yield layout(
        "TP without sequence parallelism",
        f"{tp}=2 sequence_parallel=false",
        "sequence_parallel=false",
        world="2",
    )
    yield layout("sequence parallelism without TP", "sequence_parallel=true", "sequence_parallel")
    yield layout(
        "overlap without its optimizer", "overlap_param_gather=true", "use_distributed_optimizer"
    )
    yield layout("zero", f"{tp}=0", f"{tp}=0", "greater than 0")
    yield layout("negative", f"{ep}=-2", f"{ep}=-2", "greater than 0")
    yield layout("huge", f"{tp}=1000000000000000000000000", tp)
    yield layout("a word", f"{pp}=all", pp)
    yield layout("true", f"{tp}=true", tp)
    yield layout(
        "batch over replicas",
        "use_distributed_optimizer=true",
        "train.global_batch_size=2",
        world="4",
    )
    yield layout("number of processes is a word", f"{tp}=1", "WORLD_SIZE=many", world="many")
    yield layout("no processes", f"{tp}=1", "WORLD_SIZE=0", world="0")


# --- models ---------------------------------------------------------------------------------------


def _models() -> Iterator[Case]:
    for name, value, says in (
        ("hiden_size", "32", "did you mean 'hidden_size'?"),
        ("hidden_size", "32.5", "an integer"),
        ("hidden_size", "big", "an integer"),
        ("hidden_size", "true", "an integer"),
        ("hidden_size", "0", ">= 1"),
        ("hidden_size", "-32", ">= 1"),
        ("num_layers", "0", "from 1 to"),
        ("num_layers", "1" + "0" * 30, "at most"),
        ("num_moe_experts", "null", "number of routed experts"),
        ("num_moe_experts", "0", ">= 1"),
        ("moe_router_topk", "7", "num_moe_experts=6"),
        ("moe_router_topk", "0", ">= 1"),
        ("coe_iterations", "0", "from 1 to"),
        ("coe_iterations", "1.5", "an integer"),
        ("coe_residual", "sideways", "inner"),
        ("activation_func", "tanhh", "silu"),
        ("hidden_dropout", "0.1", "coe_residual"),
        ("hidden_dropout", "2", "[0, 1)"),
        ("attention_dropout", "-1", "[0, 1)"),
        ("attention_dropout", ".nan", "attention_dropout"),
        ("moe_layer_freq", "[1,0,1]", "num_layers=2"),
        ("moe_layer_freq", "0", "moe_layer_freq"),
        ("rope_type", "alibi", "rope_type='alibi'"),
        ("vocab_size", "7", "smaller than the 290 ids"),
        ("vocab_size", "-1", "vocab_size=-1"),
        ("seq_length", "1", "seq_length=1"),
        ("seq_length", "0", "seq_length=0"),
        ("seq_length", "-16", "seq_length=-16"),
        ("bf16", "true", "train.precision"),
        ("tensor_model_parallel_size", "2", "parallel.tensor_model_parallel_size"),
        ("fp8", "e4m3", "Transformer Engine"),
        ("backend", "jax", "backend='jax'"),
        ("backend", "te", "Transformer Engine"),
        ("add_bias_linear", "true", "add_bias_linear"),
        ("moe_router_load_balancing_type", "sinkhorn", "seq_aux_loss"),
        ("moe_router_load_balancing_type", "magic", "moe_router_load_balancing_type"),
        ("moe_aux_loss_coeff", ".nan", "moe_aux_loss_coeff"),
        ("moe_aux_loss_coeff", "much", "a number"),
        ("layernorm_epsilon", "-1", "layernorm_epsilon"),
        ("layernorm_epsilon", ".nan", "layernorm_epsilon"),
        ("init_method_std", ".inf", "init_method_std"),
        ("init_method_std", "-1", "init_method_std"),
        ("rotary_base", "0", "rotary_base"),
        ("kv_lora_rank", "0", "kv_lora_rank"),
        ("qk_head_dim", "-8", "qk_head_dim"),
        ("qk_pos_emb_head_dim", "7", "qk_pos_emb_head_dim"),
        ("moe_ffn_hidden_size", "0", "moe_ffn_hidden_size"),
        ("moe_shared_expert_intermediate_size", "-1", "moe_shared_expert_intermediate_size"),
        ("moe_router_group_topk", "2", "moe_router_num_groups"),
        ("make_vocab_size_divisible_by", "0", "make_vocab_size_divisible_by"),
        ("mtp_num_layers", "-1", "mtp_num_layers"),
        ("moe_token_dispatcher_type", "pigeon", "moe_token_dispatcher_type"),
        ("normalization", "BatchNorm", "normalization"),
        ("init_method", "zeros", "left out"),
        ("recompute_granularity", "some", "recompute_granularity"),
        ("params_dtype", "fp32", "train.precision"),
    ):
        yield Case(f"model: {name}={value}", f"{TRAIN} 'model.{name}={value}'", (name, says))


# --- the command line of a run --------------------------------------------------------------------


def _command_lines() -> Iterator[Case]:
    def line(name: str, command: str, *says: str) -> Case:
        return Case(f"command: {name}", command, says)

    yield line("no settings", "pretrain_coe.py", "--config")
    yield line("option without value", "pretrain_coe.py --config", "--config")
    yield line("unknown option", f"{TRAIN} --epochs 3", "--epochs")
    yield line("two modes", f"{TRAIN} --dry-run --eval-only", "--eval-only", "--dry-run")
    yield line(
        "override without value", f"{TRAIN} train.steps", "'train.steps'", "section.key=value"
    )
    yield line("override without section", f"{TRAIN} steps=3", "'steps=3'", "section.key=value")
    yield line("override without key", f"{TRAIN} =3", "'=3'", "section.key=value")
    yield line("override with two dots", f"{TRAIN} train..steps=3", "'train..steps=3'")
    yield line("override of a whole section", f"{TRAIN} train.=3", "'train.=3'")
    yield line("override of too deep a key", f"{TRAIN} train.steps.x=3", "train.steps")
    yield line("override that is no YAML", f"{TRAIN} 'model.num_layers=[1'", "model.num_layers=[1")
    yield line("override with the environment", f"{TRAIN} 'log.dir=${{oc.env:HOME}}'", "oc.env")
    yield Case(
        "command: evaluation without a checkpoint",
        f"{TRAIN} --eval-only",
        ("checkpoint.save={d}/run/checkpoints", "no "),
        late=True,
    )
    yield Case(
        "command: evaluation with nowhere to look",
        f"{TRAIN} --eval-only checkpoint.save=null",
        ("checkpoint.save",),
        late=True,
    )
    yield line("dry run of a mistake", f"{TRAIN} --dry-run train.steps=0", "train.steps=0")
    yield line(
        "dry run without data", f"{TRAIN} --dry-run 'data.train=[{{d}}/gone]'", "{d}/gone.idx"
    )
    yield Case(
        "command: evaluation without held-out data",
        f"{TRAIN} --eval-only data.valid=[]",
        ("data.valid",),
    )
