"""Pictures of translations: what changed (--compare), the way down to z and up again (--trajectory), and
where several translations of one image differ (--uncertainty)."""

import math

import torch

from minimedshift import sampler
from minimedshift.bands import low_pass
from minimedshift.flow import draw_noise
from minimedshift.support import images

ROWS = 8      # images in a picture
MOST = 4      # steps of a leg that are shown
FRESH = 0.95  # share of tau from which `samples` start on their way up


class Pictures:
    """What --compare, --trajectory and --uncertainty (fields of c) show of the first ROWS images."""

    def __init__(self, c, model, how, domains):
        self.c, self.model, self.how, self.domains = c, model, how, domains
        self.names, self.compare, self.films, self.spreads = [], [], [], []

    def add(self, changed, x1, y_source, y_target, out):
        """A batch: [(name, source, translation)] at full size; the same at working size with labels (B,)."""
        n = min(len(x1), ROWS - len(self.names))
        if n == 0:
            return
        x1, labels = x1[:n], (y_source[:n], y_target[:n])
        draw = torch.Generator(x1.device).manual_seed(self.c.seed)
        for name, source, new in changed[:n]:
            self.names.append(name[-24:])
            self.compare.append((source, new, (new - source) / 2))
        if self.c.trajectory:
            states = list(sampler.trajectory(self.model, x1, *labels, **self.how, generator=draw))
            self.times = [t for t, _ in states]
            for i, y in enumerate(y_source[:n].tolist()):
                label = f"{self.domains[y]} ->\n{self.c.target}"
                self.films.append((label, [xt[i].cpu() for _, xt in states]))
        if self.c.uncertainty:
            several = samples(self.model, x1, *labels, self.c.samples or 8, generator=draw, **self.how)
            several = several.clamp(-1, 1).cpu()
            self.spreads += zip(x1.cpu(), out[:n].cpu(), spread(several), *several[:2])

    def write(self):
        """The files, each whole or not at all."""
        if self.c.compare and self.names:
            titles = ["source", "translation", "difference / 2\n(grey: none)"]
            images.figure(self.c.compare, self.compare, titles, self.names)
        if self.films:
            strip(self.c.trajectory, self.times, self.films)
        if self.spreads:
            top = max(row[2].max().item() for row in self.spreads) or 1.0
            rows = [(x1, out, wide / top * 2 - 1, *two) for x1, out, wide, *two in self.spreads]
            scale = f"standard deviation\n(white: {top:.2g})"
            titles = ["source", "translation", scale, "a sample", "another"]
            images.figure(self.c.uncertainty, rows, titles, self.names)


@torch.inference_mode()
def samples(model, x1, y_source, y_target, count, tau=0.3, guidance=1.0, generator=None, **how):
    """`count` translations of images x1 (B, C, H, W), with fresh noise: (count, B, C, H, W). z at tau becomes

        xs = FRESH z + sqrt((1 - s)^2 - FRESH^2 (1 - tau)^2) e        s = FRESH tau, e: noise as in training

    with the bridge's shares at s of image, s, and of noise, 1 - s (sigma = 0). From there it is decoded.
    """
    how = {name: value for name, value in how.items() if name != "x0"}
    z, s, out = sampler.encode(model, x1, y_source, tau, **how, generator=generator), FRESH * tau, []
    fresh = math.sqrt((1 - s) ** 2 - FRESH**2 * (1 - tau) ** 2)
    for _ in range(count):
        xs = FRESH * z + fresh * draw_noise(z.shape, generator, how.get("colour", 0.0), z.device)
        out.append(sampler.decode(model, xs, y_target, s, guidance, **how, generator=generator))
    return torch.stack(out)


def spread(several):
    """Where K translations (K, B, C, H, W) differ: standard deviation of each low-passed pixel, (B, C, H, W).

    Its size is about that of the error, its place is not (RESULTS.md): what is wrong in all cannot show."""
    return torch.stack([low_pass(x) for x in several]).std(0)


def some(first, last):
    """The integers first and last, and a few between."""
    return torch.linspace(first, last, min(MOST, last - first) + 1).round().int().tolist()


def strip(path, times, films):
    """A row for each image, t above each picture, as in Fig. 1 of arXiv:2508.21435.

    times: of the states of a `sampler.trajectory`; films: for each image a label and its states (C, H, W)."""
    z = times.index(min(times))
    shown = some(0, z) + some(z, len(times) - 1)[1:]
    leg = {0: "encode ->", z: "translate ->"}  # z = 0 where an image goes from domain to domain directly
    titles = [f"{leg.get(i, '')}\nt = {times[i]:.2f}" for i in shown]
    rows = []
    for _, states in films:
        rows.append([states[i] for i in shown])
    images.figure(path, rows, titles, [label for label, _ in films])
