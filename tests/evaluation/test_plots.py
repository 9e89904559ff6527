"""The report's pictures."""

import pytest

from qwen_rerank.evaluation.plots import reliability_diagram, score_histogram

BINS = [{"predicted": p, "observed": p, "n_pairs": 3} for p in (0.1, 0.9)]


@pytest.mark.parametrize(
    "figure",
    [
        pytest.param(score_histogram([-1.0, 0.0, 1.0], [0, 3], [5, 0]), id="histogram"),
        pytest.param(reliability_diagram(BINS, BINS), id="reliability"),
    ],
)
def test_a_legend_hides_nothing_of_what_is_drawn(figure):
    figure.canvas.draw()
    [axes] = figure.axes

    assert not axes.get_legend().get_window_extent().overlaps(axes.get_window_extent())
