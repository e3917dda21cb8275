"""Sizes of a run before it starts: parameters, FLOPs per token, memory of a rank."""

from __future__ import annotations

from pathlib import Path

from megatron_coe.config.run_config import ParallelSettings, TrainSettings
from megatron_coe.data.tokenizer import load_tokenizer
from megatron_coe.model.provider import CoEModelProvider
from megatron_coe.planning.memory import GIB, rank_memory
from megatron_coe.planning.plan import Plan

_NO_VOCABULARY = (
    "unknown: NOTHING BELOW COUNTS EMBEDDING AND HEAD, since there is no file at data.tokenizer "
    "whose ids could be counted; give model.vocab_size=…"
)


def tokenizer_vocab_size(path: str) -> int | None:
    """Return the number of ids of the tokenizer at `data.tokenizer`, or None if it is not there.

    Raises: ValueError: it cannot be read.
    """
    return load_tokenizer(path).vocab_size if path and Path(path).exists() else None


def plan_of(
    provider: CoEModelProvider,
    parallel: ParallelSettings,
    train: TrainSettings,
    world_size: int,
    on_gpu: bool,
) -> Plan:
    """Return the plan of a run on `world_size` processes."""
    return Plan(
        model=provider,
        world_size=world_size,
        micro_batch_size=train.micro_batch_size,
        global_batch_size=train.global_batch_size,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        on_gpu=on_gpu,
        averages=train.ema_decay is not None,
        freeze=tuple(train.freeze),
        optimizer=train.optimizer,
    )


def describe_sizes(plan: Plan) -> str:
    """Tabulate sizes, FLOPs and the memory of the peak-memory stage.

    Without a vocabulary, the decoder alone, and a line that states this.
    """
    model, S = plan.model, plan.model.seq_length
    memory = rank_memory(plan)
    with_tables, decoder = model.num_params(), model.num_params(embeddings=False)
    active, active_decoder = model.num_active_params(), model.num_active_params(embeddings=False)
    rows = [
        ("vocabulary", f"{model.vocab_size:,} ids, padded to {model.padded_vocab_size:,}"),
        ("parameters", f"{with_tables:,} ({decoder:,} without embedding and head)"),
        ("active per token", f"at most {active:,} ({active_decoder:,})"),
        ("training FLOPs per token", f"{model.flops_per_token(S):,} at sequence length {S}"),
        ("memory of a rank", f"{memory.total / GIB:.2f} GiB, of {plan.world_size} rank(s)"),
        ("  weights", f"{memory.weights / GIB:.2f} GiB"),
        ("  gradients", f"{memory.gradients / GIB:.2f} GiB"),
        ("  optimizer", f"{memory.optimizer / GIB:.2f} GiB"),
        ("  activations", f"about {memory.activations / GIB:.2f} GiB"),
        ("  workspace", f"about {memory.workspace / GIB:.2f} GiB"),
    ]
    if model.vocab_size == 0:
        rows[0] = ("vocabulary", _NO_VOCABULARY)
    return "\n".join(f"{name:<26}{value}" for name, value in rows)
