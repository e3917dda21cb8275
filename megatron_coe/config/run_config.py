"""A run's settings: YAML files and dotted overrides, checked against the dataclasses below.

    settings = load_settings(Path("examples/quickstart.yaml"), ["train.steps=10"])

A file may name another with `extends: other.yaml` (relative to itself) and then holds only what
differs. A value may refer to another, `${section.key}`; nothing else is looked up for it (not the
environment, which would end up in every checkpoint), and no tag of YAML makes an object of Python.
The `config.yaml` of a checkpoint or of a run's folder names the places where it lies (`places`).
Section `model` takes the fields of `CoEModelProvider` under Megatron's names; they are
checked by `megatron_coe.config.model_section.build_provider`, because knowing them means importing
Megatron. Everything else is checked here, before that import and before any process group exists.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from megatron_coe.config.locations import own_places

EXTENDS = "extends"

# Far beyond what settings need: a file that is larger is no file of settings, or is hostile.
MAX_BYTES = 1 << 20
MAX_NESTING = 50
MAX_REFERENCES = 10
MAX_CHARACTERS = 1 << 16
_REFERENCE = re.compile(r"\$\{([A-Za-z_]\w*(?:\.\w+)+)\}")

NOT_OFFERED = {
    "optimizer_cpu_offload": "Megatron's hybrid optimizer keeps its state where the checkpoints of "
    "this package do not look; share it out with parallel.use_distributed_optimizer instead",
    "use_precision_aware_optimizer": "it is Transformer Engine's, and untested here; share the "
    "optimizer's state out with parallel.use_distributed_optimizer instead",
    "use_megatron_fsdp": "its shards are untested with a layer entered several times; use "
    "parallel.use_distributed_optimizer",
}
"""Settings of Megatron's that people look for, and why they are not here."""


def _choice(*values: str) -> str:
    """A field that takes one of these, the first unless another is given.

    In metadata: OmegaConf knows `Literal` from 2.4 on only, and hydra-core, which Megatron-Bridge
    requires, wants one before that.
    """
    return field(default=values[0], metadata={"choices": values})


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
    """How much is drawn from each training set, in any unit (0: it is not read); None: from each
    its own size."""
    valid: list[str] = field(default_factory=list)
    """Prefixes of the held-out sets; empty: no validation."""
    mode: str = _choice("packed", "examples")
    """packed: documents joined and cut every seq_length tokens; examples: one document per
    sequence, cut on the right and padded, padding left out of the loss (the paper's way)."""
    cache: str | None = None
    """Where index files are kept; None: beside the data."""


@dataclass
class TrainSettings:
    """Optimization. A step is one update of the weights, by `global_batch_size` sequences."""

    steps: int = 1000
    stop_step: int | None = None
    """Stop after this step, saved, to be continued by the same command without it; None: go on to
    `steps`, which the learning rate's schedule spans in any case."""
    micro_batch_size: int = 1
    global_batch_size: int = 1
    seed: int = 42
    precision: str = _choice("auto", "bf16", "fp32")
    """auto: bf16 on a GPU, fp32 on a CPU (where bf16 products are hundreds of times slower)."""
    lr: float = 3e-4
    min_lr: float = 0.0
    lr_decay_style: str = _choice("constant", "linear", "cosine")
    lr_warmup_fraction: float = 0.1
    """Share of `steps` over which the learning rate rises linearly from 0."""
    lr_warmup_steps: int | None = None
    """So many steps instead; None: `lr_warmup_fraction` of them."""
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
    nonfinite: str = _choice("stop", "skip")
    """What a step with a NaN or Inf in loss or gradients does, beside updating nothing: stop the
    run, saved as of the step before; or leave its sequences out and go on."""
    max_skipped_steps: int = 10
    """How many steps in a row are skipped before the run stops after all."""
    hang_timeout_s: float = 600.0
    """Seconds without progress, in a step or a validation, after which a run ends and names the
    rank that hangs; start-up, data and checkpoints have six times as long. 0: it waits for ever."""


def warmup_steps(train: TrainSettings) -> int:
    """Return over how many steps the learning rate rises."""
    if train.lr_warmup_steps is not None:
        return train.lr_warmup_steps
    return int(train.lr_warmup_fraction * train.steps)


@dataclass
class CheckpointSettings:
    """Where the state of the run is kept and how often it is written."""

    save: str | None = "${log.dir}/checkpoints"
    """Folder; a run resumes from the latest valid checkpoint in it. None: nothing is saved."""
    load: str | None = None
    """Checkpoint, or folder of some (then the newest), whose weights a run starts from where `save`
    holds none; optimizer, schedule and data begin at step 0. None: initial weights."""
    save_interval: int = 0
    """Steps between checkpoints; 0: only at the end."""
    keep: int = 2
    """How many of the newest checkpoints stay."""
    keep_every: int = 0
    """Checkpoints of steps that are a multiple of this stay as well; 0: none."""
    verify: bool = True
    """Write a manifest with the size and SHA-256 of every file, and compare it before loading; a
    checkpoint that differs, or has none, is not used. False: neither."""
    async_save: bool = False
    """Write copies of the state in the background while training goes on. A copy takes as much host
    memory as the rank's share of the checkpoint."""
    accept_changes: list[str] = field(default_factory=list)
    """Keys of settings whose change since the checkpoint would be refused, and is meant."""


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

