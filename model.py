"""A LLaMA-family transformer by hand: configuration, network, low-rank layers.

Covers LLaMA 1/2/3/3.1, Vicuna, TinyLlama, Mistral, Qwen2.5 and Qwen3. Layers carry the
names of the Hugging Face checkpoints and RoPE is the half-split one, so a checkpoint loads
without renaming or permuting anything (support/checkpoint.py reads it).

Shapes: B windows, T tokens, H heads, G kv heads, D head size, m out, n in, k rank.
"""
import math
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch
import torch.nn as nn
import torch.nn.functional as F


# ------------------------------------------------------------ configuration
@dataclass
class Config:
    """The shape of a model; support/checkpoint.py makes one of a config.json."""

    vocab: int                  # token ids
    dim: int                    # width of the residual stream
    hidden: int                 # width of the MLP
    n_layers: int               # decoder blocks L
    n_heads: int                # query heads H
    n_kv_heads: int             # key/value heads G, a divisor of H
    head_dim: int               # D, usually dim / H
    context: int                # the longest window in tokens
    norm_eps: float             # ε of RMSNorm
    rope_theta: float           # RoPE's base
    rope_scaling: dict = field(default_factory=lambda: {"rope_type": "default"})
    tied: bool = False          # lm_head shares the embedding's weight
    qk_norm: bool = False       # Qwen3: an RMSNorm over each head of q and k
    biases: frozenset = frozenset()             # those of LAYERS that carry a bias
    ranks: dict = field(default_factory=dict)   # {layer: k} of the low-rank layers
    # Not in the paper: what its peers make, peers/slicegpt.py and peers/blockpruner.py.
    turned: bool = False        # a matrix turns the stream before each half is added to it
    removed: frozenset = frozenset()            # halves left out, model.layers.{l}.mlp

    @property
    def compressed(self):
        return bool(self.ranks or self.turned or self.removed)


# The seven layers of a block that are decomposed; of block l: model.layers.{l}.{name}.
LAYERS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
          "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")

# Layers that read one input, whose ΣXXᵀ serves them all under the first's name.
READS = {name: name for name in LAYERS} | {
    "self_attn.k_proj": "self_attn.q_proj",
    "self_attn.v_proj": "self_attn.q_proj",
    "mlp.up_proj": "mlp.gate_proj",
}
INPUTS = tuple(dict.fromkeys(READS.values()))       # the four distinct inputs of a block


# ------------------------------------------------------------ operations
def rope(cfg, T, device="cpu"):
    """Rotary angles of positions 0 .. T-1 as (cos, sin), each (T, D) fp32.

    Source: RoFormer, half-split layout. "linear" scaling slows all rotations down;
    LLaMA 3.1's "llama3" those that turn seldom within the old context.
    """
    scaling = cfg.rope_scaling
    exponent = torch.arange(0, cfg.head_dim, 2, device=device).float() / cfg.head_dim
    freq = cfg.rope_theta ** -exponent                                      # (D/2,)
    if scaling["rope_type"] == "linear":
        freq = freq / scaling["factor"]
    elif scaling["rope_type"] == "llama3":
        turns = freq * scaling["original_max_position_embeddings"] / (2 * math.pi)
        low = scaling["low_freq_factor"]
        high = scaling["high_freq_factor"]
        # From `high` turns on a frequency stays, below `low` it is divided by `factor`.
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        slowed = torch.full_like(freq, 1 / scaling["factor"])
        freq = freq * torch.lerp(slowed, torch.ones_like(freq), keep)
    position = torch.arange(T, device=device).float()
    angle = torch.outer(position, freq).repeat(1, 2)                        # (T, D)
    return angle.cos(), angle.sin()


def rotate(x, angles):
    """Apply RoPE to x (B, heads, T, D)."""
    cos, sin = (table.to(x.dtype) for table in angles)
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


def wide(x):
    """x in fp32, or in fp64 when it is that already."""
    return x if x.dtype == torch.float64 else x.float()


def rms_norm(x, weight, eps):
    """x / rms(x) · weight; the mean of squares in fp32 at least."""
    scale = torch.rsqrt(wide(x).pow(2).mean(-1, keepdim=True) + eps)
    return (wide(x) * scale).to(x.dtype) * weight


def attention(q, k, v):
    """Causal softmax(q kᵀ/√D) v through the fused kernel.

    q (B, H, T, D); k, v (B, G, T, D): H/G query heads in a row share a key/value head.
    """
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k = k.repeat_interleave(groups, dim=1)
        v = v.repeat_interleave(groups, dim=1)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


# The five operations a block is made of. influence.py passes another set to propagate
# relevance through the same block.
PLAIN = SimpleNamespace(
    linear=lambda layer, x: layer(x),
    norm=rms_norm,
    silu=F.silu,
    mul=torch.mul,
    attention=attention,
)


# ------------------------------------------------------------ the network
class LowRank(nn.Module):
    """y = U(Vx) + b: a weight (m, n) of rank k as two factors, V (k, n) and U (m, k)."""

    def __init__(self, n, m, k, bias=False):
        super().__init__()
        self.V = nn.Linear(n, k, bias=False)
        self.U = nn.Linear(k, m, bias=bias)

    def forward(self, x):
        return self.U(self.V(x))


