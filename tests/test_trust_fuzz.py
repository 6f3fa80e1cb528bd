"""Readers under random input: a right result or an error of ours, whatever a file holds, and nothing written.

A few derandomised examples of each by default; EFFAD_FUZZ_EXAMPLES=5000 looks for new ones, see tests/README.md.
"""

from __future__ import annotations

import contextlib
import datetime
import io
import json
import os
import shutil
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save
from trust import is_ours, notebook_folder

from effad_lib.backbones import file_sha256
from effad_lib.datasets import Split, load_dataset, verify_masks
from effad_lib.detector import EfficientAD
from effad_lib.distillation import load_teacher
from effad_lib.evaluation import data_of
from effad_lib.images import read_image, read_mask
from effad_lib.networks import PDN
from effad_lib.profiles import NOTEBOOKS, load_profile
from effad_lib.provenance import provenance_of
from effad_lib.runs import Run
from effad_lib.sweeps import load_sweep
from effad_lib.viewer import VERDICTS, Notes
from effad_lib.watching import collect

EXAMPLES = int(os.environ.get("EFFAD_FUZZ_EXAMPLES", "0"))

fuzz = settings(
    max_examples=EXAMPLES or 20,
    derandomize=not EXAMPLES,
    deadline=datetime.timedelta(seconds=60) if EXAMPLES else None,  # then what hangs is found too
    database=None,
    suppress_health_check=list(HealthCheck),
)


@contextlib.contextmanager
def ours() -> Iterator[None]:
    """Pass over an error that was written for people; any other is a fault of ours."""
    try:
        yield
    except (ValueError, RuntimeError) as error:
        if not is_ours(error):
            raise


@st.composite
def damaged(draw, wholes: list[bytes]) -> bytes:
    """One of some files with a few of its bytes replaced, added or lost, and perhaps cut."""
    data = bytearray(draw(st.sampled_from(wholes)))
    for _ in range(draw(st.integers(0, 4))):
        # Most of what decides about a file is at its beginning.
        start = draw(st.one_of(st.integers(0, min(200, len(data))), st.integers(0, len(data))))
        data[start : start + draw(st.integers(0, 8))] = draw(st.binary(max_size=8))
    return bytes(data[: draw(st.one_of(st.just(len(data)), st.integers(0, len(data))))])


NUMBERS = st.one_of(st.integers(-3, 300), st.integers(), st.floats())
PLAIN = st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=12))
VALUES = st.recursive(
    PLAIN,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=8,
)


