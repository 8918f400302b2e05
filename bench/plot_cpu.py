"""Draws docs/images/cpu-*.svg from the results of `./dev bench cpu --output FILE`.

Usage: plot_cpu.py FILE FOLDER (needs matplotlib).
"""

import argparse
import json
import pathlib

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt  # noqa: E402

PYTORCH, OURS = "#8c5a2b", "#1f5fa8"


def usual(row):
    """The rows that differ from the main line only in what a plot is about."""
    return row["dtype"] == "float32" and row["head_size"] == 64 and row["threads"] > 1


def by_length(rows, axes):
    rows = sorted((r for r in rows if usual(r) and r["workload"] == "gauss1" and
                   r["alpha"] == 1.5), key=lambda r: r["n"])
    for label, colour, name in (("PyTorch flash attention", PYTORCH, "PyTorch"),
                                ("flash_entmax, α = 1.5", OURS, "ours")):
        for kind, style in (("f+b", "-"), ("f", "--")):
            points = [(r["n"], r["seconds"][f"{name} {kind}"]["median"] / r["n"] / r["heads"] * 1e6)
                      for r in rows if f"{name} {kind}" in r["seconds"]]
            what = "forward and backward" if kind == "f+b" else "forward"
            axes.plot(*zip(*points), style, color=colour, marker="o", markersize=4,
                      label=f"{label}, {what}")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks([r["n"] for r in rows], [f"{r['n']:,}" for r in rows])
    axes.set_xlabel("keys (causal, Gaussian scores of standard deviation 1)")
    axes.set_ylabel("µs a query row")


def by_support(rows, axes):
    rows = sorted((r for r in rows if usual(r) and r["n"] == 8192 and r["alpha"] == 1.5 and
                   r["ratios"]), key=lambda r: r["support"])
    for kind, style in (("f", "--"), ("f+b", "-")):
        what = "forward and backward" if kind == "f+b" else "forward"
        axes.plot([r["support"] for r in rows], [r["ratios"][kind] for r in rows], style,
                  color=OURS, marker="o", markersize=4, label=what)
    for r in rows:
        axes.annotate("std " + r["workload"].removeprefix("gauss"), (r["support"], r["ratios"]["f"]),
                      textcoords="offset points", xytext=(0, 7), ha="center", fontsize=8)
    axes.axhline(1.0, color=PYTORCH, label="PyTorch flash attention")
    axes.set_xscale("log")
    axes.set_ylim(0, 1.1)
    axes.set_xlabel("keys kept a row (n = 8,192, α = 1.5)")
    axes.set_ylabel("time over PyTorch's")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", help="JSON file that ./dev bench cpu --output wrote")
    parser.add_argument("folder", type=pathlib.Path, help="where the plots go")
    arguments = parser.parse_args()
    folder = arguments.folder
    with open(arguments.results, encoding="utf-8") as file:
        rows = json.load(file)["results"]
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in (("length", by_length), ("support", by_support)):
        figure, axes = plt.subplots(figsize=(6.4, 4), layout="constrained")
        draw(rows, axes)
        axes.grid(True, which="major", linewidth=0.4, alpha=0.6)
        axes.legend(fontsize=8, frameon=False)
        figure.savefig(folder / f"cpu-{name}.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
