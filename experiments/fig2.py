"""Figure 2 of the paper: magnitude of weights and of activations against their influence, random samples and outliers.

    python experiments/fig2.py                        # the demo

Of every decomposed layer 50 random elements and the 50 of largest magnitude (the paper: one in a million of LLaMA-7B, which on a
small model would be none). Weights: |W| against I, LRP summed over all calibration windows. Activations: a layer's outputs over
four calibration windows against the relevance LRP gives each of them; those without relevance, at positions the last token does
not read, are left out. Writes experiments/results/fig2-NAME.json and, with matplotlib, fig2-NAME.png.
"""
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
from support.texts import digest
from experiments.common import COLOURS, Lab, arguments, mean_spread, show, table, verdict
from influence import operations
from model import LAYERS, wide
from support.script import run

POINTS, WINDOWS = 50, 4
KINDS = [f"{what} {which}" for what in ("weights", "activations") for which in ("random", "outliers")]


def activations(ckpt, windows, device, dtype):
    """{layer: (|A|, |R|)}, both (windows, T, m): every decomposed layer's output and the relevance LRP gives it, from the largest
    logit of each window's last token (R = z ⊙ g in gradient form). The whole model's graph of one window is held at a time."""
    model, ops, found = ckpt.model(device, dtype), operations("lrp"), {}
    names = {model.get_submodule(layer): layer for layer in (f"model.layers.{l}.{name}" for l in range(ckpt.cfg.n_layers)
                                                             for name in LAYERS)}
    model.model.embed_tokens.weight.requires_grad_()                            # the graph's only leaf
    for ids in windows.split(1):
        seen = {}

        def linear(layer, x):
            z = ops.linear(layer, x)
            if layer in names:
                seen[names[layer]] = z
            return z
        with torch.enable_grad():
            logits = model(ids.to(device), SimpleNamespace(**vars(ops) | {"linear": linear}))
            grads = torch.autograd.grad(wide(logits[0, -1]).amax(), list(seen.values()))
        for (layer, z), g in zip(seen.items(), grads):
            for kept, value in zip(found.setdefault(layer, ([], [])), (z, z * g)):
                kept.append(value.detach().abs().cpu())
    return {layer: tuple(map(torch.cat, pair)) for layer, pair in found.items()}


def sample(magnitude, influence, generator):
    """{"random", "outliers"} -> (magnitudes, influences) of POINTS elements with any influence, flat fp64."""
    magnitude, influence = magnitude.flatten().double(), influence.flatten().double()
    some = influence.nonzero()[:, 0]
    picks = {"random": some[torch.randperm(len(some), generator=generator)[:POINTS]],
             "outliers": some[magnitude[some].topk(min(POINTS, len(some))).indices]}
    return {which: (magnitude[i], influence[i]) for which, i in picks.items()}


def spearman(x, y):
    """Rank correlation of two vectors without ties."""
    ranks = torch.stack([each.argsort().argsort().double() for each in (x, y)])
    return torch.corrcoef(ranks)[0, 1].item()


def measure(lab, windows, seed):
    """One calibration seed: for each kind the rank correlation of every layer, and the points to draw."""
    generator, outputs = torch.Generator().manual_seed(seed), activations(lab.ckpt, windows[:WINDOWS], lab.device, lab.dtype)
    found = {kind: {"spearman": [], "points": []} for kind in KINDS}
    for l, stats in lab.statistics(windows):
        for name in LAYERS:
            layer = f"model.layers.{l}.{name}"
            W = lab.ckpt.tensor(layer + ".weight", dtype=torch.float32)
            for what, pair in (("weights", (W.abs(), stats[f"{name}.lrp"].cpu())), ("activations", outputs[layer])):
                for which, (x, y) in sample(*pair, generator).items():
                    found[f"{what} {which}"]["spearman"].append(spearman(x, y))
                    points = [[float(f"{a:.3g}") for a in pair] for pair in zip(x.tolist(), y.tolist())]
                    found[f"{what} {which}"]["points"] += points
    return found


def markdown(result):
    """The mean over layers of the rank correlation of magnitude and influence, with its spread over seeds."""
    return table(["rank correlation with influence, mean over layers", "random", "outliers"],
                 [[f"magnitude of {what}", *(show(result["spearman"][f"{what} {which}"]) for which in ("random", "outliers"))]
                  for what in ("weights", "activations")])


def verdicts(result):
    """The claims of Section 4.2 about Figure 2. Modest: 0.2 to 0.6 in absolute value; vanishing: below 0.2."""
    rho = {kind: mean_spread(values)[0] for kind, values in result["spearman"].items()}
    return [
        verdict("Random weights' magnitude correlates only modestly (0.2 to 0.6) with their influence.",
                0.2 <= abs(rho["weights random"]) <= 0.6, f"{rho['weights random']:.2f}.",
                "R = W ⊙ g contains W, so the less the gradient varies within a layer, the closer |R| follows |W|. To tell: the "
                "spread of log |g| within a layer, here and on a larger model."),
        verdict("The relation vanishes (below 0.2) for outlier weights.", abs(rho["weights outliers"]) < 0.2,
                f"{rho['weights outliers']:.2f}.",
                "the top 50 of a small layer reach further down its distribution than one in a million. To tell: the top 5."),
        *(verdict(f"The relation vanishes (below 0.2) for activations, {which}.", abs(rho[f"activations {which}"]) < 0.2,
                  f"{rho[f'activations {which}']:.2f}.",
                  "R = z ⊙ g contains the activation, and a small model has none of the massive ones that carry little "
                  "relevance. To tell: this script on TinyLlama (--ckpt).") for which in ("random", "outliers"))]


def picture(plt, points, result):
    """One seed's points, both axes logarithmic."""
    fig, axes = plt.subplots(1, 2, figsize=(10, 4.4), layout="constrained")
    for ax, what, one in zip(axes, ("weights", "activations"), ("|w|", "|a|")):
        for which, colour, mark in (("random", "sky", "o"), ("outliers", "red", "^")):
            kind = f"{what} {which}"
            ax.scatter(*zip(*points[kind]), s=9, color=COLOURS[colour], marker=mark, alpha=0.5, linewidths=0,
                       label=f"{which}, rank correlation {mean_spread(result['spearman'][kind])[0]:.2f}")
        ax.set(xscale="log", yscale="log", xlabel=f"magnitude {one}", ylabel="influence |R|, logits", title=f"{what}, all layers")
        ax.legend(fontsize=9, markerscale=2, loc="lower left" if what == "activations" else "lower right")
    fig.suptitle(f"Figure 2: {result['checkpoint']}")
    return fig


def main():
    lab, found = Lab("fig2", **vars(arguments(__doc__).parse_args())), []
    for seed in lab.seeds:
        windows = lab.calibration(seed)
        key = {"fig2": [POINTS, WINDOWS, seed], "calibration": digest(windows)}
        found.append(lab.cell(key, lambda: measure(lab, windows, seed)))
    means = {kind: [mean_spread(each[kind]["spearman"])[0] for each in found] for kind in KINDS}
    points = {kind: found[0][kind]["points"] for kind in KINDS}
    lab.finish(sys.modules[__name__], {"spearman": means}, lambda plt, result: picture(plt, points, result))


if __name__ == "__main__":
    run(main)
