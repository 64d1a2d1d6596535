"""Save, load, resume, and the running mean of the weights (EMA).

A checkpoint is one file of plain types and tensors. All randomness of a run is a function of (seed, step), so
weights, EMA, optimizer and step are the whole state: a stopped run that goes on ends in the same bytes.
"""

import io
import os
import warnings
import zipfile
from contextlib import contextmanager
from pathlib import Path

import torch

from minimedshift.model import Shape, UNet
from minimedshift.support.command import UserError
from minimedshift.support.files import explain_os_error, write_whole
from minimedshift.support.trust import check_settings, check_weights

FORMAT = 4  # changes with what a checkpoint holds

# ---------------------------------------------------------------- the running mean of the weights

class EMA:
    """Running mean of the parameters (no buffers), over a constant share of the run so far:

        ema <- beta ema + (1 - beta) theta,    beta = (1 - 1 / step)^(gamma + 1)     arXiv:2312.02696, eq. 127

    At step 1 beta is 0. gamma 6.94 averages over about the last tenth, 16.97 over a twentieth.
    """

    def __init__(self, model, gamma=6.94):
        self.gamma = gamma
        self.live = dict(model.named_parameters())
        self.mean = {name: p.detach().clone() for name, p in self.live.items()}

    @torch.no_grad()
    def update(self, step):
        """Call after optimizer step number `step` = 1, 2, ..."""
        keep = (1 - 1 / step) ** (self.gamma + 1)
        torch._foreach_lerp_(list(self.mean.values()), list(self.live.values()), 1 - keep)

    @contextmanager
    def weights_of(self, model):
        """Inside this block the model has the mean weights, in eval mode and not compiled."""
        live = {name: p.detach().clone() for name, p in self.live.items()}
        model.load_state_dict(self.mean)
        try:
            with torch.compiler.set_stance("force_eager"):  # pictures and scores come in other shapes
                yield model.eval()
        finally:
            model.load_state_dict(live)
            model.train()

    def load(self, mean):
        """Go on from the running mean of a checkpoint."""
        for name, value in self.mean.items():
            value.copy_(mean[name])


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


def load_weights(module, weights, path):
    """Put a dict of tensors into the module. Raises UserError naming the first tensor that does not fit."""
    check_weights(module, weights, path)
    module.load_state_dict(weights)


def load_model(path, device="cpu"):
    """The network of a checkpoint, with its EMA weights, in eval mode, and the checkpoint itself."""
    state = load(path, device)
    check_settings(state, path)
    with torch.device("meta"):  # without memory: what the shape claims may not be in the file
        model = UNet(Shape(**state["shape"]))
    check_weights(model, state.get("ema"), path)
    model = model.to_empty(device=device)
    model.load_state_dict(state["ema"])
    if torch.device(device).type != "mps":
        model = model.to(memory_format=torch.channels_last)
    return model.eval(), state
