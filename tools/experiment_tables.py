"""
experiment_tables.py: from the lines of experiments.py to tables in docs/experiments.md and figures.

`python tools/experiments.py tables` calls it. Between `<!-- table N -->` and `<!-- end -->` of the
page stands what this file writes; all else is written by hand.

Intervals are 95 %, by bootstrap over clips, or instructions (the same ones in all arms, so
differences are paired), and over seeds. Two or three seeds say little about the spread between
seeds: a tick in the figure marks each of them.
"""

import re
import zlib

import matplotlib.pyplot as plt
import numpy as np

from engine.checkpoint import write_text

# Of each claim's table: heading, test, figure.
COLUMNS = {
    1: [
        ("named", "seen", "right"),
        ("obeyed", "obey", "sound"),
        ("Δ to the description", "obey", "delta"),
        ("perplexity of the targets", "targets", "perplexity"),
        ("the targets name", "targets", "names"),
        ("named by chance", "seen", "chance"),
        ("the text answer names", "seen", "text"),
        ("the text answer obeys", "obey", "description"),
        ("obeyed by chance", "obey", "unasked"),
    ],
    2: [
        ("named", "seen", "right"),
        ("obeyed with sound", "obey", "sound"),
        ("obeyed with the description", "obey", "description"),
        ("text instructions obeyed", "text", "text"),
        ("text loss", "text", "text loss"),
    ],
    3: [
        ("named", "seen", "right"),
        ("new instructions", "new", "right"),
        ("new classes", "seen", "right, new class"),
        ("speech", "seen", "right, speech"),
        ("sound", "seen", "right, sound"),
        ("music", "seen", "right, music"),
        ("named by chance", "seen", "chance"),
        ("text answer", "seen", "text"),
        ("text, new instructions", "new", "text"),
    ],
    4: [
        ("named", "seen", "right"),
        ("without transcript", "vectors", "vectors"),
        ("speech", "seen", "right, speech"),
        ("speech, without transcript", "vectors", "vectors, speech"),
        ("loss", "seen", "loss right"),
    ],
    5: [
        ("plain", "mmau", "accuracy"),
        ("chain of thought", "cot", "accuracy"),
        ("parsed", "mmau", "parsed"),
        ("parsed, chain of thought", "cot", "parsed"),
        ("text answer", "mmau_text", "accuracy"),
        ("text, chain of thought", "cot_text", "accuracy"),
        ("by chance", "mmau", "chance"),
    ],
    6: [
        ("named, new instructions", "new", "right"),
        ("obeyed", "obey", "sound"),
        ("Δ to the description", "obey", "delta"),
        ("perplexity of the targets", "targets", "perplexity"),
        ("the targets name", "targets", "names"),
    ],
}


# -- numbers ---------------------------------------------------------------------------------------


def arms(lines, claim):
    """-> {name: the lines of its seeds}, in the order of the runs' table. Lines of runs that it
    does not hold (any more) are left out.
    """
    from experiments import all_runs

    keys = {}
    for run in all_runs([claim]):
        keys.setdefault(run.name, []).append(run.key)
    mine = [line for line in lines if line["claim"] == claim]
    found = {name: [line for line in mine if line["key"] in of] for name, of in keys.items()}
    return {name: of_name for name, of_name in found.items() if of_name}


def figure_of(lines, test, figure):
    """One row for each seed: a number, or one for each clip or instruction. None if a line lacks
    it.
    """
    found = [line["results"].get(test, {}).get(figure) for line in lines]
    return None if None in found else np.array(found, float).reshape(len(lines), -1)


def draws(values, arm, n=4000):
    """Bootstrap means of values (seeds, clips). -> (n,)

    The clips that are drawn depend on their number alone: they are the same in all arms.
    """
    S, C = values.shape
    seeds = np.random.default_rng(zlib.crc32(arm.encode())).multinomial(S, np.full(S, 1 / S), n)
    clips = np.random.default_rng(C).multinomial(C, np.full(C, 1 / C), n)
    return ((seeds @ values) * clips).sum(1) / (S * C)  # (n, C) summed over the clips


def interval(drawn):
    return tuple(np.percentile(drawn, [2.5, 97.5]))


def cell(values, arm, base=None, base_arm=""):
    """ "0.41 (0.35 to 0.47)"; below it the difference to the arm that it is compared with, or
    "none" where its interval holds zero. One number a run has no interval: seeds alone are too few.
    """
    drawn = draws(values, arm)
    low, high = interval(drawn)
    spread = bool(high > low) and values.shape[1] > 1
    text = f"{values.mean():.3f}" + f" ({low:.3f} to {high:.3f})" * spread
    if base is None or base.shape[1] != values.shape[1] or not spread:
        return text
    low, high = interval(drawn - draws(base, base_arm))
    if low == high == 0:  # the same answers: those of a frozen LLM to the description
        return text
    difference = f"{values.mean() - base.mean():+.3f}" if low * high > 0 else "none"
    return f"{text}<br>{difference} ({low:+.3f} to {high:+.3f})"


def arm_of(lines):
    """What is trained, whatever a claim calls it: the same arm gets the same interval everywhere."""
    return lines[0]["key"].rsplit("-seed_", 1)[0]


def compared_with(lines, found):
    """The first arm with the same LLM."""
    return next(name for name, others in found.items() if others[0]["llm"] == lines[0]["llm"])


