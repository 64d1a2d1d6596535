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
from types import SimpleNamespace

import numpy as np
import PIL
import torch

from minimedshift.balance import contrast_thumbnails, effective
from minimedshift.baselines import spread
from minimedshift.folder import SPLITS, find_files, people, unread
from minimedshift.sizes import crop_to_square, resize
from minimedshift.support import dicom, images
from minimedshift.support.command import UserError, refuse
from minimedshift.support.files import cached, digest
from minimedshift.support.images import Reading, figure
from minimedshift.support.log import progress
from minimedshift.support.machine import in_batches, keep_memory

NARROW = 0.5  # of 2: `check` warns where 98 % of the pixels of a domain lie in so little of its range
WIDE = 0.1  # a border counts if it is this share of an image
FEW, SHOWN, MANY = 50, 8, 500  # images that are few, domains that `check` shows, images that it looks at
SOME = 0.1  # a share of a domain's images, or of one image, that is worth a word
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

    def shrunk(self, size):
        """The same with training images of `size` pixels a side, if they are larger."""
        if self.size <= size:
            return self
        small = lambda x: resize(x.float(), (size, size)).half()
        smaller = [in_batches(small, torch.from_numpy(images), 500).numpy() for images in self.train_images]
        return replace(self, size=size, train_images=smaller)

    def counts(self):
        """How many training images of each domain count: all, or fewer if some are drawn more often."""
        return list(map(effective, self.weights or [np.ones(len(images)) for images in self.train_images]))

    def drawn(self, d, count=None):
        """`count` training images of domain d (None: as many as there are), as often as in training."""
        count = count or len(self.train_images[d])
        return self.train_images[d][self.pick(d, (np.arange(count) + .5) / count)]


def folder_set(root, size, seed=0, cache=None, bits=0, invert="", crop=False, known=None):
    """The Dataset of a folder (folder.py). bits: of files deeper than 8 (0: as the largest level needs).
    invert: domains, with commas, whose files are negatives. crop: constant borders are left out.
    known: {domain: Reading} to take instead. Raises UserError for what is not clear."""
    domains, files, own_split, left = find_files(root, seed)
    inverted, known = set(invert.split(",")) - {""}, known or {}
    refuse(inverted - set(domains), f"--invert {invert}: the domains are {', '.join(domains)}")
    stamp = lambda path: (str(path.absolute()), *path.stat()[6::2])  # size and time of the last change
    parts = images, dicom, crop_to_square, read_files, range_of, remarks
    code = [inspect.getsource(part) for part in parts]
    stamps = {key: [stamp(file.path) for file in some] for key, some in files.items()}
    decoders = [name for name in ("pydicom", "pylibjpeg", "gdcm") if find_spec(name)]
    content = [code, torch.__version__, PIL.__version__, decoders, size, stamps, bits, sorted(inverted),
               crop, {domain: asdict(how) for domain, how in known.items()}]
    make = lambda work: read_files(work, domains, files, size, bits, inverted, crop, known)
    folder = cached(cache, f"folder-{size}", content, make)

    told = json.loads((folder / "told.json").read_text())
    if lost := told["unreadable"]:
        print(*lost, f"skipped {len(lost)} unreadable files", sep="\n", file=sys.stderr)
    stacks = {key: np.load(folder / f"{key}.npy", mmap_mode="c") for key in files}
    train, valid, test = ([stacks[f"{split}-{d}"] for d in range(len(domains))] for split in SPLITS)
    for domain, stack in zip(domains, train):
        refuse(not len(stack), f"--data {root}: the domain {domain} has no image that can be read")
    pairs, readings = (None, None), {domain: Reading(**how) for domain, how in told["readings"].items()}
    if any(file.split == "test" for some in files.values() for file in some):  # else by accident
        pairs = find_pairs(stacks, told["names"], len(domains))
    count, strange = len(pairs[1].images) if pairs[1] else "no", []
    if pairs[1]:  # a head is nearer to itself than to others, whatever the domain
        apart = torch.cdist(*(contrast_thumbnails(pairs[1].images[:, d]) for d in (0, 1)))
        if apart.diagonal().mean() > 0.75 * apart.mean():
            strange = [f"warning: in {domains[0]} and {domains[1]} one name seems not to be one head"]
    notes = [*told["notes"], *people(domains, files, own_split), *strange,
             f"{count} pairs to test on, of one name in every domain{unread(left)}"]
    test = [np.concatenate([a, b]) if len(b) else a for a, b in zip(test, valid)]
    return Dataset(domains, size, train[0].shape[1], train, test, *pairs, None, readings, notes)


