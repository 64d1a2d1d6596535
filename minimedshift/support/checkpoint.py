"""Save, load, resume, and the running mean of the weights (EMA).

A checkpoint is one file of plain types and tensors. All randomness of a run is a function of (seed, step), so
weights, EMA, optimizer and step are the whole state: a stopped run that goes on ends in the same bytes.
"""

import os
import pickle
from contextlib import contextmanager
from pathlib import Path

import torch

from minimedshift.model import Shape, UNet
from minimedshift.support.command import UserError
from minimedshift.support.files import whole

FORMAT = 4  # changes with what a checkpoint holds


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


def save(path, state):
    """Write `state` (plain types and tensors) whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as work, open(work, "wb") as file:
        torch.save({"format": FORMAT, **state}, file)
        file.flush()
        os.fsync(file.fileno())


def load(path, device="cpu"):
    """The dict of a checkpoint (see `save` in train.py). Raises UserError if it is none of ours."""
    if not Path(path).is_file():
        raise UserError(f"no checkpoint at {path}: train one with `python train.py`")
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise UserError(f"{path} is not a readable checkpoint ({type(error).__name__})") from None
    found = state.get("format") if isinstance(state, dict) else None
    if found != FORMAT:
        raise UserError(f"{path} is not a minimedshift checkpoint of format {FORMAT} (found {found})")
    return state


def load_weights(module, weights, path):
    """Put a dict of tensors into the module. Raises UserError naming the first tensor that does not fit."""
    shape = lambda x: "nothing" if x is None else tuple(x.shape)
    own = module.state_dict()
    for name in sorted(own.keys() | weights.keys()):
        have, want = shape(weights.get(name)), shape(own.get(name))
        if have != want:
            raise UserError(f"{path} holds another network: {name} is {have}, this one needs {want}")
    module.load_state_dict(weights)


def load_model(path, device="cpu"):
    """The network of a checkpoint, with its EMA weights, in eval mode, and the checkpoint itself."""
    state = load(path, device)
    model = UNet(Shape(**state["shape"])).to(device)
    load_weights(model, state["ema"], path)
    if torch.device(device).type != "mps":
        model = model.to(memory_format=torch.channels_last)
    return model.eval(), state
