#!/usr/bin/env bash
# Pillow 13.0.0 reads an uncompressed TIFF of 16-bit RGB in separate planes. tifffile 2026.3.3 writes one by
# itself for a stack of three 16-bit images, `imwrite(path, stack)` with shape (3, H, W).
# Expected: the 8 high bits of each value (as for the same file with zlib), or an error.
# What happens: 8-bit RGB whose pixels are the low and the high BYTES in turn, of the upper half of the image
# only. The size is right and there is no error.
# Bitten: who opens with Pillow a stack of three radiographs or slices, or planar RGB of 16 bits.
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

H, W = 6, 8
ramp = np.arange(H * W, dtype=np.uint16).reshape(H, W)
stack = np.stack([ramp + 0x1000, ramp + 0x3000, ramp + 0x5000])


def pillow(**options):
    tifffile.imwrite("x.tif", stack, **options)
    with tifffile.TiffFile("x.tif") as file:
        page = file.pages[0]
        assert (page.photometric.name, page.planarconfig.name) == ("RGB", "SEPARATE")
        assert np.array_equal(page.asarray(), stack)
    with Image.open("x.tif") as im:
        assert (im.mode, im.size) == ("RGB", (W, H))
        return np.asarray(im)


high = np.moveaxis(stack >> 8, 0, -1)
planes = [np.frombuffer(plane.astype("<u2").tobytes(), np.uint8) for plane in stack]
in_turn = np.stack([plane[:H * W].reshape(H, W) for plane in planes], -1)
zlib, plain = pillow(compression="zlib"), pillow()
print("Pillow", PIL.__version__, "tifffile", tifffile.__version__, "numpy", np.__version__)
print("written, red, row 0      ", [hex(v) for v in stack[0, 0]])
print("zlib, red, row 0         ", [hex(v) for v in zlib[0, :, 0]])
print("uncompressed, red, row 0 ", [hex(v) for v in plain[0, :, 0]])
assert np.array_equal(zlib, high)
assert np.array_equal(plain, in_turn) and not np.array_equal(plain, high), "the behaviour has changed"
assert plain[0, :, 0].tolist() == [0, 16, 1, 16, 2, 16, 3, 16]
PY
