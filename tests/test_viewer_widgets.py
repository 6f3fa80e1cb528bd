"""The widgets: what people do changes the state and draws what depends on it. Observers fire without a browser."""

import asyncio
import io
import shutil
from dataclasses import replace

import ipywidgets
import numpy as np
import pytest
from PIL import Image
from viewing import drawn, redrawn, size, size_of, text

from effad_lib import metrics
from effad_lib.viewer import State, of_images, of_maps, open_viewer, view_images, view_run
from effad_lib.viewer.controls import steps_from_start
from effad_lib.viewer.findings import scan
from effad_lib.viewer.speed import redraw_times, write_example
from effad_lib.viewer.state import ALL, PANELS, listed, region


@pytest.fixture
def run(evaluated_run, tmp_path):
    """The evaluated run with notes of its own."""
    return shutil.copytree(evaluated_run, tmp_path / "run")


@pytest.fixture
def folder(picture, tmp_path):
    """A folder of ten pictures, the fourth broken."""
    for k in range(10):
        picture(tmp_path / "images" / f"{k:02d}.png", size=(64, 64 + k), seed=k)
    (tmp_path / "images" / "03.png").write_bytes(b"no image")
    return tmp_path / "images"


@pytest.fixture
def own_model(model, tmp_path):
    """The small detector where its notes disturb nobody."""
    return shutil.copy(model, tmp_path / "model.safetensors")


def test_a_viewer_opens_on_the_highest_score_with_everything_drawn(viewer, run):
    assert viewer.state == State(threshold=viewer.findings.threshold, pixel_threshold=viewer.findings.pixel_threshold)
    assert viewer.state.index == viewer.findings.scores.argmax() == 0
    assert [label.split()[-1] for label, _ in viewer.controls["list"].options] == [
        f"{viewer.findings.defects[k]}/{k if k < 2 else (k - 2 if k < 5 else 0)}.png" for k in (0, 4, 5, 3, 1, 2)
    ]
    assert {size(viewer, name) for name in PANELS} == {(384, 320)} and len(set(drawn(viewer).values())) == 4
    assert f"0.png · dent · score {viewer.findings.scores[0]:.4g} · right" in text(viewer, "head")
    assert "stored threshold" in text(viewer, "counts")
    assert "one scale for all images" in text(viewer, "bar") and "good (3)" in text(viewer, "histogram")
    assert viewer.widget._repr_mimebundle_() == viewer._repr_mimebundle_()
    assert view_run(run, "cpu").state == viewer.state


@pytest.mark.parametrize(
    ("control", "value", "panels"),
    [
        ("opacity", 0.3, {"overlay"}),
        ("follow", False, {"overlay"}),
        ("colours", "viridis", {"overlay", "heatmap"}),
        ("scaling", "image", {"overlay", "heatmap"}),
        ("map", "student_autoencoder", {"overlay", "heatmap"}),
        ("pixel_threshold", 0.1, {"image", "overlay", "heatmap"}),
        ("zoom", 3, set(PANELS)),
        ("row", 3, set(PANELS)),
        ("column", 3, set(PANELS)),
        ("list", 5, set(PANELS)),
        ("threshold", 0.1, set()),
        ("order", "file", set()),
        ("panel_width", 400, set()),
    ],
)
def test_a_control_changes_the_state_and_draws_only_what_depends_on_it(viewer, control, value, panels):
    viewer.state = State(threshold=0.05, pixel_threshold=0.02)
    before = viewer.state
    assert redrawn(viewer, lambda: setattr(viewer.controls[control], "value", value)) == panels
    fields = {"row": {"point"}, "column": {"point"}, "list": {"index"}, "zoom": {"zoom", "point"}, "panel_width": set()}
    changed = {name for name in before.__dict__ if getattr(before, name) != getattr(viewer.state, name)}
    assert changed == fields.get(control, {control})
    if control in before.__dict__:
        assert getattr(viewer.state, control) == value
    viewer.state = State(threshold=0.05, pixel_threshold=0.02)
    assert redrawn(viewer, lambda: viewer.change()) == set()


def test_outlines_and_panels_are_switched_one_by_one(viewer):
    c = viewer.controls
    assert redrawn(viewer, lambda: setattr(c["outline_truth"], "value", False)) == set(PANELS)
    assert redrawn(viewer, lambda: setattr(c["outline_marked"], "value", False)) == {"image", "overlay", "heatmap"}
    assert viewer.state.outlines == ()
    c["panel_heatmap"].value = False
    assert (
        viewer.state.panels == ("image", "overlay", "truth") and viewer._shell.cells["heatmap"].layout.display == "none"
    )
    assert "heatmap" not in redrawn(viewer, lambda: setattr(c["colours"], "value", "jet"))  # not while it is hidden
    assert redrawn(viewer, lambda: setattr(c["panel_heatmap"], "value", True)) == {"heatmap"}
    layout, widths = viewer._shell._panels.layout, {}
    for width in (400, 200):
        c["panel_width"].value = width
        widths[width] = (layout.max_width, layout.grid_template_columns)
    assert widths[400][0] == "1640px" and "min(240px" in widths[400][1]
    assert widths[200][0] == "840px" and "min(120px" in widths[200][1]
    c["panel_truth"].value = False
    assert layout.max_width == "630px"  # those that are left do not grow


