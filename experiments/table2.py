"""Tables 2 and 12 of the paper: perplexity on two texts and JS divergence to the dense
model, six methods at four rates.

    python experiments/table2.py                  # the demo; continues where it stopped
    python experiments/table2.py --ckpt llama7b.safetensors --windows 0

Writes experiments/results/table2-NAME.json and, with matplotlib, table2-NAME.png; for
the demo it refreshes the README's table. Left out: the reasoning tasks.
"""
import math
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from experiments.common import Lab, setup_of
from experiments.report import (NAMED, against, compare, drawn, every, find, listed,
                                mean_spread, number, percent, show, table, verdict)
from support.script import run

RATES = (0.8, 0.6, 0.4, 0.2)


class Row(NamedTuple):
    """A method of the table and the picture."""

    name: str
    colour: str                 # of report.COLOURS, or any of matplotlib's
    marker: str
    paper: tuple | None         # a rate's PAPER_COLUMNS each; None: not in the paper


# Table 12, LLaMA-7B; JS divergence in % with the paper's sign.
PAPER_COLUMNS = ("WikiText-2", "C4", "JS WikiText-2", "JS C4")
PAPER_DENSE = (5.68, 7.34)
# A further method of air.METHODS is a further line here.
ROWS = {
    "svd": Row("SVD", "grey", "s", (
        (19438, 16115, -95, -94), (52839, 46630, -98, -97),
        (105082, 105082, -98, -97), (196320, 208981, -98, -98))),
    "fwsvd": Row("FWSVD", "sky", "v", (
        (22026, 32048, -96, -96), (81838, 111860, -98, -98),
        (134928, 126754, -98, -98), (268337, 208981, -98, -98))),
    "asvd": Row("ASVD", "orange", "^", (
        (116, 105, -66, -62), (4915, 8103, -92, -93),
        (143631, 134928, -98, -98), (24959, 23447, -96, -95))),
    "svdllm": Row("SVD-LLM(W)", "blue", "o", (
        (7.87, 16.65, -11, -23), (13.81, 56.33, -25, -48),
        (63.83, 345, -54, -72), (854, 8626, -77, -84))),
    "air": Row("AIR", "red", "D", (
        (7.51, 14.24, -8, -19), (11.27, 35.81, -20, -40),
        (42.52, 277, -48, -69), (472, 2550, -68, -83))),
}


# ------------------------------------------------------------ tables
def rows_of(result):
    """ROWS of the methods that a result has."""
    measured = {row["method"] for row in result["rows"]}
    return {method: row for method, row in ROWS.items() if method in measured}


def ours(result, method, rate):
    """The cells of a method at a rate: perplexity and JS divergence on each text."""
    row = find(result["rows"], method=method, rate=rate)
    ppl = [show(values) for values in row["ppl"].values()]
    js = [f"{-100 * mean_spread(values)[0]:.1f} %" for values in row["js"].values()]
    return [*ppl, *js]


def theirs(row, rate):
    """The paper's cells beside them."""
    if row.paper is None:
        return ["–"] * len(PAPER_COLUMNS)
    wikitext, c4, *js = row.paper[RATES.index(rate)]
    return [f"{wikitext:,}", f"{c4:,}", *(f"{x} %" for x in js)]


def markdown(result):
    """The paper's layout: ours on the left, the paper's figures on the right."""
    names = [text["name"] for text in result["texts"].values()]
    first, *others = PAPER_COLUMNS
    head = ["rate", "method", *names, *(f"JS {name}" for name in names),
            f"paper: {first}", *others]
    dense = [number(result["dense"][which]) for which in result["texts"]]
    lines = [["1", "dense", *dense, *["0 %"] * len(names), *PAPER_DENSE, "0 %", "0 %"]]
    for rate in RATES:
        for method, row in rows_of(result).items():
            figures = ours(result, method, rate) + theirs(row, rate)
            lines.append([f"{rate:g}", row.name, *figures])
    return table(head, lines, left=2)


def short(result):
    """Perplexity on the first text, a line a method; the paper's is WikiText-2's."""
    head = ["method", *(f"ours {rate:g}" for rate in RATES),
            *(f"paper {rate:g}" for rate in RATES)]
    dense = number(result["dense"]["text"])
    lines = [["dense", dense, "", "", "", PAPER_DENSE[0], "", "", ""]]
    for method, row in rows_of(result).items():
        line = [row.name]
        line += [ours(result, method, rate)[0] for rate in RATES]
        line += [theirs(row, rate)[0] for rate in RATES]
        lines.append(line)
    return table(head, lines)


# ------------------------------------------------------------ verdicts
def pair(result, a, b, of=("ppl", "text")):
    """Method a against b at every rate."""
    return against(result["rows"], "rate", RATES, {"method": a}, {"method": b}, of)


def below_on(result, which):
    """Sections 1 and 4.1, of one text: AIR is below SVD-LLM(W)."""
    gaps = pair(result, "air", "svdllm", ("ppl", which))
    return verdict(
        f"AIR's perplexity is below SVD-LLM(W)'s at every rate ({NAMED[which]}).",
        every(gaps, "lower"),
        f"AIR against SVD-LLM(W), {listed(RATES, gaps)}.",
        "influence is measured around the dense model, and a low rate is far from it; a "
        "small model may also have little to gain at a mild one. To tell: training.py, "
        "and influence measured on the compressed model.")


