"""What the experiments report: means with their spread, verdicts on the paper's claims,
tables, how a result was measured, the READMEs' blocks, pictures.
"""
import json
import math
import re
import sys
import time
from pathlib import Path

from support.script import ROOT, Hold, InputError, write_whole

RESULTS = ROOT / "experiments" / "results"
# The models in the table of claims, and the texts in a claim.
MODELS = {"demo": "the demo", "demo-muon": "a demo by Muon", "smollm2": "SmolLM2-135M"}
NAMED = {"text": "first text", "text2": "second text"}
SCRIPTS = ("table2", "table4", "table5", "table6", "table7", "table8", "fig1", "fig2", "fig3",
           "fig5", "fig6", "a6", "open_questions")
# Okabe and Ito's, which the colour-blind tell apart.
COLOURS = {"orange": "#E69F00", "sky": "#56B4E9", "blue": "#0072B2", "red": "#D55E00",
           "grey": "#999999", "green": "#009E73", "purple": "#CC79A7"}


# ------------------------------------------------------------ means and words
def mean_spread(values):
    """(mean, sample standard deviation) over seeds; one value's is None: not known."""
    values = [math.nan if v is None else v for v in values]
    mean = sum(values) / len(values)
    if len(values) == 1:
        return mean, None
    # Not ** 2, which raises an error where a product is infinite.
    return mean, math.sqrt(sum((v - mean) * (v - mean) for v in values) / (len(values) - 1))


def compare(a, b):
    """a against b over the same seeds: (mean, spread, word) of a_s/b_s − 1, in %.

    The seeds share their calibration and evaluation windows, so the spread is that of
    the paired differences (sample standard deviation). word: "lower" or "higher"; "no
    difference" for a mean not above its spread; "undecided" for one seed. A list of one
    stands for every seed: a method that sees no calibration text.
    """
    seeds = max(len(a), len(b))
    if len(a) == 1:
        a = list(a) * seeds
    if len(b) == 1:
        b = list(b) * seeds
    changes = []
    for x, y in zip(a, b, strict=True):
        changes.append(100 * (x / y - 1) if x is not None and y else math.nan)
    mean, spread = mean_spread(changes)
    if spread is None or math.isnan(mean):
        return mean, spread, "undecided"
    if abs(mean) <= spread:
        return mean, spread, "no difference"
    return mean, spread, "lower" if mean < 0 else "higher"


def find(rows, **wanted):
    """The one row with these settings."""
    return next(row for row in rows
                if all(row.get(key) == value for key, value in wanted.items()))


def rates_of(result):
    """Those that were measured, the largest first."""
    return sorted({row["rate"] for row in result["rows"]}, reverse=True)


def against(rows, key, values, a, b, of=("ppl", "text")):
    """compare(a, b) at every value of the setting `key`; a, b: what tells the two rows.

    of: which figure, "ppl" or "js", on which text.
    """
    what, text = of
    compared = []
    for value in values:
        one, other = (find(rows, **{key: value}, **each)[what][text] for each in (a, b))
        compared.append(compare(one, other))
    return compared


def every(compared, *words):
    """Is each comparison's word one of `words`? None when one is undecided."""
    found = {word for *_, word in compared}
    return None if "undecided" in found else found <= set(words)


# ------------------------------------------------------------ verdicts
def verdict(claim, holds, measured, otherwise=""):
    """A claim as measured: holds True, False or None.

    otherwise: what may explain a failure, and the smallest test of it.
    """
    return {"claim": claim, "holds": holds, "measured": measured, "otherwise": otherwise}


def verdict_line(v):
    words = {True: "holds", False: "does not hold", None: "undecided"}
    line = f"**{words[v['holds']]}**: {v['claim']} Measured: {v['measured']}"
    if v["holds"] is False and v["otherwise"]:
        line += f" May explain it: {v['otherwise']}"
    return line


def verdicts_on(results, model):
    """{(script, claim): the verdict's word} of a model, as far as it was measured."""
    words = {True: "holds", False: "**does not hold**", None: "undecided"}
    found = {}
    for name in SCRIPTS:
        path = results / f"{name}-{model}.json"
        if path.exists():
            for v in json.loads(path.read_text("utf-8")).get("verdicts", ()):
                found[name, v["claim"]] = words[v["holds"]]
    return found


def claims(results):
    """A table of the paper's claims, each once, with its verdict on every model."""
    found = {model: verdicts_on(results, model) for model in MODELS}
    rows = []
    for name, claim in found["demo"]:
        rows.append([f"`{name}`", claim,
                     *(found[model].get((name, claim), "–") for model in MODELS)])
    return table(["script", "claim", *MODELS.values()], rows, left=2 + len(MODELS))


