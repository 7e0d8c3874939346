"""Quantization of the factors: each number in 8, 4, 3 or 2 bits, packed on disk.

    python enhance/quantize.py --ckpt out/demo-air-0.6 --bits 4 --out out/demo-air-0.6-4bit

Block by block in the compressed model's stream: V is quantized by its inputs, then U by its
own, which come *through the quantized V* (Table 6). Two roundings: to the nearest code (RTN),
and GPTQ's (Frantar et al., 2023), which moves each column's error to those that follow. Not in
the paper: --smooth and --rotate even out what is rounded, --clip narrows its grids, --refit has
U make up for what V lost. All of this project's commands read the result.

Shapes: m out, n in; a factor (rows, columns), of which `group` columns share a grid.
"""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))        # from any folder
from calibrate import embed
from model import LowRank, rope
from support.anchored import Streams
from support.checkpoint import result_bytes
from support.even import EVEN, clipped, even_out, refitted
from support.learning import advance, input_grams, own
from support.packed import WIDTHS, dequantize, grid_of, packed_tensors
from support.progress import told
from support.result import make_plan, weights_of, with_packed, write_blocks
from support.script import run
from support.task import arguments, prepare

DAMP = 0.01             # of the Hessian's mean diagonal, added to it (GPTQ's)
BLOCK = 128             # columns whose errors are gathered before they are moved on (GPTQ's)


# ------------------------------------------------------------ rounding
def inverse_factor(H):
    """The upper Cholesky factor (n, n) fp64 of H⁻¹, H damped; inputs that are always 0 count
    as independent, and as the mean of the others."""
    H = H.double().clone()
    size = H.diagonal()
    size[size == 0] = size[size > 0].mean() if size.any() else 1
    size.add_(DAMP * size.mean())
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)


def gptq(W, H, bits, group, dtype, grid_of=grid_of):
    """GPTQ: column by column, its rounding error spread over those that follow.

    W (rows, columns) fp32; H (columns, columns) = ΣXXᵀ of its inputs, of any scale; the
    identity makes it round to nearest (RTN). With T the upper Cholesky factor of H⁻¹ the
    later columns make up for column j by its error over T_jj, times T's row j. A group's
    grid is `grid_of` its columns as they are by then. Returns codes (rows, columns), scales
    and zeros (rows, groups).
    """
    W = W.clone()
    T = inverse_factor(H).to(W.dtype)
    columns = W.shape[1]
    codes = torch.empty_like(W)
    grids = []
    for start in range(0, columns, group or BLOCK):
        stop = min(start + (group or BLOCK), columns)
        if group or start == 0:
            grid = grid_of(W[:, start:stop] if group else W, bits, dtype)
            grids.append(grid)
        errors = torch.empty_like(W[:, start:stop])
        for j in range(start, stop):
            column = W[:, j:j + 1]
            codes[:, j:j + 1] = grid.codes(column)
            # Eq. 2: (w − quant(w)) / [H⁻¹]_jj · (H⁻¹)_j = (w − quant(w)) / T_jj · T_j
            error = (column - grid.values(codes[:, j:j + 1])) / T[j, j]
            W[:, j + 1:stop] -= error * T[j, j + 1:stop]
            errors[:, j - start:j - start + 1] = error
        # Eq. 4, lazily: the columns beyond the block, once for all of its own.
        W[:, stop:] -= errors @ T[start:stop, stop:]
    scales, zeros, _ = zip(*grids)
    return codes, torch.cat(scales, 1), torch.cat(zeros, 1)


def output_error(W, Q, H):
    """tr(D H Dᵀ), D = W − Q: the squared error of the outputs."""
    D = (W - Q).double()
    return ((D @ H.double()) * D).sum().item()


def quantize_factor(W, H, options, dtype):
    """One factor -> (what `gptq` returns, the values, tr(D H Dᵀ), that of RTN).

    Not in the paper: where GPTQ's error in the output is above RTN's, RTN's codes are kept.
    """
    W = W.float()
    identity = torch.eye(len(H), device=H.device)
    grid = clipped if options["clip"] else grid_of
    hessians = {"rtn": identity, "gptq": H}
    found = {}
    for name in dict.fromkeys(("rtn", options["rounding"])):
        made = gptq(W, hessians[name], options["bits"], options["group"], dtype, grid)
        Q = dequantize(*made, options["group"])
        found[name] = made, Q, output_error(W, Q, H)
    best = min(found.values(), key=lambda each: each[2])
    return *best, found["rtn"][2]


