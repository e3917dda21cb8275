"""One global batch through one model, in any layout: the loss, every gradient, what is not alike.

A layout is written as people say it, `TP2·PP2·EP2`, with `DO` for the distributed optimizer and
`MB4` for micro-batches of 4; sizes that are not named are 1 and what is left is data parallelism.
Every layout starts from the weights of the seed; `vary_constants` moves what starts constant.
Gradients are put together by the global offsets that Megatron gives every piece for checkpoints
(`sharded_state_dict`), which know nothing of how this test divides anything.

In fp64 the logits are gathered for plain cross-entropy: Megatron's vocabulary-parallel one
(tensor_parallel/cross_entropy.py) computes in fp32. With multi-token prediction the model computes
its own losses, and the variant `mtp` agrees to fp32 only; output layer and loss in one compute in
fp64.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from megatron.core.utils import unwrap_model
from torch.nn import Parameter

from megatron_coe.config.model_section import build_provider
from megatron_coe.config.run_config import Settings
from megatron_coe.config.validation import check_layout, num_microbatches
from megatron_coe.distributed.process_groups import parallel_groups
from megatron_coe.distributed.seeds import seed_everything
from megatron_coe.distributed.train_state import build_model, connect_schedule
from megatron_coe.model.moe.router import CoERouter
from megatron_coe.training.batch_source import BatchSource
from megatron_coe.training.loss import count_valid_tokens, loss_scale, make_loss_function
from megatron_coe.training.step import forward_step as train_forward_step
from megatron_coe.training.step import share_of_rank
from megatron_coe.training.trainer import Trainer
from tests.distributed.layouts import BATCH
from tests.threads import release_groups
from tests.unit.training.runs import make_settings, make_trainer

SEQ, VOCAB = 16, 96
SEED = 1  # with which no choice of experts hangs on rounding
# 4 layers are 4 stages or 2 x 2 chunks; 8 experts, 4 heads and every width divide by 4.
MODEL = {
    "num_layers": 4,
    "num_moe_experts": 8,
    "vocab_size": VOCAB,
    "seq_length": SEQ,
    "q_lora_rank": 16,
    "init_method_std": 0.2,  # so that every part shows in the loss
    "backend": "torch",
}
LINEAR = {"cross_entropy_loss_fusion": True}
VARIANTS = {
    "C=1": {"coe_iterations": 1},
    "C=2": {"coe_iterations": 2},
    "C=3": {"coe_iterations": 3},
    "bias": {
        "coe_iterations": 2,
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_bias_update_rate": 0.125,
    },
    "plain attention": {
        "coe_iterations": 2,
        "coe_residual": "outer",
        "multi_latent_attention": False,
        "q_lora_rank": None,
        "num_query_groups": 2,
        "moe_layer_freq": [0, 1, 1, 1],
    },
    "one query group": {
        "coe_iterations": 2,
        "multi_latent_attention": False,
        "q_lora_rank": None,
        "num_query_groups": 1,
    },
    "tied": {"coe_iterations": 2, "share_embeddings_and_output_weights": True},
    "upcycled": {"coe_iterations": 3, "coe_residual": "outer", "coe_upcycled": True},
    "allgather": {"coe_iterations": 2, "moe_token_dispatcher_type": "allgather"},
    "shared expert overlapped": {"coe_iterations": 2, "moe_shared_expert_overlap": True},
    "recomputed parts": {
        "coe_iterations": 2,
        "recompute_granularity": "selective",
        "recompute_modules": ["core_attn", "moe", "layernorm", "mla_up_proj"],
    },
    "recomputed experts": {
        "coe_iterations": 2,
        "recompute_granularity": "selective",
        "recompute_modules": ["moe_act", "shared_experts"],
    },
    "mtp": {"coe_iterations": 2, "mtp_num_layers": 2},
    "linear": {"coe_iterations": 2, **LINEAR},
    "linear mtp": {
        "coe_iterations": 2,
        "mtp_num_layers": 2,
        "make_vocab_size_divisible_by": 64,
        **LINEAR,
    },
    "documents": {"coe_iterations": 2},
    "documents plain": {
        "coe_iterations": 2,
        "multi_latent_attention": False,
        "q_lora_rank": None,
        "num_query_groups": 2,
    },
    "recompute": {
        "coe_iterations": 2,
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
}
SIZES = {
    "TP": "tensor_model_parallel_size",
    "PP": "pipeline_model_parallel_size",
    "VPP": "virtual_pipeline_model_parallel_size",
    "CP": "context_parallel_size",
    "EP": "expert_model_parallel_size",
    "ETP": "expert_tensor_parallel_size",
}
FLAGS = {
    "DO": {"use_distributed_optimizer": True},
    "OVERLAP": {"overlap_grad_reduce": True},
}
NEAR_TIE = 1e-6  # a K-th and a next score closer than this could swap by rounding in fp32


def layout_settings(layout: str, variant: str = "C=2", **train: object) -> Settings:
    """The run that `TP2·PP2·DO·MB4` and a variant of the model describe."""
    parallel, train = {}, {"global_batch_size": BATCH, "seed": SEED, **train}
    for part in filter(None, layout.split("·")):
        if part in FLAGS:
            parallel |= FLAGS[part]
            continue
        name, size = re.fullmatch(r"([A-Z]+)(\d+)", part).groups()
        if name == "MB":
            train["micro_batch_size"] = int(size)
        elif name != "DP":  # what is left over; named only to be read
            parallel[SIZES[name]] = int(size)
    data = {}
    if variant.startswith("documents"):
        data = {"mode": "packed_documents", "pad_seq_to_mult": 4}
    model = {**MODEL, **VARIANTS[variant]}
    return make_settings(model=model, train=train, parallel=parallel, data=data)


class Sequences:
    """Sequences of random ids, each a function of its number, with different numbers of labels."""

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(number)
        ids = torch.randint(VOCAB, (SEQ + 1,), generator=generator)
        valid = int(torch.randint(1, SEQ + 1, (), generator=generator))
        positions = torch.arange(SEQ)
        mask = (positions < valid).float()
        return {
            "tokens": ids[:-1],
            "labels": ids[1:],
            "loss_mask": mask,
            "position_ids": positions,
        }


class Packs(Sequences):
    """The same sequences, each of several documents of other lengths."""

    LENGTHS = ((4, 12), (16,), (8, 4, 4), (4, 4, 4, 4))

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        lengths = self.LENGTHS[number % len(self.LENGTHS)]
        cu_seqlens = torch.full((SEQ // 4 + 1,), SEQ, dtype=torch.int32)
        cu_seqlens[: len(lengths) + 1] = torch.tensor([0, *lengths]).cumsum(0)
        positions = torch.cat([torch.arange(length) for length in lengths])
        return super().__getitem__(number) | {"position_ids": positions, "cu_seqlens": cu_seqlens}


def build(settings: Settings, dtype: torch.dtype) -> list:
    """This rank's chunks, wrapped for DDP, in `dtype`, at the weights of the seed."""
    cpu = torch.device("cpu")
    seed_everything(settings.train.seed)
    provider = build_provider(settings, cpu)
    provider.params_dtype = provider.pipeline_dtype = provider.autocast_dtype = dtype
    if dtype is torch.float64:
        provider.moe_router_dtype = "fp64"
    chunks = build_model(provider, settings.parallel, cpu, settings.train.seed)
    connect_schedule(provider, settings.parallel, chunks)
    for module in unwrap_model(chunks):
        vary_constants(module)
    return chunks


