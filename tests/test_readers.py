"""The readers of published data sets, each on a small tree of its own layout: what is read, and what is said if not."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from effad_lib import runs
from effad_lib.datasets import DatasetError, Sample, Saturation, Split, load_dataset, verify, verify_masks
from effad_lib.datasets.split import LOADERS
from effad_lib.images import read_mask, read_regions

SIZE = (6, 8)


def save(path, value=120, rows=slice(None)):
    """Write a black grey picture whose `rows` have a value."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros(SIZE, np.uint8)
    pixels[rows] = value
    Image.fromarray(pixels).save(path)
    return path


def fill(folder, count, suffix=".png"):
    """Write so many pictures 000, 001, ... into a folder."""
    return [save(folder / f"{index:03}{suffix}") for index in range(count)]


def mvtec_ad(base):
    fill(base / "train/good", 20)
    fill(base / "test/good", 2)
    for path in fill(base / "test/dent", 3):
        save(base / f"ground_truth/dent/{path.stem}_mask.png", 255, 0)


def mvtec_ad_2(base):
    fill(base / "train/good", 11, "_regular.png")
    fill(base / "validation/good", 2, "_regular.png")
    fill(base / "test_public/good", 4, "_regular.png")
    for path in fill(base / "test_public/bad", 3, "_regular.png"):
        save(base / f"test_public/ground_truth/bad/{path.stem}_mask.png", 255, 0)
    fill(base / "test_private", 5, "_regular.png")
    fill(base / "test_private_mixed", 6, "_mixed.png")


def mvtec_loco(base):
    fill(base / "train/good", 12)
    fill(base / "validation/good", 4)
    fill(base / "test/good", 3)
    for kind, values in (("logical_anomalies", (255, 254)), ("structural_anomalies", (7,))):
        for path in fill(base / f"test/{kind}", 2):
            for row, value in enumerate(values):
                save(base / f"ground_truth/{kind}/{path.stem}/{row:03}.png", value, row)
    entries = [("missing", 255, 100, False), ("swapped", 254, 0.5, True), ("dirt", 7, 1.0, True)]
    names = ("defect_name", "pixel_value", "saturation_threshold", "relative_saturation")
    config = [dict(zip(names, entry, strict=True)) for entry in entries]
    (base / "defects_config.json").write_text(json.dumps(config))


def visa(base):
    """The original layout: a category and its rows in the table of the split."""
    name, rows = base.name, ["object,split,label,image,mask"]
    for index, path in enumerate(fill(base / "Data/Images/Normal", 16, ".JPG")):
        part = "test" if index in (3, 8) else "train"
        rows.append(f"{name},{part},normal,{name}/Data/Images/Normal/{path.name},")
    for index, path in enumerate(fill(base / "Data/Images/Anomaly", 3, ".JPG")):
        save(base / f"Data/Masks/Anomaly/{path.stem}.png", index + 1, 0)
        images, masks = f"{name}/Data/Images/Anomaly/{path.name}", f"{name}/Data/Masks/Anomaly/{path.stem}.png"
        rows.append(f"{name},test,anomaly,{images},{masks}")
    rows.append("other,train,normal,other/Data/Images/Normal/000.JPG,")
    table = base.parent / "split_csv/1cls.csv"
    table.parent.mkdir(exist_ok=True)
    table.write_text("\n".join(rows) + "\n")


def visa_1cls(base):
    fill(base / "train/good", 14, ".JPG")
    fill(base / "test/good", 2, ".JPG")
    for path in fill(base / "test/bad", 3, ".JPG"):
        save(base / f"ground_truth/bad/{path.stem}.png", 255, 0)


def btad(base):
    fill(base / "train/ok", 13, ".bmp")
    fill(base / "test/ok", 1, ".bmp")
    for path, suffix in zip(fill(base / "test/ko", 2, ".bmp"), (".bmp", ".png"), strict=True):
        save(base / f"ground_truth/ko/{path.stem}{suffix}", 255, 0)