def test_the_threshold_counts_mistakes_as_it_moves(viewer):
    assert "false alarms 2</b> of 3" in text(viewer, "counts") and "misses 1</b> of 3" in text(viewer, "counts")
    histogram = text(viewer, "histogram")
    viewer.controls["threshold"].value = 0.12
    assert viewer.state.threshold == 0.12 and "chosen by hand" in text(viewer, "counts")
    assert "false alarms 0</b> of 3" in text(viewer, "counts") and "misses 2</b> of 3" in text(viewer, "counts")
    assert "threshold 0.12" in text(viewer, "histogram") != histogram and "threshold" in text(viewer, "bar")
    viewer.show(5)
    assert "miss" in text(viewer, "head")


def test_a_state_set_by_code_moves_every_control(viewer):
    state = State(
        index=5, panels=("image",), map="student_teacher", colours="jet", scaling="image", opacity=0.5, follow=False,
        outlines=("marked",), threshold=0.1, pixel_threshold=0.05, point=(70, 80), zoom=2, order="file", defect="hole",
        outcome="miss",
    )  # fmt: skip
    viewer.state = state
    c = viewer.controls
    for name in ("map", "colours", "scaling", "opacity", "follow", "threshold", "pixel_threshold", "zoom", "order"):
        assert c[name].value == getattr(state, name), name
    assert (c["defect"].value, c["outcome"].value, c["row"].value, c["column"].value) == ("hole", "miss", 70, 80)
    assert [c[f"panel_{name}"].value for name in PANELS] == [True, False, False, False]
    assert (c["outline_truth"].value, c["outline_marked"].value) == (False, True)
    assert c["list"].value == 5 and viewer.state == state  # and no control moved the state in turn
    assert "STRETCHED" in text(viewer, "bar") and "x 80, y 70 of 96×80" in text(viewer, "point")


def test_next_and_previous_follow_the_list_to_its_ends(viewer):
    order = listed(viewer.findings, viewer.state).tolist()
    seen = []
    for _ in range(7):
        seen.append(viewer.state.index)
        viewer.controls["next"].click()
    assert seen == [*order, order[-1]]
    viewer.change(zoom=4, point=(1, 1))
    viewer.controls["previous"].click()
    assert viewer.state.index == order[-2] and viewer.state.zoom == 1 and viewer.state.point is None
    for _ in range(7):
        viewer.controls["previous"].click()
    assert viewer.state.index == order[0]


def test_a_filter_jumps_to_the_first_that_passes_unless_the_shown_one_does(viewer):
    viewer.controls["outcome"].value = "false alarm"
    assert viewer.state.index == 4 and [k for _, k in viewer.controls["list"].options] == [4, 3]
    viewer.controls["outcome"].value = "right"
    assert viewer.state.index == 0
    viewer.controls["next"].click()
    assert viewer.state.index == 5
    viewer.controls["defect"].value = "hole"
    assert viewer.state.index == 5 and [k for _, k in viewer.controls["list"].options] == [5]
    viewer.controls["outcome"].value = "miss"
    assert viewer.controls["list"].options == () and viewer.controls["list"].value is None
    viewer.controls["next"].click()  # from nowhere to nowhere
    viewer.controls["defect"].value = viewer.controls["outcome"].value = ALL
    assert len(viewer.controls["list"].options) == 6


def test_the_marks_are_jumped_to_exactly(viewer):
    found, c = viewer.findings, viewer.controls
    c["best"].click()
    best, value = metrics.image_f1_max(found.scores, found.labels)
    assert viewer.state.threshold == np.nextafter(value, -np.inf) != found.threshold and best == pytest.approx(0.75)
    assert "false alarms 2</b> of 3" in text(viewer, "counts") and "misses 0</b> of 3" in text(viewer, "counts")
    c["stored"].click()
    assert viewer.state.threshold == found.threshold and "stored threshold" in text(viewer, "counts")
    c["pixel_threshold"].value = 0.1
    c["stored_pixels"].click()
    assert viewer.state.pixel_threshold == found.pixel_threshold


