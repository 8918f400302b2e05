"""Tests of report.py: figures, what it says in words, and the page of a folder of results.

    python3 -m unittest lab/tests/report_test.py
"""

import contextlib
import html.parser
import io
import json
import math
import pathlib
import re
import sys
import tempfile
import unittest
from unittest import mock

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import report  # noqa: E402

RECALL = {"name": "recall", "symbols": 0, "key_symbols": 2, "value_symbols": 2, "queries": 2}


def make(exact, task=None, length=64, **rows):
    """A result with these shares of whole sequences, {multiple: share or None}; `rows` adds to the row of each."""
    lengths = []
    for multiple, share in exact.items():
        row = {"multiple": multiple, "length": int(length * multiple)}
        if share is not None:
            row |= {"exact_match": share, "token_accuracy": (1 + share) / 2, **rows}
        else:
            row["error"] = "memory"
        lengths.append(row)
    return {"lengths": lengths, "training_seconds": 90.0, "machine": "a machine",
            "run": {"task": task or {"name": "copy"},
                    "model": {"layers": 2, "width": 64, "heads": 4, "positions": "nape"},
                    "training": {"steps": 1500, "batch": 32, "min_length": 8, "max_length": 64},
                    "evaluation": {"length": length}}}


def save(folder, recipe, variant, seed, result, metrics=({"step": 1500, "loss": 0.1},)):
    run = pathlib.Path(folder, recipe, variant, f"seed{seed}")
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    if result:
        (run / "result.json").write_text(json.dumps(result))


def build(folder):
    """What report.py prints of a folder, and its page."""
    page = pathlib.Path(folder, "page.html")
    printed = io.StringIO()
    with mock.patch.object(sys, "argv", ["report.py", str(folder), str(page)]), \
            contextlib.redirect_stdout(printed):
        report.main()
    return printed.getvalue(), page.read_text(encoding="utf-8")


class Tables(html.parser.HTMLParser):
    """The cells of a page's tables: a list of tables, which are lists of rows."""

    def __init__(self, page):
        super().__init__()
        self.tables = []
        self.in_cell = False
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self.in_cell = True

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.in_cell = False

    def handle_data(self, data):
        if self.in_cell:
            self.tables[-1][-1][-1] += data


class Figures(unittest.TestCase):
    def test_a_hundred_means_every_one(self):
        self.assertEqual(report.figure(1.0), "100.0")
        self.assertEqual(report.figure(0.9999), "99.99")
        self.assertEqual(report.figure(0.9999999999), "99.999")
        self.assertEqual(report.figure(0.998), "99.8")
        self.assertEqual(report.figure((0.998 + 0.999 + 0.999 + 0.997 + 0.999) / 5), "99.84")
        self.assertEqual(report.figure(0.99796), "99.8")
        self.assertEqual(report.figure(0.5), "50.0")
        self.assertEqual(report.figure(0.0), "0.0")

    def test_mean_and_range(self):
        self.assertEqual(report.percent([0.25, 0.75]), "50.0 (25.0–75.0)")
        self.assertEqual(report.percent([0.5, None, 0.5]), "50.0")
        self.assertEqual(report.percent([None]), "–")
        self.assertEqual(report.percent([]), "–")

    def test_statistics_are_means_over_layers_and_heads(self):
        row = {"attention": [{"largest": [0.5, 1.0]}, {"largest": [[0.0], [0.5]]}, {}]}
        self.assertEqual(report.statistic(row, "largest"), 0.5)
        self.assertIsNone(report.statistic(row, "support"))
        self.assertIsNone(report.statistic({}, "largest"))

    def test_the_ceiling_of_the_shortcut(self):
        # Of 8 pairs in 60 tokens: one of the k + 1 values that begin alike, k of 7 others by chance.
        task = {**RECALL, "symbols": 16}
        one = sum(math.comb(7, k) * (1 / 16) ** k * (15 / 16) ** (7 - k) / (1 + k) for k in range(8))
        self.assertAlmostEqual(report.shortcut_ceiling(task, 60), one ** 2, places=12)


