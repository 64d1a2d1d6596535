"""Images survive reading and writing, sets are the same bytes every time, nothing leaks between splits, and mistakes end in a sentence."""

import json
import struct
import threading
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from minimedshift import data
from minimedshift.support.command import UserError

rng = np.random.default_rng(0)
noise = lambda *shape: rng.integers(0, 256, shape, dtype=np.uint8)
PICTURES = {"1": Image.fromarray(noise(23, 31) // 128 * 255).convert("1"), "L": Image.fromarray(noise(23, 31)), "LA": Image.fromarray(noise(23, 31, 2)),
            "I;16": Image.fromarray(noise(23, 31).astype(np.uint16) * 257 + 3), "RGB": Image.fromarray(noise(23, 31, 3)),
            "RGBA": Image.fromarray(noise(23, 31, 4)), "P": Image.fromarray(noise(23, 31, 3)).quantize(200)}


# ---------------------------------------------------------------- image files

@pytest.mark.parametrize("mode, suffix", [(mode, suffix) for suffix, (name, modes, _) in data.FORMATS.items() for mode in modes if name != "JPEG"])
def test_an_image_written_as_it_was_read_is_the_same_image(tmp_path, mode, suffix):
    PICTURES[mode].save(tmp_path / f"a{suffix}")
    x, info = data.read_image(tmp_path / f"a{suffix}")
    data.write_image(tmp_path / f"b{suffix}", x, info)
    a, b = (Image.open(tmp_path / f"{name}{suffix}") for name in "ab")
    assert a.mode == b.mode == info.mode and a.format == b.format and a.size == b.size
    flat = lambda image: np.asarray(image.convert("RGBA") if mode == "P" else image)
    np.testing.assert_array_equal(flat(a), flat(b))
    assert x.dtype == torch.float32 and x.shape == (3 if mode in ("P", "RGB", "RGBA") else 1, 23, 31)


def test_values_are_the_grey_levels_from_minus_one_to_one(tmp_path):
    Image.fromarray(np.array([[0, 65535, 32768]], np.uint16)).save(tmp_path / "a.tif")
    x, info = data.read_image(tmp_path / "a.tif")
    torch.testing.assert_close(x, torch.tensor([[[-1, 1, 1 / 65535]]]), atol=1e-7, rtol=0)
    assert info.depth == 16


def test_jpeg_is_nearly_the_same_image(tmp_path):
    smooth = Image.fromarray(noise(4, 4, 3)).resize((64, 48), Image.Resampling.BICUBIC)
    smooth.save(tmp_path / "a.jpg", quality=95)
    x, info = data.read_image(tmp_path / "a.jpg")
    data.write_image(tmp_path / "b.jpg", x, info)
    a, b = (np.asarray(Image.open(tmp_path / f"{name}.jpg"), np.float32) for name in "ab")
    assert np.abs(a - b).mean() < 1


def test_grey_stored_as_colour_is_grey_and_comes_back_as_colour(tmp_path):
    PICTURES["L"].convert("RGB").save(tmp_path / "a.png")
    x, info = data.read_image(tmp_path / "a.png")
    assert len(x) == 1 and info.mode == "RGB"
    data.write_image(tmp_path / "b.png", -x, info)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "b.png")), 255 - np.asarray(Image.open(tmp_path / "a.png")))


def test_alpha_orientation_and_resolution_are_kept(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    PICTURES["RGBA"].save(tmp_path / "a.png", exif=exif, dpi=(300, 300))
    x, info = data.read_image(tmp_path / "a.png")
    data.write_image(tmp_path / "b.png", 0 * x, info)
    b = Image.open(tmp_path / "b.png")
    np.testing.assert_array_equal(np.asarray(b)[..., 3], np.asarray(PICTURES["RGBA"])[..., 3])
    assert b.getexif()[0x0112] == 6 and round(b.info["dpi"][0]) == 300


def png_of_16_bit_colour():
    chunk = lambda kind, body: struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0)) + chunk(b"IDAT", zlib.compress(bytes(13))) + chunk(b"IEND", b"")


