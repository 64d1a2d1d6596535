#!/usr/bin/env bash
# pydicom 3.0.2, numpy 2.4.6: apply_voi with a VOI LUT of 4096 entries of 8 bits, on pixels of 12 bits.
# Expected: pixel v gives entry v of the table, here v // 16, so black to white over 0..4095.
# What happens: the array of indices has the type of the ENTRIES, uint8, so pixel v gives entry v % 256.
# No warning. A table of 16-bit entries with the same numbers is right.
# Bitten: who shows or trains on radiographs whose LUT maps 10 to 16 bits to 8 (entries one a word, VR US).
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
from pydicom.pixels import apply_voi

pixels = np.array([[0, 100, 255, 256, 1000, 4095]], np.uint16)
table = [v // 16 for v in range(4096)]


def voi(bits):
    item = Dataset()
    item.add_new("LUTDescriptor", "US", [4096, 0, bits])
    item.add_new("LUTData", "US", table)
    ds = Dataset()
    ds.BitsAllocated, ds.BitsStored, ds.PixelRepresentation = 16, 12, 0
    ds.VOILUTSequence = [item]
    return apply_voi(pixels, ds)


expected = [table[v] for v in pixels[0]]
got16, got8 = voi(16)[0].tolist(), voi(8)[0].tolist()
print("pydicom", pydicom.__version__, "numpy", np.__version__)
print("pixels          ", pixels[0].tolist())
print("expected        ", expected)
print("entries, 16 bits", got16)
print("entries, 8 bits ", got8)
assert got16 == expected == [0, 6, 15, 16, 62, 255]
assert got8 == [table[v % 256] for v in pixels[0]] == [0, 6, 15, 0, 14, 15], "the behaviour has changed"
PY
