"""A run's settings: YAML files and dotted overrides, checked against the dataclasses below.

    settings = load_settings(Path("examples/quickstart.yaml"), ["train.steps=10"])

A file may name another with `extends: other.yaml` (relative to itself) and then holds only what
differs. Section `model` takes the fields of `CoEModelProvider` under Megatron's names; they are
checked by `megatron_coe.training.model.build_provider`, because knowing them means importing
Megatron. Everything else is checked here, before that import and before any process group exists.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

EXTENDS = "extends"

NOT_OFFERED = {
    "optimizer_cpu_offload": "Megatron's hybrid optimizer keeps its state where the checkpoints of "
    "this package do not look; share it out with parallel.use_distributed_optimizer instead",
    "use_precision_aware_optimizer": "it is Transformer Engine's, and untested here; share the "
    "optimizer's state out with parallel.use_distributed_optimizer instead",
    "use_megatron_fsdp": "its shards are untested with a layer entered several times; use "
    "parallel.use_distributed_optimizer",
}
"""Settings of Megatron's that people look for, and why they are not here."""


@dataclass
class ParallelSettings:
    """How the model is laid out over processes; the names of Megatron's `ModelParallelConfig`."""

    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    virtual_pipeline_model_parallel_size: int | None = None
    """Model chunks per pipeline stage (interleaved schedule); None: the plain schedule."""
    context_parallel_size: int = 1
    expert_model_parallel_size: int = 1
    expert_tensor_parallel_size: int | None = None
    """None: as `tensor_model_parallel_size`, Megatron's own default."""
    sequence_parallel: bool | None = None
    """None: on exactly when tensor_model_parallel_size > 1, where MoE training needs it."""
    use_distributed_optimizer: bool = False
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False


@dataclass
class DataSettings:
    """What is read. A prefix is the path of a `.bin/.idx` pair without the suffix."""

    tokenizer: str = ""
    """SentencePiece model file, or folder of a Hugging Face tokenizer."""
    train: list[str] = field(default_factory=list)
    """Prefixes of the training sets."""
    train_weights: list[float] | None = None
    """How much is drawn from each training set, in any unit; None: from each its own size."""
    valid: list[str] = field(default_factory=list)
    """Prefixes of the held-out sets; empty: no validation."""
    mode: Literal["packed", "examples"] = "packed"
    """packed: documents joined and cut every seq_length tokens; examples: one document per
    sequence, cut on the right and padded, padding left out of the loss (the paper's way)."""
    cache: str | None = None
    """Where index files are kept; None: beside the data."""


@dataclass
class TrainSettings:
    """Optimisation. A step is one update of the weights, by `global_batch_size` sequences."""

    steps: int = 1000
    stop_step: int | None = None
    """Stop after this step, saved, to be continued by the same command without it; None: go on to
    `steps`, which the learning rate's schedule spans in any case."""
    micro_batch_size: int = 1
    global_batch_size: int = 1
    seed: int = 42
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """auto: bf16 on a GPU, fp32 on a CPU (where bf16 products are hundreds of times slower)."""
    lr: float = 3e-4
    min_lr: float = 0.0
    lr_decay_style: Literal["constant", "linear", "cosine"] = "constant"
    lr_warmup_fraction: float = 0.1
    """Share of `steps` over which the learning rate rises linearly from 0."""
    weight_decay: float = 0.01
    decay_all_parameters: bool = False
    """Weight decay on every parameter (the paper's recipe), or not on norms (Megatron's)."""
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_eps: float = 1e-8
    clip_grad: float = 1.0
    """Largest global L2 norm of the gradient; 0: no clipping."""
    eval_interval: int = 0
    """Steps between validations; 0: only at the end."""
    eval_samples: int | None = None
    """How many of the first held-out sequences are used, the same each time; None: all."""
    deterministic: bool = True
    """On a GPU, use kernels whose sums have a fixed order: the same command, the same bits."""


@dataclass
class CheckpointSettings:
    """Where the state of the run is kept and how often it is written."""

    save: str | None = "${log.dir}/checkpoints"
    """Folder; a run resumes from the newest valid checkpoint in it. None: nothing is kept."""
    save_interval: int = 0
    """Steps between checkpoints; 0: only at the end."""
    keep: int = 2
    """How many of the newest checkpoints stay."""


