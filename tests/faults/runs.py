"""The small run that faults are injected into, and the comparison of its end."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch
from torch.distributed import TCPStore
from torch.distributed.checkpoint import FileSystemReader

from megatron_coe.data.corpus import make_corpus
from megatron_coe.data.preprocess import preprocess
from megatron_coe.data.records import Fields
from megatron_coe.data.tokenizer import train_tokenizer
from tests.zygote import Process, Zygote

REPO = Path(__file__).resolve().parents[2]
SCRIPT = "pretrain_coe.py"
STEPS, SAVE_INTERVAL = 8, 2
LIMIT_S = 120.0
"""A run of this size that takes longer hangs."""

CONFIG = f"""
model:
  num_layers: 2
  hidden_size: 32
  num_attention_heads: 4
  seq_length: 16
  multi_latent_attention: true
  kv_lora_rank: 16
  qk_head_dim: 8
  qk_pos_emb_head_dim: 8
  v_head_dim: 8
  num_moe_experts: 4
  moe_router_topk: 2
  moe_ffn_hidden_size: 16
  moe_shared_expert_intermediate_size: 16
  attention_dropout: 0.1   # draws random numbers: the RNG state must be restored, too
data:
  tokenizer: {{data}}/tokenizer.model
  train: [{{data}}/train]
  valid: [{{data}}/valid]
train:
  steps: {STEPS}
  global_batch_size: 2
  lr: 0.01
  eval_interval: 4
  eval_samples: 2
checkpoint:
  save_interval: {SAVE_INTERVAL}
  keep_latest: 2
log:
  interval: 1
"""

LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "one rank": (1, ()),
    "data parallel": (2, ("parallel.use_distributed_optimizer=true",)),
    "expert parallel": (2, ("parallel.expert_model_parallel_size=2",)),
}
"""Name -> number of ranks and settings."""

_OF_LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC", "MASTER_")
_REPRODUCED = re.compile(
    r".*_loss|grad_norm(/.*)?|lr|balance/.*|load.*/.*|dead_experts/.*|router_confidence/.*|samples"
    r"|tokens|epoch|unigram_entropy"
)
_RESUMED = re.compile(r"resumed from \S*step_(\d{8})")


def make_data(folder: Path) -> Path:
    """A corpus, its tokenizer and a configuration, `run.yaml`."""
    folder.mkdir(parents=True)
    fields = Fields(("query", "response"), question_answer=True)
    texts = make_corpus(folder, train_size=40, valid_size=10, seed=5)
    tokenizer = folder / "tokenizer.model"
    train_tokenizer([texts[0]], tokenizer, fields=fields, vocab_size=400)
    for text in texts:
        target = folder / text.stem
        preprocess([text], target, tokenizer, fields=fields, workers=1, append_eod=True)
    (folder / "run.yaml").write_text(CONFIG.format(data=folder), encoding="utf-8")
    return folder


@dataclass
class Launch:
    """One start of the command: its ranks, or the launcher that has started them."""

    ranks: list[Process]
    store: TCPStore | None = None
    """Where they meet, kept alive as long as this."""

    def __enter__(self) -> Launch:
        return self

    def __exit__(self, *error: object) -> None:
        for rank in self.ranks:
            rank.end()

    def pids(self) -> list[int]:
        """Of the ranks, by rank."""
        if len(self.ranks) > 1:
            return [process.pid for process in self.ranks]
        (only,) = self.ranks
        workers = {}
        for child in psutil.Process(only.pid).children():
            with contextlib.suppress(psutil.Error):
                workers[int(child.environ().get("RANK", -1))] = child.pid
        workers.pop(-1, None)
        return [workers[rank] for rank in sorted(workers)] or [only.pid]

    def kill(self) -> None:
        """Send SIGKILL to everything at once."""
        for rank in self.ranks:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(rank.pid, signal.SIGKILL)

    def poll(self) -> list[int | None]:
        return [rank.poll() for rank in self.ranks]

    def running(self) -> bool:
        return None in self.poll()

    def wait(self, timeout_s: float = LIMIT_S) -> list[int | None]:
        """Return the statuses, after all ranks have ended or `timeout_s` has passed."""
        deadline_s = time.monotonic() + timeout_s
        return [rank.wait(max(0.0, deadline_s - time.monotonic())) for rank in self.ranks]

    def said(self) -> str:
        return "".join(rank.said() for rank in self.ranks)

    def complained(self) -> str:
        return "".join(rank.complained() for rank in self.ranks)

    def last_words(self) -> str:
        """Return the end of each rank's stderr."""
        lines = [rank.complained().strip().split("\n")[-1][-300:] for rank in self.ranks]
        return " / ".join(lines)


