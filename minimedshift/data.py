"""Images in, batches out: what a data set is, the cache, image files read and written, your own folders."""

import hashlib
import inspect
import json
import math
import os
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

from minimedshift.support.command import UserError, whole


# ---------------------------------------------------------------- what a data set is

@dataclass(frozen=True)
class Pairs:
    """The same N heads in all D domains, float16. A simulator fills all, a paired folder `images` alone."""
    images: np.ndarray                     # (N, D, C, H, W) as taken
    truth: np.ndarray | None = None        # (N, D, C, H, W) noise-free
    second: np.ndarray | None = None       # (N, D, C, H, W) taken again: fresh noise and fine texture
    materials: np.ndarray | None = None    # (N, 3, H, W) centimetres of bone, soft tissue and brain
    decoys: np.ndarray | None = None       # (N, K, D, C, H, W) noise-free, of K other people in the same view


@dataclass(frozen=True)
class Dataset:
    """Unpaired training images, per domain (N_d, C, H, W) float16 in [-1, 1], and what is kept apart."""
    domains: tuple
    size: int
    channels: int
    train: list
    held_out: list                      # per domain: images never trained on
    valid: Pairs | None = None          # paired heads: only a simulator has them
    test: Pairs | None = None
    facts: dict = field(default_factory=dict)  # per domain: count, sizes, depths of the files
    weights: list | None = None         # per domain (N_d,): how often an image is drawn, mean 1; None: alike

    def batch(self, y, generator):
        """A training image for each label in y (B,), by its weight: (B, C, H, W) float32. CPU generator."""
        u = torch.rand(len(y), generator=generator, dtype=torch.float64).numpy()
        y = y.numpy()
        x1 = np.empty((len(y), self.channels, self.size, self.size), np.float16)
        for d in np.unique(y):
            mine = np.flatnonzero(y == d)
            x1[mine] = self.train[d][self.pick(d, u[mine])]
        return torch.from_numpy(x1).float()

    def pick(self, d, u):
        """The training images of domain d, int64, that uniform numbers u (n,) in [0, 1) stand for."""
        count = len(self.train[d])
        if self.weights is None:
            return (u * count).astype(np.int64)
        until = np.cumsum(self.weights[d], dtype=np.float64)
        return np.searchsorted(until, u * until[-1], side="right").clip(max=count - 1)

    def drawn(self, d):
        """The training images of domain d, each as often as it is drawn in training: of N again N."""
        if self.weights is None:
            return self.train[d]
        count = len(self.train[d])
        return self.train[d][self.pick(d, (np.arange(count) + .5) / count)]


def only(dataset, names):
    """The domains `names` alone, in this order. Raises UserError for fewer than two, or an unknown one."""
    for name in names:
        if name not in dataset.domains:
            raise UserError(f"--domains: {name or 'an empty name'} is no domain of this data, "
                            f"choose from {', '.join(dataset.domains)}")
    keep = [dataset.domains.index(name) for name in names]
    if len(set(keep)) < max(2, len(keep)):
        raise UserError("--domains needs two or more different names, separated by commas")
    some = lambda per_domain: [per_domain[d] for d in keep]
    return replace(dataset, domains=tuple(some(dataset.domains)), train=some(dataset.train),
                   held_out=some(dataset.held_out), weights=dataset.weights and some(dataset.weights),
                   valid=only_pairs(dataset.valid, keep), test=only_pairs(dataset.test, keep))


def only_pairs(pairs, keep):
    """`Pairs` with the domains of index `keep` alone."""
    if pairs is None:
        return None
    some = {}
    for name in ("images", "truth", "second"):
        if getattr(pairs, name) is not None:
            some[name] = getattr(pairs, name)[:, keep]
    if pairs.decoys is not None:
        some["decoys"] = pairs.decoys[:, :, keep]
    return replace(pairs, **some)


