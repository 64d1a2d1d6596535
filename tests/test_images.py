"""Images survive reading and writing, and what cannot be read or written ends in a sentence."""

import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from minimedshift.support import images
from minimedshift.support.command import UserError

rng = np.random.default_rng(0)
noise = lambda *shape: rng.integers(0, 256, shape, dtype=np.uint8)
PICTURES = {
    "L": Image.fromarray(noise(23, 31)),
    "LA": Image.fromarray(noise(23, 31, 2)),
    "I;16": Image.fromarray(noise(23, 31).astype(np.uint16) * 257 + 3),
    "RGB": Image.fromarray(noise(23, 31, 3)),
    "RGBA": Image.fromarray(noise(23, 31, 4)),
}
KEPT = []  # what every lossless format must give back
for suffix, (name, modes, _) in images.FORMATS.items():
    KEPT += [(mode, suffix) for mode in modes if name != "JPEG" and mode in PICTURES]


@pytest.mark.parametrize("mode, suffix", KEPT)
def test_an_image_written_as_it_was_read_is_the_same_image(tmp_path, mode, suffix):
    PICTURES[mode].save(tmp_path / f"a{suffix}")
    x, info = images.read_image(tmp_path / f"a{suffix}")
    images.write_image(tmp_path / f"b{suffix}", x, info)
    a, b = (Image.open(tmp_path / f"{name}{suffix}") for name in "ab")
    assert a.mode == b.mode == info.mode and a.format == b.format and a.size == b.size
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    assert x.dtype == torch.float32 and x.shape == (3 if mode in ("RGB", "RGBA") else 1, 23, 31)


@pytest.mark.parametrize("mode, transparent", [("RGB", {}), ("RGBA", dict(transparency=3))])
def test_a_palette_becomes_rgb(tmp_path, mode, transparent):
    palette = Image.fromarray(noise(23, 31, 3)).quantize(200)
    palette.save(tmp_path / "a.png", **transparent)
    x, info = images.read_image(tmp_path / "a.png")
    images.write_image(tmp_path / "b.png", x, info)
    b = Image.open(tmp_path / "b.png")
    assert b.mode == mode
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "a.png").convert(mode)), np.asarray(b))


def test_grey_stored_as_colour_is_grey_and_comes_back_as_colour(tmp_path):
    PICTURES["L"].convert("RGB").save(tmp_path / "a.png")
    x, info = images.read_image(tmp_path / "a.png")
    assert len(x) == 1 and info.mode == "RGB"
    images.write_image(tmp_path / "b.png", -x, info)
    a, b = (np.asarray(Image.open(tmp_path / name)) for name in ("a.png", "b.png"))
    np.testing.assert_array_equal(b, 255 - a)


def test_alpha_orientation_and_resolution_are_kept(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    PICTURES["RGBA"].save(tmp_path / "a.png", exif=exif, dpi=(300, 300))
    x, info = images.read_image(tmp_path / "a.png")
    images.write_image(tmp_path / "b.png", 0 * x, info)
    b = Image.open(tmp_path / "b.png")
    np.testing.assert_array_equal(np.asarray(b)[..., 3], np.asarray(PICTURES["RGBA"])[..., 3])
    assert b.getexif()[0x0112] == 6 and round(b.info["dpi"][0]) == 300


def png_of_16_bit_colour():
    number = lambda n: struct.pack(">I", n)
    chunk = lambda kind, body: number(len(body)) + kind + body + number(zlib.crc32(kind + body))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(13))) + chunk(b"IEND", b"")


def test_what_cannot_be_read_is_named_in_one_sentence(tmp_path):
    (tmp_path / "deep.png").write_bytes(png_of_16_bit_colour())
    Image.fromarray(noise(8, 8, 4), mode="CMYK").save(tmp_path / "ink.jpg")
    Image.new("1", (8, 8)).save(tmp_path / "bit.png")
    for name, why in {"deep.png": "16-bit colour", "ink.jpg": "CMYK", "bit.png": "mode 1 cannot"}.items():
        with pytest.raises(UserError, match=f"{name}.*{why}") as error:
            images.read_image(tmp_path / name)
        assert "\n" not in str(error.value)


def test_a_figure_shows_its_images_at_the_size_of_a_cell(tmp_path):
    rows = [[torch.ones(1, 10, 20), -torch.ones(3, 20, 20)]]
    images.figure(tmp_path / "deep" / "a.png", rows, ["one\nline more", "two"], [""], cell=40)
    sheet = np.asarray(Image.open(tmp_path / "deep" / "a.png"))
    assert sheet.shape == (6 + 2 * 18 + 44, 10 + 2 * 44, 3)
    assert (sheet[42:82, 54:94] == 0).all() and (sheet[42:82, 10:50] == 255).all()
