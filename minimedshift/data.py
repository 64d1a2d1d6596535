"""What a data set is, and how your own folders of images become one: unpaired images of each domain to train
on and, where it can be, pairs to validate and test on. A folder is read once, into the cache."""

import inspect
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from minimedshift.support.command import UserError, refuse
from minimedshift.support.files import cached
from minimedshift.support.images import decode, figure, image_files, read_image
from minimedshift.support.log import progress
from minimedshift.support.sizes import crop_to_square

FEW = 50  # `check` warns of a domain with fewer images
OPPOSITE = -0.5  # two domains are negatives of each other if their mean images correlate less than this


@dataclass(frozen=True)
class Pairs:
    """The same N heads in all D domains, float16. A simulator fills all, a paired folder `images` alone."""
    images: np.ndarray                     # (N, D, C, H, W) as taken
    truth: np.ndarray | None = None        # (N, D, C, H, W) noise-free
    second: np.ndarray | None = None       # (N, D, C, H, W) taken again: fresh noise and fine texture
    materials: np.ndarray | None = None    # (N, 3, H, W) centimetres of bone, soft tissue and brain
    decoys: np.ndarray | None = None       # (N, K, D, C, H, W) noise-free, of K other people in the same view

    def only(self, keep):
        """The same heads in the domains of index `keep` alone."""
        some = lambda array: None if array is None else array[:, keep]
        decoys = None if self.decoys is None else self.decoys[:, :, keep]
        return Pairs(some(self.images), some(self.truth), some(self.second), self.materials, decoys)


@dataclass(frozen=True)
class Dataset:
    """Unpaired training images, per domain (N_d, C, H, W) float16 in [-1, 1], and what is kept apart."""
    domains: tuple
    size: int
    channels: int
    train_images: list
    test_images: list                   # per domain: images never trained on
    valid_pairs: Pairs | None = None
    test_pairs: Pairs | None = None
    weights: list | None = None         # per domain (N_d,): how often an image is drawn, mean 1; None: alike

    def batch(self, y, generator):
        """A training image for each label in y (B,), by its weight: (B, C, H, W) float32. CPU generator."""
        u = torch.rand(len(y), generator=generator, dtype=torch.float64).numpy()
        y = y.numpy()
        x1 = np.empty((len(y), self.channels, self.size, self.size), np.float16)
        for d in np.unique(y):
            places = np.flatnonzero(y == d)
            x1[places] = self.train_images[d][self.pick(d, u[places])]
        return torch.from_numpy(x1).float()

    def pick(self, d, u):
        """The indices, int64, of the training images of domain d that numbers u (n,) in [0, 1) stand for."""
        count = len(self.train_images[d])
        if self.weights is None:
            return (u * count).astype(np.int64)
        until = np.cumsum(self.weights[d], dtype=np.float64)
        return np.searchsorted(until, u * until[-1], side="right").clip(max=count - 1)

    def drawn(self, d, count=None):
        """`count` training images of domain d (None: as many as there are), as often as in training."""
        count = count or len(self.train_images[d])
        return self.train_images[d][self.pick(d, (np.arange(count) + .5) / count)]


def by_domain(base):
    """{domain: its image files}; the folders on the way to an image, joined with "-", name its domain."""
    found = {}
    for path in image_files(base):
        parts = path.relative_to(base).parts[:-1]
        if parts and parts[0] != "test":
            found.setdefault("-".join(parts), []).append(path)
    return dict(sorted(found.items()))


def find_files(root, seed):
    """The domains of a folder, and {"train-0": image files of the first, "test-0": ..., "train-1": ...}."""
    root, files = Path(root), {}
    refuse(not root.is_dir(), f"--data {root}: there is no such folder")
    train, test = by_domain(root / "train") or by_domain(root), by_domain(root / "test")
    refuse(len(train) < 2, f"--data {root}: two or more sub-folders with images are needed, "
                           f"found: {', '.join(train) or 'none'}")
    unknown = ", ".join(test.keys() - train)
    refuse(unknown, f"--data {root}: test has {unknown}, without training images")
    for d, (domain, paths) in enumerate(train.items()):
        held_out = test.get(domain, [])
        if not test:  # a tenth of the images, at least one of five
            count = len(paths) // 10 or int(len(paths) >= 5)
            order = np.random.default_rng([seed, d]).permutation(len(paths))
            held_out = [paths[i] for i in sorted(order[:count])]
            paths = [paths[i] for i in sorted(order[count:])]
        files[f"train-{d}"], files[f"test-{d}"] = paths, held_out
    return tuple(train), files


