"""Couplings in the plane, where the error itself can be measured: eight Gaussians to two moons.

    python studies/plane.py --seeds 5

The label is the moon. A table of W2^2 between generated and true points, after one Euler step and after 50 of
Heun: mean and standard error over seeds.
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that a study finds the package

from minimedshift import flow, sampler
from minimedshift.assignment import assign
from minimedshift.coupling import PAIRINGS
from minimedshift.model import Shape
from minimedshift.support.command import flag, parse, run
from minimedshift.support.files import write_whole

RUNS = {  # the coupling, and whether it pairs inside each label
    "independent": ("independent", True),
    "label-blind": ("exact", False),
    "per label": ("exact", True),
}


@dataclass(frozen=True)
class Config:
    seeds: int = flag(1, "seeds of each coupling", "study", low=1)
    steps: int = flag(2000, "training steps of 256 points", "study", low=1)
    points: int = flag(4096, "points of each moon that are compared", "study", low=2, high=20000)
    out: str = flag("out/studies", "folder of plane.md", "study")


def eight_gaussians(n, generator):
    """n points around eight centres on a circle of radius 5, each of variance .1: (n, 2)."""
    angle = torch.randint(8, (n,), generator=generator) * (math.pi / 4)
    centre = 5 * torch.stack([angle.cos(), angle.sin()], 1)
    return centre + math.sqrt(.1) * torch.randn(n, 2, generator=generator)


def moons(y, generator):
    """A point on moon y (n,) of two interleaved half circles, with noise of .2, times 3 less 1: (n, 2)."""
    angle = math.pi * torch.rand(len(y), generator=generator)
    upper = torch.stack([angle.cos(), angle.sin()], 1)
    x = torch.where(y[:, None] == 0, upper, torch.tensor([1.0, 0.5]) - upper)
    return 3 * (x + .2 * torch.randn(len(y), 2, generator=generator)) - 1


class Plane(nn.Module):
    """v(x, t, y) in the plane: a small perceptron of x (B, 2), t and one-hot y."""

    def __init__(self, width=128):
        super().__init__()
        self.shape = Shape(num_domains=2)
        layers = []
        for inputs in (5, width, width):
            layers += [nn.Linear(inputs, width), nn.SiLU()]
        self.layers = nn.Sequential(*layers, nn.Linear(width, 2))

    def forward(self, x, t, y):
        return self.layers(torch.cat([x, t[:, None], nn.functional.one_hot(y, 2).to(x)], 1))


def distance(a, b):
    """W2^2 between two samples (n, 2) of one size: the mean squared length of the optimal pairing."""
    cost = torch.cdist(a.double(), b.double()) ** 2
    return cost[torch.arange(len(a)), assign(cost)].mean().item()


def train(name, seed, steps, batch=256):
    """A Plane, trained on pairs of one of RUNS."""
    coupling, inside_labels = RUNS[name]
    torch.manual_seed(seed)
    model, g = Plane(), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        y = torch.arange(batch) % 2  # balanced
        x0, x1, t = eight_gaussians(batch, g), moons(y, g), torch.rand(batch, generator=g)
        index, _, _ = PAIRINGS[coupling](x0, x1, y * inside_labels)
        loss = flow.loss(model, x0[index], x1, y, t).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model


@torch.no_grad()
def errors(model, seed, n):
    """Mean W2^2 over the labels to n true points each, of generated ones and of a second true sample."""
    found = {"1 Euler step": 0.0, "50 Heun steps": 0.0, "floor": 0.0}
    fresh = torch.Generator().manual_seed(10**6 + seed)
    for label in range(2):
        y, v = torch.full((n,), label), sampler.Velocity(model, label)
        truth, again, x0 = moons(y, fresh), moons(y, fresh), eight_gaussians(n, fresh)
        euler = sampler.last(sampler.euler(v, x0, [0.0, 1.0]))
        heun = sampler.last(sampler.heun(v, x0, [i / 50 for i in range(51)]))
        for key, x in zip(found, (euler, heun, again)):
            found[key] += distance(x, truth) / 2
    return found


def show(path, found):
    """Print and write a Markdown table: mean and standard error over seeds of {run: [{column: number}]}."""
    columns = list(next(iter(found.values()))[0])
    lines = [["run", *columns], ["---"] * (1 + len(columns))]
    for name, seeds in found.items():
        lines.append([name])
        for column in columns:
            values = [numbers[column] for numbers in seeds]
            error = np.std(values) / max(1, len(values) - 1)**.5
            lines[-1].append(f"{np.mean(values):.3f}" + f" ± {error:.3f}" * (len(values) > 1))
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    with write_whole(path) as work:
        work.write_text(text)
    print(text)


def main(argv=None):
    c = parse(Config, __doc__, argv)
    found = {}
    for name in RUNS:
        found[name] = [errors(train(name, seed, c.steps), seed, c.points) for seed in range(c.seeds)]
    show(Path(c.out) / "plane.md", found)


if __name__ == "__main__":
    run(main)
