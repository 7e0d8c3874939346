"""AIR: Activation- and Influence-Aware Ranks. Compress every linear layer of a LLaMA-family checkpoint to two factors.

    python air.py                                               # the bundled demo, about a minute
    python air.py --ckpt llama7b.safetensors --rate 0.6         # rate: the fraction of parameters kept

Read the functions from `profile` to `native_factors` beside Section 3 and Algorithm 1 of the paper.
Shapes: W (m, n), S (n, n), I (m, n), U (m, k), sigma (k,), Vh (k, n), k rank.
"""
import math
import os
import re
import resource
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import numpy
import torch

from calibrate import add_calibration_arguments, calibration_windows, embed, forward_sweep
from eval_ppl import evaluate, evaluation_windows
from influence import SIGNALS, backward_sweep, check_signal, start_gradient
from model import LAYERS, READS
from support import fast
from support.checkpoint import Checkpoint, Folder, Writer
from support.large import Spill, add_up, divide, end_processes, from_first, gather, plan, processes, start_processes
from support.script import InputError, check_target, parser, pick_device, run, write_json
from support.texts import choose, digest, token_array

FAST_FROM = 1024        # where both sides are as wide, fast.py computes the same with less work; math.inf keeps to these lines

# ---------------------------------------------------------------------------------------------- the method
def rank_at(rate, m, n):
    """The rank that keeps `rate` of m·n parameters: the largest k with k(m+n) <= rate·m·n (Section 4.1)."""
    return int(rate * m * n / (m + n) + 1e-9)       # 1e-9: a product that is whole must not be rounded below itself


def profile(gram):
    """Eq. 1: S = cholesky(ΣXXᵀ), lower triangular, in fp64.

    Takes ΣXXᵀ (n, n); returns (S (n, n) fp64, shift), shift being what had to be added to the diagonal, relative to its
    mean: 0 for a numerically positive definite matrix, which more tokens than inputs usually give.
    """
    gram = gram.double()
    mean = gram.diagonal().mean()
    if mean == 0:                                                       # an input that is always zero: every S will do
        return torch.eye(len(gram), dtype=gram.dtype, device=gram.device), 1.0
    # Not in the paper: the repair. Released code differs: it adds max(1.1·|λmin|, 1e-6·λmax, 1e-4), absolute in the last term.
    info = torch.empty((), dtype=torch.int32, device=gram.device)
    for shift in (0.0, *(10.0 ** e for e in range(-9, 1))):
        S = gram.clone()
        S.diagonal().add_(shift * mean)
        torch.linalg.cholesky_ex(S, out=(S, info))                      # in place: S is as large as ΣXXᵀ
        # A pivot at the level of rounding is luck, not definiteness: S⁻¹ would amplify noise.
        if not info and S.diagonal().min() ** 2 > len(gram) * 2e-16 * mean:
            return S, shift
    raise RuntimeError("ΣXXᵀ is not finite")


def normalise(I, scale="mean"):
    """Influence (m, n), any positive scale -> unit mean per layer (Section 3.1), or the released code's mean 1, maximum 100."""
    if scale == "mean":
        return I / I.mean().clamp_min(torch.finfo(I.dtype).tiny)
    # Released code differs: up to ten rounds that bend the distribution until its mean is 1 and its maximum 100, within 2 %.
    for _ in range(10):
        I = I - I.min()
        I = I / I.max().clamp_min(torch.finfo(I.dtype).tiny) + 1e-12
        I = I / I.mean()
        I = I ** (math.log(100) / math.log(I.max())) if I.max() > 1 else I
        I = I / I.mean()
        if abs(I.mean() - 1) < 0.02 and abs(I.max() - 100) < 2:
            break
    return I


def truncated_svd(W, k):
    """Eq. 3 by Eckart-Young: the best rank-k factors U (m, k), sigma (k,), Vh (k, n) of W (m, n) in Frobenius norm."""
    if min(W.shape) >= FAST_FROM:
        return fast.truncated_svd(W, k)
    U, sigma, Vh = torch.linalg.svd(W, full_matrices=False)
    return U[:, :k], sigma[:k], Vh[:k]


