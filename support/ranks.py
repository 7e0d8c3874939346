"""Ranks by measurement (air.py --ranks auto, mixed): a budget spent where it lowers the loss
most.

Not in the paper. To second order around the dense model, dropping component r of a layer
costs σ_r² of LᵀWS (air.kfac). A compressed model is far from the dense one, and there the
layers' predictions are wrong by up to a factor of ten against each other. So each layer's
are scaled by what its dropped part costs where the model is: the slope of the loss there,
on a few calibration windows. Ranks move by steps that the predictions can be trusted for
(a trust region, in terms of optimization) while the loss on these windows falls.

Factors of rank k have k(m+n) numbers, so that half of a square layer's components cost as
much as all of it: the last components are the dearest. With `mixed` a layer may stay dense.
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
    dense: float = math.inf     # parameters of the layer as it is; inf: it may not stay so

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
def price(wholes, ranks):
    """Parameters of all layers; those without a rank are dense."""
    return sum(whole.cost * ranks[layer] if layer in ranks else whole.dense
               for layer, whole in wholes.items())


def reach(whole, k, step):
    """(fewest, most) components that a step allows a layer of rank k.

    None: a dense one, which is reached from as many as rate 1 pays for.
    """
    if k is None:
        k = len(whole.energy)
    least = max(1, min(k - 1, math.floor((1 - step) * k)))
    most = min(len(whole.energy), max(k + 1, math.ceil((1 + step) * k)))
    return least, most


def bought(values, costs, owners, budget):
    """Owners of what `budget` buys, best value a parameter first; each [(offers,)]."""
    order = torch.cat(values).argsort(descending=True, stable=True)
    return torch.cat(owners)[order[torch.cat(costs)[order].cumsum(0) <= budget]]


def stay_dense(wholes, scales, ranks, step, budget):
    """The layers that `budget` leaves dense.

    From rank k to dense a layer saves all that is dropped, for mn − k(m+n) parameters. Where
    that saves more a parameter than the next component, it is the better buy: the hull of
    (cost, loss) is the curve of the components up to one of them, then a straight line.
    """
    values = []
    costs = []
    owners = []
    for i, (layer, whole) in enumerate(wholes.items()):
        least, most = reach(whole, ranks.get(layer), step)
        # Of each rank k that there may be: its parameters, its loss, the line to dense.
        spent = torch.arange(least, most + 1) * float(whole.cost)
        loss = (whole.total - whole.energy.cumsum(0)[least - 1:most]).clamp_min(0)
        missing = whole.dense - spent
        line = loss / missing.clamp_min(1)
        last = int(line.argmin())                           # where the line leaves the curve
        curve = whole.energy[least:least + last] / whole.cost
        values.append(torch.cat((curve, line[last:last + 1])) * scales[layer])
        costs.append(torch.cat((torch.full_like(curve, whole.cost), missing[last:last + 1])))
        # The components on the way, -1, only cost.
        owners.append(torch.tensor([-1] * last + [i]))
        budget -= least * whole.cost
    whole_ones = set(bought(values, costs, owners, budget).tolist())
    return {layer for i, layer in enumerate(wholes) if i in whole_ones}


def spend(wholes, scales, ranks, step, budget):
    """Ranks, each within the share `step` of that in `ranks`, that save the most predicted
    loss for `budget` parameters; layers without one are dense.

    From the fewest that a step allows, each parameter goes to the component that saves
    most for it; energies fall, so a layer's come in their order.
    """
    dense = stay_dense(wholes, scales, ranks, step, budget)
    budget -= sum(wholes[layer].dense for layer in dense)
    rest = {layer: whole for layer, whole in wholes.items() if layer not in dense}
    if not rest:
        return {}
    least = {}
    values = []
    costs = []
    owners = []
    for i, (layer, whole) in enumerate(rest.items()):
        least[layer], most = reach(whole, ranks.get(layer), step)
        offered = whole.energy[least[layer]:most]
        values.append(offered * scales[layer] / whole.cost)
        costs.append(torch.full_like(offered, whole.cost))
        owners.append(torch.full((len(offered),), i))
        budget -= least[layer] * whole.cost
    counts = bought(values, costs, owners, budget).bincount(minlength=len(rest))
    return {layer: least[layer] + int(count) for layer, count in zip(rest, counts)}


def scales_of(wholes, ranks, found):
    """{layer: measured over predicted cost of its dropped part}, of any common scale."""
    ratios = {layer: found[layer] / wholes[layer].dropped(k) if wholes[layer].total else 0.0
              for layer, k in ranks.items()}                # of a weight of zeros: none
    least = LEAST * sum(max(0.0, ratio) for ratio in ratios.values()) / len(ratios)
    return {layer: max(ratio, least, 1e-30) for layer, ratio in ratios.items()}


def find_ranks(ckpt, wholes, ranks, windows, device, dtype):
    """Ranks that cost as many parameters as `ranks`, from where the search starts; a layer
    that is to stay dense has none.

    wholes {layer: Whole}; windows (N, T). Steps are halved where the loss falls by little
    or not at all. Prints a line a step.
    """
    small = cut(ckpt, wholes, ranks, device)
    ppl = evaluate(small, windows, device, dtype)["ppl"]
    say(f"ranks: uniform ones give perplexity {ppl:.3f} on {len(windows)} calibration "
        "windows")
    found = None                                            # slopes at `ranks`
    scales = {}                         # a dense layer's is that when it had a rank last
    step = FIRST
    for _ in range(STEPS):
        found = found or slopes(ckpt, small, windows, device, dtype)
        scales |= scales_of(wholes, ranks, found)
        moved = spend(wholes, scales, ranks, step, price(wholes, ranks))
        tried = cut(ckpt, wholes, moved, device)
        new = evaluate(tried, windows, device, dtype)["ppl"]
        dense = len(wholes) - len(moved)
        apart = f", {dense} of {len(wholes)} layers dense" if dense else ""
        say(f"ranks: a step of {step:.0%} gives {new:.3f}{apart}")
        if not new < (1 - ENOUGH) * ppl:
            step /= 2
        # A perplexity that is not a number is not below either.
        if new < ppl:
            ranks = moved
            small = tried
            ppl = new
            found = None
        if step < LAST or not ranks:
            break
    return ranks
