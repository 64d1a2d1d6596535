"""A set is the same bytes every time, nothing leaks between its splits, and mistakes end in a sentence."""

import os
from dataclasses import replace

import numpy as np
import torch
from PIL import Image

from minimedshift import data, folder, phantom
from minimedshift.sizes import crop_to_square

noise = lambda *shape: np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def test_a_batch_has_the_images_of_its_labels_and_depends_on_the_generator_alone():
    train = []
    for d, n in enumerate((7, 11, 3)):
        number = np.arange(n, dtype=np.float16).reshape(-1, 1, 1, 1)
        train.append(np.full((n, 1, 4, 4), d, np.float16) + number / 64)
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


def fill(folder, count, start=0, picture=lambda i: Image.fromarray(np.full((20, 30), i, np.uint8))):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(start, start + count):
        picture(i).save(folder / f"{i:03}.png")


def levels(images):
    """The grey value, 0 to 255, of each image's first pixel, sorted."""
    return sorted(((images[:, 0, 0, 0].astype(np.float32) + 1) * 127.5).round().astype(int).tolist())


def test_a_folder_becomes_domains_and_a_tenth_is_held_out(tmp_path):
    root = tmp_path / "root"
    fill(root / "real-low", 20)
    fill(root / "synthetic", 5, 100)
    fill(root / "few", 4, 200)
    (root / "notes.txt").write_text("no image")
    (root / ".hidden").mkdir()
    one = data.folder_set(root, 16, seed=0, cache=tmp_path / "cache")
    for path in root.rglob("*.png"):  # it was read, just now
        os.utime(path, ns=(1, path.stat().st_mtime_ns))
    two = data.folder_set(root, 16, seed=0, cache=tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 1
    assert one.domains == ("few", "real-low", "synthetic") and one.channels == 1 and one.valid_pairs is None
    assert [len(x) for x in one.train_images] == [4, 18, 4] and [len(x) for x in one.test_images] == [0, 2, 1]
    assert all(x.shape[1:] == (1, 16, 16) and x.dtype == np.float16 for x in one.train_images)
    assert sorted(levels(one.train_images[1]) + levels(one.test_images[1])) == list(range(20))
    assert all(map(np.array_equal, one.train_images + one.test_images, two.train_images + two.test_images))
    other = data.folder_set(root, 16, seed=5, cache=tmp_path / "cache")
    assert levels(other.test_images[1]) != levels(one.test_images[1])
    (root / "few" / "200.png").unlink()
    assert len(data.folder_set(root, 16, cache=tmp_path / "cache").train_images[0]) == 3


def test_domains_of_opposite_polarity_are_warned_of(tmp_path, capsys):
    """Five domains of heads are not; heads and their negatives are. Noise without a shape is not."""
    heads = [phantom.Head(seed) for seed in range(12)]
    images = [phantom.render(heads, domain, 32).half().numpy() for domain in phantom.DOMAINS]
    dataset = data.Dataset(phantom.DOMAINS, 32, 1, images, images)
    assert data.opposite(dataset) == []
    negative = replace(dataset, domains=("heads", "negatives"), train_images=[images[3], -images[4]])
    assert data.opposite(negative) == [("heads", "negatives")]
    data.check(negative, tmp_path / "grid.png")
    assert "heads and negatives look like negatives of each other" in capsys.readouterr().out
    draw = np.random.default_rng(0)
    flat = [draw.uniform(-.1, .1, (300, 1, 32, 32)).astype(np.float16) for _ in range(2)]
    assert data.opposite(replace(negative, train_images=flat)) == []


def test_the_centre_of_the_shorter_side_is_kept():
    wide = torch.arange(12.).expand(1, 6, 12)
    torch.testing.assert_close(crop_to_square(wide, 6), wide[:, :, 3:9])
    ramp = torch.linspace(0, 1, 300).expand(1, 100, 300)
    torch.testing.assert_close(crop_to_square(ramp, 10)[0].mean(), ramp[:, :, 100:200].mean())
    assert crop_to_square(torch.zeros(1, 331, 97), 16).shape == (1, 16, 16)
    white = torch.randn(1, 256, 256, generator=torch.Generator().manual_seed(0))
    # antialiased: an 8 x 8 mean would leave 1/8, single pixels up to 1
    assert crop_to_square(white, 32).std() < .2


def test_bad_files_are_named_and_skipped(tmp_path, capsys):
    root = tmp_path / "root"
    read = lambda: data.folder_set(root, 16, cache=tmp_path / "cache")
    fill(root / "a", 6)
    fill(root / "b", 6)
    (root / "b" / "bad.jpg").write_bytes(b"\xff\xd8 nothing")
    assert len(read().train_images[1]) == 5
    for _ in range(2):  # from the cache too
        err = capsys.readouterr().err
        assert "bad.jpg" in err and "skipped 1 unreadable" in err
        read()


def test_the_images_of_a_folder_are_found_below_it_too_and_hidden_ones_are_not(tmp_path):
    for name in ("b.PNG", "a/c.tif", ".d.png", ".e/f.png", "g.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "a" / "back").symlink_to(tmp_path)
    assert folder.image_files(tmp_path)[0] == [tmp_path / "a" / "c.tif", tmp_path / "b.PNG"]