READERS = {  # data set, its tree, a category and another one, what the error says that helps to get it
    "mvtec_ad": ("mvtec_ad", mvtec_ad, "screw", "bottle", ("datasets/mvtec-ad\n", "/test/<defect>/000.png")),
    "mvtec_ad_2": ("mvtec_ad_2", mvtec_ad_2, "fruit_jelly", "can", ("mvtec-ad-2", "test_public/ground_truth/bad/")),
    "mvtec_loco": ("mvtec_loco", mvtec_loco, "screw_bag", "pushpins", ("mvtec-loco", "/defects_config.json")),
    "visa": ("visa", visa, "pipe_fryum", "candle", ("VisA_20220922.tar", "CC BY 4.0", "split_csv/1cls.csv")),
    "visa_1cls": ("visa", visa_1cls, "macaroni1", "pcb4", ("amazon", "ground_truth/bad/000.png")),
    "btad": ("btad", btad, "01", "03", ("btad.zip", "licence", "ground_truth/ko/")),
}

every = pytest.mark.parametrize("reader", READERS)


def read(reader, root, **change):
    """Write the tree of a reader's category below `root` and load it."""
    name, write, category, *_ = READERS[reader]
    write(root / category)
    return load_dataset(name, root=root, **({"category": category} | change))


# --- what is read ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reader", "counts", "defects", "held_out"),
    [
        ("mvtec_ad", (17, 3, 5), {"dent": 3}, "train/good"),
        ("mvtec_ad_2", (11, 2, 7), {"bad": 3}, "validation/good"),
        ("mvtec_loco", (12, 4, 7), {"logical_anomalies": 2, "structural_anomalies": 2}, "validation/good"),
        ("visa", (11, 3, 5), {"bad": 3}, "Data/Images/Normal"),
        ("visa_1cls", (11, 3, 5), {"bad": 3}, "train/good"),
        ("btad", (10, 3, 3), {"ko": 2}, "train/ok"),
    ],
)
def test_each_layout_is_read_in_full(tmp_path, reader, counts, defects, held_out):
    name, _, category, *_ = READERS[reader]
    split = read(reader, tmp_path)
    assert split.name == f"{name}/{category}" and split.has_masks
    assert (len(split.train), len(split.validation), len(split.test)) == counts
    assert all(sample.image.is_relative_to(tmp_path / category / held_out) for sample in split.validation)
    bad = [sample for sample in split.test if sample.label]
    assert {kind: sum(s.defect == kind for s in bad) for kind in {s.defect for s in bad}} == defects
    assert {(s.label, s.defect, s.mask) for s in (*split.train, *split.validation)} == {(0, "good", None)}
    assert {(s.defect, s.mask) for s in split.test if not s.label} == {("good", None)}
    rows = 2 if "logical_anomalies" in defects else 1
    for sample in bad:
        mask = read_mask(sample.mask, SIZE, sample.mask_level)
        assert sample.image.stem in sample.mask.as_posix()
        assert mask[0].all() and mask.sum() == SIZE[1] * (rows if sample.defect != "structural_anomalies" else 1)
    verify(split)
    verify_masks(split)


@every
def test_the_root_is_the_data_folder_or_the_category_itself(tmp_path, monkeypatch, reader):
    name, _, category, *_ = READERS[reader]
    monkeypatch.setattr(runs.files, "PROJECT", tmp_path)
    split = read(reader, tmp_path / "data" / name)
    assert load_dataset(name, category=category) == load_dataset(name) == split
    if reader != "visa":  # whose table lies beside the categories
        assert load_dataset(name, root=tmp_path / "data" / name / category) == split


def test_visa_follows_its_table_and_takes_any_class_as_defective(tmp_path):
    split = read("visa", tmp_path)
    normal = tmp_path / "pipe_fryum/Data/Images/Normal"
    assert [s.image for s in split.test[:2]] == [normal / "003.JPG", normal / "008.JPG"]
    anomaly, mask = (tmp_path / f"pipe_fryum/Data/{where}/Anomaly/001" for where in ("Images", "Masks"))
    assert Sample(anomaly.with_suffix(".JPG"), mask.with_suffix(".png"), 1, "bad", 1) in split.test
    palette = Image.open(mask.with_suffix(".png")).convert("P")
    palette.putdata(list(np.repeat([0, 1, 2, 0, 0, 0], SIZE[1])))
    palette.putpalette([0, 0, 0, 128, 0, 0, 0, 0, 128])
    palette.save(mask.with_suffix(".png"))
    assert read_mask(mask.with_suffix(".png"), SIZE, 1).any(axis=1).tolist() == [False, True, True, False, False, False]


