"""Bad input gives a result or one sentence: `python tests/fuzz.py [--seed N] [--repeats N] [--only WORD]`.

Every class is a small function: it makes one random instance of bad input and says what must become of it.
Never a traceback, a hang, another program's run, or more than MEMORY. test_fuzz.py runs one of each that is
quick. Prints a line a class; the exit status is 1 if any failed.
"""

import argparse
import contextlib
import faulthandler
import io
import itertools
import math
import os
import pickle
import random
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import zipfile
import zlib
from collections import Counter
from dataclasses import dataclass, fields
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps, PngImagePlugin

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import train
import translate
from minimedshift import evaluate
from minimedshift import realism
from minimedshift.model import Shape
from minimedshift import presets
from minimedshift.support.command import run

SECONDS = 20  # that one command may take
MEMORY = 1.5 * 2**30  # bytes that one command may add to the process
COMMANDS = {"train.py": train, "translate.py": translate, "evaluate": evaluate}
TINY = presets.Preset(16, Shape(stem=2, widths=(16,), blocks=(1,), head=16), 2, 4, 4, 2)
RUN = "--preset notebook --device cpu --dtype float32 --no-evaluate --student-images 4".split()
CLASSES = {}  # name -> (function, whether it is slow)


def fuzz(function=None, slow=False):
    """Put a class of bad input into the table."""
    if function is None:
        return lambda function: fuzz(function, slow)
    CLASSES[function.__name__.replace("_", " ")] = function, slow
    return function


# ---------------------------------------------------------------- a command, watched

@dataclass(frozen=True)
class Outcome:
    """What a command did."""
    status: int
    out: str
    err: str


class TooLong(BaseException):
    """A command is not done after SECONDS. No `except Exception` catches it."""


def too_long(*_):
    raise TooLong


@contextlib.contextmanager
def limits():
    """SECONDS and, where the system can, address space; signals and numbers are as before at the end."""
    signals = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)}
    space, state, folder = resource.getrlimit(resource.RLIMIT_AS), torch.get_rng_state(), os.getcwd()
    with contextlib.suppress(OSError):  # Linux alone
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 4 * 2**30, space[1]))
    signal.signal(signal.SIGALRM, too_long)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        for name, handler in signals.items():
            signal.signal(name, handler)
        resource.setrlimit(resource.RLIMIT_AS, space)
        torch.set_rng_state(state)
        os.chdir(folder)


def peak():
    """The most memory that this process has had, bytes."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def here(main, argv):
    """A command in this process: its Outcome. Raises AssertionError for all that no command may do."""
    out = io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True)  # strict, as a terminal's is
    err = io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace", write_through=True)
    argv, before = [str(word) for word in argv], peak()
    said = lambda stream: stream.buffer.getvalue().decode("utf-8", "backslashreplace")
    try:
        with limits(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            run(lambda: main(argv))
    except SystemExit as end:
        status = end.code or 0
    except TooLong:
        raise AssertionError(f"hangs: {argv}") from None
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)
        last = [f"{Path(part.filename).name}:{part.lineno}" for part in where if str(ROOT) in part.filename]
        raise AssertionError(f"traceback: {type(error).__name__}: {error} at {last[-1:]}: {argv}") from None
    grown = peak() - before
    assert grown < MEMORY, f"takes {grown / 2**30:.1f} GB: {argv}"
    return sane(Outcome(status, said(out), said(err)), argv)


def apart(script, argv, cwd=None):
    """A command in a process of its own, as a user starts it."""
    line = [sys.executable, str(ROOT / script), *map(str, argv)]
    done = subprocess.run(line, capture_output=True, text=True, cwd=cwd, timeout=2 * SECONDS)
    return sane(Outcome(done.returncode, done.stdout, done.stderr), argv)


LINES = re.compile("error: |warning: |skipped [0-9]+ unreadable|[0-9]+ of [0-9]+ images could not be read|"
                   ".*(cannot be |are too many|is more than)")


def sane(outcome, argv):
    """The Outcome, if it is done or refused, and says nothing but sentences."""
    assert outcome.status in (0, 2), f"status {outcome.status}: {argv}: {outcome.err}"
    assert "Traceback" not in outcome.err, f"{argv}: {outcome.err}"
    for line in outcome.err.splitlines():
        assert LINES.match(line), f"{line!r} is no sentence of ours: {argv}"
    assert (outcome.status == 0) == ("error: " not in outcome.err), f"{outcome}: {argv}"
    return outcome


def refused(outcome, *words):
    """It ended in one sentence, with one of these words in it."""
    assert outcome.status == 2, f"was not refused: {outcome}"
    assert outcome.err.count("error: ") == 1, outcome.err
    assert not words or any(word in outcome.err for word in words), f"{outcome.err} has none of {words}"


def done(outcome, *words):
    """It ended well, and said all of these words."""
    assert outcome.status == 0, f"was not done: {outcome}"
    assert all(word in outcome.out + outcome.err for word in words), f"{outcome} lacks one of {words}"


# ---------------------------------------------------------------- what every class has at hand

@dataclass(frozen=True)
class Base:
    """Two domains of good images, and a checkpoint of a tiny network that was trained on them."""
    root: Path
    net: Path


@contextlib.contextmanager
def bench(folder):
    """The Base. Within, the notebook preset is tiny, the cache is in `folder`, and features are quick."""
    thumbnails = lambda x: torch.nn.functional.adaptive_avg_pool2d(x, 3).flatten(1)
    base = Base(folder / "images", folder / "base" / "checkpoint.pt")
    changes = [mock.patch.dict(presets.PRESETS, notebook=TINY),
               mock.patch.dict(os.environ, MINIMEDSHIFT_CACHE=str(folder / "cache")),
               mock.patch.object(realism, "train_features", lambda *_, **__: thumbnails)]
    with contextlib.ExitStack() as stack:
        for change in changes:
            stack.enter_context(change)
        heads(np.random.default_rng(0), base.root, "a", "b", count=24)
        done(here(train.main, [*RUN, "--data", base.root, "--out", base.net.parent]))
        yield base


def picture(rng, h=20, w=24, top=255):
    """A bright disc in the dark with noise, as integers from 0 to top."""
    y, x = np.mgrid[:h, :w]
    disc = np.hypot(y / h - .5, x / w - .5) < rng.uniform(.2, .4)
    return ((.2 + .5 * disc + .2 * rng.random((h, w))) * top).astype(np.uint16 if top > 255 else np.uint8)


def heads(rng, root, *domains, count=3):
    """Good images in ROOT/DOMAIN."""
    for domain in domains:
        (root / domain).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            Image.fromarray(picture(rng)).save(root / domain / f"{domain[:1]}{i}.png")
    return root


class Instance:
    """One instance of a class: random numbers, a folder of its own, and the commands."""

    def __init__(self, folder, seed, base):
        self.folder, self.base = folder, base
        self.draw, self.rng = random.Random(seed), np.random.default_rng(seed)
        self.statuses = Counter()

    def note(self, outcome):
        self.statuses[outcome.status] += 1
        return outcome

    def save(self, name, image=None, **options):
        """An image as a file of the instance; by default a good one."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        (image or Image.fromarray(picture(self.rng))).save(path, **options)
        return path

    def write(self, name, content):
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return path

    def translate(self, path, output="out.png", *flags, net=None):
        """translate.py with a good checkpoint, the student or the flow."""
        flags = flags or ("--method", self.draw.choice(("student", "flow")))
        way = "--source", self.draw.choice(("a", "auto")), "--target", "b", "--device", "cpu", "--overwrite"
        argv = [path, self.folder / output, *way, "--checkpoint", net or self.base.net, *flags]
        return self.note(here(translate.main, argv))

    def check(self, root, *flags):
        """train.py --check-data of a folder."""
        argv = [*RUN, "--data", root, "--check-data", "--out", self.folder / "checked", *flags]
        return self.note(here(train.main, argv))

    def train(self, root, *flags):
        return self.note(here(train.main, [*RUN, "--data", root, "--out", self.folder / "run", *flags]))

    def evaluate(self, *flags, net=None):
        argv = ["--checkpoint", net or self.base.net, "--device", "cpu", "--out", self.folder / "scores", *flags]
        return self.note(here(evaluate.main, argv))

    def resume(self, net):
        """train.py --resume of a checkpoint."""
        out = self.folder / "resumed"
        out.mkdir(exist_ok=True)
        if Path(net) != out / "checkpoint.pt" and Path(net).is_file():
            shutil.copy(net, out / "checkpoint.pt")
        argv = [*RUN, "--data", self.base.root, "--resume", "--out", out]
        return self.note(here(train.main, argv))

    def look(self, path):
        """An image alone to translate.py, and beside good ones to train.py: both Outcomes."""
        root = heads(self.rng, self.folder / "beside", "a", "b")
        shutil.copy(path, root / "a" / f"bad{path.suffix}")
        return self.translate(path, f"out{path.suffix}"), self.check(root)

    def refuse(self, path, *words):
        """translate.py refuses an image, train.py names and skips it."""
        alone, beside = self.look(path)
        refused(alone, *words)
        done(beside, "skipped 1 unreadable")

    def take(self, path):
        """Both commands take an image."""
        alone, beside = self.look(path)
        done(alone)
        done(beside)
        assert "skipped" not in beside.err, beside.err

    def cut(self, path, least=1):
        """The file without its end, from a random place."""
        content = path.read_bytes()
        path.write_bytes(content[:self.draw.randrange(least, len(content))])
        return path

    def flip(self, path, count=3, start=0):
        """The file with a few other bytes."""
        content = bytearray(path.read_bytes())
        for _ in range(count):
            content[self.draw.randrange(start, len(content))] = self.draw.randrange(256)
        path.write_bytes(content)
        return path


