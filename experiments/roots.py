"""The ridge, and the root: what is added to ΣXXᵀ's diagonal, and which S with S Sᵀ = ΣXXᵀ.

    python experiments/roots.py                   # the demo; continues where it stopped

Nothing, shares of each input's own energy, or a share of all inputs' mean energy is added.
S is Cholesky's triangle, the paper's, or the symmetric root, which keeps column j of WS
closest to input j; SVD-LLM(W) is the same for both. Writes
experiments/results/roots-NAME.json and .png.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch

from air import METHODS, Method, air, normalise, profile, square_root, svdllm
from experiments.common import Lab, setup_of
from experiments.report import COLOURS, compare, find, percent, show, table
from support.script import run

RATE = 0.6
DELTAS = (0.5, 2.0)
SHARE = 0.03
# {name: (air.py's --ridge, is it a share of the mean energy?)}
RIDGES = {
    "none, the paper's": (0.0, False),
    "3 % of each input's own": (SHARE, False),
    "air.py's default": (None, False),
    "3 % of the mean": (0.0, True),
}


# ------------------------------------------------------------ variants
def factor(x, mean):
    """S (n, n) of a Layer, with its ridge; `mean`: with a share of the mean energy."""
    if not mean:
        return x.S
    gram = x.inputs.gram.double().clone()
    gram.diagonal().add_(SHARE * gram.diagonal().mean())
    return profile(gram)[0]


def symmetric(W, S, I, k, delta):
    """AIR with the symmetric root of S Sᵀ; V is multiplied by its inverse here, since air
    expects a triangle."""
    root, inverse = square_root(S)
    one = torch.eye(len(S), dtype=S.dtype, device=S.device)
    U, V, losses = air((W.double() @ root).to(W.dtype), one, I, k, delta)
    return U, (V.double() @ inverse).to(V.dtype), losses


def variants(mean):
    """{name: Method} of both roots, and of SVD-LLM(W)."""
    named = " of the mean" if mean else ""
    return {
        "triangle" + named: Method(
            lambda x, o: air(x.W, factor(x, mean), normalise(x.influence("lrp")), x.k, o.delta),
            "influence"),
        "symmetric" + named: Method(
            lambda x, o: symmetric(x.W, factor(x, mean), normalise(x.influence("lrp")), x.k,
                                   o.delta),
            "influence"),
        "start" + named: Method(lambda x, o: svdllm(x.W, factor(x, mean), x.k), "inputs"),
    }


METHODS.update(variants(False) | variants(True))


# ------------------------------------------------------------ settings and tables
def setting_of(name, form, delta=2.0):
    ridge, mean = RIDGES[name]
    method = form + (" of the mean" if mean else "")
    return {"method": method, "rate": RATE, "ridge": ridge, "delta": delta, "variant": name}


def ppl(result, name, form, delta=2.0):
    return find(result["rows"], **setting_of(name, form, delta))["ppl"]["text"]


def markdown(result):
    """A row a ridge: SVD-LLM(W), then AIR and its distance from that, by root and δ."""
    lines = []
    for name in RIDGES:
        base = ppl(result, name, "start")
        line = [name, show(base)]
        for delta in DELTAS:
            for form in ("triangle", "symmetric"):
                found = ppl(result, name, form, delta)
                line.append(f"{show(found)} ({percent(compare(found, base))})")
        lines.append(line)
    heads = [f"AIR, δ = {delta:g}, {root}"
             for delta in DELTAS for root in ("Cholesky", "symmetric")]
    return table(["ridge", "SVD-LLM(W)", *heads], lines)


def verdicts(result):
    """None: these are no claims of the paper."""
    return []


def picture(plt, result):
    """AIR against SVD-LLM(W) of the same ridge: a bar a ridge, root and δ."""
    figure, ax = plt.subplots(figsize=(7.5, 4), layout="constrained")
    ways = [(delta, form) for delta in DELTAS for form in ("triangle", "symmetric")]
    for i, ((delta, form), colour) in enumerate(zip(ways, ("sky", "blue", "orange", "red"))):
        gaps = [compare(ppl(result, name, form, delta), ppl(result, name, "start"))
                for name in RIDGES]
        means, spreads, _ = zip(*gaps)
        root = "Cholesky" if form == "triangle" else form
        ax.bar([x + 0.2 * i for x in range(len(RIDGES))], means, 0.2,
               yerr=[each or 0 for each in spreads], color=COLOURS[colour],
               label=f"δ = {delta:g}, {root}")
    ax.axhline(0, color="black", linewidth=1)
    ax.set_xticks([x + 0.3 for x in range(len(RIDGES))], RIDGES)
    ax.set(ylabel="AIR against SVD-LLM(W), %", xlabel="what is added to ΣXXᵀ's diagonal",
           title=f"{result['checkpoint']}, rate {RATE:g}")
    figure.legend(loc="outside lower center", ncols=4, fontsize=9)
    return figure


def main():
    lab = Lab("roots", setup_of(__doc__))
    settings = []
    for name in RIDGES:
        settings.append(setting_of(name, "start"))
        settings += [setting_of(name, form, delta)
                     for delta in DELTAS for form in ("triangle", "symmetric")]
    lab.finish(sys.modules[__name__], {"rows": lab.measure(settings)}, picture)


if __name__ == "__main__":
    run(main)
