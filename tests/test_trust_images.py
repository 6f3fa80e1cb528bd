"""Bad images and masks in bulk: what is accepted is read right, whatever else is refused by name before it is used."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import zlib

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from trust import YCBCR, command_refused, refused

from effad_lib.cli import main
from effad_lib.datasets import load_dataset, verify
from effad_lib.images import check_levels, check_size, read_image, read_mask
from effad_lib.runs import PROJECT

PIXELS = np.random.default_rng(0).integers(0, 256, (72, 80, 3), dtype=np.uint8)
GREY = PIXELS[..., 0]


def packed(pixels=PIXELS, kind="PNG", mode=None, **options):
    """The bytes of a picture in a format of Pillow's."""
    file, image = io.BytesIO(), Image.fromarray(pixels) if isinstance(pixels, np.ndarray) else pixels
    (image.convert(mode) if mode else image).save(file, format=kind, **options)
    return file.getvalue()


def png(width, height, bits=8, colours=2, rows=b"", name=b"IDAT"):
    """A PNG whose header says what one likes, whatever its data are."""
    header, data = struct.pack(">IIBBBBB", width, height, bits, colours, 0, 0, 0), b"\x89PNG\r\n\x1a\n"
    for chunk, body in ((b"IHDR", header), (name, zlib.compress(rows)), (b"IEND", b"")):
        data += struct.pack(">I", len(body)) + chunk + body + struct.pack(">I", zlib.crc32(chunk + body))
    return data


def palette(transparent=False):
    """A picture of 16 colours, and what they are as RGB."""
    image = Image.fromarray(PIXELS).quantize(16)
    options = {"transparency": 3} if transparent else {}
    return packed(image, **options), np.asarray(image.convert("RGB"))