def objective(Wp, P, U, sigma, Vh):
    """Eq. 4: L_act,infl = ‖√P ⊙ (W' − UΣVᵀ)‖² with P = 1 + δI; L_act (Eq. 3) with P = 1. Returns a float."""
    return (P * (Wp - (U * sigma) @ Vh).square()).sum(dtype=torch.float64).item()


def als_sweep(Wp, P, U, sigma, Vh, ranks):
    """Algorithm 1, lines 4-9: one closed-form update of v_r, then of (u_r, σ_r), for every r in `ranks`, in their order.

    Wp (m, n) profiled weight W'; P (m, n) = 1 + δI; U (m, k), sigma (k,), Vh (k, n) the start. Returns new U, sigma, Vh.
    L_act,infl does not rise at any step (Proposition 3.1).

    Same arithmetic as the paper's, less memory traffic. The weighted residual M = P ⊙ (W' − UΣVᵀ) is kept, so with
    a = σu, E_r = residual + a vᵀ turns Eq. 5 into v + (aᵀM) / ((a²)ᵀP) and Eq. 6 into a + (M'v) / (P v²), where M',
    the residual after the step in v, is M − P ⊙ a(v_new − v)ᵀ: no m×n matrix is formed between the two.
    """
    if min(Wp.shape) >= FAST_FROM:
        return fast.als_sweep(Wp, P, U, sigma, Vh, ranks)
    A, Vh, tiny = U * sigma, Vh.clone(), torch.finfo(Wp.dtype).tiny
    M = P * (Wp - A @ Vh)
    for r in ranks:
        a, v = A[:, r].clone(), Vh[r].clone()
        # Eq. 5 (with u², as Eqs. 20-21 derive it): v = (uᵀ(P ⊙ E_r)) / (σ (u²)ᵀP)   (n,)
        v_new = v + (a @ M) / (a.square() @ P).clamp_min(tiny)
        # Eq. 6: ũ = ((P ⊙ E_r) v) / (P v²)   (m,)
        a_new = a + (M @ v_new - a * (P @ (v_new * (v_new - v)))) / (P @ v_new.square()).clamp_min(tiny)
        # Algorithm 1, line 8: M −= P ⊙ (ũ v_newᵀ − a vᵀ)
        M.addcmul_(P, torch.outer(a_new, v_new).addr_(a, v, alpha=-1), value=-1)
        A[:, r], Vh[r] = a_new, v_new
    sigma = A.norm(dim=0)                                       # Eq. 27: σ = ‖ũ‖, u = ũ/σ
    return A / sigma.clamp_min(tiny), sigma, Vh


def native_factors(U, sigma, Vh, S=None):
    """Algorithm 1, lines 10-11: U_k = U√Σ (m, k) and V_kᵀ = √Σ (Vᵀ S⁻¹) (k, n); S⁻¹ by a triangular solve in fp64."""
    if S is not None:
        Vh = torch.linalg.solve_triangular(S, Vh.to(S.dtype), upper=False, left=False).to(U.dtype)
    root = sigma.sqrt()
    return U * root, root[:, None] * Vh


def air(W, S, I, k, delta=2.0, sweeps=1, order="backward"):
    """Algorithm 1: W (m, n), S (n, n), normalised influence I (m, n), rank k -> U_k (m, k), V_kᵀ (k, n), losses.

    losses: L_act of the start; L_act,infl before and after; L_act,infl of the zero matrix, for relative errors.
    δ = 0 gives SVD-LLM(W). `order` is backward (r = k-1 … 0, the paper's) or forward.
    """
    Wp, P = W @ S.to(W.dtype), 1 + delta * I                    # Eq. 1: W' = WS
    U, sigma, Vh = truncated_svd(Wp, k)                         # Eq. 3
    losses = [objective(Wp, torch.ones_like(P), U, sigma, Vh), objective(Wp, P, U, sigma, Vh)]
    for _ in range(sweeps):
        U, sigma, Vh = als_sweep(Wp, P, U, sigma, Vh, range(k) if order == "forward" else range(k - 1, -1, -1))
    losses += [objective(Wp, P, U, sigma, Vh), (P * Wp.square()).sum(dtype=torch.float64).item()]
    return *native_factors(U, sigma, Vh, S), losses


