"""Show, for every patch, the symptom without it. Run as a program; prints JSON.

    rows.py ROW ROW …

The rows change Megatron for the whole process, so each is left out in a fork of one process that
has imported Megatron and applied nothing. The result is {row: [what went wrong without the row,
what went wrong with all rows or null]}. A foreign `apex` on the path is part of the picture, and
for `unusable_te` a Transformer Engine that needs a GPU.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import warnings
from collections.abc import Callable

warnings.simplefilter("ignore")
os.environ["OMP_NUM_THREADS"] = "1"

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from megatron.core import parallel_state, tensor_parallel  # noqa: E402
from megatron.core.distributed import (  # noqa: E402
    DistributedDataParallel,
    DistributedDataParallelConfig,
)
from megatron.core.fusions import fused_bias_swiglu  # noqa: E402
from megatron.core.models.backends import LocalSpecProvider  # noqa: E402
from megatron.core.models.common.embeddings import rope_utils  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec  # noqa: E402
from megatron.core.optimizer import (  # noqa: E402
    MegatronOptimizer,
    OptimizerConfig,
    clip_grads,
    get_megatron_optimizer,
    optimizer,
)
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402
from megatron.core.tensor_parallel import ColumnParallelLinear, data, mappings  # noqa: E402
from megatron.core.tensor_parallel.random import CheckpointWithoutOutput  # noqa: E402
from megatron.core.transformer.moe import moe_utils, token_dispatcher  # noqa: E402
from megatron.core.transformer.spec_utils import build_module  # noqa: E402
from megatron.core.transformer.transformer_config import (  # noqa: E402
    MLATransformerConfig,
    TransformerConfig,
)
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from megatron_coe.megatron_compat import cpu, patches  # noqa: E402


def config(**overrides: object) -> TransformerConfig:
    sizes = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 2}
    return TransformerConfig(**{**sizes, "add_bias_linear": False, **overrides})


def column_parallel() -> ColumnParallelLinear:
    return ColumnParallelLinear(
        8, 8, config=config(), init_method=torch.nn.init.zeros_, bias=False, gather_output=False
    )


def with_optimizer(
    distributed: bool, *layers: torch.nn.Module
) -> tuple[DistributedDataParallel, MegatronOptimizer]:
    """Layers wrapped for DDP, and their optimizer, with clipping."""
    ddp = DistributedDataParallelConfig(use_distributed_optimizer=distributed)
    model = DistributedDataParallel(config(), ddp, torch.nn.ModuleList(layers))
    settings = OptimizerConfig(lr=0.1, clip_grad=1.0, use_distributed_optimizer=distributed)
    return model, get_megatron_optimizer(settings, [model])


def trained_with(distributed: bool) -> MegatronOptimizer:
    """The optimizer after one step of a tiny model."""
    layer = column_parallel()
    model, optimizer = with_optimizer(distributed, layer)
    model.zero_grad_buffer()
    layer(torch.ones(2, 1, 8))[0].square().sub(1).square().sum().backward()
    model.finish_grad_sync()
    optimizer.step()
    return optimizer


def current_device() -> None:
    column_parallel()


def streams() -> None:
    groups = ProcessGroupCollection.use_mpu_process_groups()
    moe = config(
        num_moe_experts=2, moe_ffn_hidden_size=8, moe_router_topk=1, moe_router_pre_softmax=True
    )
    dispatcher = token_dispatcher.MoEAlltoAllTokenDispatcher(2, [0, 1], moe, pg_collection=groups)
    chosen = torch.tensor([[True, False], [False, True]])
    tokens, probs = dispatcher.dispatch_preprocess(torch.eye(2, 8), chosen, chosen.float())
    dispatcher.token_dispatch(tokens, probs)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    end.record()
    assert start.elapsed_time(end) >= 0
    torch.cuda.synchronize()


def rng() -> None:
    tensor_parallel.model_parallel_cuda_manual_seed(3)
    tracker = tensor_parallel.get_cuda_rng_tracker()
    saved = tracker.get_states()

    def draws() -> tuple[torch.Tensor, torch.Tensor]:
        with tracker.fork():
            inner = torch.rand(3)
        return inner, torch.rand(3)

    torch.cuda.manual_seed(5)
    first = draws()
    tracker.set_states(saved)
    torch.cuda.manual_seed(5)
    again = draws()
    assert all(map(torch.equal, first, again)), "not reproducible"
    assert not torch.equal(*first), "the fork drew from the default generator"
    x = torch.ones(64, requires_grad=True)
    dropped = tensor_parallel.checkpoint(lambda x: F.dropout(x, 0.5), False, x)
    dropped.sum().backward()
    assert torch.equal(x.grad, dropped.detach()), "recomputed with another mask"


def literal_devices() -> None:
    trained_with(distributed=False)
    moe_utils.save_to_aux_losses_tracker("loss", torch.ones(()), 1, 1)


def pinned_memory() -> None:
    group = torch.distributed.group.WORLD
    rope_utils.get_pos_emb_on_this_cp_rank(torch.ones(2, 1), seq_dim=0, cp_group=group)


def tensor_cuda() -> None:
    data.broadcast_data(["x"], {"x": torch.ones(2, dtype=torch.int64)}, torch.int64)


def type_strings() -> None:
    trained_with(distributed=True)


def split_sizes() -> None:
    sizes = token_dispatcher.maybe_move_tensor_to_cpu(torch.tensor([1, 2]), as_numpy=True)
    torch.ones(3).split(sizes.tolist())
    assert not torch.is_tensor(sizes), "split sizes are still a tensor"


def uneven_parts() -> None:
    """Two ranks, one of them a fork, with 1 and 2 rows."""
    torch.distributed.destroy_process_group()
    with tempfile.TemporaryDirectory() as folder:
        child = os.fork()
        rank = int(child == 0)
        try:
            torch.distributed.init_process_group(
                "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
            )
            group, sizes = torch.distributed.group.WORLD, [1, 2]
            own = torch.full((sizes[rank], 1), 1.0 + rank)
            whole = mappings._gather_along_first_dim(own, group, sizes)
            assert whole.flatten().tolist() == [1.0, 2.0, 2.0]
            part = mappings._reduce_scatter_along_first_dim(whole, group, sizes)
            assert part.tolist() == (2 * own).tolist()
        finally:
            if rank:
                os._exit(0)
            os.waitpid(child, 0)


def fusions() -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("torch.compile compiles")

    from torch._dynamo.callback import on_compile_start

    on_compile_start(refuse)
    fused_bias_swiglu.swiglu(torch.ones(2, 4))


def unusable_te() -> None:
    optimizer = trained_with(distributed=True).chained_optimizers[0].optimizer
    assert isinstance(optimizer, torch.optim.AdamW)
    router_gemm()


def inference_linear() -> None:
    """Of Megatron-LM's main branch: a wheel has nothing to be patched."""


