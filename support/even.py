"""What loses less when it is rounded: columns and ranks of one size, grids as wide as pays, a U
fitted to the rounded V (enhance/quantize.py --smooth, --rotate, --clip, --refit). None of it
costs the result anything."""
import torch

from model import LAYERS, READS, LowRank
from support.packed import Grid, grid_of

# {option: what it does}, in this order
EVEN = {"smooth": "scale columns to about one size first",
        "rotate": "turn each layer's ranks to about one size first",
        "clip": "narrow each grid to where its numbers err least",
        "refit": "fit U, by least squares, to the rounded V"}
SHRINKS = [1 - i / 20 for i in range(1, 16)]       # of a grid's width, that `clipped` tries
RHO = 0.01              # of the mean square of U's inputs: how U is held to what it was


def even_out(block, cfg, options, seed):
    """What the options ask for before anything is rounded, in place; what `smooth` returns."""
    scales = smooth(block, cfg) if options["smooth"] else {}
    if options["rotate"]:
        rotate(block, seed)
    return scales


# ------------------------------------------------------------ columns
def even_scale(weights):
    """Powers of two (n,), about each column's root mean square over `weights` [(…, n)], the
    geometric mean of all being 1; 1 for a column of zeros."""
    size = torch.cat([w.float() for w in weights]).square().mean(0).sqrt()
    alive = size > 0
    size = torch.where(alive, size, 1.0).log2()
    mean = size.sum() / alive.sum().clamp_min(1)
    return torch.where(alive, (size - mean).round().exp2(), 1.0)


def smooth(block, cfg):
    """Even out the columns of what reads an input, in place, while the block's output stays
    what it is. Returns {parameter: what it was multiplied by}, powers of two.

    Not in the paper: SmoothQuant's identity (Xiao et al., 2023), W diag(1/d) · diag(d) x, d
    put into what makes x: the norm, up's rows before down, v's before o, where the query
    heads of a kv head share theirs. S⁻¹ leaves V's columns small where an input is large;
    on a grid that serves a whole row they would be rounded away.
    """
    low_rank = {name for name, layer in block.named_modules() if isinstance(layer, LowRank)}
    weight = {name: name + (".V" if name in low_rank else "") + ".weight" for name in LAYERS}
    names = dict(block.named_parameters())
    found = {}

    def multiply(name, factor):
        if name in names:
            found[name] = found.get(name, 1.0) * factor

    # What makes an input, what reads it; columns (G, heads, …), of which all heads share d.
    kv = cfg.n_kv_heads
    inputs = (
        ("input_layernorm", [f"self_attn.{x}_proj" for x in "qkv"], 1, 1),
        ("self_attn.v_proj", ["self_attn.o_proj"], kv, cfg.n_heads // kv),
        ("post_attention_layernorm", ["mlp.gate_proj", "mlp.up_proj"], 1, 1),
        ("mlp.up_proj", ["mlp.down_proj"], 1, 1),
    )
    for maker, readers, G, heads in inputs:
        if low_rank.isdisjoint(readers):                # of what is dense nothing is packed
            continue
        apart = [names[weight[name]].unflatten(1, (G, heads, -1)) for name in readers]
        d = even_scale([w.transpose(1, 2).flatten(0, 1).flatten(1) for w in apart])
        every = d.view(G, 1, -1).expand(-1, heads, -1).flatten()
        for name in readers:
            multiply(weight[name], 1 / every)
        made = f"{maker}.U" if maker in low_rank else maker
        multiply(f"{made}.weight", d if maker.endswith("norm") else d[:, None])
        multiply(f"{made}.bias", d)
    for name, scale in found.items():
        names[name].data.mul_(scale)
    return found


# ------------------------------------------------------------ ranks
@torch.no_grad()
def rotate(block, seed):
    """Turn every layer's k ranks by a random orthogonal T (k, k), in place: U·Tᵀ and T·V.

    Not in the paper: what QuIP and QuaRot (Chee et al., 2023; Ashkboos et al., 2024) do around
    dense weights, two factors have room for between them. Rank r has √σ_r in U and in V, so
    that a grid a row costs ~Σσ²; turned, all ranks have the mean of σ, which costs ~(Σσ)²/k,
    never more. And U's inputs, uncorrelated before, leave GPTQ something to move.
    """
    generator = torch.Generator().manual_seed(seed)
    for layer in block.modules():
        if isinstance(layer, LowRank):
            U = layer.U.weight
            V = layer.V.weight
            k = len(V)
            normal = torch.randn(k, k, dtype=torch.float64, generator=generator)
            T = torch.linalg.qr(normal).Q.to(V.device)
            U.copy_(U.double() @ T.T)
            V.copy_(T @ V.double())


# ------------------------------------------------------------ grids
def clipped(w, bits, dtype):
    """Each row's Grid: of its numbers, or SHRINKS times those, which leaves them the least
    squared error. w (rows, columns) fp32.

    Not in the paper: few numbers are near a row's largest, and of few codes all are spread
    up to there; cut off, it costs less than it saves. GPTQ's own code has the like (`mse`).
    """
    best = grid_of(w, bits, dtype)
    least = errors_on(best, w)
    for shrink in SHRINKS:
        grid = grid_of(shrink * w, bits, dtype)
        errors = errors_on(grid, w)
        # The rows that err less on it take it.
        less = errors < least
        least = torch.where(less, errors, least)
        scale = torch.where(less, grid.scale, best.scale)
        zero = torch.where(less, grid.zero, best.zero)
        best = Grid(scale, zero, grid.top)
    return best


def errors_on(grid, w):
    """Each row's squared error (rows, 1) on a Grid."""
    return (w - grid.values(grid.codes(w))).square().sum(1, keepdim=True)


# ------------------------------------------------------------ U behind the rounded V
def refit(U, V, Q, gram, cross):
    """What U becomes behind Q, V rounded, and ΣZZᵀ (k, k) fp64 of what it reads, Z = QX̂.

    Not in the paper. U' (m, k) fp32 makes of Z what U V made of the inputs X before anything
    was rounded: least squares, ‖U'Z − UVX‖² + ρ‖U' − U‖², by
    U' = (U V ΣXX̂ᵀ Qᵀ + ρU) (ΣZZᵀ + ρI)⁻¹. V, Q (k, n); gram ΣX̂X̂ᵀ, cross ΣXX̂ᵀ (n, n).
    """
    U, V, Q, gram, cross = (each.double() for each in (U, V, Q, gram, cross))
    G = Q @ gram @ Q.T
    rho = (RHO * G.diagonal().mean()).clamp_min(1e-30)      # inputs that are always 0: U' = U
    fitted = U @ (V @ cross @ Q.T) + rho * U
    held = G + rho * torch.eye(len(G), dtype=G.dtype, device=G.device)
    return torch.linalg.solve(held, fitted, left=False).float(), G


def refitted(name, streams):
    """`refit` of layer `name`; streams: an anchored.Streams of the block as it was (`.block`)
    and as it is rounded up to there (`.compressed`)."""
    was = streams.block.get_submodule(name)
    rounded = streams.compressed.get_submodule(name)
    gram = streams.get(f"{READS[name]}.gram")
    cross = streams.get(f"{READS[name]}.cross")
    return refit(was.U.weight, was.V.weight, rounded.V.weight, gram, cross)
