"""A film strip of translations: the source down to z at tau, and up again (Fig. 1 of arXiv:2508.21435)."""

from matplotlib.figure import Figure

from . import whole

BLUE, GREY, ORANGE = "#1b5e8c", "#333333", "#c8520e"
MOST = 4  # steps of a leg that are shown


def some(leg):
    """The first and the last state of a leg and a few between."""
    steps = min(MOST, len(leg) - 1)
    return [leg[round(i * (len(leg) - 1) / steps)] for i in range(steps + 1)]


def strip(path, films, sources, target):
    """Draw a row for each image, t under each picture; the file is written whole or not at all.

    films: for each image the (t, xt) that `sampler.trajectory` yields, xt (C, H, W); sources: their domains.
    """
    times = [t for t, _ in films[0]]
    z = times.index(min(times))
    down = some(range(z + 1))[:-1] if z else []  # none where an image goes from domain to domain directly
    up = some(range(z, len(times))[::-1])[::-1]
    shown, z = down + up, len(down)
    colours = [BLUE] * z + [GREY if down else BLUE] + [ORANGE] * (len(up) - 1)
    rows, columns = len(films), len(shown)
    sheet = Figure(figsize=(1.5 * columns, 1.75 * rows + 0.2), layout="constrained")
    for row, line in enumerate(sheet.subplots(rows, columns, squeeze=False)):
        titles = [""] * columns
        titles[z // 2], titles[(z + columns) // 2] = "encode →", "translate →"
        titles[0], titles[-1] = sources[row], target  # where a leg is a single step, in place of its arrow
        for i, state in enumerate(shown):
            t, xt = films[row][state]
            x = (xt.float().cpu().clamp(-1, 1) + 1) / 2  # (C, H, W)
            line[i].imshow(x[0] if len(x) == 1 else x.permute(1, 2, 0), cmap="gray", vmin=0, vmax=1)
            line[i].set(xticks=[], yticks=[], xlabel=f"z, t = {t:.2f}" if i == z and down else f"t = {t:.2f}")
            line[i].set_title(titles[i], color=colours[i], fontsize=9)
            for spine in line[i].spines.values():
                spine.set(color=colours[i], linewidth=3 if i in (0, z, columns - 1) else 1)
    with whole(path) as work:
        sheet.savefig(work, dpi=110)
