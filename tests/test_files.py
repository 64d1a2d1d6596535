"""Files and folders outlive kills, full disks and damage: whole or not there, and every failure a sentence."""

import errno
import json
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch

from disk import full_disk
from minimedshift.support import files, images
from minimedshift.support.command import UserError
from minimedshift.support.log import Log
from minimedshift.support.files import UNFINISHED


# ---------------------------------------------------------------- files

def test_a_file_that_cannot_be_written_is_a_sentence_and_the_old_one_stays(tmp_path):
    path = tmp_path / "a.json"
    files.write_json(path, dict(a=1))
    with full_disk(1000), pytest.raises(UserError, match=r"a\.json cannot be written \(File too large\)"):
        files.write_json(path, dict(a=[0] * 1000))
    assert json.loads(path.read_text()) == dict(a=1) and os.listdir(tmp_path) == ["a.json"]
    for wrong in (tmp_path / "a.json" / "b.json", tmp_path / "none" / "b.json"):
        with pytest.raises(UserError, match=r"b\.json cannot be written"):
            files.write_json(wrong, {})
    noise = torch.randn(1, 64, 64, generator=torch.Generator().manual_seed(0))
    with full_disk(1000), pytest.raises(UserError, match=r"a\.png cannot be written"):
        images.figure(tmp_path / "a.png", [[noise]], [], [""])
    with pytest.raises(UserError, match="cannot be made"):
        images.figure(path / "deep" / "a.png", [[noise]], [], [""])
    assert os.listdir(tmp_path) == ["a.json"]


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path):
    script = (f"import os, signal; from minimedshift.support.files import write_whole\n"
              f"with write_whole({str(tmp_path / 'a.png')!r}) as work:\n"
              "    work.write_text('half'); os.kill(os.getpid(), signal.SIGKILL)\n")
    subprocess.run([sys.executable, "-c", script], cwd=os.path.dirname(os.path.dirname(__file__)))
    killed, = os.listdir(tmp_path)
    assert killed.startswith(UNFINISHED) and killed.endswith("a.png")
    kept = {f"{UNFINISHED}{os.getpid()}-b.png", f"{UNFINISHED}notes", ".holiday-2019.png", "c.png"}
    for name in kept:
        (tmp_path / name).touch()
    files.clear_unfinished(tmp_path, age=60)
    assert set(os.listdir(tmp_path)) == {killed, *kept}
    files.clear_unfinished(tmp_path)
    assert set(os.listdir(tmp_path)) == kept


def test_a_log_that_was_cut_is_repaired(tmp_path):
    row = "{},1.5,1,0.02,0,1,0,0.1,{}".format
    lines = [",".join(Log.COLUMNS), row(1, 1), "2,1.5,1,0.0", row(2, 2), row(3, 3), row("a", "b"), row(1, 9)[:-1]]
    (tmp_path / "log.csv").write_text("\n".join(lines))
    log = Log(tmp_path, 2, 4, 1)
    assert log.column("step") == [1, 2] and log.before == 2
    assert (tmp_path / "log.csv").read_text().splitlines() == [lines[0], row(1, 1), row(2, 2)]
    rest = 1.0, 0.02, (None, 0.0, 1.0, 0.0), 0.1
    log(3, torch.tensor(1 / 3), *rest)
    log(4, torch.tensor(float("nan")), *rest)
    again = Log(tmp_path, 4, 4, 1)
    np.testing.assert_array_equal(again.rows, log.rows)
    with full_disk(300), pytest.raises(UserError, match=r"log\.csv cannot be written"):
        for step in range(5, 20):
            again(step, torch.tensor(1.0), *rest)
    (tmp_path / "log.csv").unlink()
    log = Log(tmp_path, 4, 4, 1)
    log.draw()  # of nothing
    assert log.rows == [] and os.listdir(tmp_path) == ["log.csv"]


# ---------------------------------------------------------------- a folder for one