def progress(done, total, start, what, unit="images"):
    """One line that rewrites itself on a terminal; in a log file only the last one appears."""
    if not sys.stdout.isatty() and done < total:
        return
    rate = done / max(time.time() - start, 1e-9)
    left = f"{(total - done) / rate:.0f} s left" if done < total else f"{total / rate:.0f} s"
    end = "\n" if done == total else ""
    print(f"\r{what}: {done}/{total}, {rate:.1f} {unit}/s, {left}   ", end=end, flush=True)


# ---------------------------------------------------------------- the cache

def cached(root, name, content, build):
    """The folder root/name-KEY, made by build(folder) unless it is there.

    KEY is a hash of `content`, which is all that determines the folder.
    It is built under another name and renamed last: half a set never appears; two may build at once.
    """
    root = Path(root or os.environ.get("MINIMEDSHIFT_CACHE") or Path.home() / ".cache" / "minimedshift")
    key = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
    final = root / f"{name}-{key}"
    if final.is_dir():
        return final
    try:
        root.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=".building-", dir=root))
    except OSError as error:
        raise UserError(f"the cache {root} cannot be written ({error.strerror}): "
                        "set MINIMEDSHIFT_CACHE to a folder that can") from None
    try:
        build(work)
        try:
            work.rename(final)
        except OSError:
            if not final.is_dir():  # else another process was first, with the same bytes
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return final


# ---------------------------------------------------------------- image files

# extension -> format name, the modes it can hold, how it is saved without loss (JPEG: nearly)
GREYS, PALETTES, COLOURS = ("1", "L", "LA", "I;16"), ("P",), ("RGB", "RGBA")
FORMATS = {".png": ("PNG", GREYS + PALETTES + COLOURS, {}),
           ".tif": ("TIFF", GREYS + PALETTES + COLOURS, {}),
           ".jpg": ("JPEG", ("L", "RGB"), dict(quality=95, subsampling=0)),
           ".bmp": ("BMP", ("1", "L", "P", "RGB"), {}),
           ".webp": ("WEBP", COLOURS, dict(lossless=True, exact=True))}
FORMATS |= {".tiff": FORMATS[".tif"], ".jpeg": FORMATS[".jpg"]}
LUMINANCE = (.299, .587, .114)  # ITU-R BT.601


@dataclass(frozen=True)
class Info:
    """What is needed to write an image as it was read."""
    mode: str                       # Pillow's name: L, LA, P, RGB, RGBA, I;16, 1
    depth: int                      # bits a channel
    size: tuple                     # (height, width)
    alpha: np.ndarray | None = None # (H, W) uint8, kept as it was
    extra: dict = field(default_factory=dict)  # orientation, resolution, colour profile


def read_image(path):
    """x (C, H, W) float32 in [-1, 1] and its Info; C = 1 where all channels are equal, else 3.

    16-bit grey keeps its depth. Alpha is put aside: colours count as stored. Raises UserError if unreadable.
    """
    try:
        with Image.open(path) as image:
            tile, frames = str(getattr(image, "tile", "")), getattr(image, "n_frames", 1)
            image.load()
            extra = {k: image.info[k] for k in ("exif", "dpi", "icc_profile") if image.info.get(k)}
            mode = "I;16" if image.mode.startswith("I;16") else image.mode
            deep_colour = ";16" in tile and mode != "I;16"  # which Pillow would reduce to 8 bits
            if mode not in GREYS + PALETTES + COLOURS or deep_colour or frames > 1:
                what = "16-bit colour" if ";16" in tile else f"mode {mode}"
                what = f"{frames} pages" if frames > 1 else what
                raise UserError(f"{path}: {what} cannot be translated; "
                                "write it as one 8- or 16-bit grey or 8-bit RGB image")
            if mode == "P" and "transparency" in image.info:
                mode, image = "RGBA", image.convert("RGBA")
            plain = {"P": "RGB", "1": "L"}
            pixels = np.asarray(image.convert(plain[mode]) if mode in plain else image)
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file") from None
    except Exception as error:  # a damaged file can raise anything in its decoder
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: cannot be read as an image ({why})") from None
    depth = {"I;16": 16, "1": 1}.get(mode, 8)
    alpha = pixels[..., -1].copy() if mode in ("LA", "RGBA") else None
    v = torch.from_numpy(pixels.astype(np.float32)).reshape(*pixels.shape[:2], -1)
    v = v[..., :-1] if alpha is not None else v
    if v.shape[-1] == 3 and bool((v == v[..., :1]).all()):
        v = v[..., :1]
    x = v.permute(2, 0, 1) / (65535 if depth == 16 else 255) * 2 - 1
    return x.contiguous(), Info(mode, depth, tuple(x.shape[1:]), alpha, extra)


