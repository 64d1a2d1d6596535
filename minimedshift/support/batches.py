"""What each training step is given: noise, images and labels, paired by the coupling.

All of it is a function of (seed, step): nothing has to be saved, and a resumed run sees what the stopped one
would have seen. A plan may be made over several steps at once (--ot-batch); a resumed run makes it again.
"""

import hashlib
import inspect
import math
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch

from minimedshift import coupling as plans
from minimedshift import data
from minimedshift.coupling import Semidiscrete, couple
from minimedshift.flow import direct_label, draw_noise, tint


class Step(NamedTuple):
    """One training step's batch, on the device."""
    x0: torch.Tensor  # (B, C, H, W) noise, or with --x0 image an image of another domain
    x1: torch.Tensor  # (B, C, H, W) image
    y: torch.Tensor   # (B,) int64 label; null_label where it is hidden, for guidance
    t: torch.Tensor   # (B,) in [0, 1)
    e: torch.Tensor   # (B, C, H, W) the bridge's noise
    plan: Any         # the coupling's Plan
    seconds: Any      # a function: what the plan took, for each step it serves


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
    # two streams, on a CPU too
    host, there = randomness(config.seed, step), randomness(~config.seed, step, device)
    domains = len(dataset.domains)
    y = torch.randint(domains, (config.batch_size,), generator=host)
    hidden = torch.rand(len(y), generator=host) < config.drop_label
    shape = len(y), dataset.channels, dataset.size, dataset.size
    if config.coupling == "semidiscrete":
        x1 = torch.empty(len(y), 0, device=device)
    else:
        x1 = to_device(dataset.batch(y, host), device)
    if config.x0 == "image":
        source = (y + torch.randint(1, domains, y.shape, generator=host)) % domains
        x0 = to_device(dataset.batch(source, host), device)
        y = direct_label(source, y, domains)
    else:
        x0 = draw_noise(shape, there, config.colour, device)
    t = torch.rand(len(y), generator=there, device=device)
    e = torch.randn(shape, generator=there, device=device)
    return x0, x1, y, hidden, t, e


def batches(dataset, config, device, first=0, dtype=torch.float32):
    """The Steps `first` to config.steps. dtype is the number format of the network's arithmetic.

    On CUDA each is made a step ahead, in a thread and on a stream of its own.
    """
    semidiscrete = None
    if config.coupling == "semidiscrete":
        semidiscrete = Semidiscrete(*learn_potentials(dataset, config, device), dtype)
    keep = int(config.coupling_labels == "keep")  # 0: one label for all, as far as the coupling sees
    eps = 2 * config.sigma**2

    def window(start):
        steps = [draw(dataset, config, step, device) for step in range(start, start + config.ot_batch)]
        return [torch.cat(parts) for parts in zip(*steps)]

    if config.entropy:
        x0, x1, y = window(0)[:3]
        eps = plans.find_eps(x0, x1, y * keep, config.entropy)
        print(f"sinkhorn: entropy {config.entropy:g} is eps = {eps:.4g}, as of a bridge of sigma "
              f"{math.sqrt(eps / 2):.3g}", flush=True)

    def make():
        for step in range(first, config.steps):
            k = step % config.ot_batch
            if k == 0 or step == first:
                x0, x1, y, hidden, t, e = window(step - k)
                watch = Stopwatch(device)
                if semidiscrete:
                    x1, y, plan = semidiscrete.pick(x0, y)
                else:
                    generator = randomness(config.seed, k - step - 1, device)  # one seed for each window
                    plan = couple(config.coupling, x0, x1, y * keep, eps, generator)
                    x0 = x0[plan.index]
                seconds = watch.stop(config.ot_batch)
                hidden = to_device(hidden, device)
                y = to_device(y, device).masked_fill(hidden, null_label(config, len(dataset.domains)))
            part = slice(k * config.batch_size, (k + 1) * config.batch_size)
            yield Step(x0[part], x1[part], y[part], t[part], e[part], plan, seconds)

    return ahead(make(), device) if device.type == "cuda" else make()


def learn_potentials(dataset, config, device):
    """What `Semidiscrete` needs: the training images of each label and their potentials, learned once.

    With --coupling-labels ignore all images are together. Says how evenly images are picked.
    """
    groups, weights = dataset.train, dataset.weights
    if weights is None:
        weights = [np.ones(len(images), np.float32) for images in groups]
    if config.coupling_labels == "ignore":
        groups, weights = [np.concatenate(groups)], [np.concatenate(weights)]
    digest = [hashlib.sha256(np.ascontiguousarray(images)).hexdigest() for images in groups]
    weight_digest = [hashlib.sha256(w).hexdigest() for w in weights]
    where = "cpu" if device.type == "mps" else device  # mps lacks its algebra

    def build(folder):
        start = time.time()
        for i, images in enumerate(groups):
            tinted = tint(torch.from_numpy(np.array(images, np.float32)), config.colour)
            g, share = plans.learn_potentials(tinted, weights[i], seed=config.seed, device=where)
            np.save(folder / f"{i}.npy", torch.stack([g, share]).cpu().numpy())
            data.progress(i + 1, len(groups), start, "learning potentials, once", "labels")

    content = [inspect.getsource(plans), inspect.getsource(tint), torch.__version__, digest, weight_digest,
               config.colour, config.seed]
    folder = data.cached(None, "potentials", content, build)
    found = [np.load(folder / f"{i}.npy") for i in range(len(groups))]
    potentials = [g for g, _ in found]
    share = np.concatenate([share for _, share in found])
    # the variance of a count over its mean w TRIALS
    chance = np.mean(1 / np.concatenate(weights)) / plans.TRIALS
    print("semidiscrete: how often images are picked in a test, over how often they should be, is 1 with a "
          f"standard deviation of {share.std():.2f}; chance alone makes {chance**.5:.2f}", flush=True)
    labels = None
    if config.coupling_labels != "keep":
        labels = torch.repeat_interleave(torch.tensor([len(images) for images in dataset.train]))
    return groups, potentials, device, labels


class Stopwatch:
    """Seconds from now to `stop`, over a number of steps, by the host's clock or the GPU's: a function."""

    def __init__(self, device):
        self.stream = torch.cuda.current_stream() if device.type == "cuda" else None
        if self.stream:
            self.start = self.stream.record_event(torch.cuda.Event(enable_timing=True))
        else:
            self.start = time.perf_counter()

    def stop(self, steps):
        if not self.stream:
            seconds = (time.perf_counter() - self.start) / steps
            return lambda: seconds
        end = self.stream.record_event(torch.cuda.Event(enable_timing=True))

        def measured():
            end.synchronize()
            return self.start.elapsed_time(end) / 1000 / steps

        return measured


def ahead(items, device):
    """The same items, each made in a thread (CUDA: on its own stream) while the one before is in use."""
    cuda = device.type == "cuda"
    stream = torch.cuda.Stream() if cuda else None
    if cuda:
        stream.wait_stream(torch.cuda.current_stream())  # for what the items are made of

    def make():
        with torch.cuda.stream(stream):
            item = next(items, None)
            return item, stream.record_event() if cuda else None

    with ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(make)
        while (made := waiting.result())[0] is not None:
            item, ready = made
            waiting = thread.submit(make)
            if cuda:
                torch.cuda.current_stream().wait_event(ready)
                for z in (*item[:5], *item.plan):
                    z.record_stream(torch.cuda.current_stream())
            yield item
