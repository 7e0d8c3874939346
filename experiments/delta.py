"""Where is AIR below SVD-LLM(W)? δ against calibration tokens an input, at three ridges.

    python experiments/delta.py                   # the demo; continues where it stopped

Both methods have the same statistics and the same ridge, a share of ΣXXᵀ's own diagonal
(0: the paper's; default: air.py's). Writes experiments/results/delta-NAME.json and .png.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from experiments.common import Lab, setup_of
from experiments.report import compare, find, percent, table
from experiments.ridge import held, samples_at, widest
from support.script import run

TOKENS = (0.5, 2, 16, 64)               # for each of the widest inputs
DELTAS = (0.25, 0.5, 1.0, 2.0)
RIDGES = (0.0, 0.03, None)              # None: air.py's default
RATE = 0.6
CALIBRATED = "as many windows as a row says"


def ridge_name(ridge):
    return "default" if ridge is None else f"{ridge:g}"


def gap(result, tokens, ridge, delta):
    """AIR's perplexity against SVD-LLM(W)'s, in %: (mean, spread, word)."""
    same = {"tokens": tokens, "ridge": ridge}
    air = find(result["rows"], method="air", delta=delta, **same)["ppl"]["text"]
    base = find(result["rows"], method="svdllm", **same)["ppl"]["text"]
    return compare(air, base)


def markdown(result):
    lines = []
    for ridge in RIDGES:
        for tokens in TOKENS:
            gaps = [percent(gap(result, tokens, ridge, delta)) for delta in DELTAS]
            lines.append([ridge_name(ridge), held(result, tokens), *gaps])
    heads = [f"δ = {delta:g}" for delta in DELTAS]
    return table(["ridge", "tokens an input", *heads], lines, left=2)


def verdicts(result):
    """None: these are no claims of the paper."""
    return []


def picture(plt, result):
    """A heat map a ridge: blue where AIR is below."""
    figure, axes = plt.subplots(1, len(RIDGES), figsize=(9, 3.6), sharey=True,
                                layout="constrained")
    for ax, ridge in zip(axes, RIDGES):
        values = [[gap(result, tokens, ridge, delta)[0] for tokens in TOKENS]
                  for delta in DELTAS]
        image = ax.imshow(values, cmap="RdBu_r", vmin=-15, vmax=15, aspect="auto")
        for y, row in enumerate(values):
            for x, value in enumerate(row):
                said = f"{value:+.1f}" if value < 1000 else f"{1 + value / 100:,.0f} ×"
                ax.text(x, y, said, ha="center", va="center", fontsize=8,
                        color="black" if abs(value) < 10 else "white")
        ax.set(xticks=range(len(TOKENS)), xticklabels=[held(result, each) for each in TOKENS],
               xlabel="calibration tokens an input", title=f"ridge {ridge_name(ridge)}")
        ax.grid(False)
    axes[0].set(yticks=range(len(DELTAS)), yticklabels=[f"{each:g}" for each in DELTAS],
                ylabel="δ")
    figure.colorbar(image, ax=axes, label="AIR against SVD-LLM(W), %")
    figure.suptitle(f"{result['checkpoint']}, rate {RATE:g}")
    return figure


def main():
    lab = Lab("delta", setup_of(__doc__))
    settings = []
    for tokens in TOKENS:
        for ridge in RIDGES:
            here = {"rate": RATE, "tokens": tokens, "ridge": ridge,
                    "samples": samples_at(lab, tokens)}
            settings.append(here | {"method": "svdllm"})
            settings += [here | {"method": "air", "delta": delta} for delta in DELTAS]
    found = {"widest": widest(lab), "rows": lab.measure(settings)}
    lab.finish(sys.modules[__name__], found, picture)


if __name__ == "__main__":
    run(main)
