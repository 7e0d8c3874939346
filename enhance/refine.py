"""Block refinement: each compressed block learns to give the dense block's output.

    python enhance/refine.py --ckpt out/demo-air-0.6 --out out/demo-refined

Block by block, from the first: all parameters of the compressed block (factors, norms,
biases) are trained so that its output on the compressed model's stream X̂ comes close to
the dense block's output on the dense model's stream X. In memory are the two streams and
one block of each model. Source: AA-SVD (Sinha and Fleuret, 2026), whose defaults these are.

Shapes: N windows, T tokens a window, dim the width of the streams.
"""
import copy
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))        # from any folder
from calibrate import embed
from model import LowRank, rope, wide
from support.learning import advance, balance, check_finite, own, products, rate_at
from support.progress import told
from support.result import device_bytes, dtypes_of, make_plan, weights_of, write_blocks
from support.script import run
from support.task import arguments, dense_of, prepare

MICRO_BATCH = 2048              # tokens whose activations are in memory at a time


# ------------------------------------------------------------ the error
def squared(y, target):
    """AA-SVD: ‖f̂(X̂) − f(X)‖², a mean over tokens and channels; y, target (…, dim)."""
    return (y - target).square().mean()


def relative(y, target):
    """Not in the paper: each token's error over its own energy, so that the few tokens of
    massive activations, a thousand times the others', do not stand for all."""
    energy = target.square().mean(-1)
    return ((y - target).square().mean(-1) / energy).mean()


ERRORS = {"squared": squared, "relative": relative}


# ------------------------------------------------------------ a block
class Pairs(NamedTuple):
    """What a block is given and what it should give, of the same windows."""

    x: torch.Tensor             # (N, T, dim) the compressed stream X̂ before the block
    y: torch.Tensor             # (N, T, dim) the dense stream after the dense block, f(X)


@dataclass
class Recipe:
    """How a block learns."""

    epochs: int
    lr: float                   # its peak
    weight_decay: float
    batch: int                  # windows a step
    error: str                  # one of ERRORS
    angles: tuple               # RoPE's
    dtype: torch.dtype          # of matrix products; the parameters are in fp32
    stored: dict                # {parameter: the dtype it is rounded to in the end}

    def error_of(self, block, x, y):
        """The error of a micro-batch (B, T, dim), on the device."""
        with products(self.angles[0].device, self.dtype):
            out = block(x.to(self.angles[0]), self.angles)
        return ERRORS[self.error](wide(out), y.to(self.angles[0]))

    def rounded(self, block):
        """{name: tensor} of the block as it will be stored."""
        return {key: w.to(self.stored[key], copy=True) for key, w in block.state_dict().items()}


