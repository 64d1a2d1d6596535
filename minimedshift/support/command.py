"""What every command shares: its flags, how its files are written, and how it ends when a user made a mistake."""

import argparse
import os
import sys
from contextlib import contextmanager
from dataclasses import field, fields
from pathlib import Path

import torch


class UserError(ValueError):
    """A user's mistake, told in one sentence that names the file or flag and what to do about it."""


def flag(default, text, group="options", choices=None, kind=None, low=None, high=None, above=None, below=None):
    """A dataclass field that is also a command-line flag.

    text, group: for --help. choices: allowed values. kind: its type, if not the default's. What a number may be:
    at least `low`, at most `high`, more than `above`, less than `below`.
    """
    limits = dict(low=low, high=high, above=above, below=below)
    return field(default=default, metadata=dict(text=text, group=group, choices=choices, kind=kind, limits=limits))


LIMITS = {  # name -> (the test, how it is said)
    "low": (lambda value, limit: value >= limit, "at least"),
    "high": (lambda value, limit: value <= limit, "at most"),
    "above": (lambda value, limit: value > limit, "above"),
    "below": (lambda value, limit: value < limit, "below"),
}


def check(config):
    """The config, if every number lies where its flag allows it. Raises UserError for the first that does not; NaN never does."""
    for f in fields(config):
        value = getattr(config, f.name)
        limits = {name: limit for name, limit in f.metadata["limits"].items() if limit is not None}
        if value is None or all(LIMITS[name][0](value, limit) for name, limit in limits.items()):
            continue
        allowed = " and ".join(f"{LIMITS[name][1]} {limit:g}" for name, limit in limits.items())
        raise UserError(f"--{f.name.replace('_', '-')} {value} is not allowed: it must be {allowed}")
    return config


def parse(config, description, argv=None):
    """Read `--name value` flags into the frozen dataclass `config` and check them; a wrong flag ends in one sentence, exit status 2.

    Every field made by `flag` is one flag. Types follow the default: a bool field is a switch (`--name`, `--no-name`),
    an int is accepted where a float is meant, fields listed first without a default group are optional positionals.
    """
    module = sys.modules["__main__"].__spec__
    parser = argparse.ArgumentParser(prog=f"python -m {module.name}" if module else None, description=description, allow_abbrev=False,
                                     formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, width=110, max_help_position=34))
    parser.error = lambda message: (_ for _ in ()).throw(UserError(f"{message} (see --help)"))
    groups = {}
    for f in fields(config):
        m = f.metadata
        kind = m["kind"] or (str if f.default is None else type(f.default))
        shown = "" if f.default in (None, "") else f" (default: {('no', 'yes')[f.default] if kind is bool else f.default})"
        options = dict(help=m["text"] + shown, default=f.default)
        if m["group"] == "positional":
            parser.add_argument(f.name, nargs="?", metavar=f.name.upper(), **options)
            continue
        group = groups.setdefault(m["group"], parser.add_argument_group(m["group"]))
        name = "--" + f.name.replace("_", "-")
        if kind is bool:
            group.add_argument(name, action=argparse.BooleanOptionalAction, **options)
        else:
            group.add_argument(name, type=kind, choices=m["choices"], metavar=f.name.upper().split("_")[-1] if not m["choices"] else None, **options)
    return check(config(**vars(parser.parse_args(argv))))


@contextmanager
def whole(path):
    """A name beside `path` to write to; once the block is done the file takes its place, so that `path` is written whole or not at all."""
    path = Path(path)
    work = path.with_name(f".{path.stem}-{os.getpid()}{path.suffix}")
    try:
        yield work
        os.replace(work, path)
    finally:
        work.unlink(missing_ok=True)


def run(main):
    """Run a command: 0 done, 2 a user's mistake or a GPU too small (one sentence on stderr), 130 interrupted."""
    try:
        sys.exit(main())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except torch.OutOfMemoryError:
        print("error: the GPU has too little memory for this; fewer images at once (--batch-size), or in training the small network (--preset cpu), may fit", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
