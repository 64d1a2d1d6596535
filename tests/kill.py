"""Nothing is ever lost. A run is killed (kill -9) at many moments, goes on, and ends in the same bytes.

    python tests/kill.py [--kills 50] [--seed 0]      15 s a kill; a table, and status 1 if anything was lost

A tiny train.py and a translate.py are run once undisturbed. Then each kill is of a run of its own, with all
its processes, in one of six phases, at a random moment of it. What is on disk must be whole. The run then
goes on, with --resume if there is a checkpoint, and must end as the undisturbed one.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import train  # noqa: E402
import translate  # noqa: E402
from minimedshift.phantom import sets  # noqa: E402
from minimedshift import batches  # noqa: E402
from minimedshift.support import checkpoint, files  # noqa: E402
from minimedshift.support.command import run  # noqa: E402

PHASES = ("simulating", "potentials", "training", "student", "scoring", "translating")
FRESH = PHASES[:2]  # these begin with an empty cache, the others with a full one
TINY = ("--preset cpu --size 16 --train-images 30 --valid-heads 2 --test-heads 3 --steps 12 --batch-size 4 "
        "--student-images 4 --student-steps 8 --solver-steps 1 --device cpu --dtype float32").split()
WAY = "--source synthetic-high --target real-normal --batch-size 1 --device cpu".split()
LEFT = {"checkpoint.pt", "log.csv", "loss.png", "samples.png", "translations.png", "report.json"}
WEIGHTS = ("model", "ema", "optimizer", "student", "step")


# ---------------------------------------------------------------- the run that is killed, in its own process

def child(command, *argv):
    """train.py or translate.py, which tells its phases. Several saves in seconds; what is measured is set."""
    def explain_os_error(module, name, before, after=None):
        function = getattr(module, name)

        def with_phase(*args, **how):
            print("phase", before, flush=True)
            result = function(*args, **how)
            if after:
                print("phase", after, flush=True)
            return result

        setattr(module, name, with_phase)

    train.SAVE_EVERY = 0.3
    train.pick_formats = lambda dtype, device: (torch.float32, torch.channels_last)
    sets.BIG = 120  # the test heads are more: they are simulated by several processes
    files.DAY = 0   # what is left in the cache is removed at once
    explain_os_error(train, "load_data", "simulating")
    explain_os_error(batches, "learn_potentials", "potentials", "training")
    explain_os_error(train, "teach", "student")
    explain_os_error(train.evaluate, "report", "scoring")
    explain_os_error(translate, "translate_files", "translating")
    run(lambda: (train if command == "train" else translate).main(list(argv)))


def start(folder, phase, *more):
    """The command of a phase in a process group of its own; `folder` has its cache, out/ and translations."""
    if phase == "translating":
        flags = ["translate", folder / "in", folder / "translated", "--checkpoint", folder / "out/checkpoint.pt", *WAY]
    else:
        flags = ["train", *TINY, "--out", folder / "out"]
    command = [sys.executable, __file__, "--child", *map(str, flags), *more]
    env = os.environ | {"MINIMEDSHIFT_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=env, start_new_session=True, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE)


def finish(process):
    """Seconds of each phase of a run that is let to end. Raises AssertionError if it does not end well."""
    begun = {}
    for line in process.stdout:
        if line.startswith("phase "):
            begun[line.split()[1]] = time.time()
    errors = process.stderr.read()
    assert process.wait() == 0, f"status {process.returncode}: {errors}"
    ends = [*list(begun.values())[1:], time.time()]
    return {phase: end - begin for (phase, begin), end in zip(begun.items(), ends)}


def kill(process, phase, seconds):
    """Kill -9 a run and all its processes, `seconds` after a phase began. False if it had ended by itself."""
    for line in process.stdout:
        if line == f"phase {phase}\n":
            break
    time.sleep(seconds)
    ended = process.poll() is not None
    if not ended:
        os.killpg(process.pid, signal.SIGKILL)
    errors = process.communicate()[1]
    assert not ended or process.returncode == 0, f"status {process.returncode}: {errors}"
    return not ended


# ---------------------------------------------------------------- what must hold

def check_whole(folder):
    """Every file with a name of its own is whole. Raises AssertionError, or what reading it raises."""
    for path in sorted((folder / "out").iterdir()):
        if path.name.startswith(files.UNFINISHED) or path.name == ".lock":
            continue
        assert path.name in LEFT, f"{path.name} is unknown"
        if path.name == "checkpoint.pt":
            assert set(WEIGHTS) <= checkpoint.load(path).keys()
        elif path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".png":
            Image.open(path).load()
        else:
            lines = path.read_text().split("\n")[:-1]  # the last may be cut: --resume repairs it
            assert all(line.count(",") == lines[0].count(",") for line in lines), "a broken line"
    for path in (folder / "cache").iterdir():
        if not path.name.startswith(files.UNFINISHED):
            assert not files.damaged(path), f"{path.name} is damaged"
    for path in (folder / "translated").glob("[!.]*"):
        Image.open(path).load()


def check_same(folder, reference, phase):
    """The end of a run killed in `phase` is that of the undisturbed one, and nothing else is left."""
    a, b = (checkpoint.load(where / "out" / "checkpoint.pt") for where in (folder, reference))
    for key in WEIGHTS:
        assert same(a[key], b[key]), f"{key} is another"
    assert {path.name for path in (folder / "out").iterdir()} == LEFT, "files are left in out"
    assert rows(folder) == rows(reference), "log.csv is another"
    assert report(folder) == report(reference), "report.json is another"
    assert contents(folder / "cache") == contents(reference / "cache"), "the cache is another"
    if phase == "translating":
        assert contents(folder / "translated") == contents(reference / "translated"), "a translation is another"
    for name in ("samples.png", "translations.png"):
        assert np.array_equal(*(Image.open(where / "out" / name) for where in (folder, reference))), name


def same(a, b):
    """Whether two nested states are equal, tensors bit by bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def rows(folder):
    """The lines of log.csv without their times."""
    return [line.rsplit(",", 2)[0] for line in (folder / "out" / "log.csv").read_text().splitlines()]


