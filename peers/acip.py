"""ACIP: singular values masked by an l1 penalty until the size is reached, adapters beside.

    python peers/acip.py --ckpt demo --rate 0.6 --map out/demo-acip-map --out out/demo-acip

W = U diag(m) ΣVᵀ + (α/r) B A: masks m = 1[p > 0] and adapters learn by the loss and
λ Σ relu(p)/SCALE, where λ rises from --weight, until the share --stop of the size is left;
then adapters alone. What is cut last is worth most: by these scores, kept in --map, any rate
from --stop up is cut without training again. Source: ACIP (Genzel et al., 2025); its defaults.
Shapes: a layer (m, n), q = min(m, n) singular values, an adapter of rank r: A (r, n), B (m, r).
"""
import sys
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))        # from any folder
from enhance.lora import Adapter
from enhance.retrain import Loss
from model import LAYERS
from support.checkpoint import TensorFolder
from support.learning import batch_at, own, take_training, training_tensors
from support.peers import arguments, peer_task, write_peer
from support.progress import say
from support.script import InputError, check_apart, run

SCALE = 2e-2            # of p: 1 in the relaxed mask; where p starts
GROWTH = 1.01 ** 0.25   # of λ at each step: 1.01 every four
STATE = "training"      # the stem of its files
OPTIONS = {"stop": 0.4, "lr": 5e-5, "weight": 1e-3, "rank": 32, "alpha": 16.0, "dropout": 0.05,
           "batch": 4, "adapter_steps": 1000, "every": 50}


# ------------------------------------------------------------ masks
def mask(p):
    """1[p > 0], with the derivative of relu(p)/SCALE (straight through)."""
    relaxed = F.relu(p) / SCALE
    hard = (p > 0).float()
    return relaxed + (hard - relaxed).detach()


class Masked(nn.Module):
    """y = U diag(m) ΣVᵀx + b; p is of all layers, this one's are at `at`."""

    def __init__(self, linear, p, at):
        super().__init__()
        U, sigma, Vt = torch.linalg.svd(linear.weight.float(), full_matrices=False)
        self.weight = linear.weight                             # (m, n), for its shape
        self.U = nn.Parameter(U)                                # (m, q)
        self.V = nn.Parameter(sigma[:, None] * Vt)              # (q, n)
        self.bias = linear.bias
        self.p = p
        self.at = at

    def forward(self, x):
        inner = F.linear(x, self.V.to(x.dtype)) * mask(self.p[self.at]).to(x.dtype)
        return F.linear(inner, self.U.to(x.dtype), self.bias)

    def size(self, k):
        """Its numbers with k singular values, the adapter's aside: never above mn."""
        return min(k * sum(self.weight.shape), self.weight.numel())


def put_on(model, options):
    """Masks, an Adapter around each, on the seven layers of every block: {layer: Adapter};
    p is theirs."""
    found = {name: linear for name, linear in model.named_modules() if name.endswith(LAYERS)}
    each = [min(linear.weight.shape) for linear in found.values()]
    device = model.lm_head.weight.device
    p = nn.Parameter(torch.full((sum(each),), SCALE, device=device))
    how = [options[key] for key in ("rank", "alpha", "dropout")]
    for name, at in zip(found, torch.arange(len(p), device=device).split(each)):
        found[name] = Adapter(Masked(found[name], p, at), *how)
        model.set_submodule(name, found[name])
    return found, p.requires_grad_(True)


def parts(layer, kept):
    """{name: tensor} of an Adapter's layer: its values `kept` (q,) and adapter, or W if less."""
    base = layer.linear
    U = torch.cat((base.U[:, kept], layer.scale * layer.B), dim=1)
    V = torch.cat((base.V[kept], layer.A))
    if len(V) * sum(base.weight.shape) >= base.weight.numel():
        return {"weight": U @ V, "bias": base.bias}
    return {"U.weight": U, "V.weight": V, "U.bias": base.bias}


def share_left(bases, kept):
    """Of the size of Masked layers, where `kept`, a mask of all their values, is left."""
    left = sum(base.size(int(kept.cpu()[base.at.cpu()].sum())) for base in bases)
    return left / sum(base.weight.numel() for base in bases)


def cut(bases, scores, rate):
    """The mask of the best scores of all Masked layers that leaves at most `rate`."""
    whole = sum(base.weight.numel() for base in bases)
    budget = rate * whole
    owner = [base for base in bases for _ in base.at]
    counts = dict.fromkeys(owner, 0)
    kept = torch.zeros(len(scores), dtype=torch.bool)
    for i in scores.argsort(descending=True, stable=True).tolist():
        base = owner[i]
        counts[base] += 1
        budget -= base.size(counts[base]) - base.size(counts[base] - 1)
        if budget < 0:
            break
        kept[i] = True
    return kept


