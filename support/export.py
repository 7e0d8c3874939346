"""A result as an ordinary checkpoint: W = UV multiplied out, for tools without low rank.

    python support/export.py out/demo-air-0.6 --dense out/demo-air-0.6-dense

llama.cpp, TensorRT-LLM and whatever else reads the source's architecture loads it. It is
as large as the source was, so nothing is saved, and each product is rounded to the
checkpoint's dtype: how far that moves the logits is printed.
"""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))        # from any folder
from eval_ppl import last_states
from model import to_logits
from support.checkpoint import Checkpoint, Writer, part_of, result_bytes, written_bytes
from support.config import dense_config
from support.progress import Progress
from support.script import InputError, Parser, check_apart, run

WINDOWS = 4, 128        # random token ids on which both models are compared


def low_rank(ckpt):
    """{layer: (m, n, k)} of the layers stored as factors."""
    found = {}
    for layer, k in ckpt.cfg.ranks.items():
        if layer + ".U.weight" in ckpt.tensors:
            m = ckpt.tensors[layer + ".U.weight"].shape[0]
            n = ckpt.tensors[layer + ".V.weight"].shape[1]
            found[layer] = m, n, k
    return found


def multiply_out(ckpt, l):
    """{name: tensor} of block l with W = UV; l = n_layers: what belongs to no block.

    Products in fp32, then in their factors' dtype; what is dense stays as it is.
    """
    block = f"model.layers.{l}."
    layers = [layer for layer in low_rank(ckpt) if layer.startswith(block)]
    factors = [layer + factor for layer in layers for factor in (".U", ".V")]
    tensors = ckpt.rest(l, factors)
    for layer in layers:
        U = ckpt.tensor(layer + ".U.weight")                            # (m, k)
        V = ckpt.tensor(layer + ".V.weight")                            # (k, n)
        tensors[layer + ".weight"] = (U.float() @ V.float()).to(U.dtype)
        if layer + ".U.bias" in ckpt.tensors:
            tensors[layer + ".bias"] = ckpt.tensor(layer + ".U.bias")
    return tensors


@torch.no_grad()
def moved(ckpt, dense):
    """How far apart the logits of a result and its export are, in fp32 on random ids.

    (Root mean square of the differences, their greatest, root mean square of the result's
    logits about each token's mean.) Block by block: in memory are one block and the head.
    """
    N, T = WINDOWS
    size = N, min(T, ckpt.cfg.context)
    ids = torch.randint(ckpt.cfg.vocab, size, generator=torch.Generator().manual_seed(0))
    device = torch.device("cpu")
    states = [last_states(each, ids, device, torch.float32)[0] for each in (ckpt, dense)]
    head = ckpt.head(device, torch.float32)                 # the same of both
    greatest = squares = own = 0.0
    # One window of logits at a time, (1, T, vocab) of each.
    for pair in zip(*(h.split(1) for h in states)):
        ours, theirs = (to_logits(h, head, ckpt.cfg).double() for h in pair)
        greatest = max(greatest, (ours - theirs).abs().max().item())
        squares += (ours - theirs).square().mean().item() / N
        own += ours.var(-1, unbiased=False).mean().item() / N
    return squares ** 0.5, greatest, own ** 0.5


def check(path, out):
    """The Checkpoint at `path`; InputError unless it is a result and `out` is free."""
    ckpt = Checkpoint(path)
    if not low_rank(ckpt):
        sliced = ckpt.cfg.turned or ckpt.cfg.removed
        kind = "has" if sliced else "is dense: it has"
        raise InputError(f"{path} {kind} no low-rank layers to multiply out; "
                         "point at a result of air.py")
    # An older export, too: nothing tells it from an original, which must not be lost.
    if Path(out).exists():
        raise InputError(f"{out} already exists; name another folder for --dense, "
                         "or delete it")
    check_apart(ckpt.folder, dense=out)     # air.py replaces a result as a whole
    return ckpt


def main():
    p = Parser(__doc__)
    p.add_argument("result", help="folder that air.py wrote")
    p.add_argument("--dense", required=True, metavar="OUT",
                   help="new folder for the ordinary checkpoint")
    args = p.parse_args()
    ckpt = check(args.result, args.dense)
    cut = low_rank(ckpt)
    added = sum(m * n - k * (m + n) for m, n, k in cut.values())
    need = result_bytes(ckpt, {}) + added * ckpt.dtype.itemsize
    blocks = ckpt.cfg.n_layers
    progress = Progress()

    with Writer(args.dense, written_bytes(need)) as writer:
        progress.begin(blocks + 1)
        for l in range(blocks + 1):
            writer.add(part_of(l), multiply_out(ckpt, l))
            progress.step(f"block {l}" if l < blocks else "embedding and head")
        writer.finish(dense_config(ckpt.raw), ckpt.extras())

    # Read back: what is counted and compared is what was written.
    dense = Checkpoint(args.dense)
    size = dense.parameters() * dense.dtype.itemsize / 1e9
    print(f"dense: {len(cut)} layers multiplied out, {ckpt.parameters():,} -> "
          f"{dense.parameters():,} parameters, {size:.2f} GB as before AIR: {args.dense}")
    rms, greatest, own = moved(ckpt, dense)
    print(f"UV in {str(ckpt.dtype)[6:]} moves the logits by {rms:.1e} (root mean square; "
          f"at most {greatest:.1e}) of {own:.2g}   {WINDOWS[0]} windows of random ids")


if __name__ == "__main__":
    run(main)