@pytest.mark.skipif(files.fcntl is None, reason="needs locks")
def test_a_folder_is_held_by_one_process_until_its_end_however_it_ends(tmp_path):
    script = ("import time; from minimedshift.support.files import lock_folder\n"
              f"with lock_folder({str(tmp_path)!r}):\n    print('held', flush=True); time.sleep(100)\n")
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE,
                               cwd=os.path.dirname(os.path.dirname(__file__)))
    assert process.stdout.readline() == b"held\n"
    for _ in range(2):
        with pytest.raises(UserError, match=rf"in use by another run \(process {process.pid}\)"):
            with files.lock_folder(tmp_path):
                pass
    process.kill()
    process.wait()
    assert os.listdir(tmp_path) == [".lock"]
    with files.lock_folder(tmp_path):
        assert (tmp_path / ".lock").read_text() == str(os.getpid())
        with pytest.raises(UserError, match="in use"):
            with files.lock_folder(tmp_path):
                pass
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(files.fcntl is None, reason="needs locks")
def test_a_lock_that_its_owner_has_just_removed_holds_nothing(tmp_path, monkeypatch):
    flock = files.fcntl.flock

    def late(*how):
        (tmp_path / ".lock").unlink()
        flock(*how)

    monkeypatch.setattr(files.fcntl, "flock", late)
    with pytest.raises(UserError, match="in use"):
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
    assert os.listdir(tmp_path) == []


def test_a_folder_that_cannot_be_written_is_a_sentence(tmp_path, monkeypatch):
    def read_only(*_):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(files.os, "open", read_only)
    with pytest.raises(UserError, match=r"cannot be written \(Read-only file system\)"):
        with files.lock_folder(tmp_path):
            pass


# ---------------------------------------------------------------- the cache

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


def test_a_cache_that_cannot_be_written_is_a_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="MINIMEDSHIFT_CACHE"):
        files.cached(tmp_path / "file" / "cache", "x", [1], None)


def test_a_disk_that_fills_while_the_cache_is_built_is_a_sentence_and_leaves_nothing(tmp_path):
    build = lambda folder: np.save(folder / "a.npy", np.zeros(100_000))
    with full_disk(10_000), pytest.raises(UserError, match="the cache .* cannot be written .*MINIMEDSHIFT_CACHE"):
        files.cached(tmp_path, "x", [1], build)
    assert os.listdir(tmp_path) == []


def make(folder):
    np.save(folder / "a.npy", np.arange(1000))
    (folder / "found.json").write_text("{}")


DAMAGE = {
    "truncated": ("a.npy", lambda path: os.truncate(path, 5000)),
    "emptied": ("a.npy", lambda path: os.truncate(path, 0)),
    "junk": ("a.npy", lambda path: path.write_bytes(b"junk" * 2000)),
    "junk of the same size": ("a.npy", lambda path: path.write_bytes(b"j" * path.stat().st_size)),
    "another shape": ("a.npy", lambda path: np.save(path, np.arange(1000).reshape(10, 100))),
    "missing": ("a.npy", os.remove),
    "a folder": ("a.npy", lambda path: (path.unlink(), path.mkdir())),
    "broken JSON": ("found.json", lambda path: path.write_text("{")),
    "no manifest": ("manifest.json", os.remove),
    "broken manifest": ("manifest.json", lambda path: path.write_text("{")),
    "another manifest": ("manifest.json", lambda path: path.write_text("[1]")),
}


@pytest.mark.parametrize("name, damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_folder_is_made_anew_and_told(tmp_path, capsys, name, damage):
    folder = files.cached(tmp_path, "x", [1], make)
    assert files.cached(tmp_path, "x", [1], None) == folder and capsys.readouterr() == ("", "")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    damage(folder / name)
    assert files.cached(tmp_path, "x", [1], make) == folder
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert capsys.readouterr().err == f"{folder} is damaged ({name}): it is made anew\n"
    assert os.listdir(tmp_path) == [folder.name]


def test_unfinished_folders_of_dead_processes_are_removed_after_a_day(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for name, age in (("old", 2 * files.DAY), ("new", 60)):
        folder = tmp_path / f"{UNFINISHED}{dead.pid}-{name}"
        folder.mkdir()
        (folder / "a.npy").touch()
        then = folder.stat().st_mtime - age
        os.utime(folder, (then, then))
    folder = files.cached(tmp_path, "x", [1], make)
    assert set(os.listdir(tmp_path)) == {folder.name, f"{UNFINISHED}{dead.pid}-new"}