def changed(known: dict) -> st.SearchStrategy[dict]:
    """A mapping of which some values are others, some names are missing and some unknown."""
    parts = {name: st.one_of(st.just(value), VALUES) for name, value in known.items()}
    gone = st.sets(st.sampled_from(sorted(known)), max_size=1)
    more = st.dictionaries(st.text(max_size=6), VALUES, max_size=1)
    return st.tuples(st.fixed_dictionaries(parts), gone, more).map(
        lambda some: {name: value for name, value in (some[0] | some[2]).items() if name not in some[1]}
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder for the files of all examples."""
    return tmp_path_factory.mktemp("fuzz")


# --- images ---------------------------------------------------------------------------------------------------------


def pictures() -> list[bytes]:
    """One picture in every format and mode that is read or refused."""
    pixels = Image.fromarray(np.random.default_rng(0).integers(0, 256, (66, 70, 3), dtype=np.uint8))
    modes = {
        "PNG": ("RGB", "RGBA", "L", "LA", "P", "1", "I;16"),
        "JPEG": ("RGB", "L", "CMYK"),
        "BMP": ("RGB", "L", "1"),
    }
    modes |= {"TIFF": ("RGB", "L", "P", "F", "CMYK", "LAB"), "WEBP": ("RGB", "RGBA"), "GIF": ("P",)}
    packed = []
    for kind, some in modes.items():
        for mode in some:
            image = pixels.convert("L").convert("I").convert("I;16") if mode == "I;16" else pixels.convert(mode)
            exif = Image.Exif()
            exif[0x0112] = 6
            for options in ({}, {"exif": exif} if kind in ("PNG", "JPEG", "TIFF", "WEBP") else {"comment": b"x"}):
                image.save(file := io.BytesIO(), format=kind, **options)
                packed.append(file.getvalue())
    for compression in ("tiff_lzw", "packbits", "jpeg", "group4"):
        pixels.convert("1" if compression == "group4" else "RGB").save(
            file := io.BytesIO(), "TIFF", compression=compression
        )
        packed.append(file.getvalue())
    return packed


@pytest.mark.filterwarnings("ignore")
@fuzz
@given(damaged(pictures()), st.sampled_from([None, (64, 64)]), st.sampled_from([None, (0, 4095)]))
def test_images_and_masks(place, data, size, levels):
    path = place / "a.png"
    path.write_bytes(data)
    with ours():
        image = read_image(path, size, levels)
        assert image.dtype == np.uint8 and image.ndim == 3 and len(image) == 3 and image.size
        assert size is None or image.shape[1:] == size
    with ours():
        assert read_mask(path).dtype == bool


# --- YAML -----------------------------------------------------------------------------------------------------------

GIVEN = {"rate": 0.5, "steps": 3, "sizes": [64, 96], "text": "{run}", "flag": True}
SHIPPED = [path.read_bytes() for kind in ("profiles", "sweeps") for path in sorted((NOTEBOOKS / kind).glob("*.yaml"))]
SIGNS = st.text(st.sampled_from("ab1-.:,[]{}&*!|>'\"#%@<~? \n\t\\0e_/=é\x00\ufeff"), max_size=60)
TAGS = st.sampled_from("int float bool null timestamp binary set omap pairs python/name:os.system merge value".split())
ODD = st.one_of(SIGNS, st.tuples(TAGS, SIGNS).map(lambda pair: f"a: !!{pair[0]} {pair[1]}"))
PROFILES = st.lists(changed({"notebook": "one", "run": "a", "parameters": GIVEN}) | VALUES, max_size=3)
SWEEPS = changed(
    {"notebooks": ["one"], "parameters": GIVEN, "grid": {"rate": [0.1]}, "cases": {"a": {"text": "b"}}, "seeds": [1]}
)


@pytest.fixture(scope="module")
def notebooks(place):
    """A folder with one notebook, for profiles and sweeps."""
    return notebook_folder(place)


@fuzz
@given(st.one_of(damaged(SHIPPED), ODD.map(lambda t: t.encode()), st.one_of(PROFILES, SWEEPS).map(lambda v: yaml.dump(v).encode())))  # fmt: skip  # noqa: E501
def test_profiles_sweeps_and_the_settings_of_runs(place, notebooks, data):
    for kind in ("profiles", "sweeps"):
        (notebooks / kind / "mine.yaml").write_bytes(data)
    runs = place / "runs"
    with ours():
        steps = load_profile("mine", runs=runs, notebooks=notebooks)
        assert all(step.folder.is_relative_to(runs) for step in steps)
    with ours():
        sweep = load_sweep("mine", runs=runs, notebooks=notebooks)
        assert all(run.folder.parent == runs / "mine" for run in sweep.runs)
    run = place / "stored"
    run.mkdir(exist_ok=True)
    (run / "parameters.yaml").write_bytes(data)
    (run / "model.safetensors").touch()
    with ours():
        data_of(Run(run))
    assert not runs.exists()


# --- models, teachers, checkpoints ----------------------------------------------------------------------------------


def detector() -> EfficientAD:
    """A small detector with a card of every field."""
    torch.manual_seed(0)
    small = EfficientAD("XS", channels=2, image_size=(64, 64))
    small.threshold = small.pixel_threshold = 0.5
    small.calibration = {"normals": 2, "scores": [0.1, 0.5], "pixels": [0.1, 0.5], "rank": 2}
    small.calibration |= {"false_alarm_rate": 0.0, "confidence": 0.95}
    return small


DETECTOR = detector()
WEIGHTS = {name: value.contiguous() for name, value in DETECTOR.state_dict().items()}
CARD = json.loads(json.dumps(DETECTOR.card_now({"data": "x"})))
TEACHER = {name: value.contiguous() for name, value in PDN("XS", 2).state_dict().items()}
PICTURE = np.zeros((1, 3, 64, 64), np.uint8)


def loads_or_refuses(path):
    """A model that is loaded decides: its threshold is a number or none, its maps are finite."""
    with ours():
        loaded = EfficientAD.load(path)
        assert loaded.threshold is None or np.isfinite(loaded.threshold)
        assert np.isfinite(loaded.inspect(PICTURE).score).all()


@fuzz
@given(changed(CARD))
def test_cards_of_models(place, card):
    path = place / "model.safetensors"
    path.write_bytes(save(WEIGHTS, {"effad_card": json.dumps(card)}))
    loads_or_refuses(path)


@fuzz
@given(damaged([save(WEIGHTS, {"effad_card": json.dumps(CARD)})]))
def test_weights_of_models(place, data):
    path = place / "model.safetensors"
    path.write_bytes(data)
    loads_or_refuses(path)


@fuzz
@given(damaged([save(TEACHER)]), changed({"size": "XS", "channels": 2, "sha256": ""}), st.booleans())
def test_teachers(place, data, card, fits):
    path = place / "teacher.safetensors"
    path.write_bytes(data)
    path.with_suffix(".json").write_text(json.dumps(card | ({"sha256": file_sha256(path)} if fits else {})))
    with ours():
        teacher, _ = load_teacher(path)
        assert teacher(torch.zeros(1, 3, 64, 64)).isfinite().all()


def checkpoint() -> bytes:
    """A small checkpoint."""
    torch.save({"step": 3, "weights": torch.zeros(4), "kept": [(0.5, 3)]}, file := io.BytesIO())
    return file.getvalue()


@pytest.mark.filterwarnings("ignore")
@fuzz
@given(damaged([checkpoint()]))
def test_checkpoints(place, data):
    path = place / "checkpoints" / "last.pt"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    with ours():
        assert isinstance(Run(place).load_checkpoint("last"), dict)


# --- data sets ------------------------------------------------------------------------------------------------------

FOLDERS = "train test validation ground_truth good ok dent Data Images Normal Anomaly Masks 000 .hidden _ a".split()
ENDINGS = st.sampled_from([".png", "_mask.png", ".txt"])
TREES = st.lists(
    st.tuples(st.lists(st.sampled_from(FOLDERS), max_size=4), st.integers(0, 99), ENDINGS),
    max_size=40,
)


@fuzz
@given(TREES, st.sampled_from(["folder", "mvtec_ad", "mvtec_ad_2", "mvtec_loco", "btad", "visa"]), st.text(max_size=5))
def test_folders_of_data_sets(place, tree, name, category):
    root = place / "tree" / "screw"
    shutil.rmtree(root.parent, ignore_errors=True)
    root.mkdir(parents=True)
    for folders, number, ending in tree:
        path = root.joinpath(*folders, f"{number}{ending}")
        with contextlib.suppress(OSError):  # a file is where a folder should be
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    before = {path: path.stat().st_mtime_ns for path in place.rglob("*")}
    with ours():
        split = load_dataset(name, root=root.parent if name != "folder" else root, category=category)
        found = [path for sample in (*split.train, *split.test) for path in (sample.image, sample.mask) if path]
        assert isinstance(split, Split) and all(path.resolve().is_relative_to(root) for path in found)
        with ours():
            verify_masks(split)
    assert {path: path.stat().st_mtime_ns for path in place.rglob("*")} == before


ENTRY = {"defect_name": "a", "pixel_value": 255, "saturation_threshold": 3, "relative_saturation": False}
ROW = st.lists(st.sampled_from(["screw", "train", "test", "normal", "anomaly", "", "screw/Data/Images/Normal/0.png", "../x.png", '"', "\r", "é", "a\0"]), max_size=6)  # fmt: skip  # noqa: E501


@fuzz
@given(st.lists(changed(ENTRY) | VALUES, max_size=3), st.binary(max_size=30), st.booleans())
def test_saturations_of_loco(place, entries, data, is_json):
    root = place / "loco" / "screw_bag"
    (root / "train" / "good").mkdir(parents=True, exist_ok=True)
    for k in range(15):
        (root / "train" / "good" / f"{k}.png").touch()
    (root / "defects_config.json").write_bytes(json.dumps(entries).encode() if is_json else data)
    with ours():
        assert load_dataset("mvtec_loco", root=root.parent).saturation


@fuzz
@given(st.lists(ROW, max_size=5), st.binary(max_size=30), st.booleans())
def test_tables_of_visa(place, rows, data, is_table):
    root = place / "visa"
    for k in range(15):
        path = root / "screw" / "Data" / "Images" / "Normal" / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    known = [["screw", "train", "normal", f"screw/Data/Images/Normal/{k}.png", ""] for k in range(1, 15)]
    lines = ["object,split,label,image,mask", *(",".join(row) for row in [*known, *rows])]
    (root / "split_csv").mkdir(exist_ok=True)
    (root / "split_csv" / "1cls.csv").write_bytes("\n".join(lines).encode() if is_table else data)
    with ours():
        split = load_dataset("visa", root=root)
        assert all(sample.image.is_relative_to(root) for sample in (*split.train, *split.test))


# --- what runs and people leave -------------------------------------------------------------------------------------

RESULT = {"file": "a.png", "score": 1.0, "threshold": 2.0, "decision": "good", "marked": None, "error": "", "size": 1, "changed": 1}  # fmt: skip  # noqa: E501
NOTES = b"file,verdict,note,changed\na.png,good,fine,2026\nb.png,,,\n"


@pytest.mark.filterwarnings("ignore")
@fuzz
@given(changed(RESULT) | VALUES, damaged([json.dumps(RESULT).encode()]), damaged([NOTES]))
def test_results_and_notes(place, result, data, notes):
    folder = place / "watched" / "results"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "a.json").write_text(json.dumps(result))
    (folder / "b.json").write_bytes(data)
    collect(folder.parent)
    (place / "notes.csv").write_bytes(notes)
    with ours():
        assert Notes(place / "notes.csv")["a.png"].verdict in VERDICTS
    for name in ("metrics.json", "sources.json", "provenance.json"):
        (folder.parent / name).write_bytes(data)
    for read in (lambda run: run.metrics, lambda run: run.sources, lambda run: provenance_of(run.folder)):
        with ours():
            assert isinstance(read(Run(folder.parent)), (dict, list))
