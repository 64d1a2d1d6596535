"""The evaluation: perfect and lazy translators score as they must, settings come from validation heads, and the command leaves its files."""

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from minimedshift import data, evaluate
from minimedshift.measure import metrics, tables
from minimedshift.phantom import sets
from minimedshift.support import checkpoint
from minimedshift.support.command import UserError
from minimedshift.support.machine import load
from minimedshift.evaluate import Method
from minimedshift.model import Shape, UNet

ROOT = Path(evaluate.__file__).parents[1]
HOW = dict(tau=.4, guidance=1.0, steps=1, solver="euler", end=.97, colour=1.0, x0="noise")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    return sets.phantom_set(32, 100, 8, 8, cache=cache, progress=False)


@pytest.fixture(scope="module")
def pair(dataset):
    s, t = evaluate.main_domains(dataset.domains)
    return evaluate.question(dataset.test, s, t, 8, "cpu")


PERFECT = Method("perfect", "ours", lambda s, t: lambda q, _: q.second)
LAZY = Method("lazy", "learned", lambda s, t: lambda q, _: q.x)
CURVE = Method("curve", "ceiling", lambda s, t: lambda q, _: q.truth + .1)


# ---------------------------------------------------------------- questions and methods

def test_a_question_holds_the_pictures_of_its_pair(dataset, pair):
    assert (dataset.domains[pair.source], dataset.domains[pair.target]) == evaluate.MAIN
    s, t = pair.source, pair.target
    wanted = dict(x=dataset.test.images[:, s], images=dataset.test.images[:, t], truth=dataset.test.truth[:, t],
                  second=dataset.test.second[:, t], decoys=dataset.test.decoys[:, :, t], materials=dataset.test.materials)
    for name, array in wanted.items():
        torch.testing.assert_close(getattr(pair, name), torch.tensor(array).float())


def test_the_flow_gives_each_pair_what_the_sampler_gives_it(dataset):
    """The kept way back must not leak from one source or one tau into the next."""
    torch.manual_seed(0)
    model = UNet(Shape(stem=4, widths=(16,), blocks=(1,), head=16)).eval()
    torch.nn.init.normal_(model.out.weight, std=.1)
    method = evaluate.with_network(model, HOW)[0]
    how = {key: HOW[key] for key in ("guidance", "steps", "solver", "end", "colour")}
    for s in (0, 1):
        x = load(dataset.test.images[:3, s], "cpu")
        for t in (2, 3):
            for tau in (.2, .5):
                q = evaluate.question(dataset.test, s, t, 3, "cpu", x)
                expected = evaluate.sampler.translate(model, x, s, t, tau, **how)
                torch.testing.assert_close(evaluate.answer(method, q, tau)[0], expected.clamp(-1, 1))


@pytest.mark.parametrize("domains, given, pair", [("abc", {}, "ac"), (("real-normal", "b"), {}, ("real-normal", "b")), ("abc", dict(target="a"), "ba"),
                                                  (("a", *evaluate.MAIN), {}, evaluate.MAIN), (evaluate.MAIN, dict(source="real-normal"), evaluate.MAIN[::-1])])
def test_the_main_pair_is_two_domains(domains, given, pair):
    assert tuple(domains[i] for i in evaluate.main_domains(domains, **given)) == tuple(pair)


# ---------------------------------------------------------------- scores

def test_a_perfect_translator_closes_the_gap_and_a_lazy_one_scores_as_untouched(dataset, pair):
    plain = evaluate.without_network(dataset)
    methods = [*plain, LAZY, PERFECT]
    curve = next(method for method in methods if method.name == "curve")
    chosen = {method.name: method.settings[0] for method in methods}
    rows, pictures = evaluate.main_pair(methods, chosen, pair, curve, None, say=lambda *_, **__: None)
    assert rows["perfect"]["gap_closed"] == pytest.approx(1) and rows["curve"]["gap_closed"] == 0
    low, high = rows["second exposure"]["less_ours"]
    assert low == high == 0  # the same pictures: no difference on any head
    for key in ("E", "structure", "noise", "same_head"):
        assert rows["lazy"][key] == rows["untouched"][key]
    assert rows["lazy"]["less_ours"][1] < 0 and rows["perfect"]["rank_structure"] == 1 < rows["lazy"]["rank_structure"]
    assert torch.equal(pictures["lazy"], pair.x)


def test_the_best_setting_is_chosen(pair):
    blend = Method("blend", "learned", lambda s, t: lambda q, w: w * q.second + (1 - w) * q.x, (0.0, .5, 1.0), "w")
    limits = evaluate.bounds(CURVE, pair)
    found = evaluate.choose(blend, [pair], [limits])
    assert list(found) == [0.0, .5, 1.0] and evaluate.best(found) == 1.0 and found[1.0] == pytest.approx(1)
    E = metrics.structure_mse(.5 * pair.second + .5 * pair.x, pair.truth).mean().item()
    assert found[.5] == pytest.approx(metrics.gap_closed(E, limits[0].mean().item(), limits[1].mean().item()))


