"""How far an export is from its model: what counts as a difference, and what rounding may do."""

import re

import numpy as np
import pytest

from effad_lib.engines import Inspection
from effad_lib.export import parity, with_defects


def test_the_comparison_counts_what_it_says(small_detector, rng):
    class Other:
        threshold, pixel_threshold = small_detector.threshold, small_detector.pixel_threshold
        image_size = input_size = (64, 64)

        def inspect(self, images):
            found = small_detector.inspect(images)
            return found._replace(score=found.score + 0.5, combined=found.combined * np.nan)

    good = list(rng.integers(0, 256, (3, 3, 64, 64), dtype=np.uint8))
    found = parity.compare(small_detector, Other(), good, with_defects(good), parity.TOLERANCES["float32"])
    assert found.differences["student_teacher"] == (0, 0)
    assert found.differences["score"][0] == pytest.approx(0.5, rel=1e-6)
    assert found.differences["combined"][1] == np.inf
    scores = small_detector.inspect(np.stack([*good, *with_defects(good)])).score
    crossing = (scores <= small_detector.threshold) & (scores + 0.5 > small_detector.threshold)
    assert len(found.flipped) == crossing.sum()
    assert len(found.faults) == 3 and "combined map differs by inf%" in found.faults[0]
    assert found.faults[2].startswith(f"{crossing.sum()} of 6 decisions flip")


class Scored:
    """Scores images by the number that their pixels are."""

    image_size = input_size = (64, 64)

    def __init__(self, scores, threshold=1.0):
        self.scores, self.threshold = scores, threshold

    def inspect(self, images):
        flat = np.zeros((1, 64, 64), np.float32)
        return Inspection(flat, flat, flat, np.array([self.scores[images[0, 0, 0, 0]]]))


def compared(precision, good, bad, export_good, export_bad, threshold=1.0):
    """The parity of a model with these scores and an export with those."""
    images = [np.full((3, 64, 64), number, np.uint8) for number in range(len(good) + len(bad))]
    model, other = Scored([*good, *bad]), Scored([*export_good, *export_bad], threshold)
    return parity.compare(model, other, images[: len(good)], images[len(good) :], parity.TOLERANCES[precision])


def test_pairs_that_rounding_has_ordered_are_no_change_of_the_auroc():
    """Four of sixteen defects are not the hottest place: their images score as the good ones do, to 1e-8."""
    good = np.linspace(0.3, 0.9, 16)
    bad = np.concatenate([good[:4] + 1e-8, np.linspace(1.2, 3, 12)])
    found = compared("float32", good, bad, good, np.concatenate([good[:4] - 1e-8, bad[4:]]))
    assert found.auroc[0] - found.auroc[1] == pytest.approx(4 / 256)
    assert found.auroc_change == 0 and not found.faults and found.as_card()["tolerance"]["auroc"] == 0
    # The same four as much below all good images: that is no rounding.
    found = compared("float32", good, bad, good, np.concatenate([good[:4] - 0.5, bad[4:]]))
    assert found.auroc_change == pytest.approx(-6 / 256)
    assert any(fault.startswith("AU-ROC changes by -0.0234 by scores more than 0.1% apart") for fault in found.faults)


def test_eight_bits_may_change_the_auroc_by_what_is_printed_and_stored():
    good, bad = [0.8, *np.full(5, 0.5)], np.full(6, 0.9)
    for swapped, refused in ((1, False), (2, True)):  # of 36 pairs, of which 0.03 is more than one
        found = compared("int8", good, bad, good, np.where(np.arange(6) < swapped, 0.75, 0.9))
        assert found.auroc_change == pytest.approx(-swapped / 36)
        assert found.auroc_limit == found.as_card()["tolerance"]["auroc"] == 0.03
        assert [fault.startswith("AU-ROC changes by -0.0556") for fault in found.faults] == [True] * refused
    few = compared("int8", good[:3], bad[:3], good[:3], [0.75, 0.9, 0.9])
    assert few.auroc_change == pytest.approx(-1 / 9) and not few.faults
    assert few.auroc_limit is None and few.as_card()["tolerance"]["auroc"] is None
    assert re.search(r"^AU-ROC .* -0.1111 not judged$", few.as_text(), re.MULTILINE)
    assert few.as_text().endswith("too few to judge the AU-ROC: one of 9 pairs is 0.11, more than 0.03")


def test_decisions_that_flip_are_refused_unless_scores_are_at_the_threshold():
    good, bad = np.linspace(0.86, 1, 16), np.linspace(1.3, 3, 16)
    kept = compared("int8", good, bad, 1.2 * good, 1.2 * bad)
    assert len(kept.flipped) == 16 and kept.flipped_apart == 13 and kept.most_flips == 3
    (fault,) = kept.faults
    assert fault == "13 of 32 decisions flip with score and threshold more than 2.0% apart (tolerance 3)"
    assert not compared("int8", good, bad, 1.2 * good, 1.2 * bad, threshold=1.2).faults, "each by its own threshold"
    at = compared("float32", [1.0], [2.0], [1 + 1e-7], [2.0])
    assert len(at.flipped) == 1 and at.as_card()["flipped_apart"] == 0 and not at.faults
    assert compared("float32", [0.99], [2.0], [0.99], [2.0], threshold=0.985).faults == [
        "1 of 2 decisions flip with score and threshold more than 0.1% apart (tolerance 0)"
    ]
