"""What a checkpoint of a stranger may say. Whatever else it holds ends in one sentence."""

import math

import torch

from minimedshift import sampler
from minimedshift.model import Shape
from minimedshift.support.command import UserError

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
