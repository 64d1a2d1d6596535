"""`torchrun --nproc_per_node=N train.py`: each process draws the whole batch and trains on its part."""

import os
import sys

import torch
import torch.distributed as dist

RANK, COUNT = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def join(device):
    """Meet the other processes. Returns this one's device."""
    backend = "gloo"
    if RANK:
        sys.stdout = open(os.devnull, "w")  # rank 0 alone speaks and writes
    if COUNT > 1 and device.type == "cuda":
        device, backend = torch.device("cuda", int(os.environ["LOCAL_RANK"])), "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(device)
    if COUNT > 1:  # all wait up to a day, since rank 0 may simulate the data first
        dist.init_process_group(backend, timeout=48 * dist.default_pg_timeout)
    return device


def mean(x):
    """The mean over all processes of a tensor."""
    if COUNT > 1:
        dist.all_reduce(x)
    return x / COUNT


def same(value):
    """Rank 0's value, for all: the others wait for it."""
    values = [value]
    if COUNT > 1:
        dist.broadcast_object_list(values, 0)
    return values[0]


def leave():
    """The common work is done: rank 0 goes on alone, the others end here."""
    if COUNT > 1:
        dist.destroy_process_group()
    if RANK:
        os._exit(0)  # Python's own end aborts one time in four: threads of DistributedDataParallel are alive
