"""A model whose output layer and loss are one computes what Megatron's two steps do."""

from __future__ import annotations

import pytest
import torch
from megatron.core.models.gpt.gpt_model import GPTModel

from megatron_coe.megatron_compat import mtp
from megatron_coe.megatron_compat.versions import PARTS_ARE_PARTIALS, clear_aux_losses
from megatron_coe.model import linear_cross_entropy
from megatron_coe.model.gpt_model import LinearCrossEntropyModel
from tests.builders import randomize, tiny_provider, weigh_balance_losses
from tests.unit.training.runs import make_settings, make_trainer

V, B, S = 90, 3, 20
PADDING = {"vocab_size": V, "make_vocab_size_divisible_by": 64}
LINEAR = {"cross_entropy_loss_fusion": True, "cross_entropy_fusion_impl": "linear"}
UNFUSED = {"cross_entropy_loss_fusion": False}
MODELS = {
    "untied": {},
    "tied": {"share_embeddings_and_output_weights": True},
    "MTP": {"mtp_num_layers": 2},
    "MTP, tied": {"mtp_num_layers": 1, "share_embeddings_and_output_weights": True},
    "MTP, per token": {"mtp_num_layers": 2, "calculate_per_token_loss": True},
    "bf16": {"bf16": True, "params_dtype": torch.bfloat16},
}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch) -> None:
    monkeypatch.setattr(linear_cross_entropy, "_CHUNK_BYTES", {"cpu": 1})
    monkeypatch.setattr(linear_cross_entropy, "_ROW_MULTIPLE", 16)  # 4 chunks of 60 tokens


def model_of(**changes) -> GPTModel:
    """The same random weights for both; left to itself the padding would win."""
    model = tiny_provider(**PADDING, **changes).provide().train()
    randomize(model, torch.Generator().manual_seed(3))
    with torch.no_grad():
        model.shared_embedding_or_output_weight()[V:] *= 10
        if model.output_layer.weight is not None:
            model.output_layer.weight[V:] *= 10
    return model


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(V, (B, S + 1), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(B, S)
    mask[0, 5:] = mask[2] = 0  # one sequence ends early, one has no label
    return {
        "input_ids": ids[:, :-1],
        "position_ids": torch.arange(S).expand(B, S),
        "attention_mask": None,
        "labels": ids[:, 1:],
        "loss_mask": mask,
    }


def results(model: GPTModel, data: dict) -> dict[str, torch.Tensor]:
    """The losses that count, and every gradient of their sum."""
    weigh_balance_losses(1.0)
    losses = model(**data)
    clear_aux_losses()
    mask = data["loss_mask"] if data["loss_mask"] is not None else torch.ones(B, S)
    assert losses.shape == (B, S) and losses.dtype == torch.float32
    (losses * mask).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"losses": losses * mask, **gradients}


@pytest.mark.parametrize("masked", [True, False], ids=["with a mask", "without"])
@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_losses_and_gradients_are_those_of_the_unfused_model(single_rank, changes, masked) -> None:
    per_token = changes.get("calculate_per_token_loss", False)
    data = batch()
    if not masked:
        if per_token and PARTS_ARE_PARTIALS:
            pytest.skip("without a mask Megatron's own MTP losses keep its local factor")
        data["loss_mask"] = None
    unfused, fused = model_of(**changes, **UNFUSED), model_of(**changes, **LINEAR)
    assert type(unfused) is GPTModel and isinstance(fused, LinearCrossEntropyModel)
    if per_token:
        mtp.install()
    expected, found = results(unfused, data), results(fused, data)
    assert found.keys() == expected.keys()
    tolerance = TOLERANCE[unfused.output_layer.config.params_dtype]
    for name, value in expected.items():
        gap = torch.linalg.vector_norm((found[name] - value).double())
        assert gap <= tolerance * torch.linalg.vector_norm(value.double()), name
    output = fused.shared_embedding_or_output_weight() if "tied" in changes else None
    output = fused.output_layer.weight if output is None else output
    assert output is None or not output.grad[V:].any()


def test_logits_are_still_to_be_had(single_rank) -> None:
    data = {**batch(), "labels": None, "loss_mask": None}
    unfused, fused = model_of(**UNFUSED).eval(), model_of(**LINEAR).eval()
    with torch.no_grad():
        assert torch.equal(fused(**data), unfused(**data))


def test_training_holds_no_logits(single_rank) -> None:
    """Of 60 tokens nothing [60, V] is saved, whatever its shape."""
    widths = set()

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        widths.add((tensor.numel(), tensor.shape))
        return tensor

    model = model_of(**LINEAR)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**batch())
    assert (B * S * 32) in {count for count, _ in widths}
    assert not {shape for count, shape in widths if count == B * S * 128}


def test_an_adapted_output_layer_is_called(single_rank) -> None:
    """By default it falls back, on a GPU; asked for by name it refuses."""

    class Adapted(torch.nn.Module):
        sequence_parallel = False

        def __init__(self, layer: torch.nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, hidden, weight=None, runtime_gather_output=None):
            logits, bias = self.layer(hidden, weight, runtime_gather_output)
            return 2 * logits, bias

    model = model_of(**LINEAR)
    plain = model(**batch())
    model.output_layer = Adapted(model.output_layer)
    with pytest.raises(ValueError, match="one is a Adapted"):
        model(**batch())
    model.config.cross_entropy_loss_fusion = None
    assert not torch.allclose(model(**batch()), plain)


@pytest.mark.parametrize(
    "changes",
    [{}, {"share_embeddings_and_output_weights": True}, {"mtp_num_layers": 2}],
    ids=["untied", "tied", "MTP"],
)
def test_steps_are_those_of_the_unfused_model(single_rank, changes) -> None:
    """Through Megatron's gradient buffers: loss, gradient norm, and the weights that follow."""
    train = {"clip_grad": 0.1, "lr_warmup_fraction": 0.0}
    runs = []
    for fusion in (UNFUSED, LINEAR):
        trainer = make_trainer(make_settings(model={**changes, **fusion}, train=train), single_rank)
        (chunk,) = trainer.train_state.chunks
        randomize(chunk.module, torch.Generator().manual_seed(4), std=0.1)
        trainer.train_state.optimizer.reload_model_params()
        parameters = dict(chunk.module.named_parameters())
        before = {name: weight.detach().clone() for name, weight in parameters.items()}
        runs.append((before, [trainer.step() for _ in range(3)], parameters))
    (before, steps, after), (_, fused_steps, fused_after) = runs
    for step, other in zip(steps, fused_steps, strict=True):
        assert other.loss == pytest.approx(step.loss, rel=1e-5)
        assert other.grad_norm == pytest.approx(step.grad_norm, rel=1e-5)
        assert step.grad_norm > 0.1
    for name, weight in after.items():
        # Adam makes much of rounding where a gradient is near 0.
        gap = torch.linalg.vector_norm(fused_after[name] - weight)
        assert gap <= 2e-3 * torch.linalg.vector_norm(weight - before[name]), name
