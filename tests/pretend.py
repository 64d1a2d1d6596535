"""A pretended GPU: tensors that lie in the CPU's memory, but say that they are on "cuda" (or "mps").

    with pretended("cuda") as gpu:
        x = torch.zeros(3, device="cuda")       x.device is cuda, x.is_cuda is True
        x + torch.zeros(3)                      RuntimeError: two devices, as on a GPU
        x.sum().item()                          works, and gpu.waits has the line that waited

Where a tensor is, is noted for its memory (storage), so views and .data are right by themselves. A function
mode answers `x.device` and moves what names a device; a dispatch mode sees every operation, those of backward
too, and refuses to mix. What it cannot tell is what a GPU computes, and how fast.
"""

import traceback
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
# operations that make the host wait for the device: their result's value or shape is needed on the host
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_consecutive", "bincount",
           "equal", "is_nonzero", "repeat_interleave"}
MOVING = {"copy_", "_pin_memory", "is_pinned"}
RealGenerator = torch.Generator


class Generator(RealGenerator):
    """A CPU generator that says it is on another device."""

    def __new__(cls, device="cpu"):
        return super().__new__(cls, device="cpu")

    def __init__(self, device="cpu"):
        self.place = torch.device(device)

    @property
    def device(self):
        return self.place


class Devices:
    """Which memory is on the pretended device, and what was noticed."""

    def __init__(self, name):
        self.device = torch.device(name)
        self.memory, self.pinned, self.waits = {}, set(), []
        self.tape, self.undo = None, []  # of a CUDA graph: its operations, and what they changed

    def holds(self, x):
        key = x.untyped_storage()._cdata
        return key in self.memory and not self.memory[key].expired()

    def take(self, x):
        """x is on the pretended device from now on."""
        if len(self.memory) > 20000:
            self.memory = {key: ref for key, ref in self.memory.items() if not ref.expired()}
        storage = x.untyped_storage()
        self.memory[storage._cdata] = StorageWeakRef(storage)

    def wait(self, what):
        """Note the line of the project that made the host wait. In a CUDA graph it must not."""
        if self.tape is not None:
            raise RuntimeError(f"{what}: operation not permitted when stream is capturing")
        lines = [frame for frame in traceback.extract_stack() if Path(frame.filename).is_relative_to(ROOT)
                 and Path(frame.filename) != Path(__file__)]
        line = lines[-1] if lines else traceback.extract_stack()[0]
        self.waits.append((Path(line.filename).name, line.line, what))


class Operations(TorchDispatchMode):
    """Every operation: none may mix devices; what comes out is where its inputs are."""

    def __init__(self, devices):
        super().__init__()
        self.devices = devices

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        devices, name = self.devices, func.overloadpacket.__name__
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        there = [x for x in tensors if devices.holds(x)]
        if there and name not in MOVING:
            self.check(name, tensors, args)
        if devices.tape is not None and func._schema.is_mutable:
            devices.undo += [(x, x.clone()) for x in tensors]
        out = func(*args, **(kwargs or {}))
        if there and name not in MOVING:
            for x in tree_leaves(out):
                if isinstance(x, torch.Tensor):
                    if devices.device.type == "mps" and x.dtype == torch.float64:
                        raise TypeError(f"{name} makes float64, which mps has not")
                    devices.take(x)
        if devices.tape is not None:
            devices.tape.append((func, args, kwargs or {}, out))
        return out

    def check(self, name, tensors, args):
        """Raise RuntimeError for two devices; note what waits."""
        devices = self.devices
        here = [x for x in tensors if not devices.holds(x)]
        is_index = name in ("index", "index_put_", "_index_put_impl_", "_unsafe_index")
        if is_index:  # by a CPU tensor is allowed: it is copied, and the host waits
            indices = [x for x in args[1] if x is not None]
            if any(x.dtype == torch.bool or not devices.holds(x) for x in indices):
                devices.wait(name)
            here = [x for x in here if not any(x is i for i in indices)]
        if any(x.ndim for x in here):
            raise RuntimeError(f"{name}: tensors on {devices.device} and on the CPU")
        if name in WAITING:
            devices.wait(name)


