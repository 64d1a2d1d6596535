"""Files written whole or not at all, folders that one run has alone, and the cache: folders made once.

What is not finished yet has a hidden name, `.minimedshift-PROCESS-...`. What a killed process left under such
a name is never taken for a result, and `clear_unfinished` removes it.
"""

import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from minimedshift.support.command import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

UNFINISHED = ".minimedshift-"  # what begins so is ours, and not finished
DAY = 24 * 60 * 60  # seconds
MANIFEST = "manifest.json"
HEAD = 2**20  # bytes of a file that the manifest has a digest of


# ---------------------------------------------------------------- files

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
    """A name beside `path` to write to, which replaces it in the end: it is written whole or not at all.

    Raises UserError if the file cannot be written.
    """
    path = Path(path)
    work = path.with_name(f"{UNFINISHED}{os.getpid()}-{path.name}")
    with explain_os_error(path):
        try:
            yield work
            os.replace(work, path)
        finally:
            work.unlink(missing_ok=True)


def write_json(path, values):
    """Write a dict as JSON, whole or not at all."""
    with write_whole(path) as work:
        work.write_text(json.dumps(values, indent=1))


def digest(array):
    """A hash of an array's bytes, for a cache's key."""
    return hashlib.sha256(np.ascontiguousarray(array)).hexdigest()


def clear_unfinished(folder, age=0):
    """Remove from a folder what killed processes left there unfinished, if it is older than `age` seconds."""
    for path in Path(folder).glob(f"{UNFINISHED}*"):
        try:
            dead = not runs(int(path.name.removeprefix(UNFINISHED).partition("-")[0]))
            if not dead or time.time() - path.stat().st_mtime < age:
                continue
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        except (OSError, ValueError):  # another process was first, or we may not: it does no harm
            pass


def runs(process):
    """Whether there is a process of this number. Windows does not tell: there everything runs."""
    if os.name != "posix":
        return True
    try:
        os.kill(process, 0)  # sends nothing
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        pass
    return True


# ---------------------------------------------------------------- folders

@contextmanager
def lock_folder(folder):
    """In this block no other process has the folder. Raises UserError if one has it already.

    The system frees it however a process ends, by kill -9 too. Without fcntl (Windows) nobody is refused.
    """
    if fcntl is None:
        yield
        return
    path = Path(folder) / ".lock"
    with explain_os_error(folder, "cannot be made"):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if not held(file, path):
            owner = os.read(file, 20).decode() or "unknown"
            raise UserError(f"{folder} is in use by another run (process {owner}): "
                            "wait for its end, or choose another folder")
        try:
            with explain_os_error(folder):
                os.ftruncate(file, 0)
                os.write(file, str(os.getpid()).encode())
            yield
        finally:
            path.unlink(missing_ok=True)
    finally:
        os.close(file)


def held(file, path):
    """Whether this process now holds the lock of an open file that is still at `path`."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks: nobody is refused
        return True
    return path.exists() and os.path.samestat(os.fstat(file), path.stat())  # else its owner has just ended


def cached(root, name, content, build):
    """The folder root/name-KEY, made by build(folder) unless it is there.

    KEY is a hash of `content`, which is all that determines the folder. It is built under another name and
    renamed last, so two processes may build it at once. One that was damaged since then is made anew.
    Raises UserError if the cache cannot be written.
    """
    root = Path(root or os.environ.get("MINIMEDSHIFT_CACHE") or Path.home() / ".cache" / "minimedshift")
    key = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
    final = root / f"{name}-{key}"
    with explain_os_error(f"the cache {root}", advice=": set MINIMEDSHIFT_CACHE to a folder that can"):
        if final.is_dir():
            damage = damaged(final)
            if not damage:
                return final
            print(f"{final} is damaged ({damage}): it is made anew", file=sys.stderr)
            shutil.rmtree(final, ignore_errors=True)
        root.mkdir(parents=True, exist_ok=True)
        clear_unfinished(root, DAY)  # a long time: on a shared disk the process may run on another machine
        work = Path(tempfile.mkdtemp(prefix=f"{UNFINISHED}{os.getpid()}-", dir=root))
        try:
            build(work)
            made = {path.name: fingerprint(path) for path in sorted(work.iterdir())}
            (work / MANIFEST).write_text(json.dumps(made))
            work.rename(final)
        except OSError:
            if not final.is_dir() or damaged(final):  # else another process was first, with the same bytes
                raise
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return final


def fingerprint(path):
    """A file's size, and a digest of how it begins."""
    with open(path, "rb") as file:
        return [path.stat().st_size, hashlib.sha256(file.read(HEAD)).hexdigest()]


def damaged(folder):
    """What is wrong with a folder of the cache: the name of a file that is not as it was made, or None."""
    try:
        for name, made in json.loads((folder / MANIFEST).read_text()).items():
            if not (folder / name).is_file() or fingerprint(folder / name) != made:
                return name
    except (OSError, ValueError, AttributeError):
        return MANIFEST
    return None
