#!/usr/bin/env bash
# Pillow 13.0.0 reads a lossless grey JPEG 2000 of 12 bits (file by imagecodecs 2026.3.6).
# Expected: the values 0..4095 that were stored, as OpenCV 5.0.0.93 and imagecodecs give, and as Pillow itself
# gives for a TIFF of 12 bits.
# What happens: Pillow gives 16 times each value (a shift up to 16 bits), mode I;16, and says it nowhere.
# Bitten: who takes JPEG 2000 frames out of DICOM by hand, or mixes TIFF and JPEG 2000: 16 times off.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
cd "$tmp"
python3 -m venv venv
venv/bin/pip install -q --disable-pip-version-check pillow==13.0.0 tifffile==2026.3.3 imagecodecs==2026.3.6 \
    opencv-python-headless==5.0.0.93 numpy==2.4.6
venv/bin/python - <<'PY'
import cv2
import imagecodecs
import numpy as np
import PIL
import tifffile
from PIL import Image

values = [0, 1, 100, 1000, 2000, 3000, 4094, 4095]
a = np.tile(np.array(values, np.uint16), (8, 1))
print("Pillow", PIL.__version__, "OpenCV", cv2.__version__, "imagecodecs", imagecodecs.__version__)
print("stored                   ", values)


def j2k(bits):
    with open("x.j2k", "wb") as file:
        file.write(imagecodecs.jpeg2k_encode(a, level=0, reversible=True, bitspersample=bits))
    assert np.array_equal(imagecodecs.imread("x.j2k"), a)
    assert np.array_equal(cv2.imread("x.j2k", cv2.IMREAD_UNCHANGED), a)
    return pillow("x.j2k")


def pillow(path):
    with Image.open(path) as im:
        assert im.mode == "I;16"
        return np.asarray(im)[0].tolist()


tifffile.imwrite("x.tif", a, bitspersample=12, photometric="minisblack")
tiff12, j2k16, j2k12 = pillow("x.tif"), j2k(16), j2k(12)
print("Pillow, TIFF of 12 bits  ", tiff12)
print("Pillow, JPEG 2000, 16    ", j2k16)
print("Pillow, JPEG 2000, 12    ", j2k12)
assert tiff12 == j2k16 == values
assert j2k12 == [16 * v for v in values], "the behaviour has changed"
PY
