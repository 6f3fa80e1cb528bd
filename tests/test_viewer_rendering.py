"""From a picture and a state to pixels: blends, outlines and scales by hand, and the pages that show them."""

import html
import io
import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image

from effad_lib.datasets import Sample
from effad_lib.detector import AnomalyMaps
from effad_lib.evaluation import Evaluation
from effad_lib.plots import OUTLINE, PREDICTED
from effad_lib.runs import RunError
from effad_lib.viewer import Findings, Picture, State, of_run, print_png, write_gallery
from effad_lib.viewer.drawings import LABELS, branch_bar, colour_bar, histogram
from effad_lib.viewer.findings import UNKNOWN
from effad_lib.viewer.pages import heading, summary
from effad_lib.viewer.rendering import CROSS, Layers, encoded, hottest, outline, panel, shares, thumbnail, values_at

BARE = State(outlines=())


def rgb(colour):
    return tuple(round(255 * part) for part in matplotlib.colors.to_rgb(colour))


def of_map(heat, size=None, level=100, truth=None):
    """A grey picture, at the size of its map if no other is given; both branches are the map itself."""
    heat = np.asarray(heat, np.float32)
    image = np.full((*(size or heat.shape), 3), level, np.uint8)
    return Picture(image, truth, dict.fromkeys(("combined", "student_teacher", "student_autoencoder"), heat))


def drawn(name, picture, state=BARE, scale=(0.0, 1.0), **sides):
    return np.asarray(panel(name, Layers(picture, state, **{"longest": 1024, "shortest": 1} | sides), state, scale))


# By hand, in levels of 256: 0 stays 0, 0.25 is 63, 1 is 255; what lies beyond the scale saturates.
STEPS = np.array([[0, 0.25, 1], [-5, 0.5, 7]])
LEVELS = np.array([[0, 63, 255], [0, 127, 255]])


def test_the_heatmap_has_the_colours_of_its_table_and_saturates_beyond_the_scale():
    for colours in ("inferno", "jet"):
        table = (matplotlib.colormaps[colours](np.arange(256))[:, :3] * 255).round()
        assert np.array_equal(drawn("heatmap", of_map(STEPS), replace(BARE, colours=colours)), table[LEVELS])
    assert np.array_equal(drawn("heatmap", of_map(STEPS * 10 - 3), scale=(-3, 7)), drawn("heatmap", of_map(STEPS)))


def test_an_opacity_is_the_share_of_heat_everywhere():
    overlay = drawn("overlay", of_map(STEPS), replace(BARE, opacity=0.4, follow=False))
    heat = drawn("heatmap", of_map(STEPS)).astype(float)
    assert np.abs(overlay - (0.4 * heat + 0.6 * 100)).max() <= 1
    assert overlay[0, 0].tolist() == [60, 60, 62]  # 0.4 · (0, 0, 4) of inferno's lowest colour, and 60 of the image
    for opacity, expected in ((0, 100), (1, heat)):
        state = replace(BARE, opacity=opacity, follow=False)
        assert np.array_equal(drawn("overlay", of_map(STEPS), state), np.broadcast_to(expected, heat.shape))


def test_an_opacity_that_follows_the_score_leaves_what_is_cold_as_it_is():
    overlay = drawn("overlay", of_map(STEPS), replace(BARE, opacity=0.8))
    heat, alpha = drawn("heatmap", of_map(STEPS)).astype(float), (0.8 * LEVELS / 255)[..., None]
    assert np.abs(overlay - (alpha * heat + (1 - alpha) * 100)).max() <= 1
    assert (overlay[[0, 1], [0, 0]] == 100).all()
    # At the top 0.8 · (252, 255, 164) + 0.2 · 100; a quarter up 0.2 · (85, 15, 109) + 0.8 · 100.
    assert overlay[0, 2] == pytest.approx([222, 224, 151], abs=1) and overlay[1, 2].tolist() == overlay[0, 2].tolist()
    assert overlay[0, 1] == pytest.approx([97, 83, 102], abs=1)


