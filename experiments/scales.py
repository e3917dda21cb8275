"""Scales of an experiment: the paper's presets, or the same made smaller.

Smaller models keep the subjects of the claims: the number of experts, the top-k, the iterations,
the residual and the routers. Layers shrink in proportion, widths to those of the scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.data import Data
from experiments.plans import Variant
from megatron_coe.analysis.comparison import run_name
from megatron_coe.config.loader import load_settings
from megatron_coe.config.run_config import Settings
from megatron_coe.config.validation import check_files_named, check_values

PRESETS = Path(__file__).resolve().parents[1] / "examples" / "paper"

_PAPER_LAYERS = 4


@dataclass(frozen=True)
class Scale:
    """Sizes of an experiment's models.

    Attributes:
        name: on the command line.
        layers: of a model that has four in the paper.
        expert_size: hidden channels of an expert; None: the paper's.
        vocab_size: of the tokenizer to train.
        settings: other overrides of the presets.
    """

    name: str
    layers: int
    expert_size: int | None
    vocab_size: int
    settings: tuple[str, ...]

    @property
    def shrinks(self) -> bool:
        """Whether models are smaller than the paper's."""
        return self.expert_size is not None

    def run_name(self, variant: Variant, seed: int) -> str:
        """Return the name of a run, the same in all experiments that can share it."""
        return run_name(variant.name if self.shrinks else variant.longer or variant.name, seed)

    def settings_of(
        self, variant: Variant, seed: int, run: Path, data: Data, overrides: Sequence[str]
    ) -> Settings:
        """Make the settings of a variant's run with a seed, in folder `run`.

        Raises:
            ValueError: an override is invalid.
            OSError: the preset is missing.
        """
        preset = PRESETS / f"{variant.longer or variant.name}.yaml"
        own = [*self._shrink(load_settings(preset)), *self.settings] if self.shrinks else []
        settings = load_settings(preset, [*own, *overrides])
        settings.train.seed = seed
        settings.log.dir = str(run)
        settings.checkpoint.save = str(run / "checkpoints")
        settings.data.tokenizer = str(data.tokenizer)
        settings.data.train, settings.data.valid = [str(data.train)], [str(data.valid)]
        check_values(settings)
        check_files_named(settings, held_out=True)
        return settings

    def _shrink(self, preset: Settings) -> list[str]:
        """Return overrides that make the sizes of a preset's model smaller."""
        layers = preset.model["num_layers"] * self.layers // _PAPER_LAYERS
        shrunk = [f"num_layers={layers}", f"moe_ffn_hidden_size={self.expert_size}"]
        if preset.model["moe_shared_expert_intermediate_size"] is not None:
            shrunk.append(f"moe_shared_expert_intermediate_size={self.expert_size}")
        return [f"model.{setting}" for setting in shrunk]


def _model(**values: int | float) -> tuple[str, ...]:
    return tuple(f"model.{name}={value}" for name, value in values.items())


def _train(**values: int | float | str) -> tuple[str, ...]:
    return tuple(f"train.{name}={value}" for name, value in values.items())


_SHORT_RUN = (
    *_train(
        lr=3e-3,
        min_lr=3e-4,
        lr_decay_style="cosine",
        lr_warmup_fraction=0.1,
        eval_samples=256,
        steps=300,
        global_batch_size=16,
        micro_batch_size=16,
        eval_interval=50,
    ),
    "data.mode=packed",
    "checkpoint.save_interval=50",
    "checkpoint.keep_latest=1",
)

TINY = Scale(
    "tiny",
    layers=2,
    expert_size=64,
    vocab_size=1024,
    settings=(
        *_model(
            hidden_size=128,
            num_attention_heads=4,
            kv_lora_rank=64,
            qk_head_dim=32,
            qk_pos_emb_head_dim=16,
            v_head_dim=32,
            seq_length=128,
            vocab_size=1024,
            original_max_position_embeddings=128,
        ),
        *_SHORT_RUN,
    ),
)
"""Minutes on two cores."""

SMALL = Scale(
    "small",
    layers=4,
    expert_size=128,
    vocab_size=2048,
    settings=(
        *_model(
            hidden_size=192,
            num_attention_heads=6,
            kv_lora_rank=96,
            qk_head_dim=32,
            qk_pos_emb_head_dim=16,
            v_head_dim=32,
            seq_length=256,
            vocab_size=2048,
            original_max_position_embeddings=256,
        ),
        *_SHORT_RUN,
    ),
)
"""Hours on two cores."""

PAPER = Scale("paper", layers=4, expert_size=None, vocab_size=8192, settings=())
"""The paper's models and recipe, on a GPU."""

SCALES = {scale.name: scale for scale in (TINY, SMALL, PAPER)}
