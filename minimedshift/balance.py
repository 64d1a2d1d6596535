"""Balanced populations: weights with which the domains hold the same heads.

A label stands for a population as well as for a physics. Where real heads are oblique and synthetic ones
frontal, a network learns that "real" means oblique, and turns heads. So images without counterpart in other
domains are drawn less often, by importance weights p(head) / p_d(head). The density p_d of heads in domain d
is counted among nearest neighbours. p is their harmonic mean, large only where every domain has heads."""

import inspect
import sys
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F

from minimedshift.support.files import cached, digest
from minimedshift.support.machine import in_batches

SIDE = 8                  # of a thumbnail, in pixels
SHARE, FEWEST = 0.04, 20  # A neighbourhood is 4 % of all images, at least 20.
REFERENCES = 2000         # Neighbours are looked for among so many images of a domain.
FEW = 0.2                 # What a domain has in common with all others is worth a warning below this.


def contrast_thumbnails(images):
    """What heads look like, whatever the domain: (N, C, H, W) in [-1, 1] -> (N, SIDE^2), of unit length.
    z = (x - m) / (s + .03) of a thumbnail x; m and s, mean and deviation of 3x3 pixels, are the domain's."""
    around = lambda z: F.avg_pool2d(z, 3, stride=1, padding=1, count_include_pad=False)
    x = torch.as_tensor(images).float().mean(1, keepdim=True)
    x = F.interpolate(x, (SIDE, SIDE), mode="bilinear", antialias=True)
    m = around(x)
    s = around((x - m).square()).sqrt()
    return F.normalize(((x - m) / (s + .03)).flatten(1))


def in_common(sets, seed=0):
    """How common an image's head is in all domains, beside its own: sets of (N_d, C, H, W) -> (N_d,) float64.
    It is mean_d(1 / n_d)^-1 / n_own. n_d is the share of domain d's images that lie in the neighbourhood of
    an image, n_own that of its own domain's. The mean is 1 where populations are alike, 0 for strangers."""
    draw = np.random.default_rng(seed)
    thumbnails = [in_batches(contrast_thumbnails, torch.as_tensor(images), 1000) for images in sets]
    some = [np.sort(draw.choice(len(z), min(len(z), REFERENCES), replace=False)) for z in thumbnails]
    references = [z[chosen] for z, chosen in zip(thumbnails, some)]
    size = torch.tensor(list(map(len, references)))
    label, references = torch.repeat_interleave(size), torch.cat(references)
    k = min(len(label), max(FEWEST, round(SHARE * len(label))))
    nearest, result = lambda part: torch.cdist(part, references).topk(k, largest=False).indices, []
    for own, z in enumerate(thumbnails):
        near = label[in_batches(nearest, z, 1000)]  # (N, k) domains
        counts = torch.stack([(near == d).sum(1) for d in range(len(sets))], 1)
        n = (counts + k / 400) / size.double()  # (N, D); a little more than counted, so that none is 0
        result.append((1 / (1 / n).mean(1) / n[:, own]).numpy())
    return result


def effective(w):
    """The effective number of images under weights w (N,): (sum w)^2 / sum w^2, N where all are equal."""
    return float(w.sum() ** 2 / (w ** 2).sum())


def balanced(dataset, cache=None):
    """The Dataset with weights, `in_common` with mean 1. Says how many images count, and warns of few."""
    digests = list(map(digest, dataset.train_images))
    content = [inspect.getsource(sys.modules[__name__]), torch.__version__, digests]
    save = lambda folder: np.savez(folder / "in_common.npz", *in_common(dataset.train_images))
    found = list(np.load(cached(cache, "balance", content, save) / "in_common.npz").values())
    counts = [f"{name} {effective(w):.0f} of {len(w)} ({min(w.mean(), 1):.0%} in common)"
              for name, w in zip(dataset.domains, found)]
    print("balanced populations, effective images: " + ", ".join(counts))
    for name, w in zip(dataset.domains, found):
        if w.mean() < FEW:
            print(f"warning: {name} shows little that all other domains show too")
    return replace(dataset, weights=[(w / w.mean()).astype(np.float32) for w in found])
