"""python -m minimedshift.phantom FILE.png: draw each domain's own heads, and one head in all domains."""

import sys

import matplotlib.pyplot as plt

from minimedshift.phantom import DOMAINS, Head, render
from minimedshift.support.command import UserError, run
from minimedshift.support.files import write_whole


def main(argv=None):
    """Draw the figure. Raises UserError for a missing file name, or one that cannot be written."""
    argv = sys.argv[1:] if argv is None else argv
    if argv in (["-h"], ["--help"]):
        print(__doc__)
        return 0
    if len(argv) != 1 or argv[0].startswith("-"):
        raise UserError("usage: python -m minimedshift.phantom FILE.png")
    own = [Head(seed, domain) for seed, domain in zip((2, 4, 1, 1, 4), DOMAINS)]
    rows = [("a head of each\ndomain's own", own), ("one head\nin all domains", [Head(37)] * 5)]
    figure, axes = plt.subplots(2, 5, figsize=(12.8, 5.4), layout="constrained")
    for line, (name, heads) in zip(axes, rows):
        line[0].set_ylabel(name)
        for ax, domain, head in zip(line, DOMAINS, heads):
            ax.imshow(render(head, domain, 256)[0].numpy(), cmap="gray", vmin=-1, vmax=1)
            ax.set(xticks=[], yticks=[], title=domain if heads is own else "")
    figure.supxlabel("Every picture is simulated, those of the real domains too.", fontsize=10)
    try:
        with write_whole(argv[0]) as work:
            figure.savefig(work, dpi=100)
    except UserError:
        raise
    except ValueError as error:  # of an unknown ending
        raise UserError(f"{argv[0]} cannot be written: {error}") from None
    print(f"{argv[0]} written")
    return 0


if __name__ == "__main__":
    run(main)