def test_what_cannot_be_read_is_named_in_one_sentence(tmp_path):
    PICTURES["L"].save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:300])
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "deep.png").write_bytes(png_of_16_bit_colour())
    Image.fromarray(noise(8, 8, 4), mode="CMYK").save(tmp_path / "ink.jpg")
    PICTURES["L"].save(tmp_path / "pages.tif", save_all=True, append_images=[PICTURES["L"]])
    for name, why in (("cut.png", "truncated"), ("text.png", "cannot"), ("deep.png", "16-bit colour"), ("ink.jpg", "CMYK"), ("pages.tif", "2 pages"),
                      ("none.png", "no such file")):
        with pytest.raises(UserError, match=f"{name}.*{why}") as error:
            data.read_image(tmp_path / name)
        assert "\n" not in str(error.value)
    x, info = data.read_image(PICTURES["I;16"].save(tmp_path / "a.png") or tmp_path / "a.png")
    with pytest.raises(UserError, match="JPEG cannot hold a 16-bit"):
        data.write_image(tmp_path / "a.jpg", x, info)


def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    PICTURES["L"].save(path)
    before, (x, info) = path.read_bytes(), data.read_image(path)

    def half(self, where, **_):
        where.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", half)
    with pytest.raises(KeyboardInterrupt):
        data.write_image(path, -x, info)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["a.png"]


# ---------------------------------------------------------------- the cache

def test_two_builds_at_once_both_end_with_the_whole_set(tmp_path):
    both, found = threading.Barrier(2), []

    def build(folder):
        (folder / "a").write_text("half")
        both.wait(10)
        (folder / "a").write_text("whole")

    threads = [threading.Thread(target=lambda: found.append(data.cached(tmp_path, "x", [1], build))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0] == found[1] and (found[0] / "a").read_text() == "whole" and list(tmp_path.iterdir()) == [found[0]]


def test_a_cache_that_cannot_be_written_is_a_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="MINIMEDSHIFT_CACHE"):
        data.cached(tmp_path / "file" / "cache", "x", [1], None)


# ---------------------------------------------------------------- batches

def test_a_batch_has_the_images_of_its_labels_and_depends_on_the_generator_alone():
    train = [np.full((n, 1, 4, 4), d, np.float16) + np.arange(n, dtype=np.float16).reshape(-1, 1, 1, 1) / 64 for d, n in enumerate((7, 11, 3))]
    dataset = data.Dataset(("a", "b", "c"), 4, 1, train, [])
    y = torch.randint(0, 3, (3000,), generator=torch.Generator().manual_seed(0))
    x1, again = (dataset.batch(y, torch.Generator().manual_seed(1)) for _ in range(2))
    other = dataset.batch(y, torch.Generator().manual_seed(2))
    assert x1.shape == (3000, 1, 4, 4) and x1.dtype == torch.float32
    assert torch.equal(x1, again) and not torch.equal(x1, other)
    assert torch.equal(x1[:, 0, 0, 0].floor().long(), y)
    for d, n in enumerate((7, 11, 3)):  # every image, each about equally often
        counts = torch.bincount((x1[y == d, 0, 0, 0] % 1 * 64).round().long(), minlength=n)
        assert len(counts) == n and (counts - counts.sum() / n).abs().max() < 5 * (counts.sum() / n).sqrt()


def test_a_set_of_some_domains_has_their_images_in_the_order_asked_for():
    train = [np.full((2, 1, 4, 4), d, np.float16) for d in range(3)]
    pairs = data.Pairs(np.arange(3, dtype=np.float16).reshape(1, 3, 1, 1, 1), decoys=np.arange(3, dtype=np.float16).reshape(1, 1, 3, 1, 1, 1))
    some = data.only(data.Dataset(("a", "b", "c"), 4, 1, train, train, None, pairs), ["c", "a"])
    assert some.domains == ("c", "a") and [x.mean() for x in some.train] == [2, 0] and [x.mean() for x in some.held_out] == [2, 0]
    assert some.test.images.flatten().tolist() == some.test.decoys.flatten().tolist() == [2, 0] and some.test.truth is None and some.valid is None
    for wrong in (["a"], ["a", "a"], ["a", "x"], ["a", ""]):
        with pytest.raises(UserError, match="--domains"):
            data.only(some, wrong)


# ---------------------------------------------------------------- folders

def fill(folder, count, start=0, picture=lambda i: Image.fromarray(np.full((20, 30), i, np.uint8))):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(start, start + count):
        picture(i).save(folder / f"{i:03}.png")


levels = lambda images: sorted(((images[:, 0, 0, 0].astype(np.float32) + 1) * 127.5).round().astype(int).tolist())


