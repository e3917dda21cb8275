"""What the product's source may not do: open a pickle, build objects from YAML, run others' code.

The scan is of syntax, so that whoever adds such a call has to look at this list first. What the
calls that are left do with hostile files is tried in tests/faults/hostile.py.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[3]
FOLDERS = ("megatron_coe", "benchmarks", "experiments", "tools", "slurm", "examples")
SOURCES = [
    REPO / "pretrain_coe.py",
    *(path for folder in FOLDERS for path in sorted((REPO / folder).rglob("*.py"))),
]

FORBIDDEN = {
    *("eval", "exec", "compile", "__import__"),
    *("pickle.load", "pickle.loads", "marshal.load", "marshal.loads", "shelve.open"),
    *("yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load"),
    *("os.system", "os.popen", "joblib.load", "cloudpickle.load", "dill.load"),
}
# The unpicklers that know a few harmless names and refuse every other.
UNPICKLERS = {
    "megatron_coe/checkpoint/safe_unpickle.py": {"_IndexUnpickler", "_ExtraStateUnpickler"}
}
# Where the user's own flag goes on to transformers, and what stands for "no".
PASSED_ON = {"megatron_coe/generation.py"}


def faults(source: str, name: str) -> Iterator[str]:
    """What a file does that it may not, with its line."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and "pickle.Unpickler" in map(ast.unparse, node.bases):
            if node.name not in UNPICKLERS.get(name, ()):
                yield f"{node.lineno}: an unpickler of its own"
            elif not any(getattr(part, "name", "") == "find_class" for part in node.body):
                yield f"{node.lineno}: an unpickler without a list of names"
        if isinstance(node, ast.ImportFrom) and node.module in ("pickle", "yaml", "marshal"):
            yield f"{node.lineno}: names of {node.module} without their module"
        if isinstance(node, ast.Call):
            yield from (f"{node.lineno}: {fault}" for fault in _of_call(node, name))
        if isinstance(node, ast.Dict):
            pairs = zip(node.keys, node.values, strict=True)
            for key, value in pairs:
                if isinstance(key, ast.Constant) and key.value == "trust_remote_code":
                    yield from (f"{node.lineno}: {fault}" for fault in _of_trust(value, name))


def _of_call(node: ast.Call, name: str) -> Iterator[str]:
    function = ast.unparse(node.func)
    given = {keyword.arg: keyword.value for keyword in node.keywords}
    if function in FORBIDDEN:
        yield f"calls {function}"
    if function == "torch.load" and not _is(given.get("weights_only"), True):
        yield "calls torch.load without weights_only=True"
    if "allow_pickle" in given and not _is(given["allow_pickle"], False):
        yield f"calls {function} with allow_pickle"
    if function in ("np.load", "numpy.load") and not _is(given.get("allow_pickle"), False):
        yield "calls numpy.load without allow_pickle=False"
    if function.endswith(".from_pretrained") and not {"trust_remote_code", None} & given.keys():
        yield f"calls {function} without saying whether remote code may run"
    if "trust_remote_code" in given:
        yield from _of_trust(given["trust_remote_code"], name)
    if "shell" in given and not _is(given["shell"], False):
        yield f"calls {function} with a shell"


def _of_trust(value: ast.expr, name: str) -> Iterator[str]:
    passed_on = name in PASSED_ON or name.startswith("megatron_coe/cli/")
    if not _is(value, False) and not (passed_on and "trust_remote_code" in ast.unparse(value)):
        yield "runs remote code"


def _is(node: ast.expr | None, value: bool) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(REPO)))
def test_nothing_opens_what_could_run(path: Path) -> None:
    name = str(path.relative_to(REPO))
    assert list(faults(path.read_text(encoding="utf-8"), name)) == []


@pytest.mark.parametrize(
    "line",
    [
        "pickle.load(file)",
        "pickle.loads(b'')",
        "from pickle import loads",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=flag)",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "numpy.save(path, x, allow_pickle=True)",
        "yaml.load(text, Loader=yaml.Loader)",
        "eval(text)",
        "exec(text)",
        "AutoModel.from_pretrained(path)",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
        "AutoModel.from_pretrained(path, trust_remote_code=trust_remote_code)",
        "options = {'trust_remote_code': True}",
        "subprocess.run(text, shell=True)",
        "class Mine(pickle.Unpickler): pass",
    ],
)
def test_the_scan_sees(line: str) -> None:
    assert list(faults(line, "megatron_coe/x.py"))


def test_the_scan_lets_through_what_is_safe() -> None:
    text = """
torch.load(path, map_location="cpu", weights_only=True)
np.load(path, mmap_mode="r", allow_pickle=False)
AutoTokenizer.from_pretrained(path, trust_remote_code=False)
yaml.safe_load(text)
model.eval()
re.compile(pattern)
"""
    assert list(faults(text, "megatron_coe/x.py")) == []
