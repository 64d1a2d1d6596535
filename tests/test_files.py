"""The cache: two may build one folder at once, and a cache that cannot be written is a sentence."""

import threading

import pytest

from minimedshift.support import files
from minimedshift.support.command import UserError


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
