"""Images as people have them are read right, or refused in one sentence: nothing is misread in silence."""

import json
import re
import struct
import subprocess
import sys
import weakref
import zlib
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import train
import translate
from minimedshift import data, folder, phantom, sampler
from minimedshift.model import Shape, UNet
from minimedshift.support import checkpoint, dicom, images
from minimedshift.support.command import UserError
from minimedshift.support.images import Reading
from networks import save_network
from test_translate import here, way

TINY = "--size 16 --batch-size 4 --solver-steps 1 --student-images 2 --student-steps 2 --no-balance".split()
rng = np.random.default_rng(0)


def head(i, size=16, top=65535):
    """A head as grey levels from 0 to top."""
    v = (phantom.render(phantom.Head(i), "synthetic-low", size)[0].numpy() + 1) / 2
    return (v.clip(0, 1) * top).round().astype(np.uint16 if top > 255 else np.uint8)


def tiff(path, v, order="<", strips=(), **tags):
    """Write v (H, W) or (H, W, samples) as TIFF. strips: its bytes if they are others; tags: as t262=[0]."""
    h, w, samples = (*v.shape, 1)[:3]
    strips = strips or [v.astype(v.dtype.newbyteorder(order)).tobytes()]
    entries = {256: [w], 257: [h], 258: [8 * v.itemsize] * samples, 262: [1 + (samples > 2)], 273: [],
               277: [samples], 278: [h], 279: list(map(len, strips)),
               339: ["uif".index(v.dtype.kind) + 1] * samples}
    entries |= {int(name[1:]): values for name, values in tags.items()}
    out, table = bytes(8), b""
    for strip in strips:
        entries[273].append(len(out))
        out += strip + bytes(len(strip) % 2)
    for tag, values in sorted(entries.items()):
        kind, letter = (4, "I") if tag in (273, 279) else (3, "H")
        inside = struct.pack(f"{order}{len(values)}{letter}", *values)
        if len(inside) > 4:
            inside, out = struct.pack(order + "I", len(out)), out + inside
        table += struct.pack(order + "HHI", tag, kind, len(values)) + inside.ljust(4, b"\0")
    start = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(order + "I", len(out))
    path.write_bytes(start + out[8:] + struct.pack(order + "H", len(entries)) + table + bytes(4))


def seen(path, low=0, high=65535):
    """The grey levels (H, W) or (H, W, 3) that the program sees in a file."""
    mode = images.decode(path)[1].mode
    x, _ = images.read_image(path, Reading(low, high, mode=mode if mode in images.DEEP else "I;16"))
    v = (x.double().numpy().transpose(1, 2, 0) + 1) / 2 * (high - low) + low
    return v[..., 0] if len(x) == 1 else v


def stored(path):
    """A grey file's numbers, as Pillow reads them, in 64 bits."""
    with Image.open(path) as image:
        assert path.suffix != ".tif" or image.tag_v2[262] == 1
        return np.asarray(image).astype(np.int64)


def fill(where, count, picture=head, ending="png", **how):
    """Files 000 to count - 1 in a folder. picture: of a number, as levels."""
    where.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.fromarray(picture(i, **how)).save(where / f"{i:03}.{ending}")


def network(path, **readings):
    """The path of a checkpoint of an untrained network, which changes nothing, of domains a, b."""
    readings = {"a": Reading(), "b": Reading()} | readings
    image = dict(size=16, channels=1, readings={domain: asdict(how) for domain, how in readings.items()})
    net = UNet(Shape(widths=(32,), blocks=(1,), num_domains=2))
    save_network(path / "net.pt", net, 16, "ab", image=image)
    return path / "net.pt"


def translated(a, b, net, s="a", t="b", *flags):
    return here(a, b, *way(s, t, net), *flags)


@pytest.fixture
def negate(monkeypatch):
    """The network translates to the negative of its input."""
    monkeypatch.setattr(sampler, "translate", lambda model, x1, *_, **__: -x1)


@pytest.fixture
def learn(tmp_path, monkeypatch, capsys):
    """train.py in this process, with a small network, as a function of flags: its status, output, errors."""
    small = Shape(stem=4, widths=(32,), blocks=(1,))
    monkeypatch.setitem(train.PRESETS, "cpu", replace(train.PRESETS["cpu"], shape=small))
    monkeypatch.setattr(train, "pick_formats", lambda *_: (torch.float32, torch.channels_last))
    monkeypatch.setattr(train.signal, "signal", lambda *_: None)
    monkeypatch.setenv("MINIMEDSHIFT_CACHE", str(tmp_path / "cache"))

    def main(root, *flags):
        flags = *TINY, "--out", tmp_path / "out", "--data", root, "--preset", "cpu", *flags
        return train.main([str(f) for f in flags]), *capsys.readouterr()

    return main


@pytest.mark.parametrize("top", [255, 65535])
@pytest.mark.parametrize("how, number", [("<", 1), (">", 1), ("> deflate", 8), ("tiff_lzw", 5),
                                         ("tiff_adobe_deflate", 8)])
