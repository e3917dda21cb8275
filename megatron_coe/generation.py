"""Text generation, token by token, from a Hugging Face folder or a training checkpoint.

A checkpoint is exported into a temporary folder, which is removed once the model is in memory.
transformers does the rest; a CoE model runs by this package's own classes (`hf`), without remote
code. Axis letters: S sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.generation.streamers import BaseStreamer

import megatron_coe.hf.auto  # noqa: F401 - registers the model with the Auto classes
from megatron_coe.data.tokenizer import tokenizer_files

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Sampling:
    """Options of sampling; by default the most likely token is taken (greedy).

    Args:
        max_new_tokens: maximum; the model's positions are another limit.
        temperature: divides the logits; 0 is greedy. None: 1 if `top_k` or `top_p` is set, else 0.
        top_k: sample from the k most likely tokens; None: from all.
        top_p: sample from the most likely tokens of this total probability; None: from all.

    Raises: ValueError naming a field with an invalid value.
    """

    max_new_tokens: int = 128
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens}: at least 1 is needed")
        if self.temperature is not None and not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature}: give 0 (greedy) or more")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k}: at least 1 is needed")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}: give a probability above 0 and up to 1")

    def arguments(self) -> dict[str, bool | int | float]:
        """Return all arguments of `generate`, so that no default of the folder applies."""
        narrowed = self.top_k is not None or self.top_p is not None
        temperature = float(narrowed) if self.temperature is None else self.temperature
        if temperature == 0:
            return {"do_sample": False, "temperature": 1.0, "top_k": 50, "top_p": 1.0}
        return {
            "do_sample": True,
            "temperature": temperature,
            "top_k": self.top_k or 0,  # 0: all
            "top_p": 1.0 if self.top_p is None else self.top_p,
        }


@dataclass(frozen=True)
class TextGenerator:
    """A model and its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    def stream(self, prompt: Tensor, sampling: Sampling, write: Callable[[str], object]) -> None:
        """Continue a prompt, ids [S], and write each part of the text as soon as it is complete."""
        config, special = self.model.config, self.model.generation_config
        room = _positions(config) - len(prompt)
        padding = special.pad_token_id
        ids = prompt[None].to(self.model.device)
        self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            streamer=_TextStreamer(self.tokenizer, write),
            max_new_tokens=min(sampling.max_new_tokens, room),
            pad_token_id=0 if padding is None else padding,  # one sequence is never padded
            **sampling.arguments(),
        )


def load(
    folder: Path,
    prompts: Sequence[str],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device,
    trust_remote_code: bool = False,
    tokenizer: Path | None = None,
) -> tuple[TextGenerator, list[Tensor]]:
    """Load a model, after all prompts have been tokenized and checked.

    Args:
        folder: of a Hugging Face model and its tokenizer, or a checkpoint `step_…`, or one that
            holds such checkpoints: then the newest.
        dtype: of the weights; None: as they are stored.
        trust_remote_code: run the code in a Hugging Face folder of another family.
        tokenizer: that of a checkpoint without a copy of its own.

    Returns: the generator, and the ids [S] of each prompt.

    Raises:
        ValueError: the folder is neither, has no tokenizer or is damaged, or a prompt is empty or
            too long.
        OSError: a file cannot be read, or the temporary folder (of TMPDIR) cannot be written.
    """
    if (folder / "config.json").is_file():
        if tokenizer:
            raise ValueError(f"{folder} is a Hugging Face folder: its own tokenizer is used")
        encoder, ids = _encode(folder, folder, prompts, trust_remote_code)
        model = _load_model(folder, folder, dtype, trust_remote_code)
        return TextGenerator(model.to(device), encoder), ids
    if not (folder / "metadata.json").is_file() and not any(folder.glob("step_*/metadata.json")):
        reason = "is no model" if folder.is_dir() else "does not exist"
        raise ValueError(
            f"{folder} {reason}: give a Hugging Face folder (with config.json), a training "
            "checkpoint (step_…), or a folder of checkpoints"
        )
    from megatron_coe.conversion.export_hf import describe, to_hf  # imports Megatron: seconds

    with TemporaryDirectory(prefix="megatron_coe-") as temporary:
        described, exported = Path(temporary, "description"), Path(temporary, "model")
        described.mkdir()
        describe(folder, described, tokenizer)
        encoder, ids = _encode(described, folder, prompts)
        to_hf(folder, exported, tokenizer=tokenizer, mtp=False)
        model = _load_model(exported, folder, dtype)
        return TextGenerator(model.to(device), encoder), ids


