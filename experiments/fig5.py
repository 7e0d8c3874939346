"""Figure 5 of the paper: perplexity against the number of calibration windows, SVD-LLM(W) and AIR, and where they cross.

    python experiments/fig5.py                        # the demo; continues where it stopped

From 1/16 of the checkpoint's default number of windows to twice that (demo: 4 … 128). With the same seed a smaller calibration
set is the beginning of a larger one. Writes experiments/results/fig5-NAME.json and, with matplotlib, fig5-NAME.png.
"""
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from experiments.common import COLOURS, Lab, against, arguments, every, find, listed, mean_spread, show, table, verdict
from support.script import InputError, run

RATE, SHARES = 0.6, (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1, 2)
CALIBRATED = "the numbers of windows above, of the same text"


def counts(result):
    return sorted({row["samples"] for row in result["rows"]})


def crossing(result):
    """How many windows AIR needs for SVD-LLM(W)'s mean perplexity at the most windows; log-linear between counts.

    None when even the most do not reach it; (n, True) when the fewest already do.
    """
    ns = counts(result)
    goal = mean_spread(find(result["rows"], method="svdllm", samples=ns[-1])["ppl"]["text"])[0]
    ppl = [mean_spread(find(result["rows"], method="air", samples=n)["ppl"]["text"])[0] for n in ns]
    if ppl[0] <= goal:
        return ns[0], True
    for (n, a), (more, b) in zip(zip(ns, ppl), zip(ns[1:], ppl[1:])):
        if b <= goal:
            return math.exp(math.log(n) + (a - goal) / (a - b) * math.log(more / n)), False
    return None


def markdown(result):
    """Perplexity at every number of windows. The paper's figure prints no numbers."""
    ns = counts(result)
    rows = [[name, *(show(find(result["rows"], method=method, samples=n)["ppl"]["text"]) for n in ns)]
            for method, name in (("svdllm", "SVD-LLM(W)"), ("air", "AIR"))]
    return table(["calibration windows", *ns], rows)


def verdicts(result):
    """The claims of Section 4.3 about data efficiency."""
    ns, (n, fewest) = counts(result), crossing(result) or (None, False)
    saved = 0 if n is None else 100 * (1 - n / ns[-1])
    gaps = against(result["rows"], "samples", ns, {"method": "air"}, {"method": "svdllm"})
    below = next((n for i, n in enumerate(ns) if every(gaps[i:], "lower")), None)
    return [
        verdict(f"AIR matches SVD-LLM(W)'s quality at {ns[-1]} windows with about 90 % less calibration data (here: from 80 %).",
                saved >= 80, f"AIR does not reach SVD-LLM(W)'s perplexity at {ns[-1]} windows." if n is None else
                f"AIR reaches SVD-LLM(W)'s perplexity at {ns[-1]} windows with {'at most' if fewest else 'about'} {n:.0f}, "
                f"{saved:.0f} % less.", "where both curves still fall steeply with the windows, a gap of a few percent is worth "
                "few of them. To tell: the same figure at a rate where the gap is larger, and with more windows."),
        verdict("The gap between AIR and SVD-LLM(W) persists as windows are added.", every(gaps[-3:], "lower"),
                (f"AIR is below from {below} windows on" if below else "AIR is not below at the most windows")
                + f"; AIR against SVD-LLM(W), {listed(ns, gaps)}.",
                "the gap at this rate may be small beside its spread. To tell: more seeds.")]


def picture(plt, result):
    """Both curves with their spread, SVD-LLM(W)'s level at the most windows, and where AIR crosses it."""
    ns = counts(result)
    fig, ax = plt.subplots(figsize=(6.5, 4.2), layout="constrained")
    for method, name, colour, mark in (("svdllm", "SVD-LLM(W)", "blue", "o"), ("air", "AIR", "red", "D")):
        means, spreads = zip(*(mean_spread(find(result["rows"], method=method, samples=n)["ppl"]["text"]) for n in ns))
        ax.errorbar(ns, means, [spread or 0 for spread in spreads], color=COLOURS[colour], marker=mark, capsize=3, label=name)
        if method == "svdllm":
            ax.axhline(means[-1], color=COLOURS["grey"], linestyle="--", label=f"SVD-LLM(W) at {ns[-1]} windows")
    if (cross := crossing(result)) and not cross[1]:
        ax.axvline(cross[0], color="black", linestyle=":", label=f"AIR reaches that with {cross[0]:.0f}")
    ax.set(xlabel=f"calibration windows of {result['calibration']['seqlen']} tokens (log scale)", xscale="log", yscale="log",
           ylabel="perplexity a token (log scale)", title=f"Figure 5: {result['checkpoint']}, rate {RATE:g}")
    ax.set_xticks(ns, map(str, ns))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter("{x:g}")
    ax.xaxis.minorticks_off()
    ax.grid(True, which="both", axis="y", alpha=0.3)
    fig.legend(loc="outside lower center", ncols=2, fontsize=9)
    return fig


def main():
    lab, rows = Lab("fig5", **vars(arguments(__doc__).parse_args())), []
    if len(ns := sorted({round(lab.samples * share) for share in SHARES} - {0})) < 2:
        raise InputError(f"{lab.samples} calibration windows cannot be halved; expected --samples of 2 or more")
    for n in ns:
        rows += lab.measure([{"method": method, "rate": RATE, "samples": n} for method in ("svdllm", "air")])
        # Only this figure reads the statistics of another number of windows.
        for seed in lab.seeds if n != lab.samples else ():
            lab.forget(lab.calibration(seed, samples=n))
    lab.finish(sys.modules[__name__], {"rows": rows}, picture)


if __name__ == "__main__":
    run(main)
