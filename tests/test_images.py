"""Images in: what is read exactly, what is refused by name, and the augmentation."""

import os
import struct
import sys
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional as reference
from trust import YCBCR

from effad_lib.images import (
    ImageError,
    augment_colour,
    check_levels,
    find_images,
    image_size,
    load_images,
    read_image,
    read_mask,
    read_regions,
    to_float,
    to_grey,
)


def noise(rng, *shape):
    return rng.integers(0, 256, shape, dtype=np.uint8)


def save(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


def png16(path, pixels):
    """Write a 16-bit PNG of uint16 [H, W, channels] chunk by chunk: Pillow can only write the grey one."""
    height, width, channels = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n"
    for name, body in ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        data += struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    path.write_bytes(data)
    return path


# --- finding and reading --------------------------------------------------------------------------


def test_find_images_is_sorted_nested_and_picky(tmp_path, rng):
    for name in ("b.png", "a.JPG", "deep/er/c.tif", ".hidden.png", "notes.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    assert [path.relative_to(tmp_path).as_posix() for path in find_images(tmp_path)] == [
        "a.JPG",
        "b.png",
        "deep/er/c.tif",
    ]


def test_find_images_leaves_out_hidden_folders(tmp_path, rng):
    """JupyterLab keeps copies of opened files in `.ipynb_checkpoints`: they must not be counted twice."""
    kept = save(tmp_path / "a.png", noise(rng, 4, 4))
    save(tmp_path / ".ipynb_checkpoints/a-checkpoint.png", noise(rng, 4, 4))
    assert find_images(tmp_path) == [kept]


@pytest.mark.skipif(sys.platform == "win32", reason="making links needs a privilege on Windows")
def test_find_images_does_not_leave_the_folder(tmp_path, rng):
    inside = save(tmp_path / "in/a.png", noise(rng, 4, 4))
    outside = save(tmp_path / "out/b.png", noise(rng, 4, 4))
    (tmp_path / "in/link.png").symlink_to(outside)
    (tmp_path / "in/folder").symlink_to(outside.parent)
    (tmp_path / "in/broken.png").symlink_to(tmp_path / "nowhere.png")
    assert find_images(tmp_path / "in") == [inside]


def test_find_images_has_the_order_of_sorted_paths(tmp_path):
    for name in ("a/2.png", "a/10.png", "a.png", "a-b/1.png", "a/b/1.png", "B/1.png", "a0.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert find_images(tmp_path) == sorted(path for path in tmp_path.rglob("*") if path.is_file())


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, rng, monkeypatch):
    save(tmp_path / "a.png", noise(rng, 4, 4))
    (tmp_path / "closed").mkdir()

    def scandir(folder, real=os.scandir):
        if os.path.basename(folder) == "closed":
            raise PermissionError(13, "Permission denied")
        return real(folder)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(ImageError, match=r"closed: the folder cannot be listed \(Permission denied\)"):
        find_images(tmp_path)


def test_find_images_in_an_empty_or_missing_folder(tmp_path):
    with pytest.raises(ImageError, match="no image below"):
        find_images(tmp_path)
    with pytest.raises(ImageError, match=r"absent: there is no such folder"):
        find_images(tmp_path / "absent")


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "webp"])
def test_rgb_is_read_exactly(tmp_path, rng, suffix):
    pixels = noise(rng, 5, 7, 3)
    options = {"lossless": True} if suffix == "webp" else {}
    image = read_image(save(tmp_path / f"a.{suffix}", pixels, **options))
    assert image.dtype == np.uint8 and image.shape == (3, 5, 7)
    assert np.array_equal(image, pixels.transpose(2, 0, 1))