def choose_device(name: str) -> torch.device:
    """Return a device by its name; `auto` is a GPU if there is one.

    Raises: ValueError for a device that cannot be used.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise ValueError(f"device={name} cannot be used ({_first_line(error)})") from error


class _TextStreamer(BaseStreamer):
    """Ids to text, part by part; the parts together are the text of all ids.

    transformers' own TextStreamer waits for complete words and restarts after each line, where
    tokenizers with a mark for spaces lose the first one. Here a window of ids is decoded with and
    without the new ones, and the difference is the new text, once it ends in a complete character.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, write: Callable[[str], object]) -> None:
        self._tokenizer = tokenizer
        self._write = write
        self._ids: list[int] = []
        self._start = self._written = 0  # begin of the window; end of the ids whose text is written

    def put(self, value: Tensor) -> None:
        """Take the prompt's ids first, [1, S]; then every new one, [1]."""
        prompt = not self._ids
        self._ids += value.flatten().tolist()
        if prompt:
            self._written = len(self._ids)
        else:
            self._flush(final=False)

    def end(self) -> None:
        """Write the rest of the text."""
        self._flush(final=True)

    def _flush(self, final: bool) -> None:
        before = self._decode(self._ids[self._start : self._written])
        text = self._decode(self._ids[self._start :])
        if len(text) > len(before) and (final or not text.endswith("\N{REPLACEMENT CHARACTER}")):
            self._write(text[len(before) :])
            self._start, self._written = self._written, len(self._ids)

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )


def _encode(
    folder: Path, named: Path, prompts: Sequence[str], trust_remote_code: bool = False
) -> tuple[PreTrainedTokenizerBase, list[Tensor]]:
    """Load a folder's tokenizer, and encode the prompts with it; errors call the folder `named`."""
    if not tokenizer_files(folder):
        raise ValueError(f"{named} has no tokenizer (such as tokenizer.json)")
    options = {"local_files_only": True, "trust_remote_code": trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(str(folder), **options)
        tokenizer = AutoTokenizer.from_pretrained(str(folder), **options)
    except Exception as error:  # whatever parsers raise on damaged files
        raise _failure(named, error) from error
    encoded = []
    for number, prompt in enumerate(prompts, start=1):
        ids = torch.tensor(tokenizer.encode(prompt), dtype=torch.long) if prompt else torch.empty(0)
        if not len(ids):
            raise ValueError(f"prompt {number} is empty")
        if len(ids) >= _positions(config):
            raise ValueError(
                f"prompt {number} has {len(ids)} tokens: with max_position_embeddings="
                f"{_positions(config)} it must have fewer"
            )
        if ids.max() >= config.vocab_size:
            raise ValueError(
                f"prompt {number} has the token id {ids.max()}, but {named} has vocab_size="
                f"{config.vocab_size}: the tokenizer is of another model"
            )
        encoded.append(ids)
    return tokenizer, encoded


def _load_model(
    folder: Path, named: Path, dtype: torch.dtype | None, trust_remote_code: bool = False
) -> PreTrainedModel:
    """Load a folder's model for evaluation, with all weights; errors call the folder `named`."""
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            str(folder),
            dtype=dtype or "auto",
            local_files_only=True,
            trust_remote_code=trust_remote_code,
            ignore_mismatched_sizes=True,  # they are named below
            output_loading_info=True,
        )
    except Exception as error:  # as above
        raise _failure(named, error) from error
    for problem in ("missing", "mismatched"):  # transformers would fill these in at random
        if names := sorted(map(str, report[f"{problem}_keys"])):
            raise ValueError(f"{named}: {len(names)} {problem} weights, such as {names[0]}")
    return model.eval()


def _failure(named: Path, error: Exception) -> ValueError:
    if "trust_remote_code" in str(error):
        return ValueError(f"{named} has its own code, which only runs with trust_remote_code")
    return ValueError(f"{named} cannot be loaded ({_first_line(error)})")


def _positions(config: AutoConfig) -> int:
    """Return the maximum tokens of a sequence; no limit where the configuration names none."""
    return getattr(config, "max_position_embeddings", None) or 1 << 62


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).split("\n")[0]
