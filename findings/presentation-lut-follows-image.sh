#!/usr/bin/env bash
# pydicom 3.0.2: apply_presentation_lut with PresentationLUTShape INVERSE, after apply_windowing.
# Expected: v becomes (top of the range) - v, here 4095 - v, so equal pixels of two images stay equal.
# What happens: v becomes (largest pixel of THIS array) - v. The brightest pixel of each image becomes 0,
# and a frame alone differs from the same frame in its stack. The page of the function does not say so.
# Bitten: who prepares MONOCHROME1 radiographs (DX asks for INVERSE there): grey levels follow the image.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
cd "$tmp"
python3 -m venv venv
venv/bin/pip install -q --disable-pip-version-check pydicom==3.0.2 numpy==2.4.6
venv/bin/python - <<'PY'
import numpy as np
import pydicom
from pydicom.dataset import Dataset
from pydicom.pixels import apply_presentation_lut, apply_windowing

ds = Dataset()
ds.PhotometricInterpretation, ds.PresentationLUTShape = "MONOCHROME1", "INVERSE"
ds.BitsAllocated, ds.BitsStored, ds.PixelRepresentation = 16, 12, 0
ds.WindowCenter, ds.WindowWidth = 2048, 4096  # the full range: windowing leaves 0..4095 as they are


def shown(pixels):
    pixels = np.array(pixels, np.uint16)
    windowed = apply_windowing(pixels, ds)
    assert np.allclose(windowed, pixels)
    return np.rint(apply_presentation_lut(windowed, ds)).astype(int).tolist()


print("pydicom", pydicom.__version__, "numpy", np.__version__)
bright, dim = [0, 1000, 4095], [0, 1000, 2000]
print("image", bright, "->", shown(bright))
print("image", dim, "->", shown(dim), " expected", [4095 - v for v in dim])
print("the second one in a stack with the first ->", shown([bright, dim])[1])
assert shown(bright) == [4095, 3095, 0]
assert shown(dim) == [2000, 1000, 0], "the behaviour has changed"
assert shown([bright, dim])[1] == [4095, 3095, 2095], "the behaviour has changed"
PY