def test_grey_palette_and_transparent_become_rgb(tmp_path, rng):
    grey, rgba, colours = noise(rng, 5, 7), noise(rng, 5, 7, 4), noise(rng, 16, 3)
    assert np.array_equal(read_image(save(tmp_path / "l.png", grey)), np.stack([grey] * 3))
    assert np.array_equal(read_image(save(tmp_path / "rgba.png", rgba)), rgba[..., :3].transpose(2, 0, 1))
    index = rng.integers(0, 16, (5, 7), dtype=np.uint8)
    palette = Image.fromarray(index).convert("P")
    palette.putdata(index.ravel().tolist())
    palette.putpalette(colours.ravel().tolist())
    palette.save(tmp_path / "p.png")
    assert np.array_equal(read_image(tmp_path / "p.png"), colours[index].transpose(2, 0, 1))
    grey_alpha = np.stack([grey, noise(rng, 5, 7)], axis=-1)
    assert np.array_equal(read_image(save(tmp_path / "la.png", grey_alpha)), np.stack([grey] * 3))
    assert np.array_equal(read_image(save(tmp_path / "1.png", grey > 99)), np.stack([(grey > 99) * 255] * 3))


@pytest.mark.parametrize(
    ("orientation", "upright"),
    [
        (1, lambda x: x),
        (2, lambda x: x[:, ::-1]),
        (3, lambda x: x[::-1, ::-1]),
        (5, lambda x: x.transpose(1, 0, 2)),
        (6, lambda x: np.rot90(x, -1)),
        (8, lambda x: np.rot90(x)),
    ],
)
def test_exif_orientation_is_applied(tmp_path, rng, orientation, upright):
    pixels = noise(rng, 5, 7, 3)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path / "a.png", pixels, exif=exif)
    assert np.array_equal(read_image(path), upright(pixels).transpose(2, 0, 1))
    assert image_size(path) == upright(pixels).shape[:2]
    marked = np.repeat(pixels[..., :1], 3, axis=2)
    mask = read_mask(save(tmp_path / "a_mask.png", marked, exif=exif), image_size(path))
    assert np.array_equal(mask, upright(marked)[..., 0] >= 128) and 0 < mask.mean() < 1


@pytest.mark.parametrize("ending", ["png", "jpg", "tif", "bmp", "webp"])
def test_the_size_of_an_image_is_told_by_its_head_alone(tmp_path, rng, ending):
    path = save(tmp_path / f"a.{ending}", noise(rng, 300, 500, 3))
    if ending not in ("tif", "webp"):  # whose heads lie behind the pixels, or are read with them
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(ImageError):
            read_image(path)
    assert image_size(path) == (300, 500)


def test_resizing_is_antialiased_bilinear(tmp_path, rng):
    pixels = noise(rng, 96, 64, 3)
    path = save(tmp_path / "a.png", pixels)
    small = read_image(path, (24, 32))
    image = torch.from_numpy(pixels).permute(2, 0, 1).float()
    expected = torch.nn.functional.interpolate(image[None], (24, 32), mode="bilinear", antialias=True)[0]
    assert small.shape == (3, 24, 32)
    assert np.abs(small - expected.numpy()).max() <= 1
    assert np.array_equal(read_image(path, (96, 64)), read_image(path))


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_16_bit_is_refused(tmp_path, rng, channels):
    path = png16(tmp_path / "deep.png", rng.integers(0, 65536, (5, 7, channels), dtype=np.uint16))
    with pytest.raises(ImageError, match=r"deep\.png.*8-bit"):
        read_image(path)


def test_16_bit_grey_is_read_by_its_levels(tmp_path):
    values = np.array([[0, 100, 101, 2148, 4094, 4095, 4096, 65535]], np.uint16)
    expected = np.rint(255 * (np.clip(values.astype(float), 100, 4095) - 100) / 3995)
    for name in ("deep.png", "deep.tif"):
        path = save(tmp_path / name, values)
        assert np.array_equal(read_image(path, levels=(100, 4095)), np.stack([expected] * 3))
        with pytest.raises(
            ImageError, match=rf"{name}: image mode I.*takes it with the values of black and white, such as --levels 0"
        ):
            read_image(path)
        with pytest.raises(ImageError, match=r"not supported. Save it as 8-bit"):
            read_mask(path)
    colour = png16(tmp_path / "colour.png", np.zeros((5, 7, 3), np.uint16))
    with pytest.raises(ImageError, match="16 bits a channel is not supported"):
        read_image(colour, levels=(0, 65535))  # Pillow reads the upper 8 bits only
    eight = save(tmp_path / "eight.png", np.full((5, 7), 200, np.uint8))
    assert (read_image(eight, levels=(0, 4095)) == 200).all()
    for levels in ((1,), (5, 5), (3, 2)):
        with pytest.raises(ImageError, match="takes the values of black and of white"):
            check_levels(levels)