def read_files(folder, domains, files, size, bits, inverted, crop, known):
    """Read {key: Files} into KEY.npy, (N, C, size, size), C = 1 if all are grey, else 3, and told.json."""
    def read(file):  # returns a small image, and what has to be known of the whole; or why it cannot be read
        try:
            v, info = images.decode(file.path)
        except UserError as error:
            return str(error)
        inner, least, most = v[images.content_box(v)], v.min().item(), v.max().item()
        framed = inner.numel() < (1 - WIDE) * v.numel()
        drawn = ((v == least) | (v == most)).float().mean().item() > .999  # as a mask is, or a blank image
        x = crop_to_square(inner if crop else v, size)  # grey levels
        return SimpleNamespace(path=file.path, info=replace(info, alpha=None), x=x, least=least, most=most,
                               framed=framed, drawn=drawn)

    keep_memory()  # a file can be large
    own, start, results = [file for some in files.values() for file in some], time.time(), {}
    with ThreadPoolExecutor(4) as pool:  # few: an image can be large
        for file, result in zip(own, pool.map(read, own)):
            results[file] = result
            progress(len(results), len(own), start, "reading images, once")
    good = {file: result for file, result in results.items() if not isinstance(result, str)}
    found = {domain: [good[file] for file in good if file.domain == domain] for domain in domains}
    readings = {}
    for domain, some in found.items():
        low, high, mode = range_of(some, bits, domain)
        readings[domain] = how = known.get(domain, Reading(low, high, domain in inverted, crop, mode))
        refuse(low < how.low or high > how.high, f"{domain} has grey levels {low:g} to {high:g}, "
               f"in training it had {how.low:g} to {how.high:g}")
    ends = [image.info.ends(readings[file.domain]) for file, image in good.items()]
    dtype = np.float32 if any(high - low > 4095 for low, high in ends) else np.float16  # of 12 bits
    channels, names = max((len(image.x) for image in good.values()), default=1), {}
    for key in files:
        some = [file for file in files[key] if file in good]
        names[key] = [file.name for file in some]
        stack = np.empty((len(some), channels, size, size), dtype)
        for i, file in enumerate(some):  # grey goes into every channel
            stack[i] = images.to_x(good[file].x, good[file].info, readings[file.domain])
        np.save(folder / f"{key}.npy", stack)
    told = dict(unreadable=[result for result in results.values() if isinstance(result, str)], names=names,
                readings={domain: asdict(how) for domain, how in readings.items()},
                notes=remarks(found, readings, crop))
    (folder / "told.json").write_text(json.dumps(told))


def remarks(found, readings, crop):
    """What is said of {domain: what `read` returned of its files}, a line each: levels, what may be wrong."""
    levels, notes, every = [], [], sum(found.values(), [])

    def say(some, words, domain=""):
        if some:
            notes.append(words.format(n=len(some), all=len(every), path=some[0].path, domain=domain))

    say([image for image in every if len(image.x) > 1], "3 channels, for {n} of {all} images, such as {path}")
    say([image for image in every if max(image.info.size) > (1 + SOME) * min(image.info.size)],
        "{n} of {all} images are not square, such as {path}: their middle square is trained on")
    sides = [image.info.extra.get("sides") or image.info.extra.get("dpi", (1, 1)) for image in every]
    say([image for image, (a, b) in zip(every, sides) if not .98 * b <= a <= 1.02 * b],
        "warning: {n} images have pixels that are not square, such as {path}: they are read as squares")
    say([image for image in every if image.drawn],
        "warning: {n} images have only two grey levels, such as {path}: masks?")
    framed = {domain: np.mean([image.framed for image in some] or [0]) for domain, some in found.items()}
    for domain, some in found.items():
        ends = [image.info.ends(readings[domain]) for image in some]
        filled = np.array([(image.most - low) / (high - low) for image, (low, high) in zip(some, ends)])
        half = .501 if sum(filled < .501) > SOME * len(some) else .26
        say([image for image, part in zip(some, filled) if part < half],
            "warning: {n} of {domain}'s images fill less than half of its levels, such as {path}: have they "
            "other bits, or some a bright spot?", domain)
        more = framed[domain] > min(framed.values()) + SOME and not crop
        say([image for image in some if image.framed and more],
            "warning: {n} of {domain}'s images have a border of one grey level, such as {path}, more than "
            "elsewhere: --crop leaves it out", domain)
        windows = sorted({image.info.extra.get("window", "none, no DICOM") for image in some})
        if len(windows) > 1 and ("none" in windows[-1] or len(windows) < len(some) / 2):
            notes.append(f"warning: in {domain} one level may not mean one thing, as its files have "
                         f"{len(windows)} windows, such as {windows[0]} and {windows[-1]}")
        words = " and ".join(f"{low:g} to {high:g}" for low, high in sorted({*ends}))
        levels.append(f"{domain} {words}" + f" by {len(windows)} windows" * (len(windows) > 1))
    return ["grey levels: " + ", ".join(levels), *notes]


