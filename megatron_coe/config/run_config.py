"""The settings of a run, by section: `Settings`.

Section `model` takes the fields of `CoEModelProvider` under Megatron's names, which
`config.model_section.build_provider` checks, because knowing them means importing Megatron. What a
value of the other sections may be stands in its field's metadata (`rule_of`); `config.validation`
checks them all, and what they must be to one another.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from omegaconf import OmegaConf

from megatron_coe.utils.value_rules import (
    FRACTION,
    NOT_NEGATIVE,
    POSITIVE,
    ValueRule,
    integer,
    mapping,
    one_of,
)

T = TypeVar("T")


def _ruled(default: T, rule: ValueRule) -> T:
    """Return a field whose values obey a rule."""
    return field(default=default, metadata={"rule": rule})


def _choice(*values: str) -> str:
    """Return a field that takes one of these, the first unless another is given.

    Not as a `Literal`: OmegaConf knows that from 2.4 on only, and hydra-core, which Megatron-Bridge
    requires, wants one before that.
    """
    return _ruled(values[0], one_of(*values))


def _are_prefixes(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(prefix, str) for prefix in value)


def _are_held_out_sets(value: object) -> bool:
    if not isinstance(value, dict):
        return _are_prefixes(value)
    named = all(isinstance(name, str) and re.fullmatch(_SET_NAME, name) for name in value)
    return named and all(isinstance(of, str) or _are_prefixes(of) for of in value.values())


_SET_NAME = r"[\w.-]+"
_PREFIXES = {"type": "array", "items": {"type": "string"}}
_HELD_OUT_SETS = ValueRule(
    _are_held_out_sets,
    "a list of prefixes, or a mapping of names (letters, digits, _ . -) to prefixes",
    {
        "anyOf": [
            _PREFIXES,
            {
                "type": "object",
                "propertyNames": {"pattern": f"^{_SET_NAME}$"},
                "additionalProperties": {"anyOf": [{"type": "string"}, _PREFIXES]},
            },
        ]
    },
)
_SHARE = r"\s*(\d+\.?\d*|\.\d+)\s*"
_SPLIT = ValueRule(
    lambda value: (
        re.fullmatch(f"{_SHARE},{_SHARE}(,{_SHARE})?", value) is not None
        and float(value.split(",")[0]) > 0
    ),
    "two or three numbers with commas between them, as '969, 30, 1', and the first not 0",
    {"anyOf": [{"type": "string", "pattern": f"^{_SHARE},{_SHARE}(,{_SHARE})?$"}]},
)


@dataclass
class ParallelSettings:
    """How the model is parallelized over processes; the names of Megatron's `ModelParallelConfig`.

    `megatron_coe.model.parallelism` has the rules for the sizes.
    """

    tensor_model_parallel_size: int = 1
    """Ranks that share every layer's weights and sequence."""
    pipeline_model_parallel_size: int = 1
    """Pipeline stages that share the layers."""
    virtual_pipeline_model_parallel_size: int | None = None
    """Model chunks per pipeline stage (interleaved schedule); None: the plain schedule."""
    context_parallel_size: int = 1
    """Ranks that share each sequence, attention included."""
    expert_model_parallel_size: int = 1
    """Ranks that share the routed experts."""
    expert_tensor_parallel_size: int | None = None
    """None: as `tensor_model_parallel_size`, Megatron's own default."""
    sequence_parallel: bool | None = None
    """None: on exactly when tensor_model_parallel_size > 1, where MoE training needs it."""
    use_distributed_optimizer: bool = False
    """Shard the optimizer's state over the data-parallel ranks."""
    overlap_grad_reduce: bool = False
    """Reduce gradients while the backward pass still runs."""
    overlap_param_gather: bool = False
    """Gather updated weights while the forward pass runs; with the distributed optimizer."""


@dataclass
class DataSettings:
    """Data and tokenizer. A prefix is the path of a `.bin/.idx` pair without the suffix."""

    tokenizer: str = ""
    """SentencePiece model file, or folder of a Hugging Face tokenizer."""
    train: list[str] = field(default_factory=list)
    """Prefixes of the training sets."""
    train_weights: list[float] | None = None
    """How much is drawn from each training set, in any unit (0: it is not read); None: from each
    its own size."""
    valid: Any = field(default_factory=list, metadata={"rule": _HELD_OUT_SETS})
    """Prefixes of the held-out data; or several sets of it, whose losses are reported apart, as a
    mapping of a name to its prefix or prefixes. Empty: no validation."""
    split: str | None = _ruled(None, _SPLIT)
    """In place of `valid`, what parts of each training set's documents, from the first on, are
    trained on, held out, and left alone, as Megatron's `969, 30, 1`."""
    mode: str = _choice("packed", "padded", "packed_documents")
    """packed: documents joined and cut every seq_length tokens; padded: one document per
    sequence, cut on the right and padded, padding left out of the loss (the paper's way);
    packed_documents: whole documents side by side, none attending to another, the rest padded."""
    pad_seq_to_mult: int = _ruled(1, POSITIVE)
    """In mode packed_documents, the length of each document is padded to a multiple of this; with
    context parallelism a multiple of 2 * context_parallel_size."""
    cache: str | None = None
    """Where index files are kept; None: beside the data."""
    num_workers: int = _ruled(0, NOT_NEGATIVE)
    """Processes of each rank that prepare training batches ahead, into pinned memory on a GPU, the
    same batches for any number; 0: the rank reads them itself, between two steps."""


