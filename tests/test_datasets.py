"""Data sets: what each layout yields, what is refused, and that nothing leaks from test to training."""

import sys
from dataclasses import replace
from importlib import util
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from effad_lib import datasets, runs
from effad_lib.datasets import DatasetError, Sample, Split, hold_out, load_dataset, verify, verify_masks


def save(path, size=(8, 6), fill=120):
    """Write a grey picture of (height, width) `size`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full(size, fill, np.uint8)).save(path)
    return path


def mvtec(base, train=20, masks=True, suffix="_mask"):
    """Write a category in MVTec layout: 2 good test images, 3 with scratches, 2 with dents."""
    for index in range(train):
        save(base / f"train/good/{index:03}.png")
    for defect, count in (("good", 2), ("scratch", 3), ("dent", 2)):
        for index in range(count):
            save(base / f"test/{defect}/{index:03}.png")
            if masks and defect != "good":
                save(base / f"ground_truth/{defect}/{index:03}{suffix}.png", fill=255)
    return base


# --- MVTec AD and folders -------------------------------------------------------------------------


def test_mvtec_category_is_read_in_full(tmp_path):
    base = mvtec(tmp_path / "screw")
    split = load_dataset("mvtec_ad", root=tmp_path, category="screw")
    assert (len(split.train), len(split.validation), len(split.test)) == (17, 3, 7)
    assert split.name == "mvtec_ad/screw" and split.has_masks
    assert "17 train, 3 validation, 7 test: 2 good and 5 defective, with masks" in repr(split)
    found = {sample.image.relative_to(base).as_posix(): sample for sample in split.test}
    scratch = found["test/scratch/001.png"]
    assert scratch == Sample(base / "test/scratch/001.png", base / "ground_truth/scratch/001_mask.png", 1, "scratch")
    assert found["test/good/001.png"] == Sample(base / "test/good/001.png", None, 0, "good")
    assert {s.defect for s in split.test if s.label} == {"scratch", "dent"}


def test_mvtec_root_may_be_the_category_and_names_are_free(tmp_path):
    mvtec(tmp_path / "my_part")
    expected = load_dataset("mvtec_ad", root=tmp_path, category="my_part")
    assert load_dataset("mvtec_ad", root=tmp_path / "my_part") == expected
    assert load_dataset("mvtec_ad", root=tmp_path / "my_part", category="my_part") == expected
    assert load_dataset("mvtec_ad", root=tmp_path) == expected


def test_relative_root_is_taken_from_the_project(tmp_path, monkeypatch):
    mvtec(tmp_path / "data/mvtec_ad/screw")
    monkeypatch.setattr(runs.files, "PROJECT", tmp_path)
    assert load_dataset("mvtec_ad", category="screw") == load_dataset(
        "mvtec_ad", root="data/mvtec_ad", category="screw"
    )


@pytest.mark.parametrize("category", ["botle", "../mvtec/screw", "screw/train", "."])
def test_unknown_mvtec_category(tmp_path, category):
    mvtec(tmp_path / "mvtec/screw")
    mvtec(tmp_path / "mvtec/my_part")
    with pytest.raises(DatasetError, match="unknown category") as error:
        load_dataset("mvtec_ad", root=tmp_path / "mvtec", category=category)
    for name in (*datasets.MVTEC_AD, "my_part"):
        assert name in str(error.value)
    if category == "botle":
        assert "Did you mean 'bottle'?" in str(error.value)


def test_a_missing_mask_is_named(tmp_path):
    base = mvtec(tmp_path / "screw")
    (base / "ground_truth/scratch/001_mask.png").unlink()
    with pytest.raises(DatasetError, match=r"1 defective images have no mask(.|\n)*scratch.001\.png"):
        load_dataset("mvtec_ad", root=base)


def test_no_ground_truth_folder_means_no_masks(tmp_path):
    split = load_dataset("mvtec_ad", root=mvtec(tmp_path / "screw", masks=False))
    assert not split.has_masks and all(sample.mask is None for sample in split.test)
    assert sum(sample.label for sample in split.test) == 5


def test_validation_folder_is_used_when_there_is_one(tmp_path):
    base = mvtec(tmp_path / "box", train=10)
    kept = [save(base / f"validation/good/{index}.png") for index in range(4)]
    split = load_dataset("mvtec_ad", root=base)
    assert len(split.train) == 10 and [sample.image for sample in split.validation] == kept


@pytest.mark.parametrize("below", ["", "good", "train/good", "photos/monday"])
def test_folder_of_good_images(tmp_path, below):
    for index in range(13):
        save(tmp_path / below / f"{index:02}.png")
    split = load_dataset("folder", root=tmp_path, category="ignored")
    assert (len(split.train), len(split.validation), split.test) == (10, 3, ())
    assert not split.has_masks


@pytest.mark.parametrize("suffix", ["_mask", ""])
def test_folder_with_nested_test_images_and_masks(tmp_path, suffix):
    base = mvtec(tmp_path / "part", suffix=suffix)
    image = save(base / "test/scratch/deep/000.png")
    mask = save(base / f"ground_truth/scratch/deep/000{suffix}.png", fill=255)
    split = load_dataset("folder", root=base)
    assert Sample(image, mask, 1, "scratch") in split.test
    assert len({sample.mask for sample in split.test if sample.label}) == 6


def test_several_masks_of_one_image_and_an_empty_train_folder(tmp_path):
    base = mvtec(tmp_path / "part")
    (base / "ground_truth/dent/001_mask.png").unlink()
    for index in range(2):
        save(base / f"ground_truth/dent/001/{index}.png", fill=255)
    split = load_dataset("folder", root=base)
    assert Sample(base / "test/dent/001.png", base / "ground_truth/dent/001", 1, "dent") in split.test
    for path in (base / "train/good").iterdir():
        path.unlink()
    for index in range(20):  # as in MVTec AD 2: perhaps defective, so never good images to train on
        save(base / f"test_private/{index:03}.png")
    with pytest.raises(DatasetError, match="0 good images to train on"):
        load_dataset("folder", root=base)


def test_loose_good_images_beside_test_folders(tmp_path):
    for index in range(13):
        save(tmp_path / f"{index:02}.png")
    save(tmp_path / "test/crack/0.png")
    save(tmp_path / "ground_truth/crack/0_mask.png", fill=255)
    split = load_dataset("folder", root=tmp_path)
    assert len(split.train) + len(split.validation) == 13 and len(split.test) == 1


def test_pictures_that_a_run_makes_in_the_folder_of_its_images_are_not_trained_on(tmp_path):
    for index in range(14):
        save(tmp_path / f"{index:02}.png")
    before = load_dataset("folder", root=tmp_path)
    for name in ("parameters.yaml", "sources.json"):
        (tmp_path / name).write_text("{}")
    for name in ("figures/roc.png", "gallery/0.png", "heatmaps/00.png"):
        save(tmp_path / name)
    assert load_dataset("folder", root=tmp_path) == before


def test_folder_of_several_data_sets_is_refused(tmp_path):
    mvtec(tmp_path / "bottle")
    mvtec(tmp_path / "screw")
    with pytest.raises(DatasetError, match="several data sets"):
        load_dataset("folder", root=tmp_path)


def test_test_images_without_a_defect_folder_are_refused(tmp_path):
    base = mvtec(tmp_path / "part")
    save(base / "test/lost.png")
    with pytest.raises(DatasetError, match=r"lost\.png.*test/good or test/<defect>"):
        load_dataset("folder", root=base)


def test_folder_missing_or_empty(tmp_path):
    with pytest.raises(DatasetError, match=r"no folder at root ''\. Give as root one of good images:") as error:
        load_dataset("folder")
    for part in ("train/good/000.png", "test/<defect>/000.png", "ground_truth/<defect>/000_mask.png"):
        assert part in str(error.value)
    with pytest.raises(DatasetError, match=r"no folder at root .*absent"):
        load_dataset("folder", root=tmp_path / "absent")
    with pytest.raises(DatasetError, match="no image"):
        load_dataset("folder", root=tmp_path)


@pytest.mark.skipif(sys.platform == "win32", reason="making links needs a privilege on Windows")
def test_links_out_of_the_folder_are_not_followed(tmp_path):
    outside = save(tmp_path / "outside/secret.png")
    for index in range(14):
        save(tmp_path / f"part/{index:02}.png")
    (tmp_path / "part/file.png").symlink_to(outside)
    (tmp_path / "part/folder").symlink_to(outside.parent)
    (tmp_path / "part/inside.png").symlink_to(tmp_path / "part/00.png")
    split = load_dataset("folder", root=tmp_path / "part")
    names = {sample.image.name for sample in split.train + split.validation}
    assert "inside.png" in names and not {"file.png", "secret.png"} & names


# --- held-out validation --------------------------------------------------------------------------


def test_validation_is_a_seeded_share_of_train(tmp_path):
    base = mvtec(tmp_path / "part", train=100)
    load = lambda **kwargs: load_dataset("folder", root=base, **kwargs)  # noqa: E731
    split = load(seed=1, validation_share=0.2)
    train, held = ([sample.image for sample in part] for part in (split.train, split.validation))
    assert len(held) == 20 and len(train) == 80
    assert train == sorted(train) and held == sorted(held)
    assert sorted(train + held) == sorted((base / "train/good").iterdir())
    assert load(seed=1, validation_share=0.2) == split
    assert load(seed=2, validation_share=0.2).validation != split.validation
    assert load(seed=2).test == split.test


@pytest.mark.parametrize("count", [1, 9, 12])
def test_too_few_training_images(tmp_path, count):
    base = mvtec(tmp_path / "part", train=count)
    with pytest.raises(DatasetError, match=rf"part: {max(0, count - 3)} good images .*10 are needed.*Add"):
        load_dataset("folder", root=base)


def test_too_large_a_share_is_the_remedy(tmp_path):
    base = mvtec(tmp_path / "part", train=40)
    with pytest.raises(DatasetError, match=r"8 good images .* lower validation_share"):
        load_dataset("folder", root=base, validation_share=0.8)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"validation_share": 0.0}, "validation_share = 0.0"),
        ({"validation_share": 1.0}, "validation_share = 1.0"),
        ({"validation_share": float("nan")}, "validation_share = nan"),
        ({"seed": -1}, "seed = -1"),
    ],
)
def test_impossible_settings(tmp_path, setting, message):
    with pytest.raises(DatasetError, match=message):
        load_dataset("folder", root=mvtec(tmp_path / "part"), **setting)


# --- verify ---------------------------------------------------------------------------------------


def test_verify_passes_a_sound_split(tmp_path):
    assert verify(load_dataset("folder", root=mvtec(tmp_path / "part"))) is None


def test_verify_names_each_fault(tmp_path):
    base = mvtec(tmp_path / "part")
    (base / "train/good/000.png").write_bytes(b"no picture")
    (base / "test/good/000.png").write_bytes((base / "test/good/001.png").read_bytes()[:-30])
    Image.new("I;16", (6, 8)).save(base / "train/good/001.png")  # sound, if the training is told its levels
    Image.new("CMYK", (6, 8)).save(base / "train/good/cmyk.jpg")
    save(base / "ground_truth/dent/000_mask.png", size=(6, 8), fill=255)
    split = load_dataset("folder", root=base)
    with pytest.raises(DatasetError, match=r"4 of 28 samples") as error:
        verify(split)
    lines = str(error.value)
    for part in ("train/good/000.png", "test/good/000.png", "cmyk.jpg", "dent/000_mask.png"):
        assert part in lines.replace("\\", "/")


def test_verify_refuses_masks_of_zero_and_one(tmp_path):
    base = mvtec(tmp_path / "part")
    save(base / "ground_truth/dent/001_mask.png", fill=1)
    with pytest.raises(DatasetError, match=r"001_mask\.png: an empty mask"):
        verify(load_dataset("folder", root=base))


def test_images_of_several_sizes_are_fine_where_each_mask_fits_its_own(tmp_path):
    base = mvtec(tmp_path / "part")
    for path in (base / "test/dent/000.png", base / "ground_truth/dent/000_mask.png"):
        save(path, size=(9, 7), fill=255)
    verify(load_dataset("folder", root=base))
    save(base / "test/dent/001.png", size=(9, 7))
    with pytest.raises(DatasetError, match=r"1 of 27 (.|\n)*001_mask\.png: mask of \(8, 6\), its image has \(9, 7\)"):
        verify(load_dataset("folder", root=base))


def test_masks_of_good_images_are_checked_too_but_may_be_empty(tmp_path):
    good = [Sample(save(tmp_path / f"{name}.png"), None, 0, "good") for name in range(5)]
    split = Split("own", *hold_out(good[:4], 0, 0.5), (replace(good[4], mask=save(tmp_path / "mask.png", fill=0)),))
    verify(split)
    save(tmp_path / "mask.png", size=(6, 8), fill=0)
    for check in (verify, verify_masks):
        with pytest.raises(DatasetError, match=r"mask\.png: mask of \(6, 8\)"):
            check(split)


def test_verify_lists_only_the_first_few(tmp_path):
    base = mvtec(tmp_path / "part")
    for path in (base / "train/good").iterdir():
        path.write_bytes(b"")
    with pytest.raises(DatasetError, match=r"20 of 27 samples(.|\n)*and 15 more") as error:
        verify(load_dataset("folder", root=base))
    assert len(str(error.value).splitlines()) == 7


# --- ELPV and synthetic products ------------------------------------------------------------------

needs_elpv = pytest.mark.skipif(
    util.find_spec("elpv_dataset") is None, reason='elpv-dataset is not installed: pip install "effad[data]"'
)


def elpv_cells():
    """Read the labels without the csv module: file name -> (probability, type, module)."""
    path = Path(util.find_spec("elpv_dataset").origin).parent / "data/labels.csv"
    rows = [line.split() for line in path.read_text().splitlines()]
    modules = np.repeat(np.arange(len(datasets.elpv.ELPV_MODULES)), datasets.elpv.ELPV_MODULES)
    assert len(rows) == len(modules) == 2624
    return {Path(n).name: (float(p), kind, m) for (n, p, kind, *_), m in zip(rows, modules, strict=True)}


@needs_elpv
@pytest.mark.parametrize(
    ("category", "good", "tested_good", "tested_bad"),
    [("mono", 438, 150, 151), ("poly", 593, 327, 132), ("all", 1031, 477, 283)],
)
def test_elpv_tests_whole_modules(category, good, tested_good, tested_bad):
    cells = elpv_cells()
    split = load_dataset("elpv", category=category)
    train = split.train + split.validation
    assert len(train) == good and len(split.validation) == round(0.1 * good)
    assert sum(sample.label for sample in split.test) == tested_bad
    assert len(split.test) == tested_good + tested_bad and not split.has_masks
    known = [cells[sample.image.name] for sample in train + split.test]
    assert [float(sample.label) for sample in train + split.test] == [probability for probability, *_ in known]
    assert {kind for _, kind, _ in known} == ({"mono", "poly"} if category == "all" else {category})
    assert not {m for *_, m in known[: len(train)]} & {m for *_, m in known[len(train) :]}


@needs_elpv
def test_elpv_modules_are_of_one_type_and_the_test_part_is_fixed():
    kinds = {}
    for _, kind, module in elpv_cells().values():
        kinds.setdefault(module, set()).add(kind)
    assert all(len(kind) == 1 for kind in kinds.values())
    first, second = (load_dataset("elpv", category="mono", seed=seed) for seed in (0, 1))
    assert first.test == second.test and first.validation != second.validation
    assert all(sample.image.is_file() for sample in first.train)


@pytest.fixture
def fake_elpv(tmp_path, monkeypatch):
    """A package elpv-dataset without pictures: every second module is polycrystalline, its cells good, dubious, bad."""
    data = tmp_path / "elpv_dataset" / "data"
    data.mkdir(parents=True)
    modules, rows = datasets.elpv.ELPV_MODULES, []
    for module, count in enumerate(modules):
        for cell in range(count):
            share = ("0.0", "0.3333333333333333", "1.0")[cell % 3]
            rows.append(f"images/{module:02}-{cell:03}.png  {share:<20} {'poly' if module % 2 else 'mono'}")
    (data / "labels.csv").write_text("\n".join(rows) + "\n")
    spec = SimpleNamespace(origin=str(data.parent / "__init__.py"))
    monkeypatch.setattr(datasets.elpv.util, "find_spec", {"elpv_dataset": spec}.get)
    return data


@pytest.mark.parametrize(("category", "kinds"), [("", (0,)), ("mono", (0,)), ("poly", (1,)), ("all", (0, 1))])
def test_elpv_by_a_package_of_known_cells(fake_elpv, category, kinds):
    split = load_dataset("elpv", category=category)
    own = [range(kind, len(datasets.elpv.ELPV_MODULES), 2) for kind in kinds]
    tested = {module for modules in own for module in modules[::3]}
    cells = {module: datasets.elpv.ELPV_MODULES[module] for modules in own for module in modules}
    found = {(int(s.image.stem[:2]), int(s.image.stem[3:]), s.label, s.defect) for s in split.test}
    kept = ((0, 0, "good"), (2, 1, "defective"))  # of three cells the first and the last
    assert found == {(m, c, *of) for m in tested for start, *of in kept for c in range(start, cells[m], 3)}
    good = {(int(s.image.stem[:2]), int(s.image.stem[3:]), s.label) for s in split.train + split.validation}
    assert good == {(m, c, 0) for m in cells.keys() - tested for c in range(0, cells[m], 3)}
    assert split.name == f"elpv/{category or 'mono'}" and split.test[0].image.parent == fake_elpv / "images"


def test_elpv_of_another_size_is_refused(fake_elpv):
    labels = fake_elpv / "labels.csv"
    labels.write_text(labels.read_text().split("\n", 1)[1])
    with pytest.raises(DatasetError, match=r"labels\.csv lists 2623 cells instead of 2624. Install it anew: pip"):
        load_dataset("elpv")


def test_elpv_unknown_category_and_missing_package(monkeypatch):
    with pytest.raises(DatasetError, match=r"'poli' of elpv.*Did you mean 'poly'"):
        load_dataset("elpv", category="poli")
    monkeypatch.setattr(datasets.elpv.util, "find_spec", lambda name: None)
    with pytest.raises(DatasetError, match=r'pip install "effad\[data\]"'):
        load_dataset("elpv", category="mono")


def test_synthetic_product_is_written_once(tmp_path, monkeypatch):
    synthesis = pytest.importorskip("effad_lib.synthesis")
    product = synthesis.product_names()[0]
    write, written = synthesis.synthesize, []

    def write_small(settings):
        written.append(settings.product)
        return write(replace(settings, image_size=[64, 64], train=14, test_good=2, test_per_defect=1))

    monkeypatch.setattr(synthesis, "synthesize", write_small)
    split = load_dataset("synthetic", root=tmp_path, category=product)
    assert split == load_dataset("synthetic", root=tmp_path, category=product) and written == [product]
    assert (len(split.train), len(split.validation)) == (11, 3) and split.has_masks
    verify(split)
    with pytest.raises(DatasetError, match=f"unknown product.*{product}"):
        load_dataset("synthetic", root=tmp_path, category="no such thing")