def test_a_student_is_asked_and_others_are_compared_with_it(dataset, pair):
    told = []

    class Told:
        def __call__(self, x, s, t):
            told.append((len(x), s, t))
            return x / 2

    pupil = evaluate.with_student(Told())
    x, _ = evaluate.answer(pupil, pair, None)
    assert torch.equal(x, pair.x / 2) and told == [(len(pair.x), pair.source, pair.target)]
    rows = {name: dict(kind=kind) for name, kind in (("curve", "ceiling"), ("MedShift", "ours"), (pupil.name, pupil.kind))}
    assert evaluate.ours(rows) == pupil.name
    rows.pop(pupil.name)
    assert evaluate.ours(rows) == "MedShift" and evaluate.ours(dict(curve=rows["curve"])) is None


def test_all_pairs_are_scored_and_a_cleaner_source_has_no_gap(dataset):
    rows, means = evaluate.all_pairs([PERFECT, LAZY], {}, lambda s: dataset.test, dataset.domains, CURVE, 4, "cpu")
    assert len(rows["perfect"]) == 20 and rows["perfect"]["synthetic-low -> real-low"]["gap_closed"] == pytest.approx(1)
    assert rows["lazy"]["synthetic-high -> synthetic-low"]["gap_closed"] is None  # less noise, else the same picture
    mean = means["perfect"]
    assert mean["gap_closed"] == pytest.approx(1) and mean["worst_pair"] == pytest.approx(1) and mean["pairs_with_gap"] == 19
    assert mean["gap_interval"] == pytest.approx([1, 1]) and mean["noise_right"] > 15 and mean["same_head"] == 1
    assert means["lazy"]["gap_closed"] < 0


def test_a_method_that_knows_one_pair_is_left_out_of_the_means(dataset):
    one = Method("one", "learned", lambda s, t: (lambda q, _: q.x) if (s, t) == (1, 3) else None)
    rows, means = evaluate.all_pairs([one, LAZY], {}, lambda s: dataset.test, dataset.domains, CURVE, 2, "cpu")
    assert list(rows["one"]) == ["synthetic-high -> real-normal"] and list(means) == ["lazy"]


# ---------------------------------------------------------------- the command

@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """A checkpoint of a network that has learned nothing, and its cache."""
    folder = tmp_path_factory.mktemp("net")
    torch.manual_seed(0)
    shape = Shape(stem=4, widths=(16,), blocks=(1,), head=16)
    model = UNet(shape)
    torch.nn.init.normal_(model.out.weight, std=.1)
    config = dict(data=None, domains="", train_images=100, valid_heads=4, test_heads=4, seed=0, shift=.55, coupling="independent", sigma=0.0, colour=1.0)
    checkpoint.save(folder / "checkpoint.pt", dict(config=config, shape=asdict(shape), domains=list(sets.phantom.DOMAINS), step=3, translate=HOW,
                    image=dict(size=32, channels=1, range=[-1.0, 1.0]), model=model.state_dict(), ema=model.state_dict()))
    return folder


def command(network, *flags):
    env = {**os.environ, "MINIMEDSHIFT_CACHE": str(network / "cache")}
    line = [sys.executable, "-m", "minimedshift.evaluate", "--checkpoint", str(network / "checkpoint.pt"), *flags]
    return subprocess.run(line, env=env, cwd=ROOT, capture_output=True, text=True, timeout=600)


def test_the_command_leaves_a_table_results_and_pictures(network, tmp_path):
    (tmp_path / "features.py").write_text("def features(x):\n    return x.mean((1, 2, 3))[:, None] * x.new_tensor([[1.0, 2.0, -1.0]])\n")
    done = command(network, "--heads", "4", "--heads-each", "2", "--valid-heads", "4", "--features", str(tmp_path / "features.py"), "--out", str(tmp_path / "out"))
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"table.md", "results.json", "pareto.png", "heads.png"}
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    table = (tmp_path / "out" / "table.md").read_text()
    assert table in done.stdout and results["shift"] == .55 and "S = 0.55" in table and "simulated" in table
    assert set(results["main_pair"]) == set(results["all_pairs"]) == {"shared", "own"}
    for population in ("shared", "own"):
        rows = results["main_pair"][population]
        assert {"untouched", "histogram", "bands (DoG)", "curve", "second exposure", "MedShift", "DDIB"} <= set(rows)
        assert rows["second exposure"]["gap_closed"] == pytest.approx(1, abs=1e-6) and len(rows["MedShift"]["E_heads"]) == 4
        for name in rows:
            assert name in table
    assert results["settings"]["MedShift"].keys() == {"0.1", "0.2", "0.3", "0.4", "0.5", "0.6"}
    assert Image.open(tmp_path / "out" / "heads.png").width > 3 * 256


