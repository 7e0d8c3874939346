"""Figure 2 of the paper: magnitude of weights and of activations against their
influence, random samples and outliers.

    python experiments/fig2.py                        # the demo

Of every decomposed layer 50 random elements and the 50 of largest magnitude (the paper:
one in a million of LLaMA-7B, which on a small model would be none). Weights: |W|
against I, LRP summed over all calibration windows. Activations: a layer's outputs over
four calibration windows against the relevance LRP gives each of them; those without
relevance, at positions the last token does not read, are left out. Writes
experiments/results/fig2-NAME.json and, with matplotlib, fig2-NAME.png.
"""
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch

from experiments.common import Lab, setup_of
from experiments.report import COLOURS, mean_spread, show, table, verdict
from influence import attn_lrp
from model import LAYERS, wide
from support.script import run
from support.texts import digest

POINTS = 50                 # elements a layer and kind
WINDOWS = 4                 # for the activations
WHAT = ("weights", "activations")
WHICH = ("random", "outliers")
KINDS = [f"{what} {which}" for what in WHAT for which in WHICH]


def outputs_of_window(model, names, ids, device):
    """{layer: (z, z ⊙ g)} of one window (1, T): outputs and their relevance.

    g: the gradient of the last token's largest logit by AttnLRP's rules.
    """
    ops = attn_lrp()
    seen = {}                                                       # {layer: z}

    def linear(layer, x):
        z = ops.linear(layer, x)
        if layer in names:
            seen[names[layer]] = z
        return z
    with torch.enable_grad():
        noting = SimpleNamespace(**vars(ops) | {"linear": linear})
        logits = model(ids.to(device), noting)
        grads = torch.autograd.grad(wide(logits[0, -1]).amax(), list(seen.values()))
    return {layer: (z.detach(), (z * g).detach())
            for (layer, z), g in zip(seen.items(), grads)}


def activations(ckpt, windows, device, dtype):
    """{layer: (|A|, |R|)}, both (windows, T, m): every layer's output and relevance.

    From the largest logit of each window's last token (R = z ⊙ g in gradient form). The
    whole model's graph of one window is held at a time.
    """
    model = ckpt.model(device, dtype)
    layers = [f"model.layers.{l}.{name}"
              for l in range(ckpt.cfg.n_layers) for name in LAYERS]
    names = {model.get_submodule(layer): layer for layer in layers}
    model.model.embed_tokens.weight.requires_grad_()            # the graph's only leaf
    A = {layer: [] for layer in layers}
    R = {layer: [] for layer in layers}
    for ids in windows.split(1):
        for layer, (z, relevance) in outputs_of_window(model, names, ids, device).items():
            A[layer].append(z.abs().cpu())
            R[layer].append(relevance.abs().cpu())
    return {layer: (torch.cat(A[layer]), torch.cat(R[layer])) for layer in layers}


def sample(magnitude, influence, generator):
    """{"random", "outliers"} -> (magnitudes, influences) of POINTS elements.

    Flat, fp64; those without any influence are left out.
    """
    magnitude, influence = (x.flatten().double() for x in (magnitude, influence))
    some = influence.nonzero()[:, 0]
    random = torch.randperm(len(some), generator=generator)[:POINTS]
    largest = magnitude[some].topk(min(POINTS, len(some))).indices
    picks = {"random": some[random], "outliers": some[largest]}
    return {which: (magnitude[i], influence[i]) for which, i in picks.items()}


def spearman(x, y):
    """Rank correlation of two vectors without ties."""
    ranks = torch.stack([each.argsort().argsort().double() for each in (x, y)])
    return torch.corrcoef(ranks)[0, 1].item()


def points_of(x, y):
    """[[x_i, y_i]], of three digits, which a picture can show."""
    pairs = zip(x.tolist(), y.tolist())
    return [[float(f"{a:.3g}"), float(f"{b:.3g}")] for a, b in pairs]