def test_one_scale_tells_two_pictures_apart_and_a_scale_of_its_own_does_not():
    cold, hot = of_map([[0.0, 0.1]]), of_map([[0.0, 0.9]])
    assert drawn("heatmap", cold)[0, 1].sum() < drawn("heatmap", hot)[0, 1].sum()
    stretched = replace(BARE, scaling="image")
    assert np.array_equal(drawn("heatmap", cold, stretched), drawn("heatmap", hot, stretched))
    assert Layers(cold, stretched).scale(stretched, (0, 1)) == pytest.approx((0, 0.1))
    assert Layers(cold, BARE).scale(BARE, (0, 1)) == (0, 1)
    assert drawn("heatmap", of_map([[0.3, 0.3]]), stretched).shape == (1, 2, 3)  # a constant map divides by nothing


def test_the_map_that_is_drawn_is_the_chosen_one():
    maps = {"combined": np.zeros((1, 2), np.float32), "student_teacher": np.array([[0, 1]], np.float32)}
    picture = Picture(np.zeros((1, 2, 3), np.uint8), None, maps)
    assert np.array_equal(*(drawn("heatmap", picture)[0, [0, 1]]))
    assert drawn("heatmap", picture, replace(BARE, map="student_teacher"))[0, 1].tolist() == [252, 255, 164]


