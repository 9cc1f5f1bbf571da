"""
plot_speed.py: the last result of `python bench.py growth` -> assets/speed.svg.

    python runs/plot_speed.py [out/bench.jsonl]
"""

import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt

lines = [json.loads(line) for line in Path([*sys.argv, "out/bench.jsonl"][1]).read_text(encoding="utf-8").splitlines()]
result = [line for line in lines if line["bench"] == "growth"][-1]
axes = list(dict.fromkeys(point["axis"] for point in result["points"]))
figure, panels = plt.subplots(1, len(axes), figsize=(4 * len(axes), 3.2), layout="constrained")
for axis, panel in zip(axes, panels):
    points = [point for point in result["points"] if point["axis"] == axis]
    for name, color in (("peer", "tab:gray"), ("ours", "tab:blue")):
        panel.plot([p["x"] for p in points], [p[name] for p in points], "o-", color=color, label={"peer": "transformers"}.get(name, name))
    low, high = (pick(p[name] for p in points for name in ("ours", "peer")) for pick in (min, max))
    ticks = [n * 10.0**e for e in range(-4, 5) for n in (1, 2, 5) if low / 1.5 < n * 10.0**e < high * 1.5]
    panel.set(xlabel=axis, xscale="log", yscale="log", xticks=[p["x"] for p in points], xticklabels=[p["x"] for p in points])
    panel.set(yticks=ticks, yticklabels=[f"{tick:g}" for tick in ticks])
    panel.minorticks_off()
panels[0].set(ylabel="seconds" + (" of CPU time" if result["device"].startswith("CPU") else ""))
panels[0].legend()
figure.suptitle(f"Greedy generation of {points[0]['new']} tokens a row, {result['llm']}, {result['dtype']}, {result['device']}", fontsize=9)
Path("assets").mkdir(exist_ok=True)
figure.savefig("assets/speed.svg")
