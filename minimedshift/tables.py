"""What an evaluation found, for people: results.json as table.md and pareto.png."""

from itertools import cycle

from matplotlib.figure import Figure

from minimedshift.metrics import METRICS, PHYSICS
from minimedshift.support.files import write_whole

KINDS = {"bound": "bound", "unpaired": "unpaired, no network", "learned": "unpaired, learned",
         "ours": "**MedShift**", "ceiling": "sees pairs"}  # in the order of the rows
COLOURS = dict(bound="k", unpaired="tab:orange", learned="tab:purple", ours="tab:blue", ceiling="0.45")
FEW = 30  # pairs


def percent(share):
    """A share as a percentage; a dash where there is none."""
    return "-" if share is None else f"{100 * share:.0f}%"


def number(value, digits=2):
    """A plain number; a dash where there is none."""
    return "-" if value is None else f"{value:.{digits}f}"


def interval(low_high, form=".0f"):
    """A 95 % interval of shares, as percentages."""
    return "" if low_high is None else f"{100 * low_high[0]:{form}} to {100 * low_high[1]:{form}}"


def gap(row):
    """Gap closed with its interval."""
    around = interval(row.get("gap_interval"))
    return percent(row.get("gap_closed")) + f" ({around})" * bool(around)


def label(name, row):
    """A method's name with its setting."""
    return name if row["setting"] is None else f"{name}, {row['knob']} {row['setting']:g}"


def say(rows):
    """Print rows of the main pair, a line each."""
    for name, row in rows.items():
        noise = "" if row["noise"] is None else f", noise {row['noise']:.2f}"
        print(f"  {label(name, row)}: structure {number(row['structure'])} dB, gap closed "
              f"{percent(row['gap_closed'])}{noise}, {row['seconds']:.1f} s", flush=True)


def ordered(rows):
    """Rows in the order of KINDS, from what is left untouched over MedShift to what sees pairs."""
    kinds = list(KINDS)
    place = lambda item: (item[0] == "second exposure", kinds.index(item[1]["kind"]))
    return sorted(rows.items(), key=place)


def markdown(header, lines):
    """A table of strings."""
    row = lambda cells: "| " + " | ".join(cells) + " |"
    return [row(header), "|" + "---|" * len(header), *map(row, lines), ""]


def table(results):
    """results.json as Markdown."""
    simulated, heads = results["simulated"], results["heads"]
    names = {"shared": "images paired by file name" if results["all_pairs"] else "held out, without pairs"}
    text = [f"# {results['source']} -> {results['target']}", "",
            f"`{results['command']}`, seed {results['seed']}, {results['machine']},",
            f"torch {results['torch']}, {results['weights']} weights of step {results['steps']}, "
            f"{results['seconds'] / 60:.1f} min.", "",
            f"Realism: distances to {results['references']} training images of the target; the floor is the "
            "second exposure (or real against real).", ""]
    if simulated:
        names = {"shared": "all domains share one population", "own": "each source has its own population"}
        text += [f"Everything is simulated (version {results['version']}), the real domains too. "
                 f"S = {results['shift']:g}: the share of training heads from each domain's own population. "
                 f"Populations are {'balanced' if results['balance'] else 'taken as they are'}.", ""]
    if heads < FEW:
        text += [f"Only {heads} images to test on: such numbers say little.", ""]
    for population, rows in results["main_pair"].items():
        text += [f"## {heads} test heads: {names[population]}", "", *main_table(rows)]
    for population, found in results["all_pairs"].items():
        text += [f"## All ordered pairs, {results['heads_each']} test heads each: {names[population]}", ""]
        text += pairs_table(found["means"])
    for name, points in results.get("pareto", {}).items():
        if len(points) > 1:
            scores = [f"{point['setting']:g}: {percent(point['gap_closed'])}" for point in points]
            text.append(f"- Gap closed on validation heads, {name}: {', '.join(scores)}")
    return "\n".join(text) + "\n"


def main_table(rows):
    """Structure, its spread over heads, how far behind or ahead of ours, METRICS, realism, and PHYSICS (1 is
    right)."""
    header = ["method", "kind", "structure, dB", "median", "worst tenth", "E", "gap closed (95%)",
              "less ours", "same head", *METRICS, "Frechet", "kernel x 1000", *PHYSICS]
    lines = []
    for name, row in ordered(rows):
        dB = [number(row[key]) for key in ("structure", "median", "worst_tenth")]
        less = interval(row.get("less_ours"), "+.0f")
        others = ["-" if row[key] is None else f"{row[key]:.3g}" for key in METRICS]
        others += [number(row["frechet"]), number(1000 * row["kernel"], 1)]
        others += [number(row[key]) for key in PHYSICS]
        lines.append([label(name, row), KINDS[row["kind"]], *dB, number(row["E"], 5), gap(row), less,
                      percent(row["same_head"]), *others])
    return markdown(header, lines)


def pairs_table(means):
    """Means over all ordered pairs."""
    header = ["method", "kind", "mean gap closed (95%)", "pairs with a gap", "worst pair",
              "noise within 1/2 to 2", "same head"]
    lines = []
    for name, row in ordered(means):
        right = "-" if row["noise_right"] is None else f"{row['noise_right']} of {row['pairs']}"
        lines.append([label(name, row), KINDS[row["kind"]], gap(row), str(row["pairs_with_gap"]),
                      percent(row.get("worst_pair")), right, percent(row["same_head"])])
    return markdown(header, lines)


def pareto(path, results):
    """pareto.png: structure against realism on validation heads, each method along its own knob."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    markers = cycle("os^vDP*x+")
    for name, row in ordered(results["main_pair"]["shared"]):
        points, kind = results["pareto"][name], row["kind"]
        if name in ("second exposure", "real against real"):  # at 0 but for chance: not on this axis
            continue
        first, last = points[0]["setting"], points[-1]["setting"]
        knob = f", {row['knob']} {first:g} to {last:g}" if len(points) > 1 else ""
        x, y = ([point[key] for point in points] for key in ("structure", "kernel"))
        axes.plot(x, y, next(markers), ls="-", lw=1, ms=5, color=COLOURS[kind], label=name + knob)
    heads = "simulated validation heads" if results["simulated"] else "validation heads"
    axes.set(yscale="log", xlabel="structure, dB (right: the same head)",
             ylabel="kernel distance to the target's images (down: looks real)",
             title=f"{results['source']} -> {results['target']}, {heads}")
    figure.legend(loc="outside right upper", fontsize=8)
    with write_whole(path) as work:
        figure.savefig(work, dpi=110)