@pytest.mark.parametrize("size", [(64, 64), (80, 96), (200, 130)])
def test_a_map_is_resized_as_the_evaluation_resizes_it(rng, size):
    heat = rng.random((64, 64), dtype=np.float32)
    sample = Sample(Path("x"), None, 0, "good")
    expected = Evaluation((sample,), [1], [0], AnomalyMaps(*[heat[None]] * 3), (size,)).heat(0)
    picture = of_map(heat, size)
    whole = Layers(picture, BARE, shortest=1).heat("combined")
    np.testing.assert_allclose(whole, expected, atol=1e-5)
    for point in ((0, 0), (size[0] - 1, size[1] - 1), (size[0] // 3, size[1] // 2)):
        layers = Layers(picture, replace(BARE, point=point, zoom=4), shortest=1)
        top, left, height, width = layers.region
        assert (height, width) == (round(size[0] / 4), round(size[1] / 4))
        np.testing.assert_allclose(
            layers.heat("combined"), expected[top : top + height, left : left + width], atol=1e-5
        )
    assert values_at(picture, hottest(heat, size))["combined"] == heat.max()


def test_a_part_of_an_image_is_enlarged_in_pixels_and_a_large_one_averaged(rng):
    image = rng.integers(0, 256, (60, 100, 3), dtype=np.uint8)
    heat = np.zeros((60, 100), np.float32)
    heat[0, 99] = 1  # in this corner, which is enlarged as long as no point is set
    picture = Picture(image, None, {"combined": heat})
    part = drawn("image", picture, replace(BARE, zoom=4), shortest=50)
    assert np.array_equal(part, image[:15, 75:].repeat(2, axis=0).repeat(2, axis=1))
    half = drawn("image", picture, longest=50)
    means = image.reshape(30, 2, 50, 2, 3).mean(axis=(1, 3))
    assert half.shape == (30, 50, 3) and np.abs(half - means).max() <= 1


def test_an_outline_is_the_inner_border_of_a_mask():
    mask = np.zeros((7, 8), dtype=bool)
    mask[1:5, 2:7] = True
    border = mask.copy()
    border[2:4, 3:6] = False
    assert np.array_equal(np.asarray(outline(mask)), border * 255)
    assert not np.asarray(outline(np.zeros((4, 4), dtype=bool))).any()
    wide = np.zeros((512, 512), dtype=bool)
    wide[100:200, 100:200] = True
    assert (np.asarray(outline(wide))[150] > 0).sum() == 4  # two pixels on either side


def test_outlines_of_truth_and_of_what_is_marked_are_drawn_where_they_are_asked_for():
    heat, truth = np.zeros((20, 30)), np.zeros((20, 30), dtype=bool)
    heat[3:9, 4:12], truth[10:16, 15:25] = 0.5, True
    picture = of_map(heat, truth=truth)
    marked, known = np.asarray(outline(heat > 0.4)) > 0, np.asarray(outline(truth)) > 0
    for names, borders in (((), ()), (("truth",), (0,)), (("marked",), (1,)), (("truth", "marked"), (0, 1))):
        state = replace(BARE, outlines=names, pixel_threshold=0.4)
        for name in ("image", "overlay", "heatmap", "truth"):
            pixels = drawn(name, picture, state)
            asked = [k for k in borders if not (k == 1 and name == "truth")]
            for k, (border, colour) in enumerate(((known, OUTLINE), (marked, PREDICTED))):
                assert np.array_equal((pixels == rgb(colour)).all(axis=2), border if k in asked else border & False)
    nothing = replace(state, pixel_threshold=0.5, outlines=("marked",))  # 0.5 is not above it
    assert (drawn("image", picture, nothing) == 100).all()


def test_the_truth_panel_darkens_only_what_is_not_defective():
    truth = np.zeros((4, 6), dtype=bool)
    truth[1:3, 2:5] = True
    pixels = drawn("truth", of_map(np.ones((4, 6)), level=90, truth=truth))
    assert (pixels[truth] == 90).all() and (pixels[~truth] == 30).all()
    for nothing in (None, truth & False):
        assert (drawn("truth", of_map(np.ones((4, 6)), level=90, truth=nothing)) == 90).all()


def test_a_cross_marks_the_point_and_leaves_it_free():
    picture = of_map(np.zeros((64, 96)), size=(128, 192))
    state = replace(BARE, point=(64, 100))
    pixels = drawn("image", picture, state, longest=768, shortest=768)
    assert pixels.shape == (512, 768, 3)
    cross = (pixels == rgb(CROSS)).all(axis=2)
    rows, columns = np.nonzero(cross)
    assert rows.mean() == pytest.approx(4 * 64.5, abs=1) and columns.mean() == pytest.approx(4 * 100.5, abs=1)
    assert not cross[4 * 64 : 4 * 65, 4 * 100 : 4 * 101].any() and (pixels[4 * 64 + 2, 4 * 100 + 2] == 100).all()
    assert not (drawn("image", picture) == rgb(CROSS)).all(axis=2).any()  # without a point there is none


def test_the_hottest_point_is_in_pixels_of_the_image_and_the_branches_add_up_to_the_score(rng):
    heat = np.zeros((8, 16), np.float32)
    heat[5, 10] = 1
    assert hottest(heat, (80, 96)) == (55, 63) and hottest(heat, (8, 16)) == (5, 10)  # (5.5 · 10, 10.5 · 6)
    first, second = rng.random((2, 64, 64)).astype(np.float32)
    maps = {"combined": (first + second) / 2, "student_teacher": first, "student_autoencoder": second}
    place, parts = shares(Picture(np.zeros((64, 64, 3), np.uint8), None, maps))
    assert sum(parts.values()) == pytest.approx(maps["combined"].max(), rel=1e-6)
    assert maps["combined"][place] == maps["combined"].max()
    assert parts["student_teacher"] == pytest.approx(first[place] / 2)
    assert shares(Picture(np.zeros((8, 16, 3), np.uint8), None, {"combined": heat})) == ((5, 10), {})


def test_a_jpeg_is_the_panel(evaluated_run):
    findings = of_run(evaluated_run)
    picture, state = findings.picture(0), State(pixel_threshold=findings.pixel_threshold)
    overlay = panel("overlay", Layers(picture, state), state, findings.scale)
    again = Image.open(io.BytesIO(encoded(overlay)))
    assert overlay.size == (384, 320) == again.size and again.format == "JPEG"  # four times 96×80
    assert np.abs(np.asarray(again, float) - np.asarray(overlay, float)).mean() < 5
    small = Image.open(io.BytesIO(thumbnail(picture, replace(state, zoom=8, point=(0, 0)), findings.scale)))
    assert small.size == (96, 80)


def texts(svg):
    """What a well-formed drawing says; `fromstring` raises for any other."""
    return [element.text for element in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]


def test_the_colour_bar_names_what_lies_on_its_scale():
    svg = colour_bar("viridis", (0, 0.5), {"q_a <&": 0, 'thresh"old': 0.25, "beyond": 0.9}, "one <scale>")
    said = texts(svg)
    assert {"q_a <&", 'thresh"old', "one <scale>", "0.0", "0.5"} <= set(said) and "beyond" not in said
    lines = ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}line")
    assert [float(line.get("x1")) for line in lines] == [12, 280]  # at the left end and in the middle of 560


@pytest.fixture
def scored(picture, tmp_path):
    """A function that returns findings of small pictures with these scores, labels and names."""

    def make(scores, labels, names=None, defects=None, threshold=0.5):
        names = names or [f"{k}.png" for k in range(len(scores))]
        files = [picture(tmp_path / "images" / f"{k}.png", size=(64, 80), seed=k) for k in range(len(names))]
        defects = defects or [{0: "good", 1: "dent"}.get(label, "") for label in labels]
        samples = [Sample(*one) for one in zip(files, [None] * len(names), labels, defects, strict=True)]
        heat = {"combined": np.linspace(0, 0.2, 64, dtype=np.float32).reshape(8, 8)}
        notes = tmp_path / "notes.csv"
        found = Findings("my <set>", samples, lambda _: heat, notes=notes, names=names, scores=scores)
        found.threshold = threshold
        return found

    return make


def bars(svg, colour):
    """The heights of the bars of a colour, without its sample beside the legend."""
    rects = ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}rect")
    return sorted(float(rect.get("height")) for rect in rects if rect.get("fill") == colour and rect.get("y") != "4")