def channels_to(x, channels):
    """x (C, H, W) with 1 or 3 channels: the luminance of a coloured image, or a grey one repeated."""
    if len(x) == channels:
        return x
    if channels == 1:
        return (x * torch.tensor(LUMINANCE).view(3, 1, 1)).sum(0, keepdim=True)
    return x.expand(channels, -1, -1)


def check_writable(path, info):
    """Raise UserError unless the format that `path` names by its extension can hold an image of this mode."""
    name, modes, _ = FORMATS.get(Path(path).suffix.lower(), ("", (), {}))
    if not name:
        raise UserError(f"{path}: an image file ends in one of {' '.join(FORMATS)}")
    if info.mode not in modes:
        what = f"a {info.depth}-bit {info.mode} image"
        raise UserError(f"{path}: {name} cannot hold {what}; choose .png or .tif")


def write_image(path, x, info):
    """Write x (C, H, W) in [-1, 1] as `info` says, whole or not at all; the extension is the format."""
    path = Path(path)
    check_writable(path, info)
    name, _, options = FORMATS[path.suffix.lower()]
    x = channels_to(x.detach().float().cpu(), 3 if info.mode in ("P", "RGB", "RGBA") else 1)
    top, kind = (65535, np.uint16) if info.depth == 16 else (255, np.uint8)
    v = ((x + 1) / 2 * top).round().clamp(0, top).permute(1, 2, 0).numpy().astype(kind)
    if info.alpha is not None:
        v = np.concatenate([v, info.alpha[..., None]], -1)
    if info.mode == "P":
        image = to_palette(v)
    else:
        image = Image.fromarray(v[..., 0] if v.shape[-1] == 1 else v)
        image = image.convert("1") if info.mode == "1" else image
    try:
        with whole(path) as work:
            image.save(work, format=name, **options, **info.extra)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from None


def to_palette(v):
    """A palette image of v (H, W, 3) uint8: exact up to 256 colours, so always for grey."""
    colours, index = np.unique(v.reshape(-1, 3), axis=0, return_inverse=True)
    if len(colours) > 256:
        return Image.fromarray(v).quantize(256)
    image = Image.fromarray(index.reshape(v.shape[:2]).astype(np.uint8), mode="L")
    image.putpalette(colours.astype(np.uint8).tobytes())
    return image


def image_files(folder):
    """All files in a folder and below that are images by name, sorted; hidden ones are not looked at."""
    found = [Path(at) / name for at, _, names in os.walk(folder, followlinks=True) for name in names]
    hidden = lambda path: any(part.startswith(".") for part in path.relative_to(folder).parts)
    return sorted(path for path in found if path.suffix.lower() in FORMATS and not hidden(path))


# ---------------------------------------------------------------- your own folders

def fit(x, size):
    """x (C, H, W) -> (C, size, size): the shorter side resized, antialiased, to `size`; the centre kept."""
    shorter = min(x.shape[1:])
    h, w = (max(size, round(n * size / shorter)) for n in x.shape[1:])
    if (h, w) != x.shape[1:]:
        x = F.interpolate(x[None], (h, w), mode="bilinear", antialias=True)[0]
    top, left = (h - size) // 2, (w - size) // 2
    return x[:, top:top + size, left:left + size]


