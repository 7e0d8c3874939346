"""Stage 3: AIR, Activation- and Influence-Aware Ranks: every linear layer becomes two factors.

    python air.py                                           # the demo, about a minute
    python air.py --ckpt llama7b.safetensors --rate 0.6     # rate: the fraction kept

Read the functions from `rank_at` to `air` beside Section 3 and Algorithm 1 of the paper.

    paper           here             shape
    W, W′ = WS      W, Wp            (m, n)
    S               S                (n, n), lower triangular
    I, 1 + δI       I, P             (m, n)
    U′, Σ′, V′ᵀ     U, sigma, Vh     (m, k), (k,), (k, n)
    U_k, V_kᵀ       U, V             (m, k), (k, n)
"""
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from typing import NamedTuple

import torch

from calibrate import add_calibration_arguments, calibration_windows, embed, forward_sweep
from eval_ppl import evaluation
from influence import SIGNALS, backward_sweep, check_signal, start_gradient
from model import LAYERS, READS
from support import fast, large, report
from support import ranks as by_measurement
from support.anchored import anchored_sweep, going_on
from support.checkpoint import Checkpoint, Writer, part_of, result_bytes, written_bytes
from support.progress import Progress, Stopwatch
from support.script import (InputError, check_apart, check_results, check_spared,
                            code_digest, parser, peak_memory, pick_blocks, pick_device, run,
                            write_json)
from support.texts import digest, with_defaults

# Where both sides are as wide, support/fast.py computes the same with less work; math.inf
# keeps to the lines here.
FAST_FROM = fast.FROM
LARGEST_RIDGE = 100
OUTPUT_RIDGE = 0.1              # share of its own diagonal that is added to B of `kfac`


# ------------------------------------------------------------ the method
def rank_at(rate, m, n):
    """The largest rank k with k(m+n) <= rate·m·n: `rate` is kept (Section 4.1)."""
    # 1e-9: a whole number must not be rounded below itself.
    return int(rate * m * n / (m + n) + 1e-9)


def own_energies(gram):
    """ΣXXᵀ's diagonal (n,), each input's energy, above 0.

    An input that is always zero counts as the weakest of the others; if all are, every
    number will do. Raises RuntimeError for what is not finite.
    """
    own = gram.diagonal().clone()
    if not torch.isfinite(own).all():
        raise RuntimeError("ΣXXᵀ is not finite")
    alive = own > 0
    own[~alive] = own[alive].min() if alive.any() else 1.0
    return own


def profile(gram, ridge=0.0):
    """Eq. 1: S = cholesky(ΣXXᵀ), lower triangular, in fp64.

    Takes ΣXXᵀ (n, n); returns (S (n, n) fp64, shift), shift being the share of its own
    diagonal that was added to it: `ridge`, or what it took to make the matrix
    numerically positive definite, as it usually is with more tokens than inputs. Raises
    RuntimeError for a matrix that is not finite.
    """
    if not 0 <= ridge < math.inf:
        raise ValueError(f"a ridge of {ridge}")
    gram = gram.double()
    own = own_energies(gram)
    info = torch.empty((), dtype=torch.int32, device=gram.device)
    # Not in the paper: the ridge, and the repair, ever larger ones. A share of the mean
    # diagonal instead would drown weak inputs. Released code differs: it adds
    # max(1.1·|λmin|, 1e-6·λmax, 1e-4), absolute in the last term.
    repairs = (10.0**e for e in range(-9, 1))
    for shift in (ridge, *(each for each in repairs if each > ridge)):
        S = gram.clone()
        S.diagonal().add_(shift * own)
        torch.linalg.cholesky_ex(S, out=(S, info))  # in place: S is as large as ΣXXᵀ
        # A pivot at the level of rounding is luck: S⁻¹ would amplify noise.
        rounding = len(gram) * 2e-16 * own
        if not info and (S.diagonal().square() > rounding).all():
            return S, shift
    raise RuntimeError("ΣXXᵀ is not finite")


def default_ridge(n, tokens):
    """The ridge of `profile` where none is given: 0.1 (n/tokens)^1.5.

    Not in the paper: a tenth at one token an input, nothing to speak of where there are
    many, as experiments/ridge.py measured.
    """
    return 0.1 * (n / tokens)**1.5


def normalise(I, scale="mean"):
    """Influence (m, n), any positive scale -> unit mean per layer (Section 3.1)."""
    if scale == "max100":
        return bend(I)
    return I / I.mean().clamp_min(torch.finfo(I.dtype).tiny)


def bend(I):
    """Released code differs, by this: up to ten rounds, until mean 1 and maximum 100."""
    for _ in range(10):
        # To 0 … 1, then to unit mean.
        I = I - I.min()
        I = I / I.max().clamp_min(torch.finfo(I.dtype).tiny) + 1e-12
        I = I / I.mean()
        # The power that takes the maximum to 100; it moves the mean.
        if I.max() > 1:
            I = I ** (math.log(100) / math.log(I.max()))
        I = I / I.mean()
        if abs(I.mean() - 1) < 0.02 and abs(I.max() - 100) < 2:
            break
    return I


def truncated_svd(W, k):
    """Eq. 3 by Eckart-Young: W's best rank-k factors U (m, k), sigma (k,), Vh (k, n)."""
    if min(W.shape) >= FAST_FROM:
        return fast.truncated_svd(W, k)
    U, sigma, Vh = torch.linalg.svd(W, full_matrices=False)
    return U[:, :k], sigma[:k], Vh[:k]


