"""Padding of the vocabulary has no part in a model's loss, gradients or choice of tokens."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.builders import randomize, tiny_provider, weigh_balance_losses
from tests.unit.training.runs import make_settings, make_trainer, weights

V, PADDED = 90, 128
PADDING = {"vocab_size": V, "make_vocab_size_divisible_by": 64}
BF16 = {"bf16": True, "params_dtype": torch.bfloat16}
MODELS = {
    "untied": {},
    "tied": {"share_embeddings_and_output_weights": True},
    "bf16": BF16,
    "bf16, fused loss": {
        **BF16,
        "cross_entropy_loss_fusion": True,
        "cross_entropy_fusion_impl": "native",
    },
}


def padded_model(**changes) -> torch.nn.Module:
    """Random weights; left to itself the padding would take nearly all of the probability."""
    model = tiny_provider(**PADDING, **changes).provide().train()
    randomize(model, torch.Generator().manual_seed(3))
    with torch.no_grad():
        model.shared_embedding_or_output_weight()[V:] *= 10
        if model.output_layer.weight is not None:
            model.output_layer.weight[V:] *= 10
    return model


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids, labels and positions [B, S]."""
    ids = torch.randint(V, (2, 21), generator=torch.Generator().manual_seed(1))
    return ids[:, :-1], ids[:, 1:], torch.arange(20).expand(2, 20)


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_loss_and_gradients_are_those_of_the_vocabulary(single_rank, changes) -> None:
    """Against plain cross-entropy in fp64, from the hidden states that the output layer takes."""
    model = padded_model(**changes)
    tokens, labels, positions = batch()
    taken = []
    model.output_layer.register_forward_pre_hook(lambda _, inputs: taken.append(inputs[0]))
    losses = model(tokens, positions, None, labels=labels)
    (hidden,) = taken
    hidden.retain_grad()
    weigh_balance_losses(1.0)
    losses.sum().backward()

    tied = changes.get("share_embeddings_and_output_weights")
    weight = model.embedding.word_embeddings.weight if tied else model.output_layer.weight
    x_SBH = hidden.detach().double().requires_grad_()
    rows = weight.detach()[:V].double().requires_grad_()
    expected = F.cross_entropy((x_SBH @ rows.T).permute(1, 2, 0), labels, reduction="none")
    expected.sum().backward()
    tolerance = 1e-5 if losses.dtype == weight.dtype == torch.float32 else 2e-2
    scale = {"rtol": tolerance, "atol": tolerance}
    torch.testing.assert_close(losses.double(), expected, **scale)
    torch.testing.assert_close(hidden.grad.double(), x_SBH.grad, **scale)
    assert not weight.grad[V:].any()
    if not tied:  # where the embedding's gradient is not added
        torch.testing.assert_close(weight.grad[:V].double(), rows.grad, **scale)


@pytest.mark.parametrize("gathered", [None, True], ids=["as they are", "gathered"])
def test_no_token_of_the_padding_can_be_chosen(single_rank, gathered) -> None:
    """What generation takes the logits for, whichever way it chooses."""
    model = padded_model().eval()
    tokens, _, positions = batch()
    logits = model(tokens, positions, None, runtime_gather_output=gathered)
    assert logits.shape == (2, 20, PADDED) and logits.isfinite().all()
    assert logits.argmax(dim=-1).max() < V
    assert not logits.softmax(dim=-1)[..., V:].any()
    assert not (logits / 0.5).softmax(dim=-1)[..., V:].any()  # a low temperature
    assert (logits[..., :V].abs() > 0.01).float().mean() > 0.9  # the tokens' own are left


def test_a_model_without_padding_is_left_as_megatron_builds_it(single_rank) -> None:
    model = tiny_provider(vocab_size=128, make_vocab_size_divisible_by=64).provide()
    assert not model.output_layer._forward_hooks


@pytest.mark.parametrize("changes", [{}, {"mtp_num_layers": 2}], ids=["plain", "MTP"])
def test_steps_are_those_of_a_model_without_padding(single_rank, changes) -> None:
    """Loss, gradient norm (it clips) and the weights that follow, of three steps."""
    train = {"clip_grad": 0.1, "lr_warmup_fraction": 0.0}
    runs = []
    for multiple in (1, 64):
        model = {**changes, "make_vocab_size_divisible_by": multiple}
        trainer = make_trainer(make_settings(model=model, train=train), single_rank)
        (chunk,) = trainer.train_state.chunks
        randomize(chunk.module, torch.Generator().manual_seed(4), std=0.1)
        with torch.no_grad():
            for name, weight in runs[0][0].items() if runs else ():
                chunk.get_parameter(name)[: len(weight)] = weight
        trainer.train_state.optimizer.reload_model_params()
        before = weights(trainer)
        steps = [trainer.step() for _ in range(3)]
        runs.append((before, steps, weights(trainer)))
    (_, steps, after), (_, padded_steps, padded_after) = runs
    for step, other in zip(steps, padded_steps, strict=True):
        assert other.loss == pytest.approx(step.loss, rel=1e-5)
        assert other.grad_norm == pytest.approx(step.grad_norm, rel=1e-5)
        assert step.grad_norm > 0.1
    for name, weight in after.items():
        torch.testing.assert_close(padded_after[name][: len(weight)], weight, rtol=0, atol=1e-5)