class Calls(TorchFunctionMode):
    """Every call of torch: answers where a tensor is, and moves what names a device."""

    def __init__(self, devices):
        super().__init__()
        self.devices = devices

    def __torch_function__(self, func, types, args=(), kwargs=None):
        devices, kwargs, name = self.devices, dict(kwargs or {}), getattr(func, "__name__", "")
        owner = getattr(func, "__self__", None)
        first = args[0] if args and isinstance(args[0], torch.Tensor) else None
        if name == "__get__" and first is not None:
            held = devices.holds(first)
            if owner is torch.Tensor.device:
                return devices.device if held else CPU
            if owner in (torch.Tensor.is_cuda, torch.Tensor.is_mps, torch.Tensor.is_cpu):
                kind = devices.device.type if held else "cpu"
                return owner is getattr(torch.Tensor, f"is_{kind}")
            return func(*args, **kwargs)
        if first is not None and devices.holds(first):
            if name in ("numpy", "__array__"):
                raise TypeError(f"can't convert a {devices.device} tensor to numpy")
            if name in ("tolist", "item", "__float__", "__int__", "__bool__", "__index__"):
                devices.wait(name)
        if name == "pin_memory":
            out = first.clone()
            devices.pinned.add(out.untyped_storage()._cdata)
            return out
        if name == "cpu":
            return self.move(first, CPU, False)
        if name == "to" and len(args) > 1 and isinstance(args[1], torch.Tensor):
            place = devices.device if devices.holds(args[1]) else CPU
            return self.move(first.to(args[1].dtype), place, False)
        asked = self.asked(args, kwargs)
        if name == "new_tensor" and asked is None and devices.holds(first):
            asked = devices.device
        if asked is None:
            return func(*args, **kwargs)
        if name == "to":
            return self.to(func, first, args, kwargs, asked)
        return self.make(func, name, args, kwargs, asked)

    def asked(self, args, kwargs):
        """The device that a call names, or None."""
        named = kwargs.get("device")
        if isinstance(named, (str, torch.device)):
            return torch.device(named)
        for x in args[1:]:
            kind = x.split(":")[0] if isinstance(x, str) else None
            if isinstance(x, torch.device) or kind in ("cpu", "cuda", "mps"):
                return torch.device(x)
        return None

    def to(self, func, x, args, kwargs, asked):
        """x.to(device, ...): first the device, then all else."""
        rest = [a for a in args[1:] if not isinstance(a, (str, torch.device))]
        rest = rest[:1] if rest and isinstance(rest[0], torch.dtype) else []  # the rest are flags of the copy
        more = {key: kwargs[key] for key in ("dtype", "memory_format") if kwargs.get(key) is not None}
        flags = [a for a in args[1:] if isinstance(a, bool)]
        late = kwargs.get("non_blocking", bool(flags) and flags[0])
        return self.move(func(x, *rest, **more) if rest or more else x, asked, late)

    def move(self, x, asked, late):
        """A copy of x on another device, or x itself. The host waits unless the copy is late and pinned."""
        devices = self.devices
        held, wanted = devices.holds(x), asked.type != "cpu"
        if held == wanted:
            return x
        pinned = x.untyped_storage()._cdata in devices.pinned
        if held and not late or wanted and not (late and pinned):
            devices.wait(f"copy to {asked}")
        with Silence():
            out = x.clone()
        if wanted:
            if devices.device.type == "mps" and out.dtype == torch.float64:
                raise TypeError("mps has no float64")
            devices.take(out)
        return out

    def make(self, func, name, args, kwargs, asked):
        """A new tensor on the device that is asked for: zeros, randn, as_tensor, ..."""
        devices, generator = self.devices, kwargs.get("generator")
        if generator is not None and generator.device.type != asked.type:
            raise RuntimeError(f"{name}: a generator on {generator.device} for a tensor on {asked}")
        x = args[0] if args and isinstance(args[0], torch.Tensor) else None
        if name in ("as_tensor", "asarray") and x is not None:
            return self.move(x, asked, False)
        kwargs["device"] = CPU
        args = tuple(CPU if isinstance(a, torch.device) else a for a in args)
        out = func(*args, **kwargs)
        for z in tree_leaves(out):
            if isinstance(z, torch.Tensor) and asked.type != "cpu":
                if devices.device.type == "mps" and z.dtype == torch.float64:
                    raise TypeError(f"{name} makes float64, which mps has not")
                if name in ("tensor", "as_tensor", "asarray") and z.ndim:
                    devices.wait(f"copy to {asked}")
                devices.take(z)
        return out


