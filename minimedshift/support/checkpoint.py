"""Save, load, resume, and the running mean of the weights (EMA).

A checkpoint is one file of plain types and tensors. All randomness of a run is a function of (seed, step), so
weights, EMA, optimizer and step are the whole state: a stopped run that goes on ends in the same bytes.
"""

import io
import math
import os
import warnings
import zipfile
from contextlib import contextmanager
from pathlib import Path

import torch

from minimedshift import sampler
from minimedshift.model import Shape, UNet
from minimedshift.support.command import UserError
from minimedshift.support.files import told, whole

FORMAT = 4  # changes with what a checkpoint holds

# ---------------------------------------------------------------- what a network's checkpoint may say of it

number = lambda x: type(x) in (bool, int, float) and math.isfinite(x)
text = lambda x: isinstance(x, str)
text_or_none = lambda x: x is None or text(x)


def whole_number(low, high=2**31, times=1):
    """A test: whether x is an int from low to high, divisible by `times`."""
    return lambda x: type(x) is int and low <= x <= high and x % times == 0


def several(right):
    """A test: whether x has 1 to 8 items, and each passes the test `right`."""
    return lambda x: isinstance(x, (list, tuple)) and 0 < len(x) < 9 and all(map(right, x))


def one_of(*values):
    """A test: whether x is one of these numbers or texts."""
    return lambda x: isinstance(x, (int, str)) and x in values


PARTS = {  # part -> key -> a test. The numbers are far above any use, and keep a stranger's file in bounds
    "shape": dict(num_domains=whole_number(1), channels=one_of(1, 3), stem=whole_number(1, 64),
                  widths=several(whole_number(16, 4096, 16)), blocks=several(whole_number(1, 64)),
                  head=whole_number(1, 4096), score=number),
    "image": dict(size=whole_number(1, 4096), channels=one_of(1, 3)),
    "translate": dict(tau=number, guidance=number, steps=whole_number(1, 1000), end=number, colour=number,
                      solver=one_of(*sampler.SOLVERS), x0=one_of("noise", "image")),
    "config": dict(data=text_or_none, seed=whole_number(0), train_images=whole_number(1), shift=number,
                   test_heads=whole_number(1), coupling=text, sigma=number),
    "machine": dict(dtype=one_of("float32", "bfloat16"),
                    memory_format=one_of("channels_last", "contiguous_format")),
}


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
    with told(path.parent, "cannot be made"):
        path.parent.mkdir(parents=True, exist_ok=True)
    data = io.BytesIO()  # first to memory: torch does not pass on what a full disk says
    torch.save({"format": FORMAT, **state}, data)
    with whole(path) as work, open(work, "wb") as file:
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


def check_weights(module, weights, path):
    """Raises UserError unless `weights` is a dict of just the module's tensors, all finite.

    The module may be on torch's "meta" device.
    """
    shape = lambda x: "nothing" if x is None else tuple(x.shape) if torch.is_tensor(x) else type(x).__name__
    if not isinstance(weights, dict):
        raise UserError(f"{path} holds another network: its weights are {shape(weights)}")
    own = module.state_dict()
    for name in sorted(own.keys() | weights.keys(), key=str):
        have, want = shape(weights.get(name)), shape(own.get(name))
        if have != want:
            raise UserError(f"{path} holds another network: {name} is {have}, this one needs {want}")
        if not weights[name].is_floating_point() or not weights[name].isfinite().all():
            raise UserError(f"{path} is spoilt: in {name} is not a finite number")


def check_settings(state, path):
    """Raises UserError unless what describes a network in its checkpoint may be so, by PARTS."""
    for part, keys in PARTS.items():
        found = state.get(part)
        for key, right in keys.items():
            if not isinstance(found, dict) or not right(found.get(key)):
                raise UserError(f"{path} does not describe a network of ours: see {part}, {key}")
    try:
        shape, names = Shape(**state["shape"]), state["domains"]
        image, how = state["image"], state["translate"]
        stride, D = shape.stem * 2 ** (len(shape.widths) - 1), len(names)
        pupil = state.get("student") and state["student"]["shape"]
        right = dict(
            domains=D > 1 and D == len(set(names)) and all(isinstance(name, str) for name in names),
            shape=shape.num_domains in (D, D**2) and shape.widths[-1] % shape.head == 0
            and len(shape.widths) == len(shape.blocks),
            image=image["size"] % stride == 0 and image["channels"] == shape.channels,
            translate=0 <= how["tau"] < how["end"] <= 1,
            student=not pupil or (pupil["num_domains"], pupil["channels"]) == (D, shape.channels),
            step=whole_number(0)(state["step"]))
    except Exception as error:  # a stranger's file can hold anything
        right = {type(error).__name__: False}
    for part, well in right.items():
        if not well:
            raise UserError(f"{path} does not describe a network of ours: see {part}")


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
