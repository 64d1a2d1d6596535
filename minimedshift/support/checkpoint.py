"""Checkpoints: save, load, and the checks that keep a damaged or a stranger's file from doing harm.

A checkpoint is one file of plain types and tensors. All randomness of a run is a function of (seed, step), so
weights, their mean, the optimizers and the step are its whole state."""

import io
from pathlib import Path

import torch

from minimedshift.support.command import UserError, refuse
from minimedshift.support.files import write_whole
from minimedshift.support.images import Reading

FORMAT = 8  # changes with what a checkpoint holds, or what it means
PARTS = ("config", "shape", "domains", "image", "translate", "step", "machine")  # what describes a network


def save(path, state):
    """Write `state` (plain types and tensors) whole or not at all. Raises UserError if it cannot."""
    data = io.BytesIO()  # first to memory: torch does not pass on what a full disk says
    torch.save({"format": FORMAT, **state}, data)
    with write_whole(path) as work:
        work.write_bytes(data.getbuffer())


def load(path, device="cpu"):
    """The dict of a checkpoint. Raises UserError if it is none of ours.
    Nothing in the file is run (weights_only), and it takes no more memory than its size."""
    refuse(not Path(path).is_file(), f"no checkpoint at {path}: train one with `python train.py`")
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # a damaged file can raise anything
        raise UserError(f"{path} is not a readable checkpoint ({type(error).__name__})") from None
    found = state.get("format") if isinstance(state, dict) else None
    refuse(found != FORMAT, f"{path} is not a minimedshift checkpoint of format {FORMAT} (found {found})")
    return state


def check_settings(state, path):
    """Raises UserError unless a checkpoint says all that describes a network, of a size that can be meant."""
    try:
        _, shape, domains, image, how, *_ = (state[part] for part in PARTS)
        sizes = [*shape["widths"], *shape["blocks"], shape["stem"], shape["num_domains"], shape["head_width"]]
        sizes.append(how.get("size", 64))
        right = len(sizes) < 20 and all(type(n) is int and 0 < n <= 4096 for n in sizes)
        right = right and len(domains) == shape["num_domains"] and 0 <= how["tau"] < how["t_image"] <= 1
        [Reading(**reading) for reading in image.get("readings", {}).values()]
    except (TypeError, KeyError):
        right = False
    refuse(not right, f"{path} does not describe a network of ours: see its {', '.join(PARTS)}")


def fill(module, weights, path):
    """Put a dict of tensors into the module, which may be on torch's "meta" device: it moves to theirs.
    Raises UserError naming the first tensor that is missing, of another shape, or not finite."""
    shape = lambda x: tuple(x.shape) if torch.is_tensor(x) else "nothing"
    own, weights = module.state_dict(), weights if isinstance(weights, dict) else {}
    for name in sorted(own.keys() | weights.keys(), key=str):
        have, want = shape(weights.get(name)), shape(own.get(name))
        refuse(name not in own or have != want,
               f"{path} holds another network: {name} is {have}, this one needs {want}")
        refuse(not weights[name].isfinite().all(), f"{path} is spoilt: a number in {name} is not finite")
    if any(p.is_meta for p in module.parameters()):
        module.to_empty(device=next(iter(weights.values())).device)
    module.load_state_dict(weights)