def held_out_sets(data: DataSettings) -> dict[str, list[str]]:
    """Return the prefixes of each held-out set of `data.valid` by name; a list is one set, ""."""
    named = data.valid if isinstance(data.valid, dict) else {"": data.valid} if data.valid else {}
    return {name: [of] if isinstance(of, str) else list(of) for name, of in named.items()}


@dataclass
class TrainSettings:
    """Optimization. A step is one update of the weights, by `global_batch_size` sequences."""

    steps: int = _ruled(1000, POSITIVE)
    """Steps of the whole run."""
    exit_step: int | None = _ruled(None, POSITIVE)
    """Save and stop after this step, to be continued by the same command without it; None: train to
    `steps`, which the learning rate schedule spans in any case."""
    micro_batch_size: int = _ruled(1, POSITIVE)
    """Sequences of one forward pass of a rank."""
    global_batch_size: int = _ruled(1, POSITIVE)
    """Sequences of a step, of all ranks and micro-batches."""
    rampup_batch_size: list[int] | None = None
    """[start, increment, samples]: the first steps have `start` sequences, and the batch grows by
    `increment` at equal distances until `global_batch_size`, within the first `samples` sequences.
    None: it is the same in every step."""
    seed: int = _ruled(42, integer(0, 2**32 - 1))  # as numpy takes
    """Decides initial weights, dropout and the order of the data."""
    precision: str = _choice("auto", "bf16", "fp32")
    """auto: bf16 on a GPU, fp32 on a CPU (where bf16 products are hundreds of times slower)."""
    optimizer: str = _choice("adam", "muon")
    """adam: AdamW; muon: Muon for matrices, those of experts too, and AdamW for embedding, output
    layer, routers, norms and biases."""
    lr: float = _ruled(3e-4, POSITIVE)
    """The highest learning rate."""
    min_lr: float = _ruled(0.0, NOT_NEGATIVE)
    """The learning rate at the end of a schedule that decays."""
    lr_decay_style: str = _choice("constant", "linear", "cosine", "inverse-square-root", "WSD")
    """How the learning rate falls after the warm-up, until the last step. inverse-square-root: with
    1 / sqrt(step); WSD: it stays, and falls during `lr_wsd_decay_steps` at the end."""
    lr_warmup_fraction: float = _ruled(0.1, FRACTION)
    """Share of `steps` over which the learning rate rises linearly from 0."""
    lr_warmup_steps: int | None = _ruled(None, NOT_NEGATIVE)
    """The same in steps; None: `lr_warmup_fraction` of them."""
    lr_warmup_samples: int | None = _ruled(None, NOT_NEGATIVE)
    """The same in sequences; the schedule then counts them, and not steps."""
    lr_wsd_decay_style: str = _choice("exponential", "linear", "cosine", "minus_sqrt")
    """How the learning rate falls to `min_lr` at the end of a schedule WSD."""
    lr_wsd_decay_steps: int | None = _ruled(None, POSITIVE)
    """Steps of that fall, which are the last ones."""
    lr_wsd_decay_samples: int | None = _ruled(None, POSITIVE)
    """The same in sequences; the schedule then counts them, and not steps."""
    weight_decay: float = _ruled(0.01, NOT_NEGATIVE)
    """AdamW's decoupled weight decay."""
    decay_all_parameters: bool = False
    """Weight decay on every parameter (the paper's recipe), or not on norms (Megatron's)."""
    adam_beta1: float = _ruled(0.9, FRACTION)
    """Decay of AdamW's first moment."""
    adam_beta2: float = _ruled(0.95, FRACTION)
    """Decay of AdamW's second moment."""
    adam_eps: float = _ruled(1e-8, POSITIVE)
    """What AdamW adds to the root of the second moment."""
    muon_momentum: float = _ruled(0.95, FRACTION)
    """Decay of Muon's momentum."""
    muon_num_ns_steps: int = _ruled(5, integer(1, 99))
    """Steps of the Newton-Schulz iteration that orthogonalizes Muon's updates."""
    muon_extra_scale_factor: float = _ruled(0.2, POSITIVE)
    """Factor on Muon's updates, beside the root of a matrix's longer side; 0.2 gives them the size
    of AdamW's."""
    freeze: list[str] = field(default_factory=list)
    """Patterns of the names of weights that are not trained, as `*.router.*`; one that begins with
    `!` excepts what it matches from those before it."""
    lr_mult: dict[str, float] = field(default_factory=dict, metadata={"rule": mapping(POSITIVE)})
    """Factors on the learning rate by patterns of the names of weights, as `*.router.*`: 0.1; the
    last pattern that matches counts."""
    ema_decay: float | None = _ruled(None, FRACTION)
    """Keep an exponential moving average of the weights with this decay, saved in checkpoints and
    exported by `coe convert to-hf --ema`; None: no average."""
    clip_grad: float = _ruled(1.0, NOT_NEGATIVE)
    """Largest global L2 norm of the gradient; 0: no clipping."""
    eval_interval: int = _ruled(0, NOT_NEGATIVE)
    """Steps between validations; 0: only at the end."""
    eval_samples: int | None = _ruled(None, POSITIVE)
    """How many held-out sequences of each set are used, the same first ones each time; None:
    all."""
    deterministic: bool = True
    """On a GPU, use kernels whose sums have a fixed order: the same command, the same bits."""
    on_nonfinite: str = _choice("stop", "skip")
    """On NaN or Inf in loss or gradients nothing is updated; the run saves the state before the
    step and stops, or skips the step's sequences."""
    max_skipped_steps: int = _ruled(10, NOT_NEGATIVE)
    """Consecutive skipped steps after which the run stops."""
    hang_timeout_s: float = _ruled(600.0, NOT_NEGATIVE)
    """Seconds without progress, in a step or a validation, after which the run ends and names the
    hanging rank; start-up, data and checkpoints have six times as long. 0: no limit."""


