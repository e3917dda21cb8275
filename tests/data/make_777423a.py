"""Remake tests/data/777423a: what commit 777423a writes, and what it computes from it.

    git worktree add /tmp/777423a 777423a
    python tests/data/make_777423a.py /tmp/777423a

Only that commit's own command lines and model code run, on megatron-core 0.16.1 and the CPU. The
settings, `config.yaml`, are the one file that is not made here.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import runpy
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

FOLDER = Path(__file__).parent / "777423a"
STATISTICS = ("train_loss", "valid_loss", "grad_norm")
PROMPTS = ("one two three", "seven")
NEW_TOKENS = 12
STOPPED = 56
"""The step of the checkpoint, `train.stop_step` of config.yaml."""
LAST = 60
MACHINE = ("commit", "python", "torch", "megatron-core", "transformers", "processor")
NUMBERS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


def main() -> None:
    import torch

    (checkout,) = sys.argv[1:]
    checkout = Path(checkout).resolve()
    for path in FOLDER.iterdir():
        if path.name not in ("config.yaml", "README.md"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    environment = {
        **os.environ,
        "PYTHONPATH": str(checkout),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        shutil.copy(FOLDER / "config.yaml", work)

        def run(program: str, *arguments: str, folder: Path = work, ranks: int = 1) -> str:
            launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
            command = [sys.executable, *(launcher if ranks == 2 else [])]
            done = subprocess.run(
                [*command, str(checkout / program), *arguments],
                cwd=folder,
                env=environment,
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            return done.stdout

        make_data(work, run)
        run("pretrain_coe.py", "--config", "config.yaml", ranks=2)
        to_hf = ("to-hf", "--load", "run/checkpoints", "--save", "export")
        run("tools/convert_checkpoint.py", *to_hf)
        reported, written = resumed(work, run)
        expected = {"resumed": reported, "tensors": written, "generated": generated(run)}
        machine = json.loads((work / "run/machine.json").read_text())
        expected["made_with"] = {name: machine[name] for name in MACHINE}
        expected["made_with"]["cpu_capability"] = torch.backends.cpu.get_cpu_capability()
        (work / "run/machine.json").unlink()
        for name in ("cache", "tensorboard", "profile"):
            shutil.rmtree(work / "run" / name, ignore_errors=True)
        shutil.copytree(work, FOLDER, dirs_exist_ok=True)
    for name in ("export", "options"):
        subprocess.run([sys.executable, __file__, name, str(checkout)], env=environment, check=True)
    write_json(FOLDER / "expected.json", expected)


def make_data(work: Path, run: Callable[..., str]) -> None:
    """Sentences that count onwards from any number, their tokenizer and their token files."""
    random.seed(7)
    for name, count in (("train", 160), ("valid", 20)):
        lines = (_count_on(random.randrange(len(NUMBERS))) for _ in range(count))
        (work / f"{name}.txt").write_text("".join(lines))
    tokenizer = ("--output", "tokenizer.model", "--vocab-size", "290")
    run("tools/train_tokenizer.py", "--input", "train.txt", *tokenizer)
    for name in ("train", "valid"):
        output = ("--tokenizer", "tokenizer.model", "--output-prefix", name, "--append-eod")
        run("tools/preprocess_data.py", "--input", f"{name}.txt", *output)
        for suffix in ("bin", "idx"):
            if not (work / f"{name}.{suffix}").exists():
                (work / f"{name}_text_document.{suffix}").rename(work / f"{name}.{suffix}")
        (work / f"{name}.txt").unlink()


def _count_on(start: int) -> str:
    words = (NUMBERS[(start + i) % len(NUMBERS)] for i in range(random.randint(5, 20)))
    return " ".join(words) + "\n"


RESUMED = {
    "2 ranks": (),
    "2 ranks, no dropout": ("model.attention_dropout=0.0",),
    "1 rank, no dropout": (
        "model.attention_dropout=0.0",
        "parallel.expert_model_parallel_size=1",
    ),
}
"""Overrides with which the run is resumed; the number of ranks is the key's first character."""


