"""Image files: read with what is needed to write them back as they were, and pictures of many images."""

import warnings
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from minimedshift.support.command import UserError, refuse
from minimedshift.support.files import write_whole

MODES = ("L", "LA", "I;16", "RGB", "RGBA")  # Pillow's names
FORMATS = {  # extension -> format, the modes it can hold, how it is saved without loss (JPEG: nearly)
    ".png": ("PNG", MODES, {}),
    ".tif": ("TIFF", MODES, {}),
    ".jpg": ("JPEG", ("L", "RGB"), dict(quality=95, subsampling=0)),
    ".bmp": ("BMP", ("L", "RGB"), {}),
    ".webp": ("WEBP", ("RGB", "RGBA"), dict(lossless=True, exact=True)),
}
READ = tuple({name for name, _, _ in FORMATS.values()})  # some others that Pillow knows run programs
PIXELS = 64_000_000  # the most in an image, 8000 x 8000; in colour it then takes 2 GB
FORMATS |= {".tiff": FORMATS[".tif"], ".jpeg": FORMATS[".jpg"]}
LUMINANCE = (.299, .587, .114)  # ITU-R BT.601
warnings.filterwarnings("ignore", module="PIL")  # a doubtful part of a header is kept or dropped


@dataclass(frozen=True)
class Info:
    """What is needed to write an image as it was read."""
    mode: str                        # one of MODES
    size: tuple                      # (height, width)
    alpha: np.ndarray | None = None  # (H, W) uint8, kept as it was
    extra: dict = field(default_factory=dict)  # orientation, resolution, colour profile


def read_image(path):
    """x (C, H, W) float32 in [-1, 1] and its Info; C = 1 where all channels are equal, else 3.
    Alpha is put aside: colours count as stored, and so does the way up: a tag that turns the image is kept. A
    palette becomes RGB. Raises UserError if unreadable."""
    refuse(not Path(path).is_file(), f"{path}: there is no such file")  # a pipe may never end
    try:
        mode, pixels, extra = decode(path)
    except UserError:
        raise
    except Exception as error:  # a damaged file can raise anything in its decoder
        why = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(f"{path}: cannot be read as an image ({why})") from None
    v = torch.from_numpy(pixels.astype(np.float32)).reshape(*pixels.shape[:2], -1)
    alpha = None
    if mode in ("LA", "RGBA"):
        alpha, v = pixels[..., -1].copy(), v[..., :-1]
    if (v == v[..., :1]).all():
        v = v[..., :1]
    x = v.permute(2, 0, 1) / (65535 if mode == "I;16" else 255) * 2 - 1
    return x.contiguous(), Info(mode, tuple(x.shape[1:]), alpha, extra)


def decode(path):
    """A file's mode, pixels (H, W) or (H, W, channels), and what is kept of its header."""
    with Image.open(path, formats=READ) as image:
        width, height = image.size
        refuse(width * height > PIXELS, f"{path}: {width} x {height} pixels are too many: make it smaller")
        refuse(max(width, height) > 16 * min(width, height), f"{path}: {width} x {height} is too thin")
        pages = getattr(image, "n_frames", 1)
        deep = ";16" in str(getattr(image, "tile", ""))
        image.load()
        if image.mode == "P":
            image = image.convert("RGBA" if "transparency" in image.info else "RGB")
        mode = "I;16" if image.mode.startswith("I;16") else image.mode
        advice = "cannot be translated; write it as one 8- or 16-bit grey or 8-bit RGB image"
        refuse(pages > 1, f"{path}: {pages} pages {advice}")
        refuse(deep and mode != "I;16", f"{path}: 16-bit colour {advice}")  # Pillow would take 8 bits of it
        refuse(mode not in MODES, f"{path}: mode {mode} {advice}")
        extra = {key: image.info[key] for key in ("exif", "dpi", "icc_profile") if image.info.get(key)}
        if not all(0 < dots < 2**15 for dots in extra.get("dpi", ())):  # NaN too: no format can write it
            del extra["dpi"]
        return mode, np.asarray(image), extra


def channels_to(x, channels):
    """x (C, H, W) with 1 or 3 channels: the luminance of a coloured image, or a grey one repeated."""
    if len(x) == channels:
        return x
    if channels == 1:
        return (x * torch.tensor(LUMINANCE).view(3, 1, 1)).sum(0, keepdim=True)
    return x.expand(channels, -1, -1)


def check_writable(path, info):
    """Raise UserError unless the format that `path` names by its extension can hold an image of this mode."""
    name, modes, _ = FORMATS[Path(path).suffix.lower()]
    refuse(info.mode not in modes, f"{path}: {name} cannot hold a {info.mode} image; take .png or .tif")


def write_image(path, x, info):
    """Write x (C, H, W) in [-1, 1] as `info` says, whole or not at all. Raises UserError if it cannot."""
    check_writable(path, info)
    name, _, options = FORMATS[Path(path).suffix.lower()]
    x = channels_to(x.detach().float().cpu(), 3 if info.mode in ("RGB", "RGBA") else 1)
    v = to_pixels(x, 16 if info.mode == "I;16" else 8)
    if info.alpha is not None:
        v = np.concatenate([v, info.alpha[..., None]], -1)
    try:
        with write_whole(path) as work:
            image = Image.fromarray(v[..., 0] if v.shape[-1] == 1 else v)
            image.save(work, name, **options, **info.extra)
    except UserError:
        raise
    except Exception as error:  # an encoder can raise anything too
        raise UserError(f"{path}: cannot be written ({str(error) or type(error).__name__})") from None


def to_pixels(x, bits=8):
    """x (C, H, W) in [-1, 1] as grey levels (H, W, C) of 8 or 16 bits."""
    top = 2**bits - 1
    v = ((x + 1) / 2 * top).round().clamp(0, top).permute(1, 2, 0)
    return v.numpy().astype(f"uint{bits}")


def image_files(folder, above=()):
    """The files in a folder and below that are images by name, sorted, without hidden ones.
    A link to a folder is followed, unless it leads back to a folder that it lies in, one of `above`."""
    folder, found = Path(folder), []
    if not folder.is_dir() or folder.resolve() in above:
        return found
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue
        if path.suffix.lower() in FORMATS and path.is_file():
            found.append(path)
        found += image_files(path, (*above, folder.resolve()))
    return sorted(found)


def figure(path, rows, columns, labels, cell=160):
    """A picture of `rows`, (C, H, W) images in [-1, 1], under `columns`, beside `labels`."""
    font, line, step = ImageFont.load_default(13), 18, cell + 4
    longest = max((len(part) for label in labels for part in label.split("\n")), default=0)
    left = 10 + 7 * longest
    top = 6 + line * max((text.count("\n") + 1 for text in columns), default=0)
    sheet = Image.new("RGB", (left + max(map(len, rows)) * step, top + len(rows) * step), "white")
    draw = ImageDraw.Draw(sheet)
    for r, (row, label) in enumerate(zip(rows, labels)):
        draw.multiline_text((4, top + r * step + 4), label, fill="black", font=font)
        for c, x in enumerate(row):
            image = Image.fromarray(to_pixels(channels_to(torch.as_tensor(x).float(), 3)))
            scale = cell / max(image.size)
            size = [max(1, round(n * scale)) for n in image.size]
            how = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS
            sheet.paste(image.resize(size, how), (left + c * step, top + r * step))
    for c, text in enumerate(columns):
        draw.multiline_text((left + c * step, 2), text, fill="black", font=font)
    with write_whole(path) as work:
        sheet.save(work)
