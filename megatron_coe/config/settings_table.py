"""Every setting with its type, default, rule and description, for people and for editors.

One table, read from the dataclasses that hold the settings: names and types from their fields, the
description from the text under a field, in this package and in Megatron-Core alike.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
import types
from collections.abc import Iterator
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from megatron_coe.config.aliases import DROPPED_FIELDS, FORMER_KEYS, FORMER_VALUES
from megatron_coe.config.loader import EXTENDS, suggestion
from megatron_coe.config.run_config import SECTIONS, Settings
from megatron_coe.utils.value_rules import ValueRule

MODEL = "model"
WIDTH = 96


@dataclass(frozen=True)
class Setting:
    """One setting of a run."""

    name: str
    """section.key"""
    hint: Any
    """Its annotated type."""
    default: object
    rule: ValueRule | None
    description: str
    """Empty where the code says nothing about it."""

    @property
    def is_required(self) -> bool:
        """Return whether the default is none that the setting may have."""
        return bool(self.rule and self.default is not None and not self.rule.allows(self.default))

    def text(self) -> str:
        """Return a line with name, type and default, and the description below it."""
        from megatron_coe.config.model_section import describe_type

        words = self.rule.words if self.rule else describe_type(self.hint)
        if self.rule and type(None) in get_args(self.hint):
            words += ", or null"
        default = "(required)" if self.is_required else f"= {_yaml(self.default)}"
        head = f"{self.name} {default}    {words}"
        about = textwrap.fill(
            self.description, WIDTH, initial_indent="    ", subsequent_indent="    "
        )
        return f"{head}\n{about}" if about else head

    def schema(self) -> dict[str, Any]:
        """Return the JSON Schema of its value; a reference to another setting is one, too."""
        if self.rule and ("enum" in self.rule.schema or "anyOf" in self.rule.schema):
            allowed = dict(self.rule.schema)
            if type(None) in get_args(self.hint):
                allowed = {"anyOf": [allowed, {"type": "null"}]}
        else:
            allowed = _type_schema(self.hint, dict(self.rule.schema) if self.rule else {})
        found: dict[str, Any] = {"anyOf": [allowed, {"$ref": "#/definitions/reference"}]}
        if _is_plain(self.default) and not self.is_required:
            found["default"] = self.default
        if self.description:
            found["description"] = self.description
        return found


def all_settings(sections: tuple[str, ...] = SECTIONS) -> list[Setting]:
    """List the settings of some sections, in the order of the code.

    Section `model` imports Megatron, which takes seconds.
    """
    return [setting for section in sections for setting in _section(section)]


def describe_settings(wanted: str) -> str:
    """Describe the settings whose name holds some text, else those whose description does.

    Raises:
        ValueError: there are none; the message suggests the nearest name.
    """
    section, dot, _ = wanted.partition(".")
    sections = (section,) if (dot or section in SECTIONS) and section in SECTIONS else SECTIONS
    known = all_settings(sections)
    found = [setting for setting in known if wanted in setting.name]
    found = found or [s for s in known if wanted.lower() in s.description.lower()]
    if not found:
        names = [setting.name for setting in known]
        raise ValueError(f"no setting is called {wanted!r}{suggestion(wanted, names)}")
    return "\n".join(setting.text() for setting in found)


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema (draft 7, which editors read) of a file of settings."""
    properties: dict[str, Any] = {
        EXTENDS: {"type": "string", "description": "File, relative to this one, to start from."}
    }
    for section in SECTIONS:
        named = {s.name.partition(".")[2]: s.schema() for s in all_settings((section,))}
        properties[section] = {
            "type": ["object", "null"],
            "properties": named | _former_names(section),
            "additionalProperties": False,
        }
    for key, former in FORMER_VALUES.items():
        section, _, name = key.partition(".")
        properties[section]["properties"][name]["anyOf"].append({"enum": list(former)})
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "Settings of a Chain-of-Experts run",
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
        "definitions": {"reference": {"type": "string", "pattern": r"\$\{\w+(\.\w+)+\}"}},
    }


def _former_names(section: str) -> dict[str, Any]:
    """Return the properties of names that are still read."""
    former = {name: f"Now {key}." for name, key in FORMER_KEYS.items()}
    former |= {f"{MODEL}.{name}": "No longer a field." for name in DROPPED_FIELDS}
    return {
        name.partition(".")[2]: {"description": now, "deprecated": True}
        for name, now in former.items()
        if name.startswith(f"{section}.")
    }


def _section(section: str) -> Iterator[Setting]:
    if section == MODEL:
        # Only now, because it imports Megatron.
        from megatron_coe.config.model_section import settable_fields
        from megatron_coe.model.field_rules import UNSUPPORTED, VALUES
        from megatron_coe.model.provider import CoEModelProvider

        cls: type = CoEModelProvider
        hints, rules = settable_fields(), VALUES
        refused = {
            name: f"Not supported by a CoE layer: {why}." for name, why in UNSUPPORTED.items()
        }
    else:
        cls, refused = get_type_hints(Settings)[section], {}
        hints = get_type_hints(cls)
        rules = {f.name: f.metadata["rule"] for f in fields(cls) if "rule" in f.metadata}
    by_name = {f.name: f for f in fields(cls)}
    about = _descriptions(cls) | refused
    for name, hint in hints.items():
        default = _default(by_name[name])
        yield Setting(f"{section}.{name}", hint, default, rules.get(name), about.get(name, ""))


def _default(field: Field[Any]) -> object:
    if field.default is not MISSING:
        return field.default
    return None if field.default_factory is MISSING else field.default_factory()


@cache
def _descriptions(cls: type) -> dict[str, str]:
    """Return field -> the text under it, of a dataclass and those that it extends."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not is_dataclass(base):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        assert isinstance(body, ast.ClassDef)
        for field, text in zip(body.body, body.body[1:], strict=False):
            if not (isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)):
                continue
            if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                found[field.target.id] = " ".join(str(text.value.value).split())
    return found


def _type_schema(hint: Any, bounds: dict[str, Any]) -> dict[str, Any]:
    """Return the JSON Schema of an annotated type; of one that no file can hold, of nothing."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return {"anyOf": [_type_schema(arg, bounds) for arg in args]}
    if origin is Literal:
        return {"enum": list(args)}
    if origin is list or hint is list:
        return {"type": "array", "items": _type_schema(args[0], bounds) if args else {}}
    if origin is dict:
        return {"type": "object", "additionalProperties": _type_schema(args[1], bounds)}
    plain = {int: "integer", float: "number"}
    if hint in plain:
        return {**bounds, "type": plain[hint]}
    names = {bool: "boolean", str: "string", type(None): "null", dict: "object"}
    return {"type": names[hint]} if hint in names else {"not": {}}


def _is_plain(value: object) -> bool:
    if isinstance(value, list | dict):
        return all(map(_is_plain, value if isinstance(value, list) else value.values()))
    return value is None or isinstance(value, bool | int | float | str)


def _yaml(value: object) -> str:
    """Return a default as YAML writes it; one that no file can hold by its name."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return str(value) if _is_plain(value) else getattr(value, "__name__", type(value).__name__)