def test_what_is_negative_by_its_tag_is_read_as_displayed_and_written_so(tmp_path, how, number, top):
    v, file = head(1, top=top), tmp_path / "a.tif"
    if "tiff" in how:
        white = Image.fromarray(v if top == 255 else top - v)  # Pillow inverts 8 bits itself
        white.save(file, compression=how, tiffinfo={262: 0})
    else:
        white = (top - v).astype(v.dtype.newbyteorder(how[0])).tobytes()
        tiff(file, v, how[0], [zlib.compress(white) if number == 8 else white], t259=[number], t262=[0])
    with Image.open(file) as image:
        assert image.tag_v2[262] == 0 and image.tag_v2[259] == number
    np.testing.assert_allclose(seen(file, 0, top), v, atol=.02)
    assert translated(file, tmp_path / "b.tif", network(tmp_path)) == 0
    np.testing.assert_array_equal(stored(tmp_path / "b.tif"), v)


def test_a_domain_of_negatives_is_warned_of_and_inverted_back_and_forth(tmp_path, learn, negate):
    root, net, out = tmp_path / "root", tmp_path / "out" / "checkpoint.pt", tmp_path / "c.png"
    fill(root / "a", 9)
    fill(root / "b", 9, lambda i: 65535 - head(i + 20))
    status, says, _ = learn(root, "--check-data")
    assert status == 0 and "warning: a and b look like negatives" in says and "--invert b" in says
    status, says, errors = learn(root, "--invert", "b", "--steps", 2, "--no-student")
    assert (status, errors) == (0, "") and "look like negatives" not in says
    for s, t in ("aa", "ab", "ba", "bb"):
        assert translated(root / "a" / "000.png", out, net, s, t, "--overwrite") == 0
        np.testing.assert_array_equal(stored(out), 65535 - head(0) if s == t else head(0))


@pytest.mark.parametrize("bits, ending", [(10, "tif"), (12, "png"), (12, "tif"), (14, "png"), (16, "png")])
def test_a_domain_of_so_many_bits_fills_the_range_beside_one_of_8(tmp_path, bits, ending):
    tops = 255, 2**bits - 1
    fill(tmp_path / "a", 3, top=255)
    fill(tmp_path / "b", 4, ending=ending, top=tops[1])
    made, said = (data.folder_set(tmp_path, 16, cache=tmp_path / ".cache", bits=n) for n in (0, 16))
    assert [some.readings["b"].high for some in (made, said)] == [tops[1], 65535]
    for top, stack in zip(tops, made.train_images):
        for i, x in enumerate(stack):  # in memory each level remains itself
            np.testing.assert_allclose(x[0].astype(float), head(i, top=top) / top * 2 - 1, atol=1.01 / top)
    with pytest.raises(UserError, match="--bits 9: b"):
        data.folder_set(tmp_path, 16, cache=tmp_path / ".cache", bits=9)


def test_a_translation_is_read_and_written_in_the_range_of_its_domain(tmp_path, negate, monkeypatch, capsys):
    net, out = network(tmp_path, a=Reading(0, 4095), b=Reading(0, 0)), tmp_path / "out.png"
    for top in (255, 900, 65535):
        Image.fromarray(head(0, top=top)).save(tmp_path / f"{top}.png")
    for top, flags, white in ((900, "ab", 4095), (255, "ab", 255), (255, "ba", 255), (900, "ba", 1023),
                              (900, ("b", "a", "--bits", 14), 16383)):
        assert translated(tmp_path / f"{top}.png", out, net, *flags, "--overwrite") == 0
        np.testing.assert_array_equal(stored(out), white - head(0, top=top).astype(int))
    assert translated(tmp_path / "65535.png", tmp_path / "no.png", net) == 2
    assert "--bits" in capsys.readouterr().err and not (tmp_path / "no.png").exists()
    monkeypatch.setattr(sampler, "translate", lambda model, x1, *_, **__: x1 + 9)
    assert translated(tmp_path / "900.png", out, net, *"ab", "--overwrite") == 0 and stored(out).max() == 4095


@pytest.mark.parametrize("layout, domains", [
    ("trainA 6, trainB 7, testA 2, testB 3", "A 6 0 2, B 7 0 3"),
    ("train/a 6, train/b 7, valid/a 1, valid/b 2, test/a 2, test/b 3", "a 6 1 2, b 7 2 3"),
    ("Train/a 6, Train/b 7, VAL/a 1, val/b 1, Test/a 2, Test/b 3", "a 6 1 2, b 7 1 3"),
    ("training/a 6, training/b 7, val/a 2, val/b 3", "a 6 0 2, b 7 0 3"),
    ("a/Training 6, a/valid 1, a/Test 2, b/train 7, b/Val 1, b/test 3", "a 6 1 2, b 7 1 3"),
    (", ".join(f"{d}/p{i:03} 2" for d in "ab" for i in range(10)), "a 18 0 2, b 18 0 2"),
    (", ".join(f"{d}/img/p{i}/s{k} 1" for d in "ab" for i in range(10) for k in "12"), "a 18 0 2, b 18 0 2"),
    ("trainCT 6, trainMR 7, testCT 2, testMR 3", "CT 6 0 2, MR 7 0 3"),
    ("a/Train_set 6, a/Test_set 2, b/TRAINING 7, b/testing 3", "a 6 0 2, b 7 0 3"),
    ("training_A 6, validation_A 2, training_B 7, validation_B 3", "A 6 0 2, B 7 0 3"),
    ("A_training 6, A_Testing 2, B_training 7, B_Testing 3, B_training/Segmentation 9", "A 6 0 2, B 7 0 3"),
    ("Val-de-Grace 9, test-b 9, a/img 9, a/masks_machine 9", "Val-de-Grace 8 0 1, a 8 0 1, test-b 8 0 1"),
    ("CT/train_ct 6, CT/test_ct 9, MR/trainMR 7, MR/testMR 9, MR/leftMask 9", "CT 6 0 9, MR 7 0 9"),
    ("real/imagesTr 9, real/labelsTr 9, drr 10", "drr 9 0 1, real 8 0 1"),
    ("a 10, a/thumbnails 10, b 20, b/left 10, out! 3, old/runs! 2, b/.hidden 5", "a 9 0 1, b 27 0 3")])
