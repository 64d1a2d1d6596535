"""Image files: read as people see them, with what is needed to write them back as they were."""

import math
import re
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps, TiffImagePlugin

from minimedshift.support import dicom
from minimedshift.support.command import UserError, refuse
from minimedshift.support.files import write_whole

DEEP = {"I;16": np.uint16, "I": np.int16, "F": np.float32}  # Pillow's modes of more than 8 bits
MODES = ("L", "LA", "RGB", "RGBA", "I;16")
FORMATS = {  # extension -> format, the modes it can hold, how it is saved without loss (JPEG: nearly)
    ".png": ("PNG", MODES, {}),
    ".tif": ("TIFF", (*MODES, *DEEP), {}),
    ".jpg": ("JPEG", ("L", "RGB"), dict(quality=95, subsampling=0)),
    ".bmp": ("BMP", ("L", "RGB"), {}),
    ".webp": ("WEBP", ("RGB", "RGBA"), dict(lossless=True, exact=True)),
}
READ = tuple({name for name, _, _ in FORMATS.values()})  # some others that Pillow knows run programs
FORMATS |= {".tiff": FORMATS[".tif"], ".jpeg": FORMATS[".jpg"], ".jfif": FORMATS[".jpg"]}
PIXELS = 64_000_000  # the most in an image, 8000 x 8000; in colour it then takes 2 GB
Image.MAX_IMAGE_PIXELS = PIXELS // 2  # Pillow refuses twice as many, before it loads them
THIN, SLACK = 16, .05  # the most of one side over the other; of a float's range, that is not worth a word
BORDER = .04  # what differs by less than this share of the range is one grey level: JPEG and noise are in it
LYING = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # EXIF's orientation -> the Image.Transpose that makes it
KEPT = (270, 282, 283, 296)  # of a TIFF file: description (with ImageJ's scale), resolution and its unit
warnings.filterwarnings("ignore", module="PIL")  # a doubtful part of a header is kept or dropped
# TIFF, big-endian, white is 0, 16 bits: Pillow knows it in the other byte order alone
TiffImagePlugin.OPEN_INFO.setdefault((b"MM", 0, (1,), 1, (16,), ()), ("I;16B", "I;16B"))


@dataclass(frozen=True)
class Reading:
    """How grey levels become x, for all files of a domain. Files of 8 bits have the levels 0 to 255."""
    low: float = 0.0      # the level of deeper files that becomes -1
    high: float = 0.0     # the one that becomes 1; 0: not known, each file says by its largest level
    invert: bool = False  # the files are negatives of other domains'
    crop: bool = False    # a border of one grey level is left out, and put back on writing
    mode: str = "I;16"    # of deeper files


@dataclass(frozen=True)
class Info:
    """What is needed to write an image as it was read."""
    mode: str                        # one of MODES or DEEP
    size: tuple                      # (height, width) of x
    negative: bool = False           # white is 0 in the file
    bits: int = 0                    # of its grey levels, from 0 on; 0: the file does not say
    turn: int = 1                    # EXIF's orientation
    alpha: np.ndarray | None = None  # (H, W) uint8, kept as it was
    extra: dict = field(default_factory=dict)  # resolution, colour profile, description
    around: tuple | None = None      # the whole image, and the box in it that x is of
    format: str = ""                 # Pillow's name

    def ends(self, reading):
        """The grey levels that are -1 and 1."""
        return (0.0, 2.0**self.bits - 1) if self.bits else (reading.low, reading.high)


def read_image(path, reading=Reading()):
    """x (C, H, W) float32 in [-1, 1] and its Info; C = 1 where all channels are equal, else 3.
    Alpha is put aside: colours count as stored. A palette becomes RGB. Raises UserError if unreadable."""
    v, info = decode(path)
    if info.mode == "I;16" and not info.bits and not reading.high:
        info = replace(info, bits=next(bits for bits in (8, 10, 12, 14, 16) if v.max() < 2**bits))
    low, high = info.ends(reading)
    refuse(not info.bits and info.mode != reading.mode,
           f"{path}: has mode {info.mode}, deep files of its domain have {reading.mode}: write it like them")
    slack = SLACK * (high - low) * (info.mode == "F")
    refuse(v.min() < low - slack or v.max() > high + slack, f"{path}: has levels {v.min():g} to {v.max():g}, "
           f"files of its domain {low:g} to {high:g}: see --bits")
    x = to_x(v, info, reading)
    if reading.crop:
        box = content_box(v)
        info = replace(info, around=(x, box), size=tuple(v[box].shape[1:]))
        x = x[box]
    return x, info


