"""DICOM files, read through pydicom where the user has it, as a viewer would show them."""

from contextlib import suppress
from pathlib import Path

import numpy as np

from minimedshift.support.command import refuse

pydicom = None  # not everybody has it
with suppress(ImportError):
    import pydicom.pixels
OFTEN_EMPTY = ("RescaleSlope", "RescaleIntercept", "WindowCenter", "WindowWidth", "VOILUTSequence")


def is_dicom(path):
    """Whether a file ends in .dcm, or in no letters (as a UID) and begins as DICOM does."""
    ending = Path(path).suffix.lower().strip(".0123456789")
    begins = not ending and np.fromfile(path, "S4", 1, offset=128).tolist() == [b"DICM"]
    return ending == "dcm" or begins and Path(path).name != "DICOMDIR"


def patient(path):
    """Who is in a DICOM file, if that can be read."""
    with suppress(Exception):  # a damaged header can raise anything
        return pydicom.dcmread(path, True, specific_tags=["PatientID"]).PatientID if is_dicom(path) else ""


@np.errstate(all="ignore")
def decode(path):
    """Grey levels (H, W) float32 of a DICOM file, 0 to 2^bits - 1, if 0 is white, bits, window and sides."""
    refuse(pydicom is None, "`pip install pydicom` to read DICOM, or convert it to 16-bit PNG")
    file = pydicom.dcmread(path)
    for name in [name for name in OFTEN_EMPTY if name in file and file[name].is_empty]:
        del file[name]
    v, bits, kind = file.pixel_array, file.BitsStored, file.PhotometricInterpretation
    refuse(v.ndim != 2 or kind[:4] != "MONO" or not file.get("HighBit", 0) < bits < 17
           or "SharedFunctionalGroupsSequence" in file, f"{kind}, {v.shape}, {bits} bits: export 16-bit grey")
    ends = np.array([0, 2**bits - 1]) - file.PixelRepresentation * 2 ** (bits - 1)  # numbers can have a sign
    v, ends = (pydicom.pixels.apply_modality_lut(a, file) for a in (v, ends))
    if "VOILUTSequence" in file:
        file.VOILUTSequence[0].LUTDescriptor[2] = 16  # where it is 8, pydicom looks up v modulo 256
        v, ends = (pydicom.pixels.apply_voi(np.asarray(a, int), file) for a in (v, np.arange(-2**16, 2**16)))
    low, high = float(min(ends)), float(max(ends))
    if "WindowWidth" in file and "WindowCenter" in file and "VOILUTSequence" not in file:
        v, (low, high) = (pydicom.pixels.apply_windowing(a, file) for a in (v, np.array([-1e9, 1e9])))
    v = ((v - low) / ((high - low) or 1)).clip(0, 1) * (2**bits - 1)
    hw = file.get("PixelSpacing") or file.get("ImagerPixelSpacing") or file.get("PixelAspectRatio") or (1, 1)
    window = f"{file.get('WindowCenter', f'none, levels {low:g} to {high:g}')}/{file.get('WindowWidth', '')}"
    return v.round().astype(np.float32), kind == "MONOCHROME1", bits, dict(window=window, sides=hw[:2])
