#!/usr/bin/env bash
# Pillow 13.0.0 reads big-endian TIFF, zlib or LZW, of int16 or float32 (files by tifffile 2026.3.3).
# Expected: the pixels that were written; tifffile reads them back so.
# What happens: the two (four) bytes of each pixel are swapped: 1 becomes 256, 1.0 becomes 4.6e-41. No error.
# Uncompressed files, little-endian files and uint16 files are right, all by the same program.
# Bitten: who reads compressed CT (Hounsfield, signed) or float maps in TIFF from a big-endian writer.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
cd "$tmp"
python3 -m venv venv
venv/bin/pip install -q --disable-pip-version-check \
    pillow==13.0.0 tifffile==2026.3.3 imagecodecs==2026.3.6 numpy==2.4.6
venv/bin/python - <<'PY'
import numpy as np
import PIL
import tifffile
from PIL import Image

images = {
    "int16": np.array([[-1000, -2, 1, 258], [40, 3000, 513, 7]], np.int16),
    "uint16": np.array([[1000, 2, 1, 258], [40, 3000, 513, 65535]], np.uint16),
    "float32": np.array([[0.5, 1, -1000, 258], [40, 3000, 0.1, 7]], np.float32),
}
print("Pillow", PIL.__version__, "tifffile", tifffile.__version__, "numpy", np.__version__)
swapped = []
for name, a in images.items():
    for order in ("<", ">"):
        for compression in (None, "zlib", "lzw"):
            tifffile.imwrite("x.tif", a, byteorder=order, compression=compression, photometric="minisblack")
            assert np.array_equal(tifffile.imread("x.tif"), a)
            with Image.open("x.tif") as im:
                got = np.asarray(im).astype(a.dtype)
            right = got.tobytes() == a.tobytes()
            swap = got.tobytes() == a.byteswap().tobytes()
            assert right != swap, "neither right nor swapped: the behaviour has changed"
            if swap:
                swapped.append((name, order, compression))
            print(f"{name:8} {order} {compression!s:5} {'SWAPPED' if swap else 'right  '}", got[0].tolist())
assert swapped == [(n, ">", c) for n in ("int16", "float32") for c in ("zlib", "lzw")], \
    "the behaviour has changed"
PY
