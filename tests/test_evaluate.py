"""The evaluation: perfect and lazy translators score as they must, settings come from validation heads, and the
command leaves its files."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from disk import full_disk
from networks import HOW, save_network
from PIL import Image

from minimedshift import data, evaluate, sampler
from minimedshift import methods, metrics, rivals
from minimedshift.phantom import sets
from minimedshift.support.command import UserError
from minimedshift.support.machine import to_float
from minimedshift.methods import Method
from minimedshift.model import Shape, UNet

ROOT = Path(evaluate.__file__).parents[1]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    return sets.phantom_set(32, 100, 8, 8, cache=cache, progress=False)


@pytest.fixture(scope="module")
def pair(dataset):
    s, t = methods.main_domains(dataset.domains)
    return methods.question(dataset.test_pairs, s, t, 8, "cpu")


PERFECT = Method("perfect", "ours", lambda q, _: q.second)
LAZY = Method("lazy", "learned", lambda q, _: q.x)
CURVE = Method("curve", "ceiling", lambda q, _: q.truth + .1)


# ---------------------------------------------------------------- questions and methods

def test_a_question_holds_the_pictures_of_its_pair(dataset, pair):
    assert (dataset.domains[pair.source], dataset.domains[pair.target]) == methods.MAIN
    s, t = pair.source, pair.target
    test = dataset.test_pairs
    wanted = dict(x=test.images[:, s], images=test.images[:, t], truth=test.truth[:, t], second=test.second[:, t],
                  decoys=test.decoys[:, :, t], materials=test.materials)
    for name, array in wanted.items():
        torch.testing.assert_close(getattr(pair, name), torch.tensor(array).float())


def test_the_flow_gives_each_pair_what_the_sampler_gives_it(dataset):
    """The kept way back must not leak from one source or one tau into the next."""
    torch.manual_seed(0)
    model = UNet(Shape(stem=4, widths=(16,), blocks=(1,), head=16)).eval()
    torch.nn.init.normal_(model.out.weight, std=.1)
    method = Method("MedShift", "ours", methods.flow(model, HOW))
    how = {key: HOW[key] for key in ("guidance", "steps", "solver", "end", "colour")}
    for s in (0, 1):
        x = to_float(dataset.test_pairs.images[:3, s], "cpu")
        for t in (2, 3):
            for tau in (.2, .5):
                q = methods.question(dataset.test_pairs, s, t, 3, "cpu", x)
                expected = sampler.translate(model, x, s, t, tau, **how)
                torch.testing.assert_close(methods.answer(method, q, tau)[0], expected.clamp(-1, 1))


def flow_file(path, x0="noise"):
    """A checkpoint of an untrained flow that says something, and its network."""
    model = UNet(Shape(25 if x0 == "image" else 5, stem=4, widths=(16,), blocks=(1,), head=16)).eval()
    torch.nn.init.normal_(model.out.weight, std=.1)
    save_network(path, model, translate=HOW | dict(x0=x0))
    return model


def test_a_folder_of_rivals_is_read_and_each_answers_as_it_was_trained(dataset, pair, tmp_path):
    torch.manual_seed(0)
    own = flow_file(tmp_path / "checkpoint.pt")
    with pytest.raises(UserError, match="no rival is there"):
        methods.every_method(dataset, own, HOW, folder=tmp_path)
    noisy = flow_file(tmp_path / "sdedit" / "checkpoint.pt")
    direct = flow_file(tmp_path / "bridge" / "checkpoint.pt", "image")
    forth, back = (rivals.Generator(width=16, blocks=1).eval() for _ in range(2))
    seen, names = flow_file(tmp_path / "checkpoint.pt"), [dataset.domains[i] for i in (pair.source, pair.target)]
    rivals.save(tmp_path / "adversarial.pt", forth, names)
    rivals.save(tmp_path / "adversarial-back.pt", back, names[::-1])
    rivals.save(tmp_path / "supervised.pt", seen, names, pair.target)
    found = {method.name: method for method in methods.every_method(dataset, own, HOW, folder=tmp_path)}
    x, s, t = pair.x, pair.source, pair.target
    with torch.inference_mode():
        wanted = {
            "SDEdit": rivals.sdedit(noisy, x, t, .5, steps=20, end=HOW["end"], colour=HOW["colour"]),
            "image to image": sampler.translate(direct, x, s, t, **HOW | dict(x0="image")),
            "CycleGAN": forth(x),
            "supervised": rivals.regress(seen, x, t),
        }
    for name, out in wanted.items():
        answer, _ = methods.answer(found[name], pair, .5)
        torch.testing.assert_close(answer, out.clamp(-1, 1), atol=1e-5, rtol=1e-4)
    turned = methods.question(dataset.test_pairs, t, s, 8, "cpu")
    assert torch.equal(methods.answer(found["CycleGAN"], turned)[0], back(turned.x).clamp(-1, 1))
    assert methods.answer(found["supervised"], turned) == (None, 0.0)
    asked = [found["supervised"], LAZY]  # who does not know a pair is left out
    rows, _ = evaluate.main_pair(asked, {}, turned, CURVE)
    points = evaluate.sweep(asked, [turned], CURVE)
    assert set(rows) == set(points) == {"lazy"}


@pytest.mark.parametrize("domains, given, pair", [
    ("abc", {}, "ac"), (("real-normal", "b"), {}, ("real-normal", "b")), ("abc", dict(target="a"), "ba"),
    (("a", *methods.MAIN), {}, methods.MAIN), (methods.MAIN, dict(source="real-normal"), methods.MAIN[::-1])])
def test_the_main_pair_is_two_domains(domains, given, pair):
    assert tuple(domains[i] for i in methods.main_domains(domains, **given)) == tuple(pair)


# ---------------------------------------------------------------- scores

def test_a_perfect_translator_closes_the_gap_and_a_lazy_one_scores_as_untouched(dataset, pair):
    asked = [*methods.every_method(dataset), LAZY, PERFECT]
    curve = next(method for method in asked if method.name == "curve")
    chosen = {method.name: method.settings[0] for method in asked}
    rows, pictures = evaluate.main_pair(asked, chosen, pair, curve)
    assert rows["perfect"]["gap_closed"] == pytest.approx(1) and rows["curve"]["gap_closed"] == 0
    low, high = rows["second exposure"]["less_ours"]
    assert low == high == 0  # the same pictures: no difference on any head
    for key in ("E", "structure", "noise", "same_head"):
        assert rows["lazy"][key] == rows["untouched"][key]
    assert rows["lazy"]["less_ours"][1] < 0
    assert torch.equal(pictures["lazy"], pair.x)


def test_the_best_setting_is_chosen(pair):
    blend = Method("blend", "learned", lambda q, w: w * q.second + (1 - w) * q.x, (0.0, .5, 1.0), "w")
    limits = evaluate.bounds(CURVE, pair)
    points = evaluate.sweep([blend], [pair], CURVE)["blend"]
    found = {point["setting"]: point["gap_closed"] for point in points}
    assert list(found) == [0.0, .5, 1.0] and evaluate.best(points) == 1.0 and found[1.0] == pytest.approx(1)
    E = metrics.structure_mse(.5 * pair.second + .5 * pair.x, pair.truth).mean().item()
    assert found[.5] == pytest.approx(metrics.gap_closed(E, limits[0].mean().item(), limits[1].mean().item()))


def test_a_student_is_asked_and_others_are_compared_with_it(dataset, pair):
    told = []

    class Told:
        def __call__(self, x, s, t):
            told.append((len(x), s, t))
            return x / 2

    pupil = methods.every_method(dataset, translator=Told())[-1]
    x, _ = methods.answer(pupil, pair, None)
    assert torch.equal(x, pair.x / 2) and told == [(len(pair.x), pair.source, pair.target)]
    rows = {"curve": dict(kind="ceiling"), "MedShift": dict(kind="ours"), pupil.name: dict(kind=pupil.kind)}
    assert evaluate.ours(rows) == pupil.name
    rows.pop(pupil.name)
    assert evaluate.ours(rows) == "MedShift" and evaluate.ours(dict(curve=rows["curve"])) is None


def test_all_pairs_are_scored_and_a_cleaner_source_has_no_gap(dataset):
    test = lambda s: dataset.test_pairs
    rows, means = evaluate.all_pairs([PERFECT, LAZY], {}, test, dataset.domains, CURVE, 4, "cpu")
    assert len(rows["perfect"]) == 20
    assert rows["perfect"]["synthetic-low -> real-low"]["gap_closed"] == pytest.approx(1)
    assert rows["lazy"]["synthetic-high -> synthetic-low"]["gap_closed"] is None  # less noise, else the same
    mean = means["perfect"]
    assert mean["gap_closed"] == pytest.approx(1) and mean["worst_pair"] == pytest.approx(1)
    assert mean["pairs_with_gap"] == 19
    assert mean["gap_interval"] == pytest.approx([1, 1]) and mean["noise_right"] > 15 and mean["same_head"] == 1
    assert means["lazy"]["gap_closed"] < 0


def test_a_method_that_knows_one_pair_is_left_out_of_the_means(dataset):
    one = Method("one", "learned", lambda q, _: q.x if (q.source, q.target) == (1, 3) else None)
    test = lambda s: dataset.test_pairs
    rows, means = evaluate.all_pairs([one, LAZY], {}, test, dataset.domains, CURVE, 2, "cpu")
    assert list(rows["one"]) == ["synthetic-high -> real-normal"] and list(means) == ["lazy"]


# ---------------------------------------------------------------- the command

@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """A checkpoint of a network that has learned nothing, and its cache."""
    folder = tmp_path_factory.mktemp("net")
    torch.manual_seed(0)
    model = UNet(Shape(stem=4, widths=(16,), blocks=(1,), head=16))
    torch.nn.init.normal_(model.out.weight, std=.1)
    config = dict(data=None, domains="", train_images=100, valid_heads=4, test_heads=4, seed=0, shift=.55,
                  coupling="independent", sigma=0.0, colour=1.0)
    save_network(folder / "checkpoint.pt", model, config=config)
    return folder


def command(network, *flags):
    env = {**os.environ, "MINIMEDSHIFT_CACHE": str(network / "cache")}
    line = [sys.executable, "-m", "minimedshift.evaluate", "--checkpoint", str(network / "checkpoint.pt"), *flags]
    return subprocess.run(line, env=env, cwd=ROOT, capture_output=True, text=True, timeout=600)


def test_the_command_leaves_a_table_results_and_pictures(network, tmp_path):
    features = tmp_path / "features.py"
    features.write_text("def features(x):\n    return x.mean((1, 2, 3))[:, None] * x.new_tensor([[1.0, 2.0, -1.0]])\n")
    done = command(network, "--heads", "4", "--heads-each", "2", "--valid-heads", "4", "--features", str(features),
                   "--out", str(tmp_path / "out"))
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert left == {"table.md", "results.json", "pareto.png", "heads.png"}
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    table = (tmp_path / "out" / "table.md").read_text()
    assert table in done.stdout and results["shift"] == .55 and "S = 0.55" in table and "simulated" in table
    assert set(results["main_pair"]) == set(results["all_pairs"]) == {"shared", "own"}
    for population in ("shared", "own"):
        rows = results["main_pair"][population]
        assert {"untouched", "histogram", "curve", "second exposure", "MedShift", "DDIB"} <= set(rows)
        assert rows["second exposure"]["gap_closed"] == pytest.approx(1, abs=1e-6)
        assert len(rows["MedShift"]["E_heads"]) == 4
        for name in rows:
            assert name in table
    assert [point["setting"] for point in results["pareto"]["MedShift"]] == [.1, .2, .3, .4, .5, .6]
    assert [point["setting"] for point in results["settings_all_pairs"]["MedShift"]] == [.1, .2, .3, .4, .5, .6]
    assert Image.open(tmp_path / "out" / "heads.png").width > 3 * 256


@pytest.mark.parametrize("flags, says", [
    (["--heads", "0"], "--heads 0"), (["--source", "mars"], "--source mars"), (["--rivals", "/nowhere"], "--rivals"),
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
        evaluate.main(["--checkpoint", str(network / "checkpoint.pt"), "--heads", "4", "--valid-heads", "4",
                       "--out", str(tmp_path / "there")])
    assert (tmp_path / "there").read_text() == "kept"


def test_a_full_disk_is_a_sentence_and_the_old_results_stay(network, tmp_path, monkeypatch):
    monkeypatch.setenv("MINIMEDSHIFT_CACHE", str(network / "cache"))
    (tmp_path / "results.json").write_text("old")
    features = tmp_path / "features.py"
    features.write_text("def features(x):\n    return x.flatten(1)[:, :3]\n")
    command = ["--checkpoint", str(network / "checkpoint.pt"), "--heads", "4", "--heads-each", "2",
               "--valid-heads", "4", "--features", str(features), "--out"]
    evaluate.main([*command, str(tmp_path / "first")])  # this one fills the cache
    monkeypatch.setattr(evaluate, "with_truth", lambda *_: (dict(main_pair=dict(shared="x" * 2000)), None))
    monkeypatch.setattr(evaluate.tables, "pareto", lambda *_: None)
    monkeypatch.setattr(evaluate, "heads_picture", lambda *_: None)
    with full_disk(1000), pytest.raises(UserError, match=r"results\.json cannot be written \("):
        evaluate.main([*command, str(tmp_path)])
    left = {path.name for path in tmp_path.iterdir()}
    assert (tmp_path / "results.json").read_text() == "old" and left == {"first", "features.py", "results.json"}


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
    assert found.valid_pairs.images.shape == (5, 2, 1, 32, 32) and found.test_pairs.images.shape == (4, 2, 1, 32, 32)
    lighter = found.test_pairs.images[:, 1] - found.test_pairs.images[:, 0]  # the same random picture, 100 grey levels brighter
    np.testing.assert_allclose(lighter, 100 / 127.5, atol=2e-3)
    assert found.test_pairs.truth is None and methods.question(found.test_pairs, 0, 1, 4, "cpu").second is None
    (tmp_path / "test" / "a" / "head3.png").unlink()
    (tmp_path / "test" / "a" / "head4.png").unlink()
    again = data.folder_set(tmp_path, 32, cache=tmp_path / "cache", progress=False)
    assert again.test_pairs is None and again.valid_pairs is None and len(again.test_images[0]) == 8


@pytest.mark.parametrize("paired", [True, False])
def test_a_folder_is_evaluated_with_and_without_pairs(network, tmp_path, paired):
    for i, domain in enumerate(sets.phantom.DOMAINS):
        write(tmp_path / "images" / "train" / domain, [f"t{k}" for k in range(6)], 20 * i, seed=i)
        write(tmp_path / "images" / "test" / domain, [f"{'' if paired else domain}{k}" for k in range(8)], 20 * i)
    (tmp_path / "features.py").write_text("def features(x):\n    return x.flatten(1)[:, :3]\n")
    done = command(network, "--data", str(tmp_path / "images"), "--features", str(tmp_path / "features.py"),
                   "--out", str(tmp_path / "out"))
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    table = (tmp_path / "out" / "table.md").read_text()
    if paired:
        rows = results["main_pair"]["shared"]
        assert list(results["main_pair"]) == ["shared"]
        assert rows["curve"]["gap_closed"] == 0 and rows["MedShift"]["noise"] is None
        assert "simulated" not in table and "paired by file name" in table
        assert "Only 4 pairs" in table and "edge width" not in table
    else:
        assert "real against real" in results["unpaired"] and "MedShift, tau 0.3" in results["unpaired"]
    assert "MedShift" in table and "kernel" in table
