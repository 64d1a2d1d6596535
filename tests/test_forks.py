"""The diffs of the README's section "Fork it" apply to the code as it is today, and what they add runs."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from minimedshift.support import checkpoint

ROOT = Path(__file__).parents[1]
FORKS = ROOT / "tests" / "forks"
NAMES = sorted(path.stem for path in FORKS.glob("*.diff"))
TINY = ("--steps 2 --batch-size 4 --train-images 30 --valid-heads 3 --test-heads 3 --student-images 2 "
        "--student-steps 2 --solver-steps 1 --dtype float32 --device cpu --no-evaluate --out out").split()


def fork(folder, name):
    """A copy of the code with one diff applied."""
    for part in ("train.py", "translate.py", "minimedshift"):
        copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
        copy(ROOT / part, folder / part)
    subprocess.run(["git", "apply", str(FORKS / f"{name}.diff")], cwd=folder, check=True)
    return folder


def run(folder, *command):
    env = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *command], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_readme_links_each_diff_and_each_is_short():
    text = (ROOT / "README.md").read_text()
    assert set(re.findall(r"tests/forks/(\w+)\.diff", text)) == set(NAMES) and len(NAMES) == 7
    for name in NAMES:
        lines = (FORKS / f"{name}.diff").read_text().splitlines()
        most = 40 if name == "image_to_image" else 12
        assert len([line for line in lines if re.match(r"[+-](?![+-])", line)]) <= most, name


@pytest.mark.parametrize("name", NAMES)
def test_it_applies(tmp_path, name):
    fork(tmp_path, name)


@pytest.mark.slow
@pytest.mark.parametrize("name, flags, found", [
    ("coupling", "--size 16 --coupling greedy", lambda state: state["config"]["coupling"] == "greedy"),
    ("network", "--preset wide",
     lambda state: state["shape"]["widths"] == (128,) and state["image"]["size"] == 32),
    ("schedule", "--size 16", lambda state: state["step"] == 2),
    ("domain", "--size 16", lambda state: "real-coarse" in state["domains"] and len(state["domains"]) == 6),
    ("image_to_image", "--size 16 --coupling exact --no-student",
     lambda state: state["shape"]["num_domains"] == 25),
])
def test_it_trains(tmp_path, name, flags, found):
    folder = fork(tmp_path, name)
    run(folder, "train.py", *TINY, *flags.split())
    assert found(checkpoint.load(folder / "out" / "checkpoint.pt"))


@pytest.mark.slow
@pytest.mark.parametrize("name, shown", [("metric", "| gradient error |"), ("rival", "| mean and spread")])
def test_it_is_in_the_table(tmp_path, name, shown):
    folder = fork(tmp_path, name)
    run(folder, "train.py", *TINY, "--size", "16")
    run(folder, "-m", "minimedshift.evaluate", "--heads", "3", "--heads-each", "2", "--valid-heads", "2")
    assert shown in (folder / "out" / "evaluation" / "table.md").read_text()