@dataclass
class Bench:
    """Where the runs take place: a folder, the data, a zygote and the checkout that it runs."""

    work: Path
    zygote: Zygote
    data: Path
    tree: Path
    _unbroken: dict[str, Path] = field(default_factory=dict)
    save_s: float = 0.5
    """How long a save takes here, measured on the first unbroken run."""
    run_s: float = 3.0
    """How long a whole run takes here, measured likewise."""

    def folder(self, name: str) -> Path:
        """Return a new folder for a case."""
        path = self.work / re.sub(r"\W+", "_", name)
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        return path

    def arguments(self, folder: Path, layout: str, overrides: Sequence[str] = ()) -> list[str]:
        """Of the command, for a run in `folder`."""
        settings = (f"log.dir={folder}/run", *LAYOUTS[layout][1], *overrides)
        return ["--config", str(self.data / "run.yaml"), *settings]

    def start(
        self,
        folder: Path,
        layout: str = "one rank",
        overrides: Sequence[str] = (),
        plants: Mapping[int, str] | None = None,
        environments: Mapping[int, Mapping[str, str]] | None = None,
    ) -> Launch:
        """Start all ranks of the command as torchrun would, which keeps their store.

        Args:
            plants: faults from inside, by rank (tests/faults/plants.py).
            environments: additional variables by rank.
        """
        count = LAYOUTS[layout][0]
        store = open_store() if count > 1 else None
        ranks = []
        for rank in range(count):
            of_rank = rank_environment(rank, count, store.port) if store else {}
            ranks.append(
                self.zygote.start(
                    SCRIPT,
                    self.arguments(folder, layout, overrides),
                    folder,
                    {
                        **base_environment(self.tree),
                        **of_rank,
                        **(environments or {}).get(rank, {}),
                    },
                    plant=(plants or {}).get(rank),
                )
            )
        return Launch(ranks, store)

    def start_really(
        self, folder: Path, layout: str = "one rank", overrides: Sequence[str] = ()
    ) -> Launch:
        """The same as a process of its own: `python pretrain_coe.py`, or torchrun over it."""
        launcher: tuple[str, ...] = ()
        if (count := LAYOUTS[layout][0]) > 1:
            launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}")
        with (folder / "out0").open("wb") as out, (folder / "err0").open("wb") as err:
            process = subprocess.Popen(
                [
                    *(sys.executable, *launcher, str(self.tree / SCRIPT)),
                    *self.arguments(folder, layout, overrides),
                ],
                cwd=self.tree,
                env=base_environment(self.tree),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )
        return Launch([Process(process.pid, process.poll, folder / "out0", folder / "err0")])

    def unbroken(self, layout: str) -> Path:
        """Return the folder of a run without faults, made once."""
        if layout not in self._unbroken:
            folder = self.folder(f"unbroken {layout}")
            started_s = time.monotonic()
            with self.start(folder, layout) as launch:
                lasted_s = []
                while launch.running():
                    if wait_for_save(folder, launch):
                        began_s = time.monotonic()
                        while in_save(folder):
                            time.sleep(0.001)
                        lasted_s.append(time.monotonic() - began_s)
                statuses = launch.wait()
                if any(statuses):
                    raise RuntimeError(
                        f"a run without faults ends with {statuses}\n{launch.complained()}"
                    )
            if layout == "one rank":
                self.run_s = time.monotonic() - started_s
                self.save_s = statistics.median(lasted_s or [self.save_s])
            self._unbroken[layout] = folder
        return self._unbroken[layout]


@contextlib.contextmanager
def bench(work: Path, tree: Path = REPO) -> Iterator[Bench]:
    """A bench in the folder `work`, for the checkout `tree`; no process outlives it."""
    with Zygote(tree) as zygote:
        yield Bench(work, zygote, make_data(work / "data"), tree)