def step(settings: Settings, chunks: list) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss per valid token of the global batch, and the gradient of every parameter (rank 0)."""
    provider, replicas = chunks[0].config, parallel_state.get_data_parallel_world_size()
    count = num_microbatches(settings.parallel, settings.train, dist.get_world_size())
    micro, rank = settings.train.micro_batch_size, parallel_state.get_data_parallel_rank()
    sequences = Packs() if settings.data.mode == "packed_documents" else Sequences()
    source = BatchSource(sequences, micro, rank, replicas, torch.device("cpu"))
    batches = source.training(0, count)
    tokens = count_valid_tokens(batches, parallel_state.get_data_parallel_group())
    for chunk in chunks:
        chunk.train()
        chunk.zero_grad_buffer()
    losses_by_model = provider.mtp_num_layers or provider.cross_entropy_loss_fusion
    forward = train_forward_step if losses_by_model else forward_step
    reports = get_forward_backward_func()(
        forward_step_func=partial(forward, scale=loss_scale(tokens, BATCH * SEQ)),
        data_iterator=[iter(batches) for _ in chunks],
        model=chunks,
        num_microbatches=count,
        seq_length=provider.seq_length,
        micro_batch_size=micro,
        forward_only=False,
    )
    total = torch.zeros(2, dtype=torch.float64)
    if reports and parallel_state.get_tensor_model_parallel_rank() == 0:
        total = torch.stack(reports).sum(dim=0)
    dist.all_reduce(total)
    return (total[0] / total[1]).item(), gather_gradients(chunks)


def forward_step(batches: Iterator, chunk: torch.nn.Module, scale: torch.Tensor) -> tuple:
    """As in training, with the whole vocabulary's logits on every rank."""
    batch, packed = share_of_rank(dict(next(batches)))
    output = chunk(batch["tokens"], batch["position_ids"], None, packed_seq_params=packed)
    loss_function = make_loss_function(batch["loss_mask"], scale)

    def gathered_loss(logits_BSV: torch.Tensor) -> tuple:
        logits_BSV = gather_from_tensor_model_parallel_region(logits_BSV)
        losses = F.cross_entropy(logits_BSV.transpose(1, 2), batch["labels"], reduction="none")
        return loss_function(losses)

    return output, gathered_loss