def test_the_histogram_counts_every_scored_image_once(scored):
    found = scored([0.1, 0.1, 0.1, 0.9, 0.1, 0.5, np.nan], [0, 0, 1, 1, UNKNOWN, UNKNOWN, 0])
    svg = histogram(found, 0.4)
    assert {"good (2)", "defective (2)", "not known (2)", "threshold 0.4", "4"} <= set(texts(svg))
    grey, blue, orange = (bars(svg, colour) for colour in ("#888888", *(LABELS[k][1] for k in (0, 1))))
    tall = blue[0] / 2  # of one image
    assert (
        len(blue) == 1 and orange == pytest.approx([tall] * 2, abs=0.1) and grey == pytest.approx([tall] * 2, abs=0.1)
    )


@pytest.mark.parametrize("scores", [[0.3, 0.3], [-2.0, -1.0], [0.01, 900.0], [1e-9, 1e9]])
def test_the_histogram_is_drawn_for_any_scores(scored, scores):
    for threshold in (None, -1e12, 0.3, 1e12):
        svg = histogram(scored(scores, [0, 1]), threshold)
        assert len(bars(svg, LABELS[0][1])) == len(bars(svg, LABELS[1][1])) == 1
        numbers = [float(value) for value in re.findall(r' [xy][12]?="([^"]+)"', svg)]
        assert min(numbers) >= 0 and max(numbers) <= 560
    assert texts(histogram(scored([np.nan], [0]), 0.3)) == ["no scores yet"]


def test_the_bar_of_the_branches_has_their_shares():
    widths = re.findall(r'<rect x="[^"]+" y="0" width="([^"]+)"', branch_bar({"one": 0.3, "other": 0.1}, width=200))
    assert widths == ["150.0", "50.0"]
    assert branch_bar({"one": 0.3, "other": -0.1}) == branch_bar({}) == branch_bar({"one": 0.0, "other": 0.0}) == ""


def test_a_view_is_printed_as_png_of_nine_inches_and_no_figure_is_left_open(scored):
    found, before = scored([0.9, 0.1], [1, 0], names=["a $x_1$ {.png", "b.png"]), plt.get_fignums()
    for state in (State(pixel_threshold=0.1), State(index=1, panels=(), scaling="image", point=(3, 4), zoom=4)):
        page = Image.open(io.BytesIO(print_png(found, found.picture(state.index), state, dpi=50)))
        assert page.format == "PNG" and page.width == 450 and 60 < page.height <= 900
        assert len(np.unique(np.asarray(page.convert("L")))) > 20  # not an empty page
    assert plt.get_fignums() == before
    assert heading(found, State(threshold=0.5)) == "a $x_1$ {.png · dent · score 0.9 · right"


def test_the_gallery_shows_all_scored_images_and_escapes_what_they_are_called(scored, tmp_path):
    names = ['<script>alert("1")</script>.png', 'it\'s & "b".png', "c.png", "d.png", "not yet.png"]
    defects = ["<b>'dent\"", "good", "good", "", "good"]
    found = scored([0.9, 0.7, 0.1, 0.6, np.nan], [1, 0, 0, UNKNOWN, 0], names, defects)
    page = write_gallery(found, tmp_path / "gallery")
    text = page.read_text(encoding="utf-8")
    assert page.name == "index.html" and text.count("<script>") == 1 and "<b>'" not in text and "<set>" not in text
    assert "not yet.png" not in text and 'b".png' not in text
    assert re.findall(r'src="([^"]+)"', text) == [f"{k:05d}.jpg" for k in range(4)]
    shown = [html.unescape(alt) for alt in re.findall(r'alt="([^"]+)"', text)]
    assert shown == [names[k] for k in (0, 1, 3, 2)]  # by score
    outcomes = re.findall(r'data-outcome="([^"]+)"', text)
    assert outcomes == ["right", "false alarm", "called defective", "right"]
    assert summary(found, 0.5) in text and "<b>false alarms 1</b> of 2 (50.0 %)" in text
    assert Image.open(page.with_name("00000.jpg")).size == (2 * 240, 192)  # three times 80×64, twice


