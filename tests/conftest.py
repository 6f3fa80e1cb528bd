"""What several rooms' tests share: a small detector, calibrated but untrained, and pictures to show it."""

import contextlib
import resource
import shutil
import signal

import numpy as np
import pytest
import torch
import yaml
from counting import CELLS, notebook
from PIL import Image
from striped import CHANNELS, SIDE, striped, write_teacher
from xdist.scheduler import LoadFileScheduling

from effad_lib.calibration import calibrate
from effad_lib.datasets import load_dataset
from effad_lib.detector import EfficientAD
from effad_lib.evaluation import data_of, evaluate
from effad_lib.export import ExportSettings, export
from effad_lib.images import find_images, load_images, packaged_photographs
from effad_lib.networks import PDN
from effad_lib.runs import Run, write_text
from effad_lib.sweeps import SweepSettings
from effad_lib.training import TrainingSettings, train
from effad_lib.viewer import of_run, open_viewer

# Started in the background by a shell, the tests and all that they start would be deaf to Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)


class NotebooksTogether(LoadFileScheduling):
    """For several processes: a file's tests stay in one, and so do all notebooks, as some read another one's run."""

    def _split_scope(self, nodeid: str) -> str:
        file = super()._split_scope(nodeid)
        return "notebooks" if file.endswith(".ipynb") else file


def pytest_xdist_make_scheduler(config, log):
    return NotebooksTogether(config, log)


@pytest.fixture
def full_disk():
    """A context in which no file can grow beyond so many bytes: the system itself refuses, as on a full disk."""

    @contextlib.contextmanager
    def limited(size: int):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limited


@pytest.fixture(scope="session")
def small_detector() -> EfficientAD:
    """An XS detector of 8 channels for 64×64 pixels: random weights, quantiles and threshold from random images."""
    torch.manual_seed(0)
    detector = EfficientAD("XS", channels=8, image_size=(64, 64))
    calibrate(detector, torch.randint(256, (4, 3, 64, 64), dtype=torch.uint8))
    return detector


@pytest.fixture(scope="session")
def model(small_detector, tmp_path_factory):
    """The small detector as a file."""
    return small_detector.save(tmp_path_factory.mktemp("model") / "model.safetensors", {"data": "random images"})


@pytest.fixture
def stripes(tmp_path):
    """A folder of 16 good pictures of stripes, 64×64."""
    folder = tmp_path / "stripes"
    (folder / "train" / "good").mkdir(parents=True)
    for index in range(16):
        Image.fromarray(striped(index)).save(folder / "train" / "good" / f"{index:03}.png")
    return folder


@pytest.fixture
def teacher(tmp_path):
    """A small teacher with random weights."""
    torch.manual_seed(0)
    return write_teacher(tmp_path / "teacher.safetensors", PDN("XS", CHANNELS))


@pytest.fixture
def start(tmp_path, stripes, teacher):
    """Train with small settings in a named run folder; keyword arguments change the settings."""
    split = load_dataset("folder", root=stripes)

    def start(name: str, split=split, **changes) -> tuple[EfficientAD, Run]:
        values = {"steps": 12, "validate_every": 4, "checkpoint_every": 4, "learning_rate": 1e-3, **changes}
        settings = TrainingSettings(
            run_folder=str(tmp_path / name),
            dataset="folder",
            size="XS",
            teacher=str(teacher),
            image_size=[SIDE, SIDE],
            penalty_crop_scale=[0.1, 0.5],
            **values,
        )
        return train(settings, split), Run(tmp_path / name)

    return start


@pytest.fixture(scope="session")
def stripes_with_dents(tmp_path_factory):
    """A folder, not to be changed, of noisy stripes in the layout of MVTec AD: 16 to train on, 4 good, 4 dented."""
    folder, rng = tmp_path_factory.mktemp("stripes") / "data", np.random.default_rng(0)
    dent, rows = np.s_[20:36, 20:44], np.arange(64)[:, None, None]
    for kind, count in (("train/good", 16), ("test/good", 4), ("test/dent", 4)):
        for k in range(count):
            pixels = 128 + 60 * np.sin(rows / 3 + rng.uniform(0, 6)) + rng.normal(0, 8, (64, 64, 3))
            truth, files = np.zeros((64, 64)), {f"{kind}/{k}.png": pixels}
            if kind == "test/dent":
                pixels[dent], truth[dent] = 20, 255
                files[f"ground_truth/dent/{k}_mask.png"] = truth
            for name, values in files.items():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(values.clip(0, 255).astype(np.uint8)).save(folder / name)
    return folder