def test_a_layout_is_understood(tmp_path, layout, domains):
    """Words are folders with a number of images; "!" has a checkpoint. Domain: to train, valid, test."""
    for name, count in map(str.split, layout.split(", ")):
        fill(tmp_path / name.strip("!"), int(count), lambda i: np.zeros((2, 2), np.uint8))
        if "!" in name:
            (tmp_path / name.strip("!") / "checkpoint.pt").touch()
    names, found, own, _ = folder.find_files(tmp_path, 0)
    count = lambda d: " ".join(str(len(found[f"{split}-{d}"])) for split in ("train", "valid", "test"))
    assert ", ".join(f"{name} {count(d)}" for d, name in enumerate(names)) == domains
    assert own == ("Grace" not in layout and ("test" in layout.lower() or "val" in layout))
    for d in range(2):  # a sub-folder is on one side
        group = lambda split: {f.group for f in found[f"{split}-{d}"] if "p0" in f.group}
        assert not group("train") & group("test")


@pytest.mark.parametrize("layout", ["images/a images/b", "a/train a/test b", "train/a train/b test/a c", "a",
                                    "train/a/test train/b/test", "test/a test/b", "trainA testB",
                                    "TrainA TrainB TestA TestB", "A_train B_train A_test B_test",
                                    "A_train_png B_train_png A_test_png B_test_png"])
def test_a_layout_that_is_not_understood_is_asked_back_in_one_sentence(tmp_path, layout):
    for name in layout.split():
        fill(tmp_path / name, 6)
    try:
        domains, files, _, _ = folder.find_files(tmp_path, 0)
        assert layout.lower().count("train") == 2 and domains == ("A", "B")  # or it is understood
        assert {len(some) for key, some in files.items() if "valid" not in key} == {6}
    except UserError as error:
        assert "--data" in str(error) and "\n" not in str(error)


def test_what_was_left_unused_or_is_odd_is_said_with_its_count_and_why(tmp_path, learn, monkeypatch):
    monkeypatch.setattr(dicom, "pydicom", None)
    root = tmp_path / "root"
    for d in "ab":
        fill(root / d, 59, top=255)
        for name in ("0.dcm", "1.dcm", "IM0"):
            (root / d / name).write_bytes(bytes(128) + b"DICM")
        (root / d / "lost.png").symlink_to("/no/such/file.png")
        (root / d / "notes.xyz").touch()
        Image.fromarray(head(60, top=255)).save(root / d / "odd.jfif", "JPEG")
    Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(root / "b" / "007.png")
    status, says, _ = learn(root, "--check-data")
    assert status == 0 and "a: 54 to train, 6 held out" in says and says.count("\n") <= 10
    for words in ("6 DICOM", "pip install pydicom", "2 broken links", "2 .xyz files"):
        assert words in says.partition("not read:")[2], words
    assert "3 channels, for 1 of 120 images" in says and "b/007.png" in says
    for i in range(22):
        fill(root / f"p{i:03}", 2, top=255)
    assert "warning: 24 domains" in learn(root, "--check-data")[1]


def test_only_a_test_split_of_the_user_is_paired_and_the_report_says_how_many(tmp_path, learn):
    strangers, paired = tmp_path / "strangers", tmp_path / "paired"
    for d in range(2):
        for where in (strangers / "ab"[d], paired / "train" / "ab"[d]):
            fill(where, 100, lambda i: np.full((16, 16), i + d, np.uint8))
        fill(paired / "test" / "ab"[d], 10 + d, top=255)
        fill(tmp_path / "valid" / f"train{'AB'[d]}", 2)
        fill(tmp_path / "valid" / f"val{'AB'[d]}", 12)
    assert data.folder_set(tmp_path / "valid", 16, cache=tmp_path / "cache").test_pairs is None
    made = data.folder_set(strangers, 16, cache=tmp_path / "cache")
    assert made.test_pairs is None and made.valid_pairs is None and len(made.test_images[0]) == 10
    status, says, errors = learn(paired, "--steps", 2, "--no-student")
    assert (status, errors) == (0, "") and "5 pairs to test on" in says
    assert "seems not to be one head" not in says
    fill(paired / "test" / "b", 10, lambda i: head(i + 50, top=255))
    assert "warning: in a and b one name seems not to be one head" in data.folder_set(paired, 16).notes
    assert json.loads((tmp_path / "out" / "report.json").read_text())["heads"] == 5