def objective(Wp, P, U, sigma, Vh):
    """Eq. 4: L_act,infl = ‖√P ⊙ (W' − UΣVᵀ)‖² = Σ P (…)², P = 1 + δI; Eq. 3: P = 1."""
    residual = Wp - (U * sigma) @ Vh
    return (P * residual.square()).sum(dtype=torch.float64).item()


def als_sweep(Wp, P, U, sigma, Vh, ranks):
    """Algorithm 1, lines 3-9: update v_r, then (u_r, σ_r), in closed form, r in `ranks`.

    Wp (m, n) the profiled weight W'; P (m, n) = 1 + δI; U (m, k), sigma (k,), Vh (k, n)
    the start. Returns new ones. L_act,infl rises at no step (Proposition 3.1).
    """
    if min(Wp.shape) >= FAST_FROM:
        return fast.als_sweep(Wp, P, U, sigma, Vh, ranks)
    U, sigma, Vh = (each.clone() for each in (U, sigma, Vh))
    tiny = torch.finfo(Wp.dtype).tiny
    # line 3: W'_k = U'_k Σ'_k V'_kᵀ   (m, n)
    Wk = (U * sigma) @ Vh
    # line 4: for every r, here in the order of `ranks`
    for r in ranks:
        u, s, v = U[:, r], sigma[r], Vh[r]
        if s == 0:                                      # Eq. 5 would divide by it
            continue
        # line 5, Eq. 15: E_r = W' − W'_k + σuvᵀ; then P ⊙ E_r   (m, n)
        old = s * torch.outer(u, v)
        E = Wp - Wk + old
        PE = P * E
        # line 6, Eq. 5: v = (uᵀ(P ⊙ E_r)) / (σ (u²)ᵀP), u² as Eq. 21 derives it   (n,)
        v = (u @ PE) / (s * (u.square() @ P)).clamp_min(tiny)
        # line 7, Eq. 6: ũ = ((P ⊙ E_r) v) / (P v²)   (m,)
        u_tilde = (PE @ v) / (P @ v.square()).clamp_min(tiny)
        # line 7, Eq. 27: σ = ‖ũ‖, u = ũ/σ
        s = u_tilde.norm()
        u = u_tilde / s.clamp_min(tiny)
        # line 8: W'_k + σuvᵀ, less the old component
        Wk += s * torch.outer(u, v) - old
        U[:, r], sigma[r], Vh[r] = u, s, v
    return U, sigma, Vh


def native_factors(U, sigma, Vh, S=None):
    """Algorithm 1, lines 10-11: U_k = U√Σ (m, k) and V_kᵀ = √Σ Vᵀ S⁻¹ (k, n).

    S⁻¹ by a triangular solve in fp64.
    """
    if S is not None:
        Vh = Vh.to(S.dtype)
        Vh = torch.linalg.solve_triangular(S, Vh, upper=False, left=False).to(U.dtype)
    root = sigma.sqrt()
    return U * root, root[:, None] * Vh


class Losses(NamedTuple):
    """What a weight's approximation costs on the calibration windows, ridge included."""

    act: float | None       # L_act (Eq. 3): of AIR's start, SVD-LLM(W); else of the result
    before: float | None    # L_act,infl (Eq. 4) of the start; None for methods without it
    after: float | None         # L_act,infl of the result
    zero: float | None        # the zero matrix's loss, for relative errors; None: unknown


def air(W, S, I, k, delta=2.0, orders=("backward",)):
    """Algorithm 1: weight W, S, normalised I, rank k -> U_k (m, k), V_kᵀ (k, n), Losses.

    W (m, n), S (n, n), I (m, n). `orders`: that of the ranks in each sweep, "backward"
    (k-1 … 0, the paper's) or "forward". With δ = 0 or no sweep it is SVD-LLM(W).
    """
    Wp = W @ S.to(W.dtype)                                      # line 1, Eq. 1: W' = WS
    P = 1 + delta * I
    U, sigma, Vh = truncated_svd(Wp, k)                         # line 2, Eq. 3
    act = objective(Wp, torch.ones_like(P), U, sigma, Vh)
    before = objective(Wp, P, U, sigma, Vh)
    for order in orders:
        ranks = range(k - 1, -1, -1) if order == "backward" else range(k)
        U, sigma, Vh = als_sweep(Wp, P, U, sigma, Vh, ranks)    # lines 3-9, Eqs. 5 and 6
    after = objective(Wp, P, U, sigma, Vh)
    zero = (P * Wp.square()).sum(dtype=torch.float64).item()
    Uk, Vk = native_factors(U, sigma, Vh, S)                    # lines 10-11
    return Uk, Vk, Losses(act, before, after, zero)


# ------------------------------------------------------------ what it is compared with
def svdllm(W, S, k):
    """SVD-LLM(W): truncate WS, multiply by S⁻¹; the optimum of L_act.

    Proposition A.1: AIR with δ = 0. Source: Wang et al., 2025.
    """
    return native_factors(*truncated_svd(W @ S.to(W.dtype), k), S)


def svd(W, k, d=None):
    """Truncated SVD of W·diag(d), with d (n,) divided out again; plain SVD without d."""
    if d is None:
        return native_factors(*truncated_svd(W, k))
    U, sigma, Vh = truncated_svd(W * d, k)
    return native_factors(U, sigma, Vh / d)


def fwsvd(W, fisher, k, axis="in"):
    """FWSVD: weight W by √ of the Fisher information (m, n) summed along one axis.

    axis "in" weights the inputs, PyTorch's columns; they are the rows of that paper,
    which writes Z = XW. "out": the outputs. Source: Hsu et al., 2022.
    """
    if axis == "out":
        U, V = svd(W.T, k, (fisher.sum(1) + 1e-5).sqrt())
        return V.T, U.T
    return svd(W, k, (fisher.sum(0) + 1e-5).sqrt())


