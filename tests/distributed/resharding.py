"""Checkpoints saved in every layout, loaded in every other: all ordered pairs.

    python tests/distributed/resharding.py        # or: make resharding; prints the table

What must come back bit for bit, once gathered, are weights and Adam's moments. The moments are
taken from the optimizer itself, not from what it says about them for checkpoints. Then training
goes on: the next step's loss must be that of the layout which saved, on the same global batch.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO))

from megatron_coe.utils.tables import markdown_table  # noqa: E402
from tests.distributed.launch import launch  # noqa: E402
from tests.distributed.layouts import RESHARDED  # noqa: E402

RANKS, STEPS, VARIANT = 4, 2, "bias"
SAME_LOSS = 1e-6  # relative
TIME_LIMIT_S = 4 * 3600.0


def gathered_state(train_state) -> dict[str, dict[str, torch.Tensor]]:
    """Weights and moments of the whole model, on rank 0."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    from tests.distributed import parity

    states = {}
    for part in train_state.optimizer.chained_optimizers:
        if isinstance(part, DistributedOptimizer):
            states |= _gathered_shards(part)
        else:
            states |= part.optimizer.state
    return {
        "weights": parity.gather(train_state.chunks, lambda parameter: parameter.data),
        **{
            moment: parity.gather(train_state.chunks, lambda p, name=moment: states[p][name])
            for moment in ("exp_avg", "exp_avg_sq")
        },
    }


def _gathered_shards(part) -> dict:
    """Each parameter's moments out of the ranges that the ranks of its replicas hold."""
    states = {}
    for parameter in (p for buffer in part.buffers for p in buffer.param_index_map):
        states[parameter] = {}
        for moment in ("exp_avg", "exp_avg_sq"):
            whole = torch.zeros_like(parameter.data)
            if parameter in part.model_param_gbuf_map:
                place = part._get_model_param_range_map(parameter)["param"]
                own = part._get_main_param_and_optimizer_states(parameter)[moment]
                whole.view(-1)[place.start : place.end] = own
            dist.all_reduce(whole, group=part.data_parallel_group)
            states[parameter][moment] = whole
    return states


def save_in(layout: str, folder: Path) -> float:
    """Train, save, and note the state and (the result) the loss of the step that follows."""
    from tests.distributed import parity

    with parity.setup_groups(parity.layout_settings(layout, VARIANT)):
        trainer = parity.make_parity_trainer(layout, VARIANT)
        trainer.checkpointer.options.save = str(folder)
        for _ in range(STEPS):
            trainer.step()
        trainer.save()
        state = gathered_state(trainer.train_state)
        if dist.get_rank() == 0:
            torch.save(state, folder / "state.pt")
        return trainer.metrics(trainer.step())["train_loss"]


def load_in(layout: str, folders: dict[str, str], losses: dict[str, float]) -> dict[str, list]:
    """{layout that saved: [whether the state is the same bits, error of the next step's loss]}."""
    from megatron_coe.checkpoint.directory import find_checkpoints
    from megatron_coe.checkpoint.state import load_checkpoint
    from tests.distributed import parity

    results = {}
    with parity.setup_groups(parity.layout_settings(layout, VARIANT)):
        trainer = parity.make_parity_trainer(layout, VARIANT)
        for source, folder in folders.items():
            (checkpoint,) = find_checkpoints(Path(folder))
            trainer.progress = load_checkpoint(checkpoint, trainer.train_state)
            state = gathered_state(trainer.train_state)
            same = dist.get_rank() > 0 or _same_bits(
                state, torch.load(Path(folder) / "state.pt", weights_only=True)
            )
            loss = trainer.metrics(trainer.step())["train_loss"]
            results[source] = [same, abs(loss - losses[source]) / losses[source]]
    return results


def _same_bits(state: dict, saved: dict) -> bool:
    return all(
        state[kind].keys() == saved[kind].keys()
        and all(torch.equal(tensor, saved[kind][name]) for name, tensor in state[kind].items())
        for kind in saved
    )


def all_pairs(root: str, layouts: list[str]) -> dict[str, dict[str, list]]:
    """Runs on each rank: {layout that loads: {layout that saved: …}}."""
    folders = {layout: str(Path(root) / layout) for layout in layouts}
    losses = {layout: save_in(layout, Path(folder)) for layout, folder in folders.items()}
    return {layout: load_in(layout, folders, losses) for layout in layouts}


def measure(layouts: tuple[str, ...], root: str) -> dict[str, dict[str, list]]:
    function = "tests.distributed.resharding:all_pairs"
    return launch(function, RANKS, root, list(layouts), timeout_s=TIME_LIMIT_S)[0]


def main() -> int:
    with tempfile.TemporaryDirectory() as root:
        results = measure(RESHARDED, root)
    rows = [
        [layout, *(f"{'=' if same else 'DIFFERENT'} {error:.0e}" for same, error in row.values())]
        for layout, row in results.items()
    ]
    print(markdown_table(["loaded in \\ saved in", *RESHARDED], rows))
    cells = [cell for row in results.values() for cell in row.values()]
    return int(not all(same and error < SAME_LOSS for same, error in cells))


if __name__ == "__main__":
    sys.exit(main())
