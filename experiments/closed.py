"""All closed forms side by side, at three rates: the paper's, and beyond it the error in
two metrics (`--method kfac`, `gfwsvd`), AIR's sweep on top (`kfac-air`), measured ranks
(`--ranks auto`).

    python experiments/closed.py                  # the demo; continues where it stopped
    python experiments/closed.py --ckpt data/smollm2 --calib data/odd.raw \\
        --text data/even.raw --samples 16 --seqlen 1024 --windows 10

All with air.py's default ridge. Writes experiments/results/closed-NAME.json.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from experiments.common import Lab, setup_of
from experiments.report import compare, drawn, find, mean_spread, percent, show, table
from support.script import run

RATES = (0.8, 0.6, 0.4)
# {name: (setting, colour, marker)}
FORMS = {
    "SVD": ({"method": "svd"}, "black", "x"),
    "ASVD": ({"method": "asvd"}, "brown", "<"),
    "FWSVD": ({"method": "fwsvd"}, "grey", ">"),
    "SVD-LLM(W)": ({"method": "svdllm"}, "blue", "o"),
    "AIR, δ = 2": ({"method": "air", "delta": 2.0}, "red", "D"),
    "AIR, δ = 0.5": ({"method": "air", "delta": 0.5}, "orange", "d"),
    "GFWSVD": ({"method": "gfwsvd"}, "grey", "s"),
    "two-sided": ({"method": "kfac"}, "sky", "^"),
    "two-sided, AIR's sweep, δ = 0.5": ({"method": "kfac-air", "delta": 0.5}, "purple", "v"),
    "SVD-LLM(W), measured ranks": ({"method": "svdllm", "ranks": "auto"}, "blue", "*"),
    "two-sided, measured ranks": ({"method": "kfac", "ranks": "auto"}, "green", "P"),
    "two-sided, AIR's sweep, measured ranks": (
        {"method": "kfac-air", "delta": 0.5, "ranks": "auto"}, "olive", "X"),
}


def setting_of(name, rate):
    return FORMS[name][0] | {"rate": rate, "ridge": None, "variant": name}


def ppl(result, name, rate):
    return find(result["rows"], variant=name, rate=rate)["ppl"]["text"]


def markdown(result):
    """Perplexity, and what it is against SVD-LLM(W)'s, a pair of columns a rate."""
    lines = [["dense", f"{result['dense']:.2f}", *[""] * (2 * len(RATES) - 1)]]
    for name in FORMS:
        line = [name]
        for rate in RATES:
            base = ppl(result, "SVD-LLM(W)", rate)
            line.append(show(ppl(result, name, rate)))
            gap = percent(compare(ppl(result, name, rate), base))
            line.append("" if name == "SVD-LLM(W)" else gap)
        lines.append(line)
    heads = [head for rate in RATES for head in (f"{rate:g}", "against SVD-LLM(W)")]
    return table(["", *heads], lines)


def verdicts(result):
    """None: these are no claims of the paper."""
    return []


def picture(plt, result):
    """Perplexity against rate."""
    figure, ax = plt.subplots(figsize=(7, 4.5))
    for name, (_, colour, marker) in FORMS.items():
        points = [mean_spread(ppl(result, name, rate)) for rate in RATES]
        drawn(ax, RATES, points, colour, marker=marker, label=name, linewidth=1)
    ax.axhline(result["dense"], color="black", linewidth=1, linestyle=":", label="dense")
    ax.set(xlabel="rate: fraction of the parameters kept", ylabel="perplexity",
           yscale="log", title=result["checkpoint"])
    ax.legend(fontsize=8)
    figure.tight_layout()
    return figure


def main():
    lab = Lab("closed", setup_of(__doc__))
    rows = lab.measure([setting_of(name, rate) for name in FORMS for rate in RATES])
    lab.finish(sys.modules[__name__], {"dense": lab.dense("text"), "rows": rows}, picture)


if __name__ == "__main__":
    run(main)
