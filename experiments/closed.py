"""All closed forms side by side, at three rates: the paper's, and beyond it the error in
two metrics (`--method kfac`, `gfwsvd`), AIR's sweep on top (`kfac-air`), weights anchored to
the dense model's outputs (`--anchor`), measured ranks (`--ranks auto`), some layers left dense
(`--ranks mixed`).

    python experiments/closed.py                  # the demo; continues where it stopped
    python experiments/closed.py --ckpt data/smollm2 --calib data/odd.raw \\
        --text data/even.raw --samples 16 --seqlen 1024 --windows 10

All with air.py's default ridge. Writes experiments/results/closed-NAME.json.
"""
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from experiments import report
from experiments.common import Lab, setup_of
from experiments.report import compare, drawn, mean_spread, percent, show, table
from support.script import run

RATES = (0.8, 0.6, 0.4)
SHARE = 0.3             # of the dense stream in "anchored"
# {name: (setting, colour, marker)}
FORMS = {
    "SVD": ({"method": "svd"}, "black", "x"),
    "ASVD": ({"method": "asvd"}, "brown", "<"),
    "FWSVD": ({"method": "fwsvd"}, "grey", ">"),
    "SVD-LLM(W)": ({"method": "svdllm"}, "blue", "o"),
    "AIR, δ = 2": ({"method": "air", "delta": 2.0}, "red", "D"),
    "AIR, δ = 0.5": ({"method": "air", "delta": 0.5}, "orange", "d"),
    "AIR by Fisher, δ = 2": ({"method": "air", "delta": 2.0, "signal": "fisher"}, "magenta", "h"),
    "GFWSVD": ({"method": "gfwsvd"}, "grey", "s"),
    "two-sided": ({"method": "kfac"}, "sky", "^"),
    "two-sided, AIR's sweep, δ = 0.5": ({"method": "kfac-air", "delta": 0.5}, "purple", "v"),
    "AA-SVD": ({"method": "svdllm", "anchor": 1.0}, "blue", "<"),
    "AIR, δ = 2, anchored": ({"method": "air", "delta": 2.0, "anchor": SHARE}, "red", "s"),
    "SVD-LLM(W), measured ranks": ({"method": "svdllm", "ranks": "auto"}, "blue", "*"),
    "two-sided, measured ranks": ({"method": "kfac", "ranks": "auto"}, "green", "P"),
    "two-sided, anchored, measured ranks": (
        {"method": "kfac", "anchor": SHARE, "ranks": "auto"}, "olive", "X"),
    "SVD-LLM(W), mixed ranks": ({"method": "svdllm", "ranks": "mixed"}, "blue", "P"),
    "AIR, δ = 2, mixed ranks": (
        {"method": "air", "delta": 2.0, "ranks": "mixed"}, "red", "X"),
    "AIR, δ = 2, anchored, mixed ranks": (
        {"method": "air", "delta": 2.0, "anchor": SHARE, "ranks": "mixed"}, "red", "*"),
    "two-sided, anchored, mixed ranks": (
        {"method": "kfac", "anchor": SHARE, "ranks": "mixed"}, "black", "*"),
}
FAR = 100           # what is so many times above the dense model is not in the picture
# In the notebook's table alone.
BESIDE = ("GFWSVD", "two-sided", "two-sided, AIR's sweep, δ = 0.5", "AIR, δ = 2, anchored",
          "SVD-LLM(W), measured ranks", "two-sided, anchored, measured ranks",
          "SVD-LLM(W), mixed ranks", "AIR, δ = 2, mixed ranks")
README_FORMS = [name for name in FORMS if name not in BESIDE]


def setting_of(name, rate):
    return FORMS[name][0] | {"rate": rate, "ridge": None, "variant": name}


def ppl(result, name, rate):
    """One figure a seed; None where it was not measured."""
    for row in result["rows"]:
        if row["variant"] == name and row["rate"] == rate:
            return row["ppl"]["text"]
    return None


def cells(result, name, rate):
    """Perplexity, and what it is against SVD-LLM(W)'s over the same seeds."""
    found = ppl(result, name, rate)
    base = ppl(result, "SVD-LLM(W)", rate)
    if found is None or base is None:
        return ["–", ""]
    if name == "SVD-LLM(W)":
        return [show(found), ""]
    # What was measured at the first seeds alone is compared there; SVD sees no text.
    n = min(len(found), len(base))
    gap = compare(found, base) if name == "SVD" else compare(found[:n], base[:n])
    return [show(found), "far above" if gap[0] >= 1000 else percent(gap)]


def markdown(result):
    """A pair of columns a rate."""
    lines = [["dense", f"{result['dense']:.2f}", *[""] * (2 * len(RATES) - 1)]]
    for name in FORMS:
        pairs = [cells(result, name, rate) for rate in RATES]
        if any(shown != "–" for shown, _ in pairs):
            lines.append([name, *(each for pair in pairs for each in pair)])
    heads = [head for rate in RATES for head in (f"{rate:g}", "against SVD-LLM(W)")]
    return table(["", *heads], lines)


def side_by_side(results):
    """The README's table: the closed forms on all models, as far as they were measured."""
    lines = []
    for model in ("smollm2", "demo", "demo-muon"):
        path = results / f"closed-{model}.json"
        if not path.exists():
            continue
        result = json.loads(path.read_text("utf-8"))
        for rate in RATES:
            found = [cells(result, name, rate)[0] for name in README_FORMS]
            if set(found) != {"–"}:
                dense = f"{result['dense']:.2f}"
                lines.append([report.MODELS[model], f"{rate:g}", dense, *found])
    return report.table(["", "kept", "dense", *README_FORMS], lines)


def verdicts(result):
    """None: these are no claims of the paper."""
    return []


def picture(plt, result):
    """Perplexity against rate of the README's forms, within FAR times the dense model's."""
    figure, ax = plt.subplots(figsize=(8.5, 4), layout="constrained")
    for name in README_FORMS:
        _, colour, marker = FORMS[name]
        found = {rate: mean_spread(ppl(result, name, rate)) for rate in RATES
                 if ppl(result, name, rate)}
        near = {rate: point for rate, point in found.items()
                if point[0] < FAR * result["dense"]}
        if near:
            drawn(ax, list(near), list(near.values()), colour, marker=marker, label=name,
                  linewidth=1)
    ax.axhline(result["dense"], color="black", linewidth=1, linestyle=":", label="dense")
    ax.set(xlabel="rate: fraction of the parameters kept", yscale="log", xticks=RATES,
           ylabel="perplexity a token (log scale)",
           title=report.MODELS.get(result["checkpoint"], result["checkpoint"]))
    ax.invert_xaxis()
    figure.legend(loc="outside right upper", fontsize=8)
    return figure


def main():
    lab = Lab("closed", setup_of(__doc__))
    rows = lab.measure([setting_of(name, rate) for name in FORMS for rate in RATES])
    result = {"dense": lab.dense("text"), "rows": rows}
    lab.finish(sys.modules[__name__], result, picture)
    if lab.results.resolve() == report.RESULTS:
        report.refresh("models", side_by_side(lab.results))


if __name__ == "__main__":
    run(main)
