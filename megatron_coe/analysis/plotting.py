"""Figures of matplotlib, saved to files or inlined as SVG into a light or dark page.

matplotlib is an extra of the package and takes a second to import, so functions import it.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from megatron_coe.utils.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLORS = ("#2a78d0", "#d9730d", "#2f9e5b", "#b0489b", "#8a6fd1", "#a17c1b", "#c9444a", "#2f98a3")
"""Of curves: legible on white and on black; neighbors differ also for the color-blind."""


def colors(count: int) -> list[str]:
    """Return `count` colors for curves in their order; a gradient where `COLORS` are too few."""
    if count <= len(COLORS):
        return list(COLORS[:count])
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    shades = colormaps["turbo"]
    return [to_hex(shades(0.1 + 0.8 * number / (count - 1))) for number in range(count)]


def new_figure(width: float, height: float) -> Figure:
    """Create an empty figure, sizes in inches.

    Raises:
        ValueError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ValueError("plots need the package matplotlib: `pip install matplotlib`") from error
    return Figure(figsize=(width, height), layout="constrained")


def save(figure: Figure, output: Path) -> None:
    """Write a figure atomically, in the format that the suffix of `output` names.

    Raises:
        ValueError: the format is unknown.
        OSError: the file cannot be written.
    """
    kind, known = output.suffix[1:].lower(), figure.canvas.get_supported_filetypes()
    if kind not in known:
        raise ValueError(f"output {output}: unknown image format; use one of {', '.join(known)}")
    with atomic_path(output) as temporary:
        figure.savefig(temporary, format=kind, dpi=150)


def inline_svg(figure: Figure, name: str, description: str) -> str:
    """Render a figure as an `<svg>` for HTML, without references to anything outside.

    Black becomes the page's text color (`currentColor`), white its `--paper`.

    Args:
        figure: to render.
        name: unique on the page, which keeps the ids of its figures apart.
        description: for screen readers.
    """
    from matplotlib import rc_context

    buffer = io.BytesIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True)
    root = ElementTree.fromstring(buffer.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.endswith("}metadata"):
                parent.remove(child)
    for node in root.iter():
        node.tag = node.tag.rpartition("}")[2]  # HTML knows what is SVG without its namespaces
        node.attrib = {
            key.rpartition("}")[2]: _themed(value)
            for key, value in node.attrib.items()
            if key != "id" or node.tag not in ("g", "image")  # alike in several, and not used
        }
    root.attrib = {
        "viewBox": root.attrib["viewBox"],
        "role": "img",
        "aria-label": description,
        "style": f"max-width: {root.attrib['width']}",
    }
    return ElementTree.tostring(root, encoding="unicode")


def _themed(value: str) -> str:
    return value.replace("#000000", "currentColor").replace("#ffffff", "var(--paper)")
