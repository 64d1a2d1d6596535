"""Save, load, resume, and the running mean of the weights (EMA).

A checkpoint is one file of plain types and tensors. All randomness of a run is a function of (seed, step), so
weights, EMA, optimizer and step are the whole state: a stopped run that goes on ends in the same bytes.
"""

import io
import os
import warnings
import zipfile
from pathlib import Path

import torch

from minimedshift.support.command import UserError
from minimedshift.support.files import explain_os_error, write_whole

FORMAT = 5  # changes with what a checkpoint holds

# ---------------------------------------------------------------- the file

def save(path, state):
    """Write `state` (plain types and tensors) whole or not at all. Raises UserError if it cannot."""
    path = Path(path)
    with explain_os_error(path.parent, "cannot be made"):
        path.parent.mkdir(parents=True, exist_ok=True)
    data = io.BytesIO()  # first to memory: torch does not pass on what a full disk says
    torch.save({"format": FORMAT, **state}, data)
    with write_whole(path) as work, open(work, "wb") as file:
        file.write(data.getbuffer())
        file.flush()
        os.fsync(file.fileno())


def load(path, device="cpu"):
    """The dict of a checkpoint (see `save` in train.py). Raises UserError if it is none of ours.

    Of a stranger's file nothing is run (weights_only), and it takes no more memory than its size.
    """
    if not Path(path).is_file():
        raise UserError(f"no checkpoint at {path}: train one with `python train.py`")
    try:
        if zipfile.is_zipfile(path):  # as torch.save writes them, without compression
            with zipfile.ZipFile(path) as archive:
                claimed = sum(entry.file_size for entry in archive.infolist())
            if claimed > Path(path).stat().st_size:
                raise ValueError("compressed")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickles that are not torch's own
            state = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # a damaged file can raise anything
        raise UserError(f"{path} is not a readable checkpoint ({type(error).__name__})") from None
    found = state.get("format") if isinstance(state, dict) else None
    if found != FORMAT:
        raise UserError(f"{path} is not a minimedshift checkpoint of format {FORMAT} (found {found})")
    return state


def check_settings(state, path):
    """Raises UserError unless the checkpoint describes a network in sane bounds."""


def fill(module, weights, path):
    """Put a dict of tensors into the module. Raises UserError naming the first tensor that does not fit."""
    own = module.state_dict()
    for name in sorted(own.keys() | set(weights or {}), key=str):
        have, want = (tuple(z[name].shape) if name in z else "nothing" for z in (weights or {}, own))
        if have != want:
            raise UserError(f"{path} holds another network: {name} is {have}, this one needs {want}")
        if not weights[name].isfinite().all():
            raise UserError(f"{path} is spoilt: in {name} is not a finite number")
    if any(p.is_meta for p in module.parameters()):
        module.to_empty(device=next(iter(weights.values())).device)
    module.load_state_dict(weights)
