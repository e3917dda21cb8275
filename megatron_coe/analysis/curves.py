"""Loss curves of a run, drawn from its metrics.jsonl."""

from __future__ import annotations

from pathlib import Path

from megatron_coe.data.files import atomic_path
from megatron_coe.training.metrics import read_records


def describe_end(metrics: Path) -> str:
    """How low a run's validation loss came, beside the unigram entropy where it was recorded."""
    ends = [record for record in read_records(metrics) if "valid_loss" in record]
    if not ends:
        return "no validation loss"
    loss, entropy = ends[-1]["valid_loss"], ends[-1].get("unigram_entropy")
    text = f"validation loss {loss:.4f} at step {ends[-1]['step']}"
    if entropy is None:
        return text
    return f"{text}, {entropy - loss:.4f} nats below the text's unigram entropy of {entropy:.4f}"


def plot_losses(metrics: Path, output: Path, title: str = "") -> None:
    """Draw training and validation loss (nats per token) over steps into `output`.

    The suffix of `output` chooses the format. The validation text's unigram entropy, which a
    finished run records, is drawn as a level line: a model below it makes use of context.

    Raises:
        ValueError: the file holds no losses, or matplotlib is missing.
    """
    try:
        from matplotlib.backend_bases import FigureCanvasBase
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("plots need matplotlib; pip install 'megatron-coe[plot]'") from error

    records = read_records(metrics)
    kind, known = output.suffix[1:].lower(), FigureCanvasBase.get_supported_filetypes()
    if kind not in known:
        raise ValueError(f"output {output}: unknown kind of picture; use one of {', '.join(known)}")
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    drawn = False
    for name, label, style in (
        ("train_loss", "training", {"linewidth": 1, "alpha": 0.8}),
        ("valid_loss", "validation", {"linewidth": 2, "marker": "o", "markersize": 3}),
    ):
        points = [(record["step"], record[name]) for record in records if name in record]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, **style)
            drawn = True
    if not drawn:
        raise ValueError(f"{metrics}: holds no losses to draw")
    for record in records[-1:]:
        if "unigram_entropy" in record:
            level = record["unigram_entropy"]
            axes.axhline(level, color="grey", linestyle="--", linewidth=1, label="unigram entropy")
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic_path(output) as temporary:
        figure.savefig(temporary, format=kind, dpi=150)
