"""Presets: the YAML files of `examples/`, by name.

They have one source, the repository's folder `examples`, which a wheel holds as
`megatron_coe/presets`.
"""

from __future__ import annotations

import difflib
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]
_NO_RUNS = {"evaluate", "megatron_lm"}
"""Folders of `examples/` whose YAML files are not settings of runs."""


def presets_folder() -> Path:
    """Return the folder of the presets, of the installed package or of its checkout."""
    packaged = _PACKAGE / "presets"
    return packaged if packaged.is_dir() else _PACKAGE.parent / "examples"


def preset_names() -> list[str]:
    """Return the names of all presets, such as `paper/coe-2_4-64`."""
    folder = presets_folder()
    files = [*folder.glob("*.yaml"), *folder.glob("*/*.yaml")]
    runs = [file for file in files if file.parent.name not in _NO_RUNS]
    return sorted(file.relative_to(folder).with_suffix("").as_posix() for file in runs)


def find_settings(name: str) -> Path:
    """Return the file of settings that a path or a preset's name stands for.

    An existing file takes precedence over a preset. A path with a suffix is returned unchanged:
    reading it reports what is wrong.

    Raises: ValueError: a name without a suffix is neither a file nor a preset; the nearest preset
        is named.
    """
    path = Path(name)
    is_there = path.exists() and not path.is_dir()  # a pipe is no file, and can be read
    if is_there or path.suffix in (".yaml", ".yml"):
        return path
    if name in (known := preset_names()):
        return presets_folder() / f"{name}.yaml"
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    hint = f"did you mean the preset {near[0]!r}?" if near else f"known are {', '.join(known)}"
    raise ValueError(f"{name!r} is neither a file nor a preset; {hint}")