def test_the_users_validation_images_stay_apart_and_a_person_on_both_sides_is_named(tmp_path):
    for d in "ab":
        for split, count in (*((f"train/p{i}", 3) for i in range(6)), ("val", 4), ("test/p2", 6)):
            fill(tmp_path / split.replace("/", f"/{d}/") / (d if split == "val" else ""), count)
    made = data.folder_set(tmp_path, 16, cache=tmp_path / ".cache")
    assert (len(made.valid_pairs.images), len(made.test_pairs.images)) == (4, 6)
    assert [len(images) for images in made.train_images + made.test_images] == [18, 18, 10, 10]
    assert [note for note in made.notes if "warning" in note] == [
        "warning: if p2 is a patient, it is both to train and to test on"]
    assert "patients, by folders, DICOM or names: a 10, b 10" in made.notes


@pytest.mark.parametrize("sizes", [(5, 95), (50, 50), (1, 1, 1), (12,) * 9, (40, 3, 3, 3, 3)])
@pytest.mark.parametrize("seed", range(4))
def test_groups_are_held_out_alike_in_all_domains_and_never_all_of_them(sizes, seed):
    files = {f"{split}-{d}": [] for d in range(2) for split in ("train", "valid", "test")}
    for d in range(2):
        for p, count in enumerate(sizes):
            files[f"train-{d}"] += [folder.File(f"{p}-{i}", "ab"[d], "", f"p{p}", f"p{p}/{i}")
                                    for i in range(count + d)]
    found = folder.hold_out(files, seed)
    groups = [{file.group for d in range(2) for file in found[f"{split}-{d}"]} for split in ("train", "test")]
    assert not set.intersection(*groups) and all(found[f"train-{d}"] for d in range(2))
    most = max(sum(sizes) // 5, min(sizes) + 1)
    assert (sum(sizes) < 5 or groups[1]) and all(len(found[f"test-{d}"]) <= most for d in range(2))


def test_files_named_by_uid_are_all_themselves_and_a_runs_folder_is_passed_over(tmp_path):
    names = {folder.place(tmp_path, tmp_path / "a" / f"1.2.840.{i}").name for i in range(9)}
    assert len(names) == 9 and folder.place(tmp_path, tmp_path / "a" / "x.dcm.png").name == "x"
    fill(tmp_path / "out", 2)
    (tmp_path / "out" / ".lock").touch()
    fill(tmp_path / "a", 1)
    (tmp_path / "0_link").symlink_to(tmp_path / "a")
    (tmp_path / "a" / "000_mask.png").touch()
    assert folder.image_files(tmp_path) == ([tmp_path / "a" / "000.png"], {
        "folder out": 1, "masks, thumbnails and the like": 2, "links to images that are there": 1})


def test_a_folder_is_scored_in_the_range_that_was_trained_on_and_other_files_are_refused(tmp_path):
    for d in "ab":
        fill(tmp_path / d, 5, lambda i: head(i, top=1000))
    known = dict.fromkeys("ab", Reading(0, 4095))
    made = data.folder_set(tmp_path, 16, cache=tmp_path / ".cache", known=known)
    assert made.readings == known and made.train_images[0].max() < -.5
    with pytest.raises(UserError, match="0 to 1023, in training it had 0 to 511"):
        data.folder_set(tmp_path, 16, cache=tmp_path / ".cache", known=dict.fromkeys("ab", Reading(0, 511)))
    tiff(tmp_path / "f.tif", head(0).astype(np.float32) / 65535)
    with pytest.raises(UserError, match="f.tif.*mode F"):
        images.read_image(tmp_path / "f.tif", known["a"])


def test_images_of_two_polarities_or_depths_in_one_domain_are_warned_of(tmp_path, learn):
    for d, first in (("two", 137), ("half", 80)):
        fill(tmp_path / "root" / d, 140, lambda i: head(i, top=16383) ^ np.uint16(16383 * (i >= first)))
    fill(tmp_path / "root" / "deep", 12, lambda i: head(i, top=16383 if i else 1023)[:16 - 3 * (i == 1)])
    says = learn(tmp_path / "root", "--check-data")[1]
    assert "3 of 140 images of two look like negatives" in says and "1 of deep's images fill less" in says
    assert 55 <= int(re.search(r"(\d+) of 140 images of half look like neg", says)[1]) <= 65
    assert "1 of 292 images are not square" in says


@pytest.mark.parametrize("frame", [0, 1, 3])
def test_negatives_in_a_dark_frame_and_masks_among_images_are_warned_of(tmp_path, learn, frame):
    for d in "ab":
        v = lambda i: np.abs(255 * (d == "b") - head(i, 32, 255).astype(int)).astype(np.uint8)
        fill(tmp_path / "root" / d, 12, lambda i: np.pad(v(i)[frame:32 - frame, frame:32 - frame], frame))
    for i in range(12):
        half = tmp_path / "root" / "b" / ("left", "right")[i % 2]
        half.mkdir(exist_ok=True)
        (tmp_path / "root" / "b" / f"{i:03}.png").rename(half / f"{i}.png")
    fill(tmp_path / "root" / "a" / "roi", 2, lambda i: np.uint8(255 * (head(i, 32, 255) > 99)))
    says = learn(tmp_path / "root", "--check-data", "--size", 32)[1]
    assert any(f"b has the groups left, right, of which {side} is held" in says for side in ("left", "right"))
    assert "a and b look like negatives" in says and "2 images have only two grey levels, such as" in says


def test_images_of_a_patient_stay_together_by_their_names_and_by_dicom(tmp_path):
    for i in range(60):
        radiograph(tmp_path / "b" / f"{i}.dcm", head(0, top=4095), PatientID=f"p{i // 5}")
        (tmp_path / "a").mkdir(exist_ok=True)
        (tmp_path / "a" / f"study1_p{i // 5} ({i % 5}).png").touch()
    (tmp_path / "b" / "7.jpg").touch()
    files = folder.find_files(tmp_path, 0)[1]
    train, others, test, same = ({file.group for file in files[key]} - {""}
                                 for key in ("train-0", "train-1", "test-0", "test-1"))
    assert len(train | test) == 12 and test == same and train == others and not train & test
    notes = folder.people("ab", files, False)
    assert any("1 images of b differ from others by the ending" in note for note in notes)


def test_a_bright_dot_that_widens_the_range_is_warned_of(tmp_path, learn):
    dot = np.pad(np.full((2, 2), 65535, np.uint16), 7)
    fill(tmp_path / "root" / "a", 6, lambda i: head(i, top=4095))
    fill(tmp_path / "root" / "b", 6, lambda i: np.maximum(head(i, top=4095), dot * np.uint16(i == 5)))
    says = learn(tmp_path / "root", "--check-data")[1]
    assert "warning: b fills a small part of its range" in says and "warning: a" not in says
    with pytest.raises(UserError, match="65535 in .*005.png"):
        learn(tmp_path / "root", "--check-data", "--bits", 12)


def test_resume_knows_its_data_and_prolongs_a_finished_run(tmp_path, learn):
    root, out = tmp_path / "root", tmp_path / "out"
    for d in range(2):
        fill(root / "ab"[d], 6, lambda i: head(i + 10 * d, top=4095))
    status, says, _ = learn(root, "--steps", 2)
    assert status == 0 and "grey levels: a 0 to 4095, b 0 to 4095" in says
    root = root.rename(tmp_path / "moved")
    status, says, errors = learn(root, "--steps", 4, "--resume")
    state = checkpoint.load(out / "checkpoint.pt")
    assert (status, errors, state["step"]) == (0, "", 4) and "warning: these" not in says and state["student"]
    assert len((out / "log.csv").read_text().splitlines()) == 5
    (root / "b").rename(root / "c")
    with pytest.raises(UserError, match="a, b.*a, c"):
        learn(root, "--steps", 6, "--resume")
    (root / "a").rename(root / "b")  # exchanged: what was a is b
    (root / "c").rename(root / "a")
    for steps, told in ((5, True), (6, False)):
        says = learn(root, "--steps", steps, "--resume", "--no-student")[1]
        assert ("warning: these are not the images" in says) == told
    (root / "a" / "000.png").unlink()
    assert "warning: these are not the images" in learn(root, "--steps", 7, "--resume", "--no-student")[1]


UPRIGHT = {1: lambda v: v, 2: lambda v: v[:, ::-1], 3: lambda v: v[::-1, ::-1], 4: lambda v: v[::-1],
           5: lambda v: v.T, 6: lambda v: v[::-1].T, 7: lambda v: v[::-1, ::-1].T, 8: lambda v: v.T[::-1]}


@pytest.mark.parametrize("turn", UPRIGHT)
@pytest.mark.parametrize("ending, top, how", [
    ("jpg", 255, dict(quality=100)), ("png", 65535, {}), ("webp", 255, dict(lossless=True)), ("tif", 255, {}),
    ("tif", 65535, {}), ("tif", 65535, dict(compression="tiff_lzw"))])
def test_orientation_is_applied_on_reading_and_kept_on_writing(tmp_path, ending, top, how, turn):
    v, exif, files = head(3, 32, top)[:, :24], Image.Exif(), [tmp_path / f"{name}.{ending}" for name in "ab"]
    exif[274] = turn
    Image.fromarray(v).save(files[0], exif=exif, **how)
    assert translated(*files, network(tmp_path)) == 0
    with Image.open(files[1]) as b:
        assert b.getexif().get(274, 1) == turn  # before Pillow has turned a TIFF
    for file in files:
        np.testing.assert_allclose(seen(file, 0, top), UPRIGHT[turn](v), atol=8 if ending == "jpg" else .02)
    other = tmp_path / ("c.tif" if ending == "png" else "c.png")  # in another format it is laid upright
    assert translated(files[0], other, network(tmp_path)) == 0
    grey = stored(other).reshape(*UPRIGHT[turn](v).shape, -1)[..., 0]
    np.testing.assert_allclose(grey, UPRIGHT[turn](v), atol=8 if ending == "jpg" else .02)


def test_a_border_of_one_domain_is_warned_of_and_crop_puts_it_back(tmp_path, learn, negate):
    inner, exif, file = rng.integers(900, 4096, (8, 16, 16), np.uint16), Image.Exif(), tmp_path / "a.png"
    framed = np.pad(inner, ((0, 0), (4, 6), (5, 5)))
    fill(tmp_path / "root" / "a", 7, lambda i: inner[6 - i])
    fill(tmp_path / "root" / "b", 7, lambda i: framed[i])
    says = learn(tmp_path / "root", "--check-data")[1]
    line = next(line for line in says.splitlines() if "--crop" in line)
    assert "7 of b's images" in line and says.count("--crop") == 1
    status, says, _ = learn(tmp_path / "root", "--crop", "--steps", 2, "--no-student")
    made = data.folder_set(tmp_path / "root", 16, crop=True)
    assert status == 0 and "--crop" not in says
    for x in np.concatenate([made.train_images[1], made.test_images[1]])[:, 0]:
        assert np.abs(x - (inner / 4095 * 2 - 1)).max((1, 2)).min() < 1e-3
    exif[274] = 6
    Image.fromarray(framed[7]).save(file, exif=exif)
    net = tmp_path / "out" / "checkpoint.pt"
    assert translated(file, tmp_path / "c.png", net, "b", "a") == 0
    np.testing.assert_array_equal(stored(tmp_path / "c.png"), np.pad(4095 - inner[7], ((4, 6), (5, 5))))
    tiff(tmp_path / "a.tif", 4095 - framed[7], t262=[0])  # the border looks as before, whatever its polarity
    assert translated(tmp_path / "a.tif", tmp_path / "c.tif", net, "b", "a") == 0
    np.testing.assert_array_equal(stored(tmp_path / "c.tif"), np.pad(4095 - inner[7], ((4, 6), (5, 5))))
    v = torch.from_numpy(np.pad(inner[0].astype(np.float32), ((0, 9), (0, 5))))[None]
    assert images.content_box(v) == (slice(None), slice(0, 16), slice(0, 16))
    Image.fromarray(np.pad(head(0, 64, 255), 9)).save(tmp_path / "a.jpg", quality=75)
    v = images.decode(tmp_path / "a.jpg")[0]
    assert images.content_box(v)[1:] == (slice(9, 73), slice(9, 73))
    v = torch.from_numpy(np.pad(inner[0].astype(np.float32), ((0, 9), (0, 5))))[None]
    v[0, 2, 2] = 65535  # a label burnt in
    assert images.content_box(v)[1:] == (slice(0, 16), slice(0, 16))


def test_no_more_large_images_wait_than_fit_in_memory(monkeypatch):
    living, most, shapes = [], [], rng.integers(10, 40, (99, 2)).tolist()

    def read(path, _):
        x = torch.zeros(1, *shapes[path])
        living.append(x.numel())
        most.append(sum(living))
        weakref.finalize(x, living.remove, x.numel())
        return x, images.Info("L", tuple(shapes[path]))

    monkeypatch.setattr(translate, "PIXELS", 5000)
    monkeypatch.setattr(translate.images, "read_image", read)
    done = []
    for batch in translate.batches([(i, "a.png") for i in range(99)], Reading(), lambda h, w: h % 3, 16, []):
        done += [i for i, *_ in batch]
        del batch
    assert sorted(done) == list(range(99)) and 4000 < max(most) <= 5000 + 40 * 40


@pytest.mark.slow
@pytest.mark.parametrize("translating", [True, False])
def test_a_folder_of_large_images_takes_less_than_1_gb(tmp_path, translating):
    for d in "ab":
        fill(tmp_path / "in" / d, 6, lambda i: np.tile(head(i, 500), (5, 6)), "tif")
    argv = [translate.__file__, tmp_path / "in" / "a", tmp_path / "out", "--source", "a", "--target", "b",
            "--compare", tmp_path / "c.png", "--checkpoint", network(tmp_path)] if translating else [
            train.__file__, "--data", tmp_path / "in", "--check-data", "--out", tmp_path / "out"]
    argv = [*map(str, [sys.executable, *argv]), "--device", "cpu"]
    code = (f"import resource, subprocess\nsubprocess.run({argv}, check=True)\n"
            "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert len([*(tmp_path / "out").glob("[!.]*")]) == (6 if translating else 1)
    assert int(done.stdout.split()[-1]) * (1 if sys.platform == "darwin" else 1024) < 1e9


DEEP, COLOUR = rng.integers(0, 65536, (9, 15), np.uint16), rng.integers(0, 65536, (9, 15, 3), np.uint16)
planes = lambda v: dict(strips=[np.ascontiguousarray(v[..., i]).tobytes() for i in range(3)], t284=[2])
deflated = lambda v: dict(strips=[zlib.compress(v.tobytes())], t259=[8])
BITS = (DEEP[..., None] >> np.arange(15, 3, -1) & 1).reshape(9, -1)  # of DEEP // 16; a row ends within a byte
PACKED = np.packbits(BITS.astype(np.uint8), axis=1).tobytes()
SMALL, PALE, PREDICTED = DEEP.astype(np.uint8), COLOUR.astype(np.uint8), np.diff(DEEP, prepend=np.uint16(0))
KINDS = {  # name -> the levels that it shows, the numbers in it, and what else `tiff` needs; * may be refused
    "16-bit planes *": (COLOUR, COLOUR, planes(COLOUR)),
    "16-bit planes, big *": (COLOUR, COLOUR, dict(order=">", **planes(COLOUR.astype(">u2")))),
    "16-bit colour *": (COLOUR, COLOUR, {}),
    "8-bit planes": (PALE, PALE, planes(PALE)),
    "8 bits with a sign *": (SMALL.view(np.int8), SMALL.view(np.int8), {}),
    "32 bits *": (DEEP, DEEP.astype(np.uint32), {}),
    "32 bits with a sign, big *": (DEEP - 9., DEEP.astype(np.int32) - 9, dict(order=">")),
    "64-bit float *": (DEEP, DEEP.astype(np.float64), {}),
    "16-bit float *": (SMALL, SMALL.astype(np.float16), {}),
    "float, big": (DEEP, DEEP.astype(np.float32), dict(order=">")),
    "float, big, deflate *": (DEEP, DEEP.astype(np.float32), dict(order=">", **deflated(DEEP.astype(">f4")))),
    "float, white is 0 *": (65535. - DEEP, DEEP.astype(np.float32), dict(t262=[0])),
    "16 bits, big, deflate": (DEEP, DEEP, dict(order=">", **deflated(DEEP.astype(">u2")))),
    "predictor": (DEEP, DEEP, dict(**deflated(PREDICTED), t317=[2])),
    "strips": (DEEP, DEEP, dict(strips=[DEEP[i:i + 2].tobytes() for i in range(0, 9, 2)], t278=[2])),
    "16 bits with alpha *": (DEEP, np.stack([DEEP, DEEP // 2], 2), dict(t262=[1], t338=[2])),
    "12 bits, packed": (DEEP // 16, DEEP // 16, dict(strips=[PACKED], t258=[12])),
    "12 bits, packed, big *": (DEEP // 16, DEEP // 16, dict(order=">", strips=[PACKED], t258=[12])),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_of_tiff_is_read_right_or_refused_in_one_sentence(tmp_path, kind):
    want, v, how = KINDS[kind]
    tiff(tmp_path / "a.tif", v, **how)
    try:
        top = 255 if v.dtype == np.uint8 else 4095 if "12" in kind else 65535
        np.testing.assert_allclose(seen(tmp_path / "a.tif", 0, top), want, atol=.02)
    except UserError as error:
        assert kind.endswith("*") and "a.tif" in str(error) and "\n" not in str(error)


@pytest.mark.parametrize("order", "<>")
def test_grey_levels_with_a_sign_and_floats_keep_their_range_and_kind(tmp_path, negate, order):
    signed, root = rng.integers(-900, 1900, (5, 16, 16)).astype(np.int16), tmp_path / "root"
    for d, v in (("a", signed), ("b", signed.astype(np.float32) / 6)):
        (root / d).mkdir(parents=True)
        for i in range(5):
            tiff(root / d / f"{i}.tif", v[i], order)
    readings = data.folder_set(root, 16, cache=tmp_path / "cache").readings
    assert (readings["a"].low, readings["a"].high) == (-1024, 2047)
    assert (readings["b"].low, readings["b"].high) == (-256, 512)
    for s, t, kind, want in (("a", "b", 2, 1023 - signed[0]), ("b", "a", 3, 256 - signed[0] / 6)):
        out = tmp_path / f"{s}.tif"
        assert translated(root / s / "0.tif", out, network(tmp_path, **readings), s, t) == 0
        with Image.open(out) as image:
            assert image.tag_v2[339] in (kind, (kind,))
        np.testing.assert_allclose(seen(out, -2048, 2047), want, atol=1e-3)


def test_the_first_picture_of_a_phone_is_taken(tmp_path):
    first, second = (Image.fromarray(head(i, top=255)) for i in range(2))
    first.save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[second], quality=100)
    assert Image.open(tmp_path / "a.jpg").n_frames == 2
    np.testing.assert_allclose(seen(tmp_path / "a.jpg", 0, 255), head(0, top=255), atol=4)


def test_a_folder_is_gone_on_with_and_what_imagej_wrote_survives(tmp_path, capsys):
    tags, out = {270: "ImageJ=1.54f\nunit=mm\n", 282: 7.25, 283: 7.5, 296: 1}, tmp_path / "out"
    (tmp_path / "in").mkdir()
    for i in range(3):
        Image.fromarray(head(i)).save(tmp_path / "in" / f"{i}.tif", tiffinfo=tags)
    argv = tmp_path / "in", out, network(tmp_path), "a", "b"
    assert translated(*argv) == 0 and translated(*argv) == 2 and "--skip-existing" in capsys.readouterr().err
    (out / "1.tif").unlink()
    (out / "2.tif").write_text("as it was")
    for left in (1, 0):
        assert translated(*argv, "--skip-existing") == 0
        assert f"{left} images were left" in capsys.readouterr().out
    assert (out / "2.tif").read_text() == "as it was"
    with Image.open(out / "1.tif") as image:
        assert {tag: image.tag_v2[tag] for tag in tags} == tags
    Image.fromarray(head(0)).save(tmp_path / "in" / "0.tif")
    images.write_image(out / "0.tif", *images.read_image(tmp_path / "in" / "0.tif"))
    assert 282 not in Image.open(out / "0.tif").tag_v2
    Image.fromarray(head(0)).save(tmp_path / "stack.tif", tiffinfo={270: "ImageJ=1.54f\nimages=2\n"})
    with pytest.raises(UserError, match="stack.tif: 2 pages"):
        images.read_image(tmp_path / "stack.tif")


def radiograph(path, v, bits=12, kind="MONOCHROME2", **more):
    """Write v (H, W) as DICOM."""
    pydicom = pytest.importorskip("pydicom")
    meta = pydicom.dataset.FileMetaDataset()
    meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    file = pydicom.dataset.FileDataset(str(path), {}, preamble=bytes(128), file_meta=meta)
    usual = dict(SOPClassUID="1.2.840.10008.5.1.4.1.1.1.1", SOPInstanceUID="1.2.3", SamplesPerPixel=1,
                 Rows=len(v), Columns=len(v[0]), PhotometricInterpretation=kind, PixelData=v.tobytes(),
                 BitsAllocated=16, BitsStored=bits, HighBit=bits - 1, PixelRepresentation=int(v.min() < 0))
    for name, value in (usual | more).items():
        setattr(file, name, value)
    path.parent.mkdir(exist_ok=True)
    file.save_as(path, enforce_file_format=True)


# DICOM PS3.3, C.11.2.1.2.1
window = lambda v, centre, width: ((v - (centre - .5)) / (width - 1) + .5).clip(0, 1)
WINDOW, RESCALE = dict(WindowCenter=1000, WindowWidth=501), dict(RescaleSlope=2, RescaleIntercept=-1000)
NEGATIVE = dict(RescaleSlope=-1, RescaleIntercept=4095)


@pytest.mark.parametrize("more, want", [
    ({}, lambda v: v), (dict(kind="MONOCHROME1"), lambda v: 4095 - v), (RESCALE, lambda v: v),
    (WINDOW, lambda v: window(v, 1000, 501) * 4095),
    (NEGATIVE, lambda v: 4095 - v), (dict(WindowCenter="", RescaleSlope="", WindowWidth=9), lambda v: v),
    (WINDOW | NEGATIVE, lambda v: window(4095. - v, 1000, 501) * 4095),
    (WINDOW | RESCALE | dict(kind="MONOCHROME1"), lambda v: 4095 - window(2 * v - 1000, 1000, 501) * 4095)])
def test_a_radiograph_is_seen_as_a_viewer_shows_it_and_written_as_png(tmp_path, more, want):
    v, net = head(0, top=4095), network(tmp_path, a=Reading(0, 4095), b=Reading(0, 4095))
    for name in ("a.dcm", "1.2.840.7", "IM0001"):
        radiograph(tmp_path / "in" / name, v, **more)
        np.testing.assert_allclose(seen(tmp_path / "in" / name, 0, 4095), want(v.astype(float)), atol=.51)
    assert translated(tmp_path / "in", tmp_path / "out", net) == 0
    for name in ("a.png", "1.2.840.7.png", "IM0001.png"):
        assert Image.open(tmp_path / "out" / name).mode == "I;16"
        np.testing.assert_allclose(stored(tmp_path / "out" / name), want(v.astype(float)), atol=.51)


def test_what_no_radiograph_is_is_refused_in_one_sentence(tmp_path):
    v = head(0, top=4095)
    radiograph(tmp_path / "deep" / "0.dcm", v.astype(np.uint32), 20, BitsAllocated=32)
    radiograph(tmp_path / "colour" / "0.dcm", v, 8, "PALETTE COLOR", BitsAllocated=16)
    radiograph(tmp_path / "thin" / "0.dcm", np.zeros((2, 40), np.uint16))
    radiograph(tmp_path / "left" / "0.dcm", v << 4, HighBit=15)
    for name, why in (("deep", "20 bits"), ("colour", "PALETTE"), ("thin", "too thin"), ("left", "export")):
        with pytest.raises(UserError, match=f"{why}"):
            images.read_image(tmp_path / name / "0.dcm")


def test_stored_bits_are_the_range_of_radiographs_with_a_sign_too(tmp_path):
    v = head(0, top=900)
    radiograph(tmp_path / "a" / "0.dcm", v, 14)
    radiograph(tmp_path / "b" / "0.dcm", v.astype(np.int16) - 512, 10)
    for i in range(1, 4):
        radiograph(tmp_path / "b" / f"{i}.dcm", v, 10, WindowCenter=500 + i // 2, WindowWidth=900)
    many = [dict(WindowCenter=i, WindowWidth=500, PixelSpacing=[1, .5]) for i in range(8)]  # each has its own
    for i, (d, ways) in product(range(8), dict(c=[{}, RESCALE], d=[WINDOW, many[0]], e=many).items()):
        radiograph(tmp_path / d / f"{i}.dcm", v, **ways[i % len(ways)])
    made = data.folder_set(tmp_path, 16, cache=tmp_path / ".cache")
    assert "grey levels: a 0 to 16383, b 0 to 1023 by 3 windows, c" in made.notes[0]
    assert re.findall("in (.) one level may not", str(made.notes)) == ["b", "c", "d"]  # some of b
    assert [made.readings[d].high for d in "ab"] == [16383, 1023] and "12 images have pix" in str(made.notes)
    for x, top in zip(made.train_images, (16383, 1023)):
        np.testing.assert_allclose((x[0, 0].astype(float) + 1) / 2 * top, v, atol=.51)


@pytest.mark.parametrize("name, centre, width, top", [("RG1", 15000, 30000, 32767), ("RG3", 550, 1024, 1023)])
def test_a_real_radiograph_of_monochrome1_is_inverted_in_its_window(tmp_path, name, centre, width, top):
    pydicom = pytest.importorskip("pydicom")
    files = list(Path(pydicom.__file__).parents[1].glob(f"data_store/data/{name}_UNCR.dcm"))
    if not files:
        pytest.skip("needs pydicom-data")
    want = (1 - window(pydicom.dcmread(files[0]).pixel_array, centre, width)) * top
    np.testing.assert_allclose(seen(files[0], 0, top), want, atol=.51)
    net = network(tmp_path, a=Reading(0, top), b=Reading(0, top))
    assert translated(files[0], tmp_path / "a.png", net) == 0
    np.testing.assert_allclose(stored(tmp_path / "a.png"), want, atol=1.01)
