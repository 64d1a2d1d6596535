"""What each training step is given: noise, images and labels, paired by the coupling.

All of it is a function of (seed, step): nothing has to be saved, and a resumed run sees what the stopped one
would have seen. A plan may be made over several steps at once (--ot-batch); a resumed run makes it again.
"""

import inspect
import math
import time
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from minimedshift import coupling as plans
from minimedshift.coupling import Plan, Semidiscrete, couple
from minimedshift.flow import TIMES, direct_label, draw_noise, tint
from minimedshift.support.files import cached, digest
from minimedshift.support.log import progress


MOST = 4e9  # bytes of images that the semidiscrete coupling may keep in memory
MOST_OF_A_LABEL = dict(cpu=1e4, mps=1e4, cuda=1e5)  # images; potentials take its square


class Step(NamedTuple):
    """One training step's batch, on the device."""
    x0: torch.Tensor  # (B, C, H, W) noise, or with --x0 image an image of another domain
    x1: torch.Tensor  # (B, C, H, W) image
    y: torch.Tensor   # (B,) int64 label; null_label where it is hidden, for guidance
    t: torch.Tensor   # (B,) in [0, 1)
    e: torch.Tensor   # (B, C, H, W) the bridge's noise
    plan: Plan        # of the whole window of ot_batch steps, for the log
    seconds: float    # what the plan took, for each step it serves


def randomness(seed, step, device="cpu"):
    """A generator that is a function of (seed, step): nothing to save, and resume is exact."""
    return torch.Generator(device).manual_seed((seed * 1_000_003 + step) % 2**63)


def null_label(config, domains):
    """The label of no label; with --x0 image a label is an ordered pair of domains (flow.direct_label)."""
    return domains**2 if config.x0 == "image" else domains


def to_device(x, device):
    """A host tensor on the device, copied while the host goes on."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def draw(dataset, config, step, device):
    """What is random in a step: x0, x1, y and which labels are hidden (both on the host), t, e.

    With the semidiscrete coupling the noise will pick its image, and x1 is empty.
    """
    # different seeds: on a CPU the device's numbers would be the host's again
    host, there = randomness(config.seed, step), randomness(~config.seed, step, device)
    domains = len(dataset.domains)
    y = torch.randint(domains, (config.batch_size,), generator=host)
    hidden = torch.rand(len(y), generator=host) < config.drop_label
    shape = len(y), dataset.channels, dataset.size, dataset.size
    x1 = torch.empty(len(y), 0, device=device)
    if config.coupling != "semidiscrete":
        x1 = to_device(dataset.batch(y, host), device)
    if config.x0 == "image":
        source = (y + torch.randint(1, domains, y.shape, generator=host)) % domains
        x0 = to_device(dataset.batch(source, host), device)
        y = direct_label(source, y, domains)
    else:
        x0 = draw_noise(shape, there, config.colour, device)
    t = TIMES[config.times](torch.rand(len(y), generator=there, device=device))
    e = torch.randn(shape, generator=there, device=device)
    return x0, x1, y, hidden, t, e


def now(device, wait):
    """Seconds of the host's clock; wait: once a GPU has done what it was given."""
    if wait and device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def affordable(config, dataset, device):
    """The config, with plans of a few batches where the semidiscrete coupling would take too much."""
    counts = [len(images) for images in dataset.train_images]
    size = sum(counts) * dataset.channels * dataset.size**2 * 4  # bytes, in float32
    most = sum(counts) if config.coupling_labels == "ignore" else max(counts)
    if config.coupling != "semidiscrete" or size <= MOST and most <= MOST_OF_A_LABEL[device.type]:
        return config
    print(f"the semidiscrete coupling keeps {sum(counts)} images ({size / 1e9:.1f} GB) in memory, and learns "
          f"a potential for each, too much here: taking --coupling exact over {config.ot_batch} batches",
          flush=True)
    return replace(config, coupling="exact")


def batches(dataset, config, device, first=0, dtype=torch.float32, rank=0, processes=1):
    """The Steps `first` to config.steps. dtype is the number format of the network's arithmetic.
    Of each step's batch the part of this process, `rank` of `processes` (support/ranks.py)."""
    n, domains = config.ot_batch, len(dataset.domains)
    keep = int(config.coupling_labels == "keep")  # 0: one label for all, as far as the coupling sees
    eps = 2 * config.sigma**2
    wait = n > 1  # for the GPU, to see what a plan takes: once in n steps, not in every one

    size = config.batch_size // processes
    mine = torch.arange(n * config.batch_size).view(n, processes, size)[:, rank].flatten()  # rows of a window

    def own(*parts):
        return parts if processes == 1 else [x[mine.to(x.device)] for x in parts]

    def window(start):
        steps = [draw(dataset, config, step, device) for step in range(start, start + n)]
        return [torch.cat(parts) for parts in zip(*steps)]

    if config.coupling == "semidiscrete":
        semidiscrete = Semidiscrete(*learn_potentials(dataset, config, device), dtype)
    if config.entropy:
        x0, x1, y = window(0)[:3]
        eps = plans.find_eps(x0, x1, y * keep, config.entropy)
        print(f"sinkhorn: entropy {config.entropy:g} is eps = {eps:.4g}, as of a bridge of sigma "
              f"{math.sqrt(eps / 2):.3g}", flush=True)

    def make():
        for start in range(first - first % n, config.steps, n):
            x0, x1, y, hidden, t, e = window(start)
            begun = now(device, wait)
            if config.coupling == "semidiscrete":  # each noise by itself: no need of the others
                x0, y, hidden, t, e = own(x0, y, hidden, t, e)
                x1, y, plan = semidiscrete.pick(x0, y)
            else:
                plan = couple(config.coupling, x0, x1, y * keep, eps, randomness(config.seed, ~start, device))
                x0, x1, y, hidden, t, e = own(x0[plan.index], x1, y, hidden, t, e)
            seconds = (now(device, wait) - begun) / n
            y = to_device(y, device).masked_fill(to_device(hidden, device), null_label(config, domains))
            for step in range(max(start, first), min(start + n, config.steps)):
                part = slice((step - start) * size, (step - start + 1) * size)
                yield Step(x0[part], x1[part], y[part], t[part], e[part], plan, seconds)

    return make()


def learn_potentials(dataset, config, device):
    """What `Semidiscrete` needs: the training images of each label and their potentials, learned once.

    With --coupling-labels ignore all images are together.
    """
    groups, weights, labels = dataset.train_images, dataset.weights, None
    if weights is None:
        weights = [np.ones(len(images), np.float32) for images in groups]
    if config.coupling_labels == "ignore":
        labels = torch.repeat_interleave(torch.tensor([len(images) for images in groups]))
        groups, weights = [np.concatenate(groups)], [np.concatenate(weights)]
    where = "cpu" if device.type == "mps" else device  # mps lacks its algebra

    def build(folder):
        start = time.time()
        for i, (images, weight) in enumerate(zip(groups, weights)):
            tinted = tint(torch.from_numpy(np.array(images, np.float32)), config.colour)
            g = plans.learn_potentials(tinted, weight, seed=config.seed, device=where)
            np.save(folder / f"{i}.npy", g.cpu().numpy())
            progress(i + 1, len(groups), start, "learning potentials, once", "labels")

    code = inspect.getsource(plans) + inspect.getsource(tint)
    digests = [digest(array) for array in (*groups, *weights)]
    content = [code, torch.__version__, digests, config.colour, config.seed]
    folder = cached(None, "potentials", content, build)
    return groups, [np.load(folder / f"{i}.npy") for i in range(len(groups))], device, labels