def report(folder):
    """report.json without times and the command."""
    def timeless(value):
        if isinstance(value, dict):
            return {k: timeless(v) for k, v in value.items() if not any(w in k for w in ("seconds", "time", "command"))}
        return [timeless(v) for v in value] if isinstance(value, list) else value

    return timeless(json.loads((folder / "out" / "report.json").read_text()))


def contents(folder):
    """{name below the folder: bytes, or False for a folder}, hidden ones too."""
    return {str(p.relative_to(folder)): p.is_file() and p.read_bytes() for p in sorted(folder.rglob("*"))}


# ---------------------------------------------------------------- all kills

def new(folder, reference=None, phase=PHASES[0]):
    """A folder for a run of a phase, with what it finds there."""
    for name in ("out", "cache", "in", "translated"):
        (folder / name).mkdir(parents=True)
    random_pixels = np.random.default_rng(0)
    for i in range(16):
        Image.fromarray(random_pixels.integers(0, 256, (64, 64), np.uint8)).save(folder / "in" / f"{i}.png")
    for name in ("cache",) * (phase not in FRESH) + ("out",) * (phase == "translating"):
        shutil.copytree(reference / name, folder / name, dirs_exist_ok=True)
    return folder


def go_on(folder, phase):
    """What a user types after the kill, until the end."""
    more = []
    if phase == "translating":
        more = ["--overwrite"] * bool(list((folder / "translated").glob("[!.]*")))
    elif (folder / "out" / "checkpoint.pt").exists():
        more = ["--resume"]
    finish(start(folder, phase, *more))


def main(kills=50, seed=0, phases=PHASES):
    """Kill `kills` runs, the phases by turns. The number of those that lost something."""
    draw, lost = random.Random(seed), {phase: [] for phase in phases}
    with tempfile.TemporaryDirectory() as place:
        reference = new(Path(place) / "reference")
        seconds = finish(start(reference, "training")) | finish(start(reference, "translating"))
        print("undisturbed:", ", ".join(f"{phase} {seconds[phase]:.1f} s" for phase in PHASES), flush=True)
        for i in range(kills):
            phase, turn = phases[i % len(phases)], i // len(phases)
            turns = len(range(i % len(phases), kills, len(phases)))
            moment, killed = (turn + draw.random()) / turns, False
            while not killed:  # on a machine in a hurry the moment may lie behind the end
                shutil.rmtree(Path(place) / "killed", ignore_errors=True)
                folder = new(Path(place) / "killed", reference, phase)
                killed = kill(start(folder, phase), phase, moment * seconds[phase])
                moment *= 0.8
            left = [path.name for name in ("out", "cache", "translated")
                    for path in (folder / name).iterdir() if path.name.startswith(files.UNFINISHED)]
            try:
                check_whole(folder)
                go_on(folder, phase)
                check_same(folder, reference, phase)
                result = "same end"
            except Exception as error:
                result = f"LOST: {type(error).__name__} {error}"
            lost[phase].append(result != "same end")
            print(f"{i + 1}/{kills} {phase} at {moment / 0.8:.0%}, {len(left)} unfinished: {result}", flush=True)
    print("\n| phase | kills | result |\n|---|---|---|")
    for phase, found in lost.items():
        print(f"| {phase} | {len(found)} | {f'{sum(found)} LOST' if any(found) else 'same end'} |")
    return sum(map(sum, lost.values()))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    sys.exit(main(**vars(parser.parse_args())) > 0)
