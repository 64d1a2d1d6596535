"""python -m minimedshift.phantom FILE.png: draw each domain's own heads, and one head in all domains."""

import dataclasses

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from minimedshift.phantom import DOMAINS, Head, render
from minimedshift.support.command import UserError, flag, parse, run


@dataclasses.dataclass(frozen=True)
class Config:
    file: str = flag("phantom.png", "where to draw", "positional")


def main(argv=None):
    file = parse(Config, __doc__, argv).file
    own = [Head(seed, domain) for seed, domain in zip((2, 4, 1, 1, 4), DOMAINS)]
    rows = [("a head of each\ndomain's own", own), ("one head\nin all domains", [Head(37)] * 5)]
    figure, axes = plt.subplots(2, 5, figsize=(12.8, 5.4), layout="constrained")
    for line, (title, heads) in zip(axes, rows):
        line[0].set_ylabel(title)
        for ax, domain, head in zip(line, DOMAINS, heads):
            ax.imshow(render(head, domain, 256)[0], cmap="gray", vmin=-1, vmax=1)
            ax.set(xticks=[], yticks=[])
    for ax, domain in zip(axes[0], DOMAINS):
        ax.set_title(domain)
    figure.supxlabel("Every picture is simulated, those of the real domains too.", fontsize=10)
    try:
        figure.savefig(file, dpi=100, pil_kwargs=dict(optimize=True))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be written: {error}") from None
    print(f"{file} written")


if __name__ == "__main__":
    run(main)
