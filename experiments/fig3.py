"""Figure 3 of the paper: perplexity against the influence weighting strength δ of Eq.
4, from 0 (SVD-LLM(W)) to 100.

    python experiments/fig3.py                    # the demo; continues where it stopped

Writes experiments/results/fig3-NAME.json and, with matplotlib, fig3-NAME.png.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from experiments.common import Lab, setup_of
from experiments.report import (COLOURS, compare, drawn, every, find, mean_spread,
                                percent, show, table, verdict)
from support.script import run

DELTAS = (0.0, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 100.0)
RATES = (0.6, 0.4)


def curve(result, rate):
    """{δ: perplexity at every seed}."""
    rows = [find(result["rows"], rate=rate, delta=delta) for delta in DELTAS]
    return {row["delta"]: row["ppl"]["text"] for row in rows}


def markdown(result):
    """Perplexity at every δ. The paper prints no numbers; its optimum is at δ = 2."""
    lines = []
    for rate in RATES:
        ppl = curve(result, rate)
        lines.append([f"rate {rate:g}", *(show(values) for values in ppl.values())])
    return table(["δ", *(f"{delta:g}" for delta in DELTAS)], lines)


def optimum(rate, ppl):
    best = min(DELTAS, key=lambda delta: mean_spread(ppl[delta])[0])
    gap = compare(ppl[2.0], ppl[best])
    alike = [f"{delta:g}" for delta in DELTAS
             if delta == best or compare(ppl[delta], ppl[best])[2] == "no difference"]
    return verdict(
        f"δ = 2 is the optimum (rate {rate:g}).",
        every([gap], "no difference"),          # so is δ = 2 against itself
        f"lowest at δ = {best:g}, against which δ = 2 is {percent(gap)}; no different "
        f"from the lowest: {', '.join(alike)}.",
        "the best δ depends on how concentrated influence is and how many ranks there "
        "are to move error between. To tell: the same curve at more rates, and with the "
        "scaling max100.")


def rises(rate, ppl):
    large = compare(ppl[100.0], ppl[2.0])
    return verdict(
        f"Perplexity rises at large δ (rate {rate:g}).",
        every([large], "higher"),
        f"δ = 100 against δ = 2: {percent(large)}.",
        "one sweep from SVD-LLM(W)'s solution stays near it whatever δ is. "
        "To tell: δ = 100 with 10 sweeps.")


def verdicts(result):
    """The claims of Section 4.2 about δ."""
    made = []
    for rate in RATES:
        ppl = curve(result, rate)
        made += [optimum(rate, ppl), rises(rate, ppl)]
    return made


def picture(plt, result):
    """Paired differences to δ = 0, since the rates have different levels."""
    fig, ax = plt.subplots(figsize=(6.5, 4.2), layout="constrained")
    looks = (("blue", "o", -0.04), ("red", "D", 0.04))
    for rate, (colour, marker, shift) in zip(RATES, looks):
        ppl = curve(result, rate)
        points = [compare(values, ppl[0.0])[:2] for values in ppl.values()]
        drawn(ax, [i + shift for i in range(len(DELTAS))], points, colour, marker=marker,
              label=f"rate {rate:g} (perplexity {show(ppl[0.0])} at δ = 0)")
    ax.axvline(DELTAS.index(2.0), color="black", linestyle=":", label="the paper's δ = 2")
    ax.axhline(0, color=COLOURS["grey"], linewidth=0.8)
    ax.set_xticks(range(len(DELTAS)), [f"{delta:g}" for delta in DELTAS])
    ax.set(xlabel="influence weighting strength δ (0: SVD-LLM(W))",
           ylabel="perplexity against δ = 0, %",
           title=f"Figure 3: {result['checkpoint']}, {result['texts']['text']['name']}")
    fig.legend(loc="outside lower center", ncols=2, fontsize=9)
    return fig


def main():
    lab = Lab("fig3", setup_of(__doc__))
    settings = [{"method": "air", "rate": rate, "delta": delta}
                for rate in RATES for delta in DELTAS]
    lab.finish(sys.modules[__name__], {"rows": lab.measure(settings)}, picture)


if __name__ == "__main__":
    run(main)