class Silence(TorchDispatchMode):
    """Inside, operations are done and nothing is noted: for copies between devices."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        with torch.utils._python_dispatch._disable_current_modes():
            return func(*args, **(kwargs or {}))


def same_memory(x, z):
    return x.untyped_storage()._cdata == z.untyped_storage()._cdata


class Graph:
    """A CUDA graph: the operations that were captured, done again on the same memory. A number that Python
    has computed stays what it was."""

    def replay(self):
        with torch.no_grad(), torch.utils._python_dispatch._disable_current_modes():
            for func, args, kwargs, out in self.tape:
                again = func(*args, **kwargs)
                for x, z in zip(tree_leaves(out), tree_leaves(again)):
                    if isinstance(x, torch.Tensor) and not same_memory(x, z):
                        x.copy_(z)


@contextmanager
def pretended(name):
    """A device "cuda" or "mps" that torch finds on this machine. Yields the Devices."""
    devices = Devices(name)
    autocast, enabled = torch.autocast, torch.is_autocast_enabled
    here = lambda kind: lambda: kind == name
    real_load = torch.load

    def load(*args, map_location="cpu", **how):
        state = real_load(*args, map_location="cpu", **how)
        for x in tree_leaves(state):
            if isinstance(x, torch.Tensor) and torch.device(map_location) == devices.device:
                devices.take(x)
        return state

    @contextmanager
    def captured(graph, stream):
        devices.tape, devices.undo = [], []
        try:
            yield
        finally:
            graph.tape, devices.tape = devices.tape, None
            with torch.no_grad(), torch.utils._python_dispatch._disable_current_modes():
                for x, before in reversed(devices.undo):  # nothing is done while a graph is captured
                    x.copy_(before)

    by_device = lambda lists, *_: {(devices.device, torch.float32): (lists, list(range(len(lists[0]))))}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "Generator", Generator)
        patch.setattr(torch, "load", load)
        patch.setattr(torch, "autocast", lambda _, *rest, **how: autocast("cpu", *rest, **how))
        patch.setattr(torch, "is_autocast_enabled", lambda _="cpu": enabled("cpu"))
        patch.setattr(torch.cuda, "is_available", here("cuda"))
        patch.setattr(torch.backends.mps, "is_available", here("mps"))
        patch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
        patch.setattr(torch.cuda, "get_device_name", lambda *_: "pretended")
        patch.setattr(torch.cuda, "get_device_capability", lambda *_: (6, 0))  # too old to compile for
        patch.setattr(torch.cuda, "mem_get_info", lambda *_: (8e9, 8e9))
        patch.setattr(torch.cuda, "max_memory_allocated", lambda: 1e9)
        patch.setattr(torch.cuda, "synchronize", lambda: devices.wait("synchronize"))
        patch.setattr(torch.cuda, "CUDAGraph", Graph)
        patch.setattr(torch.cuda, "graph", captured)
        patch.setattr(torch.cuda, "Stream", lambda: None)
        patch.setattr(torch.cuda, "stream", lambda _: nullcontext())
        # grouping by device is C++, which sees where tensors really are
        patch.setattr(torch.nn.utils.clip_grad, "_group_tensors_by_device_and_dtype", by_device)
        patch.setattr(torch.optim.Optimizer, "_group_tensors_by_device_and_dtype", staticmethod(by_device))
        with Operations(devices), Calls(devices):
            yield devices
