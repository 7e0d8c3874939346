"""What anchored weights (air.py --anchor, --method aasvd) are fitted to: both streams' inputs,
collected as a block is decomposed.

Not in the paper. Each weight reads the stream X̂ of the model that is compressed up to there,
and is anchored to what the dense model's stream X gives: q, k and v first, then o behind them,
then gate and up, then down, each with fresh statistics. Source: Sinha and Fleuret, 2026, whose
anchor is X alone; share·X + (1 − share)·X̂ does not chase all that was lost.
"""
import copy
from types import SimpleNamespace

import torch

from calibrate import add, block_forward
from model import INPUTS, PLAIN, LowRank, rope, wide
from support.checkpoint import part_of
from support.progress import told


class Reached(Exception):
    """The input of a layer, on the way through its block."""


class Streams(dict):
    """The statistics of one block; those of an input are collected when they are first asked
    for, behind the layers that have been replaced by then.

    collected: what the dense model's gradients gave; dense, small (N, T, dim): both streams
    before the block, in the host's memory.
    """

    def __init__(self, collected, block, streams, angles, share):
        super().__init__(collected)
        self.share = share
        self.block = block
        self.compressed = copy.deepcopy(block)
        self.dense, self.small = streams
        self.angles = angles

    def get(self, key, default=None):
        reader = key.removesuffix(".gram")
        if reader in INPUTS and key not in self:
            self.collect(reader)
        return super().get(key, default)

    @torch.no_grad()
    def collect(self, reader):
        """ΣX̂X̂ᵀ, Σ(share·X + (1 − share)·X̂)X̂ᵀ, mean |x̂| and the tokens of one input; products
        in fp32, sums in fp64."""
        batch = max(1, 1024 // self.dense.shape[1])                 # about a thousand tokens
        for i in range(0, len(self.dense), batch):
            x = self.inputs(self.block, self.dense[i:i + batch], reader)
            x_hat = self.inputs(self.compressed, self.small[i:i + batch], reader)
            add(self, f"{reader}.gram", x_hat.T @ x_hat)
            add(self, f"{reader}.cross", torch.lerp(x_hat, x, self.share).T @ x_hat)
            add(self, f"{reader}.mean_abs", x_hat.abs().sum(0) / self.dense[..., 0].numel())
            add(self, f"{reader}.tokens", torch.tensor(float(len(x)), device=x.device))
        if not torch.isfinite(self[f"{reader}.gram"]).all():
            raise RuntimeError(f"the inputs of {reader} are not finite: activations "
                               "overflowed; use bfloat16 or float32")

    def inputs(self, block, h, reader):
        """What layer `reader` of a block reads, (tokens, n), h (B, T, dim) being the block's
        input."""
        layer = block.get_submodule(reader)

        def linear(each, x):
            if each is layer:
                raise Reached(x)                        # what lies behind it is not computed
            return PLAIN.linear(each, x)
        try:
            block(h.to(self.angles[0].device), self.angles,
                  SimpleNamespace(**vars(PLAIN) | {"linear": linear}))
        except Reached as found:
            return wide(found.args[0]).flatten(0, -2)

    @torch.no_grad()
    def replace(self, name, U, V):
        """Put factors U (m, k), V (k, n) in place of layer `name` of the compressed block."""
        whole = self.compressed.get_submodule(name)
        layer = LowRank(V.shape[1], U.shape[0], len(V), whole.bias is not None)
        layer.to(whole.weight)                                  # its device and dtype
        layer.U.weight.copy_(U)
        layer.V.weight.copy_(V)
        if whole.bias is not None:
            layer.U.bias.copy_(whole.bias)
        self.compressed.set_submodule(name, layer)

    def put_back(self, l, tensors):
        """Replace the layers of block l by what an earlier run wrote, {name: tensor}."""
        for name, U in tensors.items():
            if name.endswith(".U.weight"):
                layer = name.removesuffix(".U.weight")
                V = tensors[layer + ".V.weight"]
                self.replace(layer.removeprefix(f"model.layers.{l}."), U, V)


def of_gradients(sweep):
    """{l: {key: tensor in the host's memory}} of a sweep's (l, stats), inputs left out."""
    found = {}
    for l, stats in sweep:
        own = [key for key in stats if not key.endswith((".gram", ".mean_abs", ".tokens"))]
        found[l] = {key: stats[key].cpu() for key in own}
        del stats                                  # before the next block's are collected
    return found


@torch.no_grad()
def anchored_sweep(ckpt, h, device, blocks, share, sweep=()):
    """Yield (l, Streams) of every block in `blocks`, whose layers the caller replaces.

    h (N, T, dim), the first block's input, is replaced in place. sweep: (l, stats) of the
    dense model's backward sweep, for a method that reads gradients; it goes from the last
    block to the first and is held, the streams go from the first to the last.
    """
    collected = of_gradients(sweep)
    streams = h, h.clone()                                          # X, X̂
    angles = rope(ckpt.cfg, h.shape[1], device)
    for l in told("block", range(max(blocks) + 1)):
        own = {key: x.to(device) for key, x in collected.pop(l, {}).items()}
        stats = Streams(own, ckpt.block(l, device, h.dtype), streams, angles, share)
        if l in blocks:
            yield l, stats
        for block, stream in zip((stats.block, stats.compressed), streams):
            block_forward(block, stream, stream, angles, gram=False)


def going_on(sweep, left, folder):
    """An `anchored_sweep`'s (l, Streams) of the blocks `left`, behind those that an earlier run
    wrote into `folder`, a TensorFolder."""
    for l, stats in sweep:
        if l in left:
            yield l, stats
        else:
            stats.put_back(l, folder.load(part_of(l)))
