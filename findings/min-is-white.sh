#!/usr/bin/env bash
# A grey TIFF with "0 is white" (photometric 0): Pillow 13.0.0, OpenCV 5.0.0.93, tifffile 2026.3.3.
# Expected: one reader either inverts such files or does not, whatever the bits.
# What happens: Pillow inverts at 8 bits, not at 16. OpenCV inverts at 8 bits; at 16 bits it inverts when the
# flag makes it 8 bits (IMREAD_GRAYSCALE) and not when it stays 16 (IMREAD_UNCHANGED). tifffile never does.
# Bitten: who mixes 8- and 16-bit radiographs, or changes reader or flag: part of the images are negatives.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
cd "$tmp"
python3 -m venv venv
venv/bin/pip install -q --disable-pip-version-check \
    pillow==13.0.0 tifffile==2026.3.3 opencv-python-headless==5.0.0.93 numpy==2.4.6
venv/bin/python - <<'PY'
import cv2
import numpy as np
import PIL
import tifffile
from PIL import Image

READERS = {
    "tifffile": tifffile.imread,
    "Pillow": lambda path: np.asarray(Image.open(path)),
    "OpenCV UNCHANGED": lambda path: cv2.imread(path, cv2.IMREAD_UNCHANGED),
    "OpenCV GRAYSCALE": lambda path: cv2.imread(path, cv2.IMREAD_GRAYSCALE),
}
print("Pillow", PIL.__version__, "OpenCV", cv2.__version__,
      "tifffile", tifffile.__version__, "numpy", np.__version__)
seen = {}
for bits, values in ((8, [0, 10, 255]), (16, [0, 1000, 65535])):
    a = np.array([values, values], f"uint{bits}")
    print(f"{bits} bits, stored", values)
    for name, read in READERS.items():
        tifffile.imwrite("x.tif", a, photometric="miniswhite")
        white = read("x.tif")[0].tolist()
        tifffile.imwrite("x.tif", a, photometric="minisblack")
        black = read("x.tif")[0].tolist()
        assert black == sorted(black), "0 is black is never inverted"
        seen[name, bits] = white
        print(f"  {name:16}  0 is black: {black!s:18} 0 is white: {white}")
assert seen == {
    ("tifffile", 8): [0, 10, 255], ("tifffile", 16): [0, 1000, 65535],
    ("Pillow", 8): [255, 245, 0], ("Pillow", 16): [0, 1000, 65535],
    ("OpenCV UNCHANGED", 8): [255, 245, 0], ("OpenCV UNCHANGED", 16): [0, 1000, 65535],
    ("OpenCV GRAYSCALE", 8): [255, 245, 0], ("OpenCV GRAYSCALE", 16): [255, 252, 0],
}, "the behaviour has changed"
PY
