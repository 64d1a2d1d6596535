"""Couplings and bridges on simulated heads: train.py with other flags, 600 steps each.

    python studies/couplings.py --seeds 3

A table of what each closes of the gap at tau .4. Your own ablation is one more line of RUNS. Stop and start
at will: what is done is not done again.
"""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # so that a study finds the package

from minimedshift.support.command import UserError, flag, parse, refuse, run
from studies.plane import show

RUNS = {
    "independent": "--coupling independent",
    "exact": "--coupling exact",
    "semidiscrete": "--coupling semidiscrete",
    "independent, sigma .1": "--coupling independent --sigma 0.1",
    "semidiscrete, sigma .1": "--coupling semidiscrete --sigma 0.1",
    "sinkhorn, sigma .1": "--coupling sinkhorn --sigma 0.1",
    "sinkhorn, sigma .3": "--coupling sinkhorn --sigma 0.3",
}


@dataclass(frozen=True)
class Config:
    only: str = flag("", "one of the runs (default: all)", "study")
    seeds: int = flag(1, "seeds of each run", "study", low=1)
    flags: str = flag("", 'more flags of train.py for all runs, as in "--size 32 --steps 100"', "study")
    out: str = flag("out/studies/couplings", "folder of table.md and of the runs", "study")


def train(flags, folder):
    """The report and the log of `train.py` with these flags. A stopped run goes on, a finished one stays."""
    command = [sys.executable, ROOT / "train.py", "--preset", "cpu", "--no-student"]
    command += [*flags.split(), "--out", folder, *["--resume"] * (folder / "checkpoint.pt").exists()]
    if not (folder / "report.json").exists():
        status = subprocess.run(command).returncode
        if status == 130:
            raise KeyboardInterrupt
        if status:
            raise UserError(f"train.py {flags} has stopped: see above")
    log = np.genfromtxt(folder / "log.csv", delimiter=",", names=True)
    return json.loads((folder / "report.json").read_text()), np.atleast_1d(log)


def numbers(report, log):
    """What the table says of one run."""
    row = report["main_pair"]["shared"]["MedShift"]
    all_pairs = report["all_pairs"]["shared"]["means"]["MedShift"]
    return {"plan's entropy": log["entropy"].mean(), "cost": log["cost"].mean(),
            "gap closed": row["gap_closed"], "noise": row["noise"],
            "all pairs": all_pairs["gap_closed"], "same head": all_pairs["same_head"]}


def main(argv=None):
    c = parse(Config, __doc__, argv)
    refuse(c.only not in ("", *RUNS), f"--only {c.only} is no run: choose from {'; '.join(RUNS)}")
    found = {}
    for name in [c.only] if c.only else RUNS:
        found[name] = []
        for seed in range(1, c.seeds + 1):  # the test heads of seed 0 are to report on, not to choose by
            flags = f"--steps 600 --tau 0.4 --seed {seed} {RUNS[name]} {c.flags}"
            found[name].append(numbers(*train(flags, Path(c.out) / name / f"seed-{seed}")))
    show(Path(c.out) / "table.md", found)


if __name__ == "__main__":
    run(main)