@dataclass
class LogSettings:
    """What is reported, and where to."""

    dir: str = ""
    """Folder of config.yaml, metrics.jsonl and tensorboard/; empty: runs/<name of the file>."""
    interval: int = 10
    """Steps between records of the training loss."""
    wandb_project: str | None = None
    """Weights & Biases project; None: it is not used."""
    wandb_name: str | None = None
    profile_steps: list[int] | None = None
    """[first, last] steps, counted from 1, that torch's profiler traces into `dir`/profile."""


@dataclass
class Settings:
    """Everything that describes a run."""

    model: dict[str, Any] = field(default_factory=dict)
    parallel: ParallelSettings = field(default_factory=ParallelSettings)
    data: DataSettings = field(default_factory=DataSettings)
    train: TrainSettings = field(default_factory=TrainSettings)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    log: LogSettings = field(default_factory=LogSettings)

    def to_yaml(self) -> str:
        """The settings as YAML that `load_settings` reads back."""
        return OmegaConf.to_yaml(OmegaConf.structured(self))


SECTIONS = tuple(f.name for f in fields(Settings))


def load_settings(path: Path, overrides: Sequence[str] = ()) -> Settings:
    """Read `path`, what it extends, and `section.key=value` overrides, the later winning.

    Raises:
        ValueError: an unknown key (the nearest name is suggested), a wrong type, a cycle of
            `extends`, or text that is not YAML; the message names the file or the override.
        OSError: a file cannot be read.
    """
    merged = OmegaConf.structured(Settings(log=LogSettings(dir=f"runs/{path.stem}")))
    for source, content in _read_chain(path):
        merged = _merge(merged, content, str(source))
    for override in overrides:
        merged = _merge(merged, _parse_override(override), f"override {override!r}")
    try:
        settings = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:  # an interpolation that leads nowhere
        raise ValueError(f"{path}: {_first_line(error)}") from error
    assert isinstance(settings, Settings)
    return settings


def suggestion(name: str, known: Iterable[str]) -> str:
    """A hint that follows an unknown name: the nearest known one, or all if they are few."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; known are {', '.join(known)}" if len(known) <= 16 else ""


def _read_chain(path: Path) -> list[tuple[Path, DictConfig]]:
    """The file and all it extends, the most basic first."""
    chain: list[tuple[Path, DictConfig]] = []
    while True:
        if any(path.resolve() == earlier.resolve() for earlier, _ in chain):
            route = " -> ".join(str(source) for source in [*(p for p, _ in chain), path])
            raise ValueError(f"{path}: 'extends' goes round in a circle: {route}")
        content = _read_yaml(path)
        base = content.pop(EXTENDS, None)
        chain.append((path, content))
        if base is None:
            return chain[::-1]
        if not isinstance(base, str):
            raise ValueError(f"{path}: 'extends' must be the path of one file, got {base!r}")
        path = path.parent / base


def _read_yaml(path: Path) -> DictConfig:
    try:
        content = OmegaConf.load(path)
    except (yaml.YAMLError, UnicodeDecodeError, OmegaConfBaseException) as error:
        raise ValueError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, DictConfig):
        raise ValueError(f"{path}: must hold sections ({', '.join(SECTIONS)}), got a list")
    return content


def _parse_override(override: str) -> DictConfig:
    key, equals, _ = override.partition("=")
    if not equals or "." not in key:
        raise ValueError(f"override {override!r}: must have the form section.key=value")
    try:
        return OmegaConf.from_dotlist([override])
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ValueError(f"override {override!r}: {_first_line(error)}") from error


def _merge(base: DictConfig, content: DictConfig, source: str) -> DictConfig:
    """`base` with `content` laid over it; an error names the source, the key and a better name."""
    try:
        merged = OmegaConf.merge(base, content)
    except ConfigKeyError as error:
        key = str(error.full_key)
        section, _, name = key.rpartition(".")
        if name in NOT_OFFERED:
            raise ValueError(f"{source}: {key!r} is not offered: {NOT_OFFERED[name]}") from error
        known = [str(other) for other in (base[section] if section else base)]
        raise ValueError(f"{source}: unknown key {key!r}{suggestion(name, known)}") from error
    except (OmegaConfBaseException, TypeError) as error:
        key = getattr(error, "full_key", None)
        raise ValueError(f"{source}: {f'{key}: ' if key else ''}{_first_line(error)}") from error
    assert isinstance(merged, DictConfig)
    return merged


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