# --- the whole of what ranks hold in pieces -------------------------------------------------------


def metadata() -> dict:
    return {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}


def pieces(state: dict) -> list[ShardedTensor]:
    """The tensors of a sharded state, merged ones (gate and up) taken apart."""
    apply_factories(state)
    return [value for value in nested_values(state) if isinstance(value, ShardedTensor)]


@torch.no_grad()
def vary_constants(module: torch.nn.Module) -> None:
    """Move the parameters that start constant (norms, biases, an upcycled layer's gates) by noise
    that belongs to their names: a mistake in them would not show."""
    for piece in pieces(module.sharded_state_dict(metadata=metadata())):
        if isinstance(piece.data, Parameter) and piece.data.ndim == 1:
            generator = torch.Generator().manual_seed(zlib.crc32(piece.key.encode()))
            noise = 0.2 * torch.randn(piece.global_shape, generator=generator, dtype=torch.float64)
            piece.data += noise[piece.global_slice()]


def gather_gradients(chunks: list) -> dict[str, torch.Tensor]:
    """Every gradient of the model, on rank 0."""
    for chunk in chunks:
        _gather_shards_of_gradients(chunk)
    return gather(chunks, lambda parameter: parameter.main_grad)


def gather(chunks: list, value_of: Callable[[Parameter], torch.Tensor]) -> dict[str, torch.Tensor]:
    """What belongs to every parameter (and the expert biases) by its tensor's name, on rank 0.

    Pieces that several ranks hold must be the same on all; an element that none holds is NaN.
    """
    own = []
    for module in unwrap_model(chunks):
        with _in_place_of_weights(module, value_of):
            state = module.sharded_state_dict(metadata=metadata())
            own += [
                (p.key, p.global_shape, p.global_offset, p.global_slice(), p.data.detach().clone())
                for p in pieces(state)
            ]
    ranks: list = [None] * dist.get_world_size()
    dist.gather_object(own, ranks if dist.get_rank() == 0 else None)
    return _assemble(piece for rank in ranks for piece in rank or ())


def _assemble(all_pieces: Iterable[tuple]) -> dict[str, torch.Tensor]:
    whole: dict[str, torch.Tensor] = {}
    seen: dict[tuple, torch.Tensor] = {}
    for key, shape, offset, place, data in all_pieces:
        if (twin := seen.get((key, offset))) is None:
            seen[key, offset] = data
            tensor = whole.setdefault(key, torch.full(shape, torch.nan, dtype=torch.float64))
            tensor[place] = data.double()
        elif not torch.allclose(data, twin, rtol=1e-9, atol=1e-13):
            whole[key][place] = torch.nan  # replicas that have drifted apart
    return whole


def _gather_shards_of_gradients(chunk: torch.nn.Module) -> None:
    """With the distributed optimizer a rank has summed gradients of its own shard only."""
    if not chunk.ddp_config.use_distributed_optimizer:
        return
    for buffer in chunk.buffers + chunk.expert_parallel_buffers:
        group = buffer.data_parallel_group
        for bucket in buffer.buckets:
            shard = bucket.grad_data.chunk(group.size())[group.rank()].clone()
            dist.all_gather_into_tensor(bucket.grad_data, shard, group=group)


