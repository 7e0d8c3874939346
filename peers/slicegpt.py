"""SliceGPT: the residual stream turned to its principal directions, and the weakest deleted.

    python peers/slicegpt.py --ckpt demo --slicing 0.25 --out out/demo-sliced

RMSNorm(xQ) = RMSNorm(x)Q for orthogonal Q, so the stream before each half-block may be turned
by a matrix of its own: weights that read it absorb Q, weights that write to it the Q of the
next half, and what passes beside the half is turned from one to the other. Q has the
eigenvectors of the stream's Σxᵀx; all but the first s are deleted. It computes in fp32, whatever
--dtype evaluates in. Source: SliceGPT (Ashkboos et al., 2024).

Shapes: N windows, T tokens a window, d the width of the stream, s of the sliced one.
"""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))        # from any folder
from calibrate import embed
from model import PLAIN, rms_norm, rope, wide
from support.peers import arguments, peer_task, write_peer
from support.progress import told
from support.result import weights_of
from support.script import InputError, run

ROUND = 8               # s is a multiple of it, as in the released code
DAMP = 0.01             # of the mean diagonal, added to Σxᵀx before its eigenvectors
# {half: (its norm, the layers that read the stream, the one that writes to it)}
HALVES = {
    "self_attn": ("input_layernorm", ("q_proj", "k_proj", "v_proj"), "o_proj"),
    "mlp": ("post_attention_layernorm", ("gate_proj", "up_proj"), "down_proj"),
}


# ------------------------------------------------------------ directions
def width_at(d, slicing):
    """s of d: the share `slicing` is deleted, then rounded down to a multiple of ROUND."""
    return d if slicing == 0 else int((1 - slicing) * d) // ROUND * ROUND


@torch.no_grad()
def directions(h, s, normed, device):
    """(d, s), fp64, on `device`: the first eigenvectors of Σxᵀx over a stream h (N, T, d).

    normed: of RMSNorm's output, as the paper has it. Released code differs: it takes the
    stream itself.
    """
    d = h.shape[-1]
    gram = torch.zeros(d, d, dtype=torch.float64, device=device)
    for window in h:
        x = wide(window.to(device))
        if normed:
            x = rms_norm(x, torch.ones(d, device=device), 1e-12)
        gram += (x.mT @ x).double()
    gram.diagonal().add_(DAMP * gram.diagonal().mean())
    _, vectors = torch.linalg.eigh(gram)                        # ascending
    return vectors.flip(1)[:, :s]


@torch.no_grad()
def project(h, P):
    """The stream in its own basis without the deleted directions, in place: h P Pᵀ."""
    onto = (P @ P.mT).to(h.dtype)
    for i in range(len(h)):
        h[i] = h[i].to(onto.device) @ onto


@torch.no_grad()
def half_forward(block, half, h, angles):
    """What a half of a dense block adds to the stream h (N, T, d), in place."""
    norm = block.get_submodule(HALVES[half][0]).weight
    for i in range(len(h)):
        x = h[i:i + 1].to(norm.device)
        y = rms_norm(x, norm, block.cfg.norm_eps)
        added = block.attend(y, angles, PLAIN) if half == "self_attn" else block.feed(y, PLAIN)
        h[i:i + 1] = x + added


# ------------------------------------------------------------ weights
def narrow(P):
    """√(s/d) P (d, s): the sliced stream is √(s/d) xP, so that RMSNorm's mean over s numbers
    is that over d, and its ε what it was. What reads the stream divides by it."""
    d, s = P.shape
    return P * (s / d) ** 0.5


def reading(block, half, P):
    """{name: tensor} of a half's layers that read the stream: W diag(norm) P, (m, s)."""
    norm, layers, _ = HALVES[half]
    d, s = P.shape
    scale = block.get_submodule(norm).weight.double() * (d / s) ** 0.5
    tensors = {f"{norm}.weight": torch.ones(s)}
    for layer in layers:
        linear = block.get_submodule(f"{half}.{layer}")
        tensors[f"{half}.{layer}.weight"] = (linear.weight.double() * scale) @ P
        if linear.bias is not None:
            tensors[f"{half}.{layer}.bias"] = linear.bias
    for name, w in block.get_submodule(half).state_dict().items():
        if name.endswith("_norm.weight"):               # Qwen3's, over heads
            tensors[f"{half}.{name}"] = w
    return tensors


