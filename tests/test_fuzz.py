"""One random instance of every quick class of bad input in fuzz.py; and its oracle is not blind."""

import sys

import pytest

import fuzz


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    with fuzz.bench(folder) as base:
        yield folder, base


@pytest.mark.parametrize("name", [name for name, (_, slow) in fuzz.CLASSES.items() if not slow])
def test_bad_input_gives_a_result_or_a_sentence(work, name):
    folder, base = work
    fuzz.instance(name, folder, 0, base)


def test_the_table_is_large():
    assert len(fuzz.CLASSES) >= 60


def explode(argv):
    raise ValueError("a bug")


def chatter(argv):
    print("Traceback (most recent call last):", file=sys.stderr)


def grumble(argv):
    print("images.py:1: RuntimeWarning: invalid value", file=sys.stderr)


def refuse_silently(argv):
    return 2


def fail_otherwise(argv):
    return 1


def stay(argv):
    while True:
        pass


@pytest.mark.parametrize("main, says", [(explode, "traceback: ValueError"), (chatter, "Traceback"),
                                        (grumble, "no sentence of ours"), (refuse_silently, "status=2"),
                                        (fail_otherwise, "status 1"), (stay, "hangs")])
def test_what_no_command_may_do_is_seen(monkeypatch, main, says):
    monkeypatch.setattr(fuzz, "SECONDS", 1)
    with pytest.raises(AssertionError, match=says):
        fuzz.here(main, [])


def test_a_command_that_takes_much_memory_is_seen(monkeypatch):
    monkeypatch.setattr(fuzz, "MEMORY", 2**20)
    with pytest.raises(AssertionError, match="GB"):
        fuzz.here(lambda argv: len(bytearray(fuzz.peak())) * 0, [])


def test_a_result_where_a_refusal_is_due_is_seen_and_the_other_way_round():
    well, badly = fuzz.here(lambda argv: 0, []), fuzz.Outcome(2, "", "error: no\n")
    fuzz.done(well), fuzz.refused(badly, "no")
    for wrong in (lambda: fuzz.done(badly), lambda: fuzz.refused(well), lambda: fuzz.refused(badly, "yes")):
        with pytest.raises(AssertionError):
            wrong()
