"""Do all domains share one latent, as the paper says? `python -m minimedshift.latent` asks z, tau = 0 to 1.

    probe      how often a linear probe, trained on other heads, tells the domain of z   shared: chance
    same head  how often the nearest z of another domain is that of the same head        shared: always
A latent that has forgotten everything passes the first test and fails the second. Heads are simulated.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure

from minimedshift import sampler
from minimedshift.phantom import sets
from minimedshift.support import domain
from minimedshift.support.command import UserError, flag, parse, run
from minimedshift.support.files import whole
from minimedshift.support.checkpoint import load_model
from minimedshift.support.machine import in_batches, load, pick_device


@dataclass(frozen=True)
class Config:
    checkpoint: str = flag("out/checkpoint.pt", "trained network; its EMA weights are used", "what")
    out: str = flag("", "picture, a .png file (default: latent.png, beside the checkpoint)", "run")
    device: str = flag("auto", "where to compute", "run", ("auto", "cuda", "mps", "cpu"))


def features(z):
    """What the probe sees of z (N, D, C, H, W): pixels and, for doses, log powers by octave, (N, D, F)."""
    power = torch.fft.fft2(z).abs().square()
    octaves = [power[..., mask].mean((2, 3)).log() for mask in domain.octaves(*z.shape[-2:])]
    parts = [part - part.mean((0, 1)) for part in (z.flatten(2), torch.stack(octaves, 2))]
    return torch.cat([part / part.square().sum(2).mean().sqrt() for part in parts], 2).double()


def probe(x, ridge=1.0):
    """Share of x (N, D, F), N heads in D domains, whose domain a linear probe of other heads tells.

    Ridge regression on one-hot labels Y: scores = x X^T (X X^T + ridge tr(X X^T) / n I)^-1 Y, all centred.
    """
    right, Y = [], torch.eye(x.shape[1], dtype=x.dtype) - 1 / x.shape[1]  # (D, D)
    for train, test in ((x[::2], x[1::2]), (x[1::2], x[::2])):
        X, n = (train - train.mean((0, 1))).flatten(0, 1), train[..., 0].numel()
        gram = X @ X.T + ridge * X.square().sum() / n * torch.eye(n, dtype=x.dtype)
        scores = (test - train.mean((0, 1))) @ X.T @ torch.linalg.solve(gram, Y.repeat(len(train), 1))
        right.append(scores.argmax(2) == torch.arange(x.shape[1]))
    return torch.cat(right).double().mean().item()


def same_head(z):
    """Share of z (N, D, ...) whose nearest neighbour in another domain is the same head, over all pairs."""
    (N, D), flat = z.shape[:2], z.flatten(0, 1).flatten(1).double()
    nearest = torch.cdist(flat, flat).view(N, D, N, D).argmin(2)  # (N, D, D): of each z, in each domain
    right = (nearest == torch.arange(N).view(N, 1, 1))[:, ~torch.eye(D, dtype=torch.bool)]
    return right.double().mean().item()


def main(argv=None):
    c = parse(Config, __doc__, argv)
    path = Path(c.out or Path(c.checkpoint).with_name("latent.png"))
    if path.suffix != ".png" or not path.parent.is_dir():
        raise UserError(f"--out {path}: name a .png file in a folder that exists")
    device = pick_device(c.device)
    model, state = load_model(c.checkpoint, device)
    how, config, size = state["translate"], state["config"], state["image"]["size"]
    if config.get("data") or how["x0"] == "image" or config["valid_heads"] < 2:
        raise UserError(f"{c.checkpoint}: needs a flow from noise, and two simulated validation heads")
    N, D = config["valid_heads"], len(state["domains"])
    pairs = sets.paired_heads(size, N, "valid", config["seed"], decoys=sets.DECOYS)
    columns = [sets.phantom.DOMAINS.index(name) for name in state["domains"]]
    found = {i / 10: None for i in range(11)}  # tau: (domain told, same head)
    for tau in found:
        z = [load(pairs.images[:, column], device) for column in columns]
        if tau < how["end"]:  # from `end` on, z is the image
            leg = tau, how["steps"], how["solver"], how["end"], how["colour"]
            z = [in_batches(lambda x1: sampler.encode(model, x1, y, *leg), z[y]) for y in range(D)]
        z = torch.stack(z, 1).cpu()  # (N, D, C, H, W)
        found[tau] = probe(features(z)), same_head(z)
        print("tau {:.1f}: domain told {:.1%}, same head {:.1%}".format(tau, *found[tau]), flush=True)
    axes = Figure(figsize=(6, 4), layout="constrained").subplots()
    for name, values, chance in zip(("domain told", "same head"), zip(*found.values()), (1 / D, 1 / N)):
        line, = axes.plot(list(found), values, "o-", label=f"{name} (dotted: chance, {chance:.1%})")
        axes.axhline(chance, color=line.get_color(), linestyle=":")
    axes.set(xlabel="tau (1: the image)", ylim=(0, 1.05), title=f"z of {N} simulated validation heads")
    axes.legend(title=f"EMA weights of step {state['step']}")
    with whole(path) as work:
        axes.figure.savefig(work, dpi=110)


if __name__ == "__main__":
    run(main)
