"""Stage 1: text -> windows of tokens; the forward sweep: block inputs, matrices ΣXXᵀ.

Alone, it prints how well conditioned they are and writes the windows it would calibrate
on:

    python calibrate.py --ckpt demo --calib stdlib --out w.npy

Shapes: N windows, T tokens a window, n inputs of a layer.
"""
import io
import math
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

from model import INPUTS, PLAIN, rope, wide
from support.checkpoint import Checkpoint
from support.progress import Progress, told
from support.script import (InputError, check_seed, check_writable, parser, pick_device, run,
                            write_result)
from support.texts import (digest, is_array, own_windows, rows_of, token_array, too_short,
                           with_defaults)
from support.tokenizer import Tokenizer


# ------------------------------------------------------------ windows
def calibration_windows(text, ckpt, samples=256, seqlen=2048, seed=3):
    """Calibration windows (samples, seqlen) of token ids.

    As the paper's released code takes them: rows joined by a blank line (blank rows
    dropped), a start uniform in characters, 10·T characters tokenized, the first T
    tokens kept, shorter ones drawn again. Raises InputError for a text of no more than
    10·T characters, or of which no draw has T tokens.
    """
    check_seed(seed)
    if is_array(text):
        return windows_of_array(text, ckpt, samples, seqlen, seed)
    rng = random.Random(seed)
    joined = "\n\n".join(row for row in rows_of(text, "train") if row.strip())
    tokenizer = Tokenizer(ckpt)
    span = 10 * seqlen                                          # characters
    if len(joined) <= span:
        raise too_short(text, len(joined) // 10, seqlen)
    windows = []
    for _ in range(10 * samples):
        start = rng.randint(0, len(joined) - span - 1)
        ids = tokenizer.bos + tokenizer.encode(joined[start:start + span])
        if len(ids) >= seqlen:
            windows.append(ids[:seqlen])
        if len(windows) == samples:
            return torch.tensor(windows)
    raise too_short(text, max(len(ids), 1), seqlen)


def windows_of_array(text, ckpt, samples, seqlen, seed):
    """The windows of a 2-D .npy file; of a 1-D one `samples`, uniform in their start."""
    own = own_windows(text, ckpt)
    if own is not None:
        return own
    ids = token_array(text, ckpt)
    if len(ids) < seqlen:
        raise too_short(text, len(ids), seqlen)
    rng = random.Random(seed)
    starts = [rng.randint(0, len(ids) - seqlen) for _ in range(samples)]
    return torch.stack([ids[i:i + seqlen] for i in starts])


def embed(ckpt, windows, dtype):
    """Token ids (N, T) -> the first block's input (N, T, dim), in host memory."""
    return F.embedding(windows, ckpt.tensor("model.embed_tokens.weight", dtype=dtype))


# ------------------------------------------------------------ statistics
def recording(ops, seen):
    """The operations `ops`, whose linear also notes a layer's input: seen[layer] = x."""
    def linear(layer, x):
        seen[layer] = x.detach()
        return ops.linear(layer, x)
    return SimpleNamespace(**vars(ops) | {"linear": linear})


def add(stats, key, value):
    """stats[key] += value in fp64, so that 256 windows lose no digits."""
    stats[key] = stats[key].add_(value) if key in stats else value.double()


def add_inputs(stats, block, seen, tokens):
    """Add a batch to the statistics of a block's four inputs; `tokens` in all batches.

    Products in fp32 (fp64 for an fp64 model), sums in fp64.
    """
    for name in INPUTS:
        x = wide(seen[block.get_submodule(name)]).flatten(0, -2)    # (tokens, n)
        # Eq. 1: ΣXXᵀ; x holds a token a row, so it is the paper's Xᵀ   (n, n)
        add(stats, f"{name}.gram", x.T @ x)
        # ASVD's mean of |x|   (n,)
        add(stats, f"{name}.mean_abs", x.abs().sum(0) / tokens)
        # How many tokens ΣXXᵀ is of   ()
        add(stats, f"{name}.tokens", torch.tensor(float(len(x)), device=x.device))


# ------------------------------------------------------------ the sweep
def block_forward(block, h, out, angles, gram):
    """All windows forward through a block: h (N, T, dim) its input, `out` for its output.

    `out` may be h itself. Returns the block's statistics, none without `gram`.
    """
    stats = {}
    device = angles[0].device
    N, T, _ = h.shape
    batch = max(1, 1024 // T)                               # about a thousand tokens
    for i in told("windows", range(0, N, batch)):
        seen = {}
        ops = recording(PLAIN, seen) if gram else PLAIN
        out[i:i + batch] = block(h[i:i + batch].to(device), angles, ops)
        if gram:
            add_inputs(stats, block, seen, N * T)
    return stats


@torch.no_grad()
def forward_sweep(ckpt, h, device, gram=False, keep=None, blocks=None):
    """Run every window through `blocks` (a range; default: all), one at a time in memory.

    h (N, T, dim), in host memory, the first block's input, is replaced in place by each
    block's output, unless there is `keep`, a dict: it receives {l: block l's input}
    and, under the number after the last block's, the last output. Yields (l, stats)
    after block l; with `gram`, stats holds what add_inputs collects.
    """
    blocks = range(ckpt.cfg.n_layers) if blocks is None else blocks
    angles = rope(ckpt.cfg, h.shape[1], device)
    for l in told("forward sweep: block", blocks):
        # The input is kept for the backward sweep, or overwritten.
        out = h
        if keep is not None:
            keep[l] = h
            out = torch.empty_like(h)
        # No name here holds the block or its statistics: they go when their turn is over.
        yield l, block_forward(ckpt.block(l, device, h.dtype), h, out, angles, gram)
        h = out
    if keep is not None:
        keep[blocks.stop] = h


# ------------------------------------------------------------ the command
def add_calibration_arguments(p):
    p.add_argument("--calib", help="calibration text: stdlib, wikitext2 (default; demo "
                   "stdlib), c4, or a file's path")
    p.add_argument("--samples", type=int,
                   help="calibration windows (default 256; demo 64)")
    p.add_argument("--seqlen", type=int,
                   help="tokens a window, both texts (default 2048; demo 256)")
    p.add_argument("--seed", type=int, default=3,
                   help="of the windows' starts (default 3)")
    p.add_argument("--quiet", action="store_true", help="print the results only")


def main():
    p = parser(__doc__)
    add_calibration_arguments(p)
    p.add_argument("--out", help="write the windows (N, T) to this .npy file")
    args = p.parse_args()
    if args.out and not is_array(args.out):
        raise InputError(f"--out is {args.out}; expected the name of a .npy file")
    check_writable(args.out)
    Progress(args.quiet).listen()
    ckpt = Checkpoint(args.ckpt)
    if ckpt.cfg.removed:
        raise InputError(f"{args.ckpt} has halves of blocks left out, which have no inputs; "
                         "point --ckpt at the dense checkpoint")
    device, dtype, _ = pick_device(args.device, args.dtype)
    text, samples, seqlen = with_defaults(ckpt, args.calib, args.samples, args.seqlen)
    if args.out and Path(args.out).resolve() == Path(text).resolve():
        raise InputError(f"--out is {args.out}, the text that is read; name another file")
    windows = calibration_windows(text, ckpt, samples, seqlen, args.seed)
    print(f"{text}: {windows.shape[0]} windows of {windows.shape[1]} tokens, "
          f"sha256 {digest(windows)[:16]}")
    if args.out:
        content = io.BytesIO()
        np.save(content, windows.numpy())
        write_result(args.out, content.getvalue())
    print("block  condition number of ΣXXᵀ, for each distinct layer input")
    for l, stats in forward_sweep(ckpt, embed(ckpt, windows, dtype), device, gram=True):
        conditions = []
        for name in INPUTS:
            gram = stats[f"{name}.gram"]
            # Of an input that is always zero, 0/0.
            condition = torch.linalg.cond(gram).item() if gram.any() else math.inf
            conditions.append(f"{name.split('.')[1]} {condition:.1e}")
        print(f"{l:>5}  " + "   ".join(conditions), flush=True)


if __name__ == "__main__":
    run(main)
