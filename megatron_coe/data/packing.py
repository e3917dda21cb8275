"""Whole documents packed into sequences of a fixed length, with little room left over."""

from __future__ import annotations

import numpy as np


def pack_documents(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Pack documents into sequences by best fit, the longest first.

    How many sequences there are depends on the lengths alone, not on their order; which of several
    documents of a length goes where depends on it.

    Args:
        lengths: of the documents, from 1 to `capacity`.
        capacity: of a sequence.

    Returns: the indices into `lengths` of the documents in each sequence.
    """
    packs: list[list[int]] = []
    with_room: dict[int, list[int]] = {}
    rooms = 0  # bit r is set where a sequence has room for r more tokens
    for document in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[document])
        pack, room = len(packs), capacity
        if fitting := rooms >> length:
            room = length + (fitting & -fitting).bit_length() - 1  # the smallest that fits
            pack = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
            packs[pack].append(document)
        else:
            packs.append([document])
        if left := room - length:
            with_room.setdefault(left, []).append(pack)
            rooms |= 1 << left
    return packs