def test_the_zoom_goes_to_the_defect_to_the_hottest_point_and_back(viewer):
    viewer.controls["to_defect"].click()
    assert viewer.state.point == (24, 49) and viewer.state.zoom == 3  # rows 20–29, columns 40–59 of 80×96
    top, left, height, width = region((80, 96), viewer.state.point, viewer.state.zoom)
    assert top <= 20 and left <= 40 and top + height >= 30 and left + width >= 60
    viewer.controls["whole"].click()
    assert viewer.state.point is None and viewer.state.zoom == 1 and size(viewer) == (384, 320)
    viewer.controls["hottest"].click()
    row, column = viewer.state.point
    assert viewer.state.zoom == 3 and f"at x {column}, y {row}" in text(viewer, "head")
    viewer.show(2)
    viewer.controls["to_defect"].click()
    assert viewer.state.zoom == 1 and "no true defect is known" in text(viewer, "message")


def test_thumbnails_show_the_page_of_the_list_and_select(own_model, folder):
    viewer = view_images(own_model, folder, device="cpu")
    found, shell, order = viewer.findings, viewer._shell, listed(viewer.findings, viewer.state).tolist()
    assert found.waiting == [] and viewer.state.index == np.nanargmax(found.scores)  # without a loop scored at once
    assert {Image.open(io.BytesIO(thumb.value)).format for thumb in shell.thumbs} == {"JPEG"}
    shell.picks[3].click()
    assert viewer.state.index == order[3] and [pick.description[-1] == "◀" for pick in shell.picks].index(True) == 3
    assert f"/{order[3]:02d}.png" in shell.picks[3].tooltip and "called" in shell.picks[3].tooltip
    viewer.show(order[9])
    assert [pick.layout.visibility for pick in shell.picks] == ["visible"] * 2 + ["hidden"] * 6
    assert order[9] == 3 and size_of(shell.thumbs[1].value) == (
        1,
        1,
    )  # the last is the broken one: no score
    shell.picks[0].click()
    assert viewer.state.index == order[8]


@pytest.fixture
def broken(viewer, tmp_path):
    """The viewer with an image that vanished before it was shown."""
    viewer.findings.samples[1] = replace(viewer.findings.samples[1], image=tmp_path / "gone.png")
    viewer._display.picture.cache_clear()
    viewer.show(1)
    return viewer


def test_an_image_that_cannot_be_read_says_so_and_the_next_one_is_shown(broken):
    assert "gone.png: cannot be read as an image" in text(broken, "head")
    assert {size_of(value) for value in drawn(broken).values()} == {(1, 1)}
    bar = text(broken, "bar")
    broken.change(colours="viridis")
    assert text(broken, "bar") != bar
    broken.show(2)
    assert "0.png · good" in text(broken, "head") and all(size(broken, name) == (384, 320) for name in PANELS)
    broken.show(1)
    assert "gone.png" in text(broken, "head")


@pytest.mark.parametrize("control", ["hottest", "to_defect"])
def test_no_zoom_goes_into_an_image_that_cannot_be_read(broken, control):
    broken.controls[control].click()
    assert "gone.png" in text(broken, "message")


def test_scoring_goes_on_between_the_messages_of_the_front_end(own_model, folder, small_detector):
    async def looked_at():
        viewer = open_viewer(of_images(own_model, folder))
        assert len(viewer.findings.waiting) == 10 and viewer.controls["progress"].layout.display != "none"
        await asyncio.sleep(0)  # one turn of the loop, one image
        assert len(viewer.findings.waiting) == 9 and "not known (1)" in text(viewer, "histogram")
        viewer.controls["list"].value = 7  # people go on
        await asyncio.wait_for(viewer._task, 60)
        return viewer

    viewer = asyncio.run(looked_at())
    found = viewer.findings
    assert list(found.errors) == [3] and np.flatnonzero(np.isnan(found.scores)).tolist() == [3]
    assert found.scores[9] == scan(small_detector, folder / "09.png")["combined"].max()
    assert viewer.controls["progress"].value == 10 and viewer.controls["progress"].layout.display == "none"
    assert viewer.state.index == 7 and "07.png" in text(viewer, "head")
    assert [k for _, k in viewer.controls["list"].options] == listed(found, viewer.state).tolist()
    viewer.controls["threshold"].value = middle = float(np.nanmedian(found.scores))
    assert viewer.state.threshold == middle and "<td>5</td><td>4</td>" in text(viewer, "counts")
    assert viewer.score_all().state.index == np.nanargmax(found.scores)  # nothing is left to do


def test_a_line_that_is_gone_when_the_browser_names_it_is_not_taken(viewer):
    lines, before = viewer.controls["list"], viewer.state
    lines.set_state({"index": 99})
    assert lines.value == before.index and viewer.state == before
    lines.set_state({"index": 1})
    assert viewer.state.index == viewer._display.order[1] == lines.value


