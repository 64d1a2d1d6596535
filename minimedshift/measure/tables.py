"""What an evaluation found, as tables and a figure: table.md and pareto.png from results.json."""

import sys

from minimedshift.support.files import whole

KINDS = {"unpaired": "unpaired, no network", "learned": "unpaired, learned", "ours": "**MedShift**", "ceiling": "sees pairs", "bound": "bound"}
ORDER = ("bound", "unpaired", "learned", "ours", "ceiling")
FEW = 30  # pairs


# ---------------------------------------------------------------- cells

def percent(share):
    """A share as a percentage; a dash where there is none."""
    return "-" if share is None else f"{100 * share:.0f}%"


def number(value, digits=2):
    """A plain number; a dash where there is none."""
    return "-" if value is None else f"{value:.{digits}f}"


def interval(low_high):
    """A 95 % interval of shares."""
    return "" if low_high is None else f" ({100 * low_high[0]:.0f} to {100 * low_high[1]:.0f})"


def gap(row):
    """Gap closed with its interval."""
    return "-" if row is None or row.get("gap_closed") is None else percent(row["gap_closed"]) + interval(row.get("gap_interval"))


def label(name, row):
    """A method's name with its setting."""
    setting = row.get("setting")
    return name if setting is None else f"{name}, {row.get('knob') or 'setting'} {setting:g}"


def ordered(rows):
    """Rows from what is left untouched over rivals and MedShift to what sees pairs; inside a kind the order of the evaluation."""
    return sorted(rows.items(), key=lambda item: ORDER.index(item[1]["kind"]) + (item[0] == "second exposure") * 9)


def markdown(header, lines):
    """A table of strings."""
    return ["| " + " | ".join(header) + " |", "|" + "---|" * len(header), *("| " + " | ".join(line) + " |" for line in lines), ""]


# ---------------------------------------------------------------- one evaluation

def table(results):
    """results.json as Markdown."""
    text = [f"# {results['source']} -> {results['target']}", ""]
    text += [f"`{results['command']}`, seed {results['seed']}, {results['machine']}, torch {results['torch']}, {results['weights']} weights of step "
             f"{results['steps']}, {results['seconds'] / 60:.1f} min." if "seconds" in results else "", ""]
    if "unpaired" in results:
        text += [f"{results['heads']} held-out images, {results['references']} reference images; features: {results['features']}.", ""]
        return "\n".join(text + realism_table(results["unpaired"]))
    if results.get("simulated"):
        text += [f"Everything is simulated (version {results['version']}), the real domains too. S = {results['shift']:g}: the share of each domain's "
                 "training heads that comes from its own population. Populations are " + ("balanced, for the unpaired methods without a network too."
                 if results.get("balance") else "taken as they are."), ""]
    if "references" in results:
        text += [f"Realism: distances to {results['references']} training images of the target, features from {results['features']}; the floor is the row of "
                 "the second exposure (of real pairs: real against real).", ""]
    names = {"shared": "heads of the population that all domains share", "own": f"heads of {results['source']}'s own population"}
    if not results.get("simulated"):
        names = {"shared": "images that are paired by file name"}
        if results["heads"] < FEW:
            text += [f"Only {results['heads']} pairs to test on: such numbers say little.", ""]
    for population, rows in results["main_pair"].items():
        text += [f"## {results['heads']} test heads: {names[population]}", ""]
        text += structure_table(rows) + realism_table(rows) + (physics_table(rows) if results.get("simulated") else [])
    for population, found in results["all_pairs"].items():
        text += [f"## All ordered pairs, {results['heads_each']} test heads each: {names[population] if population == 'shared' else 'each source its own population'}", ""]
        text += pairs_table(found["means"])
    text += ["## Settings, chosen on validation heads (gap closed there)", ""]
    for title, settings in (("main pair", results["settings"]), ("all pairs, mean", results["settings_all_pairs"])):
        for name, scores in settings.items():
            text.append(f"- {title}, {name}: " + ", ".join(f"{float(setting):g}: {percent(score)}" for setting, score in scores.items()))
    return "\n".join(text) + "\n"


def structure_table(rows):
    """Structure, its spread over heads, noise, and how far behind or ahead of ours: the student, or where there is none MedShift."""
    header = ["method", "kind", "structure, dB", "median", "worst tenth", "E", "gap closed (95%)", "less ours", "noise", "spectrum, dB off", "same head", "PSNR", "SSIM"]
    lines = []
    for name, row in ordered(rows):
        less = "" if row.get("less_ours") is None else f"{100 * row['less_ours'][0]:+.0f} to {100 * row['less_ours'][1]:+.0f}"
        lines.append([label(name, row), KINDS[row["kind"]], number(row["structure"]), number(row["median"]), number(row["worst_tenth"]),
                      number(row["E"], 5), gap(row), less, number(row["noise"]), number(row["spectrum"], 1), percent(row["same_head"]),
                      number(row["psnr"]), number(row["ssim"], 3)])
    return markdown(header, lines)