def svdllm(W, S, k):
    """SVD-LLM(W): truncate WS, multiply by S⁻¹; the optimum of L_act (Proposition A.1). Source: Wang et al., 2025."""
    return native_factors(*truncated_svd(W @ S.to(W.dtype), k), S)


def svd(W, k, d=None):
    """Truncated SVD of W·diag(d), with d (n,) divided out again; plain SVD without d."""
    U, sigma, Vh = truncated_svd(W if d is None else W * d, k)
    return native_factors(U, sigma, Vh if d is None else Vh / d)


def fwsvd(W, fisher, k, axis="in"):
    """FWSVD: weight W by the square root of the Fisher information (m, n) summed along one axis. Source: Hsu et al., 2022.

    axis "in" weights the inputs, PyTorch's columns; they are the rows of that paper, which writes Z = XW. "out": the outputs.
    """
    if axis == "out":
        U, V = svd(W.T, k, (fisher.sum(1) + 1e-5).sqrt())
        return V.T, U.T
    return svd(W, k, (fisher.sum(0) + 1e-5).sqrt())


def asvd(W, mean_abs, k, alpha=0.5):
    """ASVD: weight each input by (mean |x_j|)^α, mean_abs (n,). Source: Yuan et al., 2024, without its rank search."""
    return svd(W, k, mean_abs ** alpha + 1e-6)


# ---------------------------------------------------------------------------------------------- statistics, in order
def statistics(ckpt, windows, device, dtype, blocks, signal=None, folder=None, spill=None):
    """Yield (l, stats) for every block in `blocks`: ΣXXᵀ, mean |x| and, for a backward signal, I, one block at a time.

    With a backward signal ΣXXᵀ comes from the forward recomputed in the backward sweep: neither statistics wait for the
    other. With `folder`, they are kept there, with the gradient between two blocks, and a later run of the same checkpoint,
    text and dtype goes on from them, whatever its rate, method, signal or δ. With `spill`, block inputs go to that folder
    instead of memory. Several processes divide the windows.
    """
    (rank, world), tokens, last = processes(), windows.numel(), ckpt.cfg.n_layers
    facts = {"checkpoint": ckpt.fingerprint(), "windows": digest(windows), "dtype": str(dtype)} if folder or spill else {}
    stored, kinds = Folder(folder, facts) if folder else None, [kind for kind in ("gram", signal) if kind]
    have, windows = dict(stored.files) if folder else {}, windows[rank::world]
    file, state = "block_{:03}.{}.safetensors".format, "gradient_{:03}.{}.safetensors".format
    todo = [l for l in blocks if not all(file(l, kind) in have for kind in kinds)]
    for l in blocks:
        if l not in todo:
            yield l, {key: x for kind in kinds for key, x in stored.load(file(l, kind), device).items()}
    inputs = Spill(Path(spill) / f"{rank}of{world}", facts) if signal and spill else {}
    if not todo:
        sweep = ()
    elif signal is None:
        sweep = forward_sweep(ckpt, embed(ckpt, windows, dtype), device, gram=True, stop=max(todo) + 1, tokens=tokens)
    else:
        top = next((l for l in range(max(todo), last) if world == 1 and state(l, signal) in have), None)    # goes on from there
        stop = last if top is None else top
        start = max((l for l in range(stop + 1) if l in inputs), default=0)
        h = inputs.pop(start) if start in inputs else embed(ckpt, windows, dtype)
        for _ in forward_sweep(ckpt, h, device, keep=inputs, start=start, stop=stop):
            pass
        del h
        g = (start_gradient(ckpt, windows, inputs.pop(last), device, signal) if top is None else
             stored.load(state(top, signal))["g"].clone())
        sweep = backward_sweep(ckpt, inputs, g, device, signal, gram=True, top=top, tokens=tokens)
    for l, stats in sweep:
        add_up(stats)
        if folder and rank == 0 and l in todo:
            for kind in (kind for kind in kinds if file(l, kind) not in stored.files):
                stored.save(file(l, kind), {key: x for key, x in stats.items() if key.endswith(f".{signal}") == (kind == signal)})
        if folder and signal and rank == 0:
            old = [name for name in stored.files if name.startswith("gradient") and signal in name.split(".")]
            if world == 1 and l > min(todo):        # several processes do not keep the gradient
                stored.save(state(l - 1, signal), {"g": g})
            stored.forget(old)
        if l in todo:
            if file(l, "gram") in have:             # another method's: the same to rounding, and what every later run will read
                stats |= stored.load(file(l, "gram"), device)
            yield l, stats
        del stats                                   # before the next block's are collected
        if signal and l == min(todo):
            break
    if signal and spill:
        inputs.remove()


