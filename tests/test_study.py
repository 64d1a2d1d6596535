"""The studies: points and measure in the plane, couplings as the literature orders them, runs that resume, and
the probe and the neighbour of the latent on clouds whose answer is known."""

from dataclasses import asdict

import numpy as np
import pytest
import torch
from PIL import Image

import train
from minimedshift import phantom, study
from minimedshift import baselines, metrics, rivals
from minimedshift.model import Shape, UNet
from minimedshift.phantom import sets
from minimedshift.support import checkpoint
from minimedshift.support.command import UserError

TINY = "--size 16 --train-images 20 --valid-heads 3 --test-heads 2 --batch-size 4 --steps 2"


@pytest.mark.parametrize("flags, says", [
    ([], "name a study"), (["mars"], "mars"), (["phantom", "--only", "x"], "--only x"),
    (["moons", "--seeds", "0"], "--seeds")])
def test_a_mistake_is_a_sentence(flags, says):
    with pytest.raises(UserError, match=says):
        study.main(flags)


# ---------------------------------------------------------------- in the plane

def test_points_lie_where_they_should():
    g = torch.Generator().manual_seed(0)
    x0 = study.eight_gaussians(8000, g)
    assert x0.norm(dim=1).mean().item() == pytest.approx(5, abs=.05) and x0.mean(0).abs().max() < .2
    y = torch.arange(8000) % 2
    x1 = (study.moons(y, g) + 1) / 3
    for label, centre, half in ((0, (0, 0), 1), (1, (1, .5), -1)):
        at = x1[y == label] - torch.tensor(centre)
        assert at.norm(dim=1).mean().item() == pytest.approx(1, abs=.05) and (half * at[:, 1]).mean() > .5


def test_distance_is_that_of_the_best_pairing():
    x = torch.randn(50, 2, generator=torch.Generator().manual_seed(0))
    assert study.distance(x, x.flip(0)) == pytest.approx(0, abs=1e-12)
    assert study.distance(x, x + torch.tensor([.3, .4])) == pytest.approx(.25)


def test_the_moons_table_has_mean_and_standard_error_over_its_seeds(tmp_path, monkeypatch, capsys):
    numbers = lambda name, seed: dict(euler_1=float(seed), adaptive=1., floor=.5)
    monkeypatch.setattr(study, "moons_run", numbers)
    study.main(["moons", "--out", str(tmp_path), "--seeds", "2"])
    table = (tmp_path / "moons.md").read_text()
    assert table in capsys.readouterr().out
    assert "| per label | 0.500 ± 0.500 | 1.000 ± 0.000 | 0.500 ± 0.000 |" in table


def test_a_short_run_in_the_plane_already_prefers_the_coupling_per_label():
    """At one Euler step, as in the long runs below. The floor is that of the samples, whatever was trained."""
    found = {name: study.moons_run(name, 0, steps=150, batch=128, n=256) for name in ("independent", "per label")}
    per_label, independent = found["per label"], found["independent"]
    assert per_label["euler_1"] < .5 * independent["euler_1"]
    assert per_label["floor"] == independent["floor"] < .5 * per_label["euler_1"]
    assert study.moons_run("label-blind", 1, 1, 16, 64) == study.moons_run("label-blind", 1, 1, 16, 64)


@pytest.mark.slow
def test_couplings_in_the_plane_are_ordered_as_the_literature_says():
    """8gaussians to moons (arXiv:2503.10636, figure 2): at one Euler step the coupling per label is far ahead of
    both others; with the adaptive solver the label-blind one is worse than none. Intervals of two standard errors
    over three seeds do not touch. (There, label-blind is better than independent at one step; here it is worse.)"""
    found = {name: [study.moons_run(name, seed, steps=2000) for seed in range(3)] for name in study.MOONS}

    def interval(name, key):
        values = [r[key] for r in found[name]]
        two_errors = 2 * np.std(values, ddof=1) / 3**.5
        return np.mean(values) - two_errors, np.mean(values) + two_errors

    others = min(interval(name, "euler_1")[0] for name in ("label-blind", "independent"))
    assert 3 * interval("per label", "euler_1")[1] < others
    kept = max(interval(name, "adaptive")[1] for name in ("per label", "independent"))
    assert 3 * kept < interval("label-blind", "adaptive")[0]
    assert all(r["floor"] < .06 for r in found["independent"])