def have_te() -> None:
    mla = MLATransformerConfig(
        num_layers=1,
        hidden_size=8,
        num_attention_heads=2,
        q_lora_rank=None,
        kv_lora_rank=4,
        qk_head_dim=4,
        qk_pos_emb_head_dim=2,
        v_head_dim=4,
        rope_type="rope",
        rotary_percent=1.0,
        add_bias_linear=False,
    )
    spec = get_gpt_layer_local_spec(multi_latent_attention=True).submodules.self_attention
    from megatron_coe.model.backends.torch import SDPACoreAttention

    spec.submodules.core_attention = SDPACoreAttention
    build_module(spec, config=mla, layer_number=1)


def router_gemm() -> None:
    moe_utils.router_gating_linear(torch.ones(2, 4), torch.ones(3, 4), None, torch.float32)


def selective_recompute() -> None:
    x = torch.ones(3, requires_grad=True)
    CheckpointWithoutOutput().checkpoint(torch.exp, x)


def distributed_optimizer_load() -> None:
    optimizer = trained_with(distributed=True).chained_optimizers[0]
    (parameter,) = optimizer.model_param_group_index_map
    tensors = optimizer._get_main_param_and_optimizer_states(parameter)
    # A checkpoint has the tensors only: the step count is kept apart from them.
    tensors.pop("step")
    with torch.no_grad():
        optimizer._set_main_param_and_optimizer_states(parameter, tensors)
        # Or the count is that from before loading.
        stale = {**tensors, "step": torch.zeros(())}
        optimizer._set_main_param_and_optimizer_states(parameter, stale)
    (state,) = optimizer.optimizer.state.values()
    assert state["step"] == 1