def asvd(W, mean_abs, k, alpha=0.5):
    """ASVD: weight each input by (mean |x_j|)^α, mean_abs (n,).

    Source: Yuan et al., 2024, without its search for ranks.
    """
    return svd(W, k, mean_abs**alpha + 1e-6)


# ------------------------------------------------------------ beyond the paper
def kfac(W, S, L, k):
    """Not in the paper: the optimum of tr(B D ΣXXᵀ Dᵀ) = ‖Lᵀ D S‖², the error in two
    metrics.

    L (m, m) lower triangular, L Lᵀ = B = Σ g gᵀ, g the loss gradient at W's output: to
    second order D = W − UV costs the loss this much. Names in the literature: KFAC-SVD,
    IO-SVD, OBD-LLM. With L = 1 it is SVD-LLM(W). Also returns σ (k,), fp32.
    """
    Wp = (L.T @ W.to(L.dtype) @ S.to(L.dtype)).to(W.dtype)
    U, sigma, Vh = truncated_svd(Wp, k)
    U, V = native_factors(U, sigma, Vh, S)
    # L⁻ᵀ, as S⁻¹ on the other side.
    U = torch.linalg.solve_triangular(L.T, U.to(L.dtype), upper=True).to(W.dtype)
    return U, V, sigma


def anchored(W, S, C):
    """Not in the paper: the optimum W̃ (m, n) of ‖WX − W̃X̂‖², to be decomposed in W's place
    where a layer reads X̂, the compressed model's inputs, and is to give what W makes of X.

    S (n, n): S Sᵀ = ΣX̂X̂ᵀ; C (n, n) = ΣXX̂ᵀ, both with their ridge. Any method goes on from
    W̃ and S: ‖WX − UVX̂‖² = ‖(W̃ − UV)S‖² + what no UV changes. X, the aim, is the dense
    model's inputs, or a mean of both: SVD-LLM(W) of W̃ is AA-SVD (Sinha and Fleuret, 2026) with
    the former. With X = X̂, W̃ = W.
    """
    # W̃ = WC (SSᵀ)⁻¹
    return torch.cholesky_solve((W.to(C.dtype) @ C).T, S).T.to(W.dtype)


def square_root(S):
    """Of a factor S (n, n) fp64: (S Sᵀ)^½, its own transpose, and its inverse, fp64."""
    energy, Q = torch.linalg.eigh(S @ S.T)
    root = energy.clamp_min(energy[-1] * 1e-15).sqrt()
    return (Q * root) @ Q.T, (Q / root) @ Q.T


def kfac_air(W, factors, I, k, delta=2.0, orders=("backward",)):
    """Not in the paper: AIR's sweep in the space of `kfac`; factors (S, L), I normalised.

    Both factors are symmetric roots, so that W'_ij stays closest to W_ij, whose influence
    weights it. With δ = 0 or no sweep it is `kfac`. Losses are in both metrics.
    """
    (R, R_inverse), (Q, Q_inverse) = map(square_root, factors)
    Wp = (Q @ W.double() @ R).to(W.dtype)
    U, V, losses = air(Wp, torch.eye(len(R), device=R.device), I, k, delta, orders)
    return (Q_inverse @ U.double()).to(W.dtype), (V.double() @ R_inverse).to(W.dtype), losses


def blended(M):
    """GFWSVD: cholesky((1−α)M + α·mean(diag M)·1), fp64, for the least α of 0, 1e-9, …, 1."""
    mean = M.diagonal().mean() or 1.0
    for alpha in (0.0, *(10.0**e for e in range(-9, 1))):
        # (1−α)M + α·mean·1, then its factor.
        mixed = (1 - alpha) * M
        mixed.diagonal().add_(alpha * mean)
        S, info = torch.linalg.cholesky_ex(mixed)
        if not info and (S.diagonal().square() > len(M) * 2e-16 * mean).all():
            return S
    raise RuntimeError("a Kronecker factor of the Fisher information is not finite")


# ------------------------------------------------------------ statistics, in order
def statistics(ckpt, windows, device, dtype, blocks, signal=None):
    """Yield (l, stats) of every block in `blocks`: ΣXXᵀ, mean |x|, a backward signal's I.

    One block's at a time, which is why no more than one is ever in memory.
    support/large.py has the same for statistics that are kept, spilled or divided among
    processes.
    """
    if not blocks:
        return
    if signal is None:                                       # one forward sweep is enough
        h = embed(ckpt, windows, dtype)
        up_to = range(max(blocks) + 1)
        sweep = forward_sweep(ckpt, h, device, gram=True, blocks=up_to)
    else:
        inputs = {}                                             # {block: its input}
        for _ in forward_sweep(ckpt, embed(ckpt, windows, dtype), device, keep=inputs):
            pass
        g = start_gradient(ckpt, windows, inputs.pop(ckpt.cfg.n_layers), device, signal)
        for l in range(min(blocks)):                   # no gradient has to get there
            del inputs[l]
        # ΣXXᵀ is taken from the forward recomputed on the way back, where I is, too.
        sweep = backward_sweep(ckpt, inputs, g, device, signal, gram=True)
    for l, stats in sweep:
        if l in blocks:
            yield l, stats
        del stats                                  # before the next block's are collected


