"""Figure 5 of the paper: perplexity against the number of calibration windows,
SVD-LLM(W) and AIR, and where they cross.

    python experiments/fig5.py                    # the demo; continues where it stopped

From 1/16 of the checkpoint's default number of windows to twice that (demo: 4 … 128).
With the same seed a smaller calibration set is the beginning of a larger one. Writes
experiments/results/fig5-NAME.json and, with matplotlib, fig5-NAME.png.
"""
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from experiments.common import Lab, setup_of
from experiments.report import (COLOURS, against, drawn, every, find, listed,
                                mean_spread, show, table, verdict)
from support.script import InputError, run

RATE = 0.6
SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1, 2)
CALIBRATED = "the numbers of windows above, of the same text"
FAR = 4             # times SVD-LLM(W)'s largest: what is above is beyond the picture
NAMES = {"svdllm": "SVD-LLM(W)", "air": "AIR"}


def counts(result):
    return sorted({row["samples"] for row in result["rows"]})


def curve(result, method):
    """[perplexity at every seed], at every number of windows."""
    rows = [find(result["rows"], method=method, samples=n) for n in counts(result)]
    return [row["ppl"]["text"] for row in rows]


def crossing(result):
    """How many windows AIR needs for SVD-LLM(W)'s mean perplexity at the most windows.

    Log-linear between counts. None when even the most do not reach it; (n, True) when
    the fewest already do.
    """
    ns = counts(result)
    goal, _ = mean_spread(curve(result, "svdllm")[-1])
    ppl = [mean_spread(values)[0] for values in curve(result, "air")]
    if ppl[0] <= goal:
        return ns[0], True
    for i in range(1, len(ns)):
        if ppl[i] <= goal:
            way = (ppl[i - 1] - goal) / (ppl[i - 1] - ppl[i])
            step = math.log(ns[i] / ns[i - 1])
            return math.exp(math.log(ns[i - 1]) + way * step), False
    return None


def markdown(result):
    """Perplexity at every number of windows. The paper's figure prints no numbers."""
    lines = [[name, *map(show, curve(result, method))] for method, name in NAMES.items()]
    return table(["calibration windows", *counts(result)], lines)


def saves_data(result):
    most = counts(result)[-1]
    cross = crossing(result)
    goal = curve(result, "svdllm")[-1]
    decided = len(goal) > 1 and None not in goal
    if None in goal:
        saved = 0
        measured = f"SVD-LLM(W) was not measured at {most} windows."
    elif cross is None:
        saved = 0
        measured = f"AIR does not reach SVD-LLM(W)'s perplexity at {most} windows."
    else:
        n, fewest = cross
        saved = 100 * (1 - n / most)
        measured = (f"AIR reaches SVD-LLM(W)'s perplexity at {most} windows with "
                    f"{'at most' if fewest else 'about'} {n:.0f} windows, {saved:.0f} % fewer.")
    return verdict(
        "AIR matches SVD-LLM(W)'s quality at the most windows with about 90 % less "
        "calibration data (here: from 80 %).",
        saved >= 80 if decided else None,
        measured,
        "where both curves still fall steeply with the windows, a gap of a few percent "
        "is worth few of them. To tell: the same figure at a rate where the gap is "
        "larger, and with more windows.")


def gap_persists(result):
    ns = counts(result)
    gaps = against(result["rows"], "samples", ns, {"method": "air"}, {"method": "svdllm"})
    below = next((n for i, n in enumerate(ns) if every(gaps[i:], "lower")), None)
    said = "AIR is not below at the most windows"
    if below:
        said = f"AIR is below from {below} windows on"
    return verdict(
        "The gap between AIR and SVD-LLM(W) persists as windows are added.",
        every(gaps[-3:], "lower"),
        f"{said}; AIR against SVD-LLM(W), {listed(ns, gaps)}.",
        "the gap at this rate may be small beside its spread. To tell: more seeds.")


def verdicts(result):
    """The claims of Section 4.3 about data efficiency."""
    return [saves_data(result), gap_persists(result)]


def picture(plt, result):
    """Both curves, SVD-LLM(W)'s level at the most windows, and where AIR crosses it."""
    ns = counts(result)
    cross = crossing(result)
    fig, ax = plt.subplots(figsize=(6.5, 4.2), layout="constrained")
    svdllm, air = ([mean_spread(values) for values in curve(result, method)]
                   for method in NAMES)
    drawn(ax, ns, svdllm, "blue", marker="o", label=NAMES["svdllm"])
    ax.axhline(svdllm[-1][0], color=COLOURS["grey"], linestyle="--",
               label=f"SVD-LLM(W) at {ns[-1]} windows")
    drawn(ax, ns, air, "red", marker="D", label=NAMES["air"])
    if cross and not cross[1]:
        ax.axvline(cross[0], color="black", linestyle=":",
                   label=f"AIR reaches that with {cross[0]:.0f}")
    seqlen = result["calibration"]["seqlen"]
    ax.set(xlabel=f"calibration windows of {seqlen} tokens (log scale)", xscale="log",
           ylabel="perplexity a token (log scale)", yscale="log",
           title=f"Figure 5: {result['checkpoint']}, rate {RATE:g}")
    ax.set_xticks(ns, map(str, ns))
    ax.xaxis.minorticks_off()
    # What is far above the other method is named, not drawn.
    top = FAR * max(mean for mean, _ in svdllm)
    for n, (mean, _) in zip(ns, air):
        if mean > top:
            ax.set_ylim(top=top)
            ax.annotate(f"AIR\n{mean:,.0f} ↑", (n, top), (-18, -26), fontsize=9,
                        textcoords="offset points")
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter("{x:g}")
    ax.grid(True, which="both", axis="y", alpha=0.3)
    fig.legend(loc="outside lower center", ncols=2, fontsize=9)
    return fig


def main():
    lab = Lab("fig5", setup_of(__doc__))
    ns = sorted({round(lab.samples * share) for share in SHARES} - {0})
    if len(ns) < 2:
        raise InputError(f"{lab.samples} calibration windows cannot be halved; "
                         "expected --samples of 2 or more")
    rows = []
    for n in ns:
        rows += lab.measure([{"method": method, "rate": RATE, "samples": n}
                             for method in NAMES])
        if n == lab.samples:
            continue
        # Only this figure reads the statistics of another number of windows.
        for seed in lab.seeds:
            lab.forget(lab.calibration(seed, samples=n))
    lab.finish(sys.modules[__name__], {"rows": rows}, picture)


if __name__ == "__main__":
    run(main)
