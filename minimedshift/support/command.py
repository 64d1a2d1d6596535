"""What commands share: flags, each made by `flag`, and how they end when a user made a mistake."""

import argparse
import operator
import os
import sys
from dataclasses import field, fields
from functools import partial

import torch

LIMITS = dict(low=(operator.ge, "at least"), high=(operator.le, "at most"),
              above=(operator.gt, "above"), below=(operator.lt, "below"))  # the test, and how it is said


class UserError(ValueError):
    """A user's mistake, told in one sentence that names the file or flag and what to do about it."""


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} (see --help)")


def refuse(wrong, message):
    """Raise UserError(message) if something is wrong."""
    if wrong:
        raise UserError(message)


def flag(default, text, group="options", choices=None, **limits):
    """A dataclass field that is also a command-line flag, of the field's type.
    text, group: for --help ("positional": without a name). choices, limits (see LIMITS): what is allowed."""
    return field(default=default, metadata=dict(text=text, group=group, choices=choices, limits=limits))


def name_of(f):
    """A field of a config as the user types it."""
    return f.name.upper() if f.metadata["group"] == "positional" else "--" + f.name.replace("_", "-")


def parse(config, description, argv=None):
    """A `config` read from flags; a bool is `--name` or `--no-name`. UserError for a wrong value."""
    module = sys.modules["__main__"].__spec__  # None for a script
    layout = partial(argparse.RawDescriptionHelpFormatter, width=110, max_help_position=34)
    parser = Parser(prog=module and f"python -m {module.name}", description=description, allow_abbrev=False,
                    formatter_class=layout)
    groups = {"positional": parser}
    for f in fields(config):
        name, default, choices = name_of(f), f.default, f.metadata["choices"]
        options = dict(default=default, help=f.metadata["text"])
        if f.type is bool:
            default = "yes" if default else "no"
            options["action"] = argparse.BooleanOptionalAction
        else:
            metavar = None if choices else name.split("-")[-1].upper()
            options |= dict(type=f.type, choices=choices, metavar=metavar)
        if f.metadata["group"] == "positional":
            name, options["nargs"] = f.name, "?"
        if default not in (None, ""):
            options["help"] += f" (default: {default})"
        if f.metadata["group"] not in groups:
            groups[f.metadata["group"]] = parser.add_argument_group(f.metadata["group"])
        groups[f.metadata["group"]].add_argument(name, **options)
    c = config(**vars(parser.parse_args(argv)))
    for f in fields(c):
        value, limits, name = getattr(c, f.name), f.metadata["limits"], name_of(f)
        refuse(value == "" and f.default != "", f"{name} is empty: give it a value, or leave it out")
        if value is None or isinstance(value, str):
            continue
        refuse(not abs(value) < 2**31,
               f"{name} {str(value)[:20]} is not allowed: it must be a number below 2^31")
        allowed = " and ".join(f"{LIMITS[which][1]} {limit:g}" for which, limit in limits.items())
        refuse(not all(LIMITS[which][0](value, limit) for which, limit in limits.items()),
               f"{name} {value} is not allowed: it must be {allowed}")
    return c


def run(main):
    """Run a command and exit: 0 done, 2 a user's mistake or a machine too small, 130 interrupted."""
    # a name of a file can hold any bytes; a pipe gets each line at once
    sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)
    try:
        sys.exit(main())
    except UserError as error:
        status, says = 2, f"error: {error}"
    except OSError as error:  # no right to read a file, or a full disk
        status, says = 2, f"error: {error.filename or 'this machine'}: {error.strerror or error}"
    except torch.OutOfMemoryError:
        status, says = 2, "error: too little memory on the GPU: try a smaller --batch-size, or --preset cpu"
    except KeyboardInterrupt:
        status, says = 130, "\ninterrupted"
    if os.environ.get("RANK", "0") == "0":  # one of several processes (ranks.py) speaks
        print(says, file=sys.stderr)
    sys.exit(status)
