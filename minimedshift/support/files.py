"""Files written whole or not at all, a folder that one run has alone, and the cache: folders made once."""

import hashlib
import json
import os
import tempfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from minimedshift.support.command import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


@contextmanager
def explain_os_error(path, does="cannot be written", advice=""):
    """An OSError in this block becomes a sentence: what `path` does not do, why, and what to do about it."""
    try:
        yield
    except OSError as error:
        why = error.strerror or f"{error}: is the disk full?"
        raise UserError(f"{path} {does} ({why}){advice}") from None


@contextmanager
def write_whole(path):
    """A hidden name beside `path` to write to, which replaces it at the end: the file is whole or not there.
    The folder is made. What a killed process leaves under the hidden name is written over the next time.
    Raises UserError if the file cannot be written."""
    path = Path(path)
    work = path.with_name(f".unfinished-{path.name}")
    with explain_os_error(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield work
            with open(work, "r+b") as file:
                os.fsync(file.fileno())
            os.replace(work, path)
        except BaseException:
            work.unlink(missing_ok=True)
            raise


def write_json(path, values):
    """Write a dict as JSON, whole or not at all."""
    with write_whole(path) as work:
        work.write_text(json.dumps(values, indent=1))


def digest(array):
    """A hash of an array's bytes, for a cache's key."""
    return hashlib.sha256(np.ascontiguousarray(array)).hexdigest()


@contextmanager
def lock_folder(folder):
    """In this block no other process has the folder, which is made. Raises UserError if one has it already.
    The system frees it however a process ends, by kill -9 too. Without fcntl (Windows) nobody is refused."""
    with explain_os_error(folder, "cannot be made"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        file = open(Path(folder) / ".lock", "w")
    with file:
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder} is in use by another run: wait for it, or choose another") from None
        except OSError:  # a file system without locks: nobody is refused
            pass
        yield


def cached(root, name, content, make):
    """The folder root/name-KEY, made by make(folder) unless it is there. root: None for the usual cache.
    KEY is a hash of `content`, which is all that determines the folder. It is made under another name and
    renamed last, so two processes may make it at once. Raises UserError if the cache cannot be written."""
    usual = os.path.expanduser("~/.cache/minimedshift").removeprefix("~/")  # without a home: in this folder
    root = Path(root or os.environ.get("MINIMEDSHIFT_CACHE") or usual)
    final = root / f"{name}-{hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]}"
    with explain_os_error(f"the cache {root}", advice=": set MINIMEDSHIFT_CACHE to a folder that can"):
        if final.is_dir():
            return final
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory("", ".unfinished-", root, ignore_cleanup_errors=True) as work:
            try:
                make(Path(work))
                os.rename(work, final)
            except OSError:
                if not final.is_dir():  # else another process was first, with the same bytes
                    raise
    return final
