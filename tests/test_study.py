"""The studies: their points, their measure, their resuming, and the ordering of couplings that the literature reports."""

import json

import numpy as np
import pytest
import torch

import train
from minimedshift import study
from minimedshift.support.command import UserError


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


def test_a_run_that_has_its_result_is_not_run_again(tmp_path, monkeypatch, capsys):
    made = []
    monkeypatch.setattr(study, "moons_run", lambda name, seed, steps: made.append((name, seed)) or
                        dict(name=name, seed=seed, euler_1=float(seed), adaptive=1., floor=0.))
    flags = ["moons", "--out", str(tmp_path), "--steps", "3"]
    assert study.main([*flags, "--only", "per label; independent"]) == 0
    assert study.main([*flags, "--seeds", "2"]) == 0
    assert sorted(made) == sorted((name, seed) for name in study.MOONS for seed in (0, 1))
    table = (tmp_path / "moons" / "table.md").read_text()
    assert table in capsys.readouterr().out and "| per label | 2 | 0.500 ± 0.500 |" in table


def test_a_phantom_table_has_a_row_a_run_with_the_range_over_its_seeds():
    row = dict(name="exact", entropy=0., cost=.96, same_head=.99, mean_gap_closed=.3, evaluations=16, straightness=.03)
    pair = lambda closed: {tau: dict(gap_closed=closed, noise=.7) for tau in ("0.1", "0.4")}
    lines = study.phantom_table([dict(row, pair=pair(.5)), dict(row, pair=pair(.7), evaluations=None)])
    assert len(lines) == 3 and "| exact | 2 | 0.00 | 0.960 | 60% (50% to 70%) |" in lines[2] and "| 16 |" in lines[2]


@pytest.mark.parametrize("flags, says", [([], "name a study"), (["mars"], "mars"), (["student", "--only", "x"], "--only x"), (["moons", "--only", "x"], "--only x"), (["moons", "--seeds", "0"], "--seeds")])
def test_a_mistake_is_a_sentence(flags, says):
    with pytest.raises(UserError, match=says):
        study.main(flags)


def test_students_of_a_trained_flow_are_compared_and_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("MINIMEDSHIFT_CACHE", str(tmp_path / "cache"))
    assert train.main(["--size", "16", "--train-images", "20", "--valid-heads", "3", "--test-heads", "2", "--batch-size", "4", "--steps", "2",
                       "--student-images", "2", "--student-steps", "2", "--no-evaluate", "--out", str(tmp_path)]) == 0
    line = ["student", "--checkpoint", str(tmp_path / "checkpoint.pt"), "--out", str(tmp_path)]
    assert study.main([*line, "--only", "as it is; main pair alone"]) == 0
    rows = json.loads((tmp_path / "student" / "rows.json").read_text())
    assert set(rows) == {"the teacher", "as it is", "as it is, finished", "main pair alone", "main pair alone, finished"}
    assert rows["as it is"]["view"] == 28 and "all_pairs" in rows["as it is"] and "all_pairs" not in rows["main pair alone"]
    assert 1 / 3 <= rows["the teacher"]["tenth"] <= 1 and (tmp_path / "student" / "heads.png").exists()
    assert "| as it is, finished |" in (tmp_path / "student" / "table.md").read_text()
    monkeypatch.setattr(study.student, "learn", None)  # what has its row is not learned again
    assert study.main([*line, "--only", "as it is"]) == 0


def test_a_straight_flow_has_no_bend_and_needs_one_step():
    """v constant: every solver is exact at once; v turning with t is not straight."""
    from types import SimpleNamespace
    dataset = SimpleNamespace(channels=1, size=8, domains=study.evaluate.MAIN, valid=SimpleNamespace(images=np.zeros((2, 2, 1, 8, 8), np.float16)))
    how = dict(guidance=1., steps=5, solver="heun", end=.97, colour=0., x0="noise")
    straight = lambda x, t, y: torch.ones_like(x) * (1 + y.view(-1, 1, 1, 1))
    turning = lambda x, t, y: torch.cos(6 * t).view(-1, 1, 1, 1) * torch.ones_like(x) * (1 + y.view(-1, 1, 1, 1))
    straight.shape = turning.shape = SimpleNamespace(num_domains=2, score=0.)
    assert study.straightness(straight, how, dataset) == pytest.approx(0, abs=1e-6) and study.straightness(turning, how, dataset) > .5
    assert study.evaluations_needed(straight, dataset, how) == 4 < study.evaluations_needed(turning, dataset, how)


@pytest.mark.slow
def test_couplings_in_the_plane_are_ordered_as_the_literature_says():
    """8gaussians to moons (arXiv:2503.10636, figure 2): at one Euler step the coupling per label is far ahead of both others; with the adaptive
    solver the label-blind one is worse than none. Intervals of two standard errors over three seeds do not touch. (There, label-blind is
    better than independent at one step; here it is worse.)"""
    found = {name: [study.moons_run(name, seed, steps=2000) for seed in range(3)] for name in study.MOONS}

    def interval(name, key):
        values = [r[key] for r in found[name]]
        return np.mean(values) - 2 * np.std(values, ddof=1) / 3**.5, np.mean(values) + 2 * np.std(values, ddof=1) / 3**.5

    assert 3 * interval("per label", "euler_1")[1] < min(interval(name, "euler_1")[0] for name in ("label-blind", "independent"))
    assert 3 * max(interval(name, "adaptive")[1] for name in ("per label", "independent")) < interval("label-blind", "adaptive")[0]
    assert all(r["floor"] < .06 for r in found["independent"])
