"""What all notebooks share: one style of figures, pictures in a row, source code shown, animations."""

import base64
import hashlib
import importlib
import inspect
import io
import sys
from itertools import cycle
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from IPython import get_ipython
from IPython.display import HTML, Markdown, display
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that notebooks find the package

# Okabe and Ito's colours: readable by colour-blind people, and different in grey
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
MARKERS = ["o", "s", "^", "v", "D", "x", "+"]


def style(seed=0):
    """Set the style of all figures and the seed of torch and numpy."""
    shell = get_ipython()
    shell.run_line_magic("matplotlib", "inline")
    shell.display_formatter.formatters["image/png"].for_type(plt.Figure, few_colours)
    torch.manual_seed(seed)
    np.random.seed(seed)
    plt.rcParams.update({
        "figure.figsize": (7, 3), "figure.dpi": 80, "figure.constrained_layout.use": True,
        "axes.prop_cycle": plt.cycler(color=COLOURS), "axes.spines.top": False, "axes.spines.right": False,
        "axes.grid": True, "grid.alpha": .25, "font.size": 10, "lines.linewidth": 1.8, "legend.frameon": False,
        "image.cmap": "gray", "savefig.bbox": None})


def few_colours(figure):
    """A figure as a PNG with 80 colours, so that notebooks stay small."""
    large, small = io.BytesIO(), io.BytesIO()
    figure.savefig(large, format="png", bbox_inches="tight")
    Image.open(large).convert("RGB").quantize(80, method=1).save(small, "png", optimize=True)
    return small.getvalue()


def markers():
    """A marker for each line, again and again: so that lines differ in print too."""
    return cycle(MARKERS)


def hash_of(thing):
    """The hash of a function's, class's or module's source."""
    return hashlib.sha256(inspect.getsource(thing).encode()).hexdigest()


def source(thing):
    """Show the source of a function or class of the package. Its hash is kept with the output: a test finds
    notebooks that show old code."""
    name = f"{thing.__module__}:{thing.__qualname__}"
    text = inspect.getsource(thing)
    display(Markdown(f"*{thing.__module__}*\n```python\n{text}```"),
            metadata={"shown": {"name": name, "hash": hash_of(thing)}})


def find(name):
    """The function or class that `source` showed under this name."""
    module, qualname = name.split(":")
    thing = importlib.import_module(module)
    for part in qualname.split("."):
        thing = getattr(thing, part)
    return thing


def pictures(images, titles=(), labels=(), width=1.5, low=-1, high=1, cmap="gray"):
    """A grid of pictures: rows of (C, H, W) or (H, W) tensors in [low, high]; a single row may be given bare."""
    rows = images if isinstance(images[0], (list, tuple)) or images[0].ndim == 4 else [images]
    columns = max(len(row) for row in rows)
    figure, axes = plt.subplots(len(rows), columns, figsize=(width * columns, width * len(rows) + .3),
                                squeeze=False)
    for ax in axes.flat:
        ax.axis("off")
    for r, row in enumerate(rows):
        for c, x in enumerate(row):
            x = torch.as_tensor(x).detach().float().cpu()
            x = x[0] if x.ndim == 3 else x
            axes[r, c].imshow(x, vmin=low, vmax=high, cmap=cmap, interpolation="nearest")
    for ax, title in zip(axes[0], titles):
        ax.set_title(title, fontsize=9)
    for ax, label in zip(axes[:, 0], labels):
        ax.text(-.06, .5, label, transform=ax.transAxes, ha="right", va="center", fontsize=9)
    plt.show()


def animate(draw, count, seconds=.12, colours=32):
    """An animation: draw(i) draws frame i on plt.gca(). Few colours keep it small."""
    frames = []
    for i in range(count):
        figure, _ = plt.subplots(figsize=(4, 4), dpi=60)
        draw(i)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
        plt.close(figure)
        frame = Image.open(buffer).convert("RGB")
        frames.append(frame.quantize(colours))
    buffer = io.BytesIO()
    frames[0].save(buffer, format="gif", save_all=True, append_images=frames[1:], loop=0,
                   duration=int(1000 * seconds))
    data = base64.b64encode(buffer.getvalue()).decode()
    display(HTML(f'<img alt="animation" src="data:image/gif;base64,{data}">'))
