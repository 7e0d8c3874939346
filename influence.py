"""Stage 2: the backward sweep: how much each weight influences the output (Section 3.1).

Relevance follows AttnLRP in gradient form: with g = R / z at every activation z,
propagating relevance is an ordinary backward pass in which the five operations of a block
have another derivative: the functions under "rules". The block itself is model.py's.
Weight×Gradient and Fisher use the same sweep with the ordinary operations.

Alone, it prints how influence is spread:  python influence.py --ckpt demo --signal lrp

Shapes: N windows, T tokens a window, W and I (m, n).
"""
from collections.abc import Callable
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F

from calibrate import (add, add_calibration_arguments, add_inputs, calibration_windows,
                       embed, forward_sweep, recording)
from model import LAYERS, PLAIN, attention, rope, to_logits, wide
from support.checkpoint import Checkpoint
from support.progress import Progress, told
from support.script import InputError, parser, pick_device, run
from support.texts import with_defaults


# ------------------------------------------------------------ rules
class ScaleGradient(torch.autograd.Function):
    """Identity whose gradient is multiplied by `scale`, a number or a constant tensor."""

    @staticmethod
    def forward(ctx, x, scale):
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        return g * ctx.scale, None


def epsilon_linear(layer, x, eps=1e-6):
    """ε-rule for z = Wx + b.  Eq. 11: r_{i←j} = z_ij / (z_j + ε·sign z_j) · R_j.

    With R_j = z_j g_j, the gradient form is g_x = Wᵀ(g ⊙ z/(z + ε·sign z)).
    """
    z = layer(x)
    with torch.no_grad():
        signed_eps = torch.full_like(z, eps).copysign_(z)
        scale = z / (z + signed_eps)
    return ScaleGradient.apply(z, scale)


def identity_norm(x, weight, eps):
    """Identity rule for RMSNorm: 1/rms(x) is constant, each input keeps its relevance."""
    scale = torch.rsqrt(wide(x).pow(2).mean(-1, keepdim=True) + eps).detach()
    return (wide(x) * scale).to(x.dtype) * weight


def identity_silu(x):
    """Identity rule for SiLU: R_in = R_out, the derivative is silu(x)/x = sigmoid(x)."""
    return x * torch.sigmoid(x).detach()


def uniform(product):
    """Uniform rule for a product of two activations: each factor receives half of R."""
    return ScaleGradient.apply(product, 0.5)


def uniform_mul(a, b):
    return uniform(a * b)


def uniform_attention(q, k, v):
    """Uniform rule for both products of attention, the softmax's plain gradient between.

    To halve the gradient of q·kᵀ is to halve those of q and k, so the fused kernel stays
    in use. The softmax's plain gradient is AttnLRP's Taylor rule.
    """
    return uniform(attention(uniform(q), uniform(k), v))


def attn_lrp(eps=1e-6):
    """A block's five operations with AttnLRP's derivatives.

    Sums (residuals, biases) need no rule: g is shared as it is. Released code differs:
    its ε is 1e-8 and has no sign.
    """
    return SimpleNamespace(
        linear=lambda layer, x: epsilon_linear(layer, x, eps),
        norm=identity_norm,
        silu=identity_silu,
        mul=uniform_mul,
        attention=uniform_attention,
    )


# ------------------------------------------------------------ signals
class Signal(NamedTuple):
    """What fills the influence matrix I of Eq. 4.

    target: what is differentiated. "last": the last token's top logit; "every": the sum
    of every token's; "loss": the mean cross-entropy; None: nothing, no backward sweep
    is needed. ops: a block's operations on the way back. influence: takes W and g =
    ∂target/∂W of one window, returns its magnitudes (m, n); without a target it takes W
    and ΣXXᵀ. metric: takes one window's gradients at a layer's output (T, m) and of W
    (m, n), returns {name: matrix}; None: nothing. Both are summed over windows.
    """

    target: str | None
    ops: SimpleNamespace | None
    influence: Callable
    metric: Callable | None = None


def token_metric(g, G):
    """Two-sided metric: B = Σ_t g_t g_tᵀ (m, m), as ΣXXᵀ is of the inputs."""
    return {"B": g.T @ g}


def window_metric(g, G):
    """GFWSVD's: the Kronecker factors of Σ vec(G)vec(G)ᵀ, G (m, n) a window's gradient.

    One power iteration from the identity: A = ΣGᵀG (n, n), B = ΣGGᵀ (m, m). Source's code
    differs: more iterations (Lanczos), each of which has to see every window again.
    """
    return {"A": G.T @ G, "B": G @ G.T}


