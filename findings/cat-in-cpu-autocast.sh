#!/usr/bin/env bash
# torch 2.13.0: a batch put together inside autocast on a CPU, of images that are stored as float16.
# Expected: torch.cat and torch.stack only move values, so autocast to bfloat16 leaves them alone or casts them,
# as it does with a matrix product of the same tensors.
# What happens: both raise RuntimeError; the sum, torch.where and the product of the same tensors work.
# Output seen: bfloat16: cat raises, stack raises, sum float16, where float16, product bfloat16;
#              float16: cat float16, stack float16, sum float16, where float16, product float16
# Bitten: whoever keeps images in half the memory and joins batches where the network runs, without a GPU.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
cd "$tmp"
python3 -m venv venv
venv/bin/pip install -q --disable-pip-version-check torch==2.13.0 numpy==2.4.6
venv/bin/python - <<'PY'
import torch

x = torch.ones(4, 4, dtype=torch.float16)
cases = {
    "cat": lambda: torch.cat([x, x]),
    "stack": lambda: torch.stack([x, x]),
    "sum": lambda: x + x,
    "where": lambda: torch.where(x > 0, x, x),
    "product": lambda: x @ x,
}


def outcome(function):
    try:
        return str(function().dtype).removeprefix("torch.")
    except RuntimeError as error:
        assert "Unexpected floating ScalarType" in str(error)
        return "raises"


for dtype in (torch.bfloat16, torch.float16):
    with torch.autocast("cpu", dtype):
        found = {name: outcome(function) for name, function in cases.items()}
    print(dtype, found)
    expected = dict.fromkeys(cases, "float16")
    if dtype == torch.bfloat16:
        expected |= dict(cat="raises", stack="raises", product="bfloat16")
    assert found == expected, "the behaviour has changed"
PY
