"""Several processes: they train as one would with the joint batch, and go on where another number stopped."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import train
from minimedshift.support import checkpoint

ROOT = Path(train.__file__).parent
TINY = ("--size 16 --train-images 60 --valid-heads 2 --test-heads 3 --batch-size 8 --steps 20 --preset cpu "
        "--device cpu --dtype float32 --no-evaluate --student-images 2 --student-steps 2").split()
COUPLINGS = {"semidiscrete": [], "sinkhorn": "--coupling sinkhorn --sigma 1".split(),
             "exact": "--coupling exact --ot-batch 3".split()}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


def start(out, cache, processes, *flags):
    torchrun = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}"] if processes > 1 else []
    command = [sys.executable, *torchrun, str(ROOT / "train.py"), *TINY, "--out", str(out), *flags]
    env = dict(os.environ, MINIMEDSHIFT_CACHE=cache, OMP_NUM_THREADS="1")
    return subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finish(process):
    output, errors = process.communicate(timeout=600)
    return process.returncode, output, errors


def losses(out):
    return np.loadtxt(out / "log.csv", delimiter=",", skiprows=1)[:, 1]


@pytest.mark.slow
@pytest.mark.parametrize("name", COUPLINGS)
def test_two_processes_train_as_one_does_with_the_joint_batch(tmp_path, cache, name):
    one, two = tmp_path / "one", tmp_path / "two"
    assert finish(start(one, cache, 1, "--no-student", *COUPLINGS[name]))[0] == 0
    status, output, errors = finish(start(two, cache, 2, *COUPLINGS[name]))
    assert status == 0, errors
    assert output.count("cpu preset") == 1 and "the student learns: 2/2" in output  # rank 0 alone speaks
    assert len(losses(two)) == 20 and np.abs(losses(one) - losses(two)).max() < 1e-4
    a, b = (checkpoint.load(out / "checkpoint.pt")["ema"] for out in (one, two))
    assert a.keys() == b.keys()  # no name comes from the wrapper
    assert max((a[key] - b[key]).abs().max().item() for key in a) < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("before, after", [(1, 2), (2, 1)])
def test_a_run_goes_on_with_another_number_of_processes(tmp_path, cache, before, after):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert finish(start(whole, cache, 1, "--no-student"))[0] == 0
    process, log = start(parts, cache, before, "--no-student"), parts / "log.csv"
    while process.poll() is None and not (log.exists() and log.read_text().count("\n") > 4):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    finish(process)
    assert 2 < checkpoint.load(parts / "checkpoint.pt")["step"] < 20
    status, _, errors = finish(start(parts, cache, after, "--no-student", "--resume"))
    assert status == 0, errors
    assert len(losses(parts)) == 20 and np.abs(losses(whole) - losses(parts)).max() < 1e-4


def test_a_batch_that_cannot_be_shared_is_refused_once(tmp_path, cache):
    status, _, errors = finish(start(tmp_path, cache, 2, "--batch-size", "3"))
    said = [line for line in errors.splitlines() if line.startswith("error:")]
    assert status != 0 and said == ["error: --batch-size 3 must be a multiple of the 2 processes"]
