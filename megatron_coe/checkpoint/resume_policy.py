"""Which settings may change between a checkpoint and the run that resumes from it: one table."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import MISSING, asdict, dataclass, fields
from enum import Enum
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from megatron_coe.checkpoint.tokenizer import describe_identity, tokenizer_difference
from megatron_coe.config.run_config import Settings, TrainSettings
from megatron_coe.config.schedules import batch_schedule, lr_spans
from megatron_coe.data.tokenizer import Tokenizer
from megatron_coe.model.provider import CoEModelProvider


class Policy(Enum):
    """What happens when a setting has changed."""

    SILENT = "not printed: the numbers stay the same, up to the order of sums"
    PRINTED = "printed: training continues, differently"
    REFUSED = "the run ends: the model or its data would mean something else"


_SILENT, _PRINTED, _REFUSED = Policy.SILENT, Policy.PRINTED, Policy.REFUSED

RULES: tuple[tuple[str, Policy], ...] = (
    ("log.*", _SILENT),
    ("checkpoint.*", _SILENT),
    ("parallel.*", _SILENT),
    ("data.tokenizer", _SILENT),  # its content is compared, not its path: see `tokenizer_change`
    ("data.valid", _SILENT),
    ("data.cache", _SILENT),
    ("data.num_workers", _SILENT),
    ("data.*", _REFUSED),  # of the training sets the content is compared: see `data_change`
    ("train.exit_step", _SILENT),
    ("train.micro_batch_size", _SILENT),
    ("train.eval_*", _SILENT),
    ("train.on_nonfinite", _SILENT),
    ("train.max_skipped_steps", _SILENT),
    ("train.hang_timeout_s", _SILENT),
    # The learning rate schedule depends on it: see `_keeps_schedule`.
    ("train.steps", _REFUSED),
    ("train.seed", _REFUSED),
    ("train.global_batch_size", _REFUSED),
    ("train.rampup_batch_size", _REFUSED),
    ("train.precision", _REFUSED),
    ("train.freeze", _REFUSED),  # what was frozen has no moments in the checkpoint
    ("train.optimizer", _REFUSED),  # each has a state of its own
    ("train.*", _PRINTED),
    ("model.backend", _SILENT),
    ("model.recompute_*", _SILENT),
    ("model.*_fusion", _SILENT),
    ("model.cross_entropy_fusion_impl", _SILENT),
    ("model.moe_token_dispatcher_type", _SILENT),
    ("model.moe_grouped_gemm", _SILENT),
    ("model.moe_grouped_gemm_backend", _SILENT),
    ("model.attention_backend", _SILENT),
    ("model.*_dropout", _PRINTED),
    ("model.moe_aux_loss_coeff", _PRINTED),
    ("model.moe_z_loss_coeff", _PRINTED),
    ("model.moe_router_bias_update_rate", _PRINTED),
    ("model.*", _REFUSED),
    ("*", _PRINTED),
)
"""Patterns of keys; the first that matches decides."""

_TOKENIZER = "data.tokenizer"
DATA = "data.train"
_LENGTH = "model.seq_length"


@dataclass(frozen=True)
class Change:
    """A setting that differs from the checkpoint's."""

    key: str
    before: object
    now: object
    is_refused: bool

    def __str__(self) -> str:
        return f"{self.key} was {self.before!r} and is {self.now!r}"


def policy_of(key: str) -> Policy:
    """Return what happens when the setting `key` has changed."""
    return next(policy for pattern, policy in RULES if fnmatchcase(key, pattern))


def changes(
    before: Settings, now: Settings, model_only: bool = False, step: int = 0
) -> list[Change]:
    """Return the changes that are printed or refused, sorted by key.

    Args:
        before, now: the checkpoint's settings and the present ones.
        model_only: compare only what the model depends on, which its sequence length is not.
        step: of the checkpoint.
    """
    old, new = dict(_flat(before)), dict(_flat(now))
    found = []
    for key in sorted(old.keys() | new.keys()):
        policy = policy_of(key)
        is_models = key.startswith("model.") and key != _LENGTH
        if policy is _SILENT or (model_only and not is_models):
            continue
        then, here = _value(key, old), _value(key, new)
        if _comparable(key, then) != _comparable(key, here):
            keeps = key == "train.steps" and _keeps_schedule(before.train, now.train, step)
            found.append(Change(key, then, here, is_refused=policy is _REFUSED and not keeps))
    return found


def _keeps_schedule(before: TrainSettings, now: TrainSettings, step: int) -> bool:
    """Return whether `train.steps` has not affected the learning rate of a checkpoint.

    It has not between warm-up and decay, and never where it falls with the square root of the step.
    """
    if before.lr_decay_style != now.lr_decay_style:
        return False
    spans = [lr_spans(train) for train in (before, now)]
    if now.lr_decay_style == "inverse-square-root":
        return spans[0].warmup == spans[1].warmup
    if now.lr_decay_style not in ("constant", "WSD"):
        return False
    position = spans[1].position(step, batch_schedule(now).samples_after(step))
    is_constant = now.lr_decay_style == "constant"
    return all(
        each.warmup <= position and (is_constant or position <= each.total - (each.wsd_decay or 0))
        for each in spans
    )


def tokenizer_change(checkpoint: Path, tokenizer: Tokenizer) -> Change | None:
    """Compare a tokenizer with that of a checkpoint; None if the ids are the same."""
    if difference := tokenizer_difference(checkpoint, tokenizer):
        then, here = map(describe_identity, difference)
        return Change(_TOKENIZER, then, here, is_refused=True)
    return None


def data_change(before: list[dict[str, Any]], now: list[dict[str, Any]]) -> Change | None:
    """Compare the training sets by content and order, whatever their paths; None if equal."""
    if len(before) == len(now):
        pairs = zip(before, now, strict=True)
        differing = [pair for pair in pairs if _without_name(pair[0]) != _without_name(pair[1])]
        if not differing:
            return None
        before, now = map(list, zip(*differing, strict=True))
    return Change(DATA, _described(before), _described(now), is_refused=True)


def _without_name(data: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in data.items() if key != "name"}


def _described(data: list[dict[str, Any]]) -> str:
    return "; ".join(
        f"{each['name']}: {each['documents']:,} documents, {each['tokens']:,} tokens, SHA-256 "
        f"{each['sha256'][:12]}…"
        for each in data
    )


def _flat(settings: Settings) -> Iterator[tuple[str, object]]:
    for section, values in asdict(settings).items():
        for name, value in values.items():
            yield f"{section}.{name}", value


def _value(key: str, side: dict[str, object]) -> object:
    """Return a setting, or the model's default for a field that is not given."""
    if key in side or not key.startswith("model."):
        return side.get(key)
    field = next((f for f in fields(CoEModelProvider) if f"model.{f.name}" == key), None)
    if field is None or field.default is MISSING:
        return None
    return field.default


def _comparable(key: str, value: object) -> object:
    if key == DATA and isinstance(value, list):
        return [os.path.abspath(path) for path in value]
    return value
