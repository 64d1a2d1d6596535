#!/usr/bin/env bash
# torch 2.13.0: an nn.Embedding on the device "meta", which has no memory and does no work.
# Expected: it costs nothing, like an nn.Linear or nn.Conv2d there.
# What happens: its normal initial values are drawn by a decomposition in Python, for which hundreds of modules
# of torch's compiler are imported: a second and about 75 MB. With uniform initial values nothing is imported.
# Output seen (modules imported): plain 1, uniform 1, normal 823.
# Bitten: who builds a network without memory to fill it from a file, as soon as it has an embedding.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
cd "$tmp"
python3 -m venv venv
venv/bin/pip install -q --disable-pip-version-check torch==2.13.0 numpy==2.4.6
for kind in plain uniform normal; do
    venv/bin/python - "$kind" <<'PY'
import sys
import time

import torch
from torch import nn

make = {
    "plain": lambda: (nn.Conv2d(3, 3, 3), nn.Linear(3, 3), nn.GroupNorm(1, 2)),
    "uniform": lambda: nn.Embedding(3, 4, _weight=torch.empty(3, 4).uniform_()),
    "normal": lambda: nn.Embedding(3, 4),
}[sys.argv[1]]
before, start = set(sys.modules), time.time()
with torch.device("meta"):
    make()
count = len(set(sys.modules) - before)
print(f"torch {torch.__version__}, {sys.argv[1]}: {count} modules imported in {time.time() - start:.2f} s")
assert (count > 100) == (sys.argv[1] == "normal"), "the behaviour has changed"
PY
done