@dataclass
class Inputs:
    """What the sweeps collected of an input; q, k and v share one, so do gate and up."""

    reader: str                         # the first layer that reads it
    gram: torch.Tensor | None           # ΣXXᵀ (n, n) fp64
    mean_abs: torch.Tensor | None       # mean of |x| (n,) fp64
    ridge: float                        # share of ΣXXᵀ's own diagonal to be added
    cross: torch.Tensor | None = None   # `anchored`'s C (n, n) fp64; `gram` is then ΣX̂X̂ᵀ

    @cached_property
    def profiled(self):
        """(S, shift) of Eq. 1, for the methods that ask."""
        return profile(self.gram, self.ridge)

    @property
    def anchor(self):
        """ΣXX̂ᵀ with the ridge of ΣX̂X̂ᵀ, so that it draws W̃ to W, not to 0."""
        anchor = self.cross.clone()
        anchor.diagonal().add_(self.profiled[1] * own_energies(self.gram))
        return anchor

    @property
    def repair(self):
        """The share of its diagonal that ΣXXᵀ's Cholesky factor needed; 0: the ridge was enough."""
        shift = self.profiled[1] if "profiled" in vars(self) else 0.0
        return shift if shift > self.ridge else 0.0


@dataclass
class Layer:
    """One weight, the rank it gets, and what the sweeps collected of it."""

    name: str                   # such as model.layers.3.self_attn.q_proj
    W: torch.Tensor             # (m, n) fp32; `anchored` where its input has a ΣXX̂ᵀ
    k: int                      # rank
    inputs: Inputs
    collected: dict             # {backward signal: I (m, n)}, and the input's own

    @property
    def S(self):
        """S (n, n) of Eq. 1, fp64; computed once for all layers that read this input."""
        return self.inputs.profiled[0]

    @property
    def mean_abs(self):
        """ASVD's mean of |x| (n,)."""
        return self.inputs.mean_abs.to(self.W.dtype)

    @property
    def L(self):
        """Cholesky factor (m, m) fp64 of B, the metric of W's outputs, with its ridge."""
        return profile(self.collected["B.kfac"], OUTPUT_RIDGE)[0]

    def influence(self, signal):
        """I (m, n) by one of SIGNALS, of any positive scale."""
        I = self.collected.get(signal)
        if I is None:
            I = SIGNALS[signal].influence(self.W, self.inputs.gram)
        return I.to(self.W.dtype)


def inputs_of(reader, name, stats, ridge):
    """The Inputs of layer `name` and all that read the same, from a block's stats."""
    gram = stats.get(f"{name}.gram")
    if ridge is None:
        ridge = 0.0 if gram is None else default_ridge(len(gram), stats[f"{name}.tokens"].item())
    return Inputs(reader, gram, stats.get(f"{name}.mean_abs"), ridge,
                  stats.get(f"{name}.cross"))


def layers_of(ckpt, l, stats, ranks, device, ridge=None):
    """The weights of block l that are in `ranks` {layer: k}, one at a time, as Layers."""
    read = None                                             # whose input is `inputs`
    for name in LAYERS:
        full = f"model.layers.{l}.{name}"
        if full not in ranks:                               # it stays dense
            continue
        if READS[name] != read:
            read = READS[name]
            inputs = inputs_of(full, read, stats, ridge)
        own = [key for key in stats if key.startswith(name + ".")]
        collected = {key.removeprefix(name + "."): stats[key] for key in own}
        W = ckpt.tensor(full + ".weight", device, torch.float32)
        if inputs.cross is not None:
            W = anchored(W, inputs.profiled[0], inputs.anchor)
        yield Layer(full, W, ranks[full], inputs, collected)


# ------------------------------------------------------------ methods and options
class Method(NamedTuple):
    """How a weight becomes two factors."""

    factors: Callable           # (Layer, Options) -> U (m, k), V (k, n), and air's Losses
    reads: str       # of statistics: "influence", one of SIGNALS, "inputs", "streams", "nothing"


METHODS = {
    "air": Method(lambda x, o: air(x.W, x.S, normalise(x.influence(o.signal), o.scale),
                                   x.k, o.delta, o.orders(x)), "influence"),
    "svdllm": Method(lambda x, o: svdllm(x.W, x.S, x.k), "inputs"),
    "svd": Method(lambda x, o: svd(x.W, x.k), "nothing"),
    "fwsvd": Method(lambda x, o: fwsvd(x.W, x.influence("fisher"), x.k, o.axis),
                    "fisher"),
    "asvd": Method(lambda x, o: asvd(x.W, x.mean_abs, x.k), "inputs"),
    "kfac": Method(lambda x, o: kfac(x.W, x.S, x.L, x.k)[:2], "kfac"),
    "kfac-air": Method(
        lambda x, o: kfac_air(x.W, (x.S, x.L), normalise(x.influence("kfac"), o.scale),
                              x.k, o.delta, o.orders(x)),
        "kfac"),
    "gfwsvd": Method(
        lambda x, o: kfac(x.W,
                          blended(x.collected["A.gfwsvd"]),
                          blended(x.collected["B.gfwsvd"]),
                          x.k)[:2],
        "gfwsvd"),
    "aasvd": Method(lambda x, o: svdllm(x.W, x.S, x.k), "streams"),     # of `anchored` W
}


def option(default, choices=None, help=None):
    """A field of Options that is an argument of the command line, too."""
    return field(default=default, metadata={"choices": choices, "help": help})