def test_an_unreadable_image_does_not_stop_the_gallery_and_pictures_of_an_earlier_one_go(scored, tmp_path):
    write_gallery(scored([0.9, 0.8, 0.7, 0.6], [1, 1, 0, 0]), tmp_path / "gallery")
    found = scored([0.9, 0.8, 0.7], [1, 1, 0])
    found.samples[1].image.write_bytes(b"broken")
    text = write_gallery(found, tmp_path / "gallery").read_text(encoding="utf-8")
    assert re.findall(r'src="([^"]+)"', text) == ["00000.jpg", "00002.jpg"] and "1.png: cannot be read" in text
    assert not (tmp_path / "gallery" / "00003.jpg").exists()


def test_a_gallery_leaves_the_pictures_of_others_alone(scored, picture, tmp_path):
    mine = picture(tmp_path / "gallery" / "00003.jpg")
    (mine.parent / "index.html").write_text("<!doctype html>my own page")
    with pytest.raises(RunError, match=r"gallery holds other files.*Name a new folder"):
        write_gallery(scored([0.9], [1]), mine.parent)
    assert {path.name for path in mine.parent.iterdir()} == {"00003.jpg", "index.html"}


def test_a_gallery_that_was_not_finished_is_written_again(scored, tmp_path, monkeypatch):
    found = scored([0.9], [1])
    with monkeypatch.context() as broken, pytest.raises(KeyboardInterrupt):
        broken.setattr("effad_lib.viewer.pages.encoded", lambda drawn: (_ for _ in ()).throw(KeyboardInterrupt))
        write_gallery(found, tmp_path / "gallery")
    assert "not finished" in (tmp_path / "gallery" / "index.html").read_text()
    assert "1 images" in write_gallery(found, tmp_path / "gallery").read_text()


def test_a_defect_thinner_than_a_pixel_of_the_panel_is_seen():
    truth = np.zeros((3000, 4000), dtype=bool)
    truth[1001, 1000:3000] = truth[2001:2003, 101:103] = truth[100:2000, 3333] = True
    picture = Picture(np.full((3000, 4000, 3), 200, np.uint8), truth, {"combined": np.zeros((8, 8), np.float32)})
    shown = Layers(picture, BARE).truth
    assert shown.shape == (768, 1024)
    assert shown[256, 256:768].all() and shown[512, 25:27].any() and shown[26:511, 853].all()


def test_beside_a_defect_the_truth_stays_dark():
    truth = np.zeros((128, 128), dtype=bool)
    truth[100:110, 100:110] = True
    picture = Picture(np.full((128, 128, 3), 150, np.uint8), truth, {"combined": np.zeros((8, 8), np.float32)})
    beside = Layers(picture, replace(BARE, point=(10, 10), zoom=4))
    drawn = np.asarray(panel("truth", beside, replace(BARE, point=(10, 10), zoom=4), (0, 1)))
    assert np.median(drawn) == picture.image[0, 0, 0] // 3


@pytest.mark.parametrize("low, high", [(-42.2, -40.2), (1000.1, 1000.45), (0, 4e-4), (0.02, 3.9), (-1, 1)])
def test_neighbouring_values_of_a_scale_are_told_apart(low, high, scored):
    said = [text.replace("−", "-") for text in texts(colour_bar("viridis", (low, high), {}))]
    values = [float(text) for text in said]
    assert 3 <= len(values) == len(set(values)) and np.allclose(np.diff(values), values[1] - values[0])
    found = scored(np.linspace(low, high, 5), [0, 0, 1, 1, 1])
    assert len(set(texts(histogram(found, None)))) == len(texts(histogram(found, None)))


def test_the_stored_threshold_keeps_a_line_beside_another_one(scored):
    found = scored([0.1, 0.2, 0.9], [0, 0, 1])
    found.threshold = 0.5
    assert "stored" not in texts(histogram(found, 0.5))
    assert {"stored", "threshold 0.3"} <= set(texts(histogram(found, 0.3)))
