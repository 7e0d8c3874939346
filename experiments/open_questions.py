"""Four questions the paper and its released code leave open, each answered by a measurement at rates 0.6 and 0.4.

    python experiments/open_questions.py              # the demo; continues where it stopped

1. Influence I belongs to W's columns, but column j of W' = WS mixes the inputs from j on: does Cholesky's order of inputs matter?
   Inputs reversed, in a random order, and by falling energy are compared with their own order.
2. Does a symmetric square root for S, which keeps column j closest to input j, serve the sweep better?
3. Does influence measured in the profiled space, |(∂L/∂W S⁻ᵀ) ⊙ W S|, serve better than W×Grad, its native counterpart?
4. Does the released code's scaling of I (mean 1, maximum 100) matter?

Writes experiments/results/open_questions-NAME.json.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
import torch.nn.functional as F
from air import air, normalise, profile
from support.texts import digest
from experiments.common import (Lab, against, arguments, compare, every, find, listed, percent, show, signal_of, solver, table,
                                verdict)
from model import LAYERS, READS, wide
from support.script import run

RATES = (0.6, 0.4)
VARIANTS = {"default": "AIR as in the paper", "reversed": "1. inputs reversed", "random": "1. inputs in random order",
            "energy": "1. inputs by falling energy", "symmetric": "2. symmetric square root", "wxg": "3. W×Grad, native",
            "profiled": "3. W×Grad, profiled space", "max100": "4. mean 1, maximum 100"}
OPTIONS = {"default": {}, "wxg": {"signal": "wxg"}, "max100": {"scale": "max100"}}      # AIR's own; the others have their solver


def reordered(W, S, I, k, order):
    """AIR with the inputs in another order (n,): S = chol of the permuted ΣXXᵀ; V comes back in the inputs' own order."""
    gram = S @ S.T
    U, V, losses = air(W[:, order], profile(gram[order][:, order])[0], I[:, order], k)
    back = torch.empty_like(V)
    back[:, order] = V
    return U, back, losses


def symmetric(W, S, I, k):
    """AIR with S = (ΣXXᵀ)^½, its own transpose; V is multiplied by its inverse here, since air expects a triangle."""
    energy, Q = torch.linalg.eigh(S @ S.T)
    root = energy.clamp_min(energy[-1] * 1e-12).sqrt()
    U, V, losses = air(W @ ((Q * root) @ Q.T).to(W.dtype), torch.eye(len(S), dtype=S.dtype, device=S.device), I, k)
    return U, (V.double() @ ((Q / root) @ Q.T)).to(V.dtype), losses


def profiled(lab, windows):
    """(block, statistics with f"{name}.profiled" = Σ_windows |(∂L/∂W S⁻ᵀ) ⊙ W S| (m, n)); L is a window's mean cross-entropy.

    With W = W' S⁻¹, ∂L/∂W' = ∂L/∂W S⁻ᵀ: W×Grad of the matrix AIR truncates. The whole model's graph of one window is held.
    """
    kept = dict(lab.statistics(windows, "wxg"))
    model, layers = lab.ckpt.model(lab.device, lab.dtype), {}
    for l, stats in kept.items():
        for name in LAYERS:
            W = model.get_submodule(f"model.layers.{l}.{name}").weight.requires_grad_()
            S = profile(stats[f"{READS[name]}.gram"])[0]
            layers[l, name] = W, S, W.detach().double() @ S, torch.zeros_like(W, dtype=torch.float64)
    for ids in windows.split(1):
        with torch.enable_grad():
            loss = F.cross_entropy(wide(model(ids.to(lab.device)))[0, :-1], ids[0, 1:].to(lab.device))
        for (W, S, Wp, I), g in zip(layers.values(), torch.autograd.grad(loss, [each[0] for each in layers.values()])):
            I += (torch.linalg.solve_triangular(S.T, g.double(), upper=True, left=False) * Wp).abs()       # g S⁻ᵀ ⊙ W S
    for (l, name), (*_, I) in layers.items():
        kept[l][f"{name}.profiled"] = I.float()
    return kept.items()


def solve_variant(setting):
    """The solver of a setting: AIR's own, or one of the variants."""
    def solve(W, stats, name, k, S):
        I, n = normalise(stats[f"{name}.{'profiled' if variant == 'profiled' else 'lrp'}"].to(W.dtype)), W.shape[1]
        if variant == "profiled":
            return air(W, S, I, k)
        if variant == "symmetric":
            return symmetric(W, S, I, k)
        order = {"reversed": torch.arange(n - 1, -1, -1), "random": torch.randperm(n, generator=torch.Generator().manual_seed(0)),
                 "energy": (S @ S.T).diagonal().argsort(descending=True)}[variant]
        return reordered(W, S, I, k, order.to(W.device))
    variant = setting.get("variant")
    return solve if variant else solver(setting)


def markdown(result):
    rows = []
    for variant, name in VARIANTS.items():
        cells = [[find(result["rows"], rate=r, variant=each)["ppl"]["text"] for each in (variant, "default")] for r in RATES]
        rows.append([name, *sum(((show(a), "" if variant == "default" else percent(compare(a, b))) for a, b in cells), ())])
    return table(["variant", *sum(((f"perplexity {rate:g}", "against AIR") for rate in RATES), ())], rows)


def verdicts(result):
    """The four questions, as claims."""
    def pair(a, b="default"):
        return against(result["rows"], "rate", RATES, {"variant": a}, {"variant": b})
    orders = {variant: pair(variant) for variant in ("reversed", "random", "energy")}
    return [
        verdict("1. The order of Cholesky's columns is immaterial.", every(sum(orders.values(), []), "no difference"),
                "against the inputs' own order, "
                + "; ".join(f"{VARIANTS[each][3:]} {listed(RATES, gaps)}" for each, gaps in orders.items()) + "."),
        verdict("2. A symmetric square root for S serves the sweep better.", every(pair("symmetric"), "lower"),
                f"against Cholesky, {listed(RATES, pair('symmetric'))}."),
        verdict("3. Influence measured in the profiled space serves better.", every(pair("profiled", "wxg"), "lower"),
                f"against native W×Grad, {listed(RATES, pair('profiled', 'wxg'))}."),
        verdict("4. The scaling max100 makes no difference.", every(pair("max100"), "no difference"),
                f"against unit mean, {listed(RATES, pair('max100'))}.")]


def main():
    lab = Lab("open_questions", **vars(arguments(__doc__).parse_args()))
    settings, made = {(name, rate): {"method": "air", "rate": rate} | OPTIONS.get(name, {"variant": name})
                      for name in VARIANTS for rate in RATES}, {}

    def sweep(setting, windows):
        if setting.get("variant") != "profiled":
            return lab.statistics(windows, signal_of(setting))
        if digest(windows) not in made:
            made.clear()                                                        # one seed's at a time
            made[digest(windows)] = profiled(lab, windows)
        return made[digest(windows)]
    rows = lab.measure(list(settings.values()), solve=solve_variant, sweep=sweep)
    lab.finish(sys.modules[__name__], {"rows": [row | {"variant": name} for row, (name, _) in zip(rows, settings)]})


if __name__ == "__main__":
    run(main)