@dataclass
class Options:
    """How weights become factors. Each field is an argument, its default the paper's; but
    `ridge`, whose 0 is."""

    method: str = option("air", METHODS)
    signal: str = option("lrp", SIGNALS, "what fills the influence matrix (default lrp, "
                         "from the last token's top logit; lrp-all: from every token's)")
    scale: str = option("mean", ("mean", "max100"),
                        "of I: unit mean; max100: the released code's")
    delta: float = option(2.0, help="influence weighting strength δ of Eq. 4 (default 2; "
                          "kfac-air did best at 0.5)")
    sweeps: int = option(1, help="ALS sweeps (default 1)")
    order: str = option("backward", ("backward", "forward"),
                        "ranks k-1 to 0 (default), or 0 to k-1")
    kinds: str = option("all", help="of layers that are swept, such as gate_proj,up_proj; "
                        "the others stay the sweep's start (default all, the paper's)")
    axis: str = option("in", ("in", "out"),
                       "fwsvd: Fisher information summed per input or output")
    anchor: float = option(None, help="fit weights to X̂, their inputs behind what is compressed "
                           "by then, to make of it what the dense ones make of ANCHOR·X + "
                           "(1 - ANCHOR)·X̂, X the dense model's inputs (default: X alone, the "
                           "paper's; aasvd: 1)")
    ridge: float = option(None, help="share of ΣXXᵀ's own diagonal that is added to it; "
                          "0: the paper's (default: by the tokens an input)")
    ranks: str = option("uniform", ("uniform", "auto", "mixed"), "the same share of every layer "
                        "(default), or measured: support/ranks.py, which sweeps once more; "
                        "mixed: some layers stay dense")

    @property
    def reads(self):
        """Which statistics the method reads: `Method.reads`."""
        return METHODS[self.method].reads

    @property
    def measured(self):
        """Not in the paper: are ranks chosen by measurement?"""
        return self.ranks != "uniform"

    @property
    def calibrated(self):
        """Is calibration text read, by the method or for its ranks? Not by plain SVD."""
        return self.reads != "nothing" or self.measured

    @property
    def backward(self):
        """The signal a backward sweep must collect; None if the forward one is enough."""
        signal = self.signal if self.reads == "influence" else self.reads
        return signal if signal in SIGNALS and SIGNALS[signal].target else None

    @property
    def share(self):
        """X's share in the aim of `anchored`, X the dense model's inputs; None: not anchored,
        fitted to X alone."""
        if self.anchor is None and self.reads == "streams":
            return 1.0
        return self.anchor

    def orders(self, layer):
        """Those of the sweeps over a Layer. Not in the paper: none where `kinds` leaves it out."""
        swept = {"all", layer.name.rpartition(".")[2]} & set(self.kinds.split(","))
        return (self.order,) * self.sweeps if swept else ()

    def weights(self):
        """(signal, δ) of Eq. 4; (backward signal, None) of a method without it."""
        if self.reads == "influence":
            return self.signal, self.delta
        return self.backward, self.delta if self.method == "kfac-air" else None


# ------------------------------------------------------------ a block
@dataclass
class Solved:
    """One decomposed layer."""

    layer: str
    shape: tuple                # (m, n)
    k: int
    losses: Losses
    repair: float               # Inputs.repair, once an input
    seconds: float
    tensors: dict               # {name: tensor} in the checkpoint's dtype


def activation_loss(layer, U, V):
    """L_act = ‖DX‖² = tr(D ΣXXᵀ Dᵀ) with D = W − UV, and the zero matrix's, as Losses.

    ΣXXᵀ with its ridge; what a Cholesky factor needed beyond it is not counted.
    """
    if layer.inputs.gram is None:                          # plain SVD sees no activations
        return Losses(None, None, None, None)
    W = layer.W
    gram = layer.inputs.gram.clone()
    gram.diagonal().add_(layer.inputs.ridge * own_energies(gram))
    gram = gram.to(W.dtype)
    D = W - U @ V
    act = ((D @ gram) * D).sum().item()
    zero = ((W @ gram) * W).sum().item()
    return Losses(act, None, None, zero)


def solve(layer, options):
    """One Layer by one method -> (U (m, k), V (k, n), Losses)."""
    U, V, *losses = METHODS[options.method].factors(layer, options)
    return U, V, losses[0] if losses else activation_loss(layer, U, V)


def check_finite(l, stats):
    """Raise RuntimeError for statistics of block l that are not finite."""
    if not all(torch.isfinite(x).all() for x in stats.values()):
        raise RuntimeError(f"the statistics of block {l} are not finite: activations "
                           "overflowed, or gradients; use bfloat16 or float32")


def compress_block(ckpt, l, stats, ranks, options, device):
    """Yield the layers of block l that are in `ranks`, decomposed, as Solved.

    Raises RuntimeError for statistics that are not finite.
    """
    check_finite(l, stats)
    start = time.time()
    for layer in layers_of(ckpt, l, stats, ranks, device, options.ridge):
        U, V, losses = solve(layer, options)
        U = U.to(ckpt.dtype)
        V = V.to(ckpt.dtype)
        tensors = {layer.name + ".U.weight": U.cpu(), layer.name + ".V.weight": V.cpu()}
        if layer.inputs.cross is not None:              # the layers behind it see it
            stats.replace(layer.name.removeprefix(f"model.layers.{l}."), U, V)
        if layer.name + ".bias" in ckpt.tensors:
            tensors[layer.name + ".U.bias"] = ckpt.tensor(layer.name + ".bias")
        # A repair of ΣXXᵀ is told once an input, with the first layer that reads it.
        repair = layer.inputs.repair if layer.inputs.reader == layer.name else 0.0
        yield Solved(layer.name, tuple(layer.W.shape), layer.k, losses, repair,
                     time.time() - start, tensors)
        start = time.time()


def shapes_of(ckpt, blocks):
    """{layer: (m, n)} of the weights of `blocks`."""
    names = [f"model.layers.{l}.{name}" for l in blocks for name in LAYERS]
    return {name: ckpt.tensors[name + ".weight"].shape for name in names}