SIGNALS = {
    # Section 3.1: |R| of the weight; with the rules above R = W ⊙ g.
    "lrp": Signal("last", attn_lrp(), lambda W, g: (W * g).abs()),
    # Not in the paper: started at every token.
    "lrp-all": Signal("every", attn_lrp(), lambda W, g: (W * g).abs()),
    # Eq. 9: |w · ∂L/∂w|, the first-order Taylor term.
    "wxg": Signal("loss", PLAIN, lambda W, g: (W * g).abs()),
    # A.1: (∂L/∂w)², the diagonal empirical Fisher information.
    "fisher": Signal("loss", PLAIN, lambda W, g: g * g),
    # Not in the paper: the gradient alone.
    "grad": Signal("loss", PLAIN, lambda W, g: g.abs()),
    # Not in the paper: I as W×Grad's, and beside it what the two-sided methods read.
    "kfac": Signal("loss", PLAIN, lambda W, g: (W * g).abs(), token_metric),
    "gfwsvd": Signal("loss", PLAIN, lambda W, g: (W * g).abs(), window_metric),
    # The gradient with its sign, for support/ranks.py.
    "slope": Signal("loss", PLAIN, lambda W, g: (W * g).abs(), lambda g, G: {"G": G}),
    # Table 7's uninformative baselines.
    "ones": Signal(None, None, lambda W, gram: torch.ones_like(W)),
    "magnitude": Signal(None, None, lambda W, gram: W.abs()),
}
BACKWARD = tuple(name for name, signal in SIGNALS.items() if signal.target)


def check_signal(signal, dtype):
    """Raise InputError for a way back in fp16, whose range z/(z + ε) leaves above and the
    gradient of a loss below."""
    if signal in BACKWARD and dtype == torch.float16:
        raise InputError(f"the gradients of the {signal} signal leave float16's range; "
                         "use --dtype bfloat16 or float32")


# ------------------------------------------------------------ the sweep
def output_gradient(x, ids, head, cfg, signal):
    """∂target/∂x (1, T, dim) of a window's last hidden states x; ids (1, T)."""
    target, ops, *_ = SIGNALS[signal]
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        if target == "loss":
            # The window's mean cross-entropy.
            logits = wide(to_logits(x, head, cfg, ops))
            objective = F.cross_entropy(logits[0, :-1], ids[0, 1:])
        else:
            # The largest logit, of one token or of each; R = f(x) there means g = 1.
            tokens = x[:, -1:] if target == "last" else x
            objective = wide(to_logits(tokens, head, cfg, ops)).amax(-1).sum()
    return torch.autograd.grad(objective, x)[0]


def start_gradient(ckpt, windows, h, device, signal="lrp"):
    """Replace the last block's output h (N, T, dim), in place, by ∂target/∂h.

    Raises InputError in fp16, whose range gradients leave.
    """
    check_signal(signal, h.dtype)
    head = ckpt.head(device, h.dtype)
    for d in told("gradient of the head: windows", range(len(windows))):
        ids = windows[d:d + 1].to(device)
        h[d:d + 1] = output_gradient(h[d:d + 1].to(device), ids, head, ckpt.cfg, signal)
    return h


def noting(ops, outputs):
    """The operations `ops`, whose linear also notes a layer's output: outputs[layer] = z."""
    def linear(layer, x):
        outputs[layer] = ops.linear(layer, x)
        return outputs[layer]
    return SimpleNamespace(**vars(ops) | {"linear": linear})


def through_block(block, x, g, angles, ops, outputs):
    """One window backward through a block: x (1, T, dim) its input, g at its output.

    Returns the gradient at its input, {layer: gradient of W (m, n)} and, of those layers
    whose output `ops` notes in `outputs`, {layer: gradient at its output (1, T, m)}.
    """
    x = x.requires_grad_()
    layers = [block.get_submodule(name) for name in LAYERS]
    weights = [layer.weight.requires_grad_() for layer in layers]
    with torch.enable_grad():
        out = block(x, angles, ops)
    noted = [outputs[layer] for layer in layers if layer in outputs]
    g_in, *grads = torch.autograd.grad(out, (x, *weights, *noted), g)
    return g_in, dict(zip(LAYERS, grads)), dict(zip(LAYERS, grads[len(LAYERS):]))