def by_domain(base, skip=()):
    """{domain: its image files}; the folders on the way to an image, joined with "-", name its domain."""
    found = {}
    for path in image_files(base):
        parts = path.relative_to(base).parts[:-1]
        if parts and parts[0] not in skip:
            found.setdefault("-".join(parts), []).append(path)
    return dict(sorted(found.items()))


def build_folder(folder, files, size, show):
    """Read every file of {split: {domain: files}} into folder/*.npy; what was found: folder/facts.json."""
    facts, bad, arrays, done, start = {}, [], {}, 0, time.time()
    total = sum(len(paths) for split in files.values() for paths in split.values())

    def load(path):
        try:
            x, info = read_image(path)
            return fit(x, size).half().numpy(), info
        except UserError as error:
            return error, None

    names = {}  # of the images that could be read, without extension: one name in all domains is a pair
    for split, domains in files.items():
        for domain, paths in domains.items():
            images, fact = [], facts.setdefault(domain, dict(count=0, sizes={}, depths={}))
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                for path, (x, info) in zip(paths, pool.map(load, paths)):
                    done += 1
                    if show:
                        progress(done, total, start, "reading images, once")
                    if info is None:
                        bad.append(str(x))
                        continue
                    images.append(x)
                    names.setdefault(split, {}).setdefault(domain, []).append(path.stem)
                    fact["count"] += 1
                    height, width = info.size
                    size_read, depth_read = f"{width}x{height}", f"{info.depth}-bit {info.mode}"
                    for table, key in (("sizes", size_read), ("depths", depth_read)):
                        fact[table][key] = fact[table].get(key, 0) + 1
            arrays[split, domain] = images
    channels = max((len(x) for images in arrays.values() for x in images), default=1)
    for d, domain in enumerate(facts):
        for split in files:
            images = arrays.get((split, domain), [])
            images = [np.repeat(x, channels, 0) if len(x) < channels else x for x in images]
            none = np.empty((0, channels, size, size), np.float16)
            np.save(folder / f"{split}-{d}.npy", np.stack(images) if images else none)
    found = dict(facts=facts, bad=bad, names=names.get("test", {}))
    (folder / "facts.json").write_text(json.dumps(found))


