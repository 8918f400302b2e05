"""Tables, plots and one self-contained page from finished runs of the lab.

Usage: report.py RESULTS... PAGE. Every RESULTS holds recipe/variant/seedN/result.json, as
`flash-entmax train` writes them, and next to them metrics.jsonl. Needs nothing but Python's standard
library.
"""

import collections
import html
import json
import math
import pathlib
import statistics
import sys

COLOURS = ["#1f5fa8", "#c2571a", "#2c8a4b", "#8b3fa0", "#a08a00", "#b0304f", "#4a6a72", "#7a5230"]
# Published exact match, % (Vasylenko, Pitorro, Martins & Treviso, ICLR 2026, arXiv 2506.16640), at multiples of a
# training length of 64, of models of the same sizes on the same tasks: {recipe: {attention: {multiple: %}}}.
PUBLISHED = {
    "mqmtar": {
        "softmax": {1: 100, 2: 100, 4: 100, 16: 99.5, 64: 97.8, 256: 80.2, 1024: 3.0},
        "entmax": {1: 100, 2: 100, 4: 100, 16: 99.5, 64: 92.7, 256: 66.8, 1024: 9.3},
        "asentmax": {1: 100, 2: 100, 4: 100, 16: 99.7, 64: 99.6, 256: 99.0, 1024: 95.3},
    },
    "reverse": {
        "softmax": {1: 100, 1.5: 36, 2: 0, 4: 0, 8: 0},
        "entmax": {1: 100, 1.5: 100, 2: 93.5, 4: 28.5, 8: 2.5},
        "asentmax": {1: 100, 1.5: 100, 2: 99.8, 4: 96.4, 8: 56.7},
    },
    "sort": {
        "softmax": {1: 100, 2: 0, 4: 0, 8: 0},
        "entmax": {1: 100, 2: 99.3, 4: 57.8, 8: 0},
        "asentmax": {1: 100, 2: 100, 4: 79.7, 8: 0},
    },
    "copy": {"softmax": {64: 85.5}, "asentmax": {64: 86.6}},
}
STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem; }
table { font-size: 0.875rem; border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { white-space: nowrap; padding: .25rem .7rem; border-bottom: 1px solid var(--line); text-align: right; }
th:first-child, td:first-child { text-align: left; }
.scroll { overflow-x: auto; } svg { max-width: 100%; height: auto; }
svg text { fill: currentColor; font: 12px system-ui, sans-serif; }
small { opacity: .75; } code { background: var(--soft); padding: 0 .2em; }
"""


def load(folders):
    """{recipe: {variant: [result, …]}}, each result with its folder."""
    recipes = {}
    for path in sorted(p for f in folders for p in f.glob("*/*/seed*/result.json")):
        with open(path, encoding="utf-8") as file:
            result = json.load(file)
        result["folder"] = path.parent
        recipe, variant = path.parts[-4], path.parts[-3]
        recipes.setdefault(recipe, {}).setdefault(variant, []).append(result)
    return recipes


def unfinished(folders):
    """Runs without a result: {recipe: [(variant, seed, steps taken, share of a training batch's
    sequences that were right, or None), …]}."""
    recipes = {}
    for path in sorted(p for f in folders for p in f.glob("*/*/seed*/metrics.jsonl")):
        if path.with_name("result.json").exists():
            continue
        with open(path, encoding="utf-8") as file:
            lines = [json.loads(line) for line in file]
        if lines:
            right = [line["exact_match"] for line in lines if "exact_match" in line]
            recipes.setdefault(path.parts[-4], []).append(
                (path.parts[-3], path.parts[-2].removeprefix("seed"), lines[-1]["step"],
                 right[-1] if right else None))
    return recipes


def figure(share):
    """A share in per cent. 100 means every one: digits are cut off there, not rounded."""
    value = 100 * share
    if 99.8 <= value < 100:
        # A little more, since the mean of numbers like 0.998 is often a hair below what it should be.
        return f"{math.floor(value * 1e5 + 1e-4) / 1e5:.5f}"[:6].rstrip("0").rstrip(".")
    return f"{value:.1f}"


def percent(values):
    """Mean and, in brackets, the range over seeds."""
    values = [v for v in values if v is not None]
    if not values:
        return "–"
    low, high = min(values), max(values)
    spread = "" if high - low < 5e-4 else f" ({figure(low)}–{figure(high)})"
    return figure(statistics.mean(values)) + spread


def at(result, multiple):
    """The row of a length; one without figures where it was not evaluated, or memory ran out."""
    return next((row for row in result["lengths"] if row["multiple"] == multiple), {})


def multiples(results):
    return [row["multiple"] for row in results[0]["lengths"]]


def flat(value):
    """All numbers of a nested list."""
    return [x for item in value for x in flat(item)] if isinstance(value, list) else [value]


def statistic(row, name):
    """Mean over layers and heads; None where a kind of attention has no weights."""
    values = [x for layer in row.get("attention") or [] for x in flat(layer.get(name) or [])
              if isinstance(x, (int, float))]
    return statistics.mean(values) if values else None


def table(heads, rows):
    cells = "".join(f"<th>{html.escape(h)}</th>" for h in heads)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(str(c))}</td>" for c in row) + "</tr>"
                   for row in rows)
    return f'<div class="scroll"><table><tr>{cells}</tr>{body}</table></div>'


def plot(series, x_labels, y_title, top):
    """Lines over equally spaced x; series: {name: [y or None, …]}; y from 0 to `top`."""
    width, height, left, bottom = 640, 300, 54, 40
    inner_width, inner_height = width - left - 170, height - bottom - 14

    def place(i, y):
        step = inner_width / max(len(x_labels) - 1, 1)
        return left + i * step, 14 + inner_height * (1 - y / top)

    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{html.escape(y_title)}">']
    for tick in range(5):
        y = top * tick / 4
        _, py = place(0, y)
        parts.append(f'<line x1="{left}" x2="{left + inner_width}" y1="{py:.1f}" y2="{py:.1f}" '
                     f'stroke="currentColor" stroke-opacity=".15"/>'
                     f'<text x="{left - 6}" y="{py + 4:.1f}" text-anchor="end">{y:g}</text>')
    for i, label in enumerate(x_labels):
        px, _ = place(i, 0)
        parts.append(f'<text x="{px:.1f}" y="{height - 20}" text-anchor="middle">{label}</text>')
    parts.append(f'<text x="{left}" y="{height - 4}">multiples of the training length; '
                 f'{html.escape(y_title)}</text>')
    for index, (name, values) in enumerate(series.items()):
        colour = COLOURS[index % len(COLOURS)]
        points = [place(i, y) for i, y in enumerate(values) if y is not None]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in points]
        row = 22 + 18 * index
        parts.append(f'<rect x="{width - 152}" y="{row - 9}" width="10" height="10" '
                     f'fill="{colour}"/><text x="{width - 136}" y="{row}">{html.escape(name)}'
                     "</text>")
    return "".join(parts) + "</svg>"


def findings(variants):
    """What the figures say, by rules that name their own thresholds."""
    lines = []

    def values(name, multiple):
        return [at(r, multiple).get("exact_match", 0.0) for r in variants[name]]

    def mean(name, multiple):
        return statistics.mean(values(name, multiple))

    def lowest(name, multiple):
        return min(values(name, multiple))

    def highest(name, multiple):
        return max(values(name, multiple))

    sparse = [n for n in variants if n in ("entmax", "asentmax", "sparsemax")]
    linear = [n for n in variants if "linear" in n]
    lengths = multiples(next(iter(variants.values())))
    single = any(len(results) == 1 for results in variants.values())
    level = []

    def seeds(name):
        counts = [len(variants[n]) for n in (name, "softmax")]
        return ("one seed each" if counts == [1, 1] else
                f"{counts[0]} seed{'s' * (counts[0] > 1)} of {name}, {counts[1]} of softmax")

    # Lengths of which the same is to be said share a sentence.
    said = collections.defaultdict(list)
    for multiple in lengths:
        if "softmax" not in variants or not sparse:
            break
        best = max(sparse, key=lambda n: (lowest(n, multiple), mean(n, multiple)))
        lead = mean(best, multiple) - mean("softmax", multiple)
        if lowest(best, multiple) - highest("softmax", multiple) > 0.05:
            verdict = seeds(best) if single else f"every seed of {best} is ahead of every seed of softmax"
        elif lowest("softmax", multiple) - highest(best, multiple) > 0.05:
            verdict = "softmax is ahead" + (f" ({seeds(best)})" if single else "")
        elif abs(lead) > 0.05:
            verdict = (f"{best if lead > 0 else 'softmax'} is ahead in the mean, not on every seed "
                       f"({seeds(best)})")
        else:
            level.append(f"{multiple:g}×")
            continue
        said[best, verdict].append((f"{multiple:g}×", figure(mean(best, multiple)),
                                    figure(mean("softmax", multiple))))
    for (best, verdict), rows in said.items():
        at_lengths, ours, softmax = (" / ".join(column) for column in zip(*rows))
        lines.append(f"At {at_lengths} the training length {best} solves {ours} % of the sequences, "
                     f"softmax {softmax} %: {verdict}.")
    if level:
        lines.append(f"At {', '.join(level)} sparse attention and softmax are level, "
                     f"within 5 points ({seeds(best)}).")
    first = lengths[0]
    for name in linear:
        others = [n for n in variants if n not in linear]
        if not others:
            continue
        best = max(others, key=lambda n: mean(n, first))
        if lowest(best, first) - highest(name, first) > 0.05:
            lines.append(f"At the training length {name} attention reaches "
                         f"{figure(mean(name, first))} %, {best} {figure(mean(best, first))} %: "
                         "a state of fixed size cannot hold what the task asks for.")
        else:
            lines.append(f"At the training length {name} attention is level with {best}.")
    return lines


def published(recipe, variants):
    """Rows of the published figures for a recipe of the full set, or one on the same task and lengths."""
    full = all(r["run"]["training"]["max_length"] == 64 for v in variants.values() for r in v)
    return PUBLISHED.get(recipe.split("-")[0], {}) if full else {}


def shortcut_ceiling(task, length):
    """Share of recall's samples that are solved by finding every value's first symbol and copying the second
    from any value that begins alike, whatever its key: E[1/(1+k)] per query, k of the other values alike."""
    symbols = task.get("symbols") or 256
    pairs = max(1, length * 4 // (5 * (task["key_symbols"] + task["value_symbols"] + 2)))
    alike = 1 / symbols
    return ((1 - (1 - alike) ** pairs) / (pairs * alike)) ** task["queries"]


def slots(variants, marks):
    """Recall: accuracy by place in a query's answer, and the shortcut's ceiling."""
    run = next(iter(variants.values()))[0]["run"]
    task = run["task"]
    if task["name"] != "recall":
        return []
    size = 1 + task["value_symbols"]
    answers = size * task["queries"]
    out = ["<h3>Recall by place in the answer, %</h3><p>Mark, then the symbols of the value, mean over queries and "
           "seeds, each with the true ones before it. The ceiling is what a model reaches in whole sequences that "
           "finds every first symbol but copies the rest from any value that begins alike, without reading the "
           "key.</p>"]
    rows = [["shortcut's ceiling"] + [f"{100 * shortcut_ceiling(task, int(m * run['evaluation']['length'])):.1f}"
                                      for m in marks]]
    for name, results in variants.items():
        cells = []
        for mark in marks:
            found = [at(r, mark).get("slot_accuracy") or [] for r in results]
            # Without the token at the end, where there is one.
            found = [f[:answers] for f in found if len(f) in (answers, answers + 1)]
            cells.append(" / ".join(figure(statistics.mean(x for f in found for x in f[i::size]))
                                    for i in range(size)) if found else "–")
        rows.append([name] + cells)
    out.append(table(["attention"] + [f"{m:g}×" for m in marks], rows))
    return out


def section(recipe, variants, stopped=()):
    any_results = next(iter(variants.values()))
    run, marks = any_results[0]["run"], multiples(any_results)
    seeds = sorted({len(v) for v in variants.values()})
    model, training = run["model"], run["training"]
    out = [f"<h2>{html.escape(recipe)}</h2>",
           f"<p>Task <code>{html.escape(run['task']['name'])}</code>; {model['layers']} layers, "
           f"width {model['width']}, {model['heads']} heads, positions "
           f"<code>{html.escape(model['positions'])}</code> unless the variant says otherwise; "
           f"{training['steps']:,} steps of {training['batch']} sequences of "
           f"{training['min_length']} to {training['max_length']} items. Evaluated at multiples of "
           f"{run['evaluation']['length']} items; "
           + ("One seed.</p>" if seeds == [1] else
              f"{'–'.join(str(s) for s in seeds)} seeds: mean, lowest–highest.</p>"),
           "<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in findings(variants)) +
           "</ul>", "<h3>Whole sequences right, %</h3>"]
    heads = ["attention"] + [f"{m:g}×" for m in marks]
    for key, title in (("exact_match", None), ("token_accuracy", "Tokens right, %")):
        if title:
            out.append(f"<h3>{title}</h3>")
        out.append(table(heads, [[name] + [percent([at(r, m).get(key) for r in results])
                                           for m in marks] for name, results in variants.items()]))
        if key == "exact_match":
            reference = published(recipe, variants)
            if reference:
                out.append("<p>Published, with the full schedule (arXiv 2506.16640):</p>")
                out.append(table(heads, [[name] + [f"{row[m]:g}" if m in row else "" for m in marks]
                                         for name, row in reference.items()]))
            series = {}
            for name, results in variants.items():
                found = [[at(r, m)[key] for r in results if key in at(r, m)] for m in marks]
                series[name] = [100 * statistics.mean(f) if f else None for f in found]
            out.append(plot(series, [f"{m:g}×" for m in marks], "whole sequences right, %", 100))
            if stopped:
                out.append("<p>Not evaluated at these lengths:</p><ul>" + "".join(
                    f"<li>{html.escape(name)}, seed {seed}: after {steps:,} steps "
                    f"{percent([right])} % of the whole sequences of a training batch right</li>"
                    for name, seed, steps, right in stopped) + "</ul>")
    out += slots(variants, marks)
    out.append("<h3>How far attention spreads</h3><p>Means over layers, heads and seeds: the "
               "largest weight of a row, and the keys with a weight above zero. Softmax's largest "
               "weight falls as the context grows (dispersion).</p>")
    for key, form in (("largest", "{:.2f}"), ("support", "{:.1f}")):
        rows = []
        for name, results in variants.items():
            values = [[statistic(at(r, m), key) for r in results] for m in marks]
            if all(v is not None for group in values for v in group):
                rows.append([name] + [form.format(statistics.mean(group)) for group in values])
        title = "largest weight" if key == "largest" else "keys kept a row"
        out.append(table([title] + heads[1:], rows))
    logs = sum((results for results in variants.values()), [])
    seconds = sum(r["training_seconds"] for r in logs)
    machines = " and ".join(sorted({str(r["machine"]) for r in logs}))
    out.append(f"<p><small>{len(logs)} run{'s' * (len(logs) > 1)} on {html.escape(machines)}, "
               f"{seconds / 60:.1f} minutes of training in all. Every cell's log: "
               f"<code>{html.escape(recipe)}/&lt;attention&gt;/seed&lt;n&gt;/metrics.jsonl</code>."
               "</small></p>")
    return "\n".join(out)


def text_table(recipe, variants):
    marks = multiples(next(iter(variants.values())))
    print(f"\n{recipe}: whole sequences right, % (mean over seeds, lowest–highest)")
    rows = [["attention"] + [f"{m:g}×" for m in marks]]
    for name, results in variants.items():
        rows.append([name] + [percent([at(r, m).get("exact_match") for r in results]) for m in marks])
    widths = [max(map(len, column)) for column in zip(*rows)]
    for name, *cells in rows:
        print("  " + name.ljust(widths[0]) + "".join("  " + cell.rjust(width)
                                                    for cell, width in zip(cells, widths[1:])))
    for line in findings(variants):
        print("  " + line)


def main():
    if len(sys.argv) < 3:
        raise SystemExit(__doc__)
    *folders, page = map(pathlib.Path, sys.argv[1:])
    recipes = load(folders)
    if not recipes:
        raise SystemExit(f"report: got {' '.join(map(str, folders))}; must hold "
                         "recipe/variant/seedN/result.json")
    for recipe, variants in recipes.items():
        text_table(recipe, variants)
    stopped = unfinished(folders)
    body = "\n".join(section(recipe, variants, stopped.get(recipe, ()))
                     for recipe, variants in recipes.items())
    page.write_text(
        "<!doctype html><html lang=en><meta charset=utf-8>"
        "<meta name=viewport content='width=device-width'><title>FlashEntmax lab</title>"
        f"<style>{STYLE}</style><h1>What sparse attention can express, and how far it reaches</h1>"
        "<p>Small models trained from nothing on synthetic tasks; every kind of attention gets the "
        "same budget. Why the differences are expected is in <code>docs/lab.md</code>.</p>"
        f"{body}</html>", encoding="utf-8")
    print(f"\nwrote {page}")


if __name__ == "__main__":
    main()