def distributed_optimizer_state() -> None:
    _, chained = with_optimizer(True, column_parallel(), column_parallel())
    (optimizer,) = chained.chained_optimizers
    saved = optimizer.state_dict()
    for group in saved["optimizer"]["param_groups"]:
        group["step"] = 3.0
    optimizer.load_state_dict(saved)
    first, second = (state["step"] for state in optimizer.optimizer.state.values())
    assert first == second == 3
    first += 1
    assert second == 3, "parameters share a step count"


class HostReads(TorchDispatchMode):
    """Fails where a value is read back to the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("a value is read back to the host")
        return func(*args, **(kwargs or {}))


def gradient_norm() -> None:
    tensors = [torch.randn(n, generator=torch.Generator().manual_seed(n)) for n in (3, 5, 1)]
    with HostReads():
        norm, _ = clip_grads.l2_norm_impl(2048, torch.zeros(1), [tensors], False)
    torch.testing.assert_close(norm, torch.cat(tensors).norm().reshape(1))


class Products(TorchDispatchMode):
    """Fails where a tensor is multiplied into a new one."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.mul.Tensor:
            raise RuntimeError("a copy is multiplied into a new tensor first")
        return func(*args, **(kwargs or {}))


def multi_tensor_scale() -> None:
    sources = [torch.randn(n, generator=torch.Generator().manual_seed(n)) for n in (3, 5)]
    for scale in (1.0, 0.5):
        targets = [torch.empty(len(source), dtype=torch.bfloat16) for source in sources]
        with Products():
            optimizer.multi_tensor_scale_impl(2048, torch.zeros(1), [sources, targets], scale)
        for source, target in zip(sources, targets, strict=True):
            assert torch.equal(target, (source * scale).bfloat16())


def foreign_apex() -> None:
    norm = LocalSpecProvider().layer_norm(rms_norm=False)
    norm(config(persist_layer_norm=False), 8)


ROWS: dict[str, Callable[[], None]] = {
    "unusable_te": unusable_te,
    "inference_linear": inference_linear,
    "current_device": current_device,
    "streams": streams,
    "rng": rng,
    "literal_devices": literal_devices,
    "pinned_memory": pinned_memory,
    "tensor_cuda": tensor_cuda,
    "type_strings": type_strings,
    "split_sizes": split_sizes,
    "uneven_parts": uneven_parts,
    "fusions": fusions,
    "have_te": have_te,
    "router_gemm": router_gemm,
    "selective_recompute": selective_recompute,
    "distributed_optimizer_load": distributed_optimizer_load,
    "distributed_optimizer_state": distributed_optimizer_state,
    "gradient_norm": gradient_norm,
    "multi_tensor_scale": multi_tensor_scale,
    "foreign_apex": foreign_apex,
}


def fault_in_a_fork(row: str, left_out: str | None) -> str | None:
    """The exception of a row's exercise, `None` if it passed; the patches die with the fork."""
    reader, writer = os.pipe()
    if os.fork() == 0:
        fault = None
        try:
            for table in (cpu.PATCHES, patches.PATCHES):
                table.pop(left_out, None)
            patches.install()
            cpu.install()
            store = torch.distributed.HashStore()
            torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
            parallel_state.initialize_model_parallel()
            if left_out != "rng":
                tensor_parallel.model_parallel_cuda_manual_seed(1)
            ROWS[row]()
        except BaseException as error:
            fault = f"{type(error).__name__}: {error}"
        os.write(writer, json.dumps(fault).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        answer = pipe.read()
    os.wait()
    return json.loads(answer)


if __name__ == "__main__":
    rows = sys.argv[1:]
    print(
        json.dumps({row: [fault_in_a_fork(row, row), fault_in_a_fork(row, None)] for row in rows})
    )
    sys.stdout.flush()
