"""What a flag may be stands where the flag is."""

from dataclasses import dataclass

import pytest

from minimedshift.support.command import UserError, flag, parse


@dataclass(frozen=True)
class Config:
    count: int = flag(2, "a number", low=1)
    share: float = flag(None, "a share", low=0, below=1)
    width: float = flag(0.5, "a width", above=0, high=2)


@pytest.mark.parametrize("argv", ["", "--count 1", "--share 0", "--share .99", "--width 2", "--width 1e-9"])
def test_a_number_inside_its_limits_is_taken(argv):
    assert isinstance(parse(Config, "", argv.split()), Config)


@pytest.mark.parametrize("argv, says", [
    (["--count", "0"], "--count 0 is not allowed: it must be at least 1"),
    (["--share", "1"], "it must be at least 0 and below 1"),
    (["--share", "-0.1"], "--share -0.1"),
    (["--share", "nan"], "--share nan"),
    (["--width", "0"], "it must be above 0 and at most 2"),
    (["--width", "2.1"], "--width 2.1"),
    (["--width", "nan"], "--width nan"),
    (["--count", "1.5"], "--count"),
    (["--counts", "1"], "--counts"),
])
def test_a_number_outside_is_refused_in_one_sentence(argv, says):
    with pytest.raises(UserError) as error:
        parse(Config, "", argv)
    assert says in str(error.value) and "\n" not in str(error.value)
