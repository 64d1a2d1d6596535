"""Images in: what a data set is, and how your own folders become one.

A data set has training images of each domain, unpaired, and where it can some pairs to validate and test on.
A folder is read once: the images, at the size of training, lie in the cache from then on.
"""

import inspect
import json
import math
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from minimedshift.support.command import UserError
from minimedshift.support.files import cached
from minimedshift.support.images import decode, figure, image_files, read_image
from minimedshift.support.log import progress

LABELS = {"truth", "mask", "masks", "label", "labels", "annotation", "annotations", "segmentation"}
FEW = 50  # images of a domain: with fewer `check` warns
OPPOSITE = -0.5  # correlation of mean images below which two domains are negatives of each other


@dataclass(frozen=True)
class Pairs:
    """The same N heads in all D domains, float16. A simulator fills all, a paired folder `images` alone."""
    images: np.ndarray                     # (N, D, C, H, W) as taken
    truth: np.ndarray | None = None        # (N, D, C, H, W) noise-free
    second: np.ndarray | None = None       # (N, D, C, H, W) taken again: fresh noise and fine texture
    materials: np.ndarray | None = None    # (N, 3, H, W) centimetres of bone, soft tissue and brain
    decoys: np.ndarray | None = None       # (N, K, D, C, H, W) noise-free, of K other people in the same view

    def only(self, keep):
        """The domains of index `keep` alone."""
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
    test_images: list                      # per domain: images never trained on
    valid_pairs: Pairs | None = None
    test_pairs: Pairs | None = None
    weights: list | None = None         # per domain (N_d,): how often an image is drawn, mean 1; None: alike

    def batch(self, y, generator):
        """A training image for each label in y (B,), by its weight: (B, C, H, W) float32. CPU generator."""
        u = torch.rand(len(y), generator=generator, dtype=torch.float64).numpy()
        y = y.numpy()
        x1 = np.empty((len(y), self.channels, self.size, self.size), np.float16)
        for d in np.unique(y):
            mine = np.flatnonzero(y == d)
            x1[mine] = self.train_images[d][self.pick(d, u[mine])]
        return torch.from_numpy(x1).float()

    def pick(self, d, u):
        """The training images of domain d, int64, that uniform numbers u (n,) in [0, 1) stand for."""
        count = len(self.train_images[d])
        if self.weights is None:
            return (u * count).astype(np.int64)
        until = np.cumsum(self.weights[d], dtype=np.float64)
        return np.searchsorted(until, u * until[-1], side="right").clip(max=count - 1)

    def drawn(self, d):
        """The training images of domain d, each as often as it is drawn in training: of N again N."""
        if self.weights is None:
            return self.train_images[d]
        count = len(self.train_images[d])
        return self.train_images[d][self.pick(d, (np.arange(count) + .5) / count)]


def select_domains(dataset, names):
    """The domains `names` alone, in this order. Raises UserError for fewer than two, or an unknown one."""
    keep = [dataset.domains.index(name) for name in names if name in dataset.domains]
    if len(set(keep)) < max(2, len(names)):
        raise UserError(f"--domains needs two or more different names of {', '.join(dataset.domains)}")
    some = lambda per_domain: per_domain and [per_domain[d] for d in keep]
    return replace(dataset, domains=tuple(names), train_images=some(dataset.train_images),
                   test_images=some(dataset.test_images),
                   weights=some(dataset.weights), valid_pairs=dataset.valid_pairs and dataset.valid_pairs.only(keep),
                   test_pairs=dataset.test_pairs and dataset.test_pairs.only(keep))


# ---------------------------------------------------------------- your own folders

