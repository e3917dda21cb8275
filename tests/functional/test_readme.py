"""What the README shows can be run as it stands."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
README = (REPO / "README.md").read_text(encoding="utf-8")


def test_the_example_builds_a_model(tmp_path: Path) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    counted = "\nassert provider.num_params() == sum(p.numel() for p in model.parameters())\n"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", example + counted],
        cwd=tmp_path,
        env={"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"\d+ \d+ \d+", done.stdout.strip().splitlines()[-1])


def test_every_path_it_names_exists() -> None:
    named = set(re.findall(r"\]\(([^)#:]+)\)", README))
    tree = README.split("## Repository layout")[1].split("## ")[0]
    named |= set(re.findall(r"^    ([\w./]+)", tree, flags=re.MULTILINE))
    named |= {
        f"megatron_coe/{name}"
        for name in re.findall(r"^      ([\w./]+)  ", tree, flags=re.MULTILINE)
    }
    missing = {name for name in named if not (REPO / name).exists()}
    assert len(named) > 15 and not missing


def test_every_preset_it_names_exists() -> None:
    page = (REPO / "docs/presets.md").read_text(encoding="utf-8")
    table = page.split("## The paper's models")[1]
    named = set(re.findall(r"`((?:coe|moe)[\w-]+)`", table))
    assert len(named) > 15
    assert not [name for name in named if not (REPO / f"examples/paper/{name}.yaml").exists()]


def test_it_is_one_page() -> None:
    assert len(README.splitlines()) <= 120
