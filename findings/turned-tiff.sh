#!/usr/bin/env bash
# Pillow 13.0.0 turns a TIFF file by its orientation tag while it loads it.
# Expected: the same pixels however the file is opened and stored.
# What happens: an uncompressed file of 8 or 16 bits, opened by its path, is mapped into memory with its sides
# exchanged already: rows of the wrong length, a picture in shreds, no error, and the tag is gone. Opened as a
# file object, compressed, or of floats it is right. Orientations 5 to 8 (a quarter turn) are hit.
# Bitten: scans and radiographs with an orientation tag that are not square.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
cd "$tmp"
python3 -m venv venv
venv/bin/pip install -q --disable-pip-version-check pillow==13.0.0 numpy==2.4.6
venv/bin/python - <<'PY'
import numpy as np
import PIL
from PIL import Image

stored = np.arange(35).reshape(5, 7) * 7
turned = np.rot90(stored, 3)  # orientation 6


def read(dtype, by_path, **options):
    Image.fromarray(stored.astype(dtype)).save("x.tif", tiffinfo={274: 6}, **options)
    with open("x.tif", "rb") as file:
        with Image.open("x.tif" if by_path else file) as image:
            image.load()
            return np.asarray(image)


wrong = []
for dtype in ("uint8", "uint16", "float32"):
    for by_path in (True, False):
        for compression in (None, "tiff_lzw"):
            options = {} if compression is None else dict(compression=compression)
            if not np.array_equal(read(dtype, by_path, **options), turned):
                wrong.append((dtype, by_path, compression))
print("Pillow", PIL.__version__, "numpy", np.__version__)
print("stored, row 0         ", stored[0].tolist())
print("right, row 0          ", turned[0].tolist())
print("read by path, row 0   ", read("uint8", True)[0].tolist())
print("wrong (type, by path, compression):", wrong)
assert wrong == [("uint8", True, None), ("uint16", True, None)], "the behaviour has changed"
assert not np.array_equal(read("uint8", True), stored)
PY