# ---------------------------------------------------------------- images

@fuzz
def png_cut_anywhere(f):
    f.look(f.cut(f.save("x.png")))


@fuzz
def jpg_cut_anywhere(f):
    f.look(f.cut(f.save("x.jpg")))


@fuzz
def tif_cut_anywhere(f):
    how = f.draw.choice((None, "tiff_lzw", "tiff_adobe_deflate", "packbits"))
    f.look(f.cut(f.save("x.tif", compression=how)))


@fuzz
def webp_cut_anywhere(f):
    f.look(f.cut(f.save("x.webp")))


@fuzz
def bmp_cut_anywhere(f):
    f.look(f.cut(f.save("x.bmp")))


@fuzz
def image_with_flipped_bytes(f):
    suffix = f.draw.choice((".png", ".jpg", ".tif", ".webp", ".bmp"))
    f.look(f.flip(f.save("x" + suffix), f.draw.randint(1, 20)))


@fuzz
def compressed_tif_with_flipped_bytes(f):
    how = f.draw.choice(("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg"))
    f.look(f.flip(f.save("x.tif", compression=how), f.draw.randint(1, 20)))


@fuzz
def image_without_a_byte(f):
    f.refuse(f.write("x" + f.draw.choice((".png", ".jpg", ".tif", ".webp", ".bmp")), b""))


@fuzz
def image_of_random_bytes(f):
    f.refuse(f.write("x" + f.draw.choice((".png", ".jpg", ".tif", ".webp", ".bmp")), f.rng.bytes(500)))


@fuzz
def random_bytes_after_a_true_start(f):
    start = f.draw.choice((b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"II*\0", b"MM\0*", b"BM", b"RIFF\xff\0\0\0WEBP"))
    f.look(f.write("x.png", start + f.rng.bytes(f.draw.randint(1, 800))))


@fuzz
def png_with_a_wrong_checksum(f):
    content = bytearray(f.save("x.png").read_bytes())
    place = content.index(b"IDAT")
    length = int.from_bytes(content[place - 4:place], "big")
    content[place + 4 + length] ^= 1 + f.draw.randrange(255)
    f.look(f.write("x.png", bytes(content)))  # Pillow may skip it: the pixels have their own


@fuzz
def image_under_another_ending(f):
    true, said = f.draw.sample([".png", ".jpg", ".tif", ".webp", ".bmp"], 2)
    path = f.save("x" + true, Image.fromarray(picture(f.rng)).convert("RGB"))
    f.take(path.rename(path.with_suffix(said)))


@fuzz
def other_kinds_of_file_called_png(f):
    """Pillow would start another program for PostScript."""
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\n0 0 20 20 rectfill\nshowpage\n"
    with mock.patch.object(subprocess, "check_call", side_effect=AssertionError("another program was started")):
        f.refuse(f.write("x.png", eps))
    for kind in ("PPM", "PCX", "TGA", "ICNS"):
        f.refuse(f.save("y.png", format=kind))


@fuzz
def animation_called_png(f):
    frames = [Image.fromarray(picture(f.rng)).convert("RGB") for _ in range(3)]
    kind = f.draw.choice(("GIF", "WEBP", "PNG", "TIFF"))
    more = dict(save_all=True, append_images=frames[1:], duration=50) if kind != "TIFF" else dict(
        save_all=True, append_images=frames[1:])
    f.refuse(f.save("x.png", frames[0], format=kind, **more), "pages", "cannot be read")


@fuzz
def cmyk_jpg(f):
    f.refuse(f.save("x.jpg", Image.fromarray(f.rng.integers(0, 256, (20, 20, 4), np.uint8), "CMYK")), "CMYK")


@fuzz
def cmyk_tif(f):
    image = Image.fromarray(f.rng.integers(0, 256, (20, 20, 4), np.uint8), "CMYK")
    f.refuse(f.save("x.tif", image), "CMYK")


