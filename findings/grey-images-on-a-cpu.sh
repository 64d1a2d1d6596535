#!/usr/bin/env bash
# torch 2.13.0, numpy 2.4.6: images of one channel (X-rays, depth, masks) on a CPU.
# Expected: interpolate with antialias=True costs more, and numpy is no faster than torch.
# What happens: enlarging (bilinear) with antialias=True gives the same values in half of the time; max_pool2d
# of the same images as channels of one, channels-last, is four times as fast; sorting values and argmax of rows
# are 29 and 7 times as fast in numpy.
# Output seen (two cores of an Intel Xeon, ms): 1.46 0.76, 43.49 10.49, 5.38 0.18, 1.14 0.15.
# Bitten: whoever computes pyramids, histograms or morphology of grey images without a GPU.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
cd "$tmp"
python3 -m venv venv
venv/bin/pip install -q --disable-pip-version-check torch==2.13.0 numpy==2.4.6
venv/bin/python - <<'PY'
import time

import numpy as np
import torch
import torch.nn.functional as F


def fastest(function, tries=30):
    seconds = []
    for _ in range(tries):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


torch.manual_seed(0)
small, large = torch.randn(64, 1, 32, 32), torch.randn(250, 1, 64, 64)
rows, values = torch.randn(512, 2000), torch.randn(2**16)
up = lambda antialias: F.interpolate(small, (64, 64), mode="bilinear", antialias=antialias)
channels = lambda: large.transpose(0, 1).contiguous(memory_format=torch.channels_last)
cases = {  # two ways to one result, and by how much the second is at least faster
    "enlarge, antialias": (lambda: up(False), lambda: up(True), 1.3),
    "max_pool2d 5x5, as channels": (lambda: F.max_pool2d(large, 5, 1, 2),
                                    lambda: F.max_pool2d(channels(), 5, 1, 2).transpose(0, 1), 2),
    "sort 65,536, numpy": (lambda: values.sort().values, lambda: torch.from_numpy(np.sort(values.numpy())), 2),
    "argmax of 512 x 2,000, numpy": (lambda: rows.argmax(1), lambda: torch.from_numpy(rows.numpy().argmax(1)), 2),
}
for name, (plain, other, least) in cases.items():
    torch.testing.assert_close(plain(), other(), atol=1e-6, rtol=0)
    a, b = fastest(plain), fastest(other)
    print(f"{name:30} {1e3 * a:6.2f} {1e3 * b:6.2f} ms, {a / b:4.1f} times")
    assert a > least * b, "the behaviour has changed, or this processor differs"
PY
