"""Four questions the paper and its released code leave open, each answered by a
measurement at rates 0.6 and 0.4.

    python experiments/open_questions.py          # the demo; continues where it stopped

1. Influence I belongs to W's columns, but column j of W' = WS mixes the inputs from j
   on: does Cholesky's order of inputs matter? Inputs reversed, in a random order, and
   by falling energy are compared with their own order.
2. Does a symmetric square root for S, which keeps column j closest to input j, serve
   the sweep better?
3. Does influence measured in the profiled space, |(∂L/∂W S⁻ᵀ) ⊙ W S|, serve better than
   W×Grad, its native counterpart?
4. Does the released code's scaling of I (mean 1, maximum 100) matter?

Writes experiments/results/open_questions-NAME.json.
"""
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
import torch.nn.functional as F

from air import METHODS, Method, air, normalise, profile
from experiments.common import Lab, setup_of
from experiments.report import (against, compare, every, find, listed, percent, show,
                                table, verdict)
from model import LAYERS, READS, wide
from support.script import run
from support.texts import digest


# ------------------------------------------------------------ variants of AIR
def reordered(W, S, I, k, order):
    """AIR with the inputs in another order (n,): S of the permuted ΣXXᵀ.

    V comes back in the inputs' own order.
    """
    gram = S @ S.T
    permuted, _ = profile(gram[order][:, order])
    U, V, losses = air(W[:, order], permuted, I[:, order], k)
    back = torch.empty_like(V)
    back[:, order] = V
    return U, back, losses


def reversed_order(S):
    return torch.arange(len(S) - 1, -1, -1)


def random_order(S):
    return torch.randperm(len(S), generator=torch.Generator().manual_seed(0))


def energy_order(S):
    """Inputs by falling energy, the diagonal of ΣXXᵀ."""
    return (S @ S.T).diagonal().argsort(descending=True)


def in_order(order):
    """The Method with the inputs in the order order(S)."""
    return Method(lambda x, o: reordered(x.W, x.S, normalise(x.influence("lrp")), x.k,
                                         order(x.S).to(x.W.device)), "influence")


def symmetric(W, S, I, k):
    """AIR with S = (ΣXXᵀ)^½, its own transpose.

    V is multiplied by its inverse here, since air expects a triangle.
    """
    energy, Q = torch.linalg.eigh(S @ S.T)
    root = energy.clamp_min(energy[-1] * 1e-12).sqrt()
    Wp = W @ ((Q * root) @ Q.T).to(W.dtype)
    U, V, losses = air(Wp, torch.eye(len(S), dtype=S.dtype, device=S.device), I, k)
    return U, (V.double() @ ((Q / root) @ Q.T)).to(V.dtype), losses


VARIANT_METHODS = {
    "reversed": in_order(reversed_order),
    "random": in_order(random_order),
    "energy": in_order(energy_order),
    "symmetric": Method(
        lambda x, o: symmetric(x.W, x.S, normalise(x.influence("lrp")), x.k), "influence"),
    "profiled": Method(
        lambda x, o: air(x.W, x.S, normalise(x.influence("profiled")), x.k), "influence"),
}
METHODS.update(VARIANT_METHODS)


# ------------------------------------------------------------ profiled space
class Profiled(NamedTuple):
    """A weight on its way to influence in the profiled space."""

    W: torch.Tensor             # (m, n), a leaf of the graph
    S: torch.Tensor             # (n, n) fp64
    Wp: torch.Tensor            # W' = WS (m, n) fp64
    I: torch.Tensor             # (m, n) fp64, to be summed over windows


def profiled_weights(model, kept):
    """{(block, layer): Profiled} of a model's weights."""
    weights = {}
    for l, stats in kept.items():
        for name in LAYERS:
            W = model.get_submodule(f"model.layers.{l}.{name}").weight.requires_grad_()
            S, _ = profile(stats[f"{READS[name]}.gram"])
            I = torch.zeros_like(W, dtype=torch.float64)
            weights[l, name] = Profiled(W, S, W.detach().double() @ S, I)
    return weights