@pytest.mark.parametrize("mode", ["CMYK", "F", "I", "YCbCr"])
def test_other_modes_are_refused(tmp_path, mode):
    path = tmp_path / "odd.tif"
    Image.new(mode, (7, 5)).save(path)
    says = YCBCR if mode == "YCbCr" else f"image mode {mode}"
    with pytest.raises(ImageError, match=rf"odd\.tif: {says}"):
        read_image(path)


@pytest.mark.parametrize("read", [read_image, read_mask])
def test_unreadable_files_are_named(tmp_path, rng, read):
    whole = save(tmp_path / "whole.png", noise(rng, 40, 40, 3)).read_bytes()
    photo = save(tmp_path / "whole.jpg", noise(rng, 40, 40, 3)).read_bytes()
    files = {
        "cut.png": whole[: len(whole) // 2],
        "cut.jpg": photo[: len(photo) // 2],
        "header.png": whole[:20],
        "empty.png": b"",
        "text.png": b"these are words",
        "flipped.png": whole[:60] + bytes(255 - byte for byte in whole[60:90]) + whole[90:],
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ImageError, match=name):
            read(tmp_path / name)
    with pytest.raises(ImageError, match="absent"):
        read(tmp_path / "absent.png")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(ImageError, match="folder"):
        read(tmp_path / "folder.png")


# --- masks ----------------------------------------------------------------------------------------


def test_images_smaller_than_the_networks_take_are_not_enlarged(tmp_path, rng):
    path = save(tmp_path / "thumbnail.png", noise(rng, 63, 200, 3))
    with pytest.raises(ImageError, match=r"thumbnail\.png: 200×63 pixels are too small; each side takes 64"):
        read_image(path, (128, 128))
    with pytest.raises(ImageError, match="too small"):
        load_images([path], (64, 64))
    assert read_image(path).shape == (3, 63, 200), "as a picture to show it is fine"


def test_masks_are_cut_at_half_of_full_scale(tmp_path):
    values = np.array([[0, 1, 127, 128, 255]], np.uint8)
    expected = np.array([[False, False, False, True, True]])
    mask = read_mask(save(tmp_path / "l.png", values), (1, 5))
    assert mask.dtype == bool and np.array_equal(mask, expected)
    assert np.array_equal(read_mask(save(tmp_path / "rgb.png", np.stack([values] * 3, -1))), expected)
    assert np.array_equal(read_mask(save(tmp_path / "1.png", expected)), expected)


def test_mask_of_another_size_is_refused(tmp_path):
    path = save(tmp_path / "m.png", np.zeros((5, 7), np.uint8))
    assert read_mask(path, (5, 7)).shape == (5, 7)
    with pytest.raises(ImageError, match=r"m\.png: mask of \(5, 7\), its image has \(7, 5\)"):
        read_mask(path, (7, 5))


def test_a_folder_of_masks_is_read_as_regions_and_as_their_union(tmp_path):
    first, second = np.zeros((2, 5, 7), np.uint8)
    first[0], second[1:, 2] = 253, 7
    save(tmp_path / "000/001.png", second)
    save(tmp_path / "000/000.png", first)
    assert np.array_equal(read_regions(tmp_path / "000", (5, 7)), [first, second])
    assert np.array_equal(read_regions(tmp_path / "000/001.png"), [second])
    assert np.array_equal(read_mask(tmp_path / "000", (5, 7), 1), (first > 0) | (second > 0))
    assert np.array_equal(read_mask(tmp_path / "000"), first > 0)
    assert not read_mask(tmp_path / "000/001.png", level=8).any() and read_mask(tmp_path / "000/001.png", level=7).any()
    save(tmp_path / "000/002.png", np.zeros((7, 5), np.uint8))
    for shape in (None, (5, 7)):
        with pytest.raises(ImageError, match=r"002\.png: mask of \(7, 5\), its image has \(5, 7\)"):
            read_mask(tmp_path / "000", shape)


def test_masks_with_another_full_scale_are_not_misread(tmp_path):
    """300 of 65,535 and a mask of floats: either read by their own scale or refused, never clipped to 8 bits."""
    deep, real = np.zeros((5, 7), np.uint16), np.zeros((5, 7), np.float32)
    deep[0], real[0] = 300, 1.0
    for name, pixels, marked in (("deep.png", deep, 0), ("real.tif", real, 7)):
        path = save(tmp_path / name, pixels)
        try:
            assert read_mask(path).sum() == marked
        except ImageError as error:
            assert name in str(error)


# --- many images ----------------------------------------------------------------------------------


def test_load_images_keeps_order_and_dtype(tmp_path, rng):
    paths = [save(tmp_path / f"{index}.png", np.full((80, 90, 3), index, np.uint8)) for index in range(40)]
    order = rng.permutation(40)
    images = load_images([paths[index] for index in order], (64, 72))
    assert images.dtype == torch.uint8 and images.shape == (40, 3, 64, 72)
    assert images.amin((1, 2, 3)).tolist() == images.amax((1, 2, 3)).tolist() == order.tolist()
    assert torch.equal(images[3], torch.from_numpy(read_image(paths[order[3]], (64, 72))))


def test_load_images_names_the_bad_file_and_size(tmp_path, rng):
    good = save(tmp_path / "good.png", noise(rng, 64, 64, 3))
    (tmp_path / "bad.png").write_bytes(b"")
    with pytest.raises(ImageError, match=r"bad\.png"):
        load_images([good, tmp_path / "bad.png", good], (64, 64))
    with pytest.raises(ImageError, match=r"\(64, 63\).*at least 64"):
        load_images([good], (64, 63))


def test_to_float_spans_zero_to_one():
    images = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    result = to_float(images)
    assert result.dtype == torch.float32 and images.dtype == torch.uint8
    assert torch.allclose(result.flatten(), torch.linspace(0, 1, 256))


# --- colour augmentation --------------------------------------------------------------------------

ADJUST = (reference.adjust_brightness, reference.adjust_contrast, reference.adjust_saturation)


def factors_that_explain(image, changed):
    """Return, for each of torchvision's three changes, the factor in [0.8, 1.2] that gives `changed`, or None.

    Away from black and white each change is linear in its factor, so two references give the factor.
    """
    found = []
    for adjust in ADJUST:
        base, step = adjust(image, 1.0), adjust(image, 1.1) - adjust(image, 1.0)
        factor = float(1 + 0.1 * ((changed - base) * step).sum() / (step * step).sum())
        explains = 0.8 <= factor <= 1.2 and torch.allclose(adjust(image, factor), changed, atol=1e-5)
        found.append(factor if explains else None)
    return found


def test_exactly_one_of_three_changes_as_torchvision_makes_them():
    count = 300
    images = 0.35 + 0.3 * torch.rand((count, 3, 6, 5), generator=torch.Generator().manual_seed(1))
    before = images.clone()
    changed = augment_colour(images, torch.Generator().manual_seed(0))
    assert torch.equal(images, before), "the input must stay as it was"
    assert changed.shape == images.shape and changed.dtype == torch.float32
    found = [factors_that_explain(image, result) for image, result in zip(images, changed, strict=True)]
    assert all(sum(factor is not None for factor in row) == 1 for row in found)
    for kind in range(3):
        factors = np.array([row[kind] for row in found if row[kind] is not None])
        assert 70 <= len(factors) <= 130, "a third of 300, give or take"
        assert factors.min() < 0.83 and factors.max() > 1.17 and abs(factors.mean() - 1) < 0.05


def test_augmentation_is_seeded_and_stays_in_range(rng):
    images = torch.from_numpy(rng.random((50, 3, 8, 8), dtype=np.float32)).round(decimals=1)
    first, again, other = (augment_colour(images, torch.Generator().manual_seed(s)) for s in (5, 5, 6))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.min() >= 0 and first.max() <= 1 and (first == 1).any()


def test_grey_is_torchvisions(rng):
    images = torch.from_numpy(rng.random((2, 3, 8, 9), dtype=np.float32))
    assert torch.allclose(to_grey(images), reference.rgb_to_grayscale(images), atol=1e-6)