def base_environment(tree: Path) -> dict[str, str]:
    """Return this process's environment, without the variables of a launcher."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(_OF_LAUNCHERS)}
    fixed = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "CUDA_VISIBLE_DEVICES": ""}
    return {**kept, **fixed, "PYTHONPATH": os.pathsep.join([str(tree), str(REPO)])}


def rank_environment(rank: int, count: int, port: int) -> dict[str, str]:
    """Return the variables that torchrun sets for a rank whose store listens at `port`."""
    return {
        **{"RANK": str(rank), "LOCAL_RANK": str(rank)},
        **{"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)},
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }


def open_store() -> TCPStore:
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


# --- what a run has left -----------------------------------------------------------------


def checkpoints(folder: Path) -> Path:
    return folder / "run" / "checkpoints"


def in_save(folder: Path) -> bool:
    """Return whether a checkpoint is being written, or was when the run died."""
    try:
        return any(name.startswith(".partial_") for name in os.listdir(checkpoints(folder)))
    except FileNotFoundError:
        return False


def wait_for_save(folder: Path, launch: Launch, limit_s: float = LIMIT_S) -> bool:
    """Wait until a save begins; return False when the run has ended first."""
    deadline_s = time.monotonic() + limit_s
    while not in_save(folder):
        if not launch.running() or time.monotonic() > deadline_s:
            return False
        time.sleep(0.001)
    return True


def records(folder: Path) -> dict[int, dict[str, float]]:
    """Return the reproducible metrics by step, without a last line that was cut short."""
    path = folder / "run" / "metrics.jsonl"
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            record = json.loads(line)
            figures = {k: v for k, v in record.items() if _REPRODUCED.fullmatch(k)}
            found[record["step"]] = figures
    return found


def last_step(folder: Path) -> int:
    return max(records(folder), default=0)


def resumed_step(said: str) -> int:
    """Return the step that a run prints it resumes from; 0 when it prints none."""
    found = _RESUMED.search(said)
    return int(found[1]) if found else 0


def litter(folder: Path) -> list[str]:
    """Return the files in a run's folders that no complete run leaves there."""
    ours = r"step_\d{8}|latest|metrics\.jsonl|config\.yaml|machine\.json|tensorboard|checkpoints"
    kept = re.compile(rf"{ours}|latest_before_step_\d{{8}}")  # the latter: what was in its way
    places = [folder / "run", checkpoints(folder)]
    names = [path for place in places if place.is_dir() for path in place.iterdir()]
    return sorted(path.name for path in names if not kept.fullmatch(path.name))


def read_state(checkpoint: Path) -> dict[str, object]:
    """Return a checkpoint's content: tensors and objects by name and place, and `common.pt`."""
    state: dict[str, object] = {}
    for index, place in FileSystemReader(checkpoint).read_metadata().storage_data.items():
        with (checkpoint / place.relative_path).open("rb") as file:
            file.seek(place.offset)
            content = io.BytesIO(file.read(place.length))
        state[f"{index.fqn}@{tuple(index.offset or ())}"] = torch.load(content, weights_only=True)
    state["common"] = torch.load(checkpoint / "common.pt", weights_only=True)
    return state


def differences(folder: Path, expected: Path) -> list[str]:
    """Return how the end of a run differs from that of another: state, metrics, leftovers."""
    found = []
    newest, wanted = (newest_checkpoint(path) for path in (folder, expected))
    if newest is None or wanted is None or newest.name != wanted.name:
        found.append(f"ends at {newest} instead of {wanted}")
    else:
        mine, theirs = read_state(newest), read_state(wanted)
        names = sorted(mine.keys() ^ theirs.keys())
        names += [name for name in mine if name in theirs and not same(mine[name], theirs[name])]
        if names:
            found.append(f"{len(names)} of {len(theirs)} parts of the state differ: {names[:3]}")
    if (figures := records(folder)) != (others := records(expected)):
        steps = sorted(k for k in figures.keys() | others.keys() if figures.get(k) != others.get(k))
        found.append(f"metrics.jsonl differs at steps {steps}")
    if left := litter(folder):
        found.append(f"litter: {left}")
    return found


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step_"))


def newest_checkpoint(folder: Path) -> Path | None:
    """The one that `latest` names."""
    try:
        return checkpoints(folder) / (checkpoints(folder) / "latest").read_text().strip()
    except OSError:
        return None


def same(one: object, other: object) -> bool:
    """Return whether two values are equal to the last bit, through dictionaries and lists."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        if one.dtype != other.dtype or one.shape != other.shape:
            return False
        one, other = (tensor.contiguous().view(-1).view(torch.uint8) for tensor in (one, other))
        return one.equal(other)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other