class Findings(unittest.TestCase):
    @staticmethod
    def of(**shares):
        """`shares`: {attention: [share of each seed]} at the training length."""
        return report.findings({name.replace("_", "-"): [make({1: share}) for share in seeds]
                                for name, seeds in shares.items()})

    def test_sparse_ahead(self):
        self.assertEqual(self.of(entmax=[0.9, 0.8], softmax=[0.7, 0.1]), [
            "At 1× the training length entmax solves 85.0 % of the sequences, softmax 40.0 %: every seed of entmax "
            "is ahead of every seed of softmax."])
        self.assertEqual(self.of(entmax=[0.9], softmax=[0.1]), [
            "At 1× the training length entmax solves 90.0 % of the sequences, softmax 10.0 %: one seed each."])
        self.assertEqual(self.of(asentmax=[0.9, 0.8], softmax=[0.1])[0][-36:],
                         ": 2 seeds of asentmax, 1 of softmax.")

    def test_lengths_share_a_sentence(self):
        self.assertEqual(report.findings({"entmax": [make({1: 1.0, 2: 0.9, 4: 0.7, 8: 0.0})],
                                          "softmax": [make({1: 1.0, 2: 0.5, 4: 0.0, 8: 0.2})]}), [
            "At 2× / 4× the training length entmax solves 90.0 / 70.0 % of the sequences, softmax 50.0 / 0.0 %: "
            "one seed each.",
            "At 8× the training length entmax solves 0.0 % of the sequences, softmax 20.0 %: softmax is ahead "
            "(one seed each).",
            "At 1× sparse attention and softmax are level, within 5 points (one seed each)."])

    def test_softmax_ahead(self):
        self.assertEqual(self.of(entmax=[0.1, 0.2], softmax=[0.9, 0.9])[0][-20:], "%: softmax is ahead.")

    def test_ahead_on_some_seeds(self):
        self.assertEqual(self.of(entmax=[0.9, 0.0], softmax=[0.1, 0.2]), [
            "At 1× the training length entmax solves 45.0 % of the sequences, softmax 15.0 %: entmax is ahead in the "
            "mean, not on every seed (2 seeds of entmax, 2 of softmax)."])
        self.assertEqual(self.of(asentmax=[0.9, 0.0], softmax=[0.8])[0][-86:],
                         ": softmax is ahead in the mean, not on every seed (2 seeds of asentmax, 1 of softmax).")
        # Of two kinds that share their lowest seed, the one with the better mean.
        self.assertIn("entmax solves 99.96 %", self.of(entmax=[0.9996], softmax=[0.1])[0])
        self.assertIn("asentmax solves 30.0 %", self.of(entmax=[0.0, 0.1], asentmax=[0.0, 0.6], softmax=[0.0])[0])

    def test_level(self):
        self.assertEqual(self.of(entmax=[0.9, 0.3], softmax=[0.6, 0.62]), [
            "At 1× sparse attention and softmax are level, within 5 points (2 seeds of entmax, 2 of softmax)."])
        self.assertEqual(self.of(entmax=[0.52], softmax=[0.5]), [
            "At 1× sparse attention and softmax are level, within 5 points (one seed each)."])

    def test_states_of_fixed_size(self):
        said = self.of(entmax=[1.0], linear=[0.1], selective_linear=[0.99])
        self.assertEqual(said, [
            "At the training length linear attention reaches 10.0 %, entmax 100.0 %: a state of fixed size cannot "
            "hold what the task asks for.",
            "At the training length selective-linear attention is level with entmax."])


class Page(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = folder.name

    def test_tables_and_text(self):
        save(self.folder, "mine", "softmax", 1, make({1: 1.0, 2: 0.5}))
        save(self.folder, "mine", "softmax", 2, make({1: 1.0, 2: 0.25}))
        save(self.folder, "mine", "entmax", 1, make({1: 1.0, 2: None}))
        printed, page = build(self.folder)
        exact = Tables(page).tables[0]
        self.assertEqual(exact, [["attention", "1×", "2×"], ["entmax", "100.0", "–"],
                                 ["softmax", "100.0", "37.5 (25.0–50.0)"]])
        for row in exact:
            self.assertRegex(printed, r"\s+".join(map(re.escape, row)))
        self.assertIn("3 runs on a machine, 4.5 minutes of training in all", page)
        self.assertIn("1–2 seeds: mean, lowest–highest", page)

    def test_published_figures_stand_beside_those_of_the_same_task_and_length(self):
        save(self.folder, "copy-other", "softmax", 1, make({1: 1.0, 64: 0.5}))
        self.assertIn([["attention", "1×", "64×"], ["softmax", "", "85.5"], ["asentmax", "", "86.6"]],
                      Tables(build(self.folder)[1]).tables)
        short = make({1: 1.0, 64: 0.5})
        short["run"]["training"]["max_length"] = 24
        self.assertEqual(report.published("copy", {"softmax": [short]}), {})

    def test_recall_by_place_with_and_without_a_token_at_the_end(self):
        answers = [1.0, 0.5, 0.25, 1.0, 0.7, 0.35]  # two queries of a mark and two symbols
        save(self.folder, "recall", "softmax", 1, make({1: 0.5}, RECALL, slot_accuracy=answers))
        save(self.folder, "recall", "entmax", 1, make({1: 0.5}, RECALL, slot_accuracy=answers + [0.1]))
        rows = [row for table in Tables(build(self.folder)[1]).tables for row in table]
        for name in ("softmax", "entmax"):
            self.assertIn([name, "100.0 / 60.0 / 30.0"], rows)

    def test_runs_without_a_result_are_named(self):
        save(self.folder, "mine", "softmax", 1, make({1: 1.0}))
        save(self.folder, "mine", "entmax", 3, None, [
            {"step": 500, "loss": 1.0, "exact_match": 0.125}, {"step": 600, "loss": 1.0}])
        page = build(self.folder)[1]
        self.assertIn("entmax, seed 3: after 600 steps 12.5 % of the whole sequences", page)
        self.assertNotIn("softmax, seed 1", page)

    def test_attention_without_weights_has_no_row_of_them(self):
        save(self.folder, "mine", "softmax", 1, make({1: 1.0}, attention=[{"largest": [0.25], "support": [9.0]}]))
        save(self.folder, "mine", "linear", 1, make({1: 1.0}))
        tables = Tables(build(self.folder)[1]).tables
        self.assertIn([["largest weight", "1×"], ["softmax", "0.25"]], tables)
        self.assertIn([["keys kept a row", "1×"], ["softmax", "9.0"]], tables)

    def test_names_are_escaped(self):
        save(self.folder, "<b>&", "<i>", 1, make({1: 1.0}))
        page = build(self.folder)[1]
        self.assertNotIn("<b>&", page)
        self.assertNotIn("<i>", page)
        self.assertIn(["<i>", "100.0"], Tables(page).tables[0])

    def test_an_empty_folder_is_refused(self):
        with self.assertRaisesRegex(SystemExit, "must hold recipe/variant/seedN/result.json"):
            build(self.folder)

    def test_too_few_arguments_show_the_usage(self):
        with mock.patch.object(sys, "argv", ["report.py", "page.html"]), self.assertRaisesRegex(SystemExit, "Usage"):
            report.main()


if __name__ == "__main__":
    unittest.main()
