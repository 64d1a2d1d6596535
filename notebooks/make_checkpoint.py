"""Make notebooks/checkpoint.pt, the trained network of lessons 5 to 7, in half precision and without the optimizer:

    python train.py
    python notebooks/make_checkpoint.py out/checkpoint.pt
"""

import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from minimedshift.support import checkpoint  # noqa: E402

KEPT = ("config", "shape", "domains", "step", "image", "translate", "machine", "ema", "student")


def halved(value):
    """The same nested value with its float32 tensors in float16."""
    if isinstance(value, dict):
        return {key: halved(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(halved(part) for part in value)
    if torch.is_tensor(value) and value.dtype == torch.float32:
        return value.half().contiguous()
    return value


def main(path):
    state = checkpoint.load(path)
    target = HERE / "checkpoint.pt"
    checkpoint.save(target, halved({key: state[key] for key in KEPT}))
    print(f"{target}: {target.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main(sys.argv[1])