@pytest.mark.parametrize("scores", [[0.02, 0.05, 0.07, 0.09, 0.11, 0.1], [0.02, 0.05, 0.7, 0.9, 11.0, 0.1]])
def test_a_slider_can_show_the_stored_threshold_exactly(viewer, scores):
    found = viewer.findings
    found.scores = np.array(scores)
    for threshold in (0.0612345678, 0.0299, max(scores), min(scores)):
        found.threshold = threshold
        viewer._shell.range_over(found)
        slider = viewer.controls["threshold"]
        steps = steps_from_start(slider, threshold)
        assert steps == pytest.approx(round(steps), abs=1e-6)
        assert steps_from_start(slider, max(scores)) > steps_from_start(slider, min(scores)) >= 0


def test_measuring_how_fast_it_is_sends_no_more_for_more_moves(viewer, monkeypatch):
    sent = []
    monkeypatch.setattr(ipywidgets.Widget, "_send", lambda self, *args, **kwargs: sent.append(self))
    counted = []
    for repeats in (3, 9):
        table = redraw_times(viewer, repeats)
        counted.append(len(sent))
        sent.clear()
    assert counted[0] and counted[1] <= counted[0] + 5  # a few more of the parts may have changed
    assert (table["slowest"] >= table["median"]).all() and {"opacity", "another image"} <= set(table.index)


def test_filters_that_leave_nothing_say_so_and_keep_the_image(viewer):
    before = viewer.state.index
    viewer.controls["defect"].value = "hole"
    viewer.controls["outcome"].value = "false alarm"
    assert viewer.controls["list"].options == () and "no image passes these filters" in text(viewer, "message")
    assert viewer.findings.defects[viewer.state.index] == "hole" and viewer.state.index != before
    viewer.controls["outcome"].value = ALL
    assert "no image" not in text(viewer, "message")


def test_what_was_said_of_one_image_is_not_said_of_the_next(viewer):
    viewer.show(viewer.findings.defects.index("good"))
    viewer.controls["to_defect"].click()
    assert "no true defect" in text(viewer, "message")
    viewer.controls["next"].click()
    assert "no true defect" not in text(viewer, "message")


def test_each_threshold_is_called_by_its_name(viewer, run):
    marks = lambda: viewer._shell.texts["bar"].value  # noqa: E731
    assert text(viewer, "counts").startswith("stored threshold: ")
    viewer.controls["best"].click()
    assert text(viewer, "counts").startswith("F1-max (has seen the truth): ")
    before = marks()
    viewer.change(threshold=0.06)
    assert text(viewer, "counts").startswith("chosen by hand: ") and marks() != before
    viewer.change(threshold=None)
    viewer.findings.threshold = None
    viewer.change(threshold=0.1)
    viewer.change(threshold=None)
    assert text(viewer, "counts") == "no threshold, so nothing is decided"


def test_captions_tell_the_map_and_whether_the_truth_is_known(viewer, picture, tmp_path):
    captions = viewer._shell.captions
    assert "combined map" in captions["heatmap"].value and captions["truth"].value == "<b>ground truth</b>"
    viewer.controls["map"].value = "student_autoencoder"
    assert "student–autoencoder map" in captions["heatmap"].value and "student–autoencoder map" in text(viewer, "bar")
    viewer._upload(({"name": "mine.png", "content": picture(tmp_path / "mine.png").read_bytes()},))
    assert "ground truth: not known" in captions["truth"].value


def test_a_view_that_was_saved_is_not_replaced_by_the_next(viewer):
    first = viewer.save()
    viewer.change(colours="viridis")
    second = viewer.save()
    assert first != second and first.read_bytes() != second.read_bytes()


def test_zoom_keeps_its_place_when_another_map_is_chosen(viewer):
    viewer.controls["zoom"].value = 4
    point = viewer.state.point
    assert viewer.state.zoom == 4 and point is not None
    viewer.controls["map"].value = "student_autoencoder"
    assert viewer.state.point == point
    viewer.controls["zoom"].value = 2
    assert (viewer.state.point, viewer.state.zoom) == (point, 2)


def test_maps_without_branches_are_not_ordered_by_them_and_what_has_no_score_has_a_dash(viewer, folder, own_model):
    assert "branches disagree most" in viewer.controls["order"].options
    maps = open_viewer(of_maps(*write_example(folder.parent / "example", (64, 64), 2)))
    assert "branches disagree most" not in maps.controls["order"].options
    mine = view_images(own_model, folder)
    assert [label for label, _ in mine.controls["list"].options][-1] == "–  ?/03.png"