def widens(result):
    """Does AIR's perplexity over SVD-LLM(W)'s fall from each rate to the next?"""
    gain = {}
    for rate in RATES:
        air, svdllm = (find(result["rows"], method=method, rate=rate)["ppl"]["text"]
                       for method in ("air", "svdllm"))
        gain[rate] = [math.nan if None in (x, y) else x / y for x, y in zip(air, svdllm)]
    steps = list(zip(RATES, RATES[1:]))
    changes = [compare(gain[low], gain[high]) for high, low in steps]
    said = [f"from {high:g} to {low:g}: {percent(change)}"
            for (high, low), change in zip(steps, changes)]
    return verdict(
        "AIR's advantage over SVD-LLM(W) widens as fewer parameters are kept.",
        every(changes, "lower"),
        f"change of the ratio of both perplexities, {'; '.join(said)}.",
        "at the lowest rate both models are far outside the region where a first-order "
        "influence means something. To tell: rates 0.3 and 0.25 between the last two.")


def by_18_percent(result):
    low = pair(result, "air", "svdllm")[1:]
    known = every(low, "lower") is not None
    return verdict(
        "AIR improves perplexity over SVD-LLM(W) by more than 18 % at rates of 0.6 and "
        "below.",
        all(mean < -18 for mean, *_ in low) if known else None,
        f"{listed(RATES[1:], low)}.",
        "18 % is LLaMA-7B's figure; a model a thousand times smaller has less redundant "
        "weight to move error to. To tell: this script on TinyLlama (--ckpt).")


def of_the_others(result):
    """What Table 2 shows of the methods before."""
    fisher = pair(result, "fwsvd", "svd")
    gaps = []
    for other in ("asvd", "fwsvd", "svd"):
        for rate, gap in zip(RATES, pair(result, "svdllm", other)):
            gaps.append((other, rate, gap))
    other, rate, smallest = max(gaps, key=lambda each: each[2][0])
    return [
        verdict(
            "FWSVD is worse than plain SVD.",
            every(fisher, "higher"),
            f"FWSVD against SVD, {listed(RATES, fisher)}.",
            "the paper's FWSVD need not weight the same axis, and Fisher information of "
            "a large model may be carried by few inputs. To tell: air.py --method fwsvd "
            "--axis out, and influence.py --signal fisher on both models."),
        verdict(
            "SVD-LLM(W) is better than ASVD, FWSVD and SVD at every rate.",
            every([gap for *_, gap in gaps], "lower"),
            f"its smallest advantage is over {ROWS[other].name} at {rate:g}: "
            f"{percent(smallest)}."),
    ]


def diverges_less(result, which):
    """Table 12, of one text."""
    gaps = pair(result, "air", "svdllm", ("js", which))
    return verdict(
        "AIR diverges less from the dense model than SVD-LLM(W) at every rate "
        f"({NAMED[which]}).",
        every(gaps, "lower"),
        f"JS divergence of AIR against SVD-LLM(W), {listed(RATES, gaps)}.",
        "what is said of perplexity above, and the same tests.")


def verdicts(result):
    """The claims of Sections 1 and 4.1 about Table 2."""
    return [
        *(below_on(result, which) for which in result["texts"]),
        widens(result),
        by_18_percent(result),
        *of_the_others(result),
        *(diverges_less(result, which) for which in result["texts"]),
    ]


# ------------------------------------------------------------ picture
def picture(plt, result):
    """Perplexity against rate, one line a method.

    The two sides share no axis, since model and text differ.
    """
    fig, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
    for method, row in rows_of(result).items():
        look = {"marker": row.marker, "label": row.name}
        # On the left what was measured, with its spread over seeds.
        found = [find(result["rows"], method=method, rate=rate) for rate in RATES]
        points = [mean_spread(each["ppl"]["text"]) for each in found]
        drawn(left, RATES, points, row.colour, **look)
        # On the right the paper's figures, where it has the method.
        if row.paper:
            points = [(figures[0], None) for figures in row.paper]
            drawn(right, RATES, points, row.colour, **look)
    text = result["texts"]["text"]["name"]
    left.set_title(f"this repository: {result['checkpoint']}, {text}")
    right.set_title("the paper: LLaMA-7B, WikiText-2")
    for ax, dense in ((left, result["dense"]["text"]), (right, PAPER_DENSE[0])):
        ax.axhline(dense, color="black", linestyle=":", label="dense")
        ax.set(xlabel="rate: fraction of parameters kept",
               ylabel="perplexity a token (log scale)", yscale="log")
        ax.set_xticks(RATES)
        ax.invert_xaxis()
    left.legend(fontsize=9)
    fig.tight_layout()
    return fig


def main():
    lab = Lab("table2", setup_of(__doc__))
    result = {"dense": {which: lab.dense(which) for which in lab.texts}}
    settings = [{"method": method, "rate": rate} for method in ROWS for rate in RATES]
    result["rows"] = lab.measure(settings, tuple(lab.texts), js=True)
    lab.finish(sys.modules[__name__], result, picture)


if __name__ == "__main__":
    run(main)