def is_multiple(step: int, interval: int) -> bool:
    """Return whether an interval of steps ends at a step; one of 0 never does."""
    return interval > 0 and step % interval == 0


@dataclass
class CheckpointSettings:
    """Where checkpoints are kept, and when they are written."""

    save: str | None = "${log.dir}/checkpoints"
    """Folder; a run resumes from the latest valid checkpoint in it. None: nothing is saved."""
    load: str | None = None
    """Checkpoint, or folder of some (then the newest), whose weights a run starts from where `save`
    holds none; optimizer, schedule and data begin at step 0. None: initial weights."""
    save_interval: int = _ruled(0, NOT_NEGATIVE)
    """Steps between checkpoints; 0: only at the end."""
    keep_latest: int = _ruled(2, POSITIVE)
    """How many of the newest checkpoints are kept."""
    keep_every: int = _ruled(0, NOT_NEGATIVE)
    """Checkpoints at multiples of this step are kept too; 0: none."""
    verify: bool = True
    """Write a manifest with the size and digest of every file, and compare it before loading; a
    checkpoint that differs, or has none, is not used. False: neither."""
    async_save: bool = False
    """Write a copy of the state in the background while training continues. It takes as much host
    memory as the rank's share of the checkpoint."""
    allow_config_changes: list[str] = field(default_factory=list)
    """Settings that may differ from the checkpoint's although the change would be refused."""
    hf_interval: int = _ruled(0, NOT_NEGATIVE)
    """Steps between exports of checkpoints to Hugging Face folders, `log.dir`/hf/step_…, by another
    process while training continues; a multiple of `save_interval`. The last step is exported too.
    0: none."""
    hf_keep_latest: int | None = _ruled(None, POSITIVE)
    """How many of the newest exported folders are kept; None: all."""
    score_file: str | None = None
    """JSON lines of held-out questions (`messages`, or `query` and `response`) that each exported
    model answers, greedily on the host's processor; the share of right answers is the metric
    `exact_match`. None: none."""
    score_samples: int | None = _ruled(128, POSITIVE)
    """How many questions, the first ones of the file; None: all."""
    score_max_new_tokens: int = _ruled(128, POSITIVE)
    """The longest answer, in tokens."""


@dataclass
class LogSettings:
    """What is logged, and where."""

    dir: str = ""
    """Folder of config.yaml, metrics.jsonl and tensorboard/; empty: runs/<name of the file>."""
    interval: int = _ruled(10, POSITIVE)
    """Steps between records of the training loss."""
    wandb_project: str | None = None
    """Weights & Biases project; None: it is not used."""
    wandb_exp_name: str | None = None
    """Name of the run there; None: Weights & Biases chooses one."""
    mlflow_experiment: str | None = None
    """MLflow experiment; None: it is not used."""
    mlflow_run_name: str | None = None
    """Name of the run there; None: MLflow chooses one."""
    mlflow_tracking_uri: str | None = None
    """Server, folder or data base of MLflow; None: what MLFLOW_TRACKING_URI names."""
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
        """Return the settings as YAML that `config.loader.load_settings` reads back."""
        return OmegaConf.to_yaml(OmegaConf.structured(self))


SECTIONS = tuple(f.name for f in fields(Settings))
"""Names of the sections."""
