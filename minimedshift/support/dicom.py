"""DICOM files, read through pydicom where the user has it, as a viewer would show them."""

from pathlib import Path

import numpy as np

from minimedshift.support.command import refuse

try:
    import pydicom
    from pydicom.pixels import apply_modality_lut, apply_voi, apply_windowing
except ImportError:
    pydicom = None


def is_dicom(path):
    """Whether a file ends in .dcm, or in no letters (as a UID) and begins as DICOM does."""
    ending = Path(path).suffix.lower()
    if ending.strip(".0123456789"):
        return ending == ".dcm"
    with open(path, "rb") as file:
        return file.read(132)[128:] == b"DICM"


def decode(path):
    """Grey levels (H, W) float32 of a DICOM file, from 0 to 2^bits - 1, whether 0 is white, and the bits."""
    refuse(pydicom is None, f"{path}: `pip install pydicom` to read DICOM, or convert it to 16-bit PNG")
    file = pydicom.dcmread(path)
    v, bits, kind = file.pixel_array, file.BitsStored, file.PhotometricInterpretation
    refuse(v.ndim != 2 or not kind.startswith("MONO"), f"{path}: {kind} of shape {v.shape} is no grey image")
    half = 2 ** (bits - 1) * file.PixelRepresentation  # of numbers with a sign
    v, ends = (apply_modality_lut(a, file) for a in (v, np.array([0, 2**bits - 1]) - half))
    if "VOILUTSequence" in file:
        file.VOILUTSequence[0].LUTDescriptor[2] = 16  # where it is 8, pydicom looks up v modulo 256
        v, ends = (apply_voi(np.asarray(a, int), file) for a in (v, ends))
    elif "WindowWidth" in file:
        v, ends = apply_windowing(v, file), apply_windowing(np.array([-1e9, 1e9]), file)
    share = (v - float(min(ends))) / (float(max(ends)) - float(min(ends)))
    return (share.clip(0, 1) * (2**bits - 1)).round().astype(np.float32), kind == "MONOCHROME1", bits
