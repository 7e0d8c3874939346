"""Stage 1: text -> tokens -> windows, and the forward sweep: block inputs and Gram matrices ΣXXᵀ, block by block.

Alone, it writes the windows it would calibrate on:  python calibrate.py --ckpt demo --calib stdlib --out w.npy
"""
import random
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

from model import PLAIN, READS, rope, wide
from support.checkpoint import Checkpoint
from support.script import InputError, check_target, parser, pick_device, run
from support.texts import TOO_SHORT, Tokenizer, choose, digest, rows_of, token_array


def calibration_windows(text, ckpt, samples=256, seqlen=2048, seed=3):
    """Calibration windows (samples, seqlen) of token ids.

    As the paper's released code takes them: rows joined by a blank line (blank rows dropped), a start uniform in
    characters, 10·T characters tokenized, the first T tokens kept, shorter ones drawn again. From a 1-D array: a start
    uniform in tokens. A 2-D array is returned as it is. Raises InputError for a text shorter than one window.
    """
    rng = random.Random(seed)
    if str(text).endswith(".npy"):
        ids = token_array(text, ckpt)
        if ids.dim() == 2:
            return ids
        if len(ids) < seqlen:
            raise InputError(TOO_SHORT(text, len(ids), seqlen))
        starts = [rng.randint(0, len(ids) - seqlen) for _ in range(samples)]
        return torch.stack([ids[i:i + seqlen] for i in starts])
    joined = "\n\n".join(row for row in rows_of(text, "train") if row.strip())
    tokenizer, windows = Tokenizer(ckpt), []
    if len(joined) <= 10 * seqlen:
        raise InputError(TOO_SHORT(text, len(joined) // 10, seqlen))
    for _ in range(10 * samples):
        start = rng.randint(0, len(joined) - 10 * seqlen - 1)
        ids = tokenizer.bos + tokenizer.encode(joined[start:start + 10 * seqlen])
        if len(ids) >= seqlen:
            windows.append(ids[:seqlen])
            if len(windows) == samples:
                return torch.tensor(windows)
    raise InputError(TOO_SHORT(text, max(len(ids), 1), seqlen))


# ---------------------------------------------------------------------------------------------- the forward sweep
def recording(ops, seen):
    """The operations `ops`, whose linear also notes each layer's input: seen[layer] = x."""
    def linear(layer, x):
        seen[layer] = x.detach()
        return ops.linear(layer, x)
    return SimpleNamespace(**vars(ops) | {"linear": linear})


def add_inputs(stats, block, seen, tokens):
    """Add a batch to the statistics of a block's four distinct inputs: ΣXXᵀ (n, n) and the mean of |x| (n,), both fp64.

    The product is taken in fp32 (fp64 for an fp64 model) and summed in fp64, so that 256 windows lose no digits.
    `tokens`: how many there are in all batches.
    """
    for name in sorted(set(READS.values())):
        x = wide(seen[block.get_submodule(name)]).flatten(0, -2)                # (tokens, n)
        for key, value in ((f"{name}.gram", x.T @ x), (f"{name}.mean_abs", x.abs().sum(0) / tokens)):   # Eq. 1: ΣXXᵀ
            stats[key] = stats[key].add_(value) if key in stats else value.double()


def embed(ckpt, windows, dtype):
    """Token ids (N, T) -> the first block's input (N, T, dim), in host memory."""
    return F.embedding(windows, ckpt.tensor("model.embed_tokens.weight", dtype=dtype))


@torch.no_grad()
def forward_sweep(ckpt, h, device, gram=False, keep=None, start=0, stop=None, tokens=None):
    """Run every window through blocks start to stop - 1 (default: all); only one block's weights are in memory at a time.

    h (N, T, dim), in host memory, is replaced in place by each block's output, unless there is `keep`, a dict: it receives
    {l: block l's input} and, under `stop`, the last output. Yields (l, stats) after block l; with `gram`, stats holds what
    add_inputs collects, for `tokens` calibration tokens in all (default: these).
    """
    angles, batch = rope(ckpt.cfg, h.shape[1], device), max(1, 1024 // h.shape[1])
    stop = ckpt.cfg.n_layers if stop is None else stop
    for l in range(start, stop):
        block, stats = ckpt.block(l, device, h.dtype), {}
        if keep is not None:
            keep[l] = h
        out = h if keep is None else torch.empty_like(h)
        for i in range(0, len(h), batch):
            seen = {}
            out[i:i + batch] = block(h[i:i + batch].to(device), angles, recording(PLAIN, seen) if gram else PLAIN)
            if gram:
                add_inputs(stats, block, seen, tokens or h.shape[0] * h.shape[1])
        h = out
        yield l, stats
    if keep is not None:
        keep[stop] = h


def add_calibration_arguments(parser):
    parser.add_argument("--calib", help="calibration text: stdlib, wikitext2 (default; demo stdlib), c4, or a file's path")
    parser.add_argument("--samples", type=int, help="calibration windows (default 256; demo 64)")
    parser.add_argument("--seqlen", type=int, help="tokens a window, calibration and evaluation (default 2048; demo 256)")
    parser.add_argument("--seed", type=int, default=3)


def main():
    p = parser(__doc__)
    add_calibration_arguments(p)
    p.add_argument("--out", help="write the windows (N, T) to this .npy file")
    args = p.parse_args()
    check_target(args.out)
    ckpt = Checkpoint(args.ckpt)
    device, dtype, _ = pick_device(args.device, args.dtype)
    text, samples, seqlen = choose(ckpt, args.calib, args.samples, args.seqlen)
    windows = calibration_windows(text, ckpt, samples, seqlen, args.seed)
    print(f"{text}: {windows.shape[0]} windows of {windows.shape[1]} tokens, sha256 {digest(windows)[:16]}")
    if args.out:
        with open(args.out, "wb") as f:
            np.save(f, windows.numpy())
    print("block  condition number of ΣXXᵀ, for each distinct layer input")
    for l, stats in forward_sweep(ckpt, embed(ckpt, windows, dtype), device, gram=True):
        print(f"{l:>5}  " + "   ".join(f"{key.split('.')[1]} {torch.linalg.cond(gram):.1e}" for key, gram in stats.items()
                                       if key.endswith("gram")), flush=True)


if __name__ == "__main__":
    run(main)
