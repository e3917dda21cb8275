"""A checkpoint saved in any layout loads in any other, bit for bit, and training goes on."""

from __future__ import annotations

import pytest

from tests.distributed.layouts import RESHARDED
from tests.distributed.resharding import SAME_LOSS, measure


@pytest.mark.slow
def test_every_pair_of_layouts(tmp_path):
    results = measure(RESHARDED, str(tmp_path))
    assert len(results) == len(RESHARDED) >= 8
    for layout, row in results.items():
        assert len(row) == len(RESHARDED)
        for source, (same_bits, loss_error) in row.items():
            assert same_bits, f"{source} -> {layout}"
            assert loss_error < SAME_LOSS, f"{source} -> {layout}"
