"""What a data set is, and how your own folders of images become one: unpaired images of each domain to train
on and, where it can be, pairs to validate and test on. A folder is read once, into the cache."""

import inspect
import json
import math
import shlex
import sys
import time
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from typing import NamedTuple

import numpy as np
import PIL
import torch

from minimedshift.folder import find_files, unread
from minimedshift.sizes import crop_to_square
from minimedshift.support import dicom, images
from minimedshift.support.command import UserError, refuse
from minimedshift.support.files import cached, digest
from minimedshift.support.images import Reading, figure
from minimedshift.support.log import progress
from minimedshift.support.machine import keep_memory

FEW = 50  # `check` warns of a domain with fewer images
NARROW = 0.5  # of 2: `check` warns where 98 % of the pixels of a domain lie in so little of its range
WIDE = 0.1  # a border counts if it is this share of an image
SHOWN = 8  # domains that `check` shows; of more it warns
SOME = 0.1  # a share of a domain's images, or of their pairs, that is worth a warning
OPPOSITE = -0.5  # two domains are negatives of each other if their mean images correlate less than this

@dataclass(frozen=True)
class Pairs:
    """The same N heads in all D domains, float16. A simulator fills all, a paired folder `images` alone."""
    images: np.ndarray                     # (N, D, C, H, W) as taken
    truth: np.ndarray | None = None        # (N, D, C, H, W) noise-free
    second: np.ndarray | None = None       # (N, D, C, H, W) taken again: fresh noise and fine texture
    decoys: np.ndarray | None = None       # (N, K, D, C, H, W) noise-free, of K other people in the same view


@dataclass(frozen=True)
class Dataset:
    """Unpaired training images, per domain (N_d, C, H, W) float in [-1, 1], and what is kept apart."""
    domains: tuple
    size: int
    channels: int
    train_images: list
    test_images: list                   # per domain: images never trained on
    valid_pairs: Pairs | None = None
    test_pairs: Pairs | None = None
    weights: list | None = None         # per domain (N_d,): how often an image is drawn, mean 1; None: alike
    readings: dict | None = None        # domain -> how its files are read (images.Reading)
    notes: tuple = ()                   # what was understood of a folder, a line each

    def batch(self, y, generator):
        """A training image for each label in y (B,), by its weight: (B, C, H, W) float32. CPU generator."""
        u = torch.rand(len(y), generator=generator, dtype=torch.float64).numpy()
        y = y.numpy()
        x1 = np.empty((len(y), self.channels, self.size, self.size), np.float32)
        for d in np.unique(y):
            places = np.flatnonzero(y == d)
            x1[places] = self.train_images[d][self.pick(d, u[places])]
        return torch.from_numpy(x1)

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


# ---------------------------------------------------------------- a folder