def to_x(v, info, reading):
    """Grey levels (C, H, W) float32 as x in [-1, 1]."""
    low, high = info.ends(reading)
    x = (v - low) / (high - low) * 2 - 1
    return -x if info.negative != reading.invert else x


def decode(path):
    """Grey levels (C, H, W) float32, C = 1 or 3, of an image as people see it; its Info. Raises UserError."""
    refuse(not Path(path).is_file(), f"{path}: there is no such file")  # a pipe may never end
    try:
        if dicom.is_dicom(path):
            v, negative, bits, extra = dicom.decode(path)
            info = Info("I;16", v.shape, negative, bits, extra=extra)
        else:
            with open(path, "rb") as file, Image.open(file, formats=READ) as image:  # findings/turned-tiff.sh
                v, info = pixels(image)
        sides = " x ".join(map(str, info.size))
        refuse(math.prod(info.size) > PIXELS or max(info.size) > THIN * min(info.size),
               f"{sides} pixels are too many, or too thin")
        refuse(not np.isfinite(v).all(), "a grey level is no number")
    except Exception as error:  # a damaged file can raise anything in its decoder
        why = str(error).partition("\n")[0].partition(" <")[0] or type(error).__name__
        why = why if isinstance(error, UserError) else f"cannot be read as an image ({why})"
        raise UserError(f"{path}: {why}") from None
    v = v.reshape(*info.size, -1)
    v = v[..., :1] if (v == v[..., :1]).all() else v
    return torch.from_numpy(v.astype(np.float32)).permute(2, 0, 1).contiguous(), info


def pixels(image):
    """Grey levels (H, W) or (H, W, 3) of what Pillow has opened, and its Info. Raises UserError."""
    tags, name = getattr(image, "tag_v2", {}), "JPEG" if image.format == "MPO" else image.format
    check_kind(image, tags)
    turn = image.getexif().get(274, 1)  # of a PNG this loads it
    extra = {key: image.info[key] for key in ("exif", "dpi", "icc_profile") if image.info.get(key)}
    if tags and 282 not in tags or not all(0 < dots < 2**15 for dots in extra.get("dpi", ())):  # or NaN
        extra.pop("dpi", None)  # Pillow makes up one for TIFF; what is no such number no format can write
    extra["tiffinfo"] = {tag: tags[tag] for tag in (*KEPT, 274) if tag in tags}
    image.load()
    image, alpha = ImageOps.exif_transpose(image), None
    if image.mode == "P":
        image = image.convert("RGBA" if "transparency" in image.info else "RGB")
    mode, v = "I;16" if image.mode == "I;16B" else image.mode, np.asarray(image)
    if mode in ("LA", "RGBA"):
        alpha, v = v[..., -1].copy(), v[..., :-1]
    negative = mode in DEEP and tags.get(262) == 0  # of 8 bits Pillow inverts it
    bits = 8 if mode not in DEEP else 12 if tags.get(258) == (12,) else 0
    return v, Info(mode, v.shape[:2], negative, bits, turn, alpha, extra, None, name)


def check_kind(image, tags):
    """Raise UserError for what Pillow 13 would read wrong, or in part, without an error (beside tifffile)."""
    advice = "cannot be translated; write it as one 8- or 16-bit grey or 8-bit RGB image"
    pages = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)  # a phone adds small copies
    stack = re.search(r"^ImageJ=.*^images=(\d+)", str(tags.get(270)), re.M | re.S)  # pages without tags
    pages = max(pages, int(stack[1]) if stack else 1)
    bits, kind = tags.get(258, (1,)), tags.get(339, (1,))[0]  # kind: 1 unsigned, 2 signed, 3 float
    swapped = tags and tags.prefix == b"MM" and tags.get(259, 1) != 1  # big-endian and compressed
    right = bits[0] <= 16 if kind == 1 else (kind, bits[0]) in ((2, 16), (3, 32)) and not swapped
    refuse(pages > 1, f"{pages} pages {advice}")
    refuse(not right, f"{bits[0]}-bit signed, float or long grey {advice}")
    refuse(tags.get(32997, 1) > 1, f"a volume {advice}")  # ImageDepth
    refuse(len(bits) > 1 and max(bits) > 8 or ";16" in str(image.tile) and image.mode[0] not in "IF",
           f"16-bit colour {advice}")
    refuse(image.mode not in (*MODES, *DEEP, "P", "I;16B"), f"mode {image.mode} {advice}")