@fuzz
def lab_tif(f):
    lab = ImageCms.applyTransform(Image.fromarray(picture(f.rng)).convert("RGB"), ImageCms.buildTransform(
        ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB"))
    f.refuse(f.save("x.tif", lab), "LAB")


@fuzz
def float_tif_with_nan(f):
    x = f.rng.standard_normal((20, 20)).astype(np.float32)
    x[f.rng.random((20, 20)) < .1] = f.draw.choice((np.nan, np.inf, -np.inf, 1e38))
    f.refuse(f.save("x.tif", Image.fromarray(x)), "mode F")


@fuzz
def integers_of_32_bits(f):
    f.refuse(f.save("x.tif", Image.fromarray(f.rng.integers(0, 2**31, (20, 20), dtype=np.int32))), "mode I")


@fuzz
def tif_of_many_pages(f):
    pages = [Image.fromarray(picture(f.rng)) for _ in range(f.draw.randint(2, 200))]
    f.refuse(f.save("x.tif", pages[0], save_all=True, append_images=pages[1:]), "pages")


@fuzz
def tif_whose_pages_go_in_a_circle(f):
    content = bytearray(f.save("x.tif").read_bytes())
    first = struct.unpack_from("<I", content, 4)[0]
    entries = struct.unpack_from("<H", content, first)[0]
    struct.pack_into("<I", content, first + 2 + 12 * entries, first)
    f.look(f.write("x.tif", bytes(content)))


def png(width, height, depth, colour, pixels, *chunks):
    """The bytes of a PNG file with this header and compressed pixels."""
    number = lambda n: struct.pack(">I", n)
    chunk = lambda kind, body: number(len(body)) + kind + body + number(zlib.crc32(kind + body))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return (b"\x89PNG\r\n\x1a\n" + header + b"".join(chunk(*each) for each in chunks)
            + chunk(b"IDAT", pixels) + chunk(b"IEND", b""))


@fuzz
def colour_of_16_bits(f):
    f.refuse(f.write("x.png", png(20, 20, 16, 2, zlib.compress((b"\0" + f.rng.bytes(120)) * 20))), "16-bit colour")


@fuzz
def depth_that_no_png_has(f):
    depth, colour = f.draw.choice(((3, 0), (4, 2), (16, 3), (0, 0), (255, 7)))
    f.refuse(f.write("x.png", png(20, 20, depth, colour, zlib.compress(bytes(500)))))


@fuzz
def grey_of_16_bits_either_end_first(f):
    x = picture(f.rng, top=65535)
    image = Image.frombytes("I;16B", (24, 20), x.astype(">u2").tobytes()) if f.draw.random() < .5 else None
    f.take(f.save("x.tif", image or Image.fromarray(x)))


@fuzz
def every_orientation_is_shown_alike(f):
    """Pixels stay as they are stored and the tag that turns them stays too: a viewer shows both one way up."""
    exif = Image.Exif()
    exif[0x0112] = f.draw.randint(1, 8)
    for suffix in (".png", ".jpg", ".webp", ".tif"):
        image = Image.fromarray(picture(f.rng, 40, 24)).resize((24, 40), Image.Resampling.BOX)
        path = f.save("x" + suffix, image.convert("RGB"), exif=exif)
        f.take(path)
        a, b = (ImageOps.exif_transpose(Image.open(p)).convert("L") for p in (path, f.folder / f"out{suffix}"))
        assert a.size == b.size, (suffix, a.size, b.size)
        turned = [np.corrcoef(np.ravel(a), np.ravel(c))[0, 1] for c in (b, b.rotate(180), ImageOps.mirror(b))]
        assert turned[0] > max(turned[1:]) + .02, (suffix, exif[0x0112], turned)


@fuzz
def exif_of_random_bytes(f):
    suffix = f.draw.choice((".png", ".jpg", ".webp"))
    start = f.draw.choice((b"Exif\0\0", b"Exif\0\0II*\0\x08\0\0\0", b"Exif\0\0MM\0*\0\0\0\x08"))
    path = f.save("x" + suffix, Image.fromarray(picture(f.rng)).convert("RGB"), exif=start + f.rng.bytes(60))
    done(f.translate(path, "out" + f.draw.choice((".png", ".jpg", ".webp", ".tif", ".bmp"))))
    f.take(path)


@fuzz
def odd_resolutions(f):
    path = f.write("x.png", png(24, 20, 8, 0, zlib.compress((b"\0" + f.rng.bytes(24)) * 20), (
        b"pHYs", struct.pack(">IIB", *f.draw.choices((0, 1, 2**31 - 1, 2**32 - 1, 10**6), k=2), 1))))
    for suffix in (".png", ".jpg", ".webp", ".tif", ".bmp"):
        done(f.translate(path, "out" + suffix) if suffix != ".webp" else f.translate(path))


@fuzz
def resolution_of_a_tif_that_is_no_number(f):
    odd = f.draw.choice(((0, 0), (1, 0), (2**32 - 1, 1), (2**32 - 1, 2**32 - 1)))
    path = f.save("x.tif", dpi=(72, 72))
    content = path.read_bytes().replace(struct.pack("<II", 72, 1), struct.pack("<II", *odd))
    assert content != path.read_bytes()
    path.write_bytes(content)
    done(f.translate(path, "out" + f.draw.choice((".png", ".jpg", ".tif", ".bmp"))))
    f.take(path)


@fuzz
def bomb_by_its_header(f):
    side = f.draw.randint(14000, 60000)
    f.refuse(f.write("x.png", png(side, side, 8, 0, zlib.compress(bytes(1000)))), "pixels")


@fuzz(slow=True)
def bomb_that_is_real(f):
    """100 million black pixels in a small file."""
    side = f.draw.randint(9500, 13000)
    pack = zlib.compressobj(9)
    row = bytes(side + 1)
    pixels = b"".join(pack.compress(row) for _ in range(side)) + pack.flush()
    f.refuse(f.write("x.png", png(side, side, 8, 0, pixels)), "pixels")


@fuzz
def tif_that_claims_to_be_large(f):
    content = f.save("x.tif").read_bytes()
    content = content.replace(struct.pack("<HHI", 0x100, 4, 1) + struct.pack("<I", 24),
                              struct.pack("<HHI", 0x100, 4, 1) + struct.pack("<I", 10**f.draw.randint(5, 9)))
    f.refuse(f.write("x.tif", content))


@fuzz
def image_of_a_few_pixels(f):
    h, w = f.draw.randint(1, 3), f.draw.randint(1, 3)
    f.take(f.save("x" + f.draw.choice((".png", ".tif", ".bmp")), Image.fromarray(picture(f.rng, h, w))))


@fuzz
def image_like_a_thread(f):
    long = f.draw.randint(10000, 60000)
    shape = (long, f.draw.randint(1, 3))[::f.draw.choice((1, -1))]
    f.refuse(f.save("x.png", Image.fromarray(picture(f.rng, *shape))), "times")


@fuzz
def image_of_one_value(f):
    value = f.draw.choice((0, 1, 128, 255))
    f.take(f.save("x.png", Image.new(f.draw.choice(("L", "RGB", "1")), (24, 20), value)))


@fuzz
def palette_with_transparency(f):
    image = Image.fromarray(f.rng.integers(0, 256, (20, 20, 3), np.uint8)).quantize(f.draw.randint(2, 256))
    odd = f.draw.choice((0, 255, bytes(f.rng.integers(0, 256, 16, np.uint8))))
    f.take(f.save("x.png", image, transparency=odd))


@fuzz
def grey_with_a_transparent_value(f):
    f.take(f.save("x.png", Image.fromarray(picture(f.rng)), transparency=f.draw.randrange(256)))


@fuzz
def one_bit_or_two_channels(f):
    x = Image.fromarray(picture(f.rng))
    f.take(f.save("x" + f.draw.choice((".png", ".tif")), x.convert(f.draw.choice(("1", "LA", "RGBA")))))


@fuzz
def huge_text_in_a_png(f):
    text = PngImagePlugin.PngInfo()
    text.add_text("note", "x" * f.draw.randint(2**20, 2**24), zip=f.draw.random() < .7)
    f.look(f.save("x.png", pnginfo=text))


@fuzz
def huge_colour_profile(f):
    suffix = f.draw.choice((".png", ".jpg", ".tif", ".webp"))
    path = f.save("x" + suffix, Image.fromarray(picture(f.rng)).convert("RGB"), icc_profile=f.rng.bytes(2**20))
    f.take(path)
    f.translate(path, "out" + f.draw.choice((".png", ".jpg", ".tif", ".webp", ".bmp")))


NAMES = ("a b.png", " .png", "ümläut-頭-🩻.png", "two\nlines.png", "tab\t.png",
         "'quote\"%s{}.png", "$(touch gone).png",
         "a.PNG", "\x1b[31mred.png", "not-utf8-\udcff\udcfe.png", "a" * 240 + ".png")


@fuzz
def odd_names(f):
    name = f.draw.choice(NAMES)
    path = f.save("in/x.png").rename(f.folder / "in" / name)
    flags = "--compare", f.folder / "compared.png"
    done(f.translate(path, "out.png", *flags))
    f.save("in/second.png")
    done(f.translate(path.parent, "many"))
    assert (f.folder / "many" / name).exists()
    root = heads(f.rng, f.folder / "root", "a", "b")
    shutil.copy(path, root / "a" / name)
    done(f.check(root))
    assert not (ROOT / "gone").exists() and not Path("gone").exists()


@fuzz
def odd_names_of_broken_images(f):
    name = f.draw.choice(NAMES)
    f.write("in/" + name, b"nothing")
    f.save("in/good.png")
    alone, many = f.translate(f.folder / "in" / name), f.translate(f.folder / "in", "many")
    refused(alone, "cannot be read")
    assert many.status == 2 and "1 of 2 images could not be read" in many.err
    assert (f.folder / "many" / "good.png").exists()


@fuzz
def name_too_long_to_exist(f):
    name = "a" * f.draw.randint(256, 5000) + ".png"
    refused(f.translate(name))
    refused(f.translate(f.save("x.png"), name))
    refused(f.train(f.base.root, "--out", name))
    refused(f.check(name))
    refused(f.evaluate(net=name))


@fuzz
def name_with_a_leading_dash(f):
    path = f.save("-x.png")
    os.chdir(f.folder)
    way = "--source a --target b --device cpu --overwrite --checkpoint".split()
    bare = f.note(here(translate.main, [path.name, "y.png", *way, f.base.net]))
    os.chdir(ROOT)
    refused(bare)
    done(f.translate(f.folder / "." / path.name))


@fuzz
def folder_called_png(f):
    (f.folder / "x.png").mkdir()
    refused(f.translate(f.folder / "x.png", "out"), "no image files")
    root = heads(f.rng, f.folder / "root", "a", "b")
    (root / "a" / "x.png").mkdir()
    done(f.check(root), "a: 3 to train")


@fuzz
def link_to_nothing_or_to_itself(f):
    root = heads(f.rng, f.folder / "root", "a", "b")
    link = root / "a" / "x.png"
    link.symlink_to(f.draw.choice(("x.png", "nothing.png", "/nowhere/x.png")))
    done(f.check(root), "a: 3 to train")
    refused(f.translate(link), "no such file")


@fuzz
def pipe_called_png(f):
    root = heads(f.rng, f.folder / "root", "a", "b")
    os.mkfifo(root / "a" / "x.png")
    refused(f.translate(root / "a" / "x.png"), "x.png")
    done(f.check(root), "a: 3 to train")


@fuzz
def device_called_png(f):
    root = heads(f.rng, f.folder / "root", "a", "b")
    (root / "a" / "x.png").symlink_to(f.draw.choice(("/dev/zero", "/dev/urandom", "/dev/null", "/dev/tty")))
    refused(f.translate(root / "a" / "x.png"), "x.png")
    done(f.check(root), "a: 3 to train")


@fuzz
def image_that_may_not_be_read(f):
    if os.geteuid() == 0:  # who may read all
        return
    path = f.save("x.png")
    path.chmod(0)
    refused(f.translate(path), "x.png")


@fuzz
def output_that_cannot_be_written(f):
    path = f.save("x.png")
    f.write("file", b"")
    refused(f.translate(path, f.draw.choice(("/proc/x.png", "file/x.png", "/dev/null/x.png"))))
    refused(f.translate(path, f.draw.choice(("out", "out.gif", "out.pdf", "."))))


@fuzz(slow=True)
def output_that_the_format_cannot_hold(f):
    """WebP ends at 16383 pixels."""
    path = f.save("x.png", Image.new("RGB", (16400, 1100)))
    refused(f.translate(path, "out.webp"), "cannot be written")


@fuzz
def bad_images_among_good_ones(f):
    for i in range(4):
        f.save(f"in/{i}.png")
    bad = f.draw.randint(1, 3)
    for i in range(bad):
        f.cut(f.save(f"in/bad{i}.jpg", Image.fromarray(picture(f.rng, 64, 64))))
        f.write(f"in/bad{i}.jpg", f.rng.bytes(99))
    outcome = f.translate(f.folder / "in", "out")
    assert outcome.status == 2 and f"{bad} of {4 + bad} images" in outcome.err
    assert len(list((f.folder / "out").iterdir())) == 4


# ---------------------------------------------------------------- folders

@fuzz
def folder_whose_links_go_in_a_circle(f):
    root = heads(f.rng, f.folder / "root", "a", "b")
    for i in range(f.draw.randint(1, 3)):
        (root / "a" / f"up{i}").symlink_to(f.draw.choice(("..", ".", root)))
    done(f.check(root), "a: 3 to train", "b: 3 to train")
    lines = f.check(root).out.splitlines()
    assert sum("to train" in line for line in lines) == 2, lines
    f.translate(root, "out")
    assert len([p for p in (f.folder / "out").rglob("*.png")]) == 6


@fuzz
def two_folders_that_link_to_each_other(f):
    root = heads(f.rng, f.folder / "root", "a", "b")
    (root / "a" / "other").symlink_to("../b")
    (root / "b" / "other").symlink_to("../a")
    done(f.check(root), "a: 3 to train", "b-other: 3 to train")


@fuzz
def domain_that_is_a_link(f):
    root = heads(f.rng, f.folder / "root", "a")
    heads(f.rng, f.folder / "elsewhere", "b")
    (root / "b").symlink_to(f.folder / "elsewhere" / "b")
    done(f.check(root), "b: 3 to train")


@fuzz
def stray_folder_of_labels(f):
    name = f.draw.choice(("truth", "masks", "mask", "labels", "Masks", "annotations"))
    root = heads(f.rng, f.folder / "root", "a", "b", name)
    done(f.check(root), f"warning: {name}", f"{name}: 3 to train")
    without = f.check(root, "--domains", "a,b")
    done(without, "a: 3 to train")
    assert "warning" not in without.err + without.out and name not in without.out


@fuzz
def one_image_a_domain(f):
    root = heads(f.rng, f.folder / "root", "a", "b", count=1)
    done(f.check(root), "a: 1 to train, 0 held out")
    done(f.train(root))


@fuzz
def one_domain(f):
    refused(f.check(heads(f.rng, f.folder / "root", "a")), "two or more")


@fuzz
def one_image_again_and_again(f):
    image = Image.fromarray(picture(f.rng))
    for domain, i in itertools.product("ab", range(12)):
        f.save(f"root/{domain}/{i}.png", image)
    done(f.check(f.folder / "root"))
    done(f.train(f.folder / "root"))


@fuzz(slow=True)
def images_of_one_value(f):
    for domain, i in itertools.product("ab", range(12)):
        f.save(f"root/{domain}/{i}.png", Image.new("L", (20, 20), f.draw.choice((0, 255))))
    done(f.check(f.folder / "root"))
    done(f.train(f.folder / "root"))


@fuzz
def opposite_polarity(f):
    root = heads(f.rng, f.folder / "root", "a", count=6)
    for i, path in enumerate(sorted((root / "a").iterdir())):
        f.save(f"root/b/{i}.png", ImageOps.invert(Image.open(path)))
    done(f.check(root), "warning", "negatives")


@fuzz
def empty_folders(f):
    root = f.folder / "root"
    for name in f.draw.choice(((), ("a", "b"), ("train", "test"), ("train/a", "train/b", "test/a"))):
        (root / name).mkdir(parents=True, exist_ok=True)
    root.mkdir(exist_ok=True)
    refused(f.check(root), "two or more")
    refused(f.translate(root, "out"), "no image files")


@fuzz
def domains_of_other_sizes_and_channels(f):
    for domain, i in itertools.product("abc", range(4)):
        shape = f.draw.randint(1, 90), f.draw.randint(20, 90)
        image = Image.fromarray(picture(f.rng, max(shape) // 10 + shape[0], shape[1], f.draw.choice((255, 65535))))
        kinds = ("L", "RGB", "LA", "P", "1") if image.mode == "L" else (image.mode,)
        f.save(f"root/{domain}/{i}.png", image.convert(f.draw.choice(kinds)))
    done(f.check(f.folder / "root"), "c: 4 to train")


@fuzz
def hidden_files_and_folders(f):
    root = heads(f.rng, f.folder / "root", "a", "b")
    for name in ("a/.x.png", "a/._a0.png", ".git/x.png", "__MACOSX/._x.png", "a/.DS_Store", "Thumbs.db"):
        f.write(f"root/{name}", f.rng.bytes(99))
    outcome = f.check(root)
    done(outcome, "a: 3 to train")
    assert outcome.err == "" and outcome.out.count("to train") == 2


@fuzz
def hundreds_of_nested_folders(f):
    root = heads(f.rng, f.folder / "root", "a", "b")
    deep = root / "a" / "/".join("d" * f.draw.randint(200, 250))
    deep.mkdir(parents=True)
    if f.draw.random() < .5:
        f.save(deep / "x.png")
    done(f.check(root), "a: 3 to train")
    done(f.translate(root / "a", "out"))


@fuzz
def file_where_a_folder_should_be(f):
    path = f.save("x.png")
    refused(f.check(path), "folder")
    refused(f.check(f.folder / "x.png" / "deeper"), "folder")
    refused(f.train(f.base.root, "--out", path), "x.png")
    refused(f.train(f.base.root, "--out", path / "deeper"), "x.png")
    refused(f.evaluate("--out", path), "x.png")


@fuzz
def test_folder_without_its_training(f):
    root = heads(f.rng, f.folder / "root", "train/a", "train/b", "test/" + f.draw.choice("cd"))
    refused(f.check(root), "without training images")


@fuzz(slow=True)
def test_folder_of_some_domains(f):
    root = heads(f.rng, f.folder / "root", "train/a", "train/b", "test/a", count=9)
    done(f.check(root), "a: 9 to train, 9 held out", "b: 9 to train, 0 held out")
    done(f.train(root))


@fuzz
def images_beside_the_domains(f):
    root = heads(f.rng, f.folder / "root", "a", "b")
    f.save("root/loose.png")
    done(f.check(root), "a: 3 to train", "b: 3 to train")


@fuzz
def domain_without_a_readable_image(f):
    root = heads(f.rng, f.folder / "root", "a", "b")
    f.write("root/c/x.png", f.rng.bytes(50))
    refused(f.check(root), "the domain c has no image")


@fuzz
def odd_names_of_domains(f):
    odd = f.draw.choice(("a b", "ü-頭", "two\nlines", "a,b", "%s", "-dash", "a" * 200,
                         "not-utf8-\udcff", "auto", "a|b"))
    root = heads(f.rng, f.folder / "root", "plain")
    heads(f.rng, f.folder, "there", count=12)
    (f.folder / "there").rename(root / odd)
    done(f.check(root))
    done(f.train(root))


@fuzz
def pairs_that_lack_one(f):
    root = heads(f.rng, f.folder / "root", "train/a", "train/b")
    for domain, i in itertools.product("ab", range(9)):
        f.save(f"root/test/{domain}/{i}.png")
    (root / "test" / "b" / f"{f.draw.randrange(9)}.png").unlink()
    done(f.check(root), "9 held out", "8 held out")


# ---------------------------------------------------------------- flags

def some_flag(f, *kinds, which=lambda field: True):
    """A random command and one of its flags of these types, as its dataclass field."""
    found = []
    for name, command in COMMANDS.items():
        for field in fields(command.Config):
            m = field.metadata
            if m["kind"] in kinds and m["group"] != "positional" and which(field):
                found.append((name, field))
    return f.draw.choice(found)


def with_flag(f, name, field, value):
    """A good command line with one bad value in it."""
    flag = "--" + field.name.replace("_", "-")
    if name == "translate.py":
        return f.translate(f.save("x.png"), "out.png", f"{flag}={value}")
    if name == "evaluate":
        return f.evaluate(f"{flag}={value}")
    return f.train(f.base.root, f"{flag}={value}")


@fuzz
def unknown_flag(f):
    name = f.draw.choice(list(COMMANDS))
    argv = [f.draw.choice(("--no-such", "-x", "--", "--no-size", "--Tau", "—steps", "--help-me", "a b c d e"))]
    if argv == ["--"]:
        argv += ["--x", "y", "z"]
    refused(f.note(here(COMMANDS[name].main, argv)), "unrecognized")


@fuzz
def number_outside_its_limits(f):
    name, field = some_flag(f, int, float, which=lambda field: field.metadata["limits"])
    which, limit = f.draw.choice(list(field.metadata["limits"].items()))
    sign = {"low": -1, "above": -1}.get(which, 1)
    step = 1 if field.metadata["kind"] is int else f.draw.choice((1e-6, 1, 1e6))
    value = limit if which in ("above", "below") else limit + sign * step
    refused(with_flag(f, name, field, value), "is not allowed")


@fuzz
def not_a_finite_number(f):
    name, field = some_flag(f, float)
    refused(with_flag(f, name, field, f.draw.choice(("nan", "inf", "-inf", "1e999", "-nan"))), "is not allowed")


@fuzz
def huge_whole_number(f):
    name, field = some_flag(f, int)
    refused(with_flag(f, name, field, 10**f.draw.randint(10, 400)), "is not allowed")


@fuzz
def more_than_any_memory(f):
    flags = "size batch-size ot-batch student-images".split()
    refused(f.train(f.base.root, f"--{f.draw.choice(flags)}={10**f.draw.randint(6, 9)}"), "is not allowed")


@fuzz
def more_heads_than_any_disk(f):
    argv = [f"--{f.draw.choice(('train-images', 'valid-heads', 'test-heads'))}={10**f.draw.randint(8, 9)}"]
    refused(f.note(here(train.main, [*RUN, "--out", f.folder / "run", *argv])), "is not allowed")


@fuzz
def huge_fraction(f):
    name, field = some_flag(f, float)
    outcome = with_flag(f, name, field, f.draw.choice((1e30, -1e30, 1e300, 1e38)))
    assert outcome.status in (0, 2)


@fuzz
def wrong_type(f):
    name, field = some_flag(f, int, float)
    odd = f.draw.choice(("many", "1,5", "0x10", "1 2", "None", "[]", "½", "1e", "--"))
    refused(with_flag(f, name, field, odd), "--" + field.name.replace("_", "-"))


@fuzz
def empty_text(f):
    name, field = some_flag(f, str, int, float)
    outcome = with_flag(f, name, field, "")
    if field.default != "":
        refused(outcome, "--" + field.name.replace("_", "-"))


@fuzz
def empty_input_and_output(f):
    words = f.draw.choice((("", ""), ("", "x.png"), (f.save("x.png"), "")))
    way = "--source a --target b --checkpoint".split()
    refused(f.note(here(translate.main, [*words, *way, f.base.net])))


@fuzz
def flag_without_its_value(f):
    name, field = some_flag(f, str, int, float)
    refused(f.note(here(COMMANDS[name].main, ["--" + field.name.replace("_", "-")])), "expected one argument")


@fuzz
def unknown_choice(f):
    name, field = some_flag(f, str, which=lambda field: field.metadata["choices"])
    refused(with_flag(f, name, field, f.draw.choice(("best", "CPU", "none", "0"))), "invalid choice")


@fuzz
def negative_sizes(f):
    name, field = some_flag(f, int, which=lambda field: field.metadata["limits"])
    refused(with_flag(f, name, field, -f.draw.randint(1, 10**9)), "is not allowed")


@fuzz(slow=True)
def seed_of_any_size(f):
    seed = f.draw.choice((0, 1, 2**31 - 1))
    done(f.train(f.base.root, "--seed", seed))
    done(f.translate(f.save("x.png"), "out.png", "--method", "student", "--seed", seed))


@fuzz
def settings_that_diverge(f):
    """What a training leaves is a network that can be used, or a sentence."""
    flags = f.draw.choice(("--lr 1e9", "--sigma 1e9 --coupling independent", "--sigma 1e9", "--ema 1e9",
        "--guidance 1e9",
                           "--lr 1e-9", "--sigma 1e-9 --coupling sinkhorn", "--entropy .999999 --coupling sinkhorn",
                           "--entropy 1e-9 --coupling sinkhorn", "--drop-label .999999", "--end 1 --tau .9999999",
                           "--sigma 1e9 --score --coupling exact", "--colour 2", "--times uniform --end 1e-9 --tau 0"))
    outcome = f.train(f.base.root, "--steps", "20", *flags.split())
    if outcome.status == 2:
        refused(outcome)
    net = f.folder / "run" / "checkpoint.pt"
    if outcome.status == 0:
        done(f.translate(f.save("x.png"), net=net))
        f.evaluate(net=net)


@fuzz
def flags_that_do_not_go_together(f):
    refused(f.train(f.base.root, *f.draw.choice((
        "--tau .98", "--coupling sinkhorn", "--entropy .1", "--score", "--solver sde --coupling exact",
        "--x0 image", "--student-tau .995", "--ot-batch 3 --coupling independent", "--size 17",
        "--size 18 --preset cpu",
        "--domains a", "--domains a,a", "--domains a,b,c", "--domains ,", "--resume",
        "--domains a,b,", "--device cuda")).split()))
    refused(f.translate(f.save("x.png"), "out.png", *f.draw.choice((
        "--method student --tau .3", "--tau .98", "--end .2", "--samples 3", "--solver sde",
        "--source c", "--target c", "--target auto", "--method student --uncertainty u.png",
        "--compare c.gif", "--tau .5 --end .5")).split()))
    refused(f.evaluate(*f.draw.choice((
        "--source a --target a", "--source c", "--target auto", "--rivals /nowhere", "--data /nowhere",
        "--features /nowhere.py", "--device cuda")).split()))


@fuzz
def a_picture_that_is_also_the_output(f):
    name = f.folder / f.draw.choice(("out.png", "x.png", "./out.png"))
    refused(f.translate(f.save("x.png"), "out.png", f.draw.choice(("--compare", "--trajectory")), name), "another")


@fuzz
def features_of_ones_own_that_fail(f):
    code = f.draw.choice(("", "def features(x): return x[", "x = 1", "import no_such_module", "1 / 0",
                          "def features(x): return 3", "def features(x): return x", "\0",
                          "def features(x): raise ValueError('no')"))
    refused(f.evaluate("--features", f.write("own.py", code.encode())), "own.py")


@fuzz
def rivals_that_are_none(f):
    for name in ("adversarial-a-b.pt", "sdedit/checkpoint.pt", "bridge/checkpoint.pt", "supervised.pt"):
        if f.draw.random() < .5:
            f.write(f"rivals/{name}", f.rng.bytes(300))
    refused(f.evaluate("--rivals", f.folder / "rivals"))


@fuzz
def too_few_to_evaluate_on(f):
    root = heads(f.rng, f.folder / "root", "a", "b", count=f.draw.randint(1, 12))
    refused(f.evaluate("--data", root), "no two")
    refused(f.evaluate(f.draw.choice(("--heads", "--valid-heads")), 1), "at least 2")


@fuzz
def data_that_are_others(f):
    root = heads(f.rng, f.folder / "root", "a", f.draw.choice("cd"))
    refused(f.evaluate("--data", root), "knows")


@fuzz(slow=True)
def several_mistakes_in_a_process_of_its_own(f):
    script, argv = f.draw.choice((("train.py", ["--tau", "nan"]), ("train.py", ["--data", f.folder / "none"]),
                                  ("translate.py", ["--checkpoint", f.folder / "none.pt"]),
                                  ("translate.py", [f.save("x.png"), "y.png", "--checkpoint", f.base.net]),
                                  ("minimedshift/evaluate.py", ["--heads", "0"])))
    if script.startswith("minimedshift"):
        line = [sys.executable, "-m", "minimedshift.evaluate", *argv]
        end = subprocess.run(line, capture_output=True, text=True, cwd=ROOT, timeout=2 * SECONDS)
        refused(f.note(sane(Outcome(end.returncode, end.stdout, end.stderr), argv)))
    else:
        refused(f.note(apart(script, argv, f.folder)))


# ---------------------------------------------------------------- checkpoints

def all_refuse(f, path, *words):
    """Every command that reads a checkpoint refuses this one."""
    refused(f.translate(f.save("x.png"), net=path), *words)
    refused(f.evaluate(net=path), *words)
    refused(f.resume(path), *words)


def all_end(f, path):
    """Every command that reads a checkpoint ends well or in a sentence."""
    f.translate(f.save("x.png"), net=path)
    f.evaluate(net=path)
    f.resume(path)


def changed(f, change):
    """A good checkpoint, changed by a function of its dict, as a file."""
    state = torch.load(f.base.net, weights_only=True)
    change(state)
    torch.save(state, f.folder / "net.pt")
    return f.folder / "net.pt"


def some_place(f, state):
    """A random dict in the checkpoint, and one of its keys."""
    while True:
        key = f.draw.choice(list(state))
        if not isinstance(state[key], dict) or not state[key] or f.draw.random() < .3:
            return state, key
        state = state[key]


@fuzz
def checkpoint_that_is_missing(f):
    all_refuse(f, f.folder / "none.pt", "no checkpoint")


@fuzz
def checkpoint_that_is_no_file(f):
    place = f.folder / "resumed" / "checkpoint.pt"
    place.parent.mkdir()
    os.mkfifo(place) if f.draw.random() < .5 else place.mkdir()
    all_refuse(f, place, "no checkpoint")


@fuzz
def checkpoint_of_other_bytes(f):
    kind = f.draw.choice((b"", b"\0" * 5000, b"a text\n" * 50, f.rng.bytes(3000), b"PK\x03\x04" + f.rng.bytes(900),
                          b"\x80\x02" + f.rng.bytes(90)))
    all_refuse(f, f.write("net.pt", kind), "not a readable checkpoint")


@fuzz
def checkpoint_cut_anywhere(f):
    path = Path(shutil.copy(f.base.net, f.folder / "net.pt"))
    all_refuse(f, f.cut(path), "not a readable checkpoint")


@fuzz
def checkpoint_with_flipped_bytes(f):
    path = Path(shutil.copy(f.base.net, f.folder / "net.pt"))
    all_end(f, f.flip(path, f.draw.choice((1, 30, 3000))))


@fuzz
def checkpoint_whose_description_has_flipped_bytes(f):
    path = f.folder / "net.pt"
    with zipfile.ZipFile(f.base.net) as old, zipfile.ZipFile(path, "w") as new:
        for entry in old.infolist():
            content = bytearray(old.read(entry))
            if entry.filename.endswith("data.pkl"):
                for _ in range(f.draw.randint(1, 4)):
                    content[f.draw.randrange(len(content))] = f.draw.randrange(256)
            new.writestr(entry.filename, bytes(content))
    all_end(f, path)


class Evil:
    """A pickle of it runs a program."""

    def __init__(self, word):
        self.word = word

    def __reduce__(self):
        return os.system, (f"touch {self.word}",)


@fuzz
def checkpoint_that_would_run_a_program(f):
    sign, path = f.folder / "it-ran", f.folder / "net.pt"
    evil = {"format": 4, "config": Evil(sign)}
    kind = f.draw.choice(("pickle", "zip", "old", "inside"))
    if kind == "pickle":
        path.write_bytes(pickle.dumps(evil))
    elif kind == "inside":
        changed(f, lambda state: state.update(student=Evil(sign)))
    else:
        torch.save(evil, path, _use_new_zipfile_serialization=kind == "zip")
    all_refuse(f, path, "not a readable checkpoint")
    for name in ("adversarial.pt", "sdedit/checkpoint.pt"):
        rival = f.folder / "rivals" / name
        rival.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, rival)
    refused(f.evaluate("--rivals", f.folder / "rivals"))
    assert not sign.exists(), "a checkpoint ran a program"


@fuzz
def checkpoint_of_another_format(f):
    number = f.draw.choice((0, 1, 3, 5, 99, "4", None, 10**50))
    all_refuse(f, changed(f, lambda state: state.update(format=number)), "of format 4")


@fuzz
def checkpoint_that_is_no_dict(f):
    torch.save(f.draw.choice(([1, 2], "text", None, torch.zeros(3), {1: 2}, {})), f.folder / "net.pt")
    all_refuse(f, f.folder / "net.pt", "of format 4")


@fuzz
def weights_that_are_not_numbers(f):
    odd = f.draw.choice((math.nan, math.inf, -math.inf))

    def spoil(state):
        for part in ("ema", "model"):
            weights = f.draw.choice([w for w in state[part].values() if w.dim()])
            weights[tuple(map(f.draw.randrange, weights.shape))] = odd

    all_refuse(f, changed(f, spoil), "not a finite number")


@fuzz
def weights_of_wrong_shapes(f):
    def spoil(state):
        for part in ("ema", "model"):
            name = f.draw.choice(list(state[part]))
            size = [f.draw.randint(1, 5) for _ in range(f.draw.randint(0, 5))]
            state[part][name] = f.draw.choice((torch.zeros(size), torch.zeros(0), 3, None, "text", [1.0]))

    all_refuse(f, changed(f, spoil), "holds another network")


@fuzz
def weights_too_few_or_too_many(f):
    def spoil(state):
        for part in ("ema", "model"):
            if f.draw.random() < .5:
                state[part].pop(f.draw.choice(list(state[part])))
            else:
                state[part][f.draw.choice(("more", 7, ""))] = torch.zeros(2)

    all_refuse(f, changed(f, spoil), "holds another network")


@fuzz
def weights_of_another_type(f):
    kind = f.draw.choice((torch.int64, torch.bool, torch.complex64, torch.float16, torch.float64))

    def spoil(state):
        for part in ("ema", "model"):
            state[part] = {name: weights.to(kind) for name, weights in state[part].items()}

    all_end(f, changed(f, spoil))


@fuzz
def checkpoint_of_other_domains(f):
    names = f.draw.choice((["a"], [], ["a", "b", "c"], ["a", "a"], ["c", "d"], "ab", [1, 2], None, ["b", 3]))
    path = changed(f, lambda state: state.update(domains=names))
    refused(f.translate(f.save("x.png"), net=path))
    refused(f.evaluate(net=path))
    f.resume(path)


@fuzz
def checkpoint_without_a_key(f):
    def spoil(state):
        place, key = some_place(f, state)
        del place[key]

    all_end(f, changed(f, spoil))


@fuzz
def checkpoint_with_a_key_of_another_type(f):
    odd = (None, -1, 0, 10**30, 1e300, math.nan, "text", "", [], {}, [None], True, torch.zeros(2), (1, 2, 3))

    def spoil(state):
        place, key = some_place(f, state)
        place[key] = f.draw.choice(odd)

    all_end(f, changed(f, spoil))


@fuzz(slow=True)
def every_setting_of_another_type(f):
    """Of all small parts of a checkpoint in turn."""
    part = f.draw.choice(("shape", "image", "translate", "machine"))
    for key in torch.load(f.base.net, weights_only=True)[part]:
        odd = f.draw.choice((None, -1, 10**30, math.nan, "text", [], {}, (0, 0), torch.zeros(2)))
        all_end(f, changed(f, lambda state: state[part].update({key: odd})))


@fuzz
def shape_that_claims_to_be_huge(f):
    size = 10**f.draw.randint(7, 15)
    change = f.draw.choice((dict(num_domains=size), dict(widths=(size,)), dict(channels=size), dict(stem=size),
                            dict(blocks=(10**5,)), dict(head=size)))
    all_refuse(f, changed(f, lambda state: state["shape"].update(change)))


@fuzz
def images_that_claim_to_be_huge(f):
    change = f.draw.choice((dict(size=10**f.draw.randint(5, 12)), dict(channels=10**9), dict(size=17), dict(size=0)))
    path = changed(f, lambda state: state["image"].update(change))
    refused(f.translate(f.save("x.png"), net=path))
    refused(f.evaluate(net=path))


@fuzz
def settings_that_no_flag_allows(f):
    change = f.draw.choice((dict(tau=-1.), dict(tau=2.), dict(steps=0), dict(solver="rk9"), dict(end=7.), dict(x0="x"),
                            dict(tau=math.nan), dict(colour=math.nan), dict(guidance=math.inf)))
    path = changed(f, lambda state: state["translate"].update(change))
    refused(f.translate(f.save("x.png"), "out.png", "--method", "flow", net=path))
    refused(f.evaluate(net=path))


@fuzz
def tensor_that_repeats_one_number(f):
    """A million million weights that take four bytes in the file."""
    def spoil(state):
        size = 10**f.draw.randint(8, 12)
        state["shape"]["num_domains"] = size - 1
        for part in ("ema", "model"):
            state[part]["label.weight"] = torch.zeros(1).expand(size, 32)

    all_refuse(f, changed(f, spoil))


@fuzz(slow=True)
def archive_that_unpacks_to_more(f):
    path = f.folder / "net.pt"
    with zipfile.ZipFile(f.base.net) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            with new.open(entry.filename, "w", force_zip64=True) as file:
                file.write(old.read(entry))
                if entry.filename.endswith("data.pkl"):
                    for _ in range(300):
                        file.write(bytes(2**20))
    all_refuse(f, path, "not a readable checkpoint")


@fuzz
def archive_that_claims_more_than_it_has(f):
    content = bytearray(f.base.net.read_bytes())
    place = content.rindex(b"PK\x01\x02", 0, content.rindex(b"PK\x05\x06"))
    struct.pack_into("<II", content, place + 20, *(f.draw.choice((0, 2**20, 2**31, 2**32 - 2)) for _ in "ab"))
    all_end(f, f.write("net.pt", bytes(content)))


@fuzz
def student_that_is_broken(f):
    odd = (None, -1, 10**12, "text", [], {}, math.nan, torch.full((2,), math.nan), True)

    def spoil(state):
        place, key = some_place(f, state["student"])
        if f.draw.random() < .3:
            del place[key]
        else:
            place[key] = f.draw.choice(odd)

    path = changed(f, spoil)
    f.translate(f.save("x.png"), "out.png", "--method", "student", net=path)
    f.evaluate(net=path)
    f.resume(path)


@fuzz
def student_whose_weights_are_not_numbers(f):
    path = changed(f, lambda state: state["student"]["weights"]["enter.bias"].fill_(math.nan))
    refused(f.translate(f.save("x.png"), "out.png", "--method", "student", net=path), "not a finite number")
    refused(f.evaluate(net=path), "not a finite number")


@fuzz
def weights_that_overflow(f):
    """Each is a finite number, what they give is none."""
    def spoil(state):
        for part in (state["ema"], state["student"]["weights"]):
            for weights in part.values():
                weights.mul_(1e30)

    path = changed(f, spoil)
    refused(f.translate(f.save("x.png"), net=path), "no number")
    refused(f.evaluate(net=path), "no number")


@fuzz
def student_whose_finish_is_broken(f):
    def spoil(state):
        finish = f.draw.choice(list(state["student"]["finishes"].values()))
        part = f.draw.choice(list(finish))
        low, high, values = finish[part][0]
        finish[part][0] = f.draw.choice(((low, high, values * math.nan), (low, high), (math.nan, high, values), (
            low, high, values[:0]), (low, high, None), (high, low, values[:, None])))

    path = changed(f, spoil)
    refused(f.translate(f.save("x.png"), "out.png", "--method", "student", net=path), "student")
    refused(f.evaluate(net=path), "student")


@fuzz
def student_that_claims_to_be_huge(f):
    change = f.draw.choice((dict(num_domains=10**6), dict(width=10**7), dict(stem=10**5), dict(dilations=[1] * 10**5)))
    path = changed(f, lambda state: state["student"]["shape"].update(change))
    refused(f.translate(f.save("x.png"), "out.png", "--method", "student", net=path))
    refused(f.evaluate(net=path))


@fuzz
def student_of_other_domains(f):
    names = f.draw.choice((["0 1", "1 7"], ["x y"], ["0"], [7], ["0 1 2"]))

    def spoil(state):
        one = next(iter(state["student"]["finishes"].values()))
        state["student"]["finishes"] = {name: one for name in names}

    path = changed(f, spoil)
    refused(f.translate(f.save("x.png"), "out.png", "--method", "student", net=path), "student")
    refused(f.evaluate(net=path), "student")


@fuzz
def optimizer_that_is_broken(f):
    odd = f.draw.choice(([], None, [{}, {}], [1, 2], "text", {}))
    refused(f.resume(changed(f, lambda state: state.update(optimizer=odd))), "optimizer")


@fuzz
def step_that_is_none(f):
    step = f.draw.choice((-1, 1.5, "2", None, 10**30))
    refused(f.resume(changed(f, lambda state: state.update(step=step))))


# ---------------------------------------------------------------- the table of results

def instance(name, folder, seed, base):
    """One instance of a class, in a folder of its own. Its Instance; raises AssertionError if it fails."""
    work = Path(tempfile.mkdtemp(dir=folder))
    f, before = Instance(work, zlib.crc32(f"{name} {seed}".encode()), base), os.getcwd()
    try:
        CLASSES[name][0](f)
    finally:
        os.chdir(before)
        shutil.rmtree(work, ignore_errors=True)
    return f


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", default="")
    c = parser.parse_args()
    failed, start = [], time.time()
    with tempfile.TemporaryDirectory() as folder, bench(Path(folder)) as base:
        for name in CLASSES:
            if c.only not in name:
                continue
            statuses, bad, began = Counter(), [], time.time()
            for k in range(c.repeats):
                faulthandler.dump_traceback_later(20 * SECONDS, exit=True)  # for a hang that no signal ends
                try:
                    statuses += instance(name, folder, c.seed + k, base).statuses
                except Exception as error:
                    bad.append(f"seed {c.seed + k}: {type(error).__name__}: {error}")
            what = ", ".join(f"{statuses[status]} {word}" for status, word in ((0, "done"), (2, "refused")))
            verdict = f"FAILS {len(bad)}" if bad else "ok"
            print(f"{name:<50} {c.repeats:3}  {what:<26} {verdict:8} {time.time() - began:5.1f} s", flush=True)
            print(*[f"    {line[:400]}" for line in bad], sep="\n", end="\n" if bad else "")
            failed += [name] * bool(bad)
    shown = sum(c.only in name for name in CLASSES)
    print(f"{shown} classes, {shown - len(failed)} ok, {len(failed)} fail, {time.time() - start:.0f} s, "
          f"peak memory {peak() / 2**30:.2f} GB")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