def folder_set(root, size, seed=0, cache=None, bits=0, invert="", crop=False, known=None):
    """The Dataset of a folder (folder.py). bits: of files deeper than 8 (0: as the largest level needs).
    invert: domains, with commas, whose files are negatives. crop: constant borders are left out.
    known: {domain: Reading} to take instead. Raises UserError for what is not clear."""
    domains, files, own_split, left = find_files(root, seed)
    inverted = set(invert.split(",")) - {""}
    refuse(inverted - set(domains), f"--invert {invert}: the domains are {', '.join(domains)}")
    paths = [file.path for some in files.values() for file in some]
    stamps = [(str(path.absolute()), *path.stat()[6:]) for path in paths]  # size and times
    parts = images, dicom, crop_to_square, read_files, remarks, range_of
    code = [inspect.getsource(part) for part in parts]
    lengths = {key: len(some) for key, some in files.items()}
    known = {domain: asdict(how) for domain, how in (known or {}).items()}
    decoders = [name for name in ("pydicom", "pylibjpeg", "gdcm") if find_spec(name)]
    content = [code, torch.__version__, PIL.__version__, decoders, size, lengths, stamps, bits,
               sorted(inverted), crop, known]
    make = lambda work: read_files(work, domains, files, size, bits, inverted, crop, known)
    folder = cached(cache, f"folder-{size}", content, make)

    told = json.loads((folder / "told.json").read_text())
    if told["unreadable"]:
        skipped = f"skipped {len(told['unreadable'])} unreadable files"
        print(*told["unreadable"], skipped, sep="\n", file=sys.stderr)
    names = lambda split: [told["names"][f"{split}-{d}"] for d in range(len(domains))]
    load = lambda split: [np.load(folder / f"{split}-{d}.npy", mmap_mode="c") for d in range(len(domains))]
    train, valid, test, pairs, notes = *map(load, ("train", "valid", "test")), (None, None), told["notes"]
    for domain, stack in zip(domains, train):
        refuse(not len(stack), f"--data {root}: the domain {domain} has no image that can be read")
    for d, domain in enumerate(() if own_split else domains):
        out, kept = ({file.group for file in files[f"{split}-{d}"]} - {""} for split in ("test", "train"))
        if out and len(out | kept) < 10:
            out = " and ".join(sorted(out))
            notes.append(f"warning: of {domain} {out} is held out whole: is it a patient?")
    if any(file.split == "test" for some in files.values() for file in some):  # else by accident
        pairs = find_pairs(paired_by_name(valid, names("valid")), paired_by_name(test, names("test")))
    if own_split:
        groups = [set(), set()]  # of images to train on, and of the others
        for key, some in files.items():
            groups["train" not in key].update({file.group for file in some} - {""})
        few = len(groups[0]) < 5  # these are no patients
        for group in sorted(set.intersection(*groups))[few:1]:
            notes.append(f"warning: if {group} is a patient, it is both to train and to test on")
    people = [len({f.group or f.name for split in ("train", "valid", "test") for f in files[f"{split}-{d}"]})
              for d in range(len(domains))]
    notes.append("patients, by folders, DICOM or names: " + ", ".join(map("{} {}".format, domains, people)))
    count = len(pairs[1].images) if pairs[1] else "no"
    notes.append(f"{count} pairs to test on, of one name in every domain{unread(left)}")
    readings = {domain: Reading(**how) for domain, how in told["readings"].items()}
    test = [np.concatenate([a, b]) if len(b) else a for a, b in zip(test, valid)]
    return Dataset(domains, size, train[0].shape[1], train, test, *pairs, None, readings, notes)


class Found(NamedTuple):
    """An image of a folder."""
    x: torch.Tensor  # (C, size, size), grey levels
    info: images.Info
    least: float     # grey level
    most: float
    border: float    # share of the file's pixels in a constant border
    drawn: bool      # nearly all pixels have the least or the largest level: a mask, or nothing


def read_files(folder, domains, files, size, bits, inverted, crop, known):
    """Read {key: Files} into KEY.npy, (N, C, size, size), C = 1 if all are grey, else 3, and told.json."""
    def read(file):
        try:
            v, info = images.decode(file.path)
        except UserError as error:
            return str(error)
        inner = v[images.content_box(v)]
        x = crop_to_square(inner if crop else v, size)
        border = 1 - inner.numel() / v.numel()
        least, most = v.min().item(), v.max().item()
        drawn = ((v == least) | (v == most)).float().mean().item() > .999
        return Found(x, replace(info, alpha=None), least, most, border, drawn)

    keep_memory(2**22)  # a file can be large
    told, stacks, coloured = dict(unreadable=[], readings={}, names={}), {}, []
    start, done, total, borders, levels = time.time(), 0, sum(map(len, files.values())), {}, {}
    windows = {}  # domain -> of how many DICOM windows its files are
    dim, drawn, long = {}, [], []  # dim: how many images are dark in their domain's range
    for d, domain in enumerate(domains):
        keys, good = [key for key in files if key.endswith(f"-{d}")], {}  # good: {File: Found}
        own = sum((files[key] for key in keys), [])
        with ThreadPoolExecutor(4) as pool:  # few: an image can be large
            for file, result in zip(own, pool.map(read, own)):
                done += 1
                progress(done, total, start, "reading images, once")
                if isinstance(result, str):
                    told["unreadable"].append(result)
                else:
                    good[file] = result
        low, high, mode = range_of(good, bits, domain)
        reading = Reading(low, high, domain in inverted, crop, mode)
        if domain in known:
            reading = Reading(**known[domain])
            refuse(low < reading.low or high > reading.high, f"{domain} has grey levels {low:g} to {high:g}, "
                   f"in training it had {reading.low:g} to {reading.high:g}")
        told["readings"][domain] = asdict(reading)
        levels[domain] = {found.info.ends(reading) for found in good.values()}
        windows[domain] = len({found.info.extra.get("window") for found in good.values()})
        ends = [(found.most, *found.info.ends(reading)) for found in good.values()]
        filled = np.array([(most - low) / (high - low) for most, low, high in ends])
        dim[domain] = int(sum(filled < (.501 if (filled < .501).sum() > SOME * len(filled) else .26)))
        drawn += [str(file.path) for file, found in good.items() if found.drawn]
        long += [str(file.path) for file, found in good.items()
                 if max(found.info.size) > 1.5 * min(found.info.size)]
        borders[domain] = np.mean([found.border > WIDE for found in good.values()] or [0])
        coloured += [str(file.path) for file, found in good.items() if len(found.x) == 3]
        for key in keys:
            readable = [file for file in files[key] if file in good]
            told["names"][key] = [file.name for file in readable]
            stacks[key] = [images.to_x(good[file].x, good[file].info, reading) for file in readable]
    exact = any(high - low > 4095 for low, high in set.union(*levels.values()))  # float16 holds 12 bits
    for key, found in stacks.items():
        shape = len(found), 3 if coloured else 1, size, size
        stack = np.empty(shape, np.float32 if exact else np.float16)
        for i, x in enumerate(found):
            stack[i] = x  # grey goes into every channel
        np.save(folder / f"{key}.npy", stack)
    told["notes"] = remarks(levels, windows, coloured, total, dim, drawn, long, {} if crop else borders)
    (folder / "told.json").write_text(json.dumps(told))


