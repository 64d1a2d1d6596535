"""`python train.py --dry-run`: what a run will take, before it takes it.

Two steps and one translation are done at full size, on blank images, and each phase's time is reckoned from
what its parts took here. Nothing is written.
"""

import math
import os
import sys
import time

import numpy as np
import torch

from minimedshift import coupling, finish, phantom, sampler, student
from minimedshift.data import Dataset, find_files
from minimedshift.flow import tint
from minimedshift.phantom import sets
from minimedshift.support.images import read_image

try:
    import resource
except ImportError:  # Windows
    resource = None

RENDERED = 4  # heads that are simulated to see what one takes
ALL_PAIRS_HEADS, TAUS = 32, 6  # what the report at the end translates
LESSON_STEPS = 5  # FireFlow steps of a leg, as in `teach` of train.py


def blank(config):
    """A Dataset like that of the run, of noise; and how many images would have to be simulated."""
    if config.data:
        files, _ = find_files(config.data)
        channels = max(len(read_image(paths[0])[0]) for paths in files.values())
        counts = [len(paths) for paths in files.values()]
        rendered = 0
    else:
        files, channels = phantom.DOMAINS, 1
        counts = [config.train_images // len(files)] * len(files)
        pictures = len(sets.KINDS) + sets.DECOYS
        rendered = config.train_images + (config.valid_heads + config.test_heads) * len(files) * pictures
    one = np.random.default_rng(0).normal(0, .25, (channels, config.size, config.size)).astype(np.float16)
    train = [np.broadcast_to(one, (count, *one.shape)) for count in counts]  # takes no memory
    return Dataset(tuple(files), config.size, channels, train, train), rendered


def clock(device, what):
    """Seconds that what() takes, and what it returns."""
    start = time.perf_counter()
    result = what()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def peak(device):
    """GB that this process has used at most, on the GPU if there is one; nan where it is not known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    if resource is None:
        return math.nan
    unit = 1e9 if sys.platform == "darwin" else 1e6  # bytes there, else KB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def dry_run(config, device, dtype, dataset, rendered, model, translation, take_step):
    """Print memory and the time of each phase. take_step(x0, x1, y, t, e) is one training step."""
    phases = {}
    if rendered:
        heads = [phantom.Head(i) for i in range(RENDERED)]
        seconds, _ = clock(device, lambda: phantom.render(heads, phantom.DOMAINS[-1], config.size))
        phases["simulating, once"] = seconds / RENDERED * rendered / min(os.cpu_count(), 16)
    D, B = len(dataset.domains), config.batch_size
    x0, x1, e = torch.randn(3, B, dataset.channels, config.size, config.size, device=device)
    y, t = torch.arange(B) % D, torch.rand(B, device=device)
    if config.coupling == "semidiscrete":
        learning, plan = semidiscrete(config, device, dtype, dataset, x0, y)
        phases["potentials, once"] = D * learning
    else:
        eps, draw = 2 * config.sigma**2 or 1.0, torch.Generator(device)
        plan = lambda: coupling.couple(config.coupling, x0, x1, y, eps, draw)
    step = lambda: take_step(x0, x1, y.to(device), t, e)
    for part in (plan, step):
        part()  # the first of each warms up
    seconds = clock(device, plan)[0] + clock(device, step)[0]
    phases[f"{config.steps} steps of {B} images"] = config.steps * seconds
    memory = peak(device)

    model.eval()
    seconds, _ = clock(device, lambda: sampler.translate(model, x1, 0, D - 1, **translation))
    asked = sampler.evaluations(config.solver, config.solver_steps, config.guidance, config.x0)
    once = seconds / B / asked  # one evaluation of one image
    if config.student:
        lessons = D * config.student_images * D * (LESSON_STEPS + 1)  # one leg back, D - 1 forward
        phases["the student's lessons"] = lessons * once
        phases |= student_phases(config, device, dtype, dataset)
    if config.evaluate and rendered:
        heads = config.test_heads
        translations = TAUS * heads + D * (D - 1) * min(ALL_PAIRS_HEADS, heads)
        phases["scoring, more or less"] = translations * asked * once
    print(f"peak memory after two steps: {memory:.1f} GB, at the end: {peak(device):.1f} GB")
    for phase, seconds in phases.items():
        print(f"{phase:30} {said(seconds):>10}")
    print(f"{'all, in minutes':30} {said(sum(phases.values())):>10}")


def semidiscrete(config, device, dtype, dataset, x0, y):
    """Seconds that the potentials of one label take; and a function that picks images for the noises x0."""
    where = torch.device("cpu") if device.type == "mps" else device  # mps lacks its algebra
    tinted = tint(torch.randn(dataset.train_images[0].shape), config.colour)
    seconds, g = clock(where, lambda: coupling.learn_potentials(tinted, device=where))
    g = [torch.zeros(len(images), device=device) for images in dataset.train_images]
    picker = coupling.Semidiscrete(dataset.train_images, g, device, None, dtype)
    return seconds, lambda: picker.pick(x0, y)


def student_phases(config, device, dtype, dataset):
    """Seconds of the student's steps, and of its tone and grain."""
    D = len(dataset.domains)
    images = torch.from_numpy(np.stack([x[:32] for x in dataset.train_images]))
    answers = images[None].expand(D, *images.shape)
    shape = student.shape_for(config.size, D, dataset.channels)
    learn = lambda steps: student.learn(shape, images, answers, steps, dtype=dtype, device=device)
    _, net = clock(device, lambda: learn(1))
    one, three = (clock(device, lambda: learn(steps))[0] for steps in (1, 3))
    enough = min(finish.IMAGES, *map(len, dataset.train_images))
    two = torch.from_numpy(np.stack([x[:enough] for x in dataset.train_images[:2]]))
    seconds, _ = clock(device, lambda: finish.fit(net, two, dtype))
    return {"the student's steps": config.student_steps * max(three - one, 0) / 2,
            "the student's tone and grain": D * (D - 1) * seconds / 2}


def said(seconds):
    """Minutes and seconds, as 4:05, or hours, as 2.5 h."""
    seconds = round(seconds)
    return f"{seconds // 60}:{seconds % 60:02d}" if seconds < 5400 else f"{seconds / 3600:.1f} h"