def realism_table(rows):
    """Distances to the target domain's training images. The second exposure (or real against real) is the floor."""
    header = ["method", "Frechet", "kernel x 1000", "average rank (structure, realism)"]
    lines = []
    for name, row in ordered(rows):
        if "kernel" in row:
            rank = "" if "rank" not in row else f"{row['rank']:.1f} ({row['rank_structure']}, {row['rank_realism']})"
            lines.append([name, number(row["frechet"]), number(1000 * row["kernel"], 1), rank])
    return markdown(header, lines) if lines else []


def physics_table(rows):
    """Attenuation, sharpness, soft tissue (each over what is right: 1), and fine structure found and made up."""
    header = ["method", "bone", "soft tissue", "edge width", "soft-tissue contrast to noise", "fine structure found", "of what is shown, false"]
    lines = []
    for name, row in ordered(rows):
        lines.append([name, *(number(row[key]) for key in ("bone", "soft", "sharpness", "soft_tissue")), percent(row["recall"]), percent(row["false"])])
    return markdown(header, lines)


def pairs_table(means):
    """Means over all ordered pairs."""
    header = ["method", "kind", "mean gap closed (95%)", "pairs with a gap", "worst pair", "noise within 1/2 to 2", "same head"]
    lines = []
    for name, row in ordered(means):
        right = "-" if row["noise_right"] is None else f"{row['noise_right']} of {row['pairs']}"
        lines.append([name if row["setting"] is None else f"{name}, {row['setting']:g}", KINDS[row["kind"]], gap(row), str(row["pairs_with_gap"]),
                      percent(row.get("worst_pair")), right, percent(row["same_head"])])
    return markdown(header, lines)


STYLES = {"unpaired": ("tab:orange", "s^vD"), "learned": ("tab:purple", "s^vD"), "ours": ("tab:blue", "oD"), "ceiling": ("0.45", "s^vDP"), "bound": ("k", "x*+")}


def pareto(path, results):
    """pareto.png: structure against realism on validation heads, each method along its own knob; what is left of the frame has failed."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    rows = results["main_pair"]["shared"]
    kinds = {name: row["kind"] for name, row in rows.items()}
    used = dict.fromkeys(STYLES, 0)
    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    for name, points in sorted(results["pareto"].items(), key=lambda item: ORDER.index(kinds[item[0]])):
        colour, markers = STYLES[kinds[name]]
        marker = markers[used[kinds[name]] % len(markers)]
        used[kinds[name]] += 1
        x, y = [point["structure"] for point in points], [1000 * point["kernel"] for point in points]
        if name in ("second exposure", "real against real"):  # at 0 but for chance: not on this axis
            axes.plot([], [], " ", label=f"({name}: {x[0]:.0f} dB, {y[0]:.0f})")
            continue
        knob = f", {rows[name]['knob']} {points[0]['setting']:g} to {points[-1]['setting']:g}" if len(points) > 1 else ""
        axes.plot(x, y, marker=marker, color=colour, lw=1, ms=5, label=name + knob)
    lowest = min(point["structure"] for name, points in results["pareto"].items() if kinds[name] != "learned" for point in points)
    axes.set(xlabel="structure, dB (right: the same head)", ylabel="kernel distance x 1000 to the target's images (down: looks real)", yscale="log",
             title=f"{results['source']} -> {results['target']}, validation heads" + (", simulated" if results.get("simulated") else ""))
    axes.set_xlim(left=lowest - 2)
    figure.legend(loc="outside right upper", fontsize=8)
    with whole(path) as work:
        figure.savefig(work, dpi=110)
    plt.close(figure)


# ---------------------------------------------------------------- several evaluations side by side

def joint(evaluations):
    """The README's first table: rows are methods, columns the population shifts. evaluations: results of one run a shift."""
    header = ["method", "kind"]
    for results in evaluations:
        header += [f"S = {results['shift']:g}: gap closed (95%)", "own heads", "noise", "all pairs"]
    lines = []
    for name, row in ordered(evaluations[0]["main_pair"]["shared"]):
        line = [name, KINDS[row["kind"]]]
        for results in evaluations:
            shared, own = (results["main_pair"][population].get(name) for population in ("shared", "own"))
            mean = results["all_pairs"]["shared"]["means"].get(name)
            if shared is None:
                line += ["-"] * 4
            else:
                line += [gap(shared), percent(None if own is None else own["gap_closed"]), number(shared["noise"]), "-" if mean is None else percent(mean.get("gap_closed"))]
        lines.append(line)
    return "\n".join(markdown(header, lines))
