"""The same MoE by transformers, whose `grouped_mm` experts are its fastest on a CPU.

Both sides are one model: with one iteration and the outer residual this package's model is
`deepseek_v2`. They share their weights' memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from benchmarks.layers import BACKWARD, FORWARD
from benchmarks.steps import RandomTokens
from benchmarks.timing import Lap, Variant
from megatron_coe.config.model_section import build_provider
from megatron_coe.config.run_config import Settings
from megatron_coe.conversion.hf_config import to_deepseek_v2_config
from megatron_coe.distributed.seeds import seed_everything
from megatron_coe.distributed.train_state import build_model
from megatron_coe.model.provider import CoEModelProvider

if TYPE_CHECKING:
    from transformers import DeepseekV2ForCausalLM

CHANGES = ("model.coe_residual=outer", "model.moe_aux_loss_coeff=0.0", "train.precision=fp32")
"""Overrides that make a preset of one iteration the model of transformers, which has no auxiliary
loss and no copies of weights in another precision."""


@dataclass(frozen=True)
class Pair:
    """The two models and their common batch."""

    provider: CoEModelProvider
    ours: DistributedDataParallel
    theirs: DeepseekV2ForCausalLM
    tokens: Tensor
    """[B, S], as `labels`."""
    labels: Tensor

    def variants(self) -> list[Variant]:
        """Return both as variants: forward with loss, and backward, without optimizer step."""
        count = self.tokens.numel()
        flops = count * self.provider.flops_per_token(self.provider.seq_length)
        return [
            Variant(
                "moe_8-64", lambda lap: self._run(self._our_loss, lap), self._clear, flops, count
            ),
            Variant(
                "transformers deepseek_v2",
                lambda lap: self._run(self._their_loss, lap),
                self._clear,
                flops,
                count,
            ),
        ]

    def results(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the loss and three gradients, which depend on all others, of both models."""
        for variant in self.variants():
            variant.prepare()
            variant.run(lambda part: None)
        ours = dict(self.ours.module.named_parameters())
        theirs = dict(self.theirs.named_parameters())
        names = (
            ("embedding.word_embeddings.weight", "model.embed_tokens.weight"),
            ("decoder.layers.0.mlp.experts.linear_fc1.weight", f"{_LAYER}0.mlp.experts.{_UP}"),
            ("decoder.layers.0.mlp.router.0.weight", f"{_LAYER}0.mlp.gate.weight"),
        )
        with torch.no_grad():
            losses = {"loss": self._our_loss()}, {"loss": self._their_loss()}
        expected = {name: theirs[other].grad for name, other in names}
        # Ours of the embedding ends with padding.
        found = {name: ours[name].main_grad[: len(grad)] for name, grad in expected.items()}
        return losses[0] | found, losses[1] | expected

    def _clear(self) -> None:
        self.theirs.zero_grad(set_to_none=True)

    def _run(self, loss_of: Callable[[], Tensor], lap: Lap) -> None:
        if loss_of == self._our_loss:
            self.ours.zero_grad_buffer()  # within the time: theirs needs none
        loss = loss_of()
        lap(FORWARD)
        loss.backward()
        lap(BACKWARD)

    def _our_loss(self) -> Tensor:
        positions = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        positions = positions.expand_as(self.tokens)
        losses_BS = self.ours(self.tokens, positions, None, labels=self.labels)
        return losses_BS.float().mean()

    def _their_loss(self) -> Tensor:
        return self.theirs(
            input_ids=self.tokens,
            labels=self.labels,
            shift_labels=self.labels,  # shifted already
            use_cache=False,
        ).loss


_LAYER, _UP = "model.layers.", "gate_up_proj"


def build_pair(settings: Settings, device: torch.device) -> Pair:
    """Build both models with one set of weights.

    Raises:
        ValueError: transformers is not installed, or has no `experts_implementation`.
    """
    try:
        from transformers import AutoModelForCausalLM, DeepseekV2Config
    except ImportError as error:
        raise ValueError(
            "the comparison with transformers needs its version 5: `pip install "
            "'transformers>=5'`, or omit '--what transformers'"
        ) from error
    seed_everything(settings.train.seed)
    provider = build_provider(settings, device)
    (ours,) = build_model(provider, settings.parallel, device, settings.train.seed)
    keys = to_deepseek_v2_config(provider)
    config = DeepseekV2Config(**{k: v for k, v in keys.items() if k != "model_type"})
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(config, experts_implementation="grouped_mm")
    _share_weights(ours.module, theirs, provider)
    theirs.model.rotary_emb = type(theirs.model.rotary_emb)(config).to(device)
    dataset = RandomTokens(provider)
    items = [dataset[index] for index in range(settings.train.micro_batch_size)]
    tokens, labels = (torch.stack([i[k] for i in items]).to(device) for k in ("tokens", "labels"))
    return Pair(provider, ours.train(), theirs.train(), tokens, labels)


def _share_weights(
    ours: torch.nn.Module, theirs: torch.nn.Module, provider: CoEModelProvider
) -> None:
    """Give transformers' model, built on meta, this package's weights (without padding)."""
    weights, V = dict(ours.named_parameters()), provider.vocab_size
    state = {
        "model.embed_tokens.weight": weights["embedding.word_embeddings.weight"][:V],
        "model.norm.weight": weights["decoder.final_layernorm.weight"],
        "lm_head.weight": weights["output_layer.weight"][:V],
    }
    for index in range(provider.num_layers):
        source, target = f"decoder.layers.{index}.", f"{_LAYER}{index}."
        for name, other in _NAMES.items():
            state[target + other] = weights[source + name]
        gate, up = weights[f"{source}mlp.shared_experts.linear_fc1.weight"].chunk(2)
        state[f"{target}mlp.shared_experts.gate_proj.weight"] = gate
        state[f"{target}mlp.shared_experts.up_proj.weight"] = up
    detached = {name: torch.nn.Parameter(weight.detach()) for name, weight in state.items()}
    theirs.load_state_dict(detached, strict=True, assign=True)


_NAMES = {
    "input_layernorm.weight": "input_layernorm.weight",
    "self_attention.linear_q_proj.weight": "self_attn.q_proj.weight",
    "self_attention.linear_kv_down_proj.weight": "self_attn.kv_a_proj_with_mqa.weight",
    "self_attention.kv_layernorm.weight": "self_attn.kv_a_layernorm.weight",
    "self_attention.linear_kv_up_proj.weight": "self_attn.kv_b_proj.weight",
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    "mlp.router.0.weight": "mlp.gate.weight",
    "mlp.experts.linear_fc1.weight": f"mlp.experts.{_UP}",
    "mlp.experts.linear_fc2.weight": "mlp.experts.down_proj",
    "mlp.shared_experts.linear_fc2.weight": "mlp.shared_experts.down_proj.weight",
}
"""Weights of a layer here -> in transformers' `deepseek_v2`, in the same memory layout."""
