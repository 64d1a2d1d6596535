"""The bench: what it prints and keeps, and the share of a training step that couplings may take."""

import json
import subprocess
import sys
from dataclasses import replace
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch

from minimedshift import bench
from minimedshift.model import Shape
from minimedshift.support.command import run
from minimedshift.presets import PRESETS

ROOT = Path(bench.__file__).parents[1]


def bench_of(folder, *flags):
    """bench.json and what was printed, of a bench in a process of its own."""
    line = [sys.executable, "-m", "minimedshift.bench", "--device", "cpu", "--out", str(folder), *flags]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "bench.json").read_text()), done.stdout


def test_a_mistake_ends_in_one_sentence(capsys):
    with pytest.raises(SystemExit) as end:
        run(lambda: bench.main(["--only", "poetry"]))
    errors = capsys.readouterr().err
    assert end.value.code == 2 and "--only" in errors and "poetry" in errors and errors.count("\n") == 1


def test_the_clock_takes_turns_and_leaves_the_first_two_rounds_out(monkeypatch):
    ticks, calls = count(), []
    monkeypatch.setattr(bench.time, "perf_counter", lambda: next(ticks) ** 2 / 1e3)  # each interval is longer
    functions = [lambda: calls.append("a"), lambda: calls.append("b")]
    ms = bench.clock(functions, 2, torch.device("cpu"))
    assert calls == ["a", "b"] * 4
    np.testing.assert_allclose(ms, [[17, 25], [21, 29]])


def test_a_ratio_is_that_of_the_turns():
    row = bench.entry(np.array([1., 2., 4.]), np.array([3., 2., 6.]))
    assert row == dict(ms=2, fastest_ms=1, slowest_ms=4, ratio=1.5, ratio_low=1, ratio_high=3)


def test_both_sides_of_a_comparison_compute_the_same(monkeypatch):
    """In float32 the reference differs in speed alone: the same gradients and translation, to rounding."""
    monkeypatch.setattr(bench, "pick_formats", lambda *_: (torch.float32, torch.channels_last))
    sides = [bench.Side(torch.device("cpu"), plain) for plain in (False, True)]
    results = []
    for side in sides:
        with torch.no_grad():
            for p in side.model.parameters():
                p.add_(.02)  # nothing is left at zero
        translation = side.translation()
        side.step()
        results.append([translation] + [p.grad for p in side.model.parameters()])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3 * b.abs().max().item())


def test_the_bench_counts_a_plan_for_every_step_it_serves(tmp_path, monkeypatch, capsys):
    """Everything is done once, and counted as 8 ms: a plan for 8 steps takes a ninth of a step, one for 16 a
    seventeenth."""
    done = []

    def clock(functions, repeats, device):
        done.extend(function() for function in functions)
        return np.full((len(functions), repeats), 8.0)

    tiny = replace(PRESETS["cpu"], size=16, shape=Shape(widths=(32,), blocks=(1,)))
    monkeypatch.setattr(bench, "PRESETS", dict(cpu=tiny))
    monkeypatch.setattr(bench, "clock", clock)
    flags = ["--quick", "--device", "cpu", "--out", str(tmp_path)]
    bench.main([*flags, "--only", "couplings"])
    found = json.loads((tmp_path / "bench.json").read_text())["couplings"]
    assert len(done) == 6 and found["exact"]["ms"] == 1 and found["semidiscrete"]["ms"] == .5
    assert found["sinkhorn"]["of_a_step"] == pytest.approx(1 / 9)
    assert found["semidiscrete"]["of_a_step"] == pytest.approx(1 / 17)
    told = capsys.readouterr().out
    assert "couplings, training step: ms 8, fastest_ms 8, slowest_ms 8\n" in told and "of_a_step 0.1111" in told
    bench.main([*flags, "--only", "steps"])
    found = json.loads((tmp_path / "bench.json").read_text())
    assert len(done) == 10 and found["steps"]["translation"]["ratio"] == 1 and "couplings" not in found


@pytest.mark.slow
def test_a_quick_bench_measures_every_part(tmp_path):
    found, told = bench_of(tmp_path, "--quick")
    assert set(bench.PARTS) <= set(found) and found["steps"]["step"]["ratio"] > 1
    assert found["machine"] in told and "ops, row_lse: ms " in told


@pytest.mark.slow
def test_every_coupling_takes_under_two_percent_of_a_training_step(tmp_path):
    """Of a float32 step, as the plans are made in float32; the default one also of a step in bfloat16, where
    that is what this CPU trains in."""
    found, told = bench_of(tmp_path, "--only", "couplings")
    assert "of_a_step" in told
    found = found["couplings"]
    fastest = lambda name: found[name]["fastest_ms"]  # of both: what else runs here is not what is tested
    step, plain = fastest("training step"), fastest("training step, float32")
    assert fastest("semidiscrete") / (fastest("semidiscrete") + step) < .02, found
    for name in ("independent", "sinkhorn", "exact"):
        assert fastest(name) / (fastest(name) + plain) < .02, found