def add_influence(stats, block, grads, signal):
    """Add one window's |Ĩ| to each layer's I = Σ_windows |Ĩ| (Section 3.1)."""
    for name, grad in grads.items():
        W = block.get_submodule(name).weight.detach()
        value = SIGNALS[signal].influence(W, wide(grad))     # |Ĩ| of this window   (m, n)
        key = f"{name}.{signal}"
        stats[key] = stats[key].add_(value) if key in stats else value


def add_metric(stats, grads, at_outputs, signal):
    """Add one window's part of what the two-sided methods read."""
    for name, g in at_outputs.items():
        parts = SIGNALS[signal].metric(wide(g[0]), wide(grads[name]))
        for key, value in parts.items():
            add(stats, f"{name}.{key}.{signal}", value)


def block_backward(block, x, g, angles, signal, gram):
    """All windows backward through a block: x (N, T, dim) its input, g at its output.

    Replaces g in place by the gradient at the input; returns the block's statistics.
    """
    rules = SIGNALS[signal].ops
    device = angles[0].device
    stats = {}
    for d in told("windows", range(len(g))):
        seen = {}
        outputs = {}
        ops = recording(rules, seen) if gram else rules
        if SIGNALS[signal].metric:
            ops = noting(ops, outputs)
        # The block's forward is computed again, since only its input was kept.
        window = x[d:d + 1].to(device)
        g_out = g[d:d + 1].to(device)
        g_in, *found = through_block(block, window, g_out, angles, ops, outputs)
        add_influence(stats, block, found[0], signal)
        add_metric(stats, *found, signal)
        # Last: the gradient at down_proj's output may be g_out itself.
        g[d:d + 1] = g_in
        # A block's gradients are as large as its influence: they go before ΣXXᵀ is taken.
        del found, outputs, ops
        if gram:
            with torch.no_grad():
                add_inputs(stats, block, seen, g.shape[0] * g.shape[1])
    return stats


def backward_sweep(ckpt, inputs, g, device, signal="lrp", gram=False):
    """Propagate from the last kept block to the first, each run again from its input.

    inputs {l: (N, T, dim)}: what forward_sweep kept, emptied as the sweep proceeds; g
    (N, T, dim): the gradient at the last one's output, replaced in place by the one at
    each block's input; both in host memory. Yields (l, stats):
    stats[f"{name}.{signal}"] is I (m, n), not normalised; with `gram` also what
    calibrate.add_inputs collects, from the same recomputed forward.
    """
    angles = rope(ckpt.cfg, g.shape[1], device)
    for l in told("backward sweep: block", sorted(inputs, reverse=True)):
        # No name here holds the block or its statistics: they go when their turn is over.
        yield l, block_backward(
            ckpt.block(l, device, g.dtype), inputs.pop(l), g, angles, signal, gram)


# ------------------------------------------------------------ the command
def main():
    p = parser(__doc__)
    add_calibration_arguments(p)
    p.add_argument("--signal", choices=BACKWARD, default="lrp", help="(default lrp)")
    args = p.parse_args()
    Progress(args.quiet).listen()
    ckpt = Checkpoint(args.ckpt)
    device, dtype, _ = pick_device(args.device, args.dtype)
    check_signal(args.signal, dtype)
    if ckpt.cfg.compressed:
        raise InputError(f"{args.ckpt} is compressed; "
                         "influence is measured on the dense checkpoint")
    text, samples, seqlen = with_defaults(ckpt, args.calib, args.samples, args.seqlen)
    windows = calibration_windows(text, ckpt, samples, seqlen, args.seed)
    inputs = {}
    for _ in forward_sweep(ckpt, embed(ckpt, windows, dtype), device, keep=inputs):
        pass
    g = start_gradient(ckpt, windows, inputs.pop(ckpt.cfg.n_layers), device, args.signal)
    print(f"{args.signal}, {samples} windows of {seqlen} tokens of {text}: "
          "the share of influence in the top 1 % of weights")
    for l, stats in backward_sweep(ckpt, inputs, g, device, args.signal):
        shares = []
        for name in LAYERS:
            I = stats[f"{name}.{args.signal}"].flatten()
            top = I.topk(max(1, I.numel() // 100)).values
            # A block of zeros has no influence; its share is 0 %.
            total = I.sum().clamp_min(torch.finfo(I.dtype).tiny)
            shares.append(f"{name.split('.')[1]} {top.sum() / total:.0%}")
        print(f"block {l:>3}  " + "   ".join(shares), flush=True)


if __name__ == "__main__":
    run(main)
