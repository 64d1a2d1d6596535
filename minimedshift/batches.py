"""What a training step sees: noise, images and labels, paired by the coupling.

All of it is a function of (seed, step): nothing has to be saved, and a resumed run sees what the stopped one
would have seen. Pairs may be made for several steps at once (--ot-batch); a resumed run makes them again."""

import inspect
import time
from typing import NamedTuple

import numpy as np
import torch

from minimedshift import balance, coupling, data
from minimedshift.coupling import Minibatch, Plan, Semidiscrete
from minimedshift.flow import draw_noise, tint
from minimedshift.phantom import sets
from minimedshift.support.files import cached, digest
from minimedshift.support.log import progress
from minimedshift.support.machine import in_batches, keep_memory, to_device, to_float

MOST = 4e9  # bytes of images that the semidiscrete coupling may keep in memory
MOST_OF_A_LABEL = dict(cpu=1e4, mps=1e4, cuda=1e5)  # images; learning potentials takes the square of it


def load_dataset(config, readings=None):
    """The Dataset that a config of train.py names: a folder's (data.py) or the simulated one (phantom/), with
    weights: how often an image is drawn (balance.py). readings: how files are read. Raises UserError."""
    if config.data:
        reading = dict(bits=config.bits, invert=config.invert, crop=config.crop)
        dataset = data.folder_set(config.data, config.size, config.seed, known=readings, **reading)
    else:
        dataset = sets.phantom_set(config.size, config.train_images, config.valid_heads, config.test_heads,
                                   config.seed, config.shift)
    return balance.balanced(dataset) if config.balance else dataset


class Step(NamedTuple):
    """One training step's batch, on the device."""
    x0: torch.Tensor  # (B, C, H, W) noise
    x1: torch.Tensor  # (B, C, H, W) image
    y: torch.Tensor   # (B,) int64 label; num_domains where it is hidden, for guidance
    t: torch.Tensor   # (B,) in [0, 1)
    e: torch.Tensor   # (B, C, H, W) the bridge's noise
    plan: Plan        # of the whole window of ot_batch steps, for the log
    seconds: float    # what pairing took on the host, for each step


def randomness(seed, step, device="cpu"):
    """A generator that is a function of (seed, step): nothing to save, and resume is exact."""
    return torch.Generator(device).manual_seed((seed * 1_000_003 + step) % 2**63)


def draw_step(dataset, config, step, device):
    """What is random in a step: x0 on the device, y and which labels are hidden on the host, t, e."""
    # two seeds: with one, a CPU's numbers for the device would be those for the host again
    host, there = randomness(config.seed, step), randomness(~config.seed, step, device)
    y = torch.randint(len(dataset.domains), (config.batch_size,), generator=host)
    hidden = torch.rand(len(y), generator=host) < config.drop_label
    shape = len(y), dataset.channels, dataset.size, dataset.size
    x0 = draw_noise(shape, there, config.colour, device)
    t = torch.rand(len(y), generator=there, device=device)  # another noise schedule is another line here
    e = torch.randn(shape, generator=there, device=device)
    return x0, y, hidden, t, e


def batches(dataset, config, device, first=0, dtype=torch.float32, rank=0, processes=1):
    """The Steps `first` to config.steps, as an iterator. Potentials are learned before it is returned.
    dtype: of the network's arithmetic. A Step holds the part of the batch that process `rank` trains on."""
    couple = make_coupling(dataset, config, device, dtype)
    n, size = config.ot_batch, config.batch_size // processes

    def make():
        for start in range(first - first % n, config.steps, n):
            window = [draw_step(dataset, config, step, device) for step in range(start, start + n)]
            x0, y, hidden, t, e = map(torch.cat, zip(*window))
            begun = time.perf_counter()
            x0, x1, plan = couple(x0, y, randomness(config.seed, ~start))
            seconds = (time.perf_counter() - begun) / n
            y = to_device(y.masked_fill(hidden, len(dataset.domains)), device)
            for step in range(max(start, first), min(start + n, config.steps)):
                at = (step - start) * config.batch_size + rank * size
                part = slice(at, at + size)
                yield Step(x0[part], x1[part], y[part], t[part], e[part], plan, seconds)

    return make()


def make_coupling(dataset, config, device, dtype):
    """The coupling that config names. Where there are too many images for semidiscrete it is exact."""
    counts = [len(images) for images in dataset.train_images]
    size = sum(images.nbytes for images in dataset.train_images)
    name, most = config.coupling, MOST
    if device.type == "cuda":
        most = min(MOST, torch.cuda.mem_get_info(device)[0] / 3)  # the rest is for the network and its steps
    if name == "semidiscrete" and (size > most or max(counts) > MOST_OF_A_LABEL[device.type]):
        print(f"the semidiscrete coupling would keep {sum(counts)} images ({size / 1e9:.1f} GB) in memory, "
              f"too much here: taking --coupling exact over {config.ot_batch} batches")
        name = "exact"
    if name == "semidiscrete":
        g = learned_potentials(dataset, config, device, dtype)
        keep_memory()
        return Semidiscrete(dataset.train_images, g, device, dtype)
    return Minibatch(name, dataset.batch, 2 * config.sigma**2)


def learned_potentials(dataset, config, device, dtype):
    """The potentials (N_d,) of each label's training images, learned once and kept in the cache."""
    weights = dataset.weights or [np.ones(len(images), np.float32) for images in dataset.train_images]
    where = "cpu" if device.type == "mps" else device  # mps lacks its algebra

    def learn(folder):
        start = time.time()
        for d, (images, weight) in enumerate(zip(dataset.train_images, weights)):
            tinted = in_batches(lambda x: tint(x, config.colour), to_float(images, "cpu"))
            g = coupling.learn_potentials(tinted, weight, seed=config.seed, device=where, dtype=dtype)
            np.save(folder / f"{d}.npy", g.cpu().numpy())
            progress(d + 1, len(weights), start, "learning potentials, once", "labels")

    code = inspect.getsource(coupling.learn_potentials) + inspect.getsource(tint)
    digests = [digest(array) for array in (*dataset.train_images, *weights)]
    content = [code, torch.__version__, digests, config.colour, config.seed, str(where), str(dtype)]
    folder = cached(None, "potentials", content, learn)
    return [np.load(folder / f"{d}.npy") for d in range(len(weights))]
