"""Command lines on malformed or hostile input: their cases, their files, and the checks.

Every case gets a folder of its own, `{d}` in its command, with copies of a small tokenizer, data
sets, settings, a checkpoint or an exported model, which its `make` then spoils.
"""

from __future__ import annotations

import gc
import importlib
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from tests.zygote import Zygote

REPO = Path(__file__).resolve().parents[2]
CONFIG_ERROR = 2
TIMEOUT_S = 120
COLLECTIVE = 97
"""Status of a run that reached its process group instead of reporting an error."""

SETTINGS = """\
model:
  num_layers: 2
  hidden_size: 32
  num_attention_heads: 4
  multi_latent_attention: true
  kv_lora_rank: 16
  qk_head_dim: 8
  qk_pos_emb_head_dim: 8
  v_head_dim: 8
  ffn_hidden_size: 48
  moe_ffn_hidden_size: 16
  num_moe_experts: 6
  moe_router_topk: 2
  moe_shared_expert_intermediate_size: 16
  seq_length: 16
  coe_iterations: {iterations}
  coe_residual: {residual}
data:
  tokenizer: {d}/t.model
  train: ['{d}/a']
  valid: ['{d}/a']
train: {{steps: 2, global_batch_size: 2}}
checkpoint: {{save: '{d}/run/checkpoints'}}
log: {{dir: '{d}/run'}}
"""
TRAIN = "pretrain_coe.py --config {d}/run.yaml"
_LINE = '{"query": "one plus two is", "response": "three apples and 12 pears"}\n'


@dataclass(frozen=True)
class Case:
    """One command line that must be refused.

    Attributes:
        command: script and arguments; `{d}` is the case's folder.
        says: what the message must contain; `{d}` as above.
        make: spoils something in the case's folder.
        needs: what the folder holds besides tokenizer, data and settings: `checkpoint` (of a CoE
            model), `moe` (of an MoE model), `run` (metrics and settings as well), `hf`.
        status: what the command must end with.
        late: what is wrong shows only to process groups, or in the middle of the work.
        environment: variables besides the usual ones.
        plant: `module:function` called before the script, such as a limit on the size of files.
        lines: how many the message may have; None: any number.
    """

    name: str
    command: str
    says: tuple[str, ...]
    make: Callable[[Path], object] | None = None
    needs: tuple[str, ...] = ()
    status: int = CONFIG_ERROR
    late: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)
    plant: str | None = None
    lines: int | None = 1

    def check(self, folder: Path) -> str | None:
        """Return what is wrong with the folder afterwards; None: nothing."""
        return None


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    status: int | None
    out: str
    err: str