def test_a_folder_becomes_domains_and_a_tenth_is_held_out(tmp_path):
    root = tmp_path / "root"
    fill(root / "real" / "low", 20)
    fill(root / "synthetic", 5, 100)
    fill(root / "few", 4, 200)
    (root / "notes.txt").write_text("no image")
    (root / ".hidden").mkdir()
    one, two = (data.folder_set(root, 16, seed=0, cache=tmp_path / "cache", progress=False) for _ in range(2))
    assert one.domains == ("few", "real-low", "synthetic") and one.channels == 1 and one.valid is None
    assert [len(x) for x in one.train] == [4, 18, 4] and [len(x) for x in one.held_out] == [0, 2, 1]
    assert all(x.shape[1:] == (1, 16, 16) and x.dtype == np.float16 for x in one.train)
    assert sorted(levels(one.train[1]) + levels(one.held_out[1])) == list(range(20))
    assert all(np.array_equal(a, b) for a, b in zip(one.train + one.held_out, two.train + two.held_out))
    assert levels(data.folder_set(root, 16, seed=5, cache=tmp_path / "cache", progress=False).held_out[1]) != levels(one.held_out[1])
    (root / "few" / "200.png").unlink()
    assert len(data.folder_set(root, 16, cache=tmp_path / "cache", progress=False).train[0]) == 3


def test_train_and_test_folders_are_taken_as_they_are(tmp_path):
    for domain in ("a", "b"):
        fill(tmp_path / "root" / "train" / domain, 10)
        fill(tmp_path / "root" / "test" / domain, 3, 50)
    dataset = data.folder_set(tmp_path / "root", 16, cache=tmp_path / "cache", progress=False)
    assert dataset.domains == ("a", "b")
    assert [levels(x) for x in dataset.train] == [list(range(10))] * 2 and [levels(x) for x in dataset.held_out] == [[50, 51, 52]] * 2


def test_depths_and_colours_mix(tmp_path):
    fill(tmp_path / "root" / "a", 2, picture=lambda i: Image.fromarray(np.full((16, 16), 40000 + i, np.uint16)))
    fill(tmp_path / "root" / "b", 2, picture=lambda i: Image.fromarray(np.full((16, 16, 3), 7, np.uint8)))
    grey = data.folder_set(tmp_path / "root", 16, cache=tmp_path / "cache", progress=False)
    assert grey.channels == 1
    np.testing.assert_allclose(grey.train[0].astype(np.float32), 40000 / 65535 * 2 - 1, atol=2e-4)
    fill(tmp_path / "root" / "b", 1, 2, picture=lambda i: Image.fromarray(noise(16, 16, 3)))
    colour = data.folder_set(tmp_path / "root", 16, cache=tmp_path / "cache", progress=False)
    assert colour.channels == 3 and colour.train[0].shape == (2, 3, 16, 16)
    assert data.check(colour, tmp_path / "grid.png")[0].startswith("a: 2 to train, 0 held out; sizes 16x16 (2); depths 16-bit I;16 (2)")
    assert Image.open(tmp_path / "grid.png").size[0] > 100


def test_the_centre_of_the_shorter_side_is_kept():
    wide = torch.arange(12.).expand(1, 6, 12)
    torch.testing.assert_close(data.fit(wide, 6), wide[:, :, 3:9])
    ramp = torch.linspace(0, 1, 300).expand(1, 100, 300)
    torch.testing.assert_close(data.fit(ramp, 10)[0].mean(), ramp[:, :, 100:200].mean())
    assert data.fit(torch.zeros(1, 331, 97), 16).shape == (1, 16, 16)
    white = torch.randn(1, 256, 256, generator=torch.Generator().manual_seed(0))
    assert data.fit(white, 32).std() < .2  # antialiased: an 8 x 8 mean would leave 1/8, single pixels up to 1


def test_bad_files_are_named_and_skipped_and_empty_folders_are_sentences(tmp_path, capsys):
    root, read = tmp_path / "root", lambda: data.folder_set(tmp_path / "root", 16, cache=tmp_path / "cache", progress=False)
    with pytest.raises(UserError, match="no such folder"):
        read()
    fill(root / "a", 6)
    with pytest.raises(UserError, match=r"found 1 domain \(a\)"):
        read()
    fill(root / "b", 6)
    (root / "b" / "bad.jpg").write_bytes(b"\xff\xd8 nothing")
    assert len(read().train[1]) == 5
    for _ in range(2):  # from the cache too
        err = capsys.readouterr().err
        assert "bad.jpg" in err and "skipped 1 unreadable" in err
        read()
    for path in (root / "b").glob("0*.png"):
        path.unlink()
    with pytest.raises(UserError, match="the domain b has no image that can be read"):
        read()
    (root / "test" / "c").mkdir(parents=True)
    fill(root / "test" / "c", 1)
    with pytest.raises(UserError, match="test has c"):
        read()
