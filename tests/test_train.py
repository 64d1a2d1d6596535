"""The command a user types: a whole run, an exact resume, and every mistake in one sentence."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from disk import full_disk
from minimedshift import phantom, student
from minimedshift.model import Shape
from minimedshift.support import checkpoint, files
from minimedshift.support.command import run
from minimedshift.support.log import Log

ROOT = Path(train.__file__).parent
TINY = ("--size 16 --train-images 20 --valid-heads 2 --test-heads 3 --batch-size 4 --solver-steps 1 "
        "--student-images 2 --student-steps 2").split()


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return {"MINIMEDSHIFT_CACHE": str(tmp_path_factory.mktemp("cache"))}


# A small network. What is fastest is measured, and a busy machine may find another answer the next time.
FIXED = """
import dataclasses, torch, train
small = train.PRESETS["cpu"].shape.__class__(stem=4, widths=(32,), blocks=(1,))
train.PRESETS["cpu"] = dataclasses.replace(train.PRESETS["cpu"], shape=small)
train.pick_formats = lambda *_: (torch.float32, torch.channels_last)
train.run(train.main)
"""


def start(out, cache, *flags, fixed=False):
    """train.py in a process of its own. fixed: a small network, and formats that are not measured."""
    script = ["-c", FIXED] if fixed else [str(ROOT / "train.py")]
    command = [sys.executable, *script, *TINY, "--out", str(out), *flags]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    return subprocess.Popen(command, env={**os.environ, **cache}, cwd=ROOT, text=True, **pipes)


@pytest.fixture
def here(cache, monkeypatch, capsys):
    """train.py in this process, with a small network, as a function of --out and flags: its status, output
    and errors."""
    small = Shape(stem=4, widths=(32,), blocks=(1,))
    monkeypatch.setitem(train.PRESETS, "cpu", replace(train.PRESETS["cpu"], shape=small))
    monkeypatch.setenv("MINIMEDSHIFT_CACHE", cache["MINIMEDSHIFT_CACHE"])
    monkeypatch.setattr(train.signal, "signal", lambda *_: None)

    def main(out, *flags):
        with pytest.raises(SystemExit) as end:
            run(lambda: train.main([*TINY, "--out", str(out), *flags]))
        return end.value.code, *capsys.readouterr()

    return main


def finish(process):
    try:
        output, errors = process.communicate(timeout=300)
    finally:
        process.kill()
    return process.returncode, output, errors


def same_tensors(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_tensors(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same_tensors, a, b))
    return a == b


def test_a_whole_run_leaves_everything_it_promises(tmp_path, cache):
    sizes = "--size", "32", "--flow-size", "16"
    status, output, errors = finish(start(tmp_path, cache, "--steps", "4", *sizes))
    assert (status, errors) == (0, ""), errors
    left = "checkpoint.pt log.csv loss.png translations.png report.json"
    assert {p.name for p in tmp_path.glob("[!.]*")} == set(left.split())
    assert "images/s" in output and "left" in output
    rows = (tmp_path / "log.csv").read_text().splitlines()
    assert "the student learns: 2/2" in output
    assert rows[0] == "step,loss,grad_norm,lr,entropy,cost,marginal_error,coupling_seconds,seconds"
    assert [int(row.split(",")[0]) for row in rows[1:]] == [1, 2, 3, 4]
    state = checkpoint.load(tmp_path / "checkpoint.pt")
    assert state["step"] == 4 and state["image"]["size"] == 32 and state["translate"]["steps"] == 1
    assert state["translate"]["size"] == 16
    assert {"config", "domains", "model", "ema", "optimizer", "machine"} <= state.keys()
    assert not same_tensors(state["model"], state["ema"])  # --resume goes on from raw weights, not their mean
    pairs = {(s, t) for s in range(5) for t in range(5) if s != t}
    assert student.restore(state["student"]).finishes.keys() == pairs


@pytest.mark.parametrize("coupling", [pytest.param("exact --ot-batch 7", marks=pytest.mark.slow),
                                      pytest.param("sinkhorn", marks=pytest.mark.slow), "semidiscrete"])
def test_stop_and_resume_give_the_same_bytes(tmp_path, cache, coupling):
    flags = ["--steps", "40", "--no-evaluate", "--coupling", *coupling.split(), "--sigma", "0.1"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    first = start(parts, cache, *flags, fixed=True)
    log = parts / "log.csv"
    while first.poll() is None and not (log.exists() and log.read_text().count("\n") > 8):
        time.sleep(0.02)
    first.send_signal(signal.SIGINT)
    status, output, errors = finish(first)
    stopped = checkpoint.load(parts / "checkpoint.pt")["step"]
    assert status == 130 and "--resume" in output and 5 < stopped < 40, (status, output, errors)
    assert finish(start(parts, cache, *flags, "--resume", fixed=True))[0] == 0
    b = checkpoint.load(parts / "checkpoint.pt")
    assert finish(start(whole, cache, *flags, fixed=True))[0] == 0
    a = checkpoint.load(whole / "checkpoint.pt")
    for key in ("model", "ema", "optimizer", "step", "student"):
        assert same_tensors(a[key], b[key]), key
    rows = lambda folder: (folder / "log.csv").read_text().splitlines()
    without_time = lambda folder: [row.rsplit(",", 2)[0] for row in rows(folder)]
    assert without_time(whole) == without_time(parts)
    seconds = np.loadtxt(parts / "log.csv", delimiter=",", skiprows=1)[:, -1]
    assert (np.diff(seconds) > 0).all()  # those of the stopped process count too


def test_check_data_shows_and_stops(tmp_path, here):
    status, output, _ = here(tmp_path, "--check-data")
    assert status == 0 and all(f"{name}: 4 to train" in output for name in phantom.DOMAINS)
    assert [p.name for p in tmp_path.glob("[!.]*")] == ["data.png"]


@pytest.mark.parametrize("flags, says", [
    ("--learning-rate 1", "unrecognized"), ("--nonsense 1", "--nonsense"), ("--domains a,b", "--domains"),
    ("--steps", "--steps"), ("--steps many", "--steps"), ("--steps 1.5", "--steps"),
    (f"--steps {10**12}", "--steps"), ("--size 30", "--size"), ("--batch-size -1", "--batch-size"),
    ("--coupling best", "--coupling"), ("--coupling sinkhorn", "--sigma"), ("--sigma -0.1", "--sigma"),
    ("--ot-batch 4 --coupling independent", "--ot-batch"), ("--ot-batch -1", "--ot-batch"),
    ("--tau 1", "--tau"), ("--tau 0.98", "--tau"), ("--t-image 1.1", "--t-image"), ("--lr 0", "--lr"),
    ("--colour 9", "--colour"), ("--lr -1", "--lr"), ("--lr nan", "--lr"), ("--lr inf", "--lr"),
    ("--shift 1.1", "--shift"), ("--seed -1", "--seed"), ("--student-steps -1", "--student-steps"),
    ("--solver sde", "--solver"), ("--device tpu", "--device"), ("--resume", "no checkpoint"),
    ("--data /no/such/folder", "/no/such/folder"), ("--out /dev/null/out", "cannot be made"),
    ("--steps -1", "--steps"), ("--out ", "--out is empty")])
def test_a_mistake_ends_in_one_sentence_and_status_2(tmp_path, capsys, monkeypatch, flags, says):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        run(lambda: train.main(flags.split(" ")))
    errors = capsys.readouterr().err
    assert end.value.code == 2 and says in errors and errors.count("\n") == 1


def test_resume_with_another_flag_is_refused_and_loses_nothing(tmp_path, here):
    flags = "--steps", "2", "--no-evaluate"
    assert here(tmp_path, *flags)[0] == 0
    before = (tmp_path / "checkpoint.pt").read_bytes()
    cases = (("--resume", "--lr", "0.5"), "--lr was 0.02, is 0.5"), ((), "--overwrite starts anew")
    for more, says in cases:
        status, _, errors = here(tmp_path, *flags, *more)
        assert status == 2 and says in errors and (tmp_path / "checkpoint.pt").read_bytes() == before


def test_a_finished_run_resumes_to_its_end_in_the_number_format_asked_for(tmp_path, here):
    runs = {"--dtype float32": "float32", "--resume": "float32", "--resume --dtype bfloat16": "bfloat16"}
    for more, dtype in runs.items():
        (tmp_path / "translations.png").unlink(missing_ok=True)  # it may have been killed before it drew it
        status, output, _ = here(tmp_path, "--steps", "2", "--no-evaluate", *more.split())
        assert status == 0 and f", {dtype}," in output
        assert (tmp_path / "translations.png").exists()


def test_a_full_disk_is_one_sentence_and_the_old_checkpoint_stays(tmp_path, here):
    flags = "--steps", "2", "--no-evaluate"
    assert here(tmp_path, *flags)[0] == 0
    names, before = sorted(os.listdir(tmp_path)), (tmp_path / "checkpoint.pt").read_bytes()
    for free, name in ((100, "log.csv"), (100_000, "checkpoint.pt")):
        with full_disk(free):
            status, _, errors = here(tmp_path, *flags, "--overwrite")
        assert status == 2 and f"{name} cannot be written (" in errors and errors.count("\n") == 1
        assert (tmp_path / "checkpoint.pt").read_bytes() == before and sorted(os.listdir(tmp_path)) == names
    assert here(tmp_path, *flags, "--resume")[0] == 0


@pytest.mark.skipif(files.fcntl is None, reason="needs locks")
def test_a_second_run_in_the_same_folder_is_refused_until_the_first_is_killed(tmp_path, cache, here):
    flags = ["--no-evaluate", "--no-student"]
    first = start(tmp_path, cache, "--steps", "4000", *flags)
    while first.poll() is None and not (tmp_path / "log.csv").exists():
        time.sleep(0.05)
    for more in ("--overwrite", "--check-data"):
        status, output, errors = here(tmp_path, "--steps", "2", *flags, more)
        assert (status, output) == (2, "") and errors.count("\n") == 1, (status, output, errors)
        assert f"{tmp_path} is in use by another run" in errors
    assert first.poll() is None and not (tmp_path / "data.png").exists()
    first.kill()
    finish(first)
    assert here(tmp_path, "--steps", "2", *flags, "--overwrite")[0] == 0
    left = {path.name for path in tmp_path.glob("[!.]*")}
    assert left == {"checkpoint.pt", "log.csv", "loss.png", "translations.png"}


def test_help_shows_groups_and_defaults(tmp_path, here):
    words = "data:", "method:", "training:", "translation:", "run:", "(default: 0.02)"
    text = here(tmp_path, "--help")[1]
    assert all(word in text for word in words)


def test_other_lessons_teach_another_student_and_a_broken_log_stops_nobody(tmp_path, here):
    again = "--steps 3 --no-evaluate --resume --student-steps".split()
    assert here(tmp_path, *again[:3])[0] == 0
    log = tmp_path / "log.csv"
    first, second, third = log.read_text().splitlines()[1:]
    log.write_text(f"{first}\n\nhello\n{second.replace(',', ';')}\n{third}\n4,,,,\n")
    for steps, learns in (("2", False), ("5", True), ("5", False)):
        status, said, _ = here(tmp_path, *again, steps)
        assert status == 0 and ("the student learns: 5/5" in said) == learns
    assert log.read_text().splitlines()[1:] == [first, third]


def test_lessons_are_guided_if_labels_were_hidden(tmp_path, here, monkeypatch):
    write, seen = student.lessons, []
    monkeypatch.setattr(student, "lessons", lambda *what, **how: seen.append(how) or write(*what, **how))
    for share in ("0", ".1"):
        assert here(tmp_path, "--steps", "1", "--no-evaluate", "--overwrite", "--drop-label", share)[0] == 0
    assert [how["guidance"] for how in seen] == [1, student.GUIDANCE]


def test_log_csv_tells_what_a_coupling_did_and_cost(tmp_path, here):
    flags = "--steps 3 --coupling sinkhorn --sigma 2 --ot-batch 4 --no-evaluate".split()
    status, _, errors = here(tmp_path, *flags)
    assert (status, errors) == (0, "")
    for line in (tmp_path / "log.csv").read_text().splitlines()[1:]:
        row = dict(zip(Log.COLUMNS, map(float, line.split(","))))
        assert 0.1 < row["entropy"] < 0.9 and 0 < row["cost"] < 1.2
        assert 0 < row["coupling_seconds"] < row["seconds"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("coupling", ["semidiscrete", "sinkhorn --sigma 2"])
def test_no_training_step_waits_for_the_gpu(tmp_path, monkeypatch, coupling):
    class Spy(Log):
        def __call__(self, step, *rest, **more):
            torch.cuda.set_sync_debug_mode("default")  # the log may wait, now and then
            read = super().__call__(step, *rest, **more)
            torch.cuda.set_sync_debug_mode("error" if 2 <= step < 6 else "default")
            return read

    monkeypatch.setattr(train, "Log", Spy)
    monkeypatch.setenv("MINIMEDSHIFT_CACHE", str(tmp_path / "cache"))
    try:
        flags = f"--steps 7 --no-evaluate --ot-batch 2 --coupling {coupling}".split()
        assert train.main([*TINY, "--out", str(tmp_path), *flags]) == 0
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_preset_is_what_the_machine_can_train(monkeypatch):
    machines = (("cuda", True, "gpu"), ("cuda", False, "cpu"), ("mps", False, "cpu"), ("cpu", False, "cpu"))
    for device, bfloat16, preset in machines:
        monkeypatch.setattr(train, "pick_device", lambda name: torch.device(device))
        monkeypatch.setattr(train, "has_bfloat16", lambda: bfloat16)
        assert train.resolve(train.Config())[0].preset == preset
        assert train.resolve(train.Config(preset="gpu"))[0].size == 256


def test_a_step_without_a_finite_gradient_moves_no_weight_to_nonsense(tmp_path, here, monkeypatch):
    """One bad loss changes nothing much; BAD_STEPS of them in a row stop the run with advice, and save."""
    right, calls = train.flow_loss, []

    def wrong_at(steps):
        def loss(*args):
            calls.append(0)
            return right(*args) * (float("nan") if len(calls) - 4 in steps else 1)  # four calls are the trial
        return loss

    flags = "--steps 16 --no-evaluate --no-student --overwrite".split()
    monkeypatch.setattr(train, "flow_loss", wrong_at({5}))
    assert here(tmp_path, *flags)[0] == 0
    weights = checkpoint.load(tmp_path / "checkpoint.pt")["ema"].values()
    assert all(p.isfinite().all() for p in weights)
    calls.clear()
    monkeypatch.setattr(train, "flow_loss", wrong_at(range(4, 17)))
    status, _, errors = here(tmp_path, *flags)
    assert status == 2 and "no finite gradient" in errors
    assert checkpoint.load(tmp_path / "checkpoint.pt")["step"] == 3 + train.BAD_STEPS


def test_what_does_not_fit_fails_before_anything_long(tmp_path, here, monkeypatch):
    """A step at full size comes first: nothing has been simulated when memory runs out."""
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(train, "flow_loss", full)
    monkeypatch.setattr(train.batches, "load_dataset", lambda config: pytest.fail("too late"))
    assert here(tmp_path, "--steps", "2")[0] == 2


@pytest.mark.slow
def test_the_readme_run_beats_the_grey_value_curves(tmp_path, cache):
    """`python train.py` with no flag but --out, then `python translate.py`: the README's first screen."""
    command = [sys.executable, str(ROOT / "train.py"), "--out", str(tmp_path)]
    done = subprocess.run(command, env={**os.environ, **cache}, capture_output=True, text=True, timeout=5000)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    main, every = report["main_pair"]["shared"], report["all_pairs"]["shared"]["means"]
    flow, taught = main["MedShift"], main["MedShift's student"]
    assert flow["gap_closed"] > max(.5, main["histogram"]["gap_closed"], main["untouched"]["gap_closed"])
    assert taught["gap_closed"] > max(.75, flow["gap_closed"])
    assert every["MedShift's student"]["gap_closed"] > .5
    command = [sys.executable, str(ROOT / "translate.py"), "--checkpoint", str(tmp_path / "checkpoint.pt")]
    done = subprocess.run(command, env={**os.environ, **cache}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and (tmp_path / "translate.png").exists(), done.stderr
