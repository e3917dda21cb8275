"""A run's settings: YAML files and dotted overrides, merged into `Settings`.

    settings = load_settings(Path("examples/quickstart.yaml"), ["train.steps=10"])

A file may name another with `extends: other.yaml` (relative to itself) and then holds only what
differs. A value may refer to another, `${section.key}`; nothing else is looked up for it (not the
environment, which would end up in every checkpoint), and no tag of YAML makes an object of Python.
The `config.yaml` in a checkpoint or a run's folder refers to that folder, wherever it is
(`locations`). Names and types are checked here, values in `config.validation`; former names are
read, too (`aliases`).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from megatron_coe.config.aliases import (
    refuse_both,
    with_present_names,
    without_dropped_fields,
)
from megatron_coe.config.locations import own_places
from megatron_coe.config.run_config import SECTIONS, LogSettings, Settings

EXTENDS = "extends"

_REFERENCE = re.compile(r"\$\{([A-Za-z_]\w*(?:\.\w+)+)\}")

NOT_OFFERED = {
    "optimizer_cpu_offload": "Megatron's hybrid optimizer keeps its state where the checkpoints of "
    "this package do not look; share it out with parallel.use_distributed_optimizer instead",
    "use_precision_aware_optimizer": "it is Transformer Engine's, and untested here; share the "
    "optimizer's state out with parallel.use_distributed_optimizer instead",
    "use_megatron_fsdp": "its shards are untested with a layer entered several times; use "
    "parallel.use_distributed_optimizer",
}
"""Settings of Megatron's that people look for, and why they are not here."""


def load_settings(path: Path, overrides: Sequence[str] = ()) -> Settings:
    """Read `path`, what it extends, and `section.key=value` overrides, the later winning.

    Raises:
        ValueError: an unknown key (the nearest name is suggested), a wrong type, a cycle of
            `extends`, or text that is not YAML; the message names the file or the override.
        OSError: a file cannot be read.
    """
    try:
        return _load(path, overrides)
    except RecursionError as error:
        raise ValueError(f"{path}: nested too deep, or refers to itself") from error


def settings_files(path: Path) -> list[Path]:
    """Return the file and all that it extends. Raises: as `load_settings`."""
    return [source for source, _ in _read_chain(path)]


def _load(path: Path, overrides: Sequence[str]) -> Settings:
    merged = OmegaConf.structured(Settings(log=LogSettings(dir=f"runs/{path.stem}")))
    for source, content in _read_chain(path):
        merged = _merge(merged, content, str(source))
    refuse_both("overrides", (override.partition("=")[0] for override in overrides))
    for override in overrides:
        merged = _merge(merged, _parse_override(override), f"override {override!r}")
    _check_references(path, merged)
    try:
        settings = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:  # a reference that leads nowhere, a value left out
        key = f"{error.full_key}: " if getattr(error, "full_key", None) else ""
        raise ValueError(f"{path}: {key}{_first_line(error)}") from error
    assert isinstance(settings, Settings)
    settings.model = without_dropped_fields(settings.model)
    return settings