def writing(block, half, P, after):
    """Of the layer that writes to the stream: P'ᵀW, and of what passes by: P'ᵀP (s, s)."""
    layer = f"{half}.{HALVES[half][2]}"
    linear = block.get_submodule(layer)
    onto = narrow(after).mT
    tensors = {f"{layer}.weight": onto @ linear.weight.double(),
               f"{half}.turn.weight": after.mT @ P}
    if linear.bias is not None:
        tensors[f"{layer}.bias"] = onto @ linear.bias.double()
    return tensors


def sliced(ckpt, windows, s, normed, device):
    """Yield (l, {name: tensor}) of each sliced block, last what belongs to none.

    The directions of each half are those of the stream that the halves before it, sliced,
    make of the windows.
    """
    dtype = torch.float32
    L = ckpt.cfg.n_layers
    h = embed(ckpt, windows, dtype)                                     # (N, T, d)
    angles = rope(ckpt.cfg, h.shape[1], device)
    P = first = directions(h, s, normed, device)
    project(h, P)
    for l in told("block", range(L)):
        block = ckpt.block(l, device, dtype)
        tensors = {}
        for half in HALVES:
            tensors |= reading(block, half, P)
            half_forward(block, half, h, angles)
            after = directions(h, s, normed, device)
            project(h, after)
            tensors |= writing(block, half, P, after)
            P = after
        yield l, {f"model.layers.{l}.{name}": w.to(ckpt.dtype) for name, w in tensors.items()}
    norm, lm_head = ckpt.head()
    scale = norm.double() * (ckpt.cfg.dim / s) ** 0.5
    head = (lm_head.weight.double() * scale) @ P.cpu()
    table = ckpt.tensor("model.embed_tokens.weight").double() @ narrow(first).cpu()
    yield L, {"model.embed_tokens.weight": table.to(ckpt.dtype),
              "model.norm.weight": torch.ones(s, dtype=ckpt.dtype),
              "lm_head.weight": head.to(ckpt.dtype)}


def sliced_config(ckpt, s):
    """config.json's changes: a narrower model, whose heads stay as wide as they are."""
    cfg = ckpt.cfg
    return {"hidden_size": s, "head_dim": cfg.head_dim, "tie_word_embeddings": False}


def parameters(cfg, s):
    """Of a sliced model: two tables, the norms and, a block, what reads and writes the
    stream and the two turning matrices."""
    q = cfg.n_heads * cfg.head_dim
    kv = cfg.n_kv_heads * cfg.head_dim
    biases = {"self_attn.q_proj": q, "self_attn.k_proj": kv, "self_attn.v_proj": kv,
              "self_attn.o_proj": s, "mlp.gate_proj": cfg.hidden, "mlp.up_proj": cfg.hidden,
              "mlp.down_proj": s}
    block = s * (2 * q + 2 * kv + 3 * cfg.hidden) + 2 * s * s + 2 * s
    block += 2 * cfg.head_dim * cfg.qk_norm + sum(biases[name] for name in cfg.biases)
    return 2 * cfg.vocab * s + s + cfg.n_layers * block


# ------------------------------------------------------------ the command
def main():
    p = arguments(__doc__)
    p.add_argument("--slicing", type=float, default=0.25,
                   help="share of the stream's directions that is deleted (default 0.25)")
    p.add_argument("--normed", action="store_true", help="directions of the normed stream, as "
                   "in the paper (default: of the stream itself, as in the released code)")
    args = p.parse_args()
    if not 0 <= args.slicing < 1:
        raise InputError(f"--slicing is {args.slicing}; expected 0 or more, below 1")
    options = {"slicing": args.slicing, "normed": args.normed}
    task = peer_task("slicegpt", args, options)
    s = width_at(task.ckpt.cfg.dim, args.slicing)
    if not s:
        raise InputError(f"--slicing {args.slicing} leaves fewer than {ROUND} of "
                         f"{task.ckpt.cfg.dim} directions; expected less")
    tokens = task.windows.numel()
    cfg = task.ckpt.cfg
    # The stream twice through every half: once through its weights, once into Σxᵀx.
    flops = 2 * tokens * (task.ckpt.parameters() + 4 * cfg.n_layers * cfg.dim**2)
    blocks = sliced(task.ckpt, task.windows, s, args.normed, task.device)
    disk = {"result": parameters(cfg, s) * task.ckpt.dtype.itemsize + 2**22}
    cost = flops, 4 * tokens * cfg.dim, 8 * weights_of(task.ckpt, 0), disk
    write_peer(task, args, cost, blocks, sliced_config(task.ckpt, s),
               {"turned": True, "width": s, "dtype": "float32"})


if __name__ == "__main__":
    run(main)
