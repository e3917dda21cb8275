"""Checkpoints damaged in every way: all are detected, none is silently trained on.

    python tests/faults/run.py mutations --count 120 --seed 1

If there is an older valid checkpoint, the bad one is named and the older one used: the run ends
where the unbroken one does, to the last bit. Where there is none, the run stops with 2 before its
first step: never 0, and never at step 0.
"""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron_coe.fault_tolerance.exit_codes import CONFIG_ERROR
from tests.faults.runs import (
    Bench,
    checkpoints,
    differences,
    last_step,
    records,
    resumed_step,
)
from tests.faults.table import Outcome

COUNT = 124
OLDER, NEWEST, STOP = 2, 3, 4
"""Steps of the two checkpoints, and the last step of the run."""
SETTINGS = (
    *("train.steps=4", "checkpoint.save_interval=1"),
    *("model.attention_dropout=0", "train.eval_interval=0"),
)
FILES = (
    *("manifest.json", "metadata.json", "common.pt", ".metadata", "config.yaml", "versions.json"),
    "shard",
)

SAME = ("metadata.json", "config.yaml", "versions.json")
"""Files that all checkpoints of a run have in common."""

USED_OLDER = "the older one is used"
REFUSED = "none valid: refused"
HARMLESS = "harmless: used, and said"


@dataclass(frozen=True)
class Mutation:
    """One damage to the newest checkpoint, or to `latest`."""

    seed: int
    damage: str
    file: str
    expected: str
    layout: str = "one rank"
    settings: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        return f"mutation, {self.expected}"

    @property
    def name(self) -> str:
        return f"{self.damage} {self.file}, {self.layout}, seed {self.seed}"


# --- damages to one file: (content, the older one's) -> content ----------------------------


def _cut(content: bytes, other: bytes, draw: random.Random) -> bytes:
    return content[: draw.randrange(1, len(content))]


def _empty(content: bytes, other: bytes, draw: random.Random) -> bytes:
    return b""


