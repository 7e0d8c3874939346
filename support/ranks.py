"""Ranks by measurement (air.py --ranks auto): a budget spent where it lowers the loss most.

Not in the paper. To second order around the dense model, dropping component r of a layer
costs σ_r² of LᵀWS (air.kfac). A compressed model is far from the dense one, and there the
layers' predictions are wrong by up to a factor of ten against each other. So each layer's
are scaled by what its dropped part costs where the model is: the slope of the loss there,
on a few calibration windows. Ranks move by steps that the predictions can be trusted for
(a trust region, in terms of optimization) while the loss on these windows falls.
"""
import copy
import math
from typing import NamedTuple

import torch

from calibrate import calibration_windows, embed, forward_sweep
from eval_ppl import evaluate
from influence import backward_sweep, start_gradient
from model import LAYERS
from support.checkpoint import Stored
from support.progress import say
from support.texts import own_windows

WINDOWS = 8                     # calibration windows the loss is measured on
STEPS = 16                      # at most
USUAL = 8                       # as many, as a rule
FIRST = 0.2                     # share of a layer's rank that a step may change
LAST = 0.05                     # steps that are shorter are not tried
ENOUGH = 0.01                   # where perplexity falls by less, steps become shorter
LEAST = 0.02                    # of the mean: a layer whose slope is lower counts so


class Whole(NamedTuple):
    """A layer's components: its weight is U V, but for what `kept` leaves out."""

    U: torch.Tensor             # (m, k)
    V: torch.Tensor             # (k, n)
    energy: torch.Tensor        # σ² (k,) fp64, falling
    total: float                # of all components

    @property
    def cost(self):
        """Parameters of a rank."""
        return self.U.shape[0] + self.V.shape[1]

    def dropped(self, k):
        """Energy beyond rank k."""
        return max(self.total - self.energy[:k].sum().item(), 1e-9 * self.total)


def held_windows(text, ckpt, windows, seed):
    """What the loss is measured on: further windows of the text that `windows` (N, T) are
    of; of an array that holds these, its first.
    """
    if own_windows(text, ckpt) is not None:
        return windows[:WINDOWS]
    return calibration_windows(text, ckpt, WINDOWS, windows.shape[1], seed + 1)


# ------------------------------------------------------------ the compressed model
def product(U, V, k, device):
    return U[:, :k].to(device).float() @ V[:k].to(device).float()


def cut(ckpt, wholes, ranks, device):
    """`ckpt` with W = U V of rank k in place of each weight, multiplied on `device` when it
    is read."""
    made = {}
    for layer, k in ranks.items():
        U, V = wholes[layer][:2]
        shape = U.shape[0], V.shape[1]
        made[layer + ".weight"] = Stored(
            shape, torch.float32, lambda U=U, V=V, k=k: product(U, V, k, device))
    small = copy.copy(ckpt)
    small.tensors = ckpt.tensors | made
    return small


def slopes(ckpt, small, windows, device, dtype):
    """{layer: −⟨∂L/∂W, D⟩}, D = W of `ckpt` less that of `small`, where L is taken.

    To first order what the loss falls by, summed over windows, when D is given back.
    """
    inputs = {}
    for _ in forward_sweep(small, embed(small, windows, dtype), device, keep=inputs):
        pass
    g = start_gradient(small, windows, inputs.pop(ckpt.cfg.n_layers), device, "slope")
    found = {}
    for l, stats in backward_sweep(small, inputs, g, device, "slope"):
        for name in LAYERS:
            weight = f"model.layers.{l}.{name}.weight"
            # Not in place: an fp32 checkpoint hands out its own memory.
            W = ckpt.tensor(weight, device, torch.float32)
            D = W - small.tensor(weight, device, torch.float32)
            slope = (stats[f"{name}.G.slope"].float() * D).sum().item()
            found[weight.removesuffix(".weight")] = -slope
    return found


# ------------------------------------------------------------ a step
def spend(wholes, scales, ranks, step):
    """Ranks as dear as `ranks`, each within the share `step` of it, that save the most
    predicted loss.

    From the fewest that a step allows, each parameter goes to the component that saves
    most for it; energies fall, so a layer's come in their order.
    """
    budget = sum(wholes[layer].cost * k for layer, k in ranks.items())
    least = {}
    values = []
    costs = []
    owners = []
    for i, (layer, whole) in enumerate(wholes.items()):
        k = ranks[layer]
        least[layer] = max(1, min(k - 1, math.floor((1 - step) * k)))
        most = min(len(whole.energy), max(k + 1, math.ceil((1 + step) * k)))
        offered = whole.energy[least[layer]:most]
        values.append(offered * scales[layer] / whole.cost)
        costs.append(torch.full_like(offered, whole.cost))
        owners.append(torch.full((len(offered),), i))
        budget -= least[layer] * whole.cost
    order = torch.cat(values).argsort(descending=True, stable=True)
    bought = order[torch.cat(costs)[order].cumsum(0) <= budget]
    counts = torch.cat(owners)[bought].bincount(minlength=len(wholes))
    return {layer: least[layer] + int(count) for layer, count in zip(wholes, counts)}


def scales_of(wholes, ranks, found):
    """{layer: measured over predicted cost of its dropped part}, of any common scale."""
    ratios = {layer: found[layer] / whole.dropped(ranks[layer]) if whole.total else 0.0
              for layer, whole in wholes.items()}           # of a weight of zeros: none
    least = LEAST * sum(max(0.0, ratio) for ratio in ratios.values()) / len(ratios)
    return {layer: max(ratio, least, 1e-30) for layer, ratio in ratios.items()}


def find_ranks(ckpt, wholes, ranks, windows, device, dtype):
    """Ranks that cost as many parameters as `ranks`, from where the search starts.

    wholes {layer: Whole}; windows (N, T). Steps are halved where the loss falls by little
    or not at all. Prints a line a step.
    """
    small = cut(ckpt, wholes, ranks, device)
    ppl = evaluate(small, windows, device, dtype)["ppl"]
    say(f"ranks: uniform ones give perplexity {ppl:.3f} on {len(windows)} calibration "
        "windows")
    found = None                                            # slopes at `ranks`
    step = FIRST
    for _ in range(STEPS):
        found = found or slopes(ckpt, small, windows, device, dtype)
        moved = spend(wholes, scales_of(wholes, ranks, found), ranks, step)
        tried = cut(ckpt, wholes, moved, device)
        new = evaluate(tried, windows, device, dtype)["ppl"]
        say(f"ranks: a step of {step:.0%} gives {new:.3f}")
        if not new < (1 - ENOUGH) * ppl:
            step /= 2
        # A perplexity that is not a number is not below either.
        if new < ppl:
            ranks = moved
            small = tried
            ppl = new
            found = None
        if step < LAST:
            break
    return ranks
