"""Stage 2: the backward sweep, block by block: how much each weight influences the model's output (Section 3.1, A.1).

Relevance follows AttnLRP in gradient form: with g = R / z at every activation z, relevance propagation is an ordinary
backward pass in which four operations have another derivative. They are the functions under "rules" below; the block
itself is model.py's. Weight×Gradient and Fisher use the same sweep with the ordinary operations.

Alone, it prints how influence is spread:  python influence.py --ckpt demo --signal lrp
"""
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from calibrate import add_calibration_arguments, add_inputs, calibration_windows, embed, forward_sweep, recording
from model import LAYERS, PLAIN, attention, rope, to_logits, wide
from support.checkpoint import Checkpoint
from support.script import InputError, parser, pick_device, run
from support.texts import choose

# ---------------------------------------------------------------------------------------------- rules
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
    """ε-rule for z = Wx + b.  Eq. 11: r_{i←j} = z_ij / (z_j + ε·sign z_j) · R_j, so g_x = Wᵀ(g ⊙ z/(z + ε·sign z))."""
    z = layer(x)
    with torch.no_grad():
        scale = z / (z + torch.full_like(z, eps).copysign_(z))
    return ScaleGradient.apply(z, scale)


def identity_norm(x, weight, eps):
    """Identity rule for RMSNorm: 1/rms(x) is a constant, so each input keeps its own relevance."""
    scale = torch.rsqrt(wide(x).pow(2).mean(-1, keepdim=True) + eps).detach()
    return (wide(x) * scale).to(x.dtype) * weight


def identity_silu(x):
    """Identity rule for SiLU: R_in = R_out, so the derivative becomes silu(x)/x = sigmoid(x)."""
    return x * torch.sigmoid(x).detach()


def uniform(product):
    """Uniform rule for a product of two activations: each factor receives half of its relevance."""
    return ScaleGradient.apply(product, 0.5)


def uniform_mul(a, b):
    return uniform(a * b)


def uniform_attention(q, k, v):
    """Uniform rule for both products of attention, plain gradient (Taylor rule) for the softmax between them.

    Halving the gradients of q and k halves that of their product q·kᵀ, so the fused kernel stays in use.
    """
    return uniform(attention(uniform(q), uniform(k), v))


def operations(signal, eps=1e-6):
    """A block's five operations: with AttnLRP's derivatives for relevance, the ordinary ones for gradients.

    Sums (residuals, biases) need no rule: g is shared as it is.
    """
    return PLAIN if not signal.startswith("lrp") else SimpleNamespace(
        linear=lambda layer, x: epsilon_linear(layer, x, eps), norm=identity_norm, silu=identity_silu,
        mul=uniform_mul, attention=uniform_attention)


# ---------------------------------------------------------------------------------------------- signals
SIGNALS = {     # influence of one window on weight W, from g = ∂(target)/∂W; the absolute value is per window
    "lrp": lambda W, g: (W * g).abs(),          # |R| for the last token's top logit: with the rules above, R = W ⊙ g
    "lrp-all": lambda W, g: (W * g).abs(),      # the same for the top logit of every token
    "wxg": lambda W, g: (W * g).abs(),          # Eq. 9: |w · ∂L/∂w|, first-order Taylor term
    "fisher": lambda W, g: g * g,               # (∂L/∂w)², diagonal empirical Fisher (A.1)
    "grad": lambda W, g: g.abs(),
}


def check_signal(signal, dtype):
    """Raise InputError for relevance in fp16, whose range z/(z + ε) leaves."""
    if signal and signal.startswith("lrp") and dtype == torch.float16:
        raise InputError("the lrp signal overflows in float16; use --dtype bfloat16 or float32")


def output_gradient(x, ids, norm, lm_head, cfg, signal, ops):
    """∂(target)/∂x of the last block's output x (1, T, dim).

    Target of lrp: the last token's largest logit; of lrp-all: the sum of every token's (R = f(x) there means g = 1); of the
    other signals: the window's mean cross-entropy.
    """
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        if signal.startswith("lrp"):
            objective = wide(to_logits(x[:, -1:] if signal == "lrp" else x, norm, lm_head, cfg, ops)).amax(-1).sum()
        else:
            objective = F.cross_entropy(wide(to_logits(x, norm, lm_head, cfg, ops))[0, :-1], ids[0, 1:])
    return torch.autograd.grad(objective, x)[0]


