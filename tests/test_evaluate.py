"""The evaluation: perfect and lazy translators score as they must, settings come from validation heads, the
report and the command give the same numbers."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from networks import HOW, save_network
from PIL import Image

from minimedshift import evaluate, methods, metrics, sampler
from minimedshift.methods import Method
from minimedshift.model import Shape, UNet, load_model
from minimedshift.phantom import sets
from minimedshift.support.command import UserError

ROOT = Path(evaluate.__file__).parents[1]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return sets.phantom_set(32, 100, 8, 8, cache=tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def pair(dataset):
    s, t = methods.main_domains(dataset.domains)
    return methods.question(dataset.test_pairs, s, t, 8, "cpu")


PERFECT = Method("perfect", "ours", lambda q, _: q.second)
LAZY = Method("lazy", "learned", lambda q, _: q.x)
CURVE = Method("curve", "ceiling", lambda q, _: q.truth + .1)
ONE = Method("one", "learned", lambda q, _: q.x if (q.source, q.target) == (2, 0) else None)


def test_a_question_holds_the_pictures_of_its_pair(dataset, pair):
    assert (dataset.domains[pair.source], dataset.domains[pair.target]) == methods.MAIN
    s, t, test = pair.source, pair.target, dataset.test_pairs
    wanted = dict(x=test.images[:, s], images=test.images[:, t], truth=test.truth[:, t],
                  second=test.second[:, t], decoys=test.decoys[:, :, t])
    for name, array in wanted.items():
        torch.testing.assert_close(getattr(pair, name), torch.tensor(array).float())


def test_unpaired_images_are_a_question_without_truth(dataset):
    q = methods.question(dataset.train_images, 1, 3, 5, "cpu")
    for found, d in ((q.x, 1), (q.images, 3)):
        torch.testing.assert_close(found, torch.tensor(dataset.train_images[d][:5]).float())
    assert q.truth is None and q.second is None


def flow_net():
    """An untrained flow that says something."""
    torch.manual_seed(0)
    model = UNet(Shape(stem=4, widths=(16,), blocks=(1,), head_width=16)).eval()
    torch.nn.init.normal_(model.out.weight, std=.1)
    return model


def halve(x, s, t):
    """A student."""
    return x / 2


def test_the_default_of_the_flow_is_the_checkpoint_s_tau_and_nan_is_refused(dataset, pair):
    every = methods.every_method(dataset, flow_net(), HOW, halve)
    flow, pupil = [method for method in every if method.kind == "ours"]
    assert flow.settings[0] == HOW["tau"] and sorted(flow.settings) == sorted({*methods.TAUS, HOW["tau"]})
    assert torch.equal(methods.answer(pupil, pair)[0], pair.x / 2)
    found, _ = methods.answer(replace(flow, settings=(.2,)), pair)
    wanted = sampler.translate(flow_net(), pair.x, pair.source, pair.target, **HOW | dict(tau=.2))
    torch.testing.assert_close(found, wanted.clamp(-1, 1))
    spoilt = Method("spoilt", "learned", lambda q, _: q.x * torch.nan)
    with pytest.raises(UserError, match="spoilt translates to what is no number"):
        methods.answer(spoilt, pair)


@pytest.mark.parametrize("domains, given, pair", [
    ("abc", {}, "ac"), (("real-normal", "b"), {}, ("real-normal", "b")), ("abc", dict(target="a"), "ba"),
    (("a", *methods.MAIN), {}, methods.MAIN), (methods.MAIN, dict(source="real-normal"), methods.MAIN[::-1])])
def test_the_main_pair_is_two_domains(domains, given, pair):
    assert tuple(domains[i] for i in methods.main_domains(domains, **given)) == tuple(pair)


def test_a_perfect_translator_closes_the_gap_and_a_lazy_one_scores_as_untouched(dataset, pair):
    rows = evaluate.main_pair([*methods.every_method(dataset), LAZY, PERFECT], pair, CURVE)
    assert rows["perfect"]["gap_closed"] == pytest.approx(1)
    assert rows["second exposure"]["less_ours"] == (0, 0)  # the same pictures: no difference on any head
    for key in ("E", "structure", "noise", "same_head"):
        assert rows["lazy"][key] == rows["untouched"][key]
    assert rows["lazy"]["less_ours"][1] < 0
    assert rows["bands (Laplacian)"]["setting"] == 16


def test_the_best_setting_is_chosen_and_taken(pair):
    blend = Method("blend", "learned", lambda q, w: w * q.second + (1 - w) * q.x, (.5, 0.0, 1.0), "w")
    E_curve, E_second = evaluate.bounds(pair, CURVE)
    points, chosen = evaluate.sweep([blend, ONE], pair, CURVE)
    assert list(points) == ["blend"] and [(one.name, one.settings) for one in chosen] == [("blend", (1.0,))]
    found = {point["setting"]: point["gap_closed"] for point in points["blend"]}
    assert list(found) == [0.0, .5, 1.0]
    E = metrics.structure_mse(.5 * pair.second + .5 * pair.x, pair.truth).mean().item()
    assert found[.5] == pytest.approx(metrics.gap_closed(E, E_curve.mean().item(), E_second.mean().item()))
    assert found[1.0] == pytest.approx(1)
    rows = evaluate.score(chosen, pair, (E_curve, E_second))
    assert rows["blend"]["setting"] == 1.0 and rows["blend"]["gap_closed"] == pytest.approx(1)


def test_all_pairs_are_scored_and_a_cleaner_source_has_no_gap(dataset):
    """A method that knows one pair has no mean."""
    asked = [PERFECT, LAZY, ONE], lambda s: dataset.test_pairs, dataset.domains, CURVE, 4, "cpu"
    rows, means = evaluate.all_pairs(*asked).values()
    assert len(rows["perfect"]) == 20 and list(rows["one"]) == ["real-low -> synthetic-low"]
    assert rows["perfect"]["synthetic-low -> real-low"]["gap_closed"] == pytest.approx(1)
    assert rows["lazy"]["synthetic-high -> synthetic-low"]["gap_closed"] is None  # less noise, else the same
    mean = means["perfect"]
    assert mean["gap_closed"] == pytest.approx(1) and mean["worst_pair"] == pytest.approx(1)
    assert mean["gap_interval"] == pytest.approx([1, 1]) and mean["pairs_with_gap"] == 19
    assert mean["noise_right"] > 15 and mean["same_head"] == 1
    assert list(means) == ["perfect", "lazy"] and means["lazy"]["gap_closed"] < 0


@pytest.mark.parametrize("paired", [True, False])
def test_a_picture_has_a_column_for_each_tau_and_a_row_for_each_head(dataset, tmp_path, paired):
    two_of_target = [images[:2] if d == 3 else images for d, images in enumerate(dataset.test_images)]
    pairs, rows = (dataset.test_pairs, 3) if paired else (two_of_target, 2)
    spoilt = lambda x, s, t: x * torch.nan  # a failed training run can still be seen
    what = HOW, pairs, dataset.domains, 1, 3, "cpu"
    evaluate.picture(tmp_path / "few.png", flow_net(), None, *what, taus=(.2,), heads=3)
    evaluate.picture(tmp_path / "all.png", flow_net(), spoilt, *what, heads=3)
    few, every = (Image.open(tmp_path / f"{name}.png") for name in ("few", "all"))
    assert few.height == every.height and rows * 160 < few.height < (rows + 1) * 160
    assert every.width - few.width == 6 * 164  # TAUS and the student, less one tau


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """A folder with the checkpoint of a network that has learned nothing, and with the cache in use."""
    folder = tmp_path_factory.mktemp("net")
    save_network(folder / "checkpoint.pt", flow_net(), size=16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINIMEDSHIFT_CACHE", str(folder / "cache"))
        yield folder


def flags(network, out):
    few = "--heads 4 --heads-each 2 --valid-heads 4 --device cpu".split()
    return ["--checkpoint", str(network / "checkpoint.pt"), "--out", str(out), *few]


def read(folder):
    return json.loads((folder / "results.json").read_text()), (folder / "table.md").read_text()


@pytest.fixture(scope="module")
def ran(network):
    """The command in a process of its own: the folder it leaves, and what it prints."""
    line = [sys.executable, "-m", "minimedshift.evaluate", *flags(network, network / "evaluation")]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return network / "evaluation", done.stdout


def test_the_command_leaves_a_table_results_and_a_picture(ran):
    folder, printed = ran
    assert {path.name for path in folder.iterdir()} == {"table.md", "results.json", "pareto.png"}
    results, table = read(folder)
    assert table in printed and "S = 0.1" in table and "simulated" in table
    assert set(results["main_pair"]) == set(results["all_pairs"]) == {"shared", "own"}
    for population in ("shared", "own"):
        rows = results["main_pair"][population]
        assert {"untouched", "histogram", "curve", "second exposure", "MedShift"} <= set(rows)
        assert rows["second exposure"]["gap_closed"] == pytest.approx(1, abs=1e-6)
        assert len(rows["MedShift"]["E_heads"]) == 4 and rows["MedShift"]["kernel"] is not None
        for name in rows:
            assert name in table
    assert [point["setting"] for point in results["pareto"]["MedShift"]] == list(methods.TAUS)


def test_the_report_is_the_command_at_default_settings(network, ran, capsys):
    results, _ = read(ran[0])
    model, state = load_model(network / "checkpoint.pt")
    dataset = sets.phantom_set(16, 100, 4, 4)
    found = json.loads(json.dumps(evaluate.report(model, halve, dataset, state["translate"])))
    printed = capsys.readouterr().out
    assert found["translation"] == HOW and found["simulated"] and found["heads"] == found["heads_each"] == 4
    rows, others = found["main_pair"]["shared"], results["main_pair"]["shared"]
    assert set(rows) == {*others, methods.STUDENT}
    for name in ("untouched", "histogram", "curve", "second exposure"):  # nothing to set
        assert f"| {name}" in printed
        for key in metrics.SCORES:
            assert rows[name][key] == others[name][key], key
    means = found["all_pairs"]["shared"]["means"]
    assert list(means) == ["MedShift", methods.STUDENT] and means["MedShift"]["pairs"] == 20
    assert "all ordered pairs:\n" in printed and "| MedShift, tau 0.4 | ours |" in printed


@pytest.mark.parametrize("mistake, says", [
    ("--heads 0", "--heads 0"), ("--source mars", "--source mars"),
    ("--source real-low --target real-low", "both real-low"), ("--data /nowhere", "/nowhere"),
    ("--out there", "--out there cannot be made")])
def test_a_mistake_is_a_sentence(network, tmp_path, monkeypatch, mistake, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").write_text("kept")
    with pytest.raises(UserError, match=says) as error:
        evaluate.main([*flags(network, tmp_path), *mistake.split()])
    assert "\n" not in str(error.value) and (tmp_path / "there").read_text() == "kept"


@pytest.mark.parametrize("paired", [True, False])
def test_a_folder_is_evaluated_with_and_without_pairs(network, tmp_path, monkeypatch, paired):
    """The same rows. Without pairs only realism is known. Methods of a study can join."""
    monkeypatch.setattr(evaluate.realism, "train_features", lambda sets: lambda x: x.flatten(1)[:, :3])
    for i, domain in enumerate(sets.phantom.DOMAINS):
        for split, count, name, seed in ("train", 6, "t", i), ("test", 8, "" if paired else domain, 0):
            folder, g = tmp_path / "images" / split / domain, np.random.default_rng(seed)
            folder.mkdir(parents=True)
            for k in range(count):
                v = (g.random((32, 32)) * 100 + 20 * i).astype(np.uint8)
                Image.fromarray(v).save(folder / f"{name}{k}.png")
    # sorted, as train.py sorts folders
    save_network(tmp_path / "net.pt", flow_net(), domains=sorted(sets.phantom.DOMAINS))
    command = [*flags(network, tmp_path / "out"), "--checkpoint", str(tmp_path / "net.pt"),
               "--data", str(tmp_path / "images")]
    evaluate.main(command, extra_methods=[LAZY])
    results, table = read(tmp_path / "out")
    assert list(results["main_pair"]) == ["shared"] and "simulated" not in table
    rows = results["main_pair"]["shared"]
    assert {"untouched", "bands (Laplacian)", "real against real", "MedShift"} <= set(rows)
    assert rows["lazy"]["kernel"] == rows["untouched"]["kernel"] and "| lazy |" in table
    assert all(isinstance(row["kernel"], float) for row in rows.values())
    assert rows["MedShift"]["noise"] is None
    assert (tmp_path / "out" / "pareto.png").exists() == paired
    assert ("All ordered pairs, 2 test heads" in table) == paired
    if paired:
        assert rows["curve"]["gap_closed"] == 0
        assert results["all_pairs"]["shared"]["means"]["MedShift"]["pairs"] == 20
    else:
        assert rows["MedShift"]["structure"] is None and rows["MedShift"]["setting"] == HOW["tau"]
        assert "curve" not in rows and results["all_pairs"] == {}