def test_loco_regions_keep_the_values_that_tell_their_saturation(tmp_path):
    split = read("mvtec_loco", tmp_path)
    found = {255: ("missing", 100, False), 254: ("swapped", 0.5, True), 7: ("dirt", 1.0, True)}
    assert dict(split.saturation) == {value: Saturation(*entry) for value, entry in found.items()}
    with pytest.raises(TypeError):
        split.saturation[1] = split.saturation[7]
    (sample,) = [s for s in split.test if s.image.match("logical_anomalies/001.png")]
    assert sample.mask == tmp_path / "screw_bag/ground_truth/logical_anomalies/001"
    regions = read_regions(sample.mask, SIZE)
    assert regions.shape == (2, *SIZE) and regions.max((1, 2)).tolist() == [255, 254]
    assert hash(split) == hash(load_dataset("mvtec_loco", root=tmp_path)) and not read("btad", tmp_path).saturation


@pytest.mark.parametrize(
    ("threshold", "relative", "pixels"),
    [(0.5, True, 20), (1.0, True, 41), (0.001, True, 1), (10, False, 10), (10.9, False, 10), (99, False, 41)],
)
def test_saturation_in_pixels_of_a_region(threshold, relative, pixels):
    assert Saturation("dirt", threshold, relative).pixels(41) == pixels


# --- what is not there ----------------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("root", ["", "absent", "empty"])
def test_a_missing_data_set_says_where_to_get_it_and_how_it_looks(tmp_path, monkeypatch, reader, root):
    name, _, category, _, parts = READERS[reader]
    monkeypatch.setattr(runs.files, "PROJECT", tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError, match=f"was not found in .*{root or f'data.{name}'}. Download it") as error:
        load_dataset(name, root=tmp_path / root if root else "", category=category)
    for part in (*parts, "https://", "licence"):
        assert part in str(error.value)


@every
def test_categories_that_are_unknown_or_not_unpacked(tmp_path, reader):
    name, _, category, other, _ = READERS[reader]
    read(reader, tmp_path)
    with pytest.raises(DatasetError, match=f"category '{other}' is not in .*, only {category}. Unpack it"):
        load_dataset(name, root=tmp_path, category=other)
    for wrong in (category + "x", f"../{tmp_path.name}/{category}", ".", f"{category}/train"):
        with pytest.raises(DatasetError, match="unknown category") as error:
            load_dataset(name, root=tmp_path, category=wrong)
        assert other in str(error.value) and f"In {tmp_path}: {category}." in str(error.value)
        assert wrong[:-1] != category or f"Did you mean '{category}'?" in str(error.value)


@every
def test_a_missing_mask_is_named(tmp_path, reader):
    name, *_ = READERS[reader]
    sample = next(sample for sample in read(reader, tmp_path).test if sample.label)
    for file in [*sample.mask.iterdir()] if sample.mask.is_dir() else [sample.mask]:
        file.unlink()
    stem = (sample.mask if reader == "visa" else sample.image).name
    with pytest.raises(DatasetError, match=rf"1 (defective images have no mask|files) (.|\n)*{stem}"):
        load_dataset(name, root=tmp_path)


# --- the table of VisA ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("pipe_fryum,train,normal,pipe_fryum/Data/Images/Normal/999.JPG,", r"1 files .*not below(.|\n)*999\.JPG"),
        ("pipe_fryum,train,normal,../outside.png,", r"not below(.|\n)*'\.\./outside\.png'"),
        ("pipe_fryum,train,normal,pipe_fryum/../../outside.png,", r"not below(.|\n)*outside"),
        ("pipe_fryum,train,normal,/etc/hostname,", r"not below(.|\n)*hostname"),
        ("pipe_fryum,train,normal,pipe_fryum/Data/link.png,", r"not below(.|\n)*link\.png"),
        ("pipe_fryum,test,anomaly,pipe_fryum/Data/Images/Anomaly/000.JPG,../m.png", r"not below(.|\n)*m\.png"),
        ("pipe_fryum,test,anomaly,pipe_fryum/Data/Images/Anomaly/000.JPG,", r"1 files .*not below(.|\n)*''"),
        ("pipe_fryum,val,normal,a,", r"row 21 has the split 'val', it takes train or test"),
        ("pipe_fryum,train,bad,a,", r"row 21 has the label 'bad', it takes normal or anomaly"),
        ("pipe_fryum,train", r"row 21 takes the columns object, split, label, image, mask"),
        ("pipe_fryum,train,anomaly,pipe_fryum/Data/Images/Anomaly/000.JPG,pipe_fryum/Data/Masks/Anomaly/000.png",
         "000.JPG is defective, so it cannot be in train"),
    ],
)  # fmt: skip
@pytest.mark.skipif(sys.platform == "win32", reason="making links needs a privilege on Windows")
def test_rows_of_visa_that_cannot_be_followed(tmp_path, row, message):
    root = tmp_path / "visa"
    read("visa", root)
    save(tmp_path / "outside.png")
    (root / "pipe_fryum/Data/link.png").symlink_to(tmp_path / "outside.png")
    with open(root / "split_csv/1cls.csv", "a") as table:
        table.write(row + "\n")
    with pytest.raises(DatasetError, match=message):
        load_dataset("visa", root=root)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has no row whose object is 'pipe_fryum'"),
        (b"object,split,label,image,mask\ncandle,train,normal,x,\n", "has no row whose object is 'pipe_fryum'"),
        (b"image,label\nx,normal\n", "row 1 takes the columns"),
        (b"object,split\n\xff\xfe", "cannot be read"),
    ],
)
def test_a_table_of_visa_that_is_not_one(tmp_path, content, message):
    read("visa", tmp_path)
    (tmp_path / "split_csv/1cls.csv").write_bytes(content)
    with pytest.raises(DatasetError, match=rf"1cls\.csv: {message}(.|\n)*Unpack it anew"):
        load_dataset("visa", root=tmp_path)


