"""tools/analyze_routing.py and tools/report.py as a user runs them, on small random models."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import pytest

from tests import zygote
from tests.unit.conversion.models import write_random_model

N, K, C = 7, 2, 3
TOKENS = 600


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder `hf-1`, the same model as the checkpoint of `run`, and text."""
    from megatron_coe.conversion.import_hf import from_hf
    from megatron_coe.conversion.tokenizer import write_tokenizer
    from megatron_coe.data.preprocess import preprocess
    from megatron_coe.data.records import Fields
    from megatron_coe.data.tokenizer import train_tokenizer

    home = tmp_path_factory.mktemp("home")
    texts = [f"one two {number} three , four {number * 7} five" for number in range(120)]
    (home / "text.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    inputs = [home / "text.jsonl"]
    train_tokenizer(inputs, home / "t.model", fields=Fields(), vocab_size=290)
    preprocess(inputs, home / "d", home / "t.model", fields=Fields(), append_eod=True, quiet=True)
    write_random_model(home / "hf-1", seed=1, vocab_size=300, coe_iterations=C)
    special = write_tokenizer(home / "t.model", home / "hf-1")
    path = home / "hf-1" / "config.json"
    more = {**special, "max_position_embeddings": 64}
    path.write_text(json.dumps(json.loads(path.read_text()) | more))
    from_hf(home / "hf-1", home / "run" / "checkpoints")
    return home


def run(home: Path, tool: str, *arguments: object, **how: bool) -> CompletedProcess[str]:
    offline = {"HF_HOME": str(home / "cache"), "HF_HUB_OFFLINE": "1"}
    return zygote.run(f"tools/{tool}", *arguments, cwd=home, environment=offline, **how)


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def analysis(home: Path) -> Path:
    """The analysis of the folder `hf-1`, with its control."""
    done = run(
        home, "analyze_routing.py", "--model", "hf-1", "--input", "text.jsonl", "--random-init",
        "--placement", "--tokens", TOKENS, "--permutations", 9, "--output", "out", forked=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert "| hf-1 | 1 | 1 → 2 |" in done.stdout
    return home / "out"


def test_tables_and_pictures_of_a_folder(home: Path, analysis: Path) -> None:
    about = json.loads((analysis / "summary.json").read_text())["about"]
    read = about["tokens"]
    assert (about["models"], about["experts"], about["topk"]) == (["hf-1"], N, K)
    assert about["run"] == "hf-1"
    assert TOKENS <= read < TOKENS + 64
    counts = dict.fromkeys(("routers", "transitions", "usage"), 0)
    for name in counts:
        counts[name] = len(table(analysis / f"{name}.csv"))
    assert counts == {"routers": 2 * 2 * C, "transitions": 2 * 2 * (C - 1), "usage": 2 * 2 * C * N}
    for model in ("hf-1", "random-init"):
        for layer in (1, 2):
            for t in range(1, C):
                path = analysis / f"coactivation_{model}_layer-{layer}_iterations-{t}-{t + 1}.csv"
                matrix = np.loadtxt(path, dtype=int, delimiter=",")
                assert (matrix.shape, matrix.sum()) == ((N, N), read * K * K)
                used = [
                    int(row["tokens"]) * K
                    for row in table(analysis / "usage.csv")
                    if (row["model"], row["layer"], row["iteration"]) == (model, str(layer), str(t))
                ]
                assert matrix.sum(axis=1).tolist() == used
            plot = analysis / f"coactivation_{model}_layer-{layer}.png"
            assert plot.read_bytes().startswith(b"\x89PNG")
    for name in ("usage_hf-1", "consistency_hf-1", "information", "usage_random-init"):
        assert (analysis / f"{name}.png").stat().st_size > 5000


def test_experts_are_placed_and_a_placed_model_routes_alike(home: Path, analysis: Path) -> None:
    placed = table(analysis / "placement.csv")
    assert [(row["layer"], row["ep"]) for row in placed] == [("1", str(N)), ("2", str(N))]
    for row in placed:  # one expert to a rank: its order changes nothing
        assert row["identity"] == row["placed"]
    orders = {"7": {layer: [3, 0, 6, 1, 2, 5, 4] for layer in (1, 2)}}
    (home / "placement.json").write_text(json.dumps(orders))
    assert json.loads((analysis / "placement.json").read_text())["7"].keys() == {"1", "2"}
    done = run(
        home, "convert_checkpoint.py", "place", "--input", "run/checkpoints", "--ep", 7,
        "--placement", "placement.json", "--output", "placed",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    done = run(
        home, "analyze_routing.py", "--model", "placed", "--input", "d_text_document",
        "--tokens", TOKENS, "--permutations", 1, "--output", "of-placed",
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    before = [row for row in table(analysis / "usage.csv") if row["model"] == "hf-1"]
    tokens = {(row["layer"], row["iteration"], row["expert"]): row["tokens"] for row in before}
    for row in table(home / "of-placed" / "usage.csv"):
        was = str(orders["7"][1][int(row["expert"])])
        assert row["tokens"] == tokens[row["layer"], row["iteration"], was]


def test_a_checkpoint_routes_as_the_folder_that_it_came_from(home: Path, analysis: Path) -> None:
    done = run(
        home, "analyze_routing.py", "--model", "run", "--input", "d_text_document",
        "--tokens", TOKENS, "--permutations", 9, "--output", "of-run",
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    for name in ("routers", "transitions", "usage"):
        ours = table(home / "of-run" / f"{name}.csv")
        theirs = [row for row in table(analysis / f"{name}.csv") if row["model"] == "hf-1"]
        assert [{**row, "model": "hf-1"} for row in ours] == theirs


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--model", "none", "--input", "text.jsonl"), "none: neither a Hugging Face folder"),
        (("--model", "hf-1", "--input", "none"), "none: neither a data set"),
        (("--model", "hf-1", "--input", "text.jsonl", "--qa-keys", "q", "a"), "no key 'q'"),
        (("--model", "hf-1", "--input", "text.jsonl", "--permutations", 0), "permutations=0"),
    ],
    ids=["no model", "no data", "no key", "no shuffles"],
)
def test_a_mistake_is_one_line(home: Path, arguments: tuple, told: str) -> None:
    done = run(home, "analyze_routing.py", *arguments, "--output", "not-there")
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
    assert told in done.stderr
    assert not (home / "not-there").exists()


# --- report.py ------------------------------------------------------------------------------------

HOSTILE = "<script>alert(1)</script> & 'quotes'"


@pytest.fixture(scope="module")
def page(home: Path, analysis: Path) -> Path:
    """The page of a run with metrics, an analysis and samples."""
    folder = home / "run"
    records = [
        {
            "step": step, "train_loss": 5 / step, "lr": 0.1, "grad_norm": 1.0,
            "tokens_per_second": 9.0, "balance/seq_aux_loss/iteration_1": 1.1,
            "grad_norm/routers": 0.6, "grad_norm/attention": 0.8, "load_entropy/iteration_1": 0.9,
            "load/iteration_1/layer_1": [0.5, 0.25, 0.25], "dead_experts/iteration_1": 0.0,
        }
        for step in (1, 10, 20)
    ]  # fmt: skip
    records[-1]["valid_loss"] = 0.5
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    shutil.copy(folder / "checkpoints" / "step_00000000" / "config.yaml", folder)
    (folder / "answers.txt").write_text(HOSTILE)
    (folder / "machine.json").write_text(json.dumps({"processor": HOSTILE, "gpus": 8}))
    shutil.copytree(analysis, folder / "analysis")
    done = run(home, "report.py", "run", forked=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("run/report.html: ")
    return folder / "report.html"


class _Page(HTMLParser):
    """What a page refers to, its headings, and whether its tags close in order."""

    VOID = ("meta", "br", "img", "link", "input", "hr")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.references: list[str] = []
        self.ids: list[str] = []
        self.text = ""
        self.plots: list[str | None] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        self.tags.append(tag)
        for key, value in attributes:
            if key in ("src", "href", "xlink:href", "srcset", "action", "data", "poster"):
                self.references.append(value or "")
            if key == "id":
                self.ids.append(value or "")
            self.references += re.findall(r"url\(([^)]*)\)", value or "")
        if tag == "svg":
            named = dict(attributes)
            self.plots.append(named.get("aria-label") if named.get("role") == "img" else None)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_is_whole_and_refers_to_nothing_outside(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    parsed = _Page(text)
    assert parsed.open == []
    assert parsed.references
    for reference in parsed.references:
        assert reference.startswith(("#", "data:image/png;base64,")), reference[:80]
    targets = {reference[1:] for reference in parsed.references if reference.startswith("#")}
    assert targets <= set(parsed.ids)
    assert len(set(parsed.ids)) == len(parsed.ids)
    assert "http://" not in text and "https://" not in text
    assert "@import" not in text and not {"script", "link", "iframe"} & set(parsed.tags)


def test_the_page_shows_everything(page: Path) -> None:
    parsed = _Page(page.read_text(encoding="utf-8"))
    assert HOSTILE in parsed.text  # as text, not as a tag
    for heading in ("Curves", "Routing", "Samples", "Last metrics", "Machine", "Settings"):
        assert heading in parsed.text
    for told in ("Validation loss 0.5000 at step 20", "balance/seq_aux_loss", "coe_iterations: 3"):
        assert told in parsed.text, told
    # Curves, co-activation, load and neighbors, information.
    assert len(parsed.plots) == 5 + 4 + 2 * 2 + 1
    assert all(parsed.plots)  # each is described


def test_a_run_without_routing_has_a_page_too(home: Path, page: Path) -> None:
    bare = home / "bare"
    bare.mkdir()
    for name in ("metrics.jsonl", "config.yaml"):
        shutil.copy(page.parent / name, bare)
    done = run(home, "report.py", "bare", "--output", "bare")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("bare.html: ")
    parsed = _Page((home / "bare.html").read_text(encoding="utf-8"))
    assert "Not analyzed" in parsed.text and "Samples" not in parsed.text
    assert "Not recorded" in parsed.text, "the machine"
    missing = run(home, "report.py", "none")
    assert (missing.returncode, len(missing.stderr.splitlines())) == (2, 1)
    assert "none/metrics.jsonl" in missing.stderr


def test_checkpoints_are_analyzed_where_there_is_held_out_data(home: Path, page: Path) -> None:
    from megatron_coe.config.loader import load_settings

    folder = home / "fresh"
    shutil.copytree(page.parent / "checkpoints", folder / "checkpoints")
    shutil.copy(page.parent / "metrics.jsonl", folder)
    settings = load_settings(page.parent / "config.yaml", ["data.valid=[d_text_document]"])
    (folder / "config.yaml").write_text(settings.to_yaml())
    done = run(home, "report.py", "fresh")
    assert (done.returncode, done.stderr) == (0, "")
    models = {row["model"] for row in table(folder / "analysis" / "transitions.csv")}
    assert models == {"step_00000000", "random-init"}
    parsed = _Page((folder / "report.html").read_text(encoding="utf-8"))
    assert "Not analyzed" not in parsed.text and "step_00000000" in parsed.text
    for title in ("fresh, step 0, layer 1", "fresh, initial weights, layer 2"):
        assert title in parsed.text


CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


@pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium")
def test_a_real_browser_shows_it_without_a_network(page: Path, tmp_path: Path) -> None:
    """The document that the browser has built, with its heatmaps, and no complaint."""
    assert CHROMIUM is not None
    done = subprocess.run(
        [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
            "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={tmp_path}",
            "--enable-logging=stderr", "--dump-dom", page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("<svg") == 14
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in done.stdout
    complaints = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert complaints == []
