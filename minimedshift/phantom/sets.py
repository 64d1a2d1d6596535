"""The simulated data set: which heads are drawn in which domains, rendered once and kept in the cache.

    training heads     one domain each, never two; a share `shift` of them comes from its own population
    paired heads       validation and test: each head in every domain, so that a translation has a truth
    decoys             for each test head a few other people in exactly the same view

Every head has a seed of its own. Paired heads do not depend on `shift`: the same heads score all shifts.
"""

import inspect
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

from minimedshift import phantom
from minimedshift.support.command import UserError
from minimedshift.data import Dataset, Pairs
from minimedshift.support.files import cached
from minimedshift.support.log import progress

BLOCK, BIG = 16, 500  # heads rendered at once; images worth starting processes for
KINDS = {"images": {}, "truth": dict(noise=False), "second": dict(exposure=1)}  # pictures of a paired head
# first head seed of each split in millions; below 1.5 lay the tests of version 1
FIRST_SEED = {"valid": 0, "train": 2, "test": 7, "valid decoys": 8, "test decoys": 9, "supervised": 1.5}
DECOYS = 7


def first_seed(seed, split, domain=0):
    """The first head seed of a split: a million for each, ten million for each `seed`: none overlap."""
    return seed * 10_000_000 + int((FIRST_SEED[split] + domain) * 1_000_000)


# ---------------------------------------------- blocks of work: each renders BLOCK heads into arrays on disk

def render_training(folder, domain, start, size, per_domain, seed, shift):
    """Training heads of one domain from `start` on, into folder/train.npy (D, N, 1, H, W); how many."""
    name, first = phantom.DOMAINS[domain], first_seed(seed, "train", domain)
    seeds = range(first + start, first + min(start + BLOCK, per_domain))
    heads = [phantom.Head(s, phantom.population(s, name, shift)) for s in seeds]
    out = np.load(Path(folder) / "train.npy", mmap_mode="r+")
    out[domain, start:start + BLOCK] = phantom.render(heads, name, size).numpy()
    return len(heads)


def render_pairs(folder, start, size, count, split, seed, prior, decoys):
    """Paired heads from `start` on: every kind of picture in every domain, line integrals and decoys.

    Into folder/KIND.npy (N, D, 1, H, W), materials.npy (N, 3, H, W) and decoys.npy (N, K, D, 1, H, W).
    Returns how many images.
    """
    first = first_seed(seed, split)
    block = slice(start, start + BLOCK)
    heads = [phantom.Head(first + k, prior) for k in range(start, min(start + BLOCK, count))]
    array = lambda name: np.load(Path(folder) / f"{name}.npy", mmap_mode="r+")
    # one geometry for every domain and kind; fine bone is seen in the domains of full physics alone
    materials = {full: phantom.project(heads, size, full) for full in (False, True)}
    array("materials")[block] = materials[False].numpy()
    for kind, how in KINDS.items():
        for d, domain in enumerate(phantom.DOMAINS):
            full = phantom.PHYSICS[domain].full
            array(kind)[block, d] = phantom.picture(materials[full], heads, domain, **how).numpy()
    for k in range(decoys):
        person = first_seed(seed, f"{split} decoys") + k
        others = [phantom.Head(head.seed, prior, person + (head.seed - first) * decoys) for head in heads]
        materials = {full: phantom.project(others, size, full) for full in (False, True)}
        for d, domain in enumerate(phantom.DOMAINS):
            full = phantom.PHYSICS[domain].full
            truth = phantom.picture(materials[full], others, domain, noise=False)
            array("decoys")[block, k, d] = truth.numpy()
    return len(heads) * len(phantom.DOMAINS) * (len(KINDS) + decoys)


def render_part(folder, part, parts, jobs):
    """Do every `parts`-th job, [function's name, arguments after `folder`]; yield how many images it made."""
    for name, arguments in jobs[part::parts]:
        yield globals()[name](folder, *arguments)


def render_all(folder, jobs, images, show, what):
    """Do all jobs, one process a core where there is much to do; the bytes do not depend on how many."""
    start, done = time.time(), 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parts = min(cores, 16) if images > BIG else 1  # a small set is done before a process has started
    counts = render_apart(folder, parts, jobs) if parts > 1 else render_part(folder, 0, 1, jobs)
    for n in counts:
        done += n
        if show:
            progress(done, images, start, what)