@pytest.mark.parametrize("flags, says", [(["--heads", "0"], "--heads 0"), (["--source", "mars"], "--source mars"), (["--rivals", "/nowhere"], "--rivals"),
                                         (["--source", "real-low", "--target", "real-low"], "both real-low"), (["--features", "/no.py"], "/no.py"),
                                         (["--data", "/nowhere"], "/nowhere")])
def test_a_mistake_is_a_sentence(network, monkeypatch, flags, says):
    monkeypatch.setenv("MINIMEDSHIFT_CACHE", str(network / "cache"))
    with pytest.raises(UserError, match=says) as error:
        evaluate.main(["--checkpoint", str(network / "checkpoint.pt"), "--heads", "4", "--valid-heads", "4", *flags])
    assert "\n" not in str(error.value)


def test_an_output_that_is_a_file_is_a_sentence(network, tmp_path, monkeypatch):
    monkeypatch.setenv("MINIMEDSHIFT_CACHE", str(network / "cache"))
    (tmp_path / "there").write_text("kept")
    with pytest.raises(UserError, match="--out .* cannot be made"):
        evaluate.main(["--checkpoint", str(network / "checkpoint.pt"), "--heads", "4", "--valid-heads", "4", "--out", str(tmp_path / "there")])
    assert (tmp_path / "there").read_text() == "kept"


# ---------------------------------------------------------------- folders

def write(folder, names, bright, seed=0):
    folder.mkdir(parents=True)
    g = np.random.default_rng(seed)
    for name in names:
        Image.fromarray((g.random((32, 32)) * 100 + bright).astype(np.uint8)).save(folder / f"{name}.png")


def test_test_images_of_one_name_are_pairs_and_others_are_not(tmp_path):
    names = [f"head{i}" for i in range(9)]
    for domain, bright in (("a", 0), ("b", 100)):
        write(tmp_path / "train" / domain, [f"t{i}" for i in range(5)], bright)
        write(tmp_path / "test" / domain, names + [f"only-{domain}"], bright, seed=1)
    found = data.folder_set(tmp_path, 32, cache=tmp_path / "cache", progress=False)
    assert found.valid.images.shape == (5, 2, 1, 32, 32) and found.test.images.shape == (4, 2, 1, 32, 32)
    lighter = found.test.images[:, 1] - found.test.images[:, 0]  # the same random picture, 100 grey levels brighter
    np.testing.assert_allclose(lighter, 100 / 127.5, atol=2e-3)
    assert found.test.truth is None and evaluate.question(found.test, 0, 1, 4, "cpu").second is None
    (tmp_path / "test" / "a" / "head3.png").unlink()
    (tmp_path / "test" / "a" / "head4.png").unlink()
    again = data.folder_set(tmp_path, 32, cache=tmp_path / "cache", progress=False)
    assert again.test is None and again.valid is None and len(again.held_out[0]) == 8


@pytest.mark.parametrize("paired", [True, False])
def test_a_folder_is_evaluated_with_and_without_pairs(network, tmp_path, paired):
    for i, domain in enumerate(sets.phantom.DOMAINS):
        write(tmp_path / "images" / "train" / domain, [f"t{k}" for k in range(6)], 20 * i, seed=i)
        write(tmp_path / "images" / "test" / domain, [f"{'' if paired else domain}{k}" for k in range(8)], 20 * i)
    (tmp_path / "features.py").write_text("def features(x):\n    return x.flatten(1)[:, :3]\n")
    done = command(network, "--data", str(tmp_path / "images"), "--features", str(tmp_path / "features.py"), "--out", str(tmp_path / "out"))
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    table = (tmp_path / "out" / "table.md").read_text()
    if paired:
        rows = results["main_pair"]["shared"]
        assert list(results["main_pair"]) == ["shared"] and rows["curve"]["gap_closed"] == 0 and rows["MedShift"]["noise"] is None
        assert "simulated" not in table and "paired by file name" in table and "Only 4 pairs" in table and "edge width" not in table
    else:
        assert "real against real" in results["unpaired"] and "MedShift, tau 0.3" in results["unpaired"]
    assert "MedShift" in table and "kernel" in table


# ---------------------------------------------------------------- tables

def test_evaluations_of_several_shifts_stand_side_by_side():
    row = dict(kind="ours", gap_closed=.5, gap_interval=[.4, .6], worst_tenth=20., noise=1.)
    untouched = dict(kind="bound", gap_closed=None, worst_tenth=10., noise=.4)
    make = lambda shift: dict(shift=shift, main_pair=dict(shared=dict(MedShift=row, untouched=untouched), own=dict(MedShift=row, untouched=untouched)),
                              all_pairs=dict(shared=dict(means=dict(MedShift=dict(gap_closed=.25)))))
    lines = tables.joint([make(.1), make(.55)]).splitlines()
    assert "S = 0.1" in lines[0] and "S = 0.55" in lines[0] and lines[2].startswith("| untouched")
    assert lines[3].count("50% (40 to 60)") == 2 and lines[3].count("| 50% |") == 2 and lines[3].count("25%") == 2
    assert all(line.count("|") == lines[0].count("|") for line in lines)
