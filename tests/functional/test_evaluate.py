"""Stock lm_eval on an exported model, as docs/evaluate.md runs it: `make test-eval`.

The model has learned answers by heart, which it only gives to the very prompts it was trained on.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_coe.data.tokenizer import load_tokenizer

ROOT = Path(__file__).parents[2]
DATA = Path("runs/quickstart/data")  # where the task files look, from where lm_eval is run
TASKS = ROOT / "examples" / "evaluate"
LEARNT = {
    "What is 3 + 4?": "7",
    "What is 12 + 30?": "42",
    "Name the largest ocean.": "The Pacific",
    "Count to three.": "one\ntwo\nthree",
    "Spell cat backwards.": "t-a-c",
    "Half of 9?": "4.5",
}
WRONG = {"What is 12 + 30?": "43", "Count to three.": "one\ntwo\nfour"}
STEPS = 120

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None,
    reason="lm_eval is not installed: `make test-eval` has it in an environment of its own",
)


def run(home: Path, *command: object) -> None:
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "HF_HOME": str(home / "cache"),
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        env=environment,
        capture_output=True,
        text=True,
        cwd=home,
    )
    assert done.returncode == 0, done.stderr


def write_jsonl(path: Path, pairs: list[tuple[str, str]]) -> None:
    records = [{"query": query, "response": response} for query, response in pairs]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A trained and exported model, and a parquet file of answers, right and wrong ones."""
    home = tmp_path_factory.mktemp("home")
    (home / DATA).mkdir(parents=True)
    write_jsonl(home / "train.jsonl", list(LEARNT.items()) * 8)
    text = ("--input", "train.jsonl", "--qa-keys", "query", "response")
    run(home, ROOT / "tools/train_tokenizer.py", *text, "--vocab-size", 330, "--output", "t.model")
    run(
        home, ROOT / "tools/preprocess_data.py", *text, "--append-eod",
        *("--tokenizer", "t.model", "--output-prefix", "train"),
    )  # fmt: skip
    run(
        home, ROOT / "pretrain_coe.py", "--config", ROOT / "examples/quickstart.yaml",
        *("data.tokenizer=t.model", "data.train=[train]", "data.valid=[train]"),
        *("data.mode=padded", "model.seq_length=64", "model.num_layers=2"),
        *("model.hidden_size=64", "model.moe_ffn_hidden_size=64", "log.dir=run"),
        *(f"train.steps={STEPS}", f"train.eval_interval={STEPS}"),
    )  # fmt: skip
    folders = ("--input", "run/checkpoints", "--output", "my-model")
    run(home, ROOT / "tools/convert_checkpoint.py", "to-hf", *folders)

    write_jsonl(home / DATA / "valid.jsonl", list((LEARNT | WRONG).items()))
    (to_parquet,) = re.findall(
        r"```python\n(.*?)```", (ROOT / "docs/evaluate.md").read_text(), flags=re.DOTALL
    )
    run(home, "-c", to_parquet)
    return home


def evaluate(home: Path, batch_size: int) -> dict[str, float]:
    output = home / f"results-{batch_size}"
    run(
        home, "-m", "lm_eval", "--model", "hf",
        *("--model_args", "pretrained=my-model,trust_remote_code=True,dtype=float32"),
        *("--include_path", TASKS, "--tasks", "qa_exact_match,qa_likelihood"),
        *("--batch_size", batch_size, "--device", "cpu", "--output_path", output),
    )  # fmt: skip
    (path,) = output.rglob("results_*.json")
    results = json.loads(path.read_text())["results"]
    exact, likelihood = results["qa_exact_match"], results["qa_likelihood"]
    return {
        "exact match": exact["exact_match,none"],
        "accuracy": likelihood["acc,none"],
        "bits per byte": likelihood["bits_per_byte,none"],
    }


def bits_per_byte(home: Path) -> float:
    """The same by training's own tokenizer and one text at a time."""
    from megatron_coe.hf import CoeForCausalLM

    model = CoeForCausalLM.from_pretrained(home / "my-model", dtype=torch.float32).eval()
    tokenizer = load_tokenizer(home / "t.model")
    nats = size = 0
    for query, response in (LEARNT | WRONG).items():
        prompt = tokenizer.tokenize(f"query : {query} response :")
        ids = tokenizer.tokenize(f"query : {query} response : {response}")
        assert ids[: len(prompt)] == prompt
        with torch.no_grad():
            scores = model(torch.tensor([ids])).logits[0].log_softmax(dim=-1)
        nats -= sum(scores[i - 1, ids[i]].item() for i in range(len(prompt), len(ids)))
        size += len(response.encode())
    return nats / size / math.log(2)


def test_lm_eval_gives_the_share_of_learned_answers_and_their_likelihood(home):
    share = 1 - len(WRONG) / len(LEARNT)
    batched, single = evaluate(home, batch_size=8), evaluate(home, batch_size=1)
    for results in (batched, single):
        assert results["exact match"] == pytest.approx(share)
        assert results["accuracy"] == pytest.approx(share)
        assert results["bits per byte"] == pytest.approx(bits_per_byte(home), abs=1e-4)
