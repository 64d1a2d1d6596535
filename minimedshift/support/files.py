"""Files written whole or not at all, and the cache: folders that are made once and found again."""

import hashlib
import json
import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from minimedshift.support.command import UserError


@contextmanager
def whole(path):
    """A name beside `path` to write to, which replaces it in the end: it is written whole or not at all."""
    path = Path(path)
    work = path.with_name(f".{path.stem}-{os.getpid()}{path.suffix}")
    try:
        yield work
        os.replace(work, path)
    finally:
        work.unlink(missing_ok=True)


def write_json(path, values):
    """Write a dict as JSON, whole or not at all."""
    with whole(path) as work:
        work.write_text(json.dumps(values, indent=1))


def digest(array):
    """A hash of an array's bytes, for a cache's key."""
    return hashlib.sha256(np.ascontiguousarray(array)).hexdigest()


def cached(root, name, content, build):
    """The folder root/name-KEY, made by build(folder) unless it is there.

    KEY is a hash of `content`, which is all that determines the folder. It is built under another name and
    renamed last, so two processes may build it at once. Raises UserError if the cache cannot be written.
    """
    root = Path(root or os.environ.get("MINIMEDSHIFT_CACHE") or Path.home() / ".cache" / "minimedshift")
    key = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
    final = root / f"{name}-{key}"
    if final.is_dir():
        return final
    try:
        root.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=".building-", dir=root))
    except OSError as error:
        raise UserError(f"the cache {root} cannot be written ({error.strerror}): "
                        "set MINIMEDSHIFT_CACHE to a folder that can") from None
    try:
        build(work)
        work.rename(final)
    except OSError:
        if not final.is_dir():  # else another process was first, with the same bytes
            raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return final