# --- the saturation thresholds of MVTec LOCO ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pixel_value": 0}, "pixel_value takes a whole number from 1 to 255"),
        ({"pixel_value": 256}, "pixel_value takes"),
        ({"pixel_value": True}, "pixel_value takes"),
        ({"pixel_value": "255"}, "pixel_value takes"),
        ({"pixel_value": 7}, "has pixel_value 7, which an earlier one has"),
        ({"defect_name": None}, "defect_name takes a name"),
        ({"relative_saturation": 1}, "relative_saturation takes true or false"),
        ({"saturation_threshold": 0}, "saturation_threshold takes pixels, above 0"),
        ({"saturation_threshold": "3"}, "saturation_threshold takes"),
        ({"relative_saturation": True}, "saturation_threshold takes a share above 0, at most 1"),
    ],
)
def test_an_entry_that_makes_no_sense_is_named(tmp_path, change, message):
    read("mvtec_loco", tmp_path)
    file = tmp_path / "screw_bag/defects_config.json"
    entries = json.loads(file.read_text())
    entries[0] |= change
    file.write_text(json.dumps(entries))
    with pytest.raises(DatasetError, match=rf"defects_config\.json: entry [13].*{message}.*Unpack it anew"):
        load_dataset("mvtec_loco", root=tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, " cannot be read"),
        (b"{", " is not JSON"),
        (b"\xff", " is not JSON"),
        (b'[{"saturation_threshold": NaN}]', " is not JSON: it holds NaN"),
        (b'[{"saturation_threshold": 1e400}]', " is not JSON: it holds 1e400"),
        (b" " * 2**26 + b"[]", " is longer than 67,108,864 bytes"),
        (b"[]", ": takes a list of one or more defects"),
        (b'{"a": 1}', " holds dict where a list should be"),
        (b"[3]", ": entry 1, 3: an entry takes named fields"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_file_of_saturation_thresholds_that_is_not_one(tmp_path, content, message):
    read("mvtec_loco", tmp_path)
    file = tmp_path / "screw_bag/defects_config.json"
    file.unlink() if content is None else file.write_bytes(content)
    with pytest.raises(DatasetError, match=rf"defects_config\.json{message}.*Unpack it anew"):
        load_dataset("mvtec_loco", root=tmp_path)


# --- verify ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "message"),
    [(0, "logical_anomalies.000: an empty mask, no value reaches 1"), (9, r"pixel values \[9\] have no saturation")],
)
def test_verify_reads_each_region_of_loco(tmp_path, value, message):
    split = read("mvtec_loco", tmp_path)
    save(tmp_path / "screw_bag/ground_truth/logical_anomalies/000/001.png", value)
    for check in (verify, verify_masks):
        with pytest.raises(DatasetError, match=rf"1 of \d+ samples(.|\n)*{message}"):
            check(split)


def test_a_mask_level_that_no_mask_can_have_is_refused(tmp_path, monkeypatch):
    def own(root, *_):
        return Split("own", (), (), (Sample(Path("a.png"), None, 1, "dent", 256),))

    monkeypatch.setitem(LOADERS, "own", own)
    with pytest.raises(DatasetError, match="has a mask_level outside 1 to 255"):
        load_dataset("own")