def pick_ranks(ckpt, blocks, rate):
    """{layer: rank} of what is decomposed: each keeps `rate` of its parameters.

    Raises InputError for a rate outside (0, 1] or one that leaves a layer rank 0.
    """
    if not 0 < rate <= 1:
        raise InputError(f"--rate is {rate}; expected the fraction of parameters to "
                         "keep, above 0 and at most 1")
    shapes = shapes_of(ckpt, blocks)
    ranks = {layer: rank_at(rate, m, n) for layer, (m, n) in shapes.items()}
    # A rank costs (m + n)/(mn) of a layer's parameters; ranks are lost first where most.
    layer = max(shapes, key=lambda name: sum(shapes[name]) / math.prod(shapes[name]))
    if ranks[layer] < 1:
        m, n = shapes[layer]
        raise InputError(f"--rate {rate} leaves {layer} ({m} x {n}) rank 0; "
                         f"expected {(m + n) / (m * n) + 5e-5:.4f} or more")
    return ranks


def wholes_of(ckpt, sweep, blocks, device, options):
    """{layer: support.ranks.Whole} of `kfac`, as many components as rate 1 pays for.

    Raises RuntimeError for statistics that are not finite.
    """
    wholes = {}
    caps = pick_ranks(ckpt, blocks, 1.0)
    for l, stats in sweep:
        check_finite(l, stats)
        for layer in layers_of(ckpt, l, stats, caps, device, options.ridge):
            L = layer.L
            dense = layer.W.numel() if options.ranks == "mixed" else math.inf
            U, V, sigma = kfac(layer.W, layer.S, L, layer.k)
            total = (L.T @ layer.W.to(L.dtype) @ layer.S).square().sum().item()
            wholes[layer.name] = by_measurement.Whole(
                U.to(ckpt.dtype).cpu(), V.to(ckpt.dtype).cpu(),
                sigma.double().square().cpu(), total, dense)
        del stats                                  # before the next block's are collected
    return wholes


# ------------------------------------------------------------ the command
@dataclass
class Job:
    """What a run is to do, decided and checked before the first matrix product."""

    ckpt: Checkpoint
    options: Options
    rate: float               # fraction of the decomposed layers' parameters that is kept
    blocks: range               # which are decomposed
    ranks: dict                 # {layer: k}; without one a layer stays dense
    calib: str                  # calibration text
    windows: torch.Tensor       # (N, T) token ids, empty for a method that reads none
    held: torch.Tensor          # (8, T) by which ranks are chosen, where they are measured
    text: str                   # evaluation text, or "none"
    evaluation: tuple | None    # (windows, tokens in the text, tokens a byte)
    device: torch.device
    dtype: torch.dtype
    why: str                    # that dtype
    out: str                    # folder of the result
    stats: str | None           # folder of kept statistics
    spill: str | None           # folder of block inputs
    measured: bool = False      # are `ranks` those of --ranks auto or mixed by now?

    @property
    def shapes(self):
        """{layer: (m, n)} of all that `rate` is of."""
        return shapes_of(self.ckpt, self.blocks)

    @property
    def cut(self):
        """{layer: (m, n, k)} of what is decomposed."""
        shapes = self.shapes
        return {layer: (*shapes[layer], k) for layer, k in self.ranks.items()}

    @property
    def ridges(self):
        """{n: share} of ΣXXᵀ's diagonal that is added for the layers of n inputs."""
        if not len(self.windows):
            return {}
        asked = self.options.ridge
        tokens = self.windows.numel()
        return {n: default_ridge(n, tokens) if asked is None else asked
                for n in sorted({n for _, n in self.shapes.values()})}

    @property
    def keeps(self):
        """Are finished blocks kept for a run that goes on? Anchored ones took all before them."""
        return bool(self.stats) or self.options.share is not None

    def layers_in(self, blocks):
        """How many of the layers that are decomposed are in `blocks`."""
        return sum(f"model.layers.{l}.{name}" in self.ranks for l in blocks for name in LAYERS)

    def measures(self, left):
        """Are ranks still to be measured, with the blocks `left` to be decomposed?"""
        return self.options.measured and bool(left) and not self.measured

    def use(self, ranks):
        """Measured {layer: k}, also of a run that was killed; None: there are none."""
        if ranks is not None:
            self.ranks = ranks
            self.measured = True

    def facts(self):
        """What a result depends on: a run that goes on must have the same."""
        code = [*large.SWEEPS, "air.py", "support/fast.py"]
        if self.options.measured:
            code += ["support/ranks.py", "eval_ppl.py"]
        if self.options.share is not None:
            code.append("support/anchored.py")
        return {
            "checkpoint": self.ckpt.fingerprint(),
            "windows": digest(self.windows),
            "dtype": str(self.dtype),
            "code": code_digest(*code),
            "rate": self.rate,
            "layers": f"{self.blocks.start}:{self.blocks.stop}",
            **asdict(self.options),
        }


def parse_arguments():
    p = parser(__doc__)
    p.add_argument("--rate", type=float, default=0.6,
                   help="fraction of the layers' parameters that is KEPT (default 0.6)")
    for each in fields(Options):
        p.add_argument("--" + each.name, type=each.type, default=each.default,
                       **each.metadata)
    add_calibration_arguments(p)
    p.add_argument("--text", help="evaluation text, or none (default: the test part of "
                   "the --calib text; a file as it is)")
    p.add_argument("--windows", type=int, metavar="N", help="evaluate on N evenly spaced "
                   "windows of the text's (default: all)")
    p.add_argument("--layers", default=":", metavar="A:B",
                   help="compress blocks A to B-1 only (default: all)")
    p.add_argument("--stats", metavar="DIR", help="keep statistics here and use them "
                   "again; a killed run goes on where it was")
    p.add_argument("--spill", metavar="DIR", help="keep block inputs here instead of in "
                   "memory, until the way back has used them (where there is one)")
    p.add_argument("--out", help="output folder (default: out/NAME-METHOD-RATE)")
    p.add_argument("--overwrite", action="store_true",
                   help="replace an existing output folder once the new one is whole")
    p.add_argument("--json", metavar="FILE", help="write the results to FILE")
    return p.parse_args()