# ------------------------------------------------------------ a block
def factors_of(block, which):
    """{name: Linear} of the block's factors "V" or "U"."""
    return {f"{name}.{which}": getattr(layer, which)
            for name, layer in block.named_modules() if isinstance(layer, LowRank)}


def quantize_block(block, streams, angles, options, dtype):
    """Quantize a block's factors in place, V first.

    streams: what comes before the block, (N, T, dim), of the model as it was (with "refit")
    and as it is quantized. Returns ({name: tensor} as stored, {factor: [error, RTN's]}).
    """
    tensors = {}
    errors = {}
    if options["refit"]:
        both = Streams({}, own(block), streams, angles, share=1.0)
        both.compressed = block                                 # which is rounded in place
    for which in ("V", "U"):
        layers = factors_of(block, which)
        # The inputs of U come through the V that was just quantized.
        grams = input_grams(block, layers, streams[-1], angles)
        for name, layer in layers.items():
            W = layer.weight
            gram = grams[name]
            if which == "U" and options["refit"]:
                W, gram = refitted(name.removesuffix(".U"), both)
            made, Q, *errors[name] = quantize_factor(W, gram, options, dtype)
            layer.weight.copy_(Q.to(dtype))
            tensors |= packed_tensors(f"{name}.weight", *made, options["bits"])
    return tensors, errors


@torch.no_grad()
def quantize(task, finished):
    """Yield (l, {name: tensor} of block l as stored, {factor: [error, RTN's]}).

    finished(l): the weights of a block that is quantized already, or None.
    """
    h = embed(task.ckpt, task.windows, task.dtype)
    streams = (h.clone(), h) if task.options["refit"] else (h,)
    angles = rope(task.ckpt.cfg, h.shape[1], task.device)
    for l in told("block", range(task.ckpt.cfg.n_layers)):
        whole = task.ckpt.block(l, task.device, task.dtype)
        block = own(whole)
        state = finished(l)
        if state is None:
            scales = even_out(block, task.ckpt.cfg, task.options, task.seed + l)
            packed, errors = quantize_block(block, streams, angles, task.options,
                                            task.ckpt.dtype)
            # Biases, norms and what was left dense stay as they are, but for the smoothing.
            yield l, with_packed(task.ckpt, l, packed, scales), errors
        else:
            block.load_state_dict(state)
        for each, stream in zip((block, whole), streams[::-1]):
            advance(each, stream, angles)


# ------------------------------------------------------------ the command
def plan(task):
    """The plan's line. Raises InputError for what does not fit."""
    cfg = task.ckpt.cfg
    tokens = task.windows.numel()
    numbers = max(weights_of(task.ckpt, l) for l in range(cfg.n_layers))
    refits = task.options["refit"]
    # Three passes, of both streams seven, and ΣXXᵀ; a rounding moves its error to all columns.
    flops = cfg.n_layers * numbers * ((10 + 8 * refits) * tokens + 4 * cfg.hidden)
    stream = (2 + refits) * tokens * cfg.dim * task.dtype.itemsize
    memory = (12 + 8 * refits) * numbers + 16 * 7 * cfg.hidden**2
    disk = {"result": result_bytes(task.ckpt, {}, task.options)}
    return make_plan(task, flops, stream, memory, disk)


def line(errors):
    """How far the outputs of the factors moved, against RTN."""
    if not errors:
        return "dense, left as it is"
    ratios = [error / nearest for error, nearest in errors.values() if nearest]
    return f"error in the outputs {sum(ratios) / max(1, len(ratios)):.2f} of RTN's"


def main():
    p = arguments(__doc__)
    p.add_argument("--bits", type=int, choices=WIDTHS, default=4, help="(default 4)")
    p.add_argument("--group", type=int, default=0, help="columns a grid (default 0: all)")
    p.add_argument("--rounding", choices=("gptq", "rtn"), default="gptq", help="(default gptq)")
    for name, what in EVEN.items():
        p.add_argument(f"--{name}", action="store_true", help=what)
    args = p.parse_args()
    grid = {"bits": args.bits, "group": args.group}
    how = {name: vars(args)[name] for name in ("rounding", *EVEN)}
    task = prepare("quantize", args, grid | how)
    write_blocks(task, args, plan(task), lambda done: quantize(task, done), line,
                 {"quantized": grid})


if __name__ == "__main__":
    run(main)