# ---------------------------------------------------------------------------------------------- the whole model
METHODS = ("air", "svdllm", "svd", "fwsvd", "asvd")
PART = "model-block-{:03}.safetensors".format       # of the output: a block, and under n_layers what belongs to none


def solve(W, stats, name, k, S, method, signal, scale, delta, sweeps, order, axis):
    """One weight W (m, n) by one method -> U (m, k), V (k, n), [L_act, L_act,infl before and after, its value at rank 0].

    Only air has L_act,infl: for the others the list is [L_act, None, None, L_act at rank 0]; plain SVD sees no activations
    and has none.
    """
    if method == "air":
        I = torch.ones_like(W) if signal == "ones" else W.abs() if signal == "magnitude" else stats[f"{name}.{signal}"]
        return air(W, S, normalise(I.to(W.dtype), scale), k, delta, sweeps, order)
    if method == "svd":
        return *svd(W, k), [None] * 4
    gram = stats[f"{READS[name]}.gram"].to(W.dtype)
    if method == "svdllm":
        U, V = svdllm(W, S, k)
    elif method == "fwsvd":
        U, V = fwsvd(W, stats[f"{name}.fisher"].to(W.dtype), k, axis)
    else:
        U, V = asvd(W, stats[f"{READS[name]}.mean_abs"].to(W.dtype), k)
    energy = lambda D: ((D @ gram) * D).sum().item()                    # noqa: E731   ‖DX‖² = tr(D ΣXXᵀ Dᵀ)
    return U, V, [energy(W - U @ V), None, None, energy(W)]


def solve_block(ckpt, l, stats, rate, how, device, say):
    """The seven layers of block l, decomposed: ({name: tensor} of the whole block in the checkpoint's dtype, its report).

    `how` holds the keyword arguments of solve. Report: {"ranks": {layer: k}, "loss": {layer: [L_act, before, after]},
    "repairs": {layer: shift}}. Raises RuntimeError for statistics that are not finite.
    """
    tensors, report, S = {}, {"ranks": {}, "loss": {}, "repairs": {}}, {}
    if not all(torch.isfinite(x).all() for x in stats.values()):
        raise RuntimeError(f"the statistics of block {l} are not finite: activations overflowed; use bfloat16 or float32")
    for name in LAYERS:
        layer, reads, start = f"model.layers.{l}.{name}", READS[name], time.time()
        if how["method"] in ("air", "svdllm") and reads not in S:       # q, k, v share one S; so do gate and up
            S = {reads: None}
            S[reads], shift = profile(stats[f"{reads}.gram"])
            if shift:
                report["repairs"][layer] = shift
                say(f"{layer}: ΣXXᵀ is not positive definite; {shift:.0e} of its mean diagonal was added to it")
        W = ckpt.tensor(layer + ".weight", device, torch.float32)
        k = report["ranks"][layer] = rank_at(rate, *W.shape)
        U, V, loss = solve(W, stats, name, k, S.get(reads), **how)
        tensors |= {layer + ".U.weight": U.to(ckpt.dtype).cpu(), layer + ".V.weight": V.to(ckpt.dtype).cpu()}
        if layer + ".bias" in ckpt.tensors:
            tensors[layer + ".U.bias"] = ckpt.tensor(layer + ".bias")
        report["loss"][layer] = loss[:3]
        dB = " -> ".join(f"{10 * math.log10(max(x, 1e-30) / loss[3]):.2f} dB"
                         for x in (loss[1:3] if how["method"] == "air" else loss[:1]) if loss[3])
        say(f"{layer:<34} {W.shape[0]:>5} x {W.shape[1]:<5} k {k:<5} {dB:<22} {time.time() - start:6.2f} s", 1)
    return tensors | block_rest(ckpt, l, report["ranks"]), report


