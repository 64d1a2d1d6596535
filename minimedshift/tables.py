"""What an evaluation found, for people: results.json as table.md and pareto.png."""

from itertools import cycle

from matplotlib.figure import Figure

from minimedshift.metrics import METRICS
from minimedshift.support.files import write_whole

COLOURS = dict(bound="k", unpaired="tab:orange", learned="tab:purple", ours="tab:blue", ceiling="0.45")
MAIN = {  # column of the main pair: key of a row, format
    "structure, dB": ("structure", ".2f"), "median": ("median", ".2f"), "worst tenth": ("worst_tenth", ".2f"),
    "E": ("E", ".5f"), "gap closed": ("gap_closed", ".0%"), "95%": ("gap_interval", ".0%"),
    "less ours": ("less_ours", "+.0%"), "same head": ("same_head", ".0%"),
    **{name: (name, ".3g") for name in METRICS}, "kernel": ("kernel", ".4f")}
SHORT = {name: MAIN[name] for name in ("structure, dB", "gap closed", "same head", "noise")}
ALL = {  # column of the means over pairs
    "mean gap closed": ("gap_closed", ".0%"), "95%": ("gap_interval", ".0%"), "pairs": ("pairs", "d"),
    "with a gap": ("pairs_with_gap", "d"), "worst pair": ("worst_pair", ".0%"),
    "noise within 1/2 to 2": ("noise_right", "d"), "same head": ("same_head", ".0%")}
ABOUT = """# {source} -> {target}

`{command}`, seed {seed}, {machine},
torch {torch}, {weights} weights of step {steps}, {evaluation_seconds:.0f} s.

Less ours: gap closed less that of the last method of ours. Kernel: distance to {references} training
images of the target; the floor is the second exposure (or real against real).
"""
SIMULATED = """
Everything is simulated (version {version}), the real domains too. S = {shift:g}: the share of training
heads from each domain's own population.
"""


def cell(value, form):
    """A number, or an interval (low, high), as text; a dash where there is none."""
    if value is None:
        return "-"
    parts = value if isinstance(value, (list, tuple)) else [value]
    return " to ".join(format(part, form) for part in parts)


def markdown(rows, columns):
    """Rows {method: {key: value}} as a Markdown table. columns: {header: (key, format)}."""
    lines = [["method", "kind", *columns], ["---"] * (2 + len(columns))]
    for name, row in rows.items():
        cells = [cell(row.get(key), form) for key, form in columns.values()]
        name += "" if row["setting"] is None else f", {row['knob']} {row['setting']:g}"
        lines.append([name, row["kind"], *cells])
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def page(results):
    """results.json as Markdown."""
    text = (ABOUT + SIMULATED * results["simulated"]).format(**results)
    for population, rows in results["main_pair"].items():
        text += f"\n## {results['heads']} test heads, {population} population\n\n" + markdown(rows, MAIN)
    for population, found in results["all_pairs"].items():
        heads = f"{results['heads_each']} test heads each, {population} population"
        text += f"\n## All ordered pairs, {heads}\n\n" + markdown(found["means"], ALL)
    return text


def pareto(path, results):
    """pareto.png: structure against realism on validation heads, each method along its own knob."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes, markers = figure.subplots(), cycle("os^vDP*x+")
    for name, row in results["main_pair"]["shared"].items():
        if name in ("second exposure", "real against real"):  # at 0 but for chance: not on this axis
            continue
        points = results["pareto"][name]
        if len(points) > 1:
            name += f", {row['knob']} {points[0]['setting']:g} to {points[-1]['setting']:g}"
        x, y = ([point[key] for point in points] for key in ("structure", "kernel"))
        axes.plot(x, y, next(markers), ls="-", lw=1, ms=5, color=COLOURS[row["kind"]], label=name)
    axes.set(yscale="log", xlabel="structure, dB (right: the same head)",
             ylabel="kernel distance to the target's images (down: looks real)",
             title=f"{results['source']} -> {results['target']}, validation heads")
    figure.legend(loc="outside right upper", fontsize=8)
    with write_whole(path) as work:
        figure.savefig(work, dpi=110)