# ------------------------------------------------------------ learning
class Training:
    """Masks and adapters as they learn; a killed run finds them again in `folder`."""

    def __init__(self, layers, p, options, folder=None):
        self.layers = layers
        self.bases = [layer.linear for layer in layers.values()]
        self.p = p
        self.options = options
        self.folder = folder
        self.params = {"p": p} | {f"{name}.{key}": getattr(layer, key)
                                  for name, layer in layers.items() for key in "AB"}
        self.optimizer = torch.optim.AdamW(self.params.values(), options["lr"], weight_decay=0)
        self.cut_at = torch.zeros(len(p)).double()  # the step at which each was cut, or 0
        self.step = self.reached = 0                # now, and where --stop was
        found = folder.latest(STATE) if folder else None
        if found:
            (self.step, self.reached), tensors = found
            self.cut_at = tensors["cut"].clone()
            take_training(self.params, self.optimizer, tensors, self.step)

    @property
    def done(self):
        return self.reached and self.step - self.reached >= self.options["adapter_steps"]

    def update(self):
        """One step, by the loss's gradient, of masks and adapters, or of adapters alone."""
        if not self.reached:
            weight = self.options["weight"] * GROWTH ** self.step
            (weight * F.relu(self.p).sum() / SCALE).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        if not self.reached:
            p = self.p.detach().cpu().double()
            now = (p <= 0) & (self.cut_at == 0)
            self.cut_at[now] = self.step + p[now]   # Not in the source: p ≤ 0 tells apart
            if share_left(self.bases, p > 0) <= self.options["stop"]:
                self.reached = self.step
        if self.folder and (self.done or self.step % self.options["every"] == 0):
            tensors = training_tensors(self.params, self.optimizer) | {"cut": self.cut_at}
            self.folder.save_state(STATE, self.step, tensors, [self.step, self.reached])

    def scores(self):
        """p/SCALE of what is left, above 0; of what was cut, the later the nearer to 0."""
        left = (self.p.detach().cpu() / SCALE).clamp_min(1e-9)
        return torch.where(self.cut_at == 0, left, self.cut_at / (self.step + 1) - 1)


def learn(task, model, training):
    """Train to the end; yields (step, share left, held-out loss) now and then."""
    loss = Loss(model, task.device, task.dtype)
    while not training.done:
        training.p.requires_grad_(not training.reached)
        model.train()
        loss.add_gradient(batch_at(task, training.step))
        model.eval()
        training.update()
        if training.step % task.options["every"] == 0 or training.done:
            left = share_left(training.bases, training.p > 0)
            yield training.step, left, loss.mean(task.held)


# ------------------------------------------------------------ the command
def blocks_of(task, model, training, rate):
    """Learn; yield (l, {name: tensor}) of every block, its layers cut, then of the rest."""
    for step, left, loss in learn(task, model, training):
        say(f"step {step}: {100 * left:.1f} % left, held-out loss {loss:.4f}")
    kept = cut(training.bases, training.scores(), rate)
    for l in range(task.ckpt.cfg.n_layers + 1):
        mine = {name: layer for name, layer in training.layers.items()
                if name.startswith(f"model.layers.{l}.")}
        tensors = task.ckpt.rest(l, mine)
        for name, layer in mine.items():
            found = parts(layer, kept[layer.linear.at.cpu()])
            tensors |= {f"{name}.{part}": w.detach().to(task.ckpt.dtype)
                        for part, w in found.items() if w is not None}
        yield l, tensors


def main():
    p = arguments(__doc__)
    p.add_argument("--rate", type=float, default=0.6, help="adapters aside (default 0.6)")
    p.add_argument("--map", help="folder of masks and adapters (default OUT.map)")
    for name, value in OPTIONS.items():
        p.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value,
                       help=f"(default {value:g})")
    args = p.parse_args()
    if not 0 < args.stop <= args.rate < 1 or not args.weight:
        raise InputError(f"--rate is {args.rate}, --stop {args.stop}, --weight {args.weight}; "
                         "expected 0 < stop ≤ rate < 1 (to cut to less, train to less), weight > 0")
    task = peer_task("acip", args, {name: getattr(args, name) for name in OPTIONS})
    check_apart(args.out, map=args.map)

    def blocks():
        folder = TensorFolder(args.map or f"{Path(args.out)}.map", task.facts())
        folder.keep_others_out()
        torch.manual_seed(task.seed)
        model = own(task.ckpt.model(task.device, torch.float32))
        training = Training(*put_on(model, task.options), task.options, folder)
        yield from blocks_of(task, model, training, args.rate)
        folder.release()
    P = task.ckpt.parameters()
    flops = 12 * P * args.batch * task.windows.shape[1] * (SCALE / args.lr + args.adapter_steps)
    write_peer(task, args, (flops, 0, 16 * P), blocks(), section={"rate": args.rate})


if __name__ == "__main__":
    run(main)
