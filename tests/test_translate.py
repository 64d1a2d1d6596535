"""The command a user types, on real kinds of files; and the carrying of a change to full resolution."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import translate
from networks import save_network
from minimedshift import classify, finish, phantom, sampler, student
from minimedshift.model import Shape, UNet
from minimedshift.support import checkpoint
from minimedshift.support.command import run
from minimedshift.sizes import carry_to_full_size, resize, working_shape
from test_finish import distances

SIZE = 16


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    """An untrained network: its output is zero, so that every translation is the source itself."""
    path = tmp_path_factory.mktemp("net") / "checkpoint.pt"
    how = dict(tau=.5, guidance=2., steps=2, solver="heun", t_image=1.0)
    save_network(path, UNet(Shape(widths=(32, 32), blocks=(1, 1))), SIZE, translate=how)
    return str(path)


def picture(*shape, top=255, seed=0):
    """Smooth shapes with fine noise on them, as integers from 0 to top."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.random((6, 6), np.float32))
    smooth = np.asarray(coarse.resize(shape[1::-1], Image.Resampling.BICUBIC))
    x = (smooth * .6 + .2).reshape(*shape[:2], *[1] * (len(shape) - 2)) + .1 * rng.random(shape, np.float32)
    return (x.clip(0, 1) * top).astype(np.uint16 if top > 255 else np.uint8)


def way(source, target, net):
    return "--source", source, "--target", target, "--checkpoint", net


def here(*argv):
    """The same command in this process: its exit status."""
    with pytest.raises(SystemExit) as end:
        run(lambda: translate.main([str(a) for a in argv]))
    return end.value.code


def same(a, b, levels=1):
    a, b = Image.open(a), Image.open(b)
    assert (a.mode, a.size, a.format) == (b.mode, b.size, b.format)
    assert np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int)).max() <= levels


def test_a_mixed_folder_by_the_users_own_command(tmp_path, net):
    folder = tmp_path / "in"
    (folder / "deep" / "er").mkdir(parents=True)
    grey = np.repeat(picture(780, 780, 1), 3, axis=2)
    Image.fromarray(grey).save(folder / "a.png")
    Image.fromarray(picture(1841, 1955, top=65535)).save(folder / "deep" / "er" / "b.png")
    (folder / "notes.txt").write_text("not an image")
    Image.fromarray(picture(80, 80)).save(folder / "cut.jpg")
    (folder / "cut.jpg").write_bytes((folder / "cut.jpg").read_bytes()[:900])
    argv = folder, tmp_path / "out", *way("real-low", "real-normal", net), "--compare", tmp_path / "c.png"
    command = [sys.executable, translate.__file__, *argv]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "cut.jpg" in done.stderr and "notes.txt" not in done.stderr and "1 of 3 images" in done.stderr
    first = done.stdout.splitlines()[1]
    assert done.stdout.startswith("INPUT: 3 images; not read: 1 .txt files")
    words = "real-low -> real-normal|cpu|EMA|step 3|tau 0.5|guidance 2|2 heun steps|12 evaluations"
    for word in words.split("|"):
        assert word in first
    assert sorted(p.name for p in (tmp_path / "out").rglob("*") if p.is_file()) == ["a.png", "b.png"]
    same(folder / "a.png", tmp_path / "out" / "a.png")
    same(folder / "deep" / "er" / "b.png", tmp_path / "out" / "deep" / "er" / "b.png")
    assert Image.open(tmp_path / "c.png").size[0] > 3 * 160


@pytest.mark.parametrize("shape, top", [((780, 780, 3), 255), ((1841, 1955), 65535), ((16, 16), 255),
                                        ((9, 11), 65535), ((16, 31), 255), ((40, 300, 4), 255)])
def test_a_network_that_changes_nothing_changes_no_pixel(tmp_path, net, shape, top):
    x = picture(*shape, top=top)
    if len(shape) == 3:  # colour files of grey pictures
        x = np.concatenate([np.repeat(x[..., :1], 3, 2), x[..., 3:]], 2)
    Image.fromarray(x).save(tmp_path / "a.png")
    assert here(tmp_path / "a.png", tmp_path / "b.png", *way("synthetic-low", "real-low", net)) == 0
    same(tmp_path / "a.png", tmp_path / "b.png")


def test_colours_become_their_luminance_for_a_grey_network(tmp_path, net):
    Image.fromarray(picture(64, 48, 3)).save(tmp_path / "a.png")
    assert here(tmp_path / "a.png", tmp_path / "b.png", *way("real-low", "real-low", net)) == 0
    got = np.asarray(Image.open(tmp_path / "b.png")).astype(int)
    want = np.asarray(Image.open(tmp_path / "a.png").convert("L")).astype(int)
    assert np.abs(got - want[..., None]).max() <= 1