def _flip(content: bytes, other: bytes, draw: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(draw.choice((1, 1, 3))):
        changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def _append(content: bytes, other: bytes, draw: random.Random) -> bytes:
    return content + draw.randbytes(draw.randint(1, 64))


def _zero(content: bytes, other: bytes, draw: random.Random) -> bytes:
    start = draw.randrange(len(content))
    size = min(draw.choice((1, 16, 512, 4096)), len(content) - start)
    return content[:start] + bytes(size) + content[start + size :]


def _older(content: bytes, other: bytes, draw: random.Random) -> bytes:
    return other


def _noise(content: bytes, other: bytes, draw: random.Random) -> bytes:
    return draw.randbytes(len(content))


DAMAGES: dict[str, Callable[[bytes, bytes, random.Random], bytes]] = {
    "cut short": _cut,
    "empty": _empty,
    "flipped bits in": _flip,
    "bytes after": _append,
    "zeros in": _zero,
    "the older one's": _older,
    "noise for": _noise,
}
MISSING, UNLISTED, BOTH_SWAPPED = "missing", "missing, also in the manifest:", "exchanged"
FOLDERS = ("renamed", "empty folder", "older one under its name", "half deleted", "both exchanged")
POINTERS = ("garbage", "dangling", "cut short", "empty", "path traversal", "missing", "a folder")


def cases(count: int = COUNT, seed: int = 1) -> list[Mutation]:
    """`count` damages of all kinds to all files, a third of them with no other valid checkpoint."""
    draw = random.Random(seed)
    plans: list[tuple[str, str, str]] = [("bytes beside", "the files", HARMLESS)]
    plans += [(pointer, "latest", HARMLESS) for pointer in POINTERS]
    plans += [(folder, "the checkpoint", USED_OLDER) for folder in FOLDERS[:-1]]
    plans += [(folder, "the checkpoint", REFUSED) for folder in FOLDERS]
    plans += [(BOTH_SWAPPED, file, REFUSED) for file in ("manifest.json", "common.pt", "shard")]
    plans += [(UNLISTED, file, USED_OLDER) for file in FILES[1:]]
    plans += [(MISSING, file, USED_OLDER) for file in FILES]
    turn = 0
    while len(plans) < count:
        file = FILES[turn % len(FILES)]
        damage = list(DAMAGES)[turn // len(FILES) % len(DAMAGES)]
        same = damage == "the older one's" and file in SAME
        expected = REFUSED if draw.random() < 0.35 else USED_OLDER
        plans.append(("flipped bits in" if same else damage, file, expected))
        turn += 1
    draw.shuffle(plans)
    return [
        Mutation(
            draw.randrange(10**6),
            *plan,
            layout="expert parallel" if number % 12 == 5 else "one rank",
        )
        for number, plan in enumerate(plans[:count])
    ]


class Stage:
    """Runs with two checkpoints each, to be damaged; made at their first use."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self._ready: dict[str, tuple[Path, Path]] = {}

    def of(self, layout: str) -> tuple[Path, Path]:
        """Return the folders of a run that stopped after step 3 and of the uninterrupted run."""
        if layout not in self._ready:
            stopped = self._bench.folder(f"stage {layout}")
            self._run(stopped, layout, [*SETTINGS, f"train.exit_step={NEWEST}"])
            unbroken = self._bench.folder(f"stage unbroken {layout}")
            self._run(unbroken, layout, [*SETTINGS])
            self._ready[layout] = stopped, unbroken
        return self._ready[layout]

    def _run(self, folder: Path, layout: str, overrides: list[str]) -> None:
        with self._bench.start(folder, layout, overrides) as launch:
            if any(launch.wait()):
                raise RuntimeError(f"a run without faults fails: {launch.complained()}")


def run_case(bench: Bench, stage: Stage, case: Mutation) -> Outcome:
    started_s = time.monotonic()
    stopped, unbroken = stage.of(case.layout)
    folder = bench.folder(f"mutation {case.seed} {case.name}")
    shutil.copytree(stopped / "run", folder / "run", dirs_exist_ok=True)
    damage(folder, case)
    failures = _judge(bench, case, folder, unbroken)
    shutil.rmtree(folder)
    return Outcome(case.kind, case.name, tuple(failures), time.monotonic() - started_s)


def _judge(bench: Bench, case: Mutation, folder: Path, unbroken: Path) -> list[str]:
    before = records(folder)
    with bench.start(folder, case.layout, [*SETTINGS, *case.settings]) as launch:
        statuses = set(launch.wait())
        said, complaint = launch.said(), launch.complained()
    failures = []
    if "Traceback" in complaint:
        failures.append(f"a traceback: {launch.last_words()}")
    wanted = CONFIG_ERROR if case.expected == REFUSED else 0
    if statuses != {wanted}:
        failures.append(f"ended with {statuses}, not {wanted}: {launch.last_words()}")
    named = "latest" if case.file == "latest" else str(checkpoints(folder) / "step_")
    if case.damage == "renamed":  # to an older step, only the pointer tells
        named = str(checkpoints(folder))
    if case.damage not in ("missing", "bytes beside") or case.file in FILES:
        failures += [] if named in complaint else [f"does not name {named}…: {complaint!r}"]
    if case.expected == REFUSED:
        if records(folder) != before or last_step(folder) > NEWEST or "\nstep " in f"\n{said}":
            failures.append(f"a step was done: {said[-200:]!r}")
        return failures
    resumed, right = resumed_step(said), NEWEST if case.expected == HARMLESS else OLDER
    if resumed != right:
        failures.append(f"went on from step {resumed}, not {right}")
    return failures + differences(folder, unbroken)


def damage(folder: Path, case: Mutation) -> None:
    """Apply the damage to the run in `folder`."""
    draw = random.Random(case.seed)
    place = checkpoints(folder)
    newest, older = (place / f"step_{step:08d}" for step in (NEWEST, OLDER))
    if case.file == "latest":
        _damage_pointer(place / "latest", case.damage)
    elif case.damage == "bytes beside":
        (newest / "notes.txt").write_bytes(draw.randbytes(100))
    elif case.damage in FOLDERS:
        _damage_folder(newest, older, case.damage, draw)
    else:
        _damage_file(newest, older, case, draw)
    if case.expected == REFUSED and case.damage not in (BOTH_SWAPPED, "both exchanged"):
        shutil.rmtree(older)


def _damage_file(newest: Path, older: Path, case: Mutation, draw: random.Random) -> None:
    shards = sorted(path.name for path in newest.glob("*.distcp"))
    name = draw.choice(shards) if case.file == "shard" else case.file
    path = newest / name
    content, other = path.read_bytes(), (older / name).read_bytes()
    if case.damage in (MISSING, UNLISTED):
        path.unlink()
        if case.damage == UNLISTED:
            manifest = newest / "manifest.json"
            listed = json.loads(manifest.read_text())
            del listed["files"][name]
            manifest.write_text(json.dumps(listed, indent=1, sort_keys=True) + "\n")
        return
    if case.damage == BOTH_SWAPPED:
        assert content != other, f"{name} is the same in both"
        path.write_bytes(other)
        (older / name).write_bytes(content)
        return
    changed = content
    while changed == content:  # zeros may fall on zeros
        changed = DAMAGES[case.damage](content, other, draw)
    path.write_bytes(changed)


def _damage_folder(newest: Path, older: Path, damage: str, draw: random.Random) -> None:
    if damage == "renamed":
        newest.rename(newest.with_name(f"step_{draw.choice((1, 9, 12345678)):08d}"))
    elif damage == "empty folder":
        shutil.rmtree(newest)
        newest.mkdir()
    elif damage == "older one under its name":
        shutil.rmtree(newest)
        shutil.copytree(older, newest)
    elif damage == "half deleted":
        names = sorted(path.name for path in newest.iterdir())
        for name in draw.sample(names, len(names) // 2):
            (newest / name).unlink()
    else:
        aside = newest.with_name("aside")
        newest.rename(aside)
        older.rename(newest)
        aside.rename(older)


def _damage_pointer(path: Path, damage: str) -> None:
    if damage in ("missing", "a folder"):
        path.unlink()
        if damage == "a folder":
            path.mkdir()
        return
    contents = {
        "garbage": b"\x80\xff\x00step",
        "dangling": b"step_00000007\n",
        "cut short": path.read_bytes()[:7],
        "empty": b"",
        "path traversal": b"../../../../etc\n",
    }
    path.write_bytes(contents[damage])
