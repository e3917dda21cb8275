"""Sizes of the paper's models that fit a machine and the time of a round."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_coe.config.loader import load_settings
from megatron_coe.config.run_config import Settings
from megatron_coe.config.validation import check_values


@dataclass(frozen=True)
class Scale:
    """Sizes of a benchmark. H, F, N and heads are the presets' own unless overridden.

    The ratio of vocabulary to layers decides the share of the iterations in a step: the paper's 4
    layers have 25,600 ids each with a vocabulary of 102,400, and 8,000 with one of 32,000.
    """

    sequences: int
    seq_length: int
    num_layers: int
    vocab_size: int
    overrides: tuple[str, ...] = ()
    """`section.key=value`, applied to the preset last."""

    @property
    def tokens(self) -> int:
        """T of a step, which is one micro-batch."""
        return self.sequences * self.seq_length


TINY = (
    "model.hidden_size=64",
    "model.num_attention_heads=4",
    "model.kv_lora_rank=32",
    "model.qk_head_dim=16",
    "model.qk_pos_emb_head_dim=16",
    "model.v_head_dim=16",
    "model.moe_ffn_hidden_size=32",
    "model.moe_shared_expert_intermediate_size=32",
)

SCALES = {
    "paper": Scale(64, 512, 4, 102_400),
    "paper-32k": Scale(64, 512, 4, 32_000),
    "cpu": Scale(4, 512, 1, 25_600),
    "cpu-32k": Scale(4, 512, 1, 8_000),
    "tiny": Scale(2, 32, 1, 128, TINY),
}
"""`paper` needs a large GPU; `cpu` is its width and proportions with a sixteenth of its tokens."""


def preset_settings(preset: Path, scale: Scale, *changes: str) -> Settings:
    """Load a preset of examples/paper at a scale, with `changes` overriding both.

    Raises:
        ValueError: as `load_settings`.
        OSError: as `load_settings`.
    """
    settings = load_settings(
        preset,
        [
            f"model.num_layers={scale.num_layers}",
            f"model.seq_length={scale.seq_length}",
            f"model.vocab_size={scale.vocab_size}",
            "model.backend=torch",
            f"train.micro_batch_size={scale.sequences}",
            f"train.global_batch_size={scale.sequences}",
            "train.deterministic=false",
            "checkpoint.save=null",
            *scale.overrides,
            *changes,
        ],
    )
    check_values(settings)
    return settings