def block_rest(ckpt, l, without=()):
    """{name: tensor} of block l as they are, but for the layers in `without`; l = n_layers: what belongs to no block."""
    at = f"model.layers.{l}."
    return {name: ckpt.tensor(name) for name in ckpt.names if name.rpartition(".")[0] not in without
            and (name.startswith(at) if l < ckpt.cfg.n_layers else not name.startswith("model.layers."))}


def compress(ckpt, sweep, writer, rate, how, device, blocks, say):
    """Decompose the blocks that `sweep` yields, in any order, block by block into `writer`; copy all other tensors.

    `writer` is process 0's, None in the others. Returns the reports of solve_block in one, with "seconds" {stage: s}.
    """
    seconds = {"statistics": 0.0, "solve": 0.0}
    began, done, left = time.time(), 0, len(blocks) * len(LAYERS)

    def told(line, weights=0):
        nonlocal done
        done += weights * processes()[1]
        say(line + (f"  {(time.time() - began) / done * max(0, left - done):5.0f} s left" if weights else ""))
    lap = time.time()
    for l, stats in divide(sweep):
        start, mine = time.time(), None
        seconds["statistics"] += start - lap
        if l is not None:
            mine = (l, *solve_block(ckpt, l, stats, rate, how, device, told))
        del stats
        for each in gather(mine):
            if each:
                writer.add(PART(each[0]), each[1], each[2])
        lap = time.time()
        seconds["solve"] += lap - start
    report = {"ranks": {}, "loss": {}, "repairs": {}, "seconds": seconds}
    for l in range(ckpt.cfg.n_layers + 1) if writer else ():
        if PART(l) not in writer.done:
            writer.add(PART(l), block_rest(ckpt, l))
        for key, values in (writer.done[PART(l)] or {}).items():
            report[key] |= values
    return report


def pick_blocks(text, n):
    """'A:B' -> range(A, B) within 0:n. Raises InputError for anything else or an empty range."""
    match = re.fullmatch("([0-9]*):([0-9]*)", text)
    picked = range(int(match[1] or 0), int(match[2] or n)) if match else ()
    if not picked or picked[-1] >= n:
        raise InputError(f"--layers is '{text}'; expected A:B for blocks A to B-1, within 0:{n}")
    return picked


def pick_layers(rate, ckpt, blocks):
    """{layer: (m, n, rank)} of what will be decomposed. Raises InputError for a rate outside (0, 1] or one that leaves rank 0."""
    if not 0 < rate <= 1:
        raise InputError(f"--rate is {rate}; expected the fraction of parameters to keep, above 0 and at most 1")
    shapes = {f"model.layers.{l}.{name}": ckpt.tensors[f"model.layers.{l}.{name}.weight"][0] for l in blocks for name in LAYERS}
    layer, (m, n) = max(shapes.items(), key=lambda each: sum(each[1]) / math.prod(each[1]))      # the first to lose all ranks
    if rank_at(rate, m, n) < 1:
        raise InputError(f"--rate {rate} leaves {layer} ({m} x {n}) rank 0; expected {(m + n) / (m * n) + 5e-5:.4f} or more")
    return {layer: (m, n, rank_at(rate, m, n)) for layer, (m, n) in shapes.items()}


def count(ckpt):
    """Parameters of a checkpoint, from the shapes in its files."""
    return sum(math.prod(ckpt.tensors[name][0]) for name in ckpt.names)


