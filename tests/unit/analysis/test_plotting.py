"""Plots for pages: no references to outside, nothing bound to a white background."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import numpy as np

from megatron_coe.analysis.heatmaps import CoactivationScale, coactivation_heatmap
from megatron_coe.analysis.plotting import colors, inline_svg


def rendered(name: str) -> str:
    matrices = [np.arange(25).reshape(5, 5) for _ in range(2)]
    return inline_svg(coactivation_heatmap("it", 3, matrices), name, 'what <is> "seen"')


def test_the_plot_is_self_contained():
    text = rendered("a")
    root = ElementTree.fromstring(text)
    assert root.tag == "svg" and not text.startswith("<?xml")
    assert (root.get("role"), root.get("aria-label")) == ("img", 'what <is> "seen"')
    ids = [node.get("id") for node in root.iter() if node.get("id")]
    assert len(set(ids)) == len(ids)
    references = re.findall(r"url\(#([^)]*)\)|href=\"#([^\"]*)\"", text)
    assert references
    assert {one or other for one, other in references} <= set(ids)
    assert "http" not in re.sub(r'href="data:image/png;base64,[^"]*"', "", text)
    assert text.count("data:image/png;base64,") >= 2  # the maps themselves
    labels = {"".join(node.itertext()) for node in root.iter("text")}
    assert {"expert at iteration 1", "expert at iteration 3", "tokens"} <= labels


def test_maps_of_co_activation_have_one_scale_and_show_what_use_does_not_explain():
    """Independent choices leave nothing on the right, however uneven the use of experts is."""
    generator = np.random.default_rng(3)
    uneven = np.outer([1, 2, 9], [6, 1, 3])
    dependent = generator.integers(0, 40, (3, 3))
    scale = CoactivationScale.of([uneven, dependent])
    for matrices in ([uneven], [dependent, uneven]):
        figure = coactivation_heatmap("a run, step 3", 2, matrices, scale)
        assert figure.get_suptitle() == "a run, step 3, layer 2"
        images = [axes.images[0] for axes in figure.axes if axes.get_ylabel().startswith("expert")]
        limits = {(image.get_clim(), image.get_cmap().name) for image in images}
        assert len(images) == 2 * len(matrices)
        assert limits == {
            ((0, max(54, dependent.max())), "viridis"),
            ((-scale.excess, scale.excess), "RdBu_r"),
        }
        for matrix, counts, excess in zip(matrices, images[::2], images[1::2], strict=True):
            assert np.array_equal(counts.get_array(), matrix)
            total = matrix.sum()
            expected = [[row.sum() * col.sum() / total for col in matrix.T] for row in matrix]
            np.testing.assert_allclose(excess.get_array(), matrix - expected, atol=1e-12)
    assert scale.excess > 1
    assert CoactivationScale.of([uneven]).excess < 1e-12


def test_text_and_lines_take_the_color_of_the_page():
    text = rendered("a")
    assert "currentColor" in text
    assert "#000000" not in text and "#ffffff" not in text


def test_plots_of_one_page_have_ids_of_their_own():
    ids = [set(re.findall(r' id="([^"]*)"', rendered(name))) for name in "ab"]
    assert ids[0] and not ids[0] & ids[1]


def test_curves_have_colors_of_their_own():
    for count in (1, 8, 9, 61):
        assert len(set(colors(count))) == count
