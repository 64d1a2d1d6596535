"""Do all domains share one latent z, as the paper says?

    python studies/latent.py --checkpoint out/checkpoint.pt

Were z shared, a probe would tell its domain by chance alone, and the nearest z of another domain would be
that of the same head. A z that has forgotten everything passes the first test only. A table of both, tau 0
to 1.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that a study finds the package

from minimedshift import classify, phantom, sampler
from minimedshift.model import load_model
from minimedshift.phantom import sets
from minimedshift.sizes import shrunk
from minimedshift.support.command import flag, parse, refuse, run
from minimedshift.support.machine import in_batches, pick_device, to_float
from studies.plane import show


@dataclass(frozen=True)
class Config:
    checkpoint: str = flag("out/checkpoint.pt", "trained network; its EMA weights are used", "study")
    heads: int = flag(64, "validation heads, each in all domains", "study", low=2, high=10**4)
    out: str = flag("out/studies", "folder of latent.md", "study")
    device: str = flag("auto", "where to compute", "study", ("auto", "cuda", "mps", "cpu"))


def probe_inputs(z):
    """What the probe sees of z (N, D, C, H, W): pixels and, for doses, log powers by octave, (N, D, F)."""
    power = torch.fft.fft2(z).abs().square()
    octaves = [power[..., mask].mean((2, 3)).log() for mask in classify.octaves(*z.shape[-2:])]
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
    device = pick_device(c.device)
    model, state = load_model(c.checkpoint, device)
    how, domains = state["translate"], state["domains"]
    simulated = set(domains) <= set(phantom.DOMAINS)
    refuse(not simulated, f"{c.checkpoint}: its domains are not the simulated ones")
    pairs = sets.paired_heads(state["image"]["size"], c.heads, "valid", state["config"]["seed"])
    images = [to_float(pairs.images[:, phantom.DOMAINS.index(name)], device) for name in domains]
    images = [shrunk(x, how.get("size"), model.stride) for x in images]
    found = {"chance": [{"domain told": 1 / len(domains), "same head": 1 / c.heads}]}
    for tau in [i / 10 for i in range(11)]:
        z, leg = images, (tau, how["steps"], how["solver"], how["t_image"])
        if tau < how["t_image"]:  # from t_image on, z is the image
            z = [in_batches(lambda x1: sampler.encode(model, x1, y, *leg), x) for y, x in enumerate(images)]
        z = torch.stack(z, 1).cpu()  # (N, D, C, H, W)
        found[f"tau {tau:.1f}"] = [{"domain told": probe(probe_inputs(z)), "same head": same_head(z)}]
    show(Path(c.out) / "latent.md", found)


if __name__ == "__main__":
    run(main)