def projection(cfg, l, name, n, m):
    """Layer `name` of block l, n inputs to m outputs; low-rank where cfg.ranks has it."""
    k = cfg.ranks.get(f"model.layers.{l}.{name}")
    bias = name in cfg.biases
    return LowRank(n, m, k, bias) if k else nn.Linear(n, m, bias=bias)


def turning(cfg):
    """What the stream goes through beside a half: nothing, but in a sliced model."""
    return nn.Linear(cfg.dim, cfg.dim, bias=False) if cfg.turned else nn.Identity()


class Block(nn.Module):
    """Decoder block l: x + Attn(norm x), then x + MLP(norm x)."""

    def __init__(self, cfg, l):
        super().__init__()
        self.cfg = cfg
        q = cfg.n_heads * cfg.head_dim
        kv = cfg.n_kv_heads * cfg.head_dim
        self.input_layernorm = nn.RMSNorm(cfg.dim)     # holds a weight; rms_norm computes
        self.self_attn = att = nn.Module()
        att.q_proj = projection(cfg, l, "self_attn.q_proj", cfg.dim, q)
        att.k_proj = projection(cfg, l, "self_attn.k_proj", cfg.dim, kv)
        att.v_proj = projection(cfg, l, "self_attn.v_proj", cfg.dim, kv)
        att.o_proj = projection(cfg, l, "self_attn.o_proj", q, cfg.dim)
        att.turn = turning(cfg)
        if cfg.qk_norm:
            att.q_norm = nn.RMSNorm(cfg.head_dim)
            att.k_norm = nn.RMSNorm(cfg.head_dim)
        self.post_attention_layernorm = nn.RMSNorm(cfg.dim)
        self.mlp = mlp = nn.Module()
        mlp.gate_proj = projection(cfg, l, "mlp.gate_proj", cfg.dim, cfg.hidden)
        mlp.up_proj = projection(cfg, l, "mlp.up_proj", cfg.dim, cfg.hidden)
        mlp.down_proj = projection(cfg, l, "mlp.down_proj", cfg.hidden, cfg.dim)
        mlp.turn = turning(cfg)
        for half in ("self_attn", "mlp"):
            if f"model.layers.{l}.{half}" in cfg.removed:
                setattr(self, half, None)

    def forward(self, x, angles, ops=PLAIN):
        """x (B, T, dim) -> (B, T, dim)."""
        if self.self_attn:
            h = ops.norm(x, self.input_layernorm.weight, self.cfg.norm_eps)
            x = self.self_attn.turn(x) + self.attend(h, angles, ops)
        if self.mlp:
            h = ops.norm(x, self.post_attention_layernorm.weight, self.cfg.norm_eps)
            x = self.mlp.turn(x) + self.feed(h, ops)
        return x

    def attend(self, h, angles, ops):
        """Attention over the normed stream h (B, T, dim) -> (B, T, dim)."""
        att = self.self_attn
        q = self.heads(ops.linear(att.q_proj, h))                       # (B, H, T, D)
        k = self.heads(ops.linear(att.k_proj, h))                       # (B, G, T, D)
        v = self.heads(ops.linear(att.v_proj, h))                       # (B, G, T, D)
        if self.cfg.qk_norm:
            q = ops.norm(q, att.q_norm.weight, self.cfg.norm_eps)
            k = ops.norm(k, att.k_norm.weight, self.cfg.norm_eps)
        mixed = ops.attention(rotate(q, angles), rotate(k, angles), v)  # (B, H, T, D)
        mixed = mixed.transpose(1, 2).flatten(2)                        # (B, T, H·D)
        return ops.linear(att.o_proj, mixed)

    def feed(self, h, ops):
        """SwiGLU over the normed stream: silu(gate) × up, then back to its width."""
        gate = ops.silu(ops.linear(self.mlp.gate_proj, h))              # (B, T, hidden)
        up = ops.linear(self.mlp.up_proj, h)                            # (B, T, hidden)
        return ops.linear(self.mlp.down_proj, ops.mul(gate, up))

    def heads(self, x):
        """(B, T, heads·D) -> (B, heads, T, D)."""
        return x.unflatten(-1, (-1, self.cfg.head_dim)).transpose(1, 2)


class Llama(nn.Module):
    """Token ids (B, T) -> logits (B, T, vocab)."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.model = nn.Module()
        # Uniform numbers: nn.Embedding's normal ones take a second even without memory.
        table = torch.rand(cfg.vocab, cfg.dim) - 0.5
        self.model.embed_tokens = nn.Embedding.from_pretrained(table, freeze=False)
        self.model.layers = nn.ModuleList(Block(cfg, l) for l in range(cfg.n_layers))
        self.model.norm = nn.RMSNorm(cfg.dim)
        self.lm_head = nn.Linear(cfg.dim, cfg.vocab, bias=False)
        if cfg.tied:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, ids, ops=PLAIN):
        x = F.embedding(ids, self.model.embed_tokens.weight)            # (B, T, dim)
        angles = rope(self.cfg, ids.shape[1], ids.device)
        for block in self.model.layers:
            x = block(x, angles, ops)
        return to_logits(x, (self.model.norm.weight, self.lm_head), self.cfg, ops)


def to_logits(x, head, cfg, ops=PLAIN):
    """The last block's output (B, T, dim) -> logits (B, T, vocab).

    head: (final norm's weight, lm_head).
    """
    norm, lm_head = head
    return ops.linear(lm_head, ops.norm(x, norm, cfg.norm_eps))
