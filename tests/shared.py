"""Reference data outside the repository, for tests that skip where it is not."""

from __future__ import annotations

import os
from pathlib import Path

SHARED = Path(os.environ.get("MEGATRON_COE_SHARED", Path(__file__).resolve().parents[2] / "shared"))
"""The folder that holds `data/`: beside the checkout unless MEGATRON_COE_SHARED names it."""