# ---------------------------------------------------------------- simulated heads

def test_a_phantom_table_has_a_row_a_run_and_what_is_done_is_not_done_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MINIMEDSHIFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(study, "PHANTOM", {
        "exact, sigma .1": f"--coupling exact --sigma 0.1 {TINY}",
        "image to image": f"--coupling exact --x0 image {TINY}"})
    flags = ["phantom", "--out", str(tmp_path)]
    study.main(flags)
    table = (tmp_path / "phantom" / "table.md").read_text()
    assert "| exact, sigma .1 | 0.000 |" in table and "| image to image | 0.000 |" in table
    assert (tmp_path / "phantom" / "exact, sigma .1" / "seed-1" / "report.json").exists()
    monkeypatch.setattr(study.subprocess, "run", None)
    study.main([*flags, "--only", "image to image"])
    assert len((tmp_path / "phantom" / "table.md").read_text().splitlines()) == 3


def test_a_run_with_a_wrong_flag_ends_the_study(tmp_path):
    with pytest.raises(UserError, match="--sigma -1"):
        study.train("--sigma -1", tmp_path)


def test_rivals_leaves_what_the_evaluation_reads(tmp_path, monkeypatch):
    monkeypatch.setenv("MINIMEDSHIFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(study, "RIVALS", {"medshift": TINY, "sdedit": f"{study.RIVALS['sdedit']} {TINY}"})
    monkeypatch.setattr(study.rivals, "steps_within", lambda seconds, learn: 2)
    asked = []
    monkeypatch.setattr(study.evaluate, "main", asked.append)
    study.study_rivals(study.Config(out=str(tmp_path), shift=.55), heads=4)
    folder, (line,) = tmp_path / "rivals-0.55", asked
    assert line[line.index("--rivals") + 1] == str(folder)
    main = study.methods.MAIN
    for name, pair in (("adversarial", main), ("adversarial-back", main[::-1]), ("supervised", main)):
        translate, found = rivals.load(folder / f"{name}.pt")
        assert found == pair and translate(torch.zeros(2, 1, 16, 16)).shape == (2, 1, 16, 16)
    for name in study.RIVALS:
        assert checkpoint.load(folder / name / "checkpoint.pt")["config"]["shift"] == .55


# ---------------------------------------------------------------- bands

def test_bands_are_chosen_on_validation_heads_and_scored_beside_the_student(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MINIMEDSHIFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(study, "MANY", (2, 10**6))
    monkeypatch.setattr(study, "ROUNDS", (1, 2))
    flags = [*TINY.split(), "--student-images", "2", "--student-steps", "1", "--no-evaluate", "--device", "cpu"]
    assert train.main([*flags, "--train-images", "50", "--out", str(tmp_path)]) == 0
    study.main(["bands", "--checkpoint", str(tmp_path / "checkpoint.pt"), "--out", str(tmp_path)])
    said, table = capsys.readouterr().out, (tmp_path / "bands.md").read_text()
    for name in ("as they are", "balanced"):
        assert all(f"{name}, {count} images: structure" in said for count in (2, 10))
    assert said.count("MedShift's student: structure") == 2
    head, _, plain, balanced = [line.strip("| \n").split(" | ") for line in table.splitlines()]
    assert plain[0].startswith("as they are") and balanced[0].startswith("balanced")
    dataset = sets.phantom_set(16, 50, 3, 2, 0, .1)
    s, t = study.methods.main_domains(dataset.domains)
    curve = baselines.PAIRED["curve"](dataset.valid_pairs.images[:, s], dataset.valid_pairs.truth[:, t])
    rounds, images = int(float(plain[head.index("rounds")])), int(plain[0].split()[3])
    bands = baselines.UNPAIRED["bands (Laplacian)"](dataset.train_images[s], dataset.train_images[t], rounds, images)
    for part, pairs in (("validation", dataset.valid_pairs), ("test", dataset.test_pairs)):
        q = study.methods.question(pairs, s, t, 9, "cpu")
        errors = [metrics.structure_mse(x.clamp(-1, 1), q.truth).mean() for x in (bands(q.x), curve(q.x), q.second)]
        assert float(plain[head.index(part)]) == pytest.approx(float(metrics.gap_closed(*errors)), abs=6e-4)


def test_a_folder_that_cannot_be_made_is_told_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(study.sets, "paired_heads", None)
    (tmp_path / "file").write_text("")
    flags = "--checkpoint", save_checkpoint(tmp_path / "net.pt"), "--out", str(tmp_path / "file" / "x")
    with pytest.raises(UserError, match="cannot be made"):
        study.main(["latent", *flags])


def test_bands_need_a_student(tmp_path):
    with pytest.raises(UserError, match="needs a student"):
        study.main(["bands", "--checkpoint", save_checkpoint(tmp_path / "checkpoint.pt")])


# ---------------------------------------------------------------- the latent

def cloud(heads, domains, noise, N=40, D=4, F=200):
    """z = heads * (its own vector) + domains * (its domain's vector) + noise, each of unit variance."""
    draw = torch.Generator().manual_seed(0)
    person, domain, rest = (torch.randn(*shape, F, generator=draw) for shape in ((N, 1), (1, D), (N, D)))
    return (heads * person + domains * domain + noise * rest).double()


def test_a_shared_latent_hides_the_domain_and_keeps_the_head():
    shared = cloud(heads=1, domains=0, noise=0.1)
    assert study.probe(shared) == pytest.approx(1 / 4, abs=0.12) and study.same_head(shared) == 1


def test_a_latent_of_domains_and_one_that_has_forgotten_all_are_told_apart():
    apart, forgotten = cloud(heads=1, domains=1, noise=0.1), cloud(heads=0, domains=0, noise=1)
    assert study.probe(apart) == 1
    assert study.probe(forgotten) == pytest.approx(1 / 4, abs=0.12) and study.same_head(forgotten) < 0.12


def test_domains_that_differ_in_the_power_of_their_noise_alone_are_told_apart():
    z = torch.randn(40, 2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    z[:, 1] *= 1.3
    assert study.probe(z.flatten(2).double()) < 0.7 and study.probe(study.features(z)) > 0.95


def save_checkpoint(path, **config):
    model = UNet(Shape(stem=4, widths=(16,), blocks=(1,), head=16))
    config = dict(data=None, train_images=5, valid_heads=4, test_heads=4, shift=.1, seed=0, coupling="exact",
                  sigma=0.0) | config
    how = dict(tau=0.4, guidance=1.0, steps=1, solver="euler", end=0.97, colour=1.0, x0="noise")
    image, weights = dict(size=16, channels=1, range=[-1.0, 1.0]), model.state_dict()
    domains = list(phantom.DOMAINS)
    checkpoint.save(path, dict(config=config, shape=asdict(model.shape), domains=domains, step=3, image=image,
                               translate=how, model=weights, ema=weights,
                               machine=dict(dtype="float32", memory_format="channels_last")))
    return str(path)


def test_the_latent_leaves_one_figure(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MINIMEDSHIFT_CACHE", str(tmp_path / "cache"))
    net = save_checkpoint(tmp_path / "checkpoint.pt")
    study.main(["latent", "--checkpoint", net, "--out", str(tmp_path / "study")])
    out = capsys.readouterr().out
    assert out.count("domain told") == 11 and "tau 1.0" in out
    assert Image.open(tmp_path / "study" / "latent.png").width > 400


def test_what_has_no_latent_is_told_before_any_work(tmp_path):
    net = save_checkpoint(tmp_path / "checkpoint.pt", data="photos")
    with pytest.raises(UserError, match="simulated"):
        study.main(["latent", "--checkpoint", net])