def resumed(work: Path, run: Callable[..., str]) -> tuple[dict[str, dict], dict[str, str]]:
    """What the run reports after its checkpoint, {case: {statistic: {step: value}}}, and writes."""
    reported, written = {}, {}
    for case, overrides in RESUMED.items():
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary, "copy")
            shutil.copytree(work, folder)
            arguments = ("--config", "config.yaml", "train.stop_step=null", *overrides)
            run("pretrain_coe.py", *arguments, folder=folder, ranks=int(case[0]))
            reported[case] = statistics(folder / "run/metrics.jsonl", after=STOPPED)
            written[case] = digest(tensors_of(folder / f"run/checkpoints/step_{LAST:08d}"))
    return reported, written


def tensors_of(step: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, weights and moments, read by torch alone."""
    import torch
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    index = checkpoint.FileSystemReader(step).read_metadata().state_dict_metadata
    tensors = {
        key: torch.empty(stored.size, dtype=stored.properties.dtype)
        for key, stored in index.items()
        if isinstance(stored, TensorStorageMetadata)
    }
    checkpoint.load(tensors, checkpoint_id=step, no_dist=True)
    return tensors


def digest(tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256 of all values, by name."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(name.encode() + tensor.numpy().tobytes())
    return found.hexdigest()


def statistics(metrics: Path, after: int) -> dict[str, dict[str, float]]:
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    return {
        name: {str(r["step"]): r[name] for r in records if name in r and r["step"] > after}
        for name in STATISTICS
    }


def generated(run: Callable[..., str]) -> str:
    """The likeliest continuations of the prompts, as `tools/generate.py` prints them."""
    prompts = (word for prompt in PROMPTS for word in ("--prompt", prompt))
    count = ("--max-new-tokens", str(NEW_TOKENS))
    return run("tools/generate.py", "--load", "export", *prompts, *count)


def write_export_figures() -> None:
    """Ids, their logits and loss, and greedy tokens, by that commit's model for transformers."""
    import torch
    from safetensors.torch import save_file

    from megatron_coe.hf import CoeForCausalLM

    torch.manual_seed(7)
    model = CoeForCausalLM.from_pretrained(FOLDER / "export").eval()
    ids = torch.randint(4, 290, (2, 16))
    with torch.no_grad():
        output = model(ids, labels=ids)
        tokens = model.generate(ids, do_sample=False, max_new_tokens=NEW_TOKENS, eos_token_id=None)
    figures = {"input_ids": ids, "logits": output.logits, "loss": output.loss, "tokens": tokens}
    save_file(figures, FOLDER / "expected.safetensors")


def write_options(checkout: Path) -> None:
    write_json(FOLDER / "options.json", options_of(checkout))


def options_of(checkout: Path) -> dict[str, dict[str, list[str] | None]]:
    """Options of each program, by program and subcommand, with their choices.

    Runs each program up to its parser. The process is of no other use afterwards.
    """

    class Parsing(BaseException):
        """Ends a program where it would read its arguments."""

        def __init__(self, parser: argparse.ArgumentParser) -> None:
            self.parser = parser

    def stop(parser: argparse.ArgumentParser, *_: object, **__: object) -> None:
        raise Parsing(parser)

    argparse.ArgumentParser.parse_args = argparse.ArgumentParser.parse_intermixed_args = stop
    found = {}
    for path in [checkout / "pretrain_coe.py", *sorted((checkout / "tools").glob("*.py"))]:
        program = str(path.relative_to(checkout))
        sys.argv = [program]
        try:
            runpy.run_path(str(path), run_name="__main__")
        except Parsing as reached:
            found |= {" ".join(name): o for name, o in _options([program], reached.parser)}
    return found


def _options(
    name: list[str], parser: argparse.ArgumentParser
) -> Iterator[tuple[list[str], dict[str, list[str] | None]]]:
    options = {}
    positional = {action.dest: action for action in parser._actions if not action.option_strings}
    for option, action in {**positional, **parser._option_string_actions}.items():
        if isinstance(action, argparse._SubParsersAction):
            for command, inner in action.choices.items():
                yield from _options([*name, command], inner)
        elif not isinstance(action, argparse._HelpAction):
            choices = None if action.choices is None else sorted(map(str, action.choices))
            options[option] = choices
    yield name, options


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    if sys.argv[1] == "export":
        write_export_figures()
    elif sys.argv[1] == "options":
        write_options(Path(sys.argv[2]))
    else:
        main()