def folder_set(root, size, seed=0, cache=None):
    """The Dataset of ROOT/DOMAIN, a tenth held out by `seed`, or of ROOT/train/DOMAIN and ROOT/test/DOMAIN.
    Raises UserError for a missing folder, fewer than two domains, or a domain without a readable image."""
    domains, files = find_files(root, seed)
    stamps = [(str(path.absolute()), path.stat().st_mtime_ns) for path in sum(files.values(), [])]
    code = [inspect.getsource(part) for part in (decode, read_image, crop_to_square, read_files)]
    content = [code, torch.__version__, size, {key: len(paths) for key, paths in files.items()}, stamps]
    folder = cached(cache, f"folder-{size}", content, lambda work: read_files(work, files, size))

    names = json.loads((folder / "names.json").read_text())
    if names["unreadable"]:
        skipped = f"skipped {len(names['unreadable'])} unreadable files"
        print(*names["unreadable"], skipped, sep="\n", file=sys.stderr)
    load = lambda split: [np.load(folder / f"{split}-{d}.npy", mmap_mode="r") for d in range(len(domains))]
    train, test = load("train"), load("test")
    for domain, stack in zip(domains, train):
        refuse(not len(stack), f"--data {root}: the domain {domain} has no image that can be read")
    valid, paired = paired_by_name(test, [names[f"test-{d}"] for d in range(len(domains))])
    return Dataset(domains, size, train[0].shape[1], train, test, valid, paired)


def read_files(folder, files, size):
    """Read {key: paths} into KEY.npy, (N, C, size, size), C = 1 if all are grey, else 3, and names.json."""
    def read(path):
        try:
            return crop_to_square(read_image(path)[0], size).half().numpy(), path.stem
        except UserError as error:
            return None, str(error)

    names, images = {key: [] for key in ("unreadable", *files)}, {key: [] for key in files}
    start, done, total = time.time(), 0, len(sum(files.values(), []))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for key, paths in files.items():
            for x, name in pool.map(read, paths):
                done += 1
                progress(done, total, start, "reading images, once")
                names["unreadable" if x is None else key].append(name)
                if x is not None:
                    images[key].append(x)
    channels = max((len(x) for x in sum(images.values(), [])), default=1)
    for key, found in images.items():
        stack = np.empty((len(found), channels, size, size), np.float16)
        for i, x in enumerate(found):
            stack[i] = x  # grey goes into every channel
        np.save(folder / f"{key}.npy", stack)
    (folder / "names.json").write_text(json.dumps(names))


def paired_by_name(images, names):
    """Two `Pairs`, for validation and testing: images (N_d, C, H, W) with one name in every domain, by turns.
    names: N_d of each domain. (None, None) where fewer than 8 are in all."""
    common = sorted(set.intersection(*map(set, names)))
    if len(common) < 8:
        return None, None
    take = lambda stack, some: stack[[some.index(name) for name in common]]  # the first of a name
    pairs = np.stack(list(map(take, images, names)), 1)  # (N, D, C, H, W)
    return Pairs(pairs[::2]), Pairs(pairs[1::2])


def sample(images):
    """At most 500 of the images, evenly spread, float32."""
    return np.asarray(images[::len(images) // 500 + 1], np.float32)


def check(dataset, path):
    """Draw a grid of examples to `path`. Print a line per domain: its count and values, and what is wrong."""
    rows = []
    for domain, images, kept in zip(dataset.domains, dataset.train_images, dataset.test_images):
        some = sample(images)
        few = "; few: what they happen to share will be taken for the domain" if len(images) < FEW else ""
        print(f"{domain}: {len(images)} to train, {len(kept)} held out; "
              f"values {some.min():.2f} to {some.max():.2f}, mean {some.mean():.2f}{few}")
        rows.append(some[:: len(some) // 7 + 1][:6])
    for a, b in opposite(dataset):
        print(f"warning: {a} and {b} look like negatives of each other: a translation between them "
              "will not show the same thing; invert the images of one")
    figure(path, rows, [], dataset.domains)
    print(f"examples: {path}")


def opposite(dataset):
    """Pairs of domains of opposite polarity: where one's mean image is bright, the other's is dark. Coarse
    contrast is what noise remembers of an image, so a translation keeps it: dark stays dark."""
    means = np.stack([sample(images).mean((0, 1)).ravel() for images in dataset.train_images])
    noise = np.random.default_rng(0).standard_normal(means[0].size)  # for images without any contrast
    pairs = np.argwhere(np.triu(np.corrcoef(means + 1e-6 * noise) < OPPOSITE, 1))
    return [(dataset.domains[i], dataset.domains[j]) for i, j in pairs]
