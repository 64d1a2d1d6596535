"""A few of the kills of `python tests/kill.py`, and that its checks see what is lost."""

import os
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import kill
from minimedshift.support import checkpoint, files
from minimedshift.support.log import Log


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs groups of processes")
def test_a_killed_run_goes_on_to_the_same_end():
    assert kill.main(kills=4, phases=("simulating", "training", "student", "translating")) == 0


def run_in(folder, weight=1.0, seconds=1.0):
    """A folder as a run leaves it."""
    for name in ("out", "translated"):
        (folder / name).mkdir(parents=True)
    checkpoint.save(folder / "out" / "checkpoint.pt", {key: [torch.tensor(weight)] for key in kill.WEIGHTS})
    row = ",".join(["1"] * (len(Log.COLUMNS) - 1))
    (folder / "out" / "log.csv").write_text("\n".join([",".join(Log.COLUMNS), f"{row},{seconds}", ""]))
    for name in ("out/loss.png", "out/samples.png", "out/translations.png", "translated/a.png"):
        Image.fromarray(np.full((9, 9), 7, np.uint8)).save(folder / name)
    files.write_json(folder / "out" / "report.json", dict(pairs=[dict(psnr=1, seconds=seconds)], command=f"{seconds}"))
    files.cached(folder / "cache", "x", [1], lambda work: np.save(work / "a.npy", np.arange(9)))
    return folder


def test_the_same_end_at_another_time_is_the_same(tmp_path):
    a, b = run_in(tmp_path / "a"), run_in(tmp_path / "b", seconds=2.0)
    kill.check_whole(a)
    kill.check_same(a, b, "translating")
    with pytest.raises(AssertionError, match="model is another"):
        kill.check_same(a, run_in(tmp_path / "c", weight=2.0), "training")


@pytest.mark.parametrize("name", ["out/checkpoint.pt", "out/report.json", "out/samples.png", "translated/a.png",
                                  "cache"])
def test_a_half_file_is_seen(tmp_path, name):
    path = run_in(tmp_path) / name
    path = next(path.rglob("*.npy")) if path.is_dir() else path
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(Exception):
        kill.check_whole(tmp_path)


@pytest.mark.parametrize("name, text", [
    ("out/log.csv", "step\n1\n"), ("out/report.json", "{}"), ("out/.minimedshift-1-log.csv", ""), ("out/.lock", ""),
    ("translated/a.png", ""), ("translated/.minimedshift-1-a.png", ""), ("cache/.minimedshift-1/a", "")])
def test_another_end_or_anything_left_is_seen(tmp_path, name, text):
    a, b = run_in(tmp_path / "a"), run_in(tmp_path / "b")
    (a / name).parent.mkdir(exist_ok=True)
    (a / name).write_text(text)
    with pytest.raises(AssertionError):
        kill.check_same(a, b, "translating")
