"""The residual mode in the authors' older spelling (two booleans) and their newer one (a name)."""

from __future__ import annotations

from collections.abc import Mapping

from megatron_coe.conversion.hf_config.keys import JSON, Config

BOOLEANS = {  # residual mode -> (inner_residual, outer_residual)
    "inner": (True, False),
    "outer": (False, True),
    "inner_outer": (True, True),
    "none": (False, False),
}
NAMES = ("inner", "outer", "addinit", "none")


def to_keys(mode: str) -> Config:
    """Return a residual mode in every spelling that can express it."""
    keys: Config = {}
    if mode in BOOLEANS:
        keys["inner_residual"], keys["outer_residual"] = BOOLEANS[mode]
    if mode in NAMES:
        keys["residual"] = mode
    return keys


def read(hf: Mapping[str, JSON]) -> str:
    """Return the residual mode that either spelling gives; `inner` where there is none.

    Raises: ValueError when a spelling is unknown, or the two disagree.
    """
    name = hf.get("residual")
    if name is not None and name not in NAMES:
        raise ValueError(f"residual={name!r}: known are {', '.join(NAMES)}")
    booleans = (hf.get("inner_residual"), hf.get("outer_residual"))
    if booleans == (None, None):
        return name or "inner"
    mode = next((mode for mode, pair in BOOLEANS.items() if pair == booleans), None)
    if mode is None:
        raise ValueError(
            f"inner_residual={booleans[0]!r}, outer_residual={booleans[1]!r}: give true or false "
            "for both"
        )
    if name not in (None, mode):
        raise ValueError(
            f"residual={name!r} disagrees with inner_residual={booleans[0]!r} and "
            f"outer_residual={booleans[1]!r}, which mean {mode!r}"
        )
    return mode