@pytest.fixture(scope="module")
def net_with_student(net, tmp_path_factory):
    """A checkpoint with a student that has learned nothing, between domains of other tone and noise."""
    path = str(tmp_path_factory.mktemp("student") / "checkpoint.pt")
    torch.manual_seed(0)
    domains = len(phantom.DOMAINS)
    images = torch.rand(domains, 30, 1, SIZE, SIZE) * torch.linspace(.2, 1, domains).view(-1, 1, 1, 1, 1)
    network = student.LocalNet(student.LocalShape(width=8, blocks=1))
    whole = student.Student(network, finish.fit(network, images, distances(domains)))
    checkpoint.save(path, {**checkpoint.load(net), "student": whole.state()})
    return path


def test_the_student_translates_unless_the_flow_is_asked_for(tmp_path, net_with_student, monkeypatch, capsys):
    Image.fromarray(picture(SIZE, SIZE)).save(tmp_path / "a.png")
    files = (tmp_path / "a.png", tmp_path / "b.png", *way("real-low", "real-normal", net_with_student),
             "--overwrite")
    evaluated = []
    monkeypatch.setattr(sampler, "translate", lambda model, x1, *_, **__: evaluated.append(1) or x1)
    cases = (([], 0), (["--method", "student"], 0), (["--method", "flow"], 1), (["--tau", .4], 1),
             (["--guidance", 1.5], 1))
    for flags, flow in cases:
        evaluated.clear()
        assert here(*files, *flags) == 0
        assert len(evaluated) == flow
        assert ("its student, 1 evaluation" in capsys.readouterr().out) == (not flow)


@pytest.mark.parametrize("change, word", [
    (dict(source="real"), "synthetic-low, synthetic-high"), (dict(target="auto"), "choose from"),
    (dict(source=None), "--source"), (dict(output=None), "OUTPUT"), (dict(wrong="1"), "--wrong"),
    (dict(tau="1"), "below 1"), (dict(steps="0"), "--steps"), (dict(guidance="inf"), "--guidance"),
    (dict(solver="rk9"), "--solver"), (dict(method="student", tau=".3"), "--tau is a flag of the flow"),
    (dict(method="student"), "has no student"), (dict(checkpoint="none.pt"), "none.pt"),
    (dict(input="none.png"), "no such file"), (dict(input="empty", output="new"), "no image files"),
    (dict(input="folder"), "is a file"), (dict(input="folder", output="folder/sub"), "inside"),
    (dict(input="folder", output="folder"), "would be replaced"), (dict(output="there.png"), "--overwrite"),
    (dict(output="b.xyz"), "ends in"), (dict(output="folder"), "is a folder"),
    (dict(output="a.png/b.png"), "cannot be made"), (dict(compare="b.png"), "choose another"),
    (dict(input="deep.png", output="deep.jpg"), "JPEG cannot hold a I;16 image")])
def test_a_mistake_is_one_sentence_and_changes_nothing(tmp_path, net, monkeypatch, capsys, change, word):
    monkeypatch.chdir(tmp_path)
    for folder in ("folder", "empty"):
        (tmp_path / folder).mkdir()
    for name in ("a.png", "there.png", "folder/a.png"):
        Image.fromarray(picture(20, 20)).save(name)
    Image.fromarray(picture(20, 20, top=65535)).save("deep.png")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    output = "b.png" if change.get("input") != "folder" else "there.png"
    flags = dict(input="a.png", output=output, source="real-low", target="real-low", checkpoint=net) | change
    argv = [value for value in (flags.pop("input"), flags.pop("output")) if value]
    for name, value in flags.items():
        argv += ["--" + name.replace("_", "-"), value] if value else []
    assert here(*argv) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith("error: ") and word in err
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_the_working_shape_frames_as_in_training():
    assert working_shape(780, 780, 64, 4) == (64, 64)
    assert working_shape(1841, 1955, 64, 4) == (64, 68) and working_shape(300, 300, 150, 4) == (150, 150)
    assert working_shape(300, 40, 64, 8) == (480, 64)
    assert working_shape(16, 31, 16, 4) == (16, 32) and working_shape(5, 5, 16, 4) == (16, 16)


