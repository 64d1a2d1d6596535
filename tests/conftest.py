"""Tests run on the CPU, whatever this machine has, unless they are marked gpu: their processes too.

Slow tests run the most valuable first. `.ci/run` gives them the minutes that are left: what is not reached by
then is skipped, and named in the last lines.
"""

import functools
import os
import signal
import time

import pytest
import torch

MINUTES = float(os.environ.get("MINIMEDSHIFT_SLOW_MINUTES", 0))  # 0: as long as it takes
END = time.monotonic() + 60 * MINUTES
FIRST = ("test_ranks", "test_forks", "test_notebooks", "test_pretend", "test_train")  # of the slow tests
skipped = []  # names of tests that there was no time for


@pytest.fixture(autouse=True)
def only_gpu_tests_see_a_gpu(request, monkeypatch):
    if not request.node.get_closest_marker("gpu"):
        none = functools.cache(lambda: False)  # cached, as torch's own: its compiler looks at what is wrapped
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        monkeypatch.setattr(torch.cuda, "is_available", none)
        monkeypatch.setattr(torch.backends.mps, "is_available", none)


def pytest_collection_modifyitems(items):
    def place(item):
        slow, name = item.get_closest_marker("slow"), item.module.__name__
        return bool(slow), FIRST.index(name) if slow and name in FIRST else len(FIRST) * bool(slow)

    items.sort(key=place)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item):
    return (yield from within_time(item))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    return (yield from within_time(item))


def within_time(item):
    """The hook below it, ended as a skipped test when the minutes are over."""
    if not MINUTES or not item.get_closest_marker("slow"):
        return (yield)

    def over(*_):
        skipped.append(item.nodeid)
        pytest.skip("no time left")

    left = END - time.monotonic()
    if left <= 0:
        over()
    signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, left)
    try:
        return (yield)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def pytest_terminal_summary(terminalreporter):
    if skipped:
        terminalreporter.line(f"no time left for {len(skipped)} slow tests: {', '.join(skipped)}")