def profiled(lab, windows):
    """(block, statistics) with f"{name}.profiled" = Σ |(∂L/∂W S⁻ᵀ) ⊙ W S| (m, n).

    Summed over windows; L is a window's mean cross-entropy. With W = W' S⁻¹, ∂L/∂W' =
    ∂L/∂W S⁻ᵀ: W×Grad of the matrix AIR truncates. The whole model's graph of one window
    is held.
    """
    kept = dict(lab.statistics(windows, "wxg"))
    model = lab.ckpt.model(lab.device, lab.dtype)
    weights = profiled_weights(model, kept)
    leaves = [each.W for each in weights.values()]
    for window in windows.split(1):
        # ∂L/∂W of all layers.
        ids = window.to(lab.device)
        with torch.enable_grad():
            loss = F.cross_entropy(wide(model(ids))[0, :-1], ids[0, 1:])
        grads = torch.autograd.grad(loss, leaves)
        # ∂L/∂W' by a triangular solve, since S is one.
        for each, g in zip(weights.values(), grads):
            g_profiled = torch.linalg.solve_triangular(
                each.S.T, g.double(), upper=True, left=False)
            each.I.add_((g_profiled * each.Wp).abs())
    for (l, name), each in weights.items():
        kept[l][f"{name}.profiled"] = each.I.float()
    return kept.items()


# ------------------------------------------------------------ the command
RATES = (0.6, 0.4)
VARIANTS = {
    "default": "AIR as in the paper",
    "reversed": "1. inputs reversed",
    "random": "1. inputs in random order",
    "energy": "1. inputs by falling energy",
    "symmetric": "2. symmetric square root",
    "wxg": "3. W×Grad, native",
    "profiled": "3. W×Grad, profiled space",
    "max100": "4. mean 1, maximum 100",
}
# AIR's own options; the other variants are methods.
OPTIONS = {"default": {}, "wxg": {"signal": "wxg"}, "max100": {"scale": "max100"}}


def setting_of(variant, rate):
    method = "air" if variant in OPTIONS else variant
    return {"method": method, "rate": rate, "variant": variant} | OPTIONS.get(variant, {})


def markdown(result):
    """A row a variant: perplexity, and what it is against AIR's, at both rates."""
    lines = []
    for variant, name in VARIANTS.items():
        # AIR itself has nothing beside its perplexity.
        line = [name]
        for rate in RATES:
            ppl, default = (find(result["rows"], rate=rate, variant=each)["ppl"]["text"]
                            for each in (variant, "default"))
            gap = "" if variant == "default" else percent(compare(ppl, default))
            line += [show(ppl), gap]
        lines.append(line)
    columns = []
    for rate in RATES:
        columns += [f"perplexity {rate:g}", "against AIR"]
    return table(["variant", *columns], lines)


def pair(result, a, b="default"):
    """Variant a against b at both rates."""
    return against(result["rows"], "rate", RATES, {"variant": a}, {"variant": b})


def verdicts(result):
    """The four questions, as claims."""
    orders = {each: pair(result, each) for each in ("reversed", "random", "energy")}
    said = [f"{VARIANTS[each][3:]} {listed(RATES, gaps)}"
            for each, gaps in orders.items()]
    root = pair(result, "symmetric")
    scale = pair(result, "max100")
    space = pair(result, "profiled", "wxg")
    return [
        verdict(
            "(Not in the paper.) 1. The order of Cholesky's columns is immaterial.",
            every(sum(orders.values(), []), "no difference"),
            f"against the inputs' own order, {'; '.join(said)}."),
        verdict(
            "(Not in the paper.) 2. A symmetric square root for S serves the sweep better.",
            every(root, "lower"),
            f"against Cholesky, {listed(RATES, root)}."),
        verdict(
            "(Not in the paper.) 3. Influence measured in the profiled space serves better.",
            every(space, "lower"),
            f"against native W×Grad, {listed(RATES, space)}."),
        verdict(
            "(Not in the paper.) 4. The scaling max100 makes no difference.",
            every(scale, "no difference"),
            f"against unit mean, {listed(RATES, scale)}."),
    ]


def main():
    lab = Lab("open_questions", setup_of(__doc__))
    made = {}

    def sweep(options, windows):
        if options.method != "profiled":
            return lab.sweep(options, windows)
        key = digest(windows)
        if key not in made:
            made.clear()                                    # one seed's at a time
            made[key] = profiled(lab, windows)
        return made[key]
    settings = [setting_of(variant, rate) for variant in VARIANTS for rate in RATES]
    lab.finish(sys.modules[__name__], {"rows": lab.measure(settings, sweep=sweep)})


if __name__ == "__main__":
    run(main)
