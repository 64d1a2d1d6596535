"""Nothing is ever lost: a run that is killed (kill -9) goes on with --resume and ends in the same bytes."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from minimedshift.support import checkpoint

ROOT = Path(__file__).resolve().parents[1]
PHASES = ("simulating", "training", "student", "scoring")
TINY = ("--preset cpu --size 16 --train-images 30 --valid-heads 2 --test-heads 3 --steps 12 --batch-size 4 "
        "--student-images 4 --student-steps 8 --solver-steps 1 --device cpu --dtype float32").split()
LEFT = {"checkpoint.pt", "log.csv", "loss.png", "translations.png", "report.json"}
# a run that tells its phases, saves several times in its few seconds, and measures nothing
CHILD = """
import sys, torch, train
from minimedshift.support.command import run

def tells(module, name, phase):
    function = getattr(module, name)
    def with_phase(*args, **how):
        print("phase", phase, flush=True)
        return function(*args, **how)
    setattr(module, name, with_phase)

train.SAVE_EVERY = 0.3
train.pick_formats = lambda dtype, device: (torch.float32, torch.channels_last)
tells(train.batches, "load_dataset", "simulating")
tells(train.batches, "batches", "training")
tells(train, "teach", "student")
tells(train.evaluate, "report", "scoring")
run(train.main)
"""


def start(folder, *more):
    """The run, in a group of its own with all its processes."""
    command = [sys.executable, "-c", CHILD, *TINY, "--out", str(folder / "out"), *more]
    env = os.environ | {"MINIMEDSHIFT_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=env, cwd=ROOT, start_new_session=True, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def seconds_of_phases(process):
    """How long each phase of a run takes that is let to end."""
    begun = {}
    for line in process.stdout:
        if line.startswith("phase "):
            begun[line.split()[1]] = time.time()
    errors = process.stderr.read()
    assert process.wait() == 0, errors
    ends = [*list(begun.values())[1:], time.time()]
    return {phase: end - begin for (phase, begin), end in zip(begun.items(), ends)}


def kill(process, phase, seconds):
    """Kill -9 a run and all its processes, `seconds` after a phase began, unless it has ended by then."""
    for line in process.stdout:
        if line == f"phase {phase}\n":
            break
    time.sleep(seconds)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def what_is_left(out):
    """The end of a run: all that must be the same whenever it was killed, tensors as bytes."""
    state = checkpoint.load(out / "checkpoint.pt")
    tensors = [state[key] for key in ("model", "ema", "optimizer", "student", "step")]
    rows = [line.rsplit(",", 2)[0] for line in (out / "log.csv").read_text().splitlines()]
    report = json.loads((out / "report.json").read_text())
    assert {path.name for path in out.glob("[!.]*")} == LEFT
    return plain([tensors, rows, report, Image.open(out / "translations.png").tobytes()])


def plain(value):
    """A nested value without times, its tensors as lists."""
    if isinstance(value, dict):
        differs = lambda key: any(word in str(key) for word in ("second", "command"))
        return {key: plain(part) for key, part in value.items() if not differs(key)}
    if isinstance(value, (list, tuple)):
        return [plain(part) for part in value]
    return value.tolist() if isinstance(value, torch.Tensor) else value


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs groups of processes")
def test_a_killed_run_goes_on_to_the_same_end(tmp_path):
    seconds = seconds_of_phases(start(tmp_path / "undisturbed"))
    assert tuple(seconds) == PHASES
    wanted, draw = what_is_left(tmp_path / "undisturbed" / "out"), random.Random(0)
    for phase in PHASES:
        folder = tmp_path / phase
        kill(start(folder), phase, draw.random() * seconds[phase])
        resume = ["--resume"] if (folder / "out" / "checkpoint.pt").exists() else []
        seconds_of_phases(start(folder, *resume))
        assert what_is_left(folder / "out") == wanted, phase
