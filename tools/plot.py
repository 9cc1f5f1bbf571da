"""
plot.py: the curves of runs side by side, and the speed of generation.

    python tools/plot.py out/demo out/other --out out/curves.svg    # from train.py's log.jsonl
    python tools/plot.py --speed out/bench.jsonl                    # of the last `bench.py growth`

matplotlib is in demo/requirements.txt.
"""

import argparse
import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

# What log.jsonl holds of a run, and how it is drawn.
CURVES = {
    "loss": ("training, smoothed", dict(linewidth=1, alpha=0.4)),
    "eval_loss": ("held out, right clip", dict(marker="o", markersize=3)),
    "eval_loss_wrong_clip": ("held out, wrong clip", dict(marker="o", markersize=3, linestyle=":")),
}
COLORS = {
    "loss": "#888888",
    "eval_loss": "#1a7f5a",
    "eval_loss_wrong_clip": "#c2410c",
}  # of one run


def read(file):
    """The records of a .jsonl file; the last line may be torn while a run writes it."""
    if not file.is_file():
        sys.exit(f"error: {file} is missing")
    lines = file.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if line.endswith("}")]


def smooth(values):
    """Mean over a fiftieth of the run, up to each step. -> as many values"""
    width = max(1, len(values) // 50)
    sums = np.cumsum([0.0, *values])
    first = np.maximum(np.arange(len(values)) + 1 - width, 0)
    return (sums[1:] - sums[first]) / (np.arange(len(values)) + 1 - first)


def draw(axis, log, label=None):
    """Add one run to a plot, all its curves in one colour. log: the records of its log.jsonl.

    label None: it is the only run, and each curve has a colour.
    """
    color = label and axis.plot([], [], label=label)[0].get_color()
    for key, (_, style) in CURVES.items():
        points = [r for r in log if r.get(key) is not None]  # None: it was not finite
        steps, losses = [r["step"] for r in points], [r[key] for r in points]
        losses = smooth(losses) if key == "loss" else losses
        axis.plot(steps, losses, color=color or COLORS[key], **style)


def finish(axis, colors=None):
    """Axes and legend, after all runs are drawn: a run's colour, and what each kind of line is."""
    for key, (name, style) in CURVES.items():
        axis.plot([], [], color=colors[key] if colors else "gray", label=name, **style)
    axis.set(xlabel="step", ylabel="loss per target token", ylim=(0, None))
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)


def plot_runs(folders):
    figure, axis = plt.subplots(figsize=(8, 4.5), layout="constrained")
    names = [folder.resolve().name for folder in folders]
    for folder, name in zip(folders, names):
        draw(axis, read(folder / "log.jsonl"), name if names.count(name) == 1 else str(folder))
    finish(axis)
    return figure


def plot_speed(file):
    found = [record for record in read(file) if record.get("bench") == "growth"]
    if not found:
        sys.exit(f"error: {file} has no result of `python tools/bench.py growth`")
    result = found[-1]
    axes = list(dict.fromkeys(point["axis"] for point in result["points"]))
    size = dict(figsize=(4 * len(axes), 3.2), layout="constrained")
    figure, panels = plt.subplots(1, len(axes), **size)
    sides = {"peer": ("transformers", "tab:gray"), "ours": ("ours", "tab:blue")}
    for axis, panel in zip(axes, panels):
        points = [point for point in result["points"] if point["axis"] == axis]
        places = [point["x"] for point in points]
        for side, (label, color) in sides.items():
            panel.plot(places, [p[side] for p in points], "o-", color=color, label=label)
        panel.set(xlabel=axis, xscale="log", yscale="log", xticks=places, xticklabels=places)
        seconds = [p[side] for p in points for side in sides]
        low, high = min(seconds) / 1.5, max(seconds) * 1.5
        marks = [n * 10.0**e for e in range(-4, 5) for n in (1, 2, 5)]
        marks = [mark for mark in marks if low < mark < high]
        panel.set(yticks=marks, yticklabels=[f"{mark:g}" for mark in marks])
        panel.minorticks_off()
    on_cpu = result["device"].startswith("CPU")
    panels[0].set(ylabel="seconds of CPU time" if on_cpu else "seconds")
    panels[0].legend()
    what = f"Greedy generation of {result['points'][0]['new']} tokens a row"
    setup = [result[key] for key in ("llm", "dtype", "device")]
    figure.suptitle(", ".join([what, *setup]), fontsize=9)
    return figure


def main():
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("runs", nargs="*", type=Path, help="--out folders of train.py")
    parser.add_argument("--speed", type=Path, metavar="JSONL", help="what bench.py wrote")
    say = "default: out/curves.svg, and assets/speed.svg with --speed"
    parser.add_argument("--out", type=Path, metavar="FILE", help=say)
    args = parser.parse_args()
    if bool(args.runs) == bool(args.speed):
        parser.error("name the folders of one or more runs, or --speed out/bench.jsonl")
    out = args.out or Path("assets/speed.svg" if args.speed else "out/curves.svg")
    figure = plot_speed(args.speed) if args.speed else plot_runs(args.runs)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out)
    print(out)


if __name__ == "__main__":
    plt.switch_backend("agg")  # files, no window
    main()