_CHOICES = {
    f"{section.name}.{f.name}": f.metadata["choices"]
    for section in fields(Settings)
    if is_dataclass(section.default_factory)
    for f in fields(section.default_factory)
    if "choices" in f.metadata
}


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
    _check_references(path, merged)
    try:
        settings = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:  # a reference that leads nowhere, a value left out
        key = f"{error.full_key}: " if getattr(error, "full_key", None) else ""
        raise ValueError(f"{path}: {key}{_first_line(error)}") from error
    assert isinstance(settings, Settings)
    _check_choices(str(path), asdict(settings))
    return settings


def settings_files(path: Path) -> list[Path]:
    """Return the file and all that it extends. Raises: as `load_settings`."""
    return [source for source, _ in _read_chain(path)]


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
        try:
            content = _read_yaml(path)
        except OSError as error:
            named = f"{chain[-1][0]}: 'extends' names {path}" if chain else str(path)
            raise OSError(f"{named}: cannot be read ({error.strerror or error})") from error
        base = content.pop(EXTENDS, None)
        chain.append((path, _with_own_places(path, content)))
        if base is None:
            return chain[::-1]
        if not isinstance(base, str):
            raise ValueError(f"{path}: 'extends' must be the path of one file, got {base!r}")
        path = path.parent / base


def _with_own_places(path: Path, content: DictConfig) -> DictConfig:
    written = OmegaConf.to_container(content, resolve=False)
    places = own_places(path, written)
    return OmegaConf.merge(
        content, {name: values for name, values in places.items() if _is_section(written, name)}
    )


def _is_section(written: dict[str, Any], name: str) -> bool:
    """Return whether there can be settings under a name; what else it is `_merge` complains of."""
    return isinstance(written.get(name) or {}, dict)


def _read_yaml(path: Path) -> DictConfig:
    with path.open("rb") as file:
        text = file.read(MAX_BYTES + 1)
    if len(text) > MAX_BYTES:
        raise ValueError(f"{path}: larger than {MAX_BYTES:,} bytes, so it is no file of settings")
    try:
        _check_nesting(path, text)
        content = OmegaConf.load(path)
    except yaml.constructor.ConstructorError as error:  # a tag, or more values than it reads
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: refused by OmegaConf: {reason}") from error
    except (yaml.YAMLError, UnicodeDecodeError, OmegaConfBaseException) as error:
        raise ValueError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    except (OSError, RecursionError) as error:  # OmegaConf's word for a file that is a number
        content = error
    if not isinstance(content, DictConfig):
        raise ValueError(f"{path}: must hold sections ({', '.join(SECTIONS)}), as `train: …`")
    return content


def _check_nesting(path: Path, text: bytes) -> None:
    """Parsers recurse, and the quick one ends the process without a word."""
    depth = 0
    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_NESTING:
            raise ValueError(f"{path}: nested more than {MAX_NESTING} deep")


def _check_references(path: Path, settings: DictConfig) -> None:
    """Only `${section.key}`, in no circle, and not so often that values grow without bounds."""
    texts = dict(_texts("", OmegaConf.to_container(settings, resolve=False)))

    def length(key: str, route: tuple[str, ...]) -> int:
        """Characters of a value, with all that it refers to put in."""
        if key in route:
            raise ValueError(f"{path}: {' -> '.join([*route, key])}: references go in a circle")
        if len(route) > MAX_REFERENCES:
            raise ValueError(f"{path}: {route[0]}: refers on more than {MAX_REFERENCES} times")
        inside = (text for other, text in texts.items() if f"{other}.".startswith(f"{key}."))
        total = 0
        for text in inside:
            named = _REFERENCE.findall(text)
            total += len(text) + sum(length(other, (*route, key)) for other in named)
            if total > MAX_CHARACTERS:
                raise ValueError(f"{path}: {key}: more than {MAX_CHARACTERS:,} characters long")
        return total

    for key, text in texts.items():
        if "${" in _REFERENCE.sub("", text):
            raise ValueError(
                f"{path}: {key}={text!r}: only other settings can be referred to, as "
                "${section.key}; a shell puts in its variables on the command line, as "
                'log.dir="$HOME/run"'
            )
        length(key, ())


def _texts(key: str, value: object) -> Iterator[tuple[str, str]]:
    """Every text in nested values, with its place, as `data.train.0`."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict | list):
        for name, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _texts(f"{key}.{name}" if key else str(name), part)


def _parse_override(override: str) -> DictConfig:
    key, equals, _ = override.partition("=")
    if not equals or "." not in key or not all(key.split(".")):
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
    _check_choices(source, OmegaConf.to_container(content, resolve=False))
    return merged


def _check_choices(source: str, sections: dict[str, Any]) -> None:
    """Raise ValueError for a value that is none of its setting's; what refers to another waits."""
    for key, choices in _CHOICES.items():
        section, name = key.split(".")
        value = (sections.get(section) or {}).get(name, choices[0])
        if value not in choices and "${" not in str(value):
            known = ", ".join(map(repr, choices))
            raise ValueError(f"{source}: {key}={value!r}: must be one of {known}")


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