def test_a_change_of_contrast_reaches_the_finest_detail_without_seams():
    """If the translation is a line in the source's grey values, so is the full image, in every pixel."""
    full = torch.from_numpy(picture(160, 160, top=65535).astype(np.float32))[None, None] / 32767.5 - 1
    x1 = resize(full, (40, 40))
    out = carry_to_full_size(full, x1, .5 * x1 + .2, eps=1e-8)
    torch.testing.assert_close(out, .5 * full + .2, atol=2e-3, rtol=0)
    detail = lambda x: (x - torch.nn.functional.avg_pool2d(x, 3, 1, 1)).std()
    bright_side = carry_to_full_size(full, x1, x1 + torch.linspace(-.5, .5, 40))
    kept = detail(bright_side) / detail(full)  # nothing is smoothed away
    assert .97 < kept < 1.05
    flat, ramp = torch.zeros(1, 1, 160, 160), torch.linspace(-.4, .4, 40).expand(1, 1, 40, 40)
    steps = carry_to_full_size(flat, torch.zeros(1, 1, 40, 40), ramp).diff(dim=-1)
    assert steps.max() < 1.5 * .8 / 156 and steps.min() >= -1e-6


def test_a_translation_does_not_depend_on_which_other_files_there_are(tmp_path, net, monkeypatch):
    shapes = [(20, 20), (16, 16), (40, 20), (64, 64), (20, 20), (16, 33)]
    (tmp_path / "in").mkdir()
    for i, shape in enumerate(shapes):
        Image.fromarray(picture(*shape, seed=i)).save(tmp_path / "in" / f"{i}.bmp")
    negative = lambda model, x1, *_, **__: -x1 + .1 * x1.mean((1, 2, 3), keepdim=True)
    monkeypatch.setattr(sampler, "translate", negative)
    rest = way("real-low", "real-low", net)
    assert here(tmp_path / "in", tmp_path / "out", *rest, "--batch-size", 2) == 0
    for i in range(len(shapes)):
        assert here(tmp_path / "in" / f"{i}.bmp", tmp_path / "alone.bmp", *rest, "--overwrite") == 0
        same(tmp_path / "out" / f"{i}.bmp", tmp_path / "alone.bmp")


def test_auto_says_what_it_took_and_uses_it(tmp_path, net, monkeypatch, capsys):
    used = []
    monkeypatch.setattr(classify, "label_of", lambda *_: [torch.tensor([value]) for value in (3, 1, True)])

    def record(model, x1, y_source, y_target, **how):
        used.append((y_source.tolist(), y_target, how))
        return x1

    monkeypatch.setattr(sampler, "translate", record)
    Image.fromarray(picture(20, 20)).save(tmp_path / "a.png")
    flags = "--tau", 0.25, "--steps", 7
    assert here(tmp_path / "a.png", tmp_path / "b.png", *way("auto", "real-low", net), *flags) == 0
    assert used == [([3], 2, dict(tau=.25, guidance=2., steps=7, solver="heun", t_image=1.0))]
    assert "a.png: taken for real-normal (synthetic-high is close)\n" in capsys.readouterr().out


@pytest.mark.parametrize("source, labels", [("auto", [0, 1, 2, 3, 4]), ("real-normal", [3])])
@pytest.mark.parametrize("share, warned", [(9.5, True), (.5, False)])
def test_a_picture_far_from_its_domain_is_warned_of(tmp_path, net, monkeypatch, capsys, source, labels,
                                                    share, warned):
    def unexplained(model, x1, asked, *_):
        assert list(asked) == labels
        return torch.full((1, len(asked), 3), share)

    monkeypatch.setattr(classify, "unexplained", unexplained)
    Image.fromarray(picture(20, 20)).save(tmp_path / "a.png")
    assert here(tmp_path / "a.png", tmp_path / "b.png", *way(source, "real-low", net)) == 0
    err = capsys.readouterr().err
    assert err.count("\n") == warned and ("a.png does not look like" in err) == warned


def test_without_arguments_held_out_heads_become_a_figure(tmp_path, net, monkeypatch, capsys):
    monkeypatch.setenv("MINIMEDSHIFT_CACHE", str(tmp_path / "cache"))
    own = checkpoint.load(net)
    checkpoint.save(tmp_path / "checkpoint.pt", own)
    assert here("--checkpoint", tmp_path / "checkpoint.pt") == 0
    assert "simulated" in capsys.readouterr().out
    assert Image.open(tmp_path / "translate.png").size[0] > 6 * 160
    checkpoint.save(tmp_path / "checkpoint.pt", {**own, "config": {**own["config"], "data": "photos"}})
    assert here("--checkpoint", tmp_path / "checkpoint.pt") == 2
    assert "your own images" in capsys.readouterr().err
