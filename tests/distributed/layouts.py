"""The layouts whose parity is measured, by the number of ranks they are measured on.

What a layout does not use up is data parallelism: `EP4` on 8 ranks has 2 replicas of the experts.
"""

from __future__ import annotations

ITERATIONS = ("C=1", "C=2", "C=3")
_BY_WORLD = {
    2: "DP2 TP2·EP1·ETP1 TP2·ETP2 TP2·EP2·ETP1 PP2 PP2·VPP2 EP2 CP2 CP2·EP2",
    4: "DP4 DP2·TP2·ETP1 DP2·TP2·EP2·ETP1 TP2·EP2·ETP2 TP4·ETP1 TP4·EP4·ETP1 PP4 DP2·PP2·VPP2 "
    "PP2·EP2 EP4 CP4 DP2·CP2·EP2 CP2·EP4 TP2·CP2·ETP1 PP2·CP2 TP2·PP2·EP2·ETP1",
    8: "EP8 DP2·TP2·PP2·EP2·ETP1 TP2·PP2·VPP2·EP4·ETP1 TP2·CP2·PP2·EP2·ETP1 PP4·EP2 DP2·CP4·EP2 "
    "TP4·CP2·EP2·ETP2 DP2·TP4·EP4·ETP2",
}
WORLDS = {ranks: tuple(layouts.split()) for ranks, layouts in _BY_WORLD.items()}
_RESHARDED = (
    "DP4 DP4·DO DP2·TP2·ETP1 TP2·EP2·ETP2·DO PP4 DP2·PP2·VPP2·DO DP2·CP2·EP2 TP2·PP2·EP2·ETP1·DO"
)
RESHARDED = tuple(_RESHARDED.split())
"""The layouts of 4 ranks whose checkpoints are loaded in each other."""
BATCH = 16


def every_setting(layout: str, world_size: int) -> list[str]:
    """With and without the distributed optimizer, in micro-batches of 1 and of 4 (2 where 4 would
    be more than a replica's share of the batch)."""
    model_ranks = 1
    for part in layout.split("·"):
        name = part.rstrip("0123456789")
        if name in ("TP", "PP", "CP"):
            model_ranks *= int(part[len(name) :])
    share = BATCH * model_ranks // world_size
    return [
        f"{layout}{optimizer}{micro_batch}"
        for optimizer in ("", "·DO")
        for micro_batch in ("", f"·MB{min(4, share)}")
    ]