def range_of(some, bits, domain):
    """The grey levels that become -1 and 1 in the deep files of a domain, and their mode.
    From 0 up to the next power of two above the largest, likewise down. Files may tell their bits."""
    deep = [image for image in some if image.info.mode in images.DEEP]
    deep = [image for image in deep if not image.info.bits] or deep
    modes = sorted({image.info.mode for image in deep})
    refuse(len(modes) > 1, f"{domain} has deep files of the modes {', '.join(modes)}: write all in one")
    if not deep:
        return 0.0, 0.0, "I;16"
    lows, highs = zip(*(image.info.ends(Reading(image.least, image.most)) for image in deep))
    low, high, step = min(lows), max(highs), int(modes != ["F"])  # step: from one level to the next
    slack = 0 if step else images.SLACK
    power = lambda level: 2.0 ** math.ceil(math.log2(max(level / (1 + slack), 1e-9)))
    top = power(max(high, step, -low / 2**20) + step) - step
    bottom = -power(-low) if low < -slack * top else 0.0
    if bits and step:
        half = 2.0 ** (bits - (low < 0))
        most = max(deep, key=lambda image: max(image.most + 1, -image.least))
        refuse(max(most.most + 1, -most.least) > half and not most.info.bits,
               f"--bits {bits}: {domain} has the levels {most.least:g} to {most.most:g} in {most.path}")
        bottom, top = -half if low < 0 else 0.0, max(top, half - 1)
    return bottom, top, modes[0]


def find_pairs(stacks, names, count):
    """`Pairs` to validate and to test on: images of one name in all `count` domains, None where they are few.
    Without the first, the others are shared. stacks: {key: (N, C, H, W)}, names: {key: N names}."""
    found = []
    for split in ("valid", "test"):
        keys = [f"{split}-{d}" for d in range(count)]
        common = sorted(set.intersection(*(set(names[key]) for key in keys)))
        take = lambda key: stacks[key][[names[key].index(name) for name in common]]  # the first of a name
        found.append(np.stack([take(key) for key in keys], 1))
    valid, test = found if len(found[0]) >= 4 else (found[1][::2], found[1][1::2])
    return (Pairs(valid), Pairs(test)) if min(len(valid), len(test)) >= 4 else (None, None)


def description(dataset):
    """What a checkpoint says of the images that it was trained on."""
    readings = {domain: asdict(how) for domain, how in (dataset.readings or {}).items()}
    digests = [digest(images) for images in (*dataset.train_images, *dataset.test_images)]
    return dict(size=dataset.size, channels=dataset.channels, readings=readings, digests=digests)


def check(dataset, path=None):
    """Print what was understood of a data set, and what may be wrong. Draw examples to `path`, if given."""
    rows, sizes = [], list(map(len, dataset.train_images))
    for domain, some, kept in zip(dataset.domains[:SHOWN], dataset.train_images, dataset.test_images):
        few = "; few: what they happen to share will be taken for the domain" if len(some) < FEW else ""
        count, some = len(some), spread(some, MANY).numpy()
        rows.append(some[:: len(some) // 7 + 1][:6])
        print(f"{domain}: {count} to train, {len(kept)} held out; "
              f"values {some.min():.2f} to {some.max():.2f}, mean {some.mean():.2f}{few}")
        if np.ptp(np.quantile(some, (.01, .99))) < NARROW:
            print(f"warning: {domain} fills a small part of its range: is one pixel bright, or --bits wrong?")
        both = np.concatenate([some, spread(kept, MANY).numpy()])
        found = [m[m.mean(1) > .3].sum(1) for m in (negatives(both, inner) for inner in (False, True))]
        counts = [min(len(n), round(np.median(np.minimum(n, len(both) - n)))) for n in found if len(n)]
        if odd := max(counts, default=0):
            print(f"warning: {odd} of {len(both)} images of {domain} look like negatives of others")
    codes = Counter(zlib.crc32(x.tobytes()) for images in (*dataset.train_images, *dataset.test_images)
                    for x in images)
    if twice := sum(n > 1 for n in codes.values()):
        print(f"warning: {twice} images are there more than once, in two domains or in one")
    if len(sizes) > SHOWN or np.median(sizes) < 5:
        print(f"warning: {len(sizes)} domains, most of few images: are these domains, or patients?")
    print(*dataset.notes, sep="\n", end="\n" * bool(dataset.notes))
    for a, b in opposite(dataset):
        print(f"warning: {a} and {b} look like negatives of each other: a translation between them "
              f"will not show the same thing; --invert {shlex.quote(b)} reads it as a negative")
    if path:
        figure(path, rows, [], dataset.domains[:SHOWN])
        print(f"examples: {path}")


def negatives(images, inner=True):
    """Which images (N, C, H, H) look like negatives of each other, (N, N). inner: without their outer part,
    where frames are. Coarse contrast is what noise remembers of an image, so a translation keeps it."""
    m = 3 * images.shape[-1] // 16 * inner
    part = slice(m, images.shape[-1] - m)
    flat = images[..., part, part].mean(1).reshape(len(images), -1)
    return np.atleast_2d(np.corrcoef(flat + 1e-9 * np.arange(flat.shape[1]))) < OPPOSITE  # of no contrast too


def opposite(dataset):
    """Pairs of domains of opposite polarity: where one's mean image is bright, the other's is dark."""
    means = torch.stack([spread(images, MANY).mean(0) for images in dataset.train_images]).numpy()
    return [(dataset.domains[i], dataset.domains[j]) for i, j in np.argwhere(np.triu(negatives(means), 1))]
