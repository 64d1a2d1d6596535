"""Do all domains share one latent, as the paper says? `python -m minimedshift.latent` asks z, tau = 0 to 1.

    probe      how often a linear probe, trained on other heads, tells the domain of z   shared: chance
    same head  how often the nearest z of another domain is that of the same head        shared: always
A latent that has forgotten everything passes the first test and fails the second. Heads are simulated.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure

from . import UserError, evaluate, flag, parse, run, sampler, simulated, whole
from .checkpoint import load_model
from .machine import pick_device

TAUS = [i / 10 for i in range(11)]


@dataclass(frozen=True)
class Config:
    checkpoint: str = flag("out/checkpoint.pt", "trained network; its EMA weights are used", "what")
    out: str = flag("", "the picture, a .png file (default: latent.png, beside the checkpoint)", "run")
    device: str = flag("auto", "where to compute", "run", ("auto", "cuda", "mps", "cpu"))


def probe(z, ridge=0.01):
    """Share of z (N, D, F), N heads in D domains, whose domain a linear probe of the other half tells.

    Ridge regression on one-hot labels Y: scores = (z - m) Z^T (Z Z^T + ridge tr(Z Z^T) / n I)^-1 Y, centred.
    """
    (_, D, F), right = z.shape, []
    for half in (0, 1):
        train, test = z[half::2].reshape(-1, F).double(), z[1 - half::2].reshape(-1, F).double()
        mean, n = train.mean(0), len(train)
        Y = torch.eye(D, dtype=torch.float64).repeat(n // D, 1) - 1 / D
        gram = (train - mean) @ (train - mean).T
        gram += ridge * gram.trace() / n * torch.eye(n, dtype=torch.float64)
        scores = (test - mean) @ (train - mean).T @ torch.linalg.solve(gram, Y)
        right.append(scores.argmax(1) == torch.arange(D).repeat(len(test) // D))
    return torch.cat(right).double().mean().item()


def same_head(z):
    """Share of z (N, D, F) whose nearest neighbour in another domain is the same head, over all pairs."""
    (N, D, _), right = z.shape, []
    for s in range(D):
        for t in range(D):
            if s != t:
                right.append(torch.cdist(z[:, s].double(), z[:, t].double()).argmin(1) == torch.arange(N))
    return torch.cat(right).double().mean().item()


def main(argv=None):
    c = parse(Config, __doc__, argv)
    path = Path(c.out or Path(c.checkpoint).with_name("latent.png"))
    if path.suffix != ".png" or not path.parent.is_dir():
        raise UserError(f"--out {path}: name a .png file in a folder that exists")
    device = pick_device(c.device)
    model, state = load_model(c.checkpoint, device)
    how, config = state["translate"], state["config"]
    if config.get("data") or how["x0"] == "image" or config["valid_heads"] < 2:
        raise UserError(f"{c.checkpoint}: needs a flow from noise, and two simulated validation heads")
    D, N, size = len(state["domains"]), config["valid_heads"], state["image"]["size"]
    images = simulated.paired_heads(size, N, "valid", config["seed"], decoys=simulated.DECOYS).images
    images = images[:, [simulated.phantom.DOMAINS.index(name) for name in state["domains"]]]
    found = []
    for tau in TAUS:
        z = [evaluate.load(images[:, y], device) for y in range(D)]
        if tau < how["end"]:  # from `end` on, z is the image
            leg = tau, how["steps"], how["solver"], how["end"], how["colour"]
            z = [evaluate.in_batches(lambda x1: sampler.encode(model, x1, y, *leg), z[y]) for y in range(D)]
        z = torch.stack(z, 1).flatten(2).cpu()  # (N, D, C H W)
        found.append((probe(z), same_head(z)))
        print("tau {:.1f}: domain told {:.1%}, same head {:.1%}".format(tau, *found[-1]), flush=True)
    axes = Figure(figsize=(6, 4), layout="constrained").subplots()
    for name, values, chance in zip(("probe tells the domain", "same head"), zip(*found), (1 / D, 1 / N)):
        line, = axes.plot(TAUS, values, "o-", label=f"{name} (dotted: chance, {chance:.1%})")
        axes.axhline(chance, color=line.get_color(), linestyle=":")
    axes.set(xlabel="tau (1: the image)", ylim=(0, 1.05), title=f"z of {N} simulated validation heads")
    axes.legend()
    with whole(path) as work:
        axes.figure.savefig(work, dpi=110)
    print(f"{path}: {N} simulated validation heads, EMA weights of step {state['step']}")


if __name__ == "__main__":
    run(main)