def content_box(v):
    """The part of v (C, H, W) inside a border of one grey level, as slices; all of it where little is.
    The level is that of the nearest corner. Half of the first line inside must differ from it."""
    some = v.flatten()[::v.numel() // 10000 + 1].numpy()
    level = BORDER * np.ptp(np.quantile(some, (.02, .98)))  # a burnt-in label is no range
    first, last = ((v - corner).abs().amax(0) > level for corner in (v[:, :1, :1], v[:, -1:, -1:]))
    box = [slice(None)]
    for axis in (1, 0):
        shares = [off.float().mean(axis) for off in (first, last.flip(0, 1))]  # of each line, from outside
        widths = [int((share > .1).float().argmax()) for share in shares]
        start, end = (n * bool(share[n] > .5) for n, share in zip(widths, shares))  # else: air round a head
        box.append(slice(start, len(shares[0]) - end))
    sides = [part.stop - part.start for part in box[1:]]
    return tuple(box) if min(sides) >= 8 and max(sides) <= THIN * min(sides) else (slice(None),) * 3


def channels_to(x, channels):
    """x (C, H, W) with 1 or 3 channels: the luminance of a coloured image, or a grey one repeated."""
    if len(x) > channels:
        return (x * torch.tensor([.299, .587, .114]).view(3, 1, 1)).sum(0, keepdim=True)  # ITU-R BT.601
    return x.expand(channels, -1, -1)


def check_writable(path, info):
    """The format that a path's ending names, and its options. Raises UserError if it cannot hold the mode."""
    name, modes, options = FORMATS[Path(path).suffix.lower()]
    refuse(info.mode not in modes, f"{path}: {name} cannot hold a {info.mode} image; take .png or .tif")
    return name, options


def write_image(path, x, info, reading=Reading()):
    """Write x (C, H, W) in [-1, 1], whole, as `info` and the target's `reading` say, or raise UserError."""
    name, options = check_writable(path, info)
    channels = 3 if info.mode in ("RGB", "RGBA") else 1
    x = channels_to(x.detach().float().cpu(), channels)
    if info.around:
        inner, x = x, channels_to(info.around[0], channels).clone()
        x[info.around[1]] = inner
    v = to_levels(-x if reading.invert else x, *info.ends(reading), DEEP.get(info.mode, np.uint8))
    if info.alpha is not None:
        v = np.concatenate([v, info.alpha[..., None]], -1)
    turn, extra = info.turn, info.extra
    if name != info.format:  # not all formats can say that an image is turned
        turn, extra = 1, {key: value for key, value in extra.items() if key in ("dpi", "icc_profile")}
    if name == "TIFF" and turn > 4:  # uncompressed ones Pillow reads wrong
        options = dict(compression="tiff_lzw")
    if info.mode == "I":  # the bytes are as of unsigned numbers, the tag says that they have a sign
        v, extra = v.view(np.uint16), extra | dict(tiffinfo=extra.get("tiffinfo", {}) | {339: 2})
    try:
        with write_whole(path) as work:
            image = Image.fromarray(v[..., 0] if v.shape[-1] == 1 else v)
            image = image.transpose(LYING[turn]) if turn in LYING else image
            image.save(work, name, **options, **extra)
    except UserError:
        raise
    except Exception as error:  # an encoder can raise anything too
        raise UserError(f"{path}: cannot be written ({str(error) or type(error).__name__})") from None


def to_levels(x, low=0.0, high=255.0, dtype=np.uint8):
    """x (C, H, W) in [-1, 1] as grey levels (H, W, C) from low to high."""
    v = ((x.clamp(-1, 1) + 1) / 2 * (high - low) + low).permute(1, 2, 0).numpy()
    return v if dtype == np.float32 else v.round().astype(dtype)


def figure(path, rows, columns, labels, cell=160):
    """A picture of `rows`, (C, H, W) images in [-1, 1], under `columns`, beside `labels`."""
    font, step = ImageFont.load_default(13), cell + 4
    left = 10 + 7 * max(map(len, "\n".join(labels).split("\n")))
    top = 6 + 18 * max((text.count("\n") + 1 for text in columns), default=0)
    sheet = Image.new("RGB", (left + max(map(len, rows)) * step, top + len(rows) * step), "white")
    draw = ImageDraw.Draw(sheet)
    for c, text in enumerate(columns):
        draw.text((left + c * step, 2), text, "black", font)
    for r, (row, label) in enumerate(zip(rows, labels)):
        draw.text((4, top + r * step + 4), label, "black", font)
        for c, x in enumerate(row):
            image = Image.fromarray(to_levels(channels_to(torch.as_tensor(x).float(), 3)))
            how = Image.Resampling.NEAREST if max(image.size) <= cell else Image.Resampling.LANCZOS
            sheet.paste(ImageOps.contain(image, (cell, cell), how), (left + c * step, top + r * step))
    with write_whole(path) as work:
        sheet.save(work)