@contextmanager
def _in_place_of_weights(
    module: torch.nn.Module, value_of: Callable[[Parameter], torch.Tensor]
) -> Iterator[None]:
    weights = {parameter: parameter.data for parameter in module.parameters()}
    for parameter in weights:
        parameter.data = value_of(parameter)
    yield
    for parameter, weight in weights.items():
        parameter.data = weight


# --- one layout against one process ---------------------------------------------------------------


def reference(variant: str, path: Path, dtype: torch.dtype = torch.float64) -> int:
    """Write what one process computes; returns the number of tokens whose choice is a near tie."""
    settings = layout_settings("", variant)
    with setup_groups(settings), counted_near_ties() as ties:
        loss, gradients = step(settings, build(settings, dtype))
    torch.save({"loss": loss, "gradients": gradients}, path)
    return sum(ties)


def write_references(variants: list[str], folder: str) -> None:
    """Runs on one rank: the references of several variants; none may hang on a near tie."""
    for variant in variants:
        ties = reference(variant, Path(folder) / f"{variant}.pt")
        assert ties == 0, f"{variant}: {ties} tokens whose choice rounding could decide"


def difference(layout: str, variant: str, path: str | Path) -> list[float]:
    """[relative error of the loss, of the worst gradient] of a layout; a collective.

    A gradient's error is relative to the largest entry of its tensor. NaN on other ranks than 0.
    """
    settings = layout_settings(layout, variant)
    with setup_groups(settings):
        loss, gradients = step(settings, build(settings, torch.float64))
    if dist.get_rank() > 0:
        return [torch.nan, torch.nan]
    expected = torch.load(path, weights_only=True)
    assert gradients.keys() == expected["gradients"].keys(), "not the same tensors"
    worst = 0.0
    for name, want in expected["gradients"].items():
        error = (gradients[name] - want).abs().max() / want.abs().max()
        worst = max(worst, error.nan_to_num(torch.inf).item())
    return [abs(loss - expected["loss"]) / expected["loss"], worst]


@contextmanager
def setup_groups(settings: Settings) -> Iterator[None]:
    check_layout(settings, dist.get_world_size())
    if parallel_state.model_parallel_is_initialized():  # a test's own single rank
        yield
        return
    with parallel_groups(settings.parallel):
        yield
    release_groups()


@contextmanager
def counted_near_ties() -> Iterator[list[int]]:
    """Counts, per router call, the tokens whose K-th and next score are nearly equal."""
    ties: list[int] = []
    best = CoERouter.best

    def counting(self: CoERouter, scores_TN: torch.Tensor) -> torch.Tensor:
        top = scores_TN.detach().topk(self.topk + 1, dim=1).values
        ties.append(int(((top[:, -2] - top[:, -1]) < NEAR_TIE).sum()))
        return best(self, scores_TN)

    CoERouter.best = counting
    try:
        yield ties
    finally:
        CoERouter.best = best


def make_parity_trainer(layout: str, variant: str, **train: object) -> Trainer:
    """A trainer in fp32 on `Sequences`, at the weights of the seed."""
    settings = layout_settings(layout, variant, lr=1e-3, lr_warmup_fraction=0.0, **train)
    trainer = make_trainer(settings, torch.device("cpu"), Sequences())
    for module in unwrap_model(trainer.train_state.chunks):
        vary_constants(module)
    trainer.train_state.optimizer.reload_model_params()
    return trainer


def train(layout: str, variant: str, steps: int) -> list[float]:
    """Loss of each of the first training steps in fp32, as the training loop reports it."""
    with setup_groups(layout_settings(layout, variant)):
        trainer = make_parity_trainer(layout, variant)
        return [trainer.metrics(trainer.step())["train_loss"] for _ in range(steps)]


def trained(layouts: list[str], variant: str, steps: int) -> dict[str, list[float]]:
    """Runs on each rank: {layout: its losses}."""
    return {layout: train(layout, variant, steps) for layout in layouts}


def differences(cases: list[list[str]], folder: str) -> dict[str, list[float]]:
    """Runs on each rank: {layout, variant: errors} of all cases."""
    return {
        f"{layout}, {variant}": difference(layout, variant, Path(folder) / f"{variant}.pt")
        for layout, variant in cases
    }
