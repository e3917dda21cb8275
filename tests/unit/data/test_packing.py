from __future__ import annotations

import numpy as np
import pytest

from megatron_coe.data.packing import pack_documents


@pytest.mark.parametrize("seed", range(5))
def test_each_document_is_in_one_sequence_that_holds_it(seed: int) -> None:
    random = np.random.default_rng(seed)
    lengths = random.integers(1, 65, 500)
    packs = pack_documents(lengths, 64)
    assert sorted(number for pack in packs for number in pack) == list(range(500))
    sums = [int(lengths[pack].sum()) for pack in packs]
    assert max(sums) <= 64
    assert len(packs) <= 11 / 9 * lengths.sum() / 64 + 4  # what is known of best fit decreasing


def test_the_number_of_sequences_does_not_depend_on_the_order() -> None:
    random = np.random.default_rng(1)
    lengths = random.integers(1, 40, 300)
    counts = {len(pack_documents(random.permutation(lengths), 64)) for _ in range(5)}
    assert len(counts) == 1


def test_the_fullest_sequence_that_has_room_is_taken() -> None:
    assert pack_documents(np.array([6, 7, 3, 4, 10]), 10) == [[4], [1, 2], [0, 3]]
