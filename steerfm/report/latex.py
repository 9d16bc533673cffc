r"""A comparison's tables as LaTeX: booktabs, everything from runs escaped, bold only where a difference is sure.

Each table is a `tabular` alone, for \input within a table of one's own; the document needs \usepackage{booktabs}.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from steerfm.report.columns import Column, column_groups, difference_text, differences
from steerfm.report.compare import Comparison, differences_of
from steerfm.report.rows import Row

SPECIAL = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "`": r"\textasciigrave{}",
    '"': "{''}",
    "[": "{[}",  # after \\ it would begin an option
    "*": "{*}",  # and this would be a part of the command
    "–": "--",
    "—": "---",
    "−": "$-$",
    "±": r"$\pm$",
    "×": r"$\times$",
    "·": r"$\cdot$",
    "²": "$^2$",
    "³": "$^3$",
    "½": r"$\frac12$",
    "∞": r"$\infty$",
    "≤": r"$\leq$",
    "≥": r"$\geq$",
    "≈": r"$\approx$",
    "→": r"$\rightarrow$",
    "…": r"\dots{}",
    "“": "``",
    "”": "''",
    "‘": "`",
    "’": "'",
} | {character: f"\\{character}" for character in "{}&%$#_"}
GREEK = "alpha beta gamma delta epsilon zeta eta theta iota kappa lamda mu nu xi pi rho sigma tau phi chi psi omega"
SPECIAL |= {
    unicodedata.lookup(f"GREEK SMALL LETTER {name}"): rf"$\{name.replace('lamda', 'lambda')}$" for name in GREEK.split()
}
JOINED = "-',"  # two of them would become one other sign
LAST_COMMON = 0x17F  # what LaTeX's usual fonts hold ends with Latin Extended-A
NUMBER_SIGNS = re.compile(r"(?P<power>(?<=\d)e[+-]\d+)|(?<![\w.])[+-](?=[\d.])")


def tables(comparison: Comparison) -> dict[str, str]:
    """Return LaTeX by file name: quality.tex, costs.tex, and differences.tex where there are any."""
    best = best_runs(comparison)
    groups = zip(("quality.tex", "costs.tex"), column_groups(comparison), strict=False)
    found = {name: _rows_table(comparison, shown, best) for name, shown in groups}
    figures, changes = differences(comparison)
    if changes:
        against = comparison.pairs[0].against
        head = [f"minus {against}", *(figure.removeprefix("held_out.") for figure in figures)]
        body = [[escaped(label), *(cell(difference_text(pair)) for pair in pairs)] for label, pairs in changes]
        note = ["95% intervals of differences on the same prompts and seeds"]
        found["differences.tex"] = _tabular([escaped(title) for title in head], [body], note)
    return found


def best_runs(comparison: Comparison) -> dict[str, str]:
    """Return by metric the run that is better than every other one for sure, where there is such a run.

    Sure: the 95% intervals of its paired differences to each of the others exclude zero. Metrics are the reward and the
    held-out values, all of which are better the higher they are.
    """
    sources = {source.label: source for source in comparison.sources}
    found = {}
    for metric in ["reward", *(f"held_out.{name}" for name in comparison.held_out)]:
        means = {row.label: mean for row in comparison.rows if (mean := _mean(row, metric)) is not None}
        if len(means) < 2:
            continue
        leader = max(means, key=lambda label: means[label])
        others = [sources[label] for label in means if label != leader]
        leads = [{p.metric: p for p in differences_of(sources[leader], other)}.get(metric) for other in others]
        if all(lead is not None and lead.difference.mean > 0 and not lead.within_noise for lead in leads):
            found[metric] = leader
    return found


def escaped(text: str) -> str:
    """Return text that LaTeX sets as it is: no command, no mathematics, no line break, nothing invisible."""
    return _characters(" ".join(unicodedata.normalize("NFC", text).split()))


def cell(text: str) -> str:
    """Return a figure's text, with its signs and powers of ten as mathematics sets them."""
    written, end = "", 0
    for found in NUMBER_SIGNS.finditer(text):
        sign = rf"$\cdot10^{{{int(found[0][1:])}}}$" if found["power"] else f"${found[0]}$"
        written += _characters(text[end : found.start()]) + sign
        end = found.end()
    return written + _characters(text[end:])


def _characters(text: str) -> str:
    shown = [character for character in text if character.isprintable()]
    parted = ["{}" if a == b and a in JOINED else "" for a, b in zip(shown, [*shown[1:], ""], strict=False)]
    return "".join(SPECIAL.get(a, a) + between for a, between in zip(shown, parted, strict=True))


def _mean(row: Row, metric: str) -> float | None:
    """Return the mean of a metric in a run's row."""
    found = row.reward if metric == "reward" else row.held_out.get(metric.removeprefix("held_out."))
    return None if found is None or row.kind != "run" else found.mean


def _rows_table(comparison: Comparison, shown: Sequence[Column], best: dict[str, str]) -> str:
    """Return the table of these columns, the runs above a rule and what they are held against below it."""
    metrics = {"reward": "reward"} | {f"{name}, held out": f"held_out.{name}" for name in comparison.held_out}

    def written(row: Row, column: Column) -> str:
        text = cell(column.text(row)) if column.numeric else escaped(column.text(row))
        is_best = row.kind == "run" and best.get(metrics.get(column.title, "")) == row.label
        return rf"\textbf{{{text}}}" if is_best else text

    filled = [row for row in comparison.rows if any(c.value(row) is not None for c in shown if c.numeric)]
    parts = [[row for row in filled if (row.kind == "run") == is_run] for is_run in (True, False)]
    body = [[[written(row, column) for column in shown] for row in part] for part in parts if part]
    intervals = ["± is half of a 95% bootstrap interval"] if any(metrics.get(c.title) for c in shown) else []
    said = ["bold: better than every other run, each paired 95% interval above zero"] if best and intervals else []
    return _tabular([escaped(column.title) for column in shown], body, [*intervals, *said])


def _tabular(head: Sequence[str], parts: Sequence[Sequence[Sequence[str]]], notes: Sequence[str]) -> str:
    r"""Return a `tabular`: the first column to the left, figures to the right, a rule between the parts."""
    body = "\\midrule\n".join("".join(f"{' & '.join(line)} \\\\\n" for line in part) for part in parts)
    text = f"\\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}\n\\toprule\n{' & '.join(head)} \\\\\n\\midrule\n{body}"
    beyond = sorted({character for character in text if ord(character) > LAST_COMMON})
    engine = [f"has {' '.join(beyond)}: needs LuaLaTeX or XeLaTeX and a font that has them"] if beyond else []
    comments = [r"needs \usepackage{booktabs}", *engine, *notes]
    return "".join(f"% {comment}\n" for comment in comments) + text + "\\bottomrule\n\\end{tabular}\n"
