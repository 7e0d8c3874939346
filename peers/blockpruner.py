"""BlockPruner: attention and MLP halves left out, one by one, each time the least missed.

    python peers/blockpruner.py --ckpt demo --rate 0.8 --out out/demo-pruned

A half is left out, the perplexity of the calibration windows is taken, the half is put back;
the one whose absence costs least is removed for good, and all that are left are tried again,
until what the blocks hold is at most `rate` of what it was. Source: BlockPruner (Zhong et
al., 2025).

Shapes: N windows, T tokens a window, dim the width of the stream.
"""
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))        # from any folder
from calibrate import embed
from model import rope, to_logits
from support.learning import check_finite
from support.peers import arguments, peer_task, write_peer
from support.progress import say, told
from support.script import InputError, run

HALVES = ("self_attn", "mlp")


# ------------------------------------------------------------ sizes
def every_half(cfg):
    """Names of all halves, in the order in which the stream goes through them."""
    return [f"model.layers.{l}.{half}" for l in range(cfg.n_layers) for half in HALVES]


def sizes(ckpt):
    """{half: parameters}."""
    found = dict.fromkeys(every_half(ckpt.cfg), 0)
    for name in ckpt.names:
        half = ".".join(name.split(".")[:4])
        if half in found:
            found[half] += math.prod(ckpt.tensors[name].shape)
    return found


# ------------------------------------------------------------ perplexity
class Stream:
    """The calibration windows before every half of a model from which some are left out."""

    def __init__(self, ckpt, windows, device, dtype):
        self.device = device
        self.model = ckpt.model(device, dtype)
        self.windows = windows
        self.halves = every_half(ckpt.cfg)
        self.angles = rope(ckpt.cfg, windows.shape[1], device)
        self.before = {self.halves[0]: embed(ckpt, windows, dtype)}     # {half: (N, T, dim)}
        self.removed = set()

    @torch.no_grad()
    def through(self, name, h):
        """The stream h (n, T, dim) behind a half of the model."""
        l, half = name.split(".")[2:]
        block = self.model.model.layers[int(l)]
        kept = {each: getattr(block, each) for each in HALVES}
        for each in HALVES:
            setattr(block, each, kept[each] if each == half else None)
        out = block(h.to(self.device), self.angles)
        for each in HALVES:
            setattr(block, each, kept[each])
        return out

    def update(self):
        """The stream before every half, with what is removed by now left out."""
        h = self.before[self.halves[0]]
        for name in self.halves:
            self.before[name] = h
            if name not in self.removed:
                h = torch.cat([self.through(name, each).cpu() for each in h.split(1)])

    @torch.no_grad()
    def loss_without(self, name):
        """Mean loss of a token, nats, with one half more left out."""
        later = self.halves[self.halves.index(name) + 1:]
        head = (self.model.model.norm.weight, self.model.lm_head)
        total = 0.0
        for i, ids in enumerate(self.windows.split(1)):
            h = self.before[name][i:i + 1].to(self.device)
            for each in later:
                if each not in self.removed:
                    h = self.through(each, h)
            logits = to_logits(h[:, :-1], head, self.model.cfg).float()
            targets = ids[:, 1:].flatten().to(logits.device)
            total += F.cross_entropy(logits.flatten(0, 1), targets, reduction="sum").item()
        return total / self.windows[:, 1:].numel()


def prune(ckpt, stream, budget):
    """Yield (half, loss without it) of each half that is removed, until `budget` parameters
    or fewer are left in the blocks. The first of several that cost the same goes."""
    size = sizes(ckpt)
    left = sum(n for name, n in size.items() if name not in stream.removed)
    while left > budget:
        stream.update()
        candidates = [name for name in stream.halves if name not in stream.removed]
        losses = {name: stream.loss_without(name) for name in told("halves", candidates)}
        check_finite(list(losses.values()), "the loss without a half")
        chosen = min(losses, key=losses.get)
        stream.removed.add(chosen)
        left -= size[chosen]
        yield chosen, losses[chosen]


# ------------------------------------------------------------ the command
def kept_blocks(ckpt, removed):
    """(l, {name: tensor}) of every block without the removed halves, then of the rest."""
    for l in range(ckpt.cfg.n_layers + 1):
        yield l, {name: w for name, w in ckpt.rest(l).items()
                  if ".".join(name.split(".")[:4]) not in removed}


def main():
    p = arguments(__doc__)
    p.add_argument("--rate", type=float, default=0.8,
                   help="share of the blocks' parameters that stays (default 0.8)")
    args = p.parse_args()
    if not 0 < args.rate < 1:
        raise InputError(f"--rate is {args.rate}; expected above 0, below 1")
    task = peer_task("blockpruner", args, {"rate": args.rate})
    ckpt = task.ckpt
    size = sizes(ckpt)
    budget = args.rate * sum(size.values())
    rounds = len(size) * (1 - args.rate)
    # Each round tries every half that is left, from itself on.
    flops = rounds * len(size) * ckpt.parameters() * task.windows.numel()
    streams = len(size) * task.windows.numel() * ckpt.cfg.dim * task.dtype.itemsize
    weights = ckpt.parameters() * task.dtype.itemsize

    def blocks():
        stream = Stream(ckpt, task.windows, task.device, task.dtype)
        for half, loss in prune(ckpt, stream, budget):
            removed.append(half)
            say(f"without {half}: perplexity {math.exp(loss):.3f}")
        yield from kept_blocks(ckpt, set(removed))

    removed = []
    write_peer(task, args, (flops, streams, weights), blocks(), section={"removed": removed})


if __name__ == "__main__":
    run(main)
