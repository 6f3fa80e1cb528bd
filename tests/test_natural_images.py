"""The natural-image sampler: its views, what it leaves out, and that a resumed one draws the same."""

import numpy as np
import pytest
import torch
from PIL import Image

from effad_lib.images import ImageError, NaturalImages, packaged_photographs, read_image


@pytest.fixture
def photographs(tmp_path, picture):
    """Five coloured pictures of different sizes and shapes."""
    for index, (height, width) in enumerate([(30, 40), (40, 30), (64, 64), (20, 90), (100, 100)]):
        picture(tmp_path / "photos" / f"class{index}" / "a.png", size=(height, width), seed=index)
    return tmp_path / "photos"


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("crop_scale", [None, (0.3, 1.0)])
def test_natural_views_have_shape_range_and_repeat(photographs, crop_scale):
    natural = NaturalImages(photographs)
    views = natural.sample(12, (32, 48), generator(), crop_scale=crop_scale)
    assert len(natural) == 5 and natural.skipped == {}
    assert views.shape == (12, 3, 32, 48) and views.dtype == torch.float32
    assert views.min() >= 0 and 0.5 < views.max() <= 1
    again = NaturalImages(photographs, memory_gb=0).sample(12, (32, 48), generator(), crop_scale=crop_scale)
    assert torch.equal(views, again), "what is kept in memory must not change the views"
    assert not torch.equal(views, natural.sample(12, (32, 48), generator(1), crop_scale=crop_scale))


def test_paper_view_is_the_centre_of_twice_the_size(tmp_path, rng):
    pixels = rng.integers(0, 256, (64, 96, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    view = NaturalImages(tmp_path).sample(1, (32, 48), generator(), grayscale=0.0)[0]
    # Twice 32x48 is the photograph itself: nothing is resized, the centre is cut.
    assert torch.equal(view, torch.from_numpy(pixels[16:48, 24:72]).permute(2, 0, 1).float() / 255)


def test_share_of_grey_views(photographs):
    natural = NaturalImages(photographs)
    for probability, low, high in ((0.3, 0.2, 0.4), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)):
        views = natural.sample(400, (8, 8), generator(), grayscale=probability)
        grey = ((views[:, 0] == views[:, 1]) & (views[:, 1] == views[:, 2])).flatten(1).all(1)
        assert low <= grey.float().mean() <= high
    default = natural.sample(50, (8, 8), generator())
    assert torch.equal(default, natural.sample(50, (8, 8), generator(), grayscale=0.3))


def test_every_photograph_is_drawn(tmp_path):
    for index in range(6):
        Image.fromarray(np.full((16, 16, 3), 40 * index, np.uint8)).save(tmp_path / f"{index}.png")
    views = NaturalImages(tmp_path).sample(120, (8, 8), generator())
    values = (views.mean((1, 2, 3)) * 255).round().int().tolist()
    assert all(values.count(40 * index) >= 8 for index in range(6))


def test_unreadable_photographs_are_skipped_and_reported(photographs):
    (photographs / "class0/broken.png").write_bytes(b"no picture")
    natural = NaturalImages(photographs)
    with pytest.warns(UserWarning, match=r"left out: .*broken\.png"):
        views = natural.sample(60, (16, 16), generator())
    assert views.shape == (60, 3, 16, 16)
    [message] = natural.skipped.values()
    assert "broken.png" in message


@pytest.mark.filterwarnings("ignore:natural image left out")
def test_a_resumed_sampler_draws_what_an_uninterrupted_one_draws(photographs):
    """A resumed run has a fresh sampler and the saved generator, whatever was skipped before."""
    (photographs / "class0/broken.png").write_bytes(b"no picture")
    uninterrupted, draw = NaturalImages(photographs), generator()
    uninterrupted.sample(60, (16, 16), draw)
    assert uninterrupted.skipped
    resumed = generator()
    resumed.set_state(draw.get_state())
    expected = uninterrupted.sample(60, (16, 16), draw)
    assert torch.equal(NaturalImages(photographs).sample(60, (16, 16), resumed), expected)


@pytest.mark.filterwarnings("ignore:natural image left out")
def test_no_usable_photograph_is_an_error(tmp_path):
    with pytest.raises(ImageError, match="no image below"):
        NaturalImages(tmp_path)
    with pytest.raises(ImageError, match="no such folder"):
        NaturalImages(tmp_path / "absent")
    for name in "ab":
        (tmp_path / f"{name}.png").write_bytes(b"")
    with pytest.raises(ImageError, match="none of the natural images"):
        NaturalImages(tmp_path).sample(1, (8, 8), generator())


def test_packaged_photographs_can_all_be_read():
    paths = packaged_photographs()
    assert len(paths) >= 8 and NaturalImages().paths == paths
    for path in paths:
        assert min(read_image(path).shape[1:]) >= 256