class Bench:
    """Runs command lines in forks of one process that has imported everything."""

    def __init__(self, zygote: Zygote, folder: Path) -> None:
        self.folder = folder
        self._zygote = zygote
        self._stock = folder / "stock"

    def run(
        self,
        command: str,
        folder: Path,
        environment: Mapping[str, str] | None = None,
        plant: str | None = None,
    ) -> Ended:
        script, *arguments = (word.replace("{d}", str(folder)) for word in shlex.split(command))
        prints = folder.with_name(f"{folder.name}.prints")
        prints.mkdir(exist_ok=True)
        usual = {"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}
        usual |= {"HOME": str(folder), "TMPDIR": str(folder), "HF_HUB_OFFLINE": "1"}
        usual["MPLCONFIGDIR"] = str(self.folder)  # fonts are looked for once
        process = self._zygote.start(
            script, arguments, prints, {**usual, **(environment or {})}, plant
        )
        try:
            status = process.wait(TIMEOUT_S)
        finally:
            process.end()
        return Ended(status, process.said(), process.complained())

    def copy(self, name: str, needs: Sequence[str]) -> Path:
        """Return a new folder with the files of a case; ingredients are made at their first use."""
        folder = self.folder / "cases" / re.sub(r"\W+", "-", name).strip("-")[:60]
        shutil.rmtree(folder, ignore_errors=True)
        for part in ("base", *needs):
            shutil.copytree(self._ingredient(part), folder, dirs_exist_ok=True)
        _settle(folder)
        return folder

    def _ingredient(self, part: str) -> Path:
        folder = self._stock / part
        if not folder.is_dir():
            making = self._stock / f"{part}.making"
            making.mkdir(parents=True)
            getattr(self, f"_make_{part}")(making)
            making.rename(folder)
        return folder

    def _make_base(self, folder: Path) -> None:
        (folder / "in.jsonl").write_text(_LINE * 40, encoding="utf-8")
        (folder / "in.txt").write_text("one two three\nfour five six\n" * 20)
        self._must("tools/train_tokenizer.py --input {d}/in.jsonl --qa-keys query response "
                   "--vocab-size 290 --output {d}/t.model", folder)  # fmt: skip
        self._must("tools/preprocess_data.py --input {d}/in.jsonl --qa-keys query response "
                   "--tokenizer {d}/t.model --output-prefix {d}/a", folder)  # fmt: skip
        (folder / "metrics.jsonl").write_text('{"step": 1, "train_loss": 2.0, "valid_loss": 3.0}\n')

    def _make_checkpoint(self, folder: Path) -> None:
        self._train(folder, iterations=2, residual="inner")

    def _make_moe(self, folder: Path) -> None:
        self._train(folder, iterations=1, residual="outer")

    def _make_run(self, folder: Path) -> None:
        """Write metrics and settings beside the checkpoints."""
        self._train(folder, part="run", iterations=2, residual="inner")

    def _train(self, folder: Path, part: str = "run/checkpoints", **model: object) -> None:
        run = self.copy(f"training-{folder.name}", ())
        (run / "run.yaml").write_text(SETTINGS.format(d=run, **model), encoding="utf-8")
        self._must(f"{TRAIN} train.steps=1", run)
        shutil.copytree(run / part, folder / part)

    def _make_hf(self, folder: Path) -> None:
        source = self.copy("exporting", ("checkpoint",))
        self._must("tools/convert_checkpoint.py to-hf --input {d}/run/checkpoints --output {d}/hf",
                   source)  # fmt: skip
        shutil.copytree(source / "hf", folder / "hf")

    def _must(self, command: str, folder: Path) -> None:
        ended = self.run(command, folder)
        if ended.status != 0:
            raise RuntimeError(f"{command}: status {ended.status}\n{ended.err}")


def _settle(folder: Path) -> None:
    """Name the folder itself in what was made elsewhere."""
    settings = SETTINGS.format(d=folder, iterations=2, residual="inner")
    (folder / "run.yaml").write_text(settings, encoding="utf-8")


def run_case(bench: Bench, case: Case) -> str | None:
    """Return what is wrong with the answer to a case; None: nothing."""
    folder = bench.copy(case.name, case.needs)
    if case.make is not None:
        case.make(folder)
    before = names(folder)
    late = f"{__name__}:leave_quickly"
    plant = case.plant or (late if case.late else f"{__name__}:refuse_collectives")
    ended = bench.run(case.command, folder, case.environment, plant)
    problem = case.check(folder) or judge(case, ended, folder)
    left = {name for name in names(folder) - before if "partial" in name or name.endswith(".tmp")}
    if problem is None and left:
        problem = f"left half a file: {sorted(left)}"
    return problem


def judge(case: Case, ended: Ended, folder: Path) -> str | None:
    if ended.status is None:
        return f"no end within {TIMEOUT_S} s"
    if ended.status == COLLECTIVE:
        return "went on to its process groups"
    if "Traceback" in ended.err:
        return f"a traceback: {ended.err.strip().splitlines()[-1]}"
    if ended.status != case.status:
        return f"status {ended.status}, not {case.status}; it said {ended.err.strip()[-300:]!r}"
    # argparse prints how the command is used before its own message.
    said = [line for line in ended.err.splitlines() if line.strip()]
    usage = bool(said) and said[0].startswith("usage: ")
    if case.lines is not None and len(said) != case.lines and not usage:
        return f"{len(said)} lines instead of one: {ended.err.strip()[:600]!r}"
    for wanted in case.says:
        wanted = wanted.replace("{d}", str(folder))
        if wanted not in ended.err:
            return f"does not say {wanted!r} but {ended.err[-400:]!r}"
    if said and len(said[-1]) > 1500:
        return f"a message of {len(said[-1])} characters"
    return None


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


# --- what can be planted in a run -----------------------------------------------------------------


def refuse_collectives() -> None:
    """Exit where the process group is made: the first collective, before any long work."""
    import torch.distributed

    leave_quickly()

    def refuse(*arguments: object, **options: object) -> None:
        os._exit(COLLECTIVE)

    torch.distributed.init_process_group = refuse


def leave_quickly() -> None:
    """Exit without cleanup, which would copy all of the zygote's memory."""
    gc.disable()

    def leave(status: object = None) -> NoReturn:
        if not isinstance(status, int | None):
            raise SystemExit(status)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status or 0)

    sys.exit = leave


def small_files() -> None:
    """Limit files to 3,000 bytes, as a full disk would; this needs no privileges."""
    import resource
    import signal

    leave_quickly()
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3_000, 3_000))


# --- a table of cases as a command ----------------------------------------------------------------


def run_all(module: str, cases: Sequence[Case], folder: Path, optimized: bool) -> int:
    """Run all cases, print those that failed, and return their number."""
    if optimized:
        os.environ["PYTHONOPTIMIZE"] = "1"
    failed = 0
    with Zygote(REPO) as zygote:
        bench = Bench(zygote, folder)
        for case in cases:
            problem = run_case(bench, case)
            if problem:
                failed += 1
                print(f"{case.name}: {problem}", flush=True)
    print(f"{module}{' under -O' if optimized else ''}: {len(cases)} cases, {failed} failed")
    return failed


def main(module: str) -> None:
    """`python -m tests.faults.<module> [-O] [part of a name …]`."""
    import tempfile

    words = sys.argv[1:]
    optimized = "-O" in words
    wanted = [word for word in words if word != "-O"]
    cases = importlib.import_module(module).cases()
    chosen = [case for case in cases if not wanted or any(part in case.name for part in wanted)]
    with tempfile.TemporaryDirectory() as folder:
        sys.exit(bool(run_all(module, chosen, Path(folder), optimized)))
