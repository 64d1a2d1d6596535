"""MedShift on one page: short, torch alone, quick, and what it prints shows what tau does."""

import ast
import os
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "notebooks" / "medshift_on_one_page.py"


def test_it_fits_on_a_page_and_needs_torch_alone():
    text = PAGE.read_text()
    lines = text.splitlines()
    assert len(lines) <= 60
    assert max(map(len, lines)) <= 110
    imports = [node for node in ast.walk(ast.parse(text)) if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert [ast.unparse(node) for node in imports] == ["import torch"]


def test_the_files_it_names_exist():
    names = set(re.findall(r"[\w/]+\.py", PAGE.read_text()))
    assert names >= {"flow.py", "coupling.py", "model.py", "train.py", "sampler.py", "translate.py"}
    for name in names:
        assert (ROOT / name).is_file() or (ROOT / "minimedshift" / name).is_file(), name


def test_tau_trades_the_head_for_the_domain(tmp_path):
    start = time.monotonic()
    done = subprocess.run([sys.executable, PAGE], capture_output=True, text=True, cwd=tmp_path, timeout=240,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - start < 60  # it takes 7 s of one core

    number = r"\s+(\d+\.\d+|nan)"
    rows = re.findall(rf"(tau [\d.]+|truth)  \|.{{24}}\|{number}{number}{number}", done.stdout)
    taus = (1.0, 0.9, 0.8, 0.6, 0.4, 0.2, 0.0)
    assert [name for name, *_ in rows] == [*(f"tau {tau}" for tau in taus), "truth"]
    error, domain, trip = zip(*[map(float, numbers) for _, *numbers in rows])
    *domain, domain_of_truth = domain
    assert domain == sorted(domain, reverse=True)  # the smaller tau, the more it looks like the target
    best = error.index(min(error[:-1]))
    assert 0.1 < min(error[:-1]) < 0.6 * error[0]  # but the head itself is best kept in between
    assert 2 <= best <= 5 and error[6] > 1.2 * error[best]
    assert domain[6] < domain_of_truth  # at tau = 0 it is more like the target than the truth: another head
    assert trip[0] == 0 and 0 < trip[1] < trip[6] < 0.1  # the way back ends near the source
