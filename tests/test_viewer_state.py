"""What is shown and in which order: every number here is small enough to be known without the library."""

from dataclasses import FrozenInstanceError
from pathlib import Path

import numpy as np
import pytest

from effad_lib import metrics
from effad_lib.datasets import Sample
from effad_lib.detector import AnomalyMaps
from effad_lib.evaluation import Evaluation
from effad_lib.viewer import Findings, State, view_maps
from effad_lib.viewer.findings import UNKNOWN
from effad_lib.viewer.state import (
    ORDERS,
    ZOOMS,
    best_threshold,
    counts,
    disagreement,
    listed,
    outcomes,
    region,
    score_range,
)

NAN = np.nan


def found(scores, labels, *, defects=None, branches=None, names=None, threshold=None):
    """Findings without files: scores and labels are all that a state asks for."""
    kinds = defects or [{0: "good", 1: "dent", UNKNOWN: ""}[label] for label in labels]
    names = names or [f"{k}.png" for k in range(len(labels))]
    samples = [Sample(Path(n), None, k, d) for n, k, d in zip(names, labels, kinds, strict=True)]
    result = Findings("mine", samples, {}.get, notes=Path("n.csv"), names=names, scores=scores, branches=branches)
    result.threshold = threshold
    return result


@pytest.mark.parametrize("size", [(64, 64), (80, 96), (3, 500), (1, 1)])
def test_the_part_that_is_shown_lies_within_the_image(size):
    height, width = size
    corners = [(0, 0), (0, width - 1), (height - 1, 0), (height - 1, width - 1), (height // 2, width // 3)]
    for zoom in ZOOMS:
        for point in corners:
            top, left, tall, wide = region(size, point, zoom)
            assert (tall, wide) == (max(1, round(height / zoom)), max(1, round(width / zoom)))
            assert 0 <= top <= height - tall and 0 <= left <= width - wide
            assert top <= point[0] < top + tall and left <= point[1] < left + wide


def test_the_part_that_is_shown_is_around_the_point():
    assert region((80, 96), (40, 48), 1) == (0, 0, 80, 96)
    assert region((80, 96), (40, 48), 4) == (30, 36, 20, 24)
    assert region((80, 96), (3, 90), 4) == (0, 72, 20, 24)
    assert region((80, 96), (900, -5), 4) == (60, 0, 20, 24)  # a point beside the image, set by code


def test_what_becomes_of_an_image_depends_on_truth_score_and_threshold():
    some = found([0.6, 0.5, 0.6, 0.5, 0.6, 0.5, NAN, NAN], [1, 1, 0, 0, UNKNOWN, UNKNOWN, 1, UNKNOWN])
    expected = ["right", "miss", "false alarm", "right", "called defective", "called good", "not scored", "not scored"]
    assert outcomes(some, 0.5).tolist() == expected  # a score equal to the threshold is not above it
    assert outcomes(some, None).tolist() == [""] * 6 + ["not scored"] * 2


def test_branches_disagree_by_the_distance_of_their_ranks():
    branches = [[1, 300], [2, 200], [3, 100], [4, 400], [5, NAN]]
    some = found([1.0] * 5, [0] * 5, branches=branches)
    # Ranks among the four known: 0, 1/3, 2/3, 1 and 2/3, 1/3, 0, 1.
    assert disagreement(some)[:4] == pytest.approx([2 / 3, 0, 2 / 3, 0]) and np.isnan(disagreement(some)[4])
    opposite = found([1.0, 2.0], [0, 0], branches=[[0, 9], [1, 8]])
    assert disagreement(opposite).tolist() == [1, 1]
    equal = found([1.0, 2.0], [0, 0], branches=[[3, 9], [3, 9]])
    assert disagreement(equal).tolist() == [0, 0]
    assert np.isnan(disagreement(found([1.0], [0], branches=[[1, 2]]))).all()  # no rank among one
    assert np.isnan(disagreement(found([1.0, 2.0], [0, 0]))).all()


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        ("score, highest first", [1, 3, 0, 4, 2]),
        ("score, lowest first", [4, 0, 3, 1, 2]),
        ("closest to the threshold", [3, 0, 4, 1, 2]),
        ("branches disagree most", [4, 0, 1, 3, 2]),
        ("file", [2, 4, 3, 1, 0]),
    ],
)
def test_every_order_puts_what_it_promises_first_and_what_is_not_scored_last(order, expected):
    branches = [[3, 1], [4, 3], [NAN, NAN], [2, 2], [1, 4]]  # the ranks differ by 2, 1, 0 and 3
    names = ["e.png", "d.png", "a.png", "c.png", "b.png"]
    some = found([0.2, 0.9, NAN, 0.4, 0.1], [0, 1, 0, 1, 0], branches=branches, names=names)
    assert listed(some, State(order=order, threshold=0.4)).tolist() == expected


def test_every_order_is_one_of_those_that_are_offered():
    some = found([0.3, 0.1, 0.2], [0, 1, 0])
    assert all(sorted(listed(some, State(order=order)).tolist()) == [0, 1, 2] for order in ORDERS)
    with pytest.raises(KeyError, match="colour"):
        listed(some, State(order="colour"))


def test_equal_scores_keep_their_order():
    some = found([0.5] * 40, [0] * 40)
    for order in ORDERS[:4]:
        assert listed(some, State(order=order, threshold=0.1)).tolist() == list(range(40))