def check_options(args):
    """Raise InputError for an option of the methods out of its range."""
    if args.sweeps < 0 or not 0 <= args.delta <= 1e9:
        raise InputError(f"--sweeps is {args.sweeps} and --delta {args.delta}; "
                         "expected 0 or more, δ at most 1e9")
    unknown = set(args.kinds.split(",")) - {"all", *(name.split(".")[1] for name in LAYERS)}
    if unknown:
        raise InputError(f"--kinds has '{min(unknown)}'; expected all, or some of "
                         f"{','.join(name.split('.')[1] for name in LAYERS)}")
    if args.method == "kfac-air" and args.signal != Options.signal:
        raise InputError(f"--signal is {args.signal}; expected none with --method kfac-air, "
                         "which collects W×Grad's influence with B")
    if args.anchor is not None and not 0 <= args.anchor <= 1:
        raise InputError(f"--anchor is {args.anchor}; expected 0 to 1, or none for the dense "
                         "model's inputs")
    if args.anchor is not None and METHODS[args.method].reads == "nothing":
        raise InputError(f"--anchor is {args.anchor:g}; expected none with --method "
                         f"{args.method}, which reads no inputs")
    if args.ridge is not None and not 0 <= args.ridge <= LARGEST_RIDGE:
        raise InputError(f"--ridge is {args.ridge}; expected 0 to {LARGEST_RIDGE}, a share "
                         "of ΣXXᵀ's own diagonal, or none for the default")


def prepare(args):
    """Arguments -> Job. Whatever can be wrong with them raises InputError here."""
    check_results(args.json)
    ckpt = Checkpoint(args.ckpt)
    if ckpt.cfg.compressed:
        raise InputError(f"{args.ckpt} is already compressed; "
                         "point --ckpt at the dense checkpoint")
    check_options(args)
    ckpt.extras()                           # what cannot be copied at the end is said now
    options = Options(**{each.name: getattr(args, each.name) for each in fields(Options)})
    blocks = pick_blocks(args.layers, ckpt.cfg.n_layers)
    ranks = pick_ranks(ckpt, blocks, args.rate)
    device, dtype, why = pick_device(args.device, args.dtype)
    check_signal(options.backward, dtype)
    if options.measured:
        check_signal("slope", dtype)
    calib, samples, seqlen = with_defaults(ckpt, args.calib, args.samples, args.seqlen)
    windows = held = torch.empty(0, seqlen, dtype=torch.long)
    if options.calibrated:
        windows = calibration_windows(calib, ckpt, samples, seqlen, args.seed)
    if options.measured:
        held = by_measurement.held_windows(calib, ckpt, windows, args.seed)
    text = args.text or calib
    held_out = evaluation(text, ckpt, windows.shape[1], args)
    out = args.out or f"out/{ckpt.name}-{options.method}-{args.rate:g}"
    check_apart(out, stats=args.stats, spill=args.spill, json=args.json)
    check_spared(out, ckpt=args.ckpt, calib=calib, text=text)
    device = large.start_processes(device)
    world = large.processes()[1]
    if options.share is not None and (args.stats or args.spill or world > 1):
        raise InputError("--method aasvd and --anchor collect their statistics behind what is "
                         "decomposed by then; expected one process, without --stats and "
                         "--spill")
    if 0 < len(windows) < world:
        raise InputError(f"{len(windows)} windows cannot be divided among {world} "
                         "processes; expected one for each at least")
    return Job(ckpt, options, args.rate, blocks, ranks, calib, windows, held, text,
               held_out, device, dtype, why, out, args.stats, args.spill)


def make_plan(job, need):
    """The plan of a run whose result takes `need` bytes; InputError if it cannot fit."""
    signal = job.options.backward
    shape = job.windows.shape
    plan = large.make_plan(job.ckpt.cfg, job.cut, shape, job.device, job.dtype, signal)
    _, delta = job.options.weights()
    if delta is not None:
        plan.seconds["solve"] += job.options.sweeps * plan.als
    if job.options.share is not None:
        # Two streams, each up to every input of a block and once through it; before them, the
        # dense model's own sweeps, of which all but the inputs is held.
        one = large.make_plan(job.ckpt.cfg, job.cut, shape, job.device, job.dtype, None)
        plan.seconds["solve"] += 5 * one.seconds["forward sweep"]
        if not signal:
            plan.seconds["forward sweep"] = 0.0
        plan.inputs += plan.held["one input"]
        plan.inputs += plan.held["statistics"] - plan.held["gram"]
    if job.options.measured:
        # One sweep and one solve more, and the factors at rate 1, which are held.
        # Every process has all of them and searches.
        _, world = large.processes()
        first = large.make_plan(job.ckpt.cfg, job.cut, shape, job.device, job.dtype, "kfac")
        sweep = first.seconds["forward sweep"] + first.seconds["backward sweep"]
        first.seconds["solve"] *= world
        plan.add(first, same=signal == "kfac")
        # Steps of the search: there and back through the model over a few windows.
        steps = by_measurement.USUAL * len(job.held) / len(job.windows)
        plan.seconds["search"] = steps * sweep * world
        factors = sum(m * n for m, n, _ in job.cut.values()) * job.ckpt.dtype.itemsize
        plan.solving += factors * world
    # Only a way back needs the inputs again.
    measured = job.options.measured
    spill = job.spill if signal or measured else None
    kinds = {"gram", signal, "kfac" if measured else signal}
    stats = job.stats if job.options.calibrated else None
    plan.place((f"{job.out}.partial", need), spill, stats, kinds)
    plan.check()
    return plan