def parse_arguments():
    p = parser(__doc__)
    p.add_argument("--rate", type=float, default=0.6, help="fraction of the layers' parameters that is KEPT (default 0.6)")
    p.add_argument("--method", choices=METHODS, default="air")
    p.add_argument("--delta", type=float, default=2.0, help="influence weighting strength δ of Eq. 4 (default 2)")
    p.add_argument("--sweeps", type=int, default=1, help="ALS sweeps (default 1)")
    p.add_argument("--order", choices=("backward", "forward"), default="backward", help="ranks k-1 to 0 (default), or 0 to k-1")
    p.add_argument("--signal", choices=(*SIGNALS, "ones", "magnitude"), default="lrp", help="what fills the influence matrix "
                   "(default lrp, from the last token's top logit; lrp-all: from every token's)")
    p.add_argument("--scale", choices=("mean", "max100"), default="mean", help="of I: unit mean; max100: the released code's")
    p.add_argument("--axis", choices=("in", "out"), default="in", help="fwsvd: Fisher information summed per input or output")
    add_calibration_arguments(p)
    p.add_argument("--text", help="evaluation text, or none (default: the test part of the --calib text; a file as it is)")
    p.add_argument("--layers", default=":", metavar="A:B", help="compress blocks A to B-1 only (default: all)")
    p.add_argument("--stats", metavar="DIR", help="keep statistics here and use them again; a killed run goes on where it was")
    p.add_argument("--spill", metavar="DIR", help="keep block inputs here instead of in memory, until they have been used")
    p.add_argument("--out", help="output folder (default: out/NAME-METHOD-RATE)")
    p.add_argument("--overwrite", action="store_true", help="replace an existing output folder once the new one is whole")
    p.add_argument("--json", metavar="FILE", help="write the results to FILE")
    p.add_argument("--quiet", action="store_true", help="print the results only")
    return p.parse_args()


def report_perplexity(dense, written, text, loaded, device, dtype, say):
    """Evaluate both checkpoints, print the two results, and return their part of the JSON."""
    (windows, _, per_byte), scores, seconds = loaded, {}, {}
    for which, ckpt in (("dense", dense), ("compressed", written)):
        start = time.time()
        say(f"perplexity of the {which} model …")
        scores[which] = evaluate(ckpt, windows, device, dtype, tokens_per_byte=per_byte)
        seconds[f"evaluate_{which}"] = time.time() - start
    ppl = {f"ppl_{which}": score["ppl"] for which, score in scores.items()}
    print("perplexity {:.3f} -> {:.3f}".format(*ppl.values()) + f"   {text}, {len(windows)} windows of {windows.shape[1]}")
    if per_byte:
        print("per byte   " + " -> ".join(f"{2 ** score['bits_per_byte']:.4f}" for score in scores.values()))
    return ppl | {"text": text, "seqlen": windows.shape[1], "windows": len(windows)}, seconds


