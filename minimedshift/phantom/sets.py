"""The simulated data set: which heads are drawn in which domains, rendered once and kept in the cache.

    training heads     one domain each, never two; a share `shift` of them comes from its own population
    paired heads       validation and test: each head in every domain, so that a translation has a truth
    decoys             for each test head a few other people in exactly the same view
"""

import inspect
import multiprocessing
import os
import signal
import threading
import time
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from contextlib import contextmanager, nullcontext

import numpy as np
import torch

from minimedshift import phantom
from minimedshift.data import Dataset, Pairs
from minimedshift.support.command import UserError
from minimedshift.support.files import cached
from minimedshift.support.log import progress

BLOCK, BIG = 64, 500  # heads rendered at once; images worth starting processes for
KINDS = {"images": {}, "truth": dict(noise=False), "second": dict(exposure=1)}  # pictures of a paired head
# the first head seed of each split, in millions
FIRST_SEED = {"valid": 0, "train": 2, "test": 7, "test decoys": 9, "supervised": 1.5}
DECOYS = 7


def first_seed(seed, split, domain=0):
    """The first head seed of a split: ten million are for a `seed`. A sixth domain takes of the next ten."""
    return seed * 10_000_000 + int((FIRST_SEED[split] + domain + domain // 5 * 5) * 1_000_000)


def render_training(size, domain, first, count, shift):
    """A block of training heads of one domain, from seed `first` on: a dict of train (n, 1, H, W) float16."""
    seeds = range(first, first + count)
    heads = [phantom.Head(seed, phantom.population(seed, domain, shift)) for seed in seeds]
    return dict(train=phantom.render(heads, domain, size).half().numpy())


def render_pairs(size, first, count, prior, person):
    """A block of paired heads from seed `first` on, decoys from `person` on: a dict of what `Pairs` holds.
    person: None for no decoys."""
    seeds = range(first, first + count)
    heads = [phantom.Head(seed, prior) for seed in seeds]
    block = {kind: in_all_domains(heads, size, **how) for kind, how in KINDS.items()}
    if person is None:
        return block
    decoys = []
    for k in range(DECOYS):
        others = [phantom.Head(seed, prior, person + i * DECOYS + k) for i, seed in enumerate(seeds)]
        decoys.append(in_all_domains(others, size, noise=False))
    return block | dict(decoys=np.stack(decoys, 1))


def in_all_domains(heads, size, **how):
    """The heads in every domain, (B, D, 1, H, W) float16: one geometry, five kinds of physics."""
    materials = {fine: phantom.project(heads, size, fine) for fine in (False, True)}
    images = [phantom.picture(materials[physics.full], heads, domain, **how)
              for domain, physics in phantom.PHYSICS.items()]
    return torch.stack(images, 1).half().numpy()


def render_to(file, render, *job):
    """Write the block render(*job) to `file`, which is there. No image goes through the pool's pipe: a
    process that is killed within a long message leaves its parent waiting for the rest."""
    with open(file, "r+b") as out:
        np.savez(out, **render(*job))


def begin_process():
    """Leave Ctrl-C to the parent process, and end when it is killed."""
    def end_with_parent():
        multiprocessing.parent_process().join()
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()


@contextmanager
def processes():
    """A pool of one process a core, as threads take twice as long. They start with the first job. Raises
    UserError if one of them is killed."""
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(os.cpu_count(), 16), spawn, begin_process)
    try:
        yield pool
    except BrokenExecutor:
        raise UserError("a process that simulates was killed: is there too little memory?") from None
    finally:
        pool.shutdown(cancel_futures=True)


def load_or_render(render, jobs, images, name, cache, pool):
    """All that render(*job) returns for `jobs`, `images` in all, as a dict of arrays on disk."""
    def save_blocks(folder):
        start, files = time.time(), [folder / f"{k}.npz" for k in range(len(jobs))]
        for file in files:
            file.touch()
        with nullcontext(pool) if pool else processes() as many:
            apply = many.map if images > BIG else map
            for k, _ in enumerate(apply(render_to, files, [render] * len(jobs), *zip(*jobs)), 1):
                progress(images * k // len(jobs), images, start, f"simulating {name}, once")
        blocks = [dict(np.load(file)) for file in files]
        for kind in blocks[0]:
            np.save(folder / f"{kind}.npy", np.concatenate([block[kind] for block in blocks]))
        for file in files:
            file.unlink()

    code = [inspect.getsource(part) for part in (phantom.anatomy, phantom.rays, phantom.xray, phantom.sets)]
    folder = cached(cache, name, [code, torch.__version__, jobs], save_blocks)
    return {path.stem: np.load(path, mmap_mode="c") for path in folder.glob("*.npy")}


def training_images(size, per_domain, seed=0, shift=.1, cache=None, pool=None):
    """(D, N, 1, H, W) float16 on disk: N unpaired training images of each domain."""
    jobs = [(size, domain, first_seed(seed, "train", d) + start, min(BLOCK, per_domain - start), shift)
            for d, domain in enumerate(phantom.DOMAINS) for start in range(0, per_domain, BLOCK)]
    images = len(phantom.DOMAINS) * per_domain
    train = load_or_render(render_training, jobs, images, f"train-{size}", cache, pool)["train"]
    return train.reshape(-1, per_domain, 1, size, size)


def paired_heads(size, count, split, seed=0, prior=None, cache=None, pool=None):
    """`Pairs` of `count` heads of a split; those of "test" have decoys. prior: a domain's own population, or
    None for the shared one. pool: of `processes`, if there is one."""
    jobs = []
    for start in range(0, count, BLOCK):
        first = first_seed(seed, split) + start
        person = first_seed(seed, "test decoys") + start * DECOYS if split == "test" else None
        jobs.append((size, first, min(BLOCK, count - start), prior, person))
    images = count * len(phantom.DOMAINS) * (len(KINDS) + (split == "test") * DECOYS)
    return Pairs(**load_or_render(render_pairs, jobs, images, f"{split}-{size}", cache, pool))


def phantom_set(size, train_images=5000, valid_heads=64, test_heads=128, seed=0, shift=.1, cache=None):
    """The simulated five-domain set. shift: the share of each domain's training heads that comes from its own
    population, in [0, 1]. Validation and test heads are from the population that all share."""
    with processes() as pool:
        train = training_images(size, train_images // len(phantom.DOMAINS), seed, float(shift), cache, pool)
        valid = paired_heads(size, valid_heads, "valid", seed, cache=cache, pool=pool)
        test = paired_heads(size, test_heads, "test", seed, cache=cache, pool=pool)
    return Dataset(phantom.DOMAINS, size, 1, list(train), list(test.images.swapaxes(0, 1)), valid, test)
