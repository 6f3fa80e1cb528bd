"""What several rooms' tests share: a small detector, calibrated but untrained, and pictures to show it."""

import contextlib
import resource
import signal

import numpy as np
import pytest
import torch
from PIL import Image

from effad_lib.calibration import calibrate
from effad_lib.detector import EfficientAD

# Started in the background by a shell, the tests and all that they start would be deaf to Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)


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