def remarks(levels, windows, coloured, total, dim, drawn, long, borders):
    """What is said of a folder's files, a line each: their grey levels, colour, and what may be wrong."""
    words = lambda some: " and ".join(f"{low:g} to {high:g}" for low, high in sorted(some))
    notes = ["grey levels: " + ", ".join(f"{d} {words(some)}" + f" by {windows[d]} windows" * (windows[d] > 1)
                                         for d, some in levels.items())]
    if coloured:
        notes.append(f"3 channels, for {len(coloured)} of {total} images, such as {coloured[0]}")
    for domain, count in dim.items():
        if count:
            notes.append(f"warning: {count} of {domain}'s images fill less than half of its levels: "
                         "have they other bits, or some a bright spot?")
    if long:
        notes.append(f"{len(long)} images are long, such as {long[0]}: their middle square is trained on")
    if drawn:
        notes.append(f"warning: {len(drawn)} images have only two grey levels, such as {drawn[0]}: masks?")
    for domain, share in borders.items():
        if share > min(borders.values()) + SOME:
            notes.append(f"warning: {share:.0%} of {domain}'s images have a border of one grey level, more "
                         "than elsewhere: --crop leaves it out")
    return notes


def range_of(good, bits, domain):
    """The grey levels that become -1 and 1 in deep files {File: Found} of a domain, and their mode.
    From 0 up to the next power of two above the largest, likewise down. Files may tell their bits."""
    deep = {file: found for file, found in good.items() if found.info.mode in images.DEEP}
    good = {file: found for file, found in deep.items() if not found.info.bits} or deep
    modes = sorted({found.info.mode for found in good.values()})
    refuse(len(modes) > 1, f"{domain} has deep files of the modes {', '.join(modes)}: write all in one")
    if not good:
        return 0.0, 0.0, "I;16"
    ends = [found.info.ends(Reading(found.least, found.most)) for found in good.values()]
    low, high = min(low for low, _ in ends), max(high for _, high in ends)
    power = lambda level: 2.0 ** math.ceil(math.log2(max(level, 1e-9)))
    if modes == ["F"]:
        top = power(max(high, -low / 2**20) / (1 + images.SLACK))
        return -power(-low / (1 + images.SLACK)) if low < -images.SLACK * top else 0.0, top, "F"
    sign = int(low < 0)
    needed = max(1, int(max(high, -low - 1)).bit_length() + sign)
    if sign and not bits:
        return -power(-low), power(high + 1) - 1, modes[0]
    largest = max(good, key=lambda file: good[file].most)
    refuse(0 < bits < needed and not good[largest].info.bits,
           f"--bits {bits}: {domain} has levels of {needed} bits, {high:g} in {largest.path}")
    top = 2.0 ** (max(bits, needed) - sign)
    return 0.0 - top * sign, top - 1, modes[0]


