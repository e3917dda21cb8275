"""Rules for one value of a setting or of a model field: a range or a list of choices."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class ValueRule:
    """What a value must be, as a condition and in words that follow "must be"."""

    allows: Callable[[Any], bool]
    words: str
    schema: Mapping[str, Any] = field(default_factory=dict)
    """The same in JSON Schema, as far as it can say it."""

    def check(self, name: str, value: object) -> None:
        """Raise ValueError, naming field and value, for a value that is set and not allowed."""
        if value is not None and not self.allows(value):
            raise ValueError(f"{name}={value!r}: must be {self.words}")


POSITIVE = ValueRule(
    lambda value: value > 0, "greater than 0", {"type": "number", "exclusiveMinimum": 0}
)
NOT_NEGATIVE = ValueRule(lambda value: value >= 0, "0 or more", {"type": "number", "minimum": 0})
FRACTION = ValueRule(
    lambda value: 0 <= value < 1,
    "in [0, 1)",
    {"type": "number", "minimum": 0, "exclusiveMaximum": 1},
)


def integer(least: int, most: int | None = None) -> ValueRule:
    """Return the rule for an integer, which a bool is not, from `least` to `most`."""
    return ValueRule(
        lambda value: type(value) is int and least <= value and (most is None or value <= most),
        f"an integer >= {least}" if most is None else f"an integer from {least} to {most:,}",
        {"type": "integer", "minimum": least} | ({} if most is None else {"maximum": most}),
    )


def one_of(*choices: object) -> ValueRule:
    """Return the rule for a value that is one of some."""
    words = f"one of {', '.join(map(repr, choices))}"
    return ValueRule(lambda value: value in choices, words, {"enum": list(choices)})


def mapping(rule: ValueRule) -> ValueRule:
    """Return the rule for a mapping with such values."""
    return ValueRule(
        lambda values: all(map(rule.allows, values.values())),
        f"a mapping to values {rule.words}",
        rule.schema,
    )


def each(rule: ValueRule) -> ValueRule:
    """Return the rule for a value, or a list of such."""
    return ValueRule(
        lambda value: all(map(rule.allows, value if isinstance(value, list) else [value])),
        rule.words,
        {"anyOf": [dict(rule.schema), {"type": "array", "items": dict(rule.schema)}]},
    )
