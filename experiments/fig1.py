"""Figure 1's inset: L_act and L_act,infl along the sweep of one layer, after every rank update, relative to their start.

    python experiments/fig1.py                        # the demo: q_proj of block 3; --layer NAME for another

The verdicts look at all seven layers of that block. In fp64, so that a rise of L_act,infl could not hide in rounding. Writes
experiments/results/fig1-NAME.json and, with matplotlib, fig1-NAME.png.
"""
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
from air import als_sweep, normalise, objective, profile, rank_at, truncated_svd
from support.texts import digest
from experiments.common import COLOURS, Lab, arguments, table, verdict
from model import LAYERS, READS
from support.script import InputError, run

RATE, DELTA, POINTS = 0.6, 2.0, 128


def curves(W, S, I, k):
    """Both losses relative to their start, before the sweep and after every update (of a large layer every k/128), in fp64.

    "rise" is the largest change of L_act,infl between two points, upward positive, relative to its start.
    """
    Wp, P = W @ S, 1 + DELTA * I
    U, sigma, Vh = truncated_svd(Wp, k)
    losses, order, step = [], list(range(k - 1, -1, -1)), max(1, k // POINTS)
    for part in [[], *(order[i:i + step] for i in range(0, k, step))]:
        U, sigma, Vh = als_sweep(Wp, P, U, sigma, Vh, part)
        losses.append((objective(Wp, torch.ones_like(P), U, sigma, Vh), objective(Wp, P, U, sigma, Vh)))
    act, infl = ([x / each[0] for x in each] for each in zip(*losses))
    return {"rank": k, "updates": [0, *(min(i + step, k) for i in range(0, k, step))], "act": [round(x, 6) for x in act],
            "infl": [round(x, 6) for x in infl], "rise": max(b - a for a, b in zip(infl, infl[1:]))}


def markdown(result):
    """Both losses at the end of the sweep, every layer of the block, mean over seeds."""
    rows = []
    for loss, name in (("infl", "L_act,infl"), ("act", "L_act")):
        ends = [sum(seed[layer][loss][-1] for seed in result["curves"]) / len(result["curves"]) for layer in LAYERS]
        rows.append([f"{name}, change over the sweep", *(f"{100 * (end - 1):+.1f} %" for end in ends)])
    return table([f"block {result['block']}, rate {RATE:g}", *(name.split(".")[1] for name in LAYERS)], rows)


def verdicts(result):
    """Proposition 3.1 and the inset's reading in Section 4.2."""
    seen = [seed[layer] for seed in result["curves"] for layer in LAYERS]
    rise, grown = max(c["rise"] for c in seen), sum(c["act"][-1] > 1 for c in seen)
    falls = [100 * (1 - c["infl"][-1]) for c in seen]
    first = [100 * (1 - c["infl"][len(c["infl"]) // 2]) / max(1 - c["infl"][-1], 1e-12) for c in seen]
    return [
        verdict("L_act,infl falls monotonically along the sweep.", rise <= 1e-12,
                f"over {len(seen)} layers and seeds it falls by {min(falls):.1f} to {max(falls):.1f} %; the largest change "
                f"between two points, upward positive, is {rise:.1e} of the start.",
                "a mistake in the sweep: Proposition 3.1 promises it."),
        verdict("L_act correspondingly grows.", grown == len(seen), f"it grows in {grown} of {len(seen)} layers and seeds.",
                "a start that is not L_act's optimum."),
        verdict("The first updates are the largest.", min(first) > 50,
                f"the first half of the updates brings {min(first):.0f} to {max(first):.0f} % of the fall.",
                "influence that falls mainly on the leading ranks, which come last. To tell: the same curve in forward order.")]


def picture(plt, result):
    """The curves of one layer, a line a seed; they nearly coincide."""
    fig, ax = plt.subplots(figsize=(6.5, 4.2), layout="constrained")
    seeds = result["calibration"]["seeds"]
    for i, seed in enumerate(result["curves"]):
        curve = seed[result["layer"]]
        for loss, name, colour in (("act", "L_act (Eq. 3)", "blue"), ("infl", "L_act,infl (Eq. 4)", "red")):
            ax.plot(curve["updates"], [100 * x for x in curve[loss]], color=COLOURS[colour], linestyle=("-", "--", ":")[i % 3],
                    label=name if i == 0 else None)
    ax.axhline(100, color=COLOURS["grey"], linewidth=0.8)
    ax.set(xlabel=f"rank updates done, r = {curve['rank'] - 1} … 0", ylabel="loss, % of its start, SVD-LLM(W)",
           title=f"Figure 1, inset: {result['checkpoint']}, block {result['block']}, {result['layer'].split('.')[1]}, "
                 f"rate {RATE:g}, δ = {DELTA:g}")
    fig.legend(loc="outside lower center", ncols=2, fontsize=9, title=f"calibration seed{'s' * (len(seeds) > 1)} "
               + ", ".join(map(str, seeds)), title_fontsize=9)
    return fig


def main():
    p = arguments(__doc__)
    p.add_argument("--layer", help="such as model.layers.3.self_attn.q_proj (default: q_proj of the middle block)")
    args = vars(p.parse_args())
    layer, lab = args.pop("layer"), Lab("fig1", **args)
    middle = f"model.layers.{lab.ckpt.cfg.n_layers // 2}.self_attn.q_proj"
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", layer or middle)
    if not match or match[2] not in LAYERS or int(match[1]) >= lab.ckpt.cfg.n_layers:
        raise InputError(f"--layer is '{layer}'; expected a decomposed layer, such as {middle}")
    l, found = int(match[1]), []

    def compute():
        stats, seen = dict(lab.statistics(windows))[l], {}
        for name in LAYERS:
            W = lab.ckpt.tensor(f"model.layers.{l}.{name}.weight", lab.device, torch.float64)
            S, I = profile(stats[f"{READS[name]}.gram"])[0], normalise(stats[f"{name}.lrp"].double())
            seen[name] = curves(W, S, I, rank_at(RATE, *W.shape))
        return seen
    for windows in map(lab.calibration, lab.seeds):
        key = {"fig1": l, "rate": RATE, "delta": DELTA, "points": POINTS, "calibration": digest(windows)}
        found.append(lab.cell(key, compute))
    lab.finish(sys.modules[__name__], {"block": l, "layer": match[2], "curves": found}, picture)


if __name__ == "__main__":
    run(main)
