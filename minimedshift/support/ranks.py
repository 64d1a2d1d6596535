"""One run over several processes: `torchrun --nproc_per_node=N train.py ...`, on CPUs or on a GPU each.

Every process (its number is its rank) draws and plans the whole batch of a step, and trains on its own part.
Gradients are averaged, so the run is that of one process, but for rounding: a run may go on with another
number. Rank 0 alone speaks and writes. Started without torchrun there is one process, and nothing to share.
"""

import os
import sys
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from minimedshift.support.command import UserError

PATIENCE = timedelta(hours=24)  # for rank 0, which may have to simulate the data first


def number():
    """The rank of this process, and how many there are."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def join(device):
    """Meet the other processes. Returns this one's device. Raises UserError where there are too few GPUs."""
    rank, count = number()
    if count == 1:
        return device
    if rank:
        sys.stdout = open(os.devnull, "w")
    backend = "gloo"
    if device.type == "cuda":
        local, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= there:
            raise UserError(f"torchrun started more processes than this machine has GPUs, which is {there}")
        torch.cuda.set_device(local)
        device, backend = torch.device("cuda", local), "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=PATIENCE)
    return device


def leave():
    """The common work is done: rank 0 goes on alone, the other processes end here."""
    if several():
        dist.destroy_process_group()
    if number()[0]:
        # not by Python's own end: DistributedDataParallel keeps threads alive whose tensors could abort it
        os._exit(0)


def several():
    """Whether there are other processes to work with."""
    return dist.is_available() and dist.is_initialized()


def parallel(model):
    """The model as it is called in training: it averages the gradients of all processes."""
    if not several():
        return model
    device = next(model.parameters()).device
    return DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)


@contextmanager
def first():
    """In this block rank 0 is first, and fills the cache; then come the others."""
    rank, _ = number()
    if several() and rank:
        dist.all_reduce(torch.zeros(1))
    yield
    if several() and not rank:
        dist.all_reduce(torch.zeros(1))


def same(value):
    """Rank 0's value, for all."""
    values = [value]
    if several():
        dist.broadcast_object_list(values, 0)
    return values[0]


def mean(x):
    """The mean over all processes of a scalar tensor on the device. Nobody waits for a GPU."""
    if several():
        dist.all_reduce(x)
        x = x / number()[1]
    return x


def any_of(flag):
    """Whether the flag is set in any process."""
    if not several():
        return flag
    count = torch.tensor(float(flag))
    dist.all_reduce(count)
    return bool(count)
