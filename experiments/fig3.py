"""Figure 3 of the paper: perplexity against the influence weighting strength δ of Eq. 4, from 0 (SVD-LLM(W)) to 100.

    python experiments/fig3.py                        # the demo; continues where it stopped

Writes experiments/results/fig3-NAME.json and, with matplotlib, fig3-NAME.png.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from experiments.common import COLOURS, Lab, arguments, compare, every, find, mean_spread, percent, show, table, verdict
from support.script import run

DELTAS, RATES = (0.0, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 100.0), (0.6, 0.4)


def markdown(result):
    """Perplexity at every δ. The paper's figure prints no numbers; its optimum is at δ = 2."""
    rows = [[f"rate {rate:g}", *(show(find(result["rows"], rate=rate, delta=delta)["ppl"]["text"]) for delta in DELTAS)]
            for rate in RATES]
    return table(["δ", *(f"{delta:g}" for delta in DELTAS)], rows)


def verdicts(result):
    """The claims of Section 4.2 about δ."""
    made = []
    for rate in RATES:
        ppl = {delta: find(result["rows"], rate=rate, delta=delta)["ppl"]["text"] for delta in DELTAS}
        best = min(DELTAS, key=lambda delta: mean_spread(ppl[delta])[0])
        alike = [delta for delta in DELTAS if delta == best or compare(ppl[delta], ppl[best])[2] == "no difference"]
        gap, large = compare(ppl[2.0], ppl[best]), compare(ppl[100.0], ppl[2.0])
        made.append(verdict(
            f"δ = 2 is the optimum (rate {rate:g}).", True if best == 2 else every([gap], "no difference"),
            f"lowest at δ = {best:g}, against which δ = 2 is {percent(gap)}; no different from the lowest: "
            f"{', '.join(f'{delta:g}' for delta in alike)}.",
            "the best δ depends on how concentrated influence is and how many ranks there are to move error between. To tell: "
            "the same curve at more rates, and with the scaling max100."))
        made.append(verdict(
            f"Perplexity rises at large δ (rate {rate:g}).", every([large], "higher"),
            f"δ = 100 against δ = 2: {percent(large)}.",
            "one sweep from SVD-LLM(W)'s solution stays near it whatever δ is. To tell: δ = 100 with 10 sweeps."))
    return made


def picture(plt, result):
    """Perplexity relative to δ = 0, since the rates have different levels: mean and spread of the paired differences."""
    fig, ax = plt.subplots(figsize=(6.5, 4.2), layout="constrained")
    for rate, colour, mark, shift in zip(RATES, ("blue", "red"), "oD", (-0.04, 0.04)):
        ppl = [find(result["rows"], rate=rate, delta=delta)["ppl"]["text"] for delta in DELTAS]
        means, spreads, _ = zip(*(compare(each, ppl[0]) for each in ppl))
        ax.errorbar([i + shift for i in range(len(DELTAS))], means, [spread or 0 for spread in spreads], color=COLOURS[colour],
                    marker=mark, capsize=3, label=f"rate {rate:g} (perplexity {show(ppl[0])} at δ = 0)")
    ax.axvline(DELTAS.index(2.0), color="black", linestyle=":", label="the paper's δ = 2")
    ax.axhline(0, color=COLOURS["grey"], linewidth=0.8)
    ax.set_xticks(range(len(DELTAS)), [f"{delta:g}" for delta in DELTAS])
    ax.set(xlabel="influence weighting strength δ (0: SVD-LLM(W))", ylabel="perplexity against δ = 0, %",
           title=f"Figure 3: {result['checkpoint']}, {result['texts']['text']['name']}")
    fig.legend(loc="outside lower center", ncols=2, fontsize=9)
    return fig


def main():
    lab = Lab("fig3", **vars(arguments(__doc__).parse_args()))
    settings = [{"method": "air", "rate": rate, "delta": delta} for rate in RATES for delta in DELTAS]
    lab.finish(sys.modules[__name__], {"rows": lab.measure(settings)}, picture)


if __name__ == "__main__":
    run(main)
