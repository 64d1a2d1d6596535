"""Pictures of translations: what changed, the way down to z and up again, and what was chance."""

import math

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from minimedshift import sampler
from minimedshift.bands import low_pass
from minimedshift.flow import draw_noise
from minimedshift.support.files import whole
from minimedshift.support.images import figure

ROWS = 8      # images in a picture
MOST = 4      # steps of a leg that are shown
FRESH = 0.95  # share of tau from which `samples` start on their way up
BLUE, GREY, ORANGE = "#1b5e8c", "#333333", "#c8520e"


class Pictures:
    """What --compare, --trajectory and --uncertainty (fields of c) show of the first ROWS images."""

    def __init__(self, c, model, how, domains):
        self.c, self.model, self.how, self.domains = c, model, how, domains
        self.names, self.compare, self.films, self.sources, self.spreads = [], [], [], [], []

    def add(self, changed, x1, y_source, y_target, out):
        """A batch: [(name, source, translation)] at full size; the same at working size with labels (B,)."""
        n = min(len(x1), ROWS - len(self.names))
        if n == 0:
            return
        x1, labels = x1[:n], (y_source[:n], y_target[:n])
        draw = torch.Generator(x1.device).manual_seed(self.c.seed)
        for name, source, new in changed[:n]:
            self.names.append(name[:24])
            self.compare.append((source, new, (new - source) / 2))
        if self.c.trajectory:
            states = list(sampler.trajectory(self.model, x1, *labels, **self.how, generator=draw))
            for i, y in enumerate(labels[0].tolist()):
                self.films.append([(t, xt[i].cpu()) for t, xt in states])
                self.sources.append(self.domains[y])
        if self.c.uncertainty:
            how = {name: value for name, value in self.how.items() if name != "x0"}
            several = samples(self.model, x1, *labels, self.c.samples or 8, **how, generator=draw)
            several = several.clamp(-1, 1).cpu()
            self.spreads += zip(x1.cpu(), out[:n].cpu(), spread(several), *several[:2])

    def write(self):
        """The files, each whole or not at all."""
        if self.c.compare and self.names:
            titles = ["source", "translation", "difference / 2\n(grey: none)"]
            figure(self.c.compare, self.compare, titles, self.names)
        if self.films:
            strip(self.c.trajectory, self.films, self.sources, self.c.target)
        if self.spreads:
            top = max(row[2].max().item() for row in self.spreads) or 1.0
            rows = [(x1, out, wide / top * 2 - 1, *two) for x1, out, wide, *two in self.spreads]
            scale = f"standard deviation\n(white: {top:.2g})"
            titles = ["source", "translation", scale, "a sample", "another"]
            figure(self.c.uncertainty, rows, titles, self.names)


@torch.inference_mode()
def samples(model, x1, y_source, y_target, count, tau=0.3, guidance=1.0, steps=3, solver="fireflow", end=0.97,
            colour=0.0, generator=None):
    """`count` translations of images x1 (B, C, H, W), with fresh noise: (count, B, C, H, W). z at tau becomes

        xs = FRESH z + sqrt((1 - s)^2 - FRESH^2 (1 - tau)^2) e        s = FRESH tau, e: noise as in training

    with the bridge's shares at s (sigma = 0) of image, s, and of noise, 1 - s, and is decoded from there.
    Samples differ in what z at s leaves open. Raises what `sampler.trajectory` raises.
    """
    z, s = sampler.encode(model, x1, y_source, tau, steps, solver, end, colour, generator), FRESH * tau
    fresh, out = math.sqrt((1 - s) ** 2 - FRESH**2 * (1 - tau) ** 2), []
    for _ in range(count):
        xs = FRESH * z + fresh * draw_noise(z.shape, generator, colour, z.device)
        out.append(sampler.decode(model, xs, y_target, s, guidance, steps, solver, end, colour, generator))
    return torch.stack(out)


def spread(several):
    """Where K translations (K, B, C, H, W) differ: standard deviation of each low-passed pixel, (B, C, H, W).

    Its size is about that of the error, its place is not: edges of the source tell that as well (mean rank
    correlation .2 for both, simulated heads). A tone that is wrong in all samples cannot show.
    """
    return torch.stack([low_pass(x) for x in several]).std(0)


def some(leg):
    """The first and the last state of a leg and a few between."""
    steps = min(MOST, len(leg) - 1)
    return [leg[round(i * (len(leg) - 1) / steps)] for i in range(steps + 1)]


def strip(path, films, sources, target):
    """A row for each image, t under each picture, as in Fig. 1 of arXiv:2508.21435.

    films: for each image the (t, xt) of `sampler.trajectory`, xt (C, H, W); sources: the domain of each.
    """
    times = [t for t, _ in films[0]]
    z = times.index(min(times))
    down = some(range(z + 1))[:-1] if z else []  # none where an image goes from domain to domain directly
    up = some(range(z, len(times))[::-1])[::-1]
    shown, z = down + up, len(down)
    colours = [BLUE] * z + [GREY if down else BLUE] + [ORANGE] * (len(up) - 1)
    rows, columns = len(films), len(shown)
    sheet = Figure(figsize=(1.5 * columns, 1.85 * rows + 0.2), dpi=110, layout="constrained")
    for row, line in enumerate(sheet.subplots(rows, columns, squeeze=False)):
        titles = [""] * columns
        titles[z // 2], titles[(z + columns) // 2] = "encode →", "translate →"
        titles[0], titles[-1] = sources[row], target  # where a leg is a single step, in place of its arrow
        for i, state in enumerate(shown):
            t, xt = films[row][state]
            x = (xt.float().clamp(-1, 1) + 1) / 2
            line[i].imshow((x[0] if len(x) == 1 else x.permute(1, 2, 0)).numpy(), cmap="gray", vmin=0, vmax=1)
            line[i].set(xticks=[], yticks=[], xlabel=f"z, t = {t:.2f}" if i == z and down else f"t = {t:.2f}")
            line[i].set_title(titles[i], color=colours[i], fontsize=9)
            for spine in line[i].spines.values():
                spine.set(color=colours[i], linewidth=3 if i in (0, z, columns - 1) else 1)
    canvas = FigureCanvasAgg(sheet)
    canvas.draw()
    with whole(path) as work:
        Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB").save(work)
