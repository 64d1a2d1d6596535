#!/usr/bin/env bash
# pydicom 3.0.2, numpy 2.4.6: apply_windowing where RescaleSlope is negative (here v -> 4095 - v).
# Expected: DICOM PS3.3, C.11.2.1.2: what lies below the window is black (smallest output), above it white.
# What happens: the ends of the OUTPUT range are sent through the slope too, so they are swapped: the picture is
# a negative. No warning. With a positive slope, or without a window, it is not.
# Bitten: who shows or trains on radiographs of makers that store the negative of what the window is meant for.
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
from pydicom.pixels import apply_modality_lut, apply_windowing

pixels = np.array([0, 1000, 2048, 3000, 4095], np.uint16)


def shown(slope, intercept):
    ds = Dataset()
    ds.BitsAllocated, ds.BitsStored, ds.PixelRepresentation = 16, 12, 0
    ds.PhotometricInterpretation = "MONOCHROME2"
    ds.RescaleSlope, ds.RescaleIntercept = slope, intercept
    ds.WindowCenter, ds.WindowWidth = 2048, 4096  # all of the range
    values = apply_modality_lut(pixels, ds)
    return values.tolist(), apply_windowing(values, ds).round().tolist()


print("pydicom", pydicom.__version__, "numpy", np.__version__)
print("stored pixels      ", pixels.tolist())
for slope, intercept in ((1, 0), (-1, 4095)):
    values, out = shown(slope, intercept)
    print(f"slope {slope:2}: values  ", values)
    print("          windowed ", out, "(the window is as wide as the range: expected like the values)")
(up, up_shown), (down, down_shown) = shown(1, 0), shown(-1, 4095)
assert np.allclose(up, up_shown, atol=2)
assert np.corrcoef(down, down_shown)[0, 1] < -.999, "the behaviour has changed"
PY