def render_apart(folder, parts, jobs):
    """`render_part` in `parts` processes; they report through one pipe. (Threads are half as fast.)"""
    code = ("import json, os, sys, torch; from minimedshift.phantom import sets; torch.set_num_threads(1)\n"
            "folder, part, parts, plan = sys.argv[1:]\n"
            "for n in sets.render_part(folder, int(part), int(parts), json.load(open(plan))):\n"
            "    os.write(1, b'%d\\n' % n)")
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    plan = Path(folder) / "jobs.json"
    plan.write_text(json.dumps(jobs))
    read, write = os.pipe()
    workers = []
    for part in range(parts):
        command = [sys.executable, "-c", code, str(folder), str(part), str(parts), str(plan)]
        workers.append(subprocess.Popen(command, stdout=write, env=env, start_new_session=True))
    os.close(write)
    try:
        with open(read) as lines:
            yield from map(int, lines)
        if any(worker.wait() for worker in workers):
            raise RuntimeError("a process that simulates heads has failed: see above")
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
        plan.unlink()


def new_array(folder, name, *shape):
    """An empty float16 array on disk."""
    np.lib.format.open_memmap(Path(folder) / f"{name}.npy", "w+", np.float16, shape)


def recipe(*arguments):
    """For the cache's key, all that determines an array: simulator, rendering here, torch, the arguments."""
    sources = [inspect.getsource(part) for part in (phantom, first_seed, render_training, render_pairs)]
    return [sources, FIRST_SEED, torch.__version__, arguments]


# ---------------------------------------------- the sets

def training_images(size, per_domain, seed=0, shift=.1, cache=None, progress=True):
    """(D, N, 1, H, W) float16 on disk: N unpaired training images of each domain."""
    D = len(phantom.DOMAINS)

    def build(folder):
        new_array(folder, "train", D, per_domain, 1, size, size)
        jobs = []
        for d in range(D):
            for start in range(0, per_domain, BLOCK):
                jobs.append(("render_training", (d, start, size, per_domain, seed, shift)))
        render_all(folder, jobs, D * per_domain, progress, "simulating training heads, once")

    folder = cached(cache, f"train-{size}", recipe(size, per_domain, seed, shift), build)
    return np.load(folder / "train.npy", mmap_mode="r")


def paired_heads(size, count, split, seed=0, prior=None, decoys=0, cache=None, progress=True):
    """`Pairs` of `count` heads of a split. prior: a domain's own population, None: the shared one."""
    D, K = len(phantom.DOMAINS), len(KINDS)

    def build(folder):
        for kind in KINDS:
            new_array(folder, kind, count, D, 1, size, size)
        new_array(folder, "materials", count, 3, size, size)
        new_array(folder, "decoys", count, decoys, D, 1, size, size)
        jobs = []
        for start in range(0, count, BLOCK):
            jobs.append(("render_pairs", (start, size, count, split, seed, prior, decoys)))
        render_all(folder, jobs, count * D * (K + decoys), progress, f"simulating {split} heads, once")

    key = recipe(size, count, split, seed, prior, decoys)
    folder = cached(cache, f"{split}-{size}", key, build)
    load = lambda name: np.load(folder / f"{name}.npy", mmap_mode="r")
    kinds = {kind: load(kind) for kind in KINDS}
    return Pairs(**kinds, materials=load("materials"), decoys=load("decoys"))


def phantom_set(size, train_images=5000, valid_heads=64, test_heads=128, seed=0, shift=.1, cache=None,
                progress=True):
    """The simulated five-domain set. No training head appears twice; other heads appear in every domain.

    shift: the share of each domain's training heads that comes from its own population, in [0, 1].
    Validation and test heads are from the population that all share. Raises UserError for a set too small.
    """
    D = len(phantom.DOMAINS)
    if train_images < D or valid_heads < 1 or test_heads < 1 or size < 8:
        raise UserError(f"a phantom set needs at least {D} training images, 1 validation head, 1 test head "
                        "and size 8")
    train = training_images(size, train_images // D, seed, float(shift), cache, progress)
    valid = paired_heads(size, valid_heads, "valid", seed, decoys=DECOYS, cache=cache, progress=progress)
    test = paired_heads(size, test_heads, "test", seed, decoys=DECOYS, cache=cache, progress=progress)
    count = train.shape[1]
    held_out = [test.images[:, d] for d in range(D)]
    return Dataset(tuple(phantom.DOMAINS), size, 1, list(train), held_out, valid, test)


def own_heads(dataset, source, heads, seed=0, cache=None, progress=True):
    """`Pairs` of test heads from `source`'s own population: a user's case, his synthetic heads made real."""
    return paired_heads(dataset.size, heads, "test", seed, source, DECOYS, cache, progress)