def table(lines, claim):
    found = arms(lines, claim)
    if not found:
        return "Not run yet."
    rows = [["arm", "seeds"] + [heading for heading, _, _ in COLUMNS[claim]]]
    rows.append(["---"] * len(rows[0]))
    for name, of_name in found.items():
        first, cells = compared_with(of_name, found), []
        arm, base_arm = arm_of(of_name), arm_of(found[first])
        for _, test, figure in COLUMNS[claim]:
            values = figure_of(of_name, test, figure)
            base = None if name == first else figure_of(found[first], test, figure)
            cells.append("-" if values is None else cell(values, arm, base, base_arm))
        rows.append([name, str(len(of_name)), *cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


# -- pictures --------------------------------------------------------------------------------------

TAPS_OF = "SmolLM2: own"  # the arm of claim 1 whose tap weights are drawn
COLORS = ("#1a7f5a", "#c2410c", "#4456b8")
DRAWN = {
    1: ("named", "obeyed"),
    2: ("named", "obeyed with sound", "text instructions obeyed"),
    3: ("speech", "sound", "music"),
    4: ("named", "without transcript"),
    5: ("plain", "chain of thought"),
    6: ("named, new instructions", "obeyed"),
}
# What the same LLM does that reads the description: the dotted lines. (test, figure) of each
BOUNDS = {
    ("seen", "right"): ("seen", "text"),
    ("seen", "right, speech"): ("seen", "text, speech"),
    ("seen", "right, sound"): ("seen", "text, sound"),
    ("seen", "right, music"): ("seen", "text, music"),
    ("new", "right"): ("new", "text"),
    ("obey", "sound"): ("obey", "description"),
    ("mmau", "accuracy"): ("mmau_text", "accuracy"),
    ("cot", "accuracy"): ("cot_text", "accuracy"),
}


def draw_claim(lines, claim):
    """Each arm's mean, interval and a mark for each seed, of two or three shares."""
    found = arms(lines, claim)
    size = dict(figsize=(7.5, 0.45 * len(found) + 1), layout="constrained")
    figure, axis = plt.subplots(**size)
    drawn = [column for column in COLUMNS[claim] if column[0] in DRAWN[claim]]
    for k, (heading, test, what) in enumerate(drawn):
        for y, of_name in enumerate(found.values()):
            values = figure_of(of_name, test, what)
            if values is None:
                continue
            low, high = interval(draws(values, arm_of(of_name)))
            style = dict(color=COLORS[k], label=heading if y == 0 else None)
            place = y + 0.25 * (k - (len(drawn) - 1) / 2)
            axis.plot([low, high], [place] * 2, color=COLORS[k], linewidth=1)
            axis.plot(values.mean(), place, "o", markersize=6, **style)
            axis.plot(values.mean(1), [place] * len(values), "|", color=COLORS[k], markersize=9)
            if (test, what) in BOUNDS:
                bound = figure_of(of_name, *BOUNDS[test, what]).mean()
                axis.plot([bound] * 2, [y - 0.5, y + 0.5], ":", color=COLORS[k], linewidth=1)
    axis.set(yticks=range(len(found)), yticklabels=list(found), xlim=(0, 1))
    axis.invert_yaxis()
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def draw_taps(lines):
    """How much each query takes of each tap over the steps: a row for each seed of an arm, a
    column for each tap. Queries are sorted by the last tap's final weight: each seed numbers its
    own.
    """
    n = len(lines)
    size = dict(figsize=(7.5, 1.5 * n + 0.7), layout="constrained", sharex=True, sharey=True)
    runs = [{int(step): of_step for step, of_step in line["tap_weights"].items()} for line in lines]
    weights = [np.array([found[step] for step in sorted(found)]) for found in runs]
    span = max(abs(found - found[0]).max() for found in weights)  # steps, queries, taps
    even = 1 / weights[0].shape[-1]
    colors = dict(cmap="RdBu_r", vmin=even - span, vmax=even + span, aspect="auto")
    figure, axes = plt.subplots(n, weights[0].shape[-1], squeeze=False, **size)
    for row, line, found, steps in zip(axes, lines, weights, map(sorted, runs)):
        order = np.argsort(found[-1, :, -1])
        for tap, axis in enumerate(row):
            picture = axis.imshow(found[:, order, tap].T, **colors)
            axis.set(xticks=range(len(steps)), xticklabels=steps, yticks=[])
            axis.tick_params(labelsize=7)
        row[0].set_ylabel(f"seed {line['seed']}\nqueries", fontsize=8)
    for tap, axis in enumerate(axes[0], 1):
        axis.set_title(f"tap {tap}", fontsize=9)
    figure.supxlabel("step", fontsize=8)
    figure.colorbar(picture, ax=axes, label="weight").ax.tick_params(labelsize=7)
    return figure


# --------------------------------------------------------------------------------------------------


def write(lines, page, assets):
    plt.switch_backend("agg")  # files, no window
    plt.rcParams["svg.hashsalt"] = "same lines, same file"
    text = page.read_text(encoding="utf-8")
    for claim in COLUMNS:
        marks = re.compile(rf"(<!-- table {claim} -->\n).*?(<!-- end -->)", re.S)
        made = table(lines, claim)
        text, n = marks.subn(lambda m, made=made: f"{m[1]}{made}\n{m[2]}", text)
        if n != 1:
            raise ValueError(f"{page}: the marks of table {claim} are missing or stand there twice")
    write_text(page, text)
    undated = {"Date": None}
    for claim in COLUMNS:
        if arms(lines, claim):
            file = assets / f"experiments.claim{claim}.svg"
            draw_claim(lines, claim).savefig(file, metadata=undated)
    if own := arms(lines, 1).get(TAPS_OF):
        draw_taps(own).savefig(assets / "experiments.taps.svg", metadata=undated)
    print(f"{page}: {len(lines)} runs")