@pytest.fixture(scope="session")
def evaluated_run(tmp_path_factory):
    """An evaluated run, not to be changed, beside its `data` of 80×96 pixels: three good images, two dents, a hole."""
    root, rng = tmp_path_factory.mktemp("evaluated"), np.random.default_rng(0)

    def write(name, spread, defect=None):
        pixels, path = rng.integers(128 - spread, 128 + spread, (80, 96, 3), dtype=np.uint8), root / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if defect:
            pixels[defect], truth = 255, np.zeros((80, 96), np.uint8)
            truth[defect] = 255
            mask = root / "data" / "ground_truth" / path.parent.name / f"{path.stem}_mask.png"
            mask.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(truth).save(mask)
        Image.fromarray(pixels).save(path)

    for k in range(13):
        write(f"train/good/{k}.png", 60)
    for k, spread in enumerate((30, 60, 127)):
        write(f"test/good/{k}.png", spread)
    write("test/dent/0.png", 60, np.s_[20:30, 40:60])
    write("test/dent/1.png", 30, np.s_[0:8, 0:8])
    write("test/hole/0.png", 60, np.s_[60:80, 66:96])
    torch.manual_seed(140)  # a random detector that ranks the images as the assertion below says
    run, detector = Run(root / "run"), EfficientAD("XS", channels=8, image_size=(64, 64))
    made = {"dataset": "folder", "data_root": str(root / "data"), "category": "", "seed": 0, "validation_share": 0.25}
    write_text(run.folder / "parameters.yaml", yaml.safe_dump(made))
    detector.save(run.model, {"data": "random images"})
    split = data_of(run)
    calibrate(detector, load_images([sample.image for sample in split.validation], detector.image_size))
    detector.save(run.model)
    found = evaluate(detector, split.test)
    # From the highest: a dent, a good image, the hole, a good one | the stored threshold | the other dent, a good one.
    ranks, high = np.argsort(-found.scores), sorted(found.scores)[-2:]
    assert ranks.tolist() == [0, 4, 5, 3, 1, 2] and (found.scores > found.threshold).sum() == 4, "take another seed"
    assert high[0] < 0.1 and high[1] > 0.12, "take another seed"
    found.save(run.folder)
    run.finish(found.metrics())
    return run.folder


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def picture():
    """A function that writes a random picture (seeded) of the given size and mode, and returns its path."""

    def write(path, size=(80, 96), seed=0, mode="RGB"):
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).convert(mode).save(path)
        return path

    return write


@pytest.fixture
def run(evaluated_run, tmp_path):
    """The evaluated run and its data set as copies of one's own."""
    for name in ("data", "run"):
        shutil.copytree(evaluated_run.with_name(name), tmp_path / name)
    for name in ("scores.csv", "parameters.yaml"):
        text = (tmp_path / "run" / name).read_text(encoding="utf-8")
        (tmp_path / "run" / name).write_text(text.replace(str(evaluated_run.parent), str(tmp_path)), encoding="utf-8")
    return tmp_path / "run"


@pytest.fixture
def viewer(run):
    """A viewer of the evaluated run, without a browser."""
    return open_viewer(of_run(run))


@pytest.fixture
def counting(tmp_path):
    """A function that writes a sweep of a notebook that counts, saving every number; returns arguments."""
    folder = tmp_path / "notebooks"
    notebook(folder / "counting.ipynb", *CELLS)
    (folder / "sweeps").mkdir()

    def write(text, **settings):
        (folder / "sweeps" / "mine.yaml").write_text(f"notebooks: [counting]\n{text}")
        values = {"sweep": "mine", "runs": str(tmp_path / "runs"), "workers": 2} | settings
        return {"settings": SweepSettings(**values), "notebooks": folder}

    return write


@pytest.fixture(scope="session")
def normals(tmp_path_factory):
    """Six good images of 96×120 pixels: parts of one photograph."""
    folder = tmp_path_factory.mktemp("normals")
    coffee = next(path for path in packaged_photographs() if path.stem == "coffee")
    with Image.open(coffee) as photograph:
        for index in range(6):
            photograph.crop((40 * index, 30 * index, 40 * index + 120, 30 * index + 96)).save(folder / f"{index}.png")
    return folder


@pytest.fixture(scope="session")
def trained(tmp_path_factory, normals):
    """A function that makes a calibrated detector with random weights of 8 channels; returns it and its file."""
    made = {}

    def make(size="XS", image_size=(64, 64), padding=False):
        key = (size, image_size, padding)
        if key not in made:
            torch.manual_seed(0)
            detector = EfficientAD(size, 8, padding, image_size)
            calibrate(detector, load_images(find_images(normals), image_size))
            folder = tmp_path_factory.mktemp("trained")
            made[key] = detector, detector.save(folder / "model.safetensors", {"data": "photograph"})
        return made[key]

    return make


@pytest.fixture(scope="session")
def any_size(trained, normals, tmp_path_factory):
    """An export that takes images of any size, with its model."""
    detector, file = trained("XS", (64, 96))
    path = tmp_path_factory.mktemp("any") / "m.onnx"
    return detector, export(file, ExportSettings(any_size=True, compare=2), normals=normals, out=path)[0]