def sweep_of(job, blocks, signal):
    """(l, stats) of `blocks`, by `statistics` above or support/large.py's form of it.

    Raises InputError for kept statistics of another run.
    """
    arguments = job.ckpt, job.windows, job.device, job.dtype, blocks, signal
    if not (job.stats or job.spill or large.processes()[1] > 1):
        return statistics(*arguments)
    kept = large.Kept(job.stats, job.spill)
    kept.open(job.ckpt, job.windows, job.dtype, blocks, signal)
    return kept.statistics(*arguments)


def own_sweep(job, blocks, writer):
    """What the method reads of `blocks`; the writer has those that an earlier run finished."""
    if job.options.reads == "nothing" or not blocks:
        return ((l, {}) for l in blocks)
    share = job.options.share
    signal = job.options.backward
    if share is None:
        return sweep_of(job, blocks, signal)
    # Gradients of the dense model, from the last block to the first; then both streams, from
    # the first to the last.
    first = sweep_of(job, blocks, signal) if signal else ()
    h = embed(job.ckpt, job.windows, job.dtype)
    sweep = anchored_sweep(job.ckpt, h, job.device, job.blocks, share, first)
    return going_on(sweep, blocks, writer.folder)


def first_sweep(job, left, writer):
    """What is to be read first: for measured ranks `kfac`'s statistics, of all blocks."""
    if job.measures(left):
        return sweep_of(job, job.blocks, "kfac")
    return own_sweep(job, left, writer)


def to_do(job, writer):
    """(blocks that are left, ranks that a killed run had measured or None)."""
    left = [l for l in job.blocks if part_of(l) not in writer.done]
    return left, writer.folder.note


def measure_ranks(job, sweep, left, writer):
    """--ranks auto, mixed: set the job's ranks by `kfac`'s sweep; returns the method's own.

    The writer of the first process remembers them: a run that goes on must not search
    again, for rounding alone leads to others.
    """
    wholes = wholes_of(job.ckpt, sweep, job.blocks, job.device, job.options)
    found = by_measurement.find_ranks(
        job.ckpt, wholes, job.ranks, job.held, job.device, job.dtype)
    job.use(large.from_first(found))                        # the same in every process
    if writer:
        writer.folder.remember(job.ranks)
    return own_sweep(job, left, writer)


def solve_block(job, l, stats, progress):
    """Block l decomposed, told layer by layer -> (its file, {name: tensor}, note).

    Note: {"ranks": {layer: k}, "loss": {layer: [L_act, before, after]}, "repairs":
    {layer: shift}}.
    """
    tensors = {}
    note = {"ranks": {}, "loss": {}, "repairs": {}}
    for solved in compress_block(job.ckpt, l, stats, job.ranks, job.options, job.device):
        if solved.repair:
            note["repairs"][solved.layer] = solved.repair
        progress.step(report.layer_line(solved), large.processes()[1])
        tensors |= solved.tensors
        note["ranks"][solved.layer] = solved.k
        note["loss"][solved.layer] = solved.losses[:3]
    return part_of(l), tensors | job.ckpt.rest(l, note["ranks"]), note


def main():
    args = parse_arguments()
    progress = Progress(args.quiet).listen()
    watch = Stopwatch()

    # Every check, before the first matrix product.
    job = prepare(args)
    need = result_bytes(job.ckpt, job.cut)
    plan = make_plan(job, need)
    first = large.processes()[0] == 0                       # it writes and evaluates
    writer = nullcontext()
    if first:
        writer = Writer(job.out, written_bytes(need), args.overwrite, job.facts(), job.keeps)

    # Block by block: collect its statistics, replace its weights by factors, write them.
    with writer:
        left, ranks = large.from_first(to_do(job, writer) if first else None)
        job.use(ranks)
        sweep = first_sweep(job, left, writer)
        progress.say(report.header(job, args.seed))
        progress.say(plan.line())
        progress.warn(plan.warning())
        if len(left) < len(job.blocks):
            progress.say(f"going on: {len(job.blocks) - len(left)} of {len(job.blocks)} "
                         f"blocks are finished in {job.out}.partial")
        watch.lap("prepare")
        if job.measures(left):
            sweep = measure_ranks(job, sweep, left, writer if first else None)
            watch.lap("ranks")
        progress.begin(job.layers_in(left), plan.pace)
        for l, stats in large.divide(sweep):
            watch.lap("statistics")
            part = None if l is None else solve_block(job, l, stats, progress)
            del stats
            report.add(writer, large.gather(part), progress)
            watch.lap("solve")
        large.end_processes()
        if not first:
            return
        reports = report.finish(job, writer, args.seed)
        watch.lap("write")

    # The result is read back: what is counted and evaluated is what was written.
    written = Checkpoint(job.out)
    results = report.count(job, written) | report.score(job, written, progress, watch)
    stages = ", ".join(f"{stage} {s:.1f}" for stage, s in watch.seconds.items())
    progress.say(f"{sum(watch.seconds.values()):.0f} s ({stages}), "
                 f"peak memory {peak_memory() / 1e9:.2f} GB")
    write_json(args.json, report.summary(job, results | reports, watch))


if __name__ == "__main__":
    run(main)
