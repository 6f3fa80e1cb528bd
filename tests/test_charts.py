"""Charts draw what they are given: shares that add up, marks where they belong, one colour scale for all maps."""

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt

from effad_lib.charts import pareto_front, plot_curves, plot_distributions, plot_dots, plot_panels, plot_tradeoff


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def heights(fig) -> list[float]:
    """The sum of all steps of each histogram."""
    return [patch.get_path().vertices[1::2, 1].sum() for patch in fig.axes[0].patches]


@pytest.mark.parametrize("log", [False, True])
def test_distributions_show_shares_of_each_set(log):
    rng = np.random.default_rng(0)
    fig = plot_distributions({"few": rng.lognormal(size=200), "many": rng.lognormal(size=(50, 80))}, "size", log=log)
    for total in heights(fig):
        assert total == pytest.approx(1, abs=1e-6)
    assert fig.axes[0].get_xscale() == ("log" if log else "linear")
    assert [text.get_text() for text in fig.axes[0].get_legend().get_texts()] == ["few", "many"]


def test_distributions_mark_places_and_name_their_values():
    fig = plot_distributions({"values": np.arange(10.0)}, "size", marks={"mean": 4.5, "largest": 9})
    assert [line.get_xdata()[0] for line in fig.axes[0].lines] == [4.5, 9]
    assert "mean = 4.5" in [text.get_text() for text in fig.axes[0].get_legend().get_texts()]


@pytest.mark.parametrize("numbers", [np.zeros(5), np.full(5, 3.0)])
@pytest.mark.parametrize("log", [False, True])
def test_constant_numbers_have_a_histogram_too(numbers, log):
    plot_distributions({"constant": numbers}, "size", log=log).canvas.draw()


def test_nothing_to_draw_is_an_error():
    with pytest.raises(ValueError, match="at least one"):
        plot_distributions({"empty": np.array([])}, "size")
    with pytest.raises(ValueError, match="no maps"):
        plot_panels({}, "heat")


def test_panels_share_one_scale():
    fig = plot_panels(
        {"low": np.zeros((4, 6)), "high": np.full((4, 6), 5.0), "third": np.ones((4, 6))}, "heat", columns=2
    )
    drawn = [ax.images[0] for ax in fig.axes if ax.images]
    assert {(image.norm.vmin, image.norm.vmax) for image in drawn} == {(0.0, 5.0)}
    assert [ax.get_title() for ax in fig.axes[:3]] == ["low", "high", "third"]
    assert fig.axes[-1].get_ylabel() == "heat"


def test_dots_stand_at_their_values_and_the_mean_below():
    rows = [("AU-ROC", "cells"), ("AU-ROC", "screw"), ("AU-PRO", "screw")]
    index = pd.MultiIndex.from_tuples(rows)
    fig = plot_dots(pd.DataFrame({"before": [0.5, 0.7, 0.2], "after": [0.9, np.nan, 0.8]}, index), hollow=["before"])
    left, right = fig.axes
    assert [label.get_text() for label in left.get_yticklabels()] == ["cells", "screw", "mean of 2"]
    before, after = left.lines[:2]
    np.testing.assert_allclose(before.get_xdata(), [0.5, 0.7, 0.6])
    np.testing.assert_allclose(after.get_xdata(), [0.9, np.nan, np.nan])
    assert before.get_markerfacecolor() == "none" and after.get_markerfacecolor() != "none"
    assert before.get_color() == after.get_color() and before.get_marker() == after.get_marker()
    assert right.get_xlabel() == "AU-PRO" and list(right.lines[1].get_xdata()) == [0.8, 0.8]
    with pytest.raises(ValueError, match="no values to draw"):
        plot_dots(pd.DataFrame())


def test_curves_have_a_panel_for_each_set_on_the_same_axes():
    tables = {
        name: pd.DataFrame({"a": [0.2, 0.9], "b": [0.5, k / 3]}, index=[0.1, 1.0]) for k, name in enumerate("xyz")
    }
    fig = plot_curves(tables, "severity", "AU-ROC", columns=2)
    shown = [ax for ax in fig.axes if ax.axison]
    assert [ax.get_title() for ax in shown] == list("xyz") and len(fig.axes) == 4
    for ax, table in zip(shown, tables.values(), strict=True):
        for line, (name, values) in zip(ax.lines, table.items(), strict=False):
            assert line.get_label() == name and list(line.get_ydata()) == list(values)
            assert list(line.get_xdata()) == [0.1, 1.0]
        assert ax.get_ylim() == shown[0].get_ylim()
    with pytest.raises(ValueError, match="no curves"):
        plot_curves({}, "severity", "AU-ROC")


COST = pd.Series({"dear": 40.0, "small": 2.0, "beaten": 8.0, "middle": 5.0, "alike": 5.0})
GAIN = pd.Series({"dear": 0.9, "small": 0.6, "beaten": 0.7, "middle": 0.8, "alike": 0.8})


def test_the_front_has_whoever_is_not_beaten_at_its_cost():
    assert pareto_front(COST, GAIN)[::2] == ["small", "dear"] and len(pareto_front(COST, GAIN)) == 3
    assert pareto_front(COST, -GAIN) == ["small"]
    assert pareto_front(COST, GAIN.replace(0.6, np.nan)) == pareto_front(COST, GAIN)[1:]


def test_a_tradeoff_names_every_point_and_joins_the_front():
    values = {"AU-ROC": GAIN, "loss": 1 - GAIN.drop("beaten")}
    fig = plot_tradeoff(COST, values, "multiply-adds", lower=["loss"], bold=["dear"])
    for ax, numbers in zip(fig.axes, values.values(), strict=True):
        line, *points = ax.lines
        front = pareto_front(COST, GAIN)
        assert (
            line.get_xdata().tolist() == COST[front].tolist() and line.get_ydata().tolist() == numbers[front].tolist()
        )
        assert sorted(text.get_text() for text in ax.texts) == sorted(numbers.index)
        assert len(points) == len(numbers) and ax.get_xscale() == "log"
    filled = {line.get_xdata()[0] for line in fig.axes[0].lines[1:] if line.get_fillstyle() == "full"}
    assert filled == {2.0, 5.0, 40.0}
    boxes = [text.get_window_extent() for text in fig.axes[0].texts]
    assert not any(one.overlaps(other) for k, one in enumerate(boxes) for other in boxes[:k])
    with pytest.raises(ValueError, match="no values to draw"):
        plot_tradeoff(COST, {}, "multiply-adds", bold=[])
