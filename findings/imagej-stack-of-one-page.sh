#!/usr/bin/env bash
# Pillow 13.0.0 reads an ImageJ stack that has one page for all its slices. ImageJ writes stacks above 4 GB so,
# tifffile 2026.3.3 any that it is asked to truncate: `imwrite(path, stack, imagej=True, truncate=True)`.
# Expected: as many frames as there are slices (as tifffile and ImageJ show), or an error.
# What happens: n_frames is 1 and the first slice is read, without an error. Only the description
# (tag 270, images=N) tells of the others. A file with a page for each slice has all its frames.
# Bitten: who takes n_frames == 1 for "one image", and writes the first slice back under the same description.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
cd "$tmp"
python3 -m venv venv
venv/bin/pip install -q --disable-pip-version-check pillow==13.0.0 tifffile==2026.3.3 numpy==2.4.6
venv/bin/python - <<'PY'
import numpy as np
import PIL
import tifffile
from PIL import Image

stack = np.arange(4 * 6 * 8, dtype=np.uint16).reshape(4, 6, 8)
print("Pillow", PIL.__version__, "tifffile", tifffile.__version__, "numpy", np.__version__)
frames = {}
for name, truncate in (("a page each", False), ("one page", True)):
    tifffile.imwrite("x.tif", stack, imagej=True, truncate=truncate)
    assert np.array_equal(tifffile.imread("x.tif"), stack)
    with Image.open("x.tif") as image:
        frames[name], first = image.n_frames, np.asarray(image)
        print(f"{name}: tifffile {stack.shape}, Pillow {image.n_frames} frames of {first.shape},",
              image.tag_v2[270].split("\n")[1])
        assert np.array_equal(first, stack[0])
assert frames == {"a page each": 4, "one page": 1}, "the behaviour has changed"
PY