def turned(orientation):
    """A photograph with the tag that says how the camera was held."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return packed(kind="TIFF", exif=exif)


def animated(kind):
    """Two pictures in one file."""
    return packed(kind=kind, save_all=True, append_images=[Image.new("RGB", (80, 72), "red")])


def wide():
    """A line scan of 20,000 columns."""
    pixels = np.zeros((64, 20_000, 3), np.uint8)
    pixels[:, ::2] = 200
    return pixels


PNG, JPEG, TIFF, WEBP, BMP = (packed(kind=kind) for kind in ("PNG", "JPEG", "TIFF", "WEBP", "BMP"))

ACCEPTED = {  # name of the file: its bytes, and what they are, [H, W, 3]
    "plain.png": (PNG, PIXELS),
    "plain.tif": (TIFF, PIXELS),
    "plain.bmp": (BMP, PIXELS),
    "lossless.webp": (packed(kind="WEBP", lossless=True), PIXELS),
    "a PNG called jpg.jpg": (PNG, PIXELS),
    "a TIFF called PNG.PNG": (TIFF, PIXELS),
    "grey.png": (packed(GREY), np.stack([GREY] * 3, -1)),
    "one bit.png": (packed(GREY > 99), np.stack([(GREY > 99) * np.uint8(255)] * 3, -1)),
    "palette.png": palette(),
    "palette and transparent.png": palette(transparent=True),
    "alpha.png": (packed(np.dstack([PIXELS, GREY])), PIXELS),
    "grey and alpha.png": (packed(np.dstack([GREY, PIXELS[..., 1]])), np.stack([GREY] * 3, -1)),
    "upside down.tif": (turned(3), PIXELS[::-1, ::-1]),
    "on its side.tif": (turned(6), np.rot90(PIXELS, -1)),
    "on its other side.tif": (turned(8), np.rot90(PIXELS)),
    "mirrored.tif": (turned(2), PIXELS[:, ::-1]),
    "an impossible orientation.tif": (turned(99), PIXELS),
    "compressed.tif": (packed(kind="TIFF", compression="tiff_deflate"), PIXELS),
    "interlaced by lines.bmp": (packed(PIXELS[::-1], kind="BMP"), PIXELS[::-1]),
    "a profile of colours.png": (packed(icc_profile=b"no profile at all"), PIXELS),
    "words behind the end.png": (PNG + b"#!/bin/sh\nexit 1\n", PIXELS),
    "20,000 pixels wide.png": (packed(wide()), wide()),
}

POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 90 90\n%%EndComments\n"
UNREADABLE = "cannot be read as an image .* Replace or remove the file"

REFUSED = {  # name of the file: its bytes, and what is said of it
    "zero bytes.png": (b"", UNREADABLE),
    "one byte.png": (b"\x89", UNREADABLE),
    "zeros.png": (bytes(4096), UNREADABLE),
    "words.png": (b"these are words", UNREADABLE),
    "a web page.jpg": (b"<html><script>alert(1)</script></html>", UNREADABLE),
    "an archive.png": (b"PK\x03\x04" + bytes(60), UNREADABLE),
    "PostScript, for which a program would be started.png": (POSTSCRIPT, UNREADABLE),
    "a GIF, which is none of the formats.png": (packed(kind="GIF"), UNREADABLE),
    "a PDF.png": (packed(kind="PDF"), UNREADABLE),
    "an icon.bmp": (packed(kind="ICO"), UNREADABLE),
    "a TGA.png": (packed(kind="TGA"), UNREADABLE),
    **{f"PNG cut at {share} %.png": (PNG[: len(PNG) * share // 100], UNREADABLE) for share in (1, 25, 50, 90, 99)},
    **{f"JPEG cut at {share} %.jpg": (JPEG[: len(JPEG) * share // 100], UNREADABLE) for share in (1, 25, 50, 90)},
    **{f"TIFF cut at {share} %.tif": (TIFF[: len(TIFF) * share // 100], UNREADABLE) for share in (1, 50, 99)},
    **{f"WebP cut at {share} %.webp": (WEBP[: len(WEBP) * share // 100], UNREADABLE) for share in (1, 50, 99)},
    **{f"BMP cut at {share} %.bmp": (BMP[: len(BMP) * share // 100], UNREADABLE) for share in (50, 99)},
    "flipped bytes.png": (PNG[:60] + bytes(255 - byte for byte in PNG[60:90]) + PNG[90:], UNREADABLE),
    "no data.png": (png(80, 72), UNREADABLE),
    "too few data.png": (png(80, 72, rows=bytes(300)), UNREADABLE),
    "an unknown number of bits.png": (png(80, 72, bits=5), UNREADABLE),
    "no columns.png": (png(0, 72), UNREADABLE),
    "decompression bomb.png": (png(60_000, 60_000), "3,600,000,000 pixels, at most 268,435,456 are read. Cut it into"),
    "more pixels than are read.png": (png(16_385, 16_384), "16,385×16,384 pixels, at most 268,435,456 are read"),
    "decompression bomb of text.png": (png(80, 72, rows=bytes(10**8), name=b"zTXt"), UNREADABLE),
    "16 bits a colour.png": (png(80, 72, bits=16, rows=bytes(72 * 481)), "16 bits a channel is not supported"),
    "16 bits of grey.png": (packed(GREY.astype(np.uint16) * 16), "--levels 0 4095. Else save it as 8-bit"),
    "32 bits of grey.tif": (packed(GREY.astype(np.int32), kind="TIFF"), "image mode I is not supported"),
    "CMYK.tif": (packed(kind="TIFF", mode="CMYK"), "image mode CMYK is not supported. Save it as 8-bit RGB"),
    "CMYK.jpg": (packed(kind="JPEG", mode="CMYK"), "image mode CMYK is not supported"),
    "YCbCr.tif": (packed(kind="TIFF", mode="YCbCr"), YCBCR),
    "Lab.tif": (packed(kind="TIFF", mode="LAB"), "image mode LAB is not supported"),
    "floats.tif": (packed(GREY.astype(np.float32), kind="TIFF"), "image mode F is not supported"),
    "NaN.tif": (packed(np.full((72, 80), np.nan, np.float32), kind="TIFF"), "image mode F is not supported"),
    "two pages.tif": (animated("TIFF"), "holds several images where one is expected. Save the right one alone"),
    "animated.png": (animated("PNG"), "holds several images where one is expected"),
    "animated.webp": (animated("WEBP"), "holds several images where one is expected"),
}  # fmt: skip

TOO_SMALL = {
    "one pixel.png": (packed(PIXELS[:1, :1]), "1×1 pixels are too small; each side takes 64 or more"),
    "one row.png": (packed(PIXELS[:1]), "80×1 pixels are too small"),
    "63 rows.png": (packed(PIXELS[:63]), "80×63 pixels are too small"),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_what_is_accepted_is_read_right(tmp_path, name):
    content, pixels = ACCEPTED[name]
    (tmp_path / name).write_bytes(content)
    image = read_image(tmp_path / name)
    assert image.dtype == np.uint8 and np.array_equal(image, pixels.transpose(2, 0, 1))


def test_a_photograph_of_a_telephone_is_its_first_image(tmp_path):
    content = packed(kind="MPO", save_all=True, append_images=[Image.new("RGB", (80, 72))], quality=95)
    (tmp_path / "a.jpg").write_bytes(content)
    assert Image.open(tmp_path / "a.jpg").n_frames == 2
    assert np.abs(read_image(tmp_path / "a.jpg").mean() - PIXELS.mean()) < 2


def test_a_line_scan_of_200_million_pixels_is_read_without_a_warning_of_pillow(tmp_path):
    """In a process of its own: of this one pytest keeps the warnings."""
    Image.new("1", (20_000, 10_000), 1).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(png(20_000, 20_000))
    script = (
        "import sys; from effad_lib.reading import *; print(read_image(sys.argv[1]).shape); read_image(sys.argv[2])"
    )
    command = [sys.executable, "-c", script, tmp_path / "a.png", tmp_path / "b.png"]
    answer = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    assert answer.stdout == "(3, 10000, 20000)\n" and "Warning" not in answer.stderr
    assert "b.png: 20,000×20,000 pixels, at most 268,435,456 are read" in answer.stderr.splitlines()[-1]


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_named(tmp_path, name):
    (tmp_path / name).write_bytes(REFUSED[name][0])
    assert str(tmp_path / name) in refused(lambda: read_image(tmp_path / name), REFUSED[name][1])


@pytest.mark.parametrize("name", TOO_SMALL)
def test_what_is_too_small_is_a_picture_but_not_brought_to_another_size(tmp_path, name):
    (tmp_path / name).write_bytes(TOO_SMALL[name][0])
    assert read_image(tmp_path / name).size
    refused(lambda: read_image(tmp_path / name, (64, 64)), TOO_SMALL[name][1])


def test_detect_judges_the_good_and_says_why_it_left_out_the_others(model, tmp_path, capsys):
    images, out = tmp_path / "images", tmp_path / "out"
    images.mkdir()
    wanted = {name: entry for name, entry in ACCEPTED.items() if "wide" not in name}
    for name, (content, _) in {**wanted, **REFUSED, **TOO_SMALL}.items():
        (images / name).write_bytes(content)
    assert main(["detect", str(model), str(images), "--out", str(out), "--device", "cpu"]) == 1
    table = pd.read_csv(out / "scores.csv", keep_default_na=False).set_index("file")
    assert set(table.index[table["error"] == ""]) == set(wanted)
    assert np.isfinite(table.loc[list(wanted), "score"].astype(float)).all()
    for name, (_, says) in {**REFUSED, **TOO_SMALL}.items():
        assert pd.Series([table.loc[name, "error"]]).str.contains(says).all(), table.loc[name, "error"]
    assert f"{len(REFUSED) + len(TOO_SMALL)} left out" in capsys.readouterr().out


@pytest.mark.parametrize(
    "size",
    [(63, 64), (64, 20_000), (64, 10**30), (64.0, 64), (64,), (64, 64, 3), 64, "64x64", None, (-64, 64), (True, 64)],
    ids=str,
)
def test_sizes_that_no_image_can_have(size):
    refused(lambda: check_size(size), "takes height and width, whole numbers of at least 64 pixels and at most 16,384")


@pytest.mark.parametrize("levels", [(1,), (5, 5), (3, 2), (0, 1, 2), (0, np.inf), (-np.inf, 0), (np.nan, 1)], ids=str)
def test_levels_that_say_nothing(levels):
    refused(lambda: check_levels(levels), "takes the values of black and of white, the first the lower one")


# --- masks ----------------------------------------------------------------------------------------------------------

TRUTH = np.zeros((72, 80), np.uint8)
TRUTH[10:20, 10:30] = 255

MASKS = {  # of a defective image: the file's bytes, and what is said of them
    "empty file": (b"", "cannot be read as a mask"),
    "cut": (packed(TRUTH)[:80], "cannot be read as a mask"),
    "words": (b"no mask", "cannot be read as a mask"),
    "all black": (packed(np.zeros_like(TRUTH)), "an empty mask, no value reaches 128. Save 0 for good, 255"),
    "zeros and ones": (packed(TRUTH // 255), "an empty mask"),
    "another size": (packed(TRUTH[:-1]), r"mask of \(71, 80\), its image has \(72, 80\)"),
    "turned": (packed(TRUTH.T.copy()), r"mask of \(80, 72\)"),
    "one pixel": (packed(TRUTH[:1, :1]), r"mask of \(1, 1\)"),
    "16 bits": (packed(TRUTH.astype(np.uint16) * 257), "image mode I;16 is not supported. Save it as 8-bit"),
    "floats": (packed(TRUTH / np.float32(255), kind="TIFF"), "image mode F is not supported"),
    "CMYK": (packed(np.dstack([TRUTH] * 3), kind="TIFF", mode="CMYK"), "image mode CMYK is not supported"),
    "two pages": (animated("TIFF"), "holds several images where one is expected"),
    "a decompression bomb": (png(60_000, 60_000), "3,600,000,000 pixels, at most 268,435,456 are read"),
    "PostScript": (POSTSCRIPT, "cannot be read as a mask"),
}

GOOD_MASKS = {
    "grey": packed(TRUTH),
    "colour": packed(np.dstack([TRUTH] * 3)),
    "one bit": packed(TRUTH > 0),
    "palette": packed(Image.fromarray(TRUTH).convert("P")),
    "with alpha": packed(np.dstack([TRUTH] * 3 + [TRUTH * 0])),
    "as TIFF": packed(TRUTH, kind="TIFF"),
}


@pytest.fixture
def labelled(tmp_path):
    """A function that writes a data set with one dent and this mask, and returns it."""

    def write(content):
        for name in [*(f"train/good/{k:02}" for k in range(13)), "test/good/0", "test/dent/0"]:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / f"{name}.png").write_bytes(PNG)
        mask = tmp_path / "ground_truth/dent/0_mask.png"
        mask.parent.mkdir(parents=True)
        mask.write_bytes(content)
        return load_dataset("folder", root=tmp_path), mask

    return write


@pytest.mark.parametrize("name", MASKS)
def test_bad_masks_are_found_before_any_work(labelled, name):
    split, mask = labelled(MASKS[name][0])
    said = refused(lambda: verify(split), MASKS[name][1])
    assert "1 of 15 samples are faulty" in said and str(mask) in said


@pytest.mark.parametrize("name", GOOD_MASKS)
def test_good_masks_are_read_right(labelled, name):
    split, mask = labelled(GOOD_MASKS[name])
    verify(split)
    assert np.array_equal(read_mask(mask, (72, 80)), TRUTH > 0)


@pytest.mark.parametrize("masks", ["nowhere", "empty", "other"])
def test_masks_for_detect_that_belong_to_no_image(model, tmp_path, capsys, masks):
    (tmp_path / "a.png").write_bytes(PNG)
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "b.png").write_bytes(packed(TRUTH))
    says = {"nowhere": "no such folder", "empty": "no image below", "other": r"none of its 1 masks .* a_mask\.png"}
    arguments = ["detect", model, tmp_path / "a.png", "--masks", tmp_path / masks, "--out", tmp_path / "out"]
    command_refused(capsys, arguments, says[masks])
    assert not (tmp_path / "out").exists()
