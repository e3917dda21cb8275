"""Results of runs in a file of JSON lines, which outlives the runs' folders.

Each line is written when its run ends. A run that the file has is not trained again, so that the
file, committed, lets another clone continue.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_coe.config.run_config import Settings
from megatron_coe.utils.files import check_writable
from megatron_coe.utils.metrics_file import Record


@dataclass(frozen=True)
class RunResult:
    """The result of a run.

    Attributes:
        variant: name of its preset.
        lr: learning rate.
        seed: of its initial weights and the order of its data.
        held_out: the rows that it is validated on: `tuning` or `report`.
        losses: (step, validation loss in nats per token), the last step last.
        seconds: of training, validation left out.
        settings: digest of its settings (`settings_digest`).
        commit: that it was trained at.
        passes: experts that a token passes through in a layer, where that was counted.
    """

    variant: str
    lr: float
    seed: int
    held_out: str
    losses: tuple[tuple[int, float], ...]
    seconds: float
    settings: str
    commit: str
    passes: float | None = None

    @property
    def key(self) -> tuple[str, float, int, str]:
        """What tells it from the other results of a scale."""
        return self.variant, self.lr, self.seed, self.held_out

    @property
    def loss(self) -> float:
        """The last validation loss."""
        return self.losses[-1][1]

    @property
    def records(self) -> list[Record]:
        """The validation losses, and the seconds of training, as the records of a run."""
        records: list[Record] = [{"step": step, "valid_loss": loss} for step, loss in self.losses]
        records[-1]["seconds"] = self.seconds
        return records


@dataclass(frozen=True)
class ResultsFile:
    """A file of results, one a line, which need not exist yet."""

    path: Path

    def read(self) -> dict[tuple[str, float, int, str], RunResult]:
        """Read all results by their keys.

        Raises:
            ValueError: a line is no result; the message names it.
            OSError: the file cannot be read, or could not be written later.
        """
        check_writable(self.path)
        if not self.path.exists():
            return {}
        found = {}
        for number, line in enumerate(self.path.read_text(encoding="utf-8").splitlines(), 1):
            try:
                values = json.loads(line)
                values["losses"] = tuple((int(step), float(x)) for step, x in values["losses"])
                result = RunResult(**values)
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(
                    f"{self.path}:{number}: not the result of a run ({error}); remove the line"
                ) from error
            found[result.key] = result
        return found

    def append(self, result: RunResult) -> None:
        """Add a result as a line.

        Raises: OSError.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(result)) + "\n")


def settings_digest(settings: Settings, described: Sequence[object] = ()) -> str:
    """Return a digest of the settings that decide a run's losses.

    Paths and settings at their defaults are left out, so that it is the same in another clone and
    does not change when a setting is added.

    Args:
        described: what else decides them: the text and its tokenizer.
    """
    values, defaults = asdict(settings), asdict(Settings())
    for section in (values, defaults):
        del section["checkpoint"], section["log"]
        for path in ("tokenizer", "train", "valid", "cache"):
            del section["data"][path]
    changed = {
        f"{section}.{name}": value
        for section, own in sorted(values.items())
        for name, value in sorted(own.items())
        if section == "model" or value != defaults[section][name]
    }
    text = json.dumps([changed, *described], default=list)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
