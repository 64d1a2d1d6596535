"""Bad input gives a result or one sentence and status 2, never a traceback. One of each kind people meet."""

import math
import os
import pickle
import zlib
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import train
import translate
from minimedshift import evaluate
from minimedshift.model import Shape, UNet
from minimedshift.support import checkpoint
from minimedshift.support.command import run
from networks import save_network

NET = UNet(Shape(num_domains=5, stem=2, widths=(16,), blocks=(1,), head_width=16))
WAY = "--source real-low --target real-normal --device cpu".split()


def refused(capsys, main, *argv):
    """The one sentence that a command ends with; its exit status is 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        run(lambda: main([str(word) for word in argv]))
    said = capsys.readouterr().err
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    assert end.value.code == 2 and len(lines) == 1 and "Traceback" not in said, said
    return lines[0]


def picture(path, h=20, w=24, **how):
    pixels = np.random.default_rng(0).integers(0, 255, (h, w), np.uint8)
    Image.fromarray(pixels).save(path, **how)
    return path


def cut(path, make=picture):
    make(path)
    os.truncate(path, path.stat().st_size // 2)


def flipped(path):
    data = bytearray(picture(path).read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes(data)


def bomb(path):
    """A header that claims 100,000 x 100,000 pixels."""
    chunk = lambda kind, data: (len(data).to_bytes(4, "big") + kind + data
                                + zlib.crc32(kind + data).to_bytes(4, "big"))
    side = (100_000).to_bytes(4, "big")
    head = chunk(b"IHDR", side + side + bytes([8, 0, 0, 0, 0]))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b""))


def pages(path):
    frames = [Image.new("L", (20, 20), level) for level in (0, 99)]
    frames[0].save(path, format="TIFF", save_all=True, append_images=frames[1:])


def thread(path):
    picture(path, h=2, w=400)


BROKEN = {"empty": lambda path: path.write_bytes(b""), "text": lambda path: path.write_text("no image"),
          "cut": cut, "flipped": flipped, "bomb": bomb, "pages": pages, "thread": thread,
          "folder": lambda path: path.mkdir(), "pipe": lambda path: os.mkfifo(path)}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_image_is_refused_by_its_name(tmp_path, capsys, kind):
    save_network(tmp_path / "net.pt", NET)
    BROKEN[kind](tmp_path / "bad.png")
    said = refused(capsys, translate.main, tmp_path / "bad.png", tmp_path / "out.png", *WAY,
                   "--checkpoint", tmp_path / "net.pt")
    assert "bad.png" in said and not (tmp_path / "out.png").exists()


def test_bad_images_among_good_ones_are_named_and_the_others_translated(tmp_path, capsys):
    save_network(tmp_path / "net.pt", NET)
    (tmp_path / "in").mkdir()
    for name in ("a", "b"):
        picture(tmp_path / "in" / f"{name}.png")
    cut(tmp_path / "in" / "bad.png")
    said = refused(capsys, translate.main, tmp_path / "in", tmp_path / "out", *WAY,
                   "--checkpoint", tmp_path / "net.pt")
    assert "bad.png" in said and {path.name for path in (tmp_path / "out").iterdir()} == {"a.png", "b.png"}


def domains(root, *names):
    for name in names:
        (root / name).mkdir(parents=True)
        for i in range(2):
            picture(root / name / f"{i}.png")


FOLDERS = {
    "no folder": (lambda root: None, "there is no such folder"),
    "empty": (lambda root: root.mkdir(), "two or more sub-folders"),
    "one domain": (lambda root: domains(root, "a"), "two or more sub-folders"),
    "a test domain without training": (lambda root: domains(root, "train/a", "train/b", "test/c"),
                                       "c has no images to train on"),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_folder_that_cannot_be_trained_on_is_refused(tmp_path, capsys, kind):
    make, says = FOLDERS[kind]
    make(tmp_path / "data")
    assert says in refused(capsys, train.main, "--data", tmp_path / "data", "--out", tmp_path / "out",
                           "--check-data")


def test_a_domain_without_a_readable_image_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MINIMEDSHIFT_CACHE", str(tmp_path / "cache"))
    domains(tmp_path / "data", "a", "b")
    for path in (tmp_path / "data" / "b").iterdir():
        cut(path)
    flags = ["--data", tmp_path / "data", "--out", tmp_path / "out", "--check-data", "--device", "cpu"]
    assert "the domain b has no image" in refused(capsys, train.main, *flags)


class Evil:
    def __reduce__(self):
        return os.mkdir, ("/tmp/minimedshift-evil",)


def changed(**parts):
    def make(path):
        save_network(path, NET)
        state = torch.load(path, weights_only=True)
        torch.save(state | parts, path)
    return make


def spoilt(path):
    state = {name: p.clone() for name, p in NET.state_dict().items()}
    state["stem.bias"][0] = math.nan
    changed(ema=state)(path)


CHECKPOINTS = {
    "text": lambda path: path.write_text("hello"),
    "a pickle that runs a program": lambda path: path.write_bytes(pickle.dumps(Evil())),
    "another file of torch": lambda path: torch.save({"weights": torch.zeros(3)}, path),
    "an older format": changed(format=checkpoint.FORMAT - 1),
    "weights of another network": changed(shape=asdict(Shape(stem=2, widths=(32,), blocks=(1,),
                                                             head_width=16))),
    "a network that claims to be huge": changed(shape=asdict(Shape(stem=2, widths=(2**20,), blocks=(9,)))),
    "weights that are no number": spoilt,
    "a student that is none": changed(student=dict(shape=3)),
    "no weights": changed(ema=None),
    "cut in half": lambda path: cut(path, changed()),
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
@pytest.mark.parametrize("main", [translate.main, evaluate.main])
def test_a_checkpoint_that_is_none_is_refused_and_nothing_in_it_is_run(tmp_path, capsys, kind, main):
    CHECKPOINTS[kind](tmp_path / "bad.pt")
    assert "bad.pt" in refused(capsys, main, "--checkpoint", tmp_path / "bad.pt", "--device", "cpu")
    assert not Path("/tmp/minimedshift-evil").exists()