def micro_batches(pairs):
    batch = max(1, MICRO_BATCH // pairs.x.shape[1])
    return zip(pairs.x.split(batch), pairs.y.split(batch))


@torch.no_grad()
def error_on(block, pairs, recipe):
    """Mean error of a block over all windows."""
    total = sum(recipe.error_of(block, x, y).item() * len(x) for x, y in micro_batches(pairs))
    return total / len(pairs.x)


def step(block, pairs, optimizer, recipe):
    """One step by the mean error over a batch of windows, a micro-batch at a time."""
    for x, y in micro_batches(pairs):
        (recipe.error_of(block, x, y) * (len(x) / len(pairs.x))).backward()
    torch.nn.utils.clip_grad_norm_(block.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def refine_block(block, pairs, held, recipe, seed):
    """Train a block (fp32, in place); the epoch that is best on the Pairs `held`, with the
    parameters rounded as they are stored, is kept; the start is one of them.

    Returns {"before", "after": the error on held, "epoch": the one kept}.
    """
    kept = recipe.rounded(block)
    start = error_on(block, held, recipe)
    check_finite(start, "a block's error on held-out windows")
    found = {"before": start, "after": start, "epoch": 0}
    balance(block)
    # Adam's usual ε, 1e-8, is above the gradients of a small stream's squared error.
    optimizer = torch.optim.AdamW(block.parameters(), weight_decay=recipe.weight_decay, eps=1e-15)
    an_epoch = -(-len(pairs.x) // recipe.batch)
    steps = recipe.epochs * an_epoch
    order = torch.Generator().manual_seed(seed)
    for epoch in told("epochs", range(recipe.epochs)):
        batches = torch.randperm(len(pairs.x), generator=order).split(recipe.batch)
        for i, picked in enumerate(batches, epoch * an_epoch):
            # 10 % of the steps warm up, then a cosine to a tenth.
            optimizer.param_groups[0]["lr"] = recipe.lr * rate_at(i, steps, steps // 10, 0.1)
            step(block, Pairs(pairs.x[picked], pairs.y[picked]), optimizer, recipe)
        exact = copy.deepcopy(block.state_dict())
        block.load_state_dict(recipe.rounded(block))
        error = error_on(block, held, recipe)
        if error < found["after"]:
            found |= {"after": error, "epoch": epoch + 1}
            kept = recipe.rounded(block)
        block.load_state_dict(exact)
    block.load_state_dict(kept)
    return found


def refine(task, dense, finished):
    """Yield (l, {name: tensor} of the refined block l as stored, what refine_block found).

    finished(l): the weights of a block that is refined already, or None.
    """
    windows = torch.cat((task.windows, task.held))
    n = len(task.windows)
    x = embed(task.ckpt, windows, task.dtype)           # the compressed stream X̂ (N, T, dim)
    y = embed(dense, windows, task.dtype)               # the dense one, X
    angles = rope(task.ckpt.cfg, windows.shape[1], task.device)
    recipe = Recipe(**task.options, angles=angles, dtype=task.dtype, stored={})
    for l in told("block", range(task.ckpt.cfg.n_layers)):
        # y is now what block l of the dense model makes of X: what is to be learnt.
        advance(dense.block(l, task.device, task.dtype), y, angles)
        block = own(task.ckpt.block(l, task.device, torch.float32))
        state = finished(l)
        if state is None:
            block.requires_grad_(True)
            # A block that was left dense stays as it is.
            low_rank = any(isinstance(layer, LowRank) for layer in block.modules())
            how = replace(recipe, stored=dtypes_of(task.ckpt, l), epochs=recipe.epochs * low_rank)
            found = refine_block(block, Pairs(x[:n], y[:n]), Pairs(x[n:], y[n:]), how,
                                 task.seed + l)
            state = how.rounded(block)
            yield l, {f"model.layers.{l}.{name}": w for name, w in state.items()}, found
        block.load_state_dict(state)
        advance(block.requires_grad_(False).to(task.dtype), x, angles)


# ------------------------------------------------------------ the command
def plan(task, dense):
    """The plan's line. Raises InputError for what does not fit."""
    cfg = task.ckpt.cfg
    N, T = task.windows.shape
    held = len(task.held) * T
    small = max(weights_of(task.ckpt, l) for l in range(cfg.n_layers))
    whole = weights_of(dense, 0)
    epochs = task.options["epochs"]
    learning = small * (6 * epochs * N * T + 2 * (epochs + 1) * held)
    flops = cfg.n_layers * (learning + 2 * (whole + small) * (N * T + held))
    streams = 2 * (N * T + held) * cfg.dim * task.dtype.itemsize
    block = device_bytes(cfg, (small, whole), max(MICRO_BATCH, T), task.dtype)
    return make_plan(task, flops, streams, block)


def line(found):
    return (f"error on held-out windows {found['before']:.3e} -> {found['after']:.3e} "
            f"(epoch {found['epoch']})")


def main():
    p = arguments(__doc__)
    p.add_argument("--epochs", type=int, default=25, help="(default 25)")
    p.add_argument("--lr", type=float, default=1e-4, help="its peak (default 1e-4)")
    p.add_argument("--weight-decay", type=float, default=0.01, help="(default 0.01)")
    p.add_argument("--batch", type=int, default=32, help="windows a step (default 32)")
    p.add_argument("--error", choices=ERRORS, default="squared", help="(default AA-SVD's)")
    args = p.parse_args()
    names = ("epochs", "lr", "weight_decay", "batch", "error")
    task = prepare("refine", args, {name: getattr(args, name) for name in names})
    dense = dense_of(task.ckpt, args.dense)
    write_blocks(task, args, plan(task, dense), lambda finished: refine(task, dense, finished),
                 line)


if __name__ == "__main__":
    run(main)