def folder_set(root, size, seed=0, cache=None, progress=True):
    """The images of ROOT/DOMAIN, or of ROOT/train/DOMAIN and ROOT/test/DOMAIN.

    Without ROOT/test a tenth is held out, drawn by `seed`.
    Raises UserError for a missing folder, fewer than two domains, or a domain without a readable image.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"--data {root}: there is no such folder")
    split = (root / "test").is_dir()
    base = root / "train" if (root / "train").is_dir() else root
    files = {"train": by_domain(base, skip=("test",) if split else ())}
    files["test"] = by_domain(root / "test") if split else {}
    domains = tuple(files["train"])
    if len(domains) < 2:
        plural = "s" * (len(domains) != 1)
        named = "".join(f" ({domain})" for domain in domains)
        raise UserError(f"--data {root}: found {len(domains)} domain{plural}{named}, "
                        "and two or more sub-folders with images are needed")
    if unknown := [d for d in files["test"] if d not in domains]:
        raise UserError(f"--data {root}: test has {', '.join(unknown)}, "
                        "for which there are no training images")
    stamp = lambda path: (str(path.relative_to(root)), path.stat().st_size, path.stat().st_mtime_ns)
    stamps = {}  # they tell that a file has changed
    for name, found in files.items():
        stamps[name] = {domain: [stamp(path) for path in paths] for domain, paths in found.items()}
    content = [inspect.getsource(sys.modules[__name__]), torch.__version__, str(root.resolve()), size, stamps]
    folder = cached(cache, f"folder-{size}", content, lambda work: build_folder(work, files, size, progress))
    found = json.loads((folder / "facts.json").read_text())
    if found["bad"]:
        print("\n".join(found["bad"]), file=sys.stderr)
        print(f"skipped {len(found['bad'])} unreadable files", file=sys.stderr)
    train = [np.load(folder / f"train-{d}.npy", mmap_mode="r") for d in range(len(domains))]
    test = [np.load(folder / f"test-{d}.npy", mmap_mode="r") for d in range(len(domains))]
    if not split:
        for d, images in enumerate(train):
            out = len(images) // 10 or int(len(images) >= 5)
            order = np.random.default_rng([seed, d]).permutation(len(images))
            test[d] = images[np.sort(order[:out])]
            train[d] = images[np.sort(order[out:])]
    for domain, images in zip(domains, train):
        if not len(images):
            raise UserError(f"--data {root}: the domain {domain} has no image that can be read")
    valid, paired = None, None
    if split:
        valid, paired = paired_by_name(test, [found["names"].get(domain, []) for domain in domains])
    return Dataset(domains, size, train[0].shape[1], train, test, valid, paired, found["facts"])


def paired_by_name(images, names, fewest=8):
    """Two `Pairs`, for validation and testing: images with the same file name in every domain, by turns.

    images: (N_d, C, H, W) of each domain, names: N_d of each.
    (None, None) where fewer than `fewest` names are in all domains, or a name is twice in one.
    """
    common = sorted(set.intersection(*map(set, names)))
    twice = any(len(set(some)) < len(some) for some in names)
    if len(common) < fewest or twice:
        return None, None
    stacks = []
    for stack, some in zip(images, names):
        stacks.append(np.asarray(stack)[[some.index(name) for name in common]])
    pairs = np.stack(stacks, 1)  # (N, D, C, H, W)
    return Pairs(pairs[::2]), Pairs(pairs[1::2])


# ---------------------------------------------------------------- looking at it

def figure(path, rows, columns, labels, cell=160):
    """A picture of `rows`, (C, H, W) images in [-1, 1] or None for gaps, under `columns`, beside `labels`."""
    font, line, step = ImageFont.load_default(13), 18, cell + 4
    widths = [7 * len(part) for label in labels for part in label.split("\n")]
    left = 10 + max(widths, default=0)
    top = 6 + line * max([text.count("\n") + 1 for text in columns], default=0)
    sheet = Image.new("RGB", (left + max(map(len, rows)) * step, top + len(rows) * step), "white")
    draw = ImageDraw.Draw(sheet)
    for r, (row, label) in enumerate(zip(rows, labels)):
        draw.multiline_text((4, top + r * step + 4), label, fill="black", font=font)
        for c, x in enumerate(row):
            if x is None:
                continue
            x = channels_to(torch.as_tensor(x).float(), 3)
            v = ((x + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
            scale = cell / max(v.shape[:2])
            height, width = (max(1, round(n * scale)) for n in v.shape[:2])
            how = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS
            sheet.paste(Image.fromarray(v).resize((width, height), how), (left + c * step, top + r * step))
    for c, text in enumerate(columns):
        draw.multiline_text((left + c * step, 2), text, fill="black", font=font)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as work:
        sheet.save(work)


def check(dataset, path, each=6):
    """A grid of examples to `path`; print and return a line per domain: count, sizes, depths, values."""
    rows, lines = [], []

    def most(table):  # the four most frequent entries of {name: count}
        entries = sorted(table.items(), key=lambda entry: -entry[1])
        return ", ".join(f"{key} ({n})" for key, n in entries[:4]) + ", ..." * (len(table) > 4)

    for domain, images, kept in zip(dataset.domains, dataset.train, dataset.held_out):
        some = np.asarray(images[:: math.ceil(len(images) / 500)], np.float32)
        fact = dataset.facts[domain]
        lines.append(f"{domain}: {len(images)} to train, {len(kept)} held out; sizes {most(fact['sizes'])}; "
                     f"depths {most(fact['depths'])}; values {some.min():.2f} to {some.max():.2f}, "
                     f"mean {some.mean():.2f}")
        shown = np.linspace(0, len(some) - 1, min(each, len(some))).astype(int)
        rows.append(list(some[shown]))
    figure(path, rows, [], list(dataset.domains))
    print("\n".join(lines + [f"examples: {path}"]))
    return lines
