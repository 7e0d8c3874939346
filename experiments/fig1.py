"""Figure 1's inset: L_act and L_act,infl along the sweep of one layer, after every rank
update, relative to their start.

    python experiments/fig1.py   # the demo: q_proj of block 3; --layer NAME for another

The verdicts look at all seven layers of that block. In fp64, so that a rise of
L_act,infl could not hide in rounding. Writes experiments/results/fig1-NAME.json and,
with matplotlib, fig1-NAME.png.
"""
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch

from air import als_sweep, normalise, objective, profile, rank_at, truncated_svd
from experiments.common import Lab, Setup, arguments
from experiments.report import COLOURS, table, verdict
from model import LAYERS, READS
from support.script import InputError, run
from support.texts import digest

RATE = 0.6
DELTA = 2.0
POINTS = 128                # of a curve, about


def curves(W, S, I, k):
    """Both losses before the sweep and after every update, in fp64, over their start.

    Of a large layer after every k/128. "rise" is the largest change of L_act,infl
    between two points, upward positive, relative to its start.
    """
    Wp = W @ S
    P = 1 + DELTA * I
    U, sigma, Vh = truncated_svd(Wp, k)
    act = [objective(Wp, torch.ones_like(P), U, sigma, Vh)]
    infl = [objective(Wp, P, U, sigma, Vh)]
    updates = [0]
    step = max(1, k // POINTS)
    for top in range(k, 0, -step):
        # The ranks top-1 … bottom of one backward sweep, then both losses as it stands.
        bottom = max(0, top - step)
        U, sigma, Vh = als_sweep(Wp, P, U, sigma, Vh, range(top - 1, bottom - 1, -1))
        act.append(objective(Wp, torch.ones_like(P), U, sigma, Vh))
        infl.append(objective(Wp, P, U, sigma, Vh))
        updates.append(k - bottom)
    act = [x / act[0] for x in act]
    infl = [x / infl[0] for x in infl]
    return {
        "rank": k,
        "updates": updates,
        "act": [round(x, 6) for x in act],
        "infl": [round(x, 6) for x in infl],
        "rise": max(b - a for a, b in zip(infl, infl[1:])),
    }


def measure(lab, windows, l):
    """{layer: curves} of block l."""
    stats = dict(lab.statistics(windows))[l]
    seen = {}
    for name in LAYERS:
        W = lab.ckpt.tensor(f"model.layers.{l}.{name}.weight", lab.device, torch.float64)
        S, _ = profile(stats[f"{READS[name]}.gram"])
        I = normalise(stats[f"{name}.lrp"].double())
        seen[name] = curves(W, S, I, rank_at(RATE, *W.shape))
    return seen


# ------------------------------------------------------------ the command
def markdown(result):
    """Both losses at the end of the sweep, every layer of the block, mean over seeds."""
    seeds = result["curves"]
    lines = []
    for loss, name in (("infl", "L_act,infl"), ("act", "L_act")):
        changes = []
        for layer in LAYERS:
            end = sum(seed[layer][loss][-1] for seed in seeds) / len(seeds)
            changes.append(f"{100 * (end - 1):+.1f} %")
        lines.append([f"{name}, change over the sweep", *changes])
    layers = [name.split(".")[1] for name in LAYERS]
    return table([f"block {result['block']}, rate {RATE:g}", *layers], lines)


def first_half(infl):
    """What the first half of the updates brings of the whole fall, in %."""
    return 100 * (1 - infl[len(infl) // 2]) / max(1 - infl[-1], 1e-12)


def verdicts(result):
    """Proposition 3.1 and the inset's reading in Section 4.2."""
    seen = [seed[layer] for seed in result["curves"] for layer in LAYERS]
    rise = max(c["rise"] for c in seen)
    grown = sum(c["act"][-1] > 1 for c in seen)
    falls = [100 * (1 - c["infl"][-1]) for c in seen]
    first = [first_half(c["infl"]) for c in seen]
    return [
        verdict(
            "L_act,infl falls monotonically along the sweep.",
            rise <= 1e-12,
            f"over {len(seen)} layers and seeds it falls by {min(falls):.1f} to "
            f"{max(falls):.1f} %; the largest change between two points, upward "
            f"positive, is {rise:.1e} of the start.",
            "a mistake in the sweep: Proposition 3.1 promises it."),
        verdict(
            "L_act correspondingly grows.",
            grown == len(seen),
            f"it grows in {grown} of {len(seen)} layers and seeds.",
            "a start that is not L_act's optimum."),
        verdict(
            "The first updates are the largest.",
            min(first) > 50,
            f"the first half of the updates brings {min(first):.0f} to {max(first):.0f} "
            "% of the fall.",
            "influence that falls mainly on the leading ranks, which come last. To "
            "tell: the same curve in forward order."),
    ]


def picture(plt, result):
    """The curves of one layer, a line a seed; they nearly coincide."""
    fig, ax = plt.subplots(figsize=(6.5, 4.2), layout="constrained")
    losses = (("act", "L_act (Eq. 3)", "blue"), ("infl", "L_act,infl (Eq. 4)", "red"))
    for i, seed in enumerate(result["curves"]):
        curve = seed[result["layer"]]
        for loss, name, colour in losses:
            shares = [100 * x for x in curve[loss]]
            ax.plot(curve["updates"], shares, color=COLOURS[colour],
                    linestyle=("-", "--", ":")[i % 3], label=name if i == 0 else None)
    ax.axhline(100, color=COLOURS["grey"], linewidth=0.8)
    layer = f"block {result['block']}, {result['layer'].split('.')[1]}"
    title = f"Figure 1, inset: {result['checkpoint']}, {layer}"
    ax.set(xlabel=f"rank updates done, r = {curve['rank'] - 1} … 0",
           ylabel="loss, % of its start, SVD-LLM(W)",
           title=f"{title}, rate {RATE:g}, δ = {DELTA:g}")
    seeds = result["calibration"]["seeds"]
    named = f"calibration seed{'s' * (len(seeds) > 1)} " + ", ".join(map(str, seeds))
    fig.legend(loc="outside lower center", ncols=2, fontsize=9, title=named,
               title_fontsize=9)
    return fig


def main():
    p = arguments(__doc__)
    p.add_argument("--layer", help="such as model.layers.3.self_attn.q_proj "
                   "(default: q_proj of the middle block)")
    args = vars(p.parse_args())
    layer = args.pop("layer")
    lab = Lab("fig1", Setup(**args))
    middle = f"model.layers.{lab.ckpt.cfg.n_layers // 2}.self_attn.q_proj"
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", layer or middle)
    if not match or match[2] not in LAYERS or int(match[1]) >= lab.ckpt.cfg.n_layers:
        raise InputError(f"--layer is '{layer}'; expected a decomposed layer, "
                         f"such as {middle}")
    l = int(match[1])
    found = []
    for seed in lab.seeds:
        windows = lab.calibration(seed)
        facts = {"fig1": l, "calibration": digest(windows)}
        found.append(lab.cell(facts, lambda: measure(lab, windows, l),
                              "experiments/fig1.py", what=f"{layer}, seed {seed}"))
    result = {"block": l, "layer": match[2], "curves": found}
    lab.finish(sys.modules[__name__], result, picture)


if __name__ == "__main__":
    run(main)