def main():
    args, start = parse_arguments(), time.time()

    def say(line):
        if not args.quiet and os.environ.get("RANK", "0") == "0":
            print(line, file=sys.stderr, flush=True)

    # Whatever can be wrong is looked at before the first matrix product.
    check_target(args.json)
    ckpt = Checkpoint(args.ckpt)
    if ckpt.cfg.ranks:
        raise InputError(f"{args.ckpt} is already compressed; point --ckpt at the dense checkpoint")
    if args.sweeps < 0 or not 0 <= args.delta < math.inf:
        raise InputError(f"--sweeps is {args.sweeps} and --delta {args.delta}; expected both to be 0 or more")
    blocks = pick_blocks(args.layers, ckpt.cfg.n_layers)
    cut = pick_layers(args.rate, ckpt, blocks)
    device, dtype, why = pick_device(args.device, args.dtype)
    signal = args.signal if args.method == "air" and args.signal in SIGNALS else "fisher" if args.method == "fwsvd" else None
    check_signal(signal, dtype)
    calib, samples, seqlen = choose(ckpt, args.calib, args.samples, args.seqlen)
    windows = (torch.empty(0, seqlen, dtype=torch.long) if args.method == "svd" else           # which reads no text
               calibration_windows(calib, ckpt, samples, seqlen, args.seed))
    text, loaded = args.text or calib, None
    if text != "none":
        whole = text.endswith(".npy") and token_array(text, ckpt).dim() == 2                   # brings its own windows
        loaded = evaluation_windows(text, ckpt, choose(ckpt, text, None, args.seqlen if whole else seqlen)[2])
    out = args.out or f"out/{ckpt.name}-{args.method}-{args.rate:g}"
    for option, path in (("--stats", args.stats), ("--json", args.json)):
        if path and Path(out).resolve() in (Path(path).resolve(), *Path(path).resolve().parents):
            raise InputError(f"{option} {path} lies inside --out {out}, which is replaced as a whole; give another {option}")
    dense, whole = count(ckpt), sum(m * n for m, n, _ in cut.values())
    need = (dense - whole + sum(k * (m + n) for m, n, k in cut.values())) * ckpt.dtype.itemsize + 2**22

    how = {key: getattr(args, key) for key in ("method", "signal", "scale", "delta", "sweeps", "order", "axis")}
    device = start_processes(device)
    rank, world = processes()
    if 0 < len(windows) < world:
        raise InputError(f"{len(windows)} windows cannot be divided among {world} processes; expected one for each at least")
    planned = plan(ckpt, cut, windows.shape, dtype, device, signal, need, out, args.stats, args.spill)
    facts = {"checkpoint": ckpt.fingerprint(), "windows": digest(windows), "dtype": str(dtype), "rate": args.rate,
             "layers": f"{blocks.start}:{blocks.stop}", **how}
    with Writer(out, need, args.overwrite, facts, keep=bool(args.stats)) if rank == 0 else nullcontext() as writer:
        say(f"torch {torch.__version__}, numpy {numpy.__version__}, {device} ({torch.get_num_threads()} threads), "
            f"{str(dtype)[6:]} ({why}), seed {args.seed}" + (f", {world} processes" if world > 1 else ""))
        say(f"{args.method} at rate {args.rate:g}: {len(blocks)} of {ckpt.cfg.n_layers} blocks of {ckpt.name}; {len(windows)} x "
            f"{seqlen} = {windows.numel():,} tokens of {calib} for inputs up to {max(n for _, n, _ in cut.values()):,} wide")
        say(planned)
        left = from_first([l for l in blocks if not (writer and PART(l) in writer.done)])
        if len(left) < len(blocks):
            say(f"going on: {len(blocks) - len(left)} of {len(blocks)} blocks are finished in {out}.partial")
        sweep = (((l, {}) for l in left) if args.method == "svd" else
                 statistics(ckpt, windows, device, dtype, left, signal, args.stats, args.spill))
        seconds = {"prepare": time.time() - start}
        report = compress(ckpt, sweep, writer, args.rate, how, device, left, say)
        seconds |= report.pop("seconds")
        end_processes()
        if rank:                                    # process 0 writes and evaluates
            return
        start = time.time()
        writer.finish(ckpt.raw | {"air": how | {
            "rate": args.rate, "ranks": report["ranks"], "seed": args.seed, "dtype": str(dtype)[6:],
            "calibration": {"text": calib, "samples": len(windows), "seqlen": seqlen, "sha256": digest(windows)},
            "versions": {"torch": torch.__version__, "numpy": numpy.__version__}}}, ckpt.extras())
        seconds["write"] = time.time() - start

    written = Checkpoint(out)
    small = count(written)
    rates = {"rate_decomposed": 1 - (dense - small) / whole, "rate_file": small / dense}
    print(f"{args.method}: {dense:,} -> {small:,} parameters ({rates['rate_decomposed']:.2%} of the decomposed layers, "
          f"{rates['rate_file']:.2%} of the file): {out}")
    scores = {"ppl_dense": None, "ppl_compressed": None, "text": None, "seqlen": seqlen, "windows": 0}
    if loaded:
        scores, more = report_perplexity(ckpt, written, text, loaded, device, dtype, say)
        seconds |= more
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    stages = ", ".join(f"{stage} {s:.1f}" for stage, s in seconds.items())
    say(f"{sum(seconds.values()):.0f} s ({stages}), peak memory {peak / 1e9:.2f} GB")
    used = (args.signal, args.delta) if args.method == "air" else (signal, None)
    write_json(args.json, {"method": args.method, "rate": args.rate, "signal": used[0], "delta": used[1], "params_dense": dense,
                           "params_compressed": small, **rates, **scores, **report, "seconds": seconds, "peak_rss_bytes": peak,
                           "peak_gpu_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else None})


if __name__ == "__main__":
    run(main)
