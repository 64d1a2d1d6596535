"""Files and folders outlive kills and full disks: whole or not there, and every failure a sentence."""

import errno
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from disk import full_disk
from minimedshift.support import files, images
from minimedshift.support.command import UserError
from minimedshift.support import log
from minimedshift.support.log import Log

ROOT = Path(__file__).parents[1]


def process(script):
    """Python code that runs beside the test."""
    return subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, cwd=ROOT)


def test_a_file_that_cannot_be_written_is_a_sentence_and_the_old_one_stays(tmp_path):
    path = tmp_path / "a.json"
    files.write_json(path, dict(a=1))
    with full_disk(1000), pytest.raises(UserError, match=r"a\.json cannot be written \(File too large\)"):
        files.write_json(path, dict(a=[0] * 1000))
    with pytest.raises(UserError, match=r"b\.json cannot be written"):
        files.write_json(path / "deep" / "b.json", {})
    noise = torch.randn(1, 64, 64, generator=torch.Generator().manual_seed(0))
    with full_disk(1000), pytest.raises(UserError, match=r"a\.png cannot be written"):
        images.figure(tmp_path / "a.png", [[noise]], [], [""])
    assert json.loads(path.read_text()) == dict(a=1) and os.listdir(tmp_path) == ["a.json"]


def test_what_a_killed_process_left_is_written_over(tmp_path):
    path = tmp_path / "deep" / "a.json"
    killed = process("import os, signal; from minimedshift.support.files import write_whole\n"
                     f"with write_whole({str(path)!r}) as work:\n"
                     "    work.write_text('half'); os.kill(os.getpid(), signal.SIGKILL)\n")
    killed.communicate()
    assert len(os.listdir(path.parent)) == 1 and not path.exists()
    files.write_json(path, dict(a=1))
    assert json.loads(path.read_text()) == dict(a=1) and os.listdir(path.parent) == ["a.json"]


ROW = "{},1.5,1,0.02,0,1,0,0.1,{}".format
REST = 1.0, 0.02, (0.0, 1.0, 0.0), 0.1  # norm, learning rate, plan, seconds of the coupling


def test_a_log_that_was_cut_goes_on_with_whole_lines(tmp_path):
    path, head = tmp_path / "log.csv", ",".join(Log.COLUMNS)
    path.write_text("\n".join([head, ROW(1, 1), ROW(2, 2), ROW(3, 3), "4,1.5,1,0.0"]))
    log = Log(tmp_path, 2, 4, 1)
    assert [row[0] for row in log.rows] == [1, 2] and log.before == 2
    assert path.read_text().splitlines() == [head, ROW(1, 1), ROW(2, 2)]
    log(3, torch.tensor(1 / 3), *REST)
    log(4, torch.tensor(float("nan")), *REST)
    again = Log(tmp_path, 4, 4, 1)
    np.testing.assert_allclose(again.rows, log.rows, rtol=5e-6)
    again.draw()
    path.unlink()
    assert Log(tmp_path, 4, 4, 1).rows == [] and sorted(os.listdir(tmp_path)) == ["log.csv", "loss.png"]


def test_every_phase_tells_the_time_left_of_the_whole_run(tmp_path, capsys, monkeypatch):
    clock = [10.0]
    monkeypatch.setattr(log.time, "time", lambda: clock[0])
    monkeypatch.setattr(log, "AHEAD", log.Ahead())
    log.AHEAD.seconds, log.AHEAD.units = 2.0, {"potentials": 5, "training": 40, "taught": 10, "report": 20}
    log.progress(1, 3, 0.0, "simulating")                 # 20 s, and 75 steps
    log.progress(1, 5, 0.0, "potentials")                 # too soon for another line
    clock[0] = 100.0
    log.progress(2, 5, 0.0, "potentials")                 # 150 s, and 70 steps
    run = Log(tmp_path, 0, 40, 1)
    for step in range(1, 41):
        clock[0] += 3
        run(step, torch.tensor(1.0), float("inf") if step > 30 else 1.0, *REST[1:])
    said = capsys.readouterr().out.splitlines()
    assert [line.rpartition(", ")[2].split()[0] for line in said] == [
        "2:50", "4:50", "2:57", "2:24", "1:51", "1:30"]
    assert run.failed(10) and not run.failed(11)


@pytest.mark.skipif(files.fcntl is None, reason="needs locks")
def test_a_folder_is_held_by_one_process_until_its_end_however_it_ends(tmp_path):
    holder = process("import time; from minimedshift.support.files import lock_folder\n"
                     f"with lock_folder({str(tmp_path)!r}):\n"
                     "    print('held', flush=True); time.sleep(100)\n")
    assert holder.stdout.readline() == b"held\n"
    for _ in range(2):
        with pytest.raises(UserError, match="in use by another run"):
            with files.lock_folder(tmp_path):
                pass
    holder.kill()
    holder.communicate()
    for _ in range(2):
        with files.lock_folder(tmp_path):
            pass


def test_a_disk_without_locks_and_windows_refuse_nobody(tmp_path, monkeypatch):
    if files.fcntl:
        def none(*_):
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr(files.fcntl, "flock", none)
        with files.lock_folder(tmp_path), files.lock_folder(tmp_path):
            pass
    monkeypatch.setattr(files, "fcntl", None)
    with files.lock_folder(tmp_path), files.lock_folder(tmp_path):
        pass


def make(folder):
    np.save(folder / "a.npy", np.arange(1000))


def test_the_cache_is_made_once_for_each_content(tmp_path):
    folder = files.cached(tmp_path, "x", [1], make)
    assert files.cached(tmp_path, "x", [1], None) == folder and np.load(folder / "a.npy")[-1] == 999
    assert files.cached(tmp_path, "x", [2], make) != folder and len(os.listdir(tmp_path)) == 2


def test_two_builds_at_once_both_end_with_the_whole_set(tmp_path):
    both, found = threading.Barrier(2), []

    def build(folder):
        (folder / "a").write_text("half")
        both.wait(10)
        (folder / "a").write_text("whole")

    run = lambda: found.append(files.cached(tmp_path, "x", [1], build))
    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0] == found[1] and (found[0] / "a").read_text() == "whole"
    assert list(tmp_path.iterdir()) == [found[0]]


def test_a_cache_that_cannot_be_written_or_filled_is_a_sentence_and_leaves_nothing(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="MINIMEDSHIFT_CACHE"):
        files.cached(tmp_path / "file" / "cache", "x", [1], None)
    says = "the cache .* cannot be written .*MINIMEDSHIFT_CACHE"
    with full_disk(1000), pytest.raises(UserError, match=says):
        files.cached(tmp_path / "cache", "x", [1], make)
    assert os.listdir(tmp_path / "cache") == []