def suggestion(name: str, known: Iterable[str]) -> str:
    """Return a hint that follows an unknown name: the nearest known one, or all if few."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; known are {', '.join(known)}" if len(known) <= 16 else ""


def _read_chain(path: Path) -> list[tuple[Path, DictConfig]]:
    """Read the file and all it extends, the most basic first."""
    chain: list[tuple[Path, DictConfig]] = []
    while True:
        if any(path.resolve() == earlier.resolve() for earlier, _ in chain):
            route = " -> ".join(str(source) for source in [*(p for p, _ in chain), path])
            raise ValueError(f"{path}: 'extends' goes round in a circle: {route}")
        try:
            content = _read_yaml(path)
        except OSError as error:
            named = f"{chain[-1][0]}: 'extends' names {path}" if chain else str(path)
            raise OSError(f"{named}: cannot be read ({error.strerror or error})") from error
        base = content.pop(EXTENDS, None)
        written: Any = OmegaConf.to_container(content, resolve=False)
        renamed = OmegaConf.create(with_present_names(str(path), written))
        chain.append((path, _with_own_places(path, renamed)))
        if base is None:
            return chain[::-1]
        if not isinstance(base, str):
            raise ValueError(f"{path}: 'extends' must be the path of one file, got {base!r}")
        path = path.parent / base


def _with_own_places(path: Path, content: DictConfig) -> DictConfig:
    written: Any = OmegaConf.to_container(content, resolve=False)
    places = own_places(path, written)
    merged = OmegaConf.merge(
        content, {name: values for name, values in places.items() if _is_section(written, name)}
    )
    assert isinstance(merged, DictConfig)
    return merged


def _is_section(written: dict[str, Any], name: str) -> bool:
    """Return whether there can be settings under a name; `_merge` reports anything else."""
    return isinstance(written.get(name) or {}, dict)


def _read_yaml(path: Path) -> DictConfig:
    try:
        # PyYAML's own code first: where a file is nested too deep it raises, and C's kills the run.
        yaml.compose(path.read_bytes(), Loader=yaml.SafeLoader)
        content: object = OmegaConf.load(path)
    except yaml.constructor.ConstructorError as error:  # a tag, or more values than it reads
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: refused by OmegaConf: {reason}") from error
    except (yaml.YAMLError, UnicodeDecodeError, OmegaConfBaseException) as error:
        raise ValueError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    except OSError as error:
        if error.errno is not None:
            raise
        content = error  # OmegaConf's for a file that is a number
    if not isinstance(content, DictConfig):
        raise ValueError(f"{path}: must hold sections ({', '.join(SECTIONS)}), as `train: …`")
    return content


def _check_references(path: Path, settings: DictConfig) -> None:
    """Raise ValueError for a reference that is not `${section.key}`."""
    for key, text in _texts("", OmegaConf.to_container(settings, resolve=False)):
        if "${" in _REFERENCE.sub("", text):
            raise ValueError(
                f"{path}: {key}={text!r}: only other settings can be referred to, as "
                "${section.key}; a shell puts in its variables on the command line, as "
                'log.dir="$HOME/run"'
            )


def _texts(key: str, value: object) -> Iterator[tuple[str, str]]:
    """Yield every text in nested values, with its key, such as `data.train.0`."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict | list):
        for name, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _texts(f"{key}.{name}" if key else str(name), part)


def _parse_override(override: str) -> DictConfig:
    key, equals, _ = override.partition("=")
    if not equals or "." not in key or not all(key.split(".")):
        raise ValueError(f"override {override!r}: must have the form section.key=value")
    try:
        written: Any = OmegaConf.to_container(OmegaConf.from_dotlist([override]), resolve=False)
        return OmegaConf.create(with_present_names(f"override {override!r}", written))
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ValueError(f"override {override!r}: {_first_line(error)}") from error


def _merge(base: DictConfig, content: DictConfig, source: str) -> DictConfig:
    """Merge `content` over `base`; an error names the source, the key and a better name."""
    try:
        merged = OmegaConf.merge(_without_other_form(base, content), content)
    except ConfigKeyError as error:
        key = str(error.full_key)
        section, _, name = key.rpartition(".")
        if name in NOT_OFFERED:
            raise ValueError(f"{source}: {key!r} is not offered: {NOT_OFFERED[name]}") from error
        known = [str(other) for other in (base[section] if section else base)]
        raise ValueError(f"{source}: unknown key {key!r}{suggestion(name, known)}") from error
    except (OmegaConfBaseException, TypeError) as error:
        place = getattr(error, "full_key", None)
        raise ValueError(
            f"{source}: {f'{place}: ' if place else ''}{_first_line(error)}"
        ) from error
    assert isinstance(merged, DictConfig)
    return merged


def _without_other_form(base: DictConfig, content: DictConfig) -> DictConfig:
    """Return `base` without a `data.valid` of another form than `content` has.

    It is a list or a mapping, and OmegaConf merges neither into the other.
    """
    forms = []
    for settings in (base, content):
        written: Any = OmegaConf.to_container(settings, resolve=False)
        data = written.get("data")
        forms.append(type(data.get("valid")) if isinstance(data, dict) else None)
    if set(forms) != {list, dict}:
        return base
    replaced = base.copy()
    replaced.data.valid = None
    return replaced


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