def test_filters_choose_by_defect_and_by_outcome():
    kinds = ["good", "good", "dent", "dent", "hole", ""]
    some = found([0.1, 0.7, 0.6, 0.2, 0.3, 0.8], [0, 0, 1, 1, 1, UNKNOWN], defects=kinds)
    by = {"order": "file", "threshold": 0.5}
    assert listed(some, State(**by)).tolist() == [0, 1, 2, 3, 4, 5]
    assert listed(some, State(**by, defect="dent")).tolist() == [2, 3]
    assert listed(some, State(**by, defect="")).tolist() == [5]
    assert listed(some, State(**by, outcome="miss")).tolist() == [3, 4]
    assert listed(some, State(**by, outcome="miss", defect="hole")).tolist() == [4]
    assert listed(some, State(**by, outcome="called defective")).tolist() == [5]
    assert listed(some, State(**by, outcome="false alarm", defect="dent")).tolist() == []
    assert listed(some, State(order="file", outcome="miss")).tolist() == []  # nothing is decided without a threshold


def test_counts_are_those_of_the_evaluation(rng):
    labels, scores = rng.integers(0, 2, 60), rng.random(60).round(1)
    heat = np.zeros((60, 4, 4), np.float32)
    samples = tuple(Sample(Path("x"), None, int(label), "good") for label in labels)
    for threshold in (-1.0, 0.0, 0.3, 0.5, 1.0):
        sizes = ((4, 4),) * 60
        judged = Evaluation(samples, scores, labels, AnomalyMaps(heat, heat, heat), sizes, threshold)
        table = counts(found(scores, labels.tolist()), threshold)
        assert np.array_equal(table[:2], judged.confusion().to_numpy()) and not table[2].any()
        became = outcomes(found(scores, labels.tolist()), threshold)
        assert (became == "false alarm").sum() == table[0, 1] and (became == "miss").sum() == table[1, 0]


def test_counts_keep_unknown_images_apart_and_leave_out_what_is_not_scored():
    some = found([0.9, 0.1, 0.9, 0.9, NAN, NAN], [UNKNOWN, UNKNOWN, UNKNOWN, 1, 1, UNKNOWN])
    assert counts(some, 0.5).tolist() == [[0, 0], [0, 1], [1, 2]]
    assert not counts(some, None).any()


def test_the_best_threshold_decides_as_f1_max_does(rng):
    labels = [*rng.integers(0, 2, 50).tolist(), UNKNOWN, 1]
    scores = np.append((rng.random(51) + 0.4 * np.array(labels[:51])).round(2), NAN)
    some = found(scores, labels)
    best, value = metrics.image_f1_max(scores[:50], np.array(labels[:50]))
    threshold = best_threshold(some)
    (_, false_alarms), (misses, hits), _ = counts(some, threshold)
    assert 2 * hits / (2 * hits + false_alarms + misses) == pytest.approx(best)
    assert threshold < value and not ((scores > threshold) & (scores < value)).any()


@pytest.mark.parametrize("labels", [[0, 0], [1, 1], [UNKNOWN, UNKNOWN]])
def test_without_both_truths_there_is_no_best_threshold(labels):
    assert best_threshold(found([0.1, 0.2], labels)) is None
    assert best_threshold(found([NAN, NAN], [0, 1])) is None


def test_the_range_of_scores_covers_them_and_the_stored_threshold():
    assert score_range(found([0.2, 0.9, NAN], [0, 1, 0])) == (0.2, 0.9, False)
    assert score_range(found([0.2, 0.9], [0, 1], threshold=1.5)) == (0.2, 1.5, False)
    assert score_range(found([0.2, 2.1], [0, 1])) == (0.2, 2.1, True)  # more than a decade
    assert score_range(found([-0.2, 900.0], [0, 1])) == (-0.2, 900.0, False)  # a logarithm takes no negative score
    assert score_range(found([0.0, 900.0], [0, 1])) == (0.0, 900.0, False)
    assert score_range(found([NAN, NAN], [0, 1])) == (0.0, 1.0, False)


@pytest.mark.parametrize("value", [0.0, 0.5, -3.0, 1e6])
def test_equal_scores_have_a_range_around_them(value):
    low, high, log = score_range(found([value, value], [0, 1]))
    assert low < value < high and not log


def test_a_state_is_a_plain_value():
    assert State() == State(index=0) and hash(State()) == hash(State()) and State(zoom=2) != State()
    with pytest.raises(FrozenInstanceError):
        State().index = 1


@pytest.fixture
def of_two(picture, tmp_path):
    """A viewer of two pictures and their maps, with 1 and 2 as scores, without a threshold, a model and the truth."""
    (tmp_path / "maps").mkdir()
    for k in (0, 1):
        picture(tmp_path / "images" / f"{k}.png", seed=k)
        np.save(tmp_path / "maps" / f"{k}.png.npy", np.full((8, 8), 1.0 + k))
    return view_maps(tmp_path / "maps", tmp_path / "images")


def test_maps_without_a_model_are_looked_at_all_the_same(of_two):
    c = of_two.controls
    assert of_two.state.index == 1 and c["upload"].layout.display == "none" and c["stored"].disabled
    counted = of_two._shell.texts["counts"]
    assert [name for _, name in c["map"].options] == ["combined"] and "nothing is decided" in counted.value
    c["threshold"].value = 1.5
    assert of_two.state.threshold == 1.5 and "<td>1</td><td>1</td>" in counted.value


def test_f1_max_without_the_truth_leaves_the_threshold_alone(of_two):
    of_two.controls["threshold"].value = 1.5
    of_two.controls["best"].click()
    assert of_two.state.threshold == 1.5