def measure(lab, windows, seed):
    """One seed: of each kind every layer's rank correlation, and the points to draw."""
    generator = torch.Generator().manual_seed(seed)
    outputs = activations(lab.ckpt, windows[:WINDOWS], lab.device, lab.dtype)
    found = {kind: {"spearman": [], "points": []} for kind in KINDS}
    for l, stats in lab.statistics(windows):
        # A layer's weights with their influence, and its outputs with their relevance.
        for name in LAYERS:
            layer = f"model.layers.{l}.{name}"
            W = lab.ckpt.tensor(layer + ".weight", dtype=torch.float32)
            pairs = {"weights": (W.abs(), stats[f"{name}.lrp"].cpu()),
                     "activations": outputs[layer]}
            # Of both the sampled elements, with what they tell.
            for what, pair in pairs.items():
                for which, (x, y) in sample(*pair, generator).items():
                    kind = found[f"{what} {which}"]
                    kind["spearman"].append(spearman(x, y))
                    kind["points"] += points_of(x, y)
    return found


# ------------------------------------------------------------ the command
def markdown(result):
    """The mean over layers of the rank correlation of magnitude and influence."""
    lines = []
    for what in WHAT:
        shown = [show(result["spearman"][f"{what} {which}"]) for which in WHICH]
        lines.append([f"magnitude of {what}", *shown])
    return table(["rank correlation with influence, mean over layers", *WHICH], lines)


def vanishes(rho, kind, said, otherwise):
    return verdict(f"The relation vanishes (below 0.2) for {said}.", abs(rho[kind]) < 0.2,
                   f"{rho[kind]:.2f}.", otherwise)


def verdicts(result):
    """The claims of Section 4.2 about Figure 2.

    Modest: 0.2 to 0.6 in absolute value; vanishing: below 0.2.
    """
    rho = {kind: mean_spread(values)[0] for kind, values in result["spearman"].items()}
    random = rho["weights random"]
    massive = ("R = z ⊙ g contains the activation, and a small model has none of the "
               "massive ones that carry little relevance. To tell: this script on "
               "TinyLlama (--ckpt).")
    return [
        verdict(
            "Random weights' magnitude correlates only modestly (0.2 to 0.6) with their "
            "influence.",
            0.2 <= abs(random) <= 0.6,
            f"{random:.2f}.",
            "R = W ⊙ g contains W, so the less the gradient varies within a layer, the "
            "closer |R| follows |W|. To tell: the spread of log |g| within a layer, "
            "here and on a larger model."),
        vanishes(
            rho, "weights outliers", "outlier weights",
            "the top 50 of a small layer reach further down its distribution than one "
            "in a million. To tell: the top 5."),
        vanishes(rho, "activations random", "activations, random", massive),
        vanishes(rho, "activations outliers", "activations, outliers", massive),
    ]


def picture(plt, points, result):
    """One seed's points, both axes logarithmic."""
    fig, axes = plt.subplots(1, 2, figsize=(10, 4.4), layout="constrained")
    for ax, what in zip(axes, WHAT):
        # Random elements first, outliers over them.
        for which, colour, marker in (("random", "sky", "o"), ("outliers", "red", "^")):
            kind = f"{what} {which}"
            rho, _ = mean_spread(result["spearman"][kind])
            ax.scatter(*zip(*points[kind]), s=9, color=COLOURS[colour], marker=marker,
                       alpha=0.5, linewidths=0, label=f"{which}, rank correlation {rho:.2f}")
        ax.set(xscale="log", yscale="log", xlabel=f"magnitude |{what[0]}|",
               ylabel="influence |R|, logits", title=f"{what}, all layers")
        # Where there are no points.
        corner = "lower left" if what == "activations" else "lower right"
        ax.legend(fontsize=9, markerscale=2, loc=corner)
    fig.suptitle(f"Figure 2: {result['checkpoint']}")
    return fig


def main():
    lab = Lab("fig2", setup_of(__doc__))
    found = []
    for seed in lab.seeds:
        windows = lab.calibration(seed)
        facts = {"fig2": seed, "calibration": digest(windows)}
        found.append(lab.cell(facts, lambda: measure(lab, windows, seed),
                              "experiments/fig2.py", what=f"seed {seed}"))
    means = {}
    for kind in KINDS:
        means[kind] = [mean_spread(each[kind]["spearman"])[0] for each in found]
    points = {kind: found[0][kind]["points"] for kind in KINDS}
    lab.finish(sys.modules[__name__], {"spearman": means},
               lambda plt, result: picture(plt, points, result))


if __name__ == "__main__":
    run(main)