def find_files(root):
    """{domain: its image files}, to train on and to test on, of a folder as `folder_set` takes it.

    Raises UserError for a missing folder, fewer than two domains, or test images of another domain.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"--data {root}: there is no such folder")
    train_files = by_domain(root / "train") or by_domain(root, skip="test")
    test_files = by_domain(root / "test")
    domains = tuple(train_files)
    if len(domains) < 2:
        raise UserError(f"--data {root}: two or more sub-folders with images are needed, "
                        f"found: {', '.join(domains) or 'none'}")
    if unknown := test_files.keys() - domains:
        raise UserError(f"--data {root}: test has {', '.join(unknown)}, without training images")
    return train_files, test_files


def folder_set(root, size, seed=0, cache=None, progress=True):
    """The Dataset of ROOT/DOMAIN, a tenth held out by `seed`, or of ROOT/train/DOMAIN and ROOT/test/DOMAIN.

    Raises UserError for a missing folder, fewer than two domains, or a domain without a readable image.
    """
    train_files, test_files = find_files(root)
    domains = tuple(train_files)
    files = {}
    for d, domain in enumerate(domains):
        mine, kept = train_files[domain], test_files.get(domain, [])
        if not test_files:  # a tenth is kept apart
            count = len(mine) // 10 or int(len(mine) >= 5)
            order = np.random.default_rng([seed, d]).permutation(len(mine))
            mine, kept = ([mine[i] for i in sorted(some)] for some in (order[count:], order[:count]))
        files[f"train-{d}"], files[f"test-{d}"] = mine, kept
    stamps = []  # they tell that a file has changed
    for key, paths in files.items():
        for path in paths:
            file = path.stat()
            stamps.append((key, str(path.absolute()), file.st_size, file.st_mtime_ns))
    code = [inspect.getsource(part) for part in (decode, read_image, fit, read_files)]
    content = [code, torch.__version__, size, stamps]
    folder = cached(cache, f"folder-{size}", content, lambda work: read_files(work, files, size, progress))

    found = json.loads((folder / "found.json").read_text())
    if found["bad"]:
        print(*found["bad"], f"skipped {len(found['bad'])} unreadable files", sep="\n", file=sys.stderr)
    on_disk = lambda key: np.load(folder / f"{key}.npy", mmap_mode="r")
    train = [on_disk(f"train-{d}") for d in range(len(domains))]
    test = [on_disk(f"test-{d}") for d in range(len(domains))]
    for domain, images in zip(domains, train):
        if not len(images):
            raise UserError(f"--data {root}: the domain {domain} has no image that can be read")
    valid, paired = paired_by_name(test, [found[f"test-{d}"] for d in range(len(domains))])
    return Dataset(domains, size, train[0].shape[1], train, test, valid, paired)


def by_domain(base, skip=None):
    """{domain: its image files}; the folders on the way to an image, joined with "-", name its domain."""
    found = {}
    for path in image_files(base):
        parts = path.relative_to(base).parts[:-1]
        if parts and parts[0] != skip:
            found.setdefault("-".join(parts), []).append(path)
    return dict(sorted(found.items()))


def strays(domains):
    """The domains whose name says that they hold what was drawn into images, and not images."""
    return [name for name in domains if LABELS & set(name.lower().split("-"))]


def read_files(folder, files, size, show):
    """Read {key: paths}: images (N, C, size, size) into KEY.npy, their names into found.json.
    Memory does not grow with their number: each is written as it comes, grey as one channel."""
    def read(path):
        try:
            return fit(read_image(path)[0], size).half().numpy(), path.stem
        except UserError as error:
            return None, str(error)

    found = {key: [] for key in ("bad", *files)}
    grey = {key: [] for key in files}  # of each image, whether it has one channel
    start, done, total = time.time(), 0, sum(map(len, files.values()))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for key, paths in files.items():
            with open(folder / f"{key}.raw", "wb") as raw:
                for some in range(0, len(paths), 100):  # so that no more are read ahead
                    for x, name in pool.map(read, paths[some:some + 100]):
                        done += 1
                        if show:
                            progress(done, total, start, "reading images, once")
                        found["bad" if x is None else key].append(name)
                        if x is not None:
                            grey[key].append(len(x) == 1)
                            x.tofile(raw)
    channels = 1 if all(map(all, grey.values())) else 3
    for key, single in grey.items():
        header = dict(descr="<f2", fortran_order=False, shape=(len(single), channels, size, size))
        with open(folder / f"{key}.raw", "rb") as raw, open(folder / f"{key}.npy", "wb") as stack:
            np.lib.format.write_array_header_1_0(stack, header)
            for one in single:
                x = raw.read((1 if one else 3) * size**2 * 2)
                stack.write(x * (3 if one and channels == 3 else 1))  # grey is repeated in every channel
        (folder / f"{key}.raw").unlink()
    (folder / "found.json").write_text(json.dumps(found))


def fit(x, size):
    """x (C, H, W) -> (C, size, size): the shorter side resized, antialiased, to `size`; the centre kept."""
    shorter = min(x.shape[1:])
    h, w = (max(size, round(n * size / shorter)) for n in x.shape[1:])
    if (h, w) != x.shape[1:]:
        x = F.interpolate(x[None], (h, w), mode="bilinear", antialias=True)[0]
    top, left = (h - size) // 2, (w - size) // 2
    return x[:, top:top + size, left:left + size]


def paired_by_name(images, names, fewest=8):
    """Two `Pairs`, for validation and testing: images (N_d, C, H, W) with one name in every domain, by turns.

    names: N_d of each domain. (None, None) where fewer than `fewest` are in all.
    """
    common = sorted(set.intersection(*map(set, names)))
    if len(common) < fewest:
        return None, None
    stacks = []
    for stack, some in zip(images, names):
        place = {name: i for i, name in reversed(list(enumerate(some)))}  # the first of a name
        stacks.append(stack[[place[name] for name in common]])
    pairs = np.stack(stacks, 1)  # (N, D, C, H, W)
    return Pairs(pairs[::2]), Pairs(pairs[1::2])


def check(dataset, path, each=6):
    """A grid of examples to `path`; print and return a line per domain: count and values."""
    rows, lines = [], []
    for domain, images, kept in zip(dataset.domains, dataset.train_images, dataset.test_images):
        some = np.asarray(images[:: math.ceil(len(images) / 500)], np.float32)
        few = "; few: what they happen to share will be taken for the domain" if len(images) < FEW else ""
        lines.append(f"{domain}: {len(images)} to train, {len(kept)} held out; "
                     f"values {some.min():.2f} to {some.max():.2f}, mean {some.mean():.2f}{few}")
        shown = np.linspace(0, len(some) - 1, min(each, len(some))).astype(int)
        rows.append(list(some[shown]))
    for a, b in opposite(dataset):
        lines.append(f"warning: {a} and {b} look like negatives of each other: a translation between them "
                     "will not show the same thing; invert the images of one")
    figure(path, rows, [], dataset.domains)
    print(*lines, f"examples: {path}", sep="\n")
    return lines


def opposite(dataset):
    """Pairs of domains of opposite polarity: where one's mean image is bright, the other's is dark.

    Coarse contrast is what noise remembers of an image, so a translation keeps it: dark stays dark.
    """
    means = []
    for images in dataset.train_images:
        some = np.asarray(images[:: math.ceil(len(images) / 500)], np.float32)
        means.append(some.mean((0, 1)).ravel())
    alike = np.corrcoef(np.stack(means) + 1e-6 * np.random.default_rng(0).standard_normal(means[0].size))
    names = dataset.domains
    return [(names[i], names[j]) for i, j in zip(*np.nonzero(np.triu(alike < OPPOSITE, 1)))]