def paired_by_name(images, names):
    """(N, D, C, H, W): images (N_d, C, H, W) with one name in every domain. names: N_d of each domain."""
    common = sorted(set.intersection(*map(set, names)))
    take = lambda stack, some: stack[[some.index(name) for name in common]]  # the first of a name
    return np.stack(list(map(take, images, names)), 1)


def find_pairs(valid, test):
    """`Pairs` to validate and to test on, (None, None) where they are few. Without the first, the others are
    shared."""
    if len(valid) < 4:
        valid, test = test[::2], test[1::2]
    return (Pairs(valid), Pairs(test)) if min(len(valid), len(test)) >= 4 else (None, None)


# ---------------------------------------------------------------- what was understood

def description(dataset):
    """What a checkpoint says of the images that it was trained on."""
    readings = {domain: asdict(how) for domain, how in (dataset.readings or {}).items()}
    return dict(size=dataset.size, channels=dataset.channels, range=[-1.0, 1.0], readings=readings,
                digests=[digest(images) for images in (*dataset.train_images, *dataset.test_images)])


def sample(images):
    """At most 500 of the images, evenly spread, float32."""
    return np.array(images[::len(images) // 500 + 1], np.float32)


def check(dataset, path=None):
    """Print what was understood of a data set, and what may be wrong. Draw examples to `path`, if given."""
    rows, sizes = [], list(map(len, dataset.train_images))
    for domain, some, kept in zip(dataset.domains[:SHOWN], dataset.train_images, dataset.test_images):
        few = "; few: what they happen to share will be taken for the domain" if len(some) < FEW else ""
        count, some = len(some), sample(some)
        rows.append(some[:: len(some) // 7 + 1][:6])
        print(f"{domain}: {count} to train, {len(kept)} held out; "
              f"values {some.min():.2f} to {some.max():.2f}, mean {some.mean():.2f}{few}")
        if np.ptp(np.quantile(some, (.01, .99))) < NARROW:
            print(f"warning: {domain} fills a small part of its range: is one pixel bright, or --bits wrong?")
        both = np.concatenate([some, sample(kept)])
        odd = max(((alike(part) < OPPOSITE).mean(1) > .3).sum() for part in (both, inner(both)))
        if odd:
            print(f"warning: {odd} of {len(both)} images of {domain} look like negatives of others")
    codes = Counter(zlib.crc32(x.tobytes()) for images in (*dataset.train_images, *dataset.test_images)
                    for x in images)
    if twice := sum(n > 1 for n in codes.values()):
        print(f"warning: {twice} images are there more than once, in two domains or in one")
    if len(sizes) > SHOWN or np.median(sizes) < 5:
        print(f"warning: {len(sizes)} domains, most of few images: are these domains, or patients?")
    print(*dataset.notes, sep="\n", end="\n" * bool(dataset.notes), flush=True)
    for a, b in opposite(dataset):
        print(f"warning: {a} and {b} look like negatives of each other: a translation between them "
              f"will not show the same thing; --invert {shlex.quote(b)} reads it as a negative")
    if path:
        figure(path, rows, [], dataset.domains[:SHOWN])
        print(f"examples: {path}")


def alike(images):
    """The correlations, (N, N), of images (N, C, H, W)."""
    flat = images.mean(1).reshape(len(images), -1)
    return np.corrcoef(flat + 1e-9 * np.arange(flat.shape[1]))  # for images without any contrast


def inner(images):
    """Images (N, C, H, H) without an eighth at each side, where frames and borders are."""
    m = 3 * images.shape[-1] // 16
    return images[..., m:-m, m:-m]


def opposite(dataset):
    """Pairs of domains of opposite polarity: where one's mean image is bright, the other's is dark. Coarse
    contrast is what noise remembers of an image, so a translation keeps it: dark stays dark."""
    means = np.stack([inner(sample(images)).mean(0) for images in dataset.train_images])
    pairs = np.argwhere(np.triu(alike(means) < OPPOSITE, 1))
    return [(dataset.domains[i], dataset.domains[j]) for i, j in pairs]