# ------------------------------------------------------------ tables
def number(x):
    """Five digits at most: '22.73', '227.3', '2,273', '2.3e6'; '–' for none."""
    if x is None or math.isnan(x):
        return "–"
    if abs(x) < 100:
        return f"{x:.2f}"
    if abs(x) < 1000:
        return f"{x:.1f}"
    return f"{x:,.0f}" if abs(x) < 1e5 else f"{x:.1e}".replace("e+0", "e").replace("e+", "e")


def show(values):
    """'22.73 ± 0.12', or '22.73' for one seed."""
    mean, spread = mean_spread(values)
    return number(mean) + (f" ± {number(spread)}" if spread is not None else "")


def percent(compared):
    """'-9.1 ± 0.8 %', with 'no difference' in brackets where that is the word.

    From 1,000 % on in `number`'s digits: '+2,273 %'.
    """
    mean, spread, word = compared
    if math.isnan(mean):
        return "not measured"
    far = abs(mean) >= 1000
    change = f"+{number(mean)}" if far else f"{mean:+.1f}"
    if spread is not None:
        change += " ± " + (number(spread) if far else f"{spread:.1f}")
    within = " (no difference)" if word == "no difference" else ""
    return f"{change} %{within}"


def listed(values, compared):
    """'0.6: -9.1 ± 0.8 %; 0.4: …'."""
    pairs = zip(values, compared)
    return "; ".join(f"{value:g}: {percent(each)}" for value, each in pairs)


def table(head, rows, left=1):
    """A markdown table; the first `left` columns are words, the others figures. Raises
    ValueError for a row that is not as long as the head."""
    rule = ["---"] * left + ["---:"] * (len(head) - left)
    lines = []
    for row in (head, rule, *rows):
        cells = [str(cell).replace("|", "\\|") for cell, _ in zip(row, head, strict=True)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def caption(result, calibrated=None):
    """How a result was measured, from its own JSON.

    calibrated: what it was calibrated on where that varies.
    """
    c = result["calibration"]
    texts = []
    for t in result["texts"].values():
        texts.append(f"{t['windows']} of {t['of']} windows of {t['seqlen']} tokens of "
                     f"{t['name']} (evenly spaced)")
    said = [result["checkpoint"]]
    if texts:
        said.append("perplexity on " + " and ".join(texts))
    if calibrated is None:
        calibrated = f"{c['samples']} × {c['seqlen']} tokens of {c['text']}"
    seeds = "seed " + str(c["seeds"][0])
    if len(c["seeds"]) > 1:
        seeds = f"seeds {', '.join(map(str, c['seeds']))} (± their standard deviation)"
    said.append(f"calibration on {calibrated}, {seeds}")
    return f"*{'; '.join(said)}.*"


# ------------------------------------------------------------ the READMEs
def block(module, result):
    """What the README shows of a script: its table, how it was measured, its verdicts."""
    measured = caption(result, getattr(module, "CALIBRATED", None))
    lines = [f"- {verdict_line(v)}" for v in module.verdicts(result)]
    return "\n".join([module.markdown(result), "", measured, "", *lines])


def wait_for(folder):
    """Its Hold, as soon as no other run has it."""
    while True:
        try:
            return Hold(folder)
        except InputError:
            time.sleep(0.05)


def refresh(name, text, root=ROOT):
    """Replace what stands between <!-- name --> and <!-- /name --> in `root`'s README.md
    and the notebook's pages, experiments/*.md; one without these marks stays as it is.
    """
    name = re.escape(name)
    marked = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.S)
    turn = wait_for(root / "experiments")           # two scripts may end at once
    for path in filter(Path.exists, (root / "README.md", *(root / "experiments").glob("*.md"))):
        old = path.read_text("utf-8")
        # A function, since backslashes of a replacement text would be escapes.
        new = marked.sub(lambda marks: marks[1] + text + "\n" + marks[2], old)
        if new != old:
            write_whole(path, new)
    turn.release()


# ------------------------------------------------------------ pictures
def pyplot():
    """matplotlib.pyplot without a screen, or None after saying what is missing."""
    try:
        import matplotlib
    except ImportError:
        print("no picture: it needs matplotlib (pip install matplotlib); "
              "the JSON has its numbers", file=sys.stderr)
        return None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.rcParams.update({
        "font.size": 10,
        "axes.grid": True,
        "grid.alpha": 0.3,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "savefig.dpi": 110,
    })
    return plt


def drawn(ax, x, points, colour, **look):
    """A curve of `points`, (mean, spread or None) each, on the axes `ax`."""
    means, spreads = zip(*points)
    bars = [spread or 0 for spread in spreads]
    ax.errorbar(x, means, bars, color=COLOURS.get(colour, colour), capsize=3, **look)
