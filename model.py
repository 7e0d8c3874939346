"""A LLaMA-family transformer by hand: the network, its low-rank layers, and checkpoints on disk.

Covers LLaMA 1/2/3/3.1, Vicuna, TinyLlama, Mistral and Qwen2.5. Layers carry the names of the Hugging Face checkpoints
and RoPE is the half-split one, so a checkpoint loads without renaming or permuting anything.

Shapes: B windows, T tokens, H heads, G kv heads, D head size, m out, n in, k rank.
"""
import math
from types import SimpleNamespace

import torch
import torch.nn as nn
import torch.nn.functional as F

# ---------------------------------------------------------------------------------------------- the network
def rope(cfg, T, device="cpu"):
    """Rotary angles of positions 0 .. T-1 as (cos, sin), each (T, D) fp32.

    Source: RoFormer, half-split layout; LLaMA 3.1 rescales the low frequencies ('llama3'), 'linear' all of them.
    """
    s = cfg.rope_scaling
    freq = cfg.rope_theta ** -(torch.arange(0, cfg.head_dim, 2, device=device).float() / cfg.head_dim)  # (D/2,)
    if s["rope_type"] == "linear":
        freq = freq / s["factor"]
    elif s["rope_type"] == "llama3":
        turns = freq * s["original_max_position_embeddings"] / (2 * math.pi)     # rotations within the old context
        keep = (turns - s["low_freq_factor"]) / (s["high_freq_factor"] - s["low_freq_factor"])
        freq = freq * torch.lerp(torch.full_like(freq, 1 / s["factor"]), torch.ones_like(freq), keep.clamp(0, 1))
    angle = torch.outer(torch.arange(T, device=device).float(), freq).repeat(1, 2)
    return angle.cos(), angle.sin()


def rotate(x, angles):
    """Apply RoPE to x (B, heads, T, D)."""
    cos, sin = (a.to(x.dtype) for a in angles)
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
    """Causal softmax(q kᵀ/√D) v through the fused kernel. q (B, H, T, D); k, v (B, G, T, D); head h reads kv head h·G/H."""
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


# The five operations a block is made of. influence.py passes another set to propagate relevance through the same block.
PLAIN = SimpleNamespace(linear=lambda layer, x: layer(x), norm=rms_norm, silu=F.silu, mul=torch.mul, attention=attention)


class LowRank(nn.Module):
    """y = U(Vx) + b: a weight (m, n) of rank k as two factors, V (k, n) and U (m, k)."""

    def __init__(self, n, m, k, bias=False):
        super().__init__()
        self.V, self.U = nn.Linear(n, k, bias=False), nn.Linear(k, m, bias=bias)

    def forward(self, x):
        return self.U(self.V(x))


LAYERS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
          "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
# Layers that read the same input, so that one Gram matrix serves them; it carries the first one's name.
READS = {name: name for name in LAYERS} | {"self_attn.k_proj": "self_attn.q_proj",
                                           "self_attn.v_proj": "self_attn.q_proj", "mlp.up_proj": "mlp.gate_proj"}


class Block(nn.Module):
    """One decoder block: x + Attn(norm x), then x + MLP(norm x). Layer `name` of block l is model.layers.{l}.{name}."""

    def __init__(self, cfg, l):
        super().__init__()
        self.cfg = cfg
        q, kv = cfg.n_heads * cfg.head_dim, cfg.n_kv_heads * cfg.head_dim
        shapes = ((cfg.dim, q), (cfg.dim, kv), (cfg.dim, kv), (q, cfg.dim),
                  (cfg.dim, cfg.hidden), (cfg.dim, cfg.hidden), (cfg.hidden, cfg.dim))
        self.input_layernorm, self.self_attn = nn.RMSNorm(cfg.dim), nn.Module()           # holds a weight; rms_norm computes
        self.post_attention_layernorm, self.mlp = nn.RMSNorm(cfg.dim), nn.Module()
        for name, (n, m) in zip(LAYERS, shapes):
            part, leaf = name.split(".")
            bias = part == "mlp" and "mlp" in cfg.bias or part == "self_attn" and leaf[0] in cfg.bias
            k = cfg.ranks.get(f"model.layers.{l}.{name}")
            self.get_submodule(part).add_module(leaf, LowRank(n, m, k, bias) if k else nn.Linear(n, m, bias=bias))

    def forward(self, x, angles, ops=PLAIN):                                    # x (B, T, dim)
        cfg, att, mlp = self.cfg, self.self_attn, self.mlp
        (B, T, _), split = x.shape, lambda t: t.unflatten(-1, (-1, cfg.head_dim)).transpose(1, 2)
        h = ops.norm(x, self.input_layernorm.weight, cfg.norm_eps)
        q = rotate(split(ops.linear(att.q_proj, h)), angles)                    # (B, H, T, D)
        k = rotate(split(ops.linear(att.k_proj, h)), angles)                    # (B, G, T, D)
        v = split(ops.linear(att.v_proj, h))                                    # (B, G, T, D)
        mixed = ops.attention(q, k, v).transpose(1, 2).reshape(B, T, -1)        # (B, T, H·D)
        x = x + ops.linear(att.o_proj, mixed)
        h = ops.norm(x, self.post_attention_layernorm.weight, cfg.norm_eps)
        gate = ops.silu(ops.linear(mlp.gate_proj, h))                           # (B, T, hidden)
        return x + ops.linear(mlp.down_proj, ops.mul(gate, ops.linear(mlp.up_proj, h)))


class Llama(nn.Module):
    """Token ids (B, T) -> logits (B, T, vocab)."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg, self.model = cfg, nn.Module()
        self.model.embed_tokens = nn.Embedding(cfg.vocab, cfg.dim)
        self.model.layers = nn.ModuleList(Block(cfg, l) for l in range(cfg.n_layers))
        self.model.norm = nn.RMSNorm(cfg.dim)
        self.lm_head = nn.Linear(cfg.dim, cfg.vocab, bias=False)
        if cfg.tied:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, ids, ops=PLAIN):
        x = F.embedding(ids, self.model.embed_tokens.weight)                    # (B, T, dim)
        angles = rope(self.cfg, ids.shape[1], ids.device)
        for block in self.model.layers:
            x = block(x, angles, ops)
        return to_logits(x, self.model.norm.weight, self.lm_head, self.cfg, ops)


def to_logits(x, norm, lm_head, cfg, ops=PLAIN):
    """The last block's output (B, T, dim) -> logits (B, T, vocab)."""
    return ops.linear(lm_head, ops.norm(x, norm, cfg.norm_eps))
