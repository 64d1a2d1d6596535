"""What `python train.py --preset NAME` trains: the network, its images, how long. A new one is an entry."""

from dataclasses import dataclass

from minimedshift.model import Shape


@dataclass(frozen=True)
class Preset:
    size: int           # side of the training images in pixels
    shape: Shape        # of the network
    steps: int          # optimizer steps
    batch_size: int     # images a step
    lessons: int        # images of each domain that the flow translates for the student
    student_steps: int  # the student's optimizer steps, 32 images each


# GFLOPs are of one evaluation of one image, a multiply-add counted as two.
PRESETS = {
    # 2.65M parameters, 0.54 GFLOPs; the whole of `python train.py` peaked at 1.0 GB
    "cpu": Preset(64, Shape(stem=4, widths=(96, 128), blocks=(2, 2)), 1400, 16, 300, 600),
    # 24.09M parameters, 27.11 GFLOPs; RESULTS.md, section 8, reckons 9 GB and what it takes on three GPUs
    "gpu": Preset(256, Shape(stem=4, widths=(128, 256, 384), blocks=(2, 2, 2)), 10000, 32, 500, 2000),
    # 1.40M parameters, 0.27 GFLOPs; what notebooks/checkpoint.pt holds
    "notebook": Preset(64, Shape(stem=4, widths=(64, 96), blocks=(2, 2)), 1400, 16, 300, 600),
}