def start_gradient(ckpt, windows, h, device, signal="lrp", eps=1e-6):
    """Replace the last block's output h (N, T, dim), in place, by the gradient of every window's target with respect to it.

    Raises InputError for lrp in fp16, which overflows.
    """
    check_signal(signal, h.dtype)
    ops, (norm, lm_head) = operations(signal, eps), ckpt.head(device, h.dtype)
    for d in range(len(windows)):
        ids = windows[d:d + 1].to(device)
        h[d:d + 1] = output_gradient(h[d:d + 1].to(device), ids, norm, lm_head, ckpt.cfg, signal, ops)
    return h


def backward_sweep(ckpt, inputs, g, device, signal="lrp", eps=1e-6, gram=False, top=None, tokens=None):
    """Propagate from block `top` (default: the last) back to block 0, each block's forward recomputed from its kept input.

    inputs: the dict forward_sweep kept, emptied as the sweep proceeds; g (N, T, dim): gradient at the output of `top`,
    replaced in place by the one at each block's input; both in host memory. Yields (l, stats), stats[f"{name}.{signal}"]
    being I (m, n) = Σ_windows |Ĩ| (Section 3.1), fp32 (fp64 for an fp64 model), unnormalised; with `gram` also what
    calibrate.add_inputs collects from the same recomputed forward, for `tokens` tokens in all (default: these).
    """
    ops, angles = operations(signal, eps), rope(ckpt.cfg, g.shape[1], device)
    for l in reversed(range(ckpt.cfg.n_layers if top is None else top + 1)):
        block, x, stats, seen = ckpt.block(l, device, g.dtype), inputs.pop(l), {}, {}
        weights = {f"{name}.{signal}": block.get_submodule(name).weight.requires_grad_() for name in LAYERS}
        for d in range(len(g)):
            h = x[d:d + 1].to(device).requires_grad_()
            with torch.enable_grad():
                out = block(h, angles, recording(ops, seen) if gram else ops)
            g_in, *grads = torch.autograd.grad(out, (h, *weights.values()), g[d:d + 1].to(device))
            g[d:d + 1] = g_in
            for (key, W), grad in zip(weights.items(), grads):
                value = SIGNALS[signal](W.detach(), wide(grad))                     # |Ĩ| of this window   (m, n)
                stats[key] = stats[key].add_(value) if key in stats else value
            del grads, grad, value, out                 # a block's gradients are as large as its influence
            if gram:
                with torch.no_grad():
                    add_inputs(stats, block, seen, tokens or g.shape[0] * g.shape[1])
        del block, weights, W, seen, x, h
        yield l, stats


def main():
    p = parser(__doc__)
    add_calibration_arguments(p)
    p.add_argument("--signal", choices=tuple(SIGNALS), default="lrp")
    args = p.parse_args()
    ckpt = Checkpoint(args.ckpt)
    device, dtype, _ = pick_device(args.device, args.dtype)
    check_signal(args.signal, dtype)
    if ckpt.cfg.ranks:
        raise InputError(f"{args.ckpt} is compressed; influence is measured on the dense checkpoint")
    text, samples, seqlen = choose(ckpt, args.calib, args.samples, args.seqlen)
    windows = calibration_windows(text, ckpt, samples, seqlen, args.seed)
    inputs = {}
    for _ in forward_sweep(ckpt, embed(ckpt, windows, dtype), device, keep=inputs):
        pass
    g = start_gradient(ckpt, windows, inputs.pop(ckpt.cfg.n_layers), device, args.signal)
    print(f"{args.signal}, {samples} windows of {seqlen} tokens of {text}: the share of influence in the top 1 % of weights")
    for l, stats in backward_sweep(ckpt, inputs, g, device, args.signal):
        shares = []
        for name in LAYERS:
            I = stats[f"{name}.{args.signal}"].flatten()
            shares.append(f"{name.split('.')[1]} {I.topk(max(1, I.numel() // 100)).values.sum() / I.sum():.0%}")
        print(f"block {l:>3}  " + "   ".join(shares), flush=True)


if __name__ == "__main__":
    run(main)
