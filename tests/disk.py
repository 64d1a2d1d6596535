"""A disk that is full, for tests: without root, on any system that has limits."""

from contextlib import contextmanager

import pytest


@contextmanager
def full_disk(free):
    """In this block no file grows over `free` bytes."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (free, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
