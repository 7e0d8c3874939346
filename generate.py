"""Stage 5: generate text with a dense or compressed checkpoint (Section 4.3, A.4).

    python generate.py --ckpt out/demo-air-0.6 --prompt "def main("
    python generate.py --ckpt out/demo-air-0.6 --prompt-file prompts.txt --stats
    python generate.py --ckpt out/vicuna-0.6 --chat --prompt "Who are you?"

Decoding reads every weight and the whole cache once a token, so what is cached decides
what compression saves. O1: keys are rotated once, when they are written. O2: values are
cached as V_kᵀx, r_v numbers a token, and U_k is applied to their weighted sum (Eq. 28).
O3: the cache is allocated once and written in place.

Shapes: B prompts, T new columns, S columns of the cache, H heads, G kv heads, D head
size, r rank of a V_kᵀ. Prompts are padded on the left: all rows end in the same column,
and a row's position is its column minus its `start`.
"""
import math
import sys
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from model import rope, rotate, wide
from support.checkpoint import Checkpoint
from support.fast import (Graphs, Matrix, SharedInput, Weight, align, compiled, matmul,
                          of_any_rank, of_any_size)
from support.script import InputError, TooLarge, free_bytes, parser, pick_device, run
from support.texts import read_prompts, typed
from support.tokenizer import Chat, Continuation, Tokenizer

CHUNK = 512     # tokens of all prompts that are read at once: a piece meets no later keys


# ------------------------------------------------------------ sampling
def filtered(logits, temperature=1.0, top_k=0, top_p=1.0):
    """Probabilities (…, vocab) of the next token: softmax(logits/temperature), filtered.

    To the `top_k` most likely tokens (0: all), then to the fewest whose probability
    reaches `top_p`. Temperature 0: all on the largest logit.
    """
    if temperature == 0:
        best = logits.argmax(-1, keepdim=True)
        return torch.zeros_like(logits).scatter_(-1, best, 1.0)
    shifted = (logits - logits.amax(-1, keepdim=True)).float()
    probs = (shifted / temperature).softmax(-1)
    if not top_k and top_p == 1:
        return probs
    probs, order = probs.sort(descending=True, stable=True)
    if top_k:
        probs[..., top_k:] = 0
        probs = probs / probs.sum(-1, keepdim=True)
    if top_p < 1:
        before = probs.cumsum(-1) - probs
        before[..., 0] = -1                    # the likeliest stays, whatever top_p is
        probs = probs * (before < top_p)       # drop what begins at or beyond the nucleus
    probs = probs / probs.sum(-1, keepdim=True)
    return torch.zeros_like(probs).scatter_(-1, order, probs)


@dataclass
class Sampling:
    """How the next token is drawn."""

    temperature: float = 1.0    # 0 takes the most likely token
    top_k: int = 0              # from the k most likely tokens; 0: from all
    top_p: float = 1.0          # from the likeliest tokens that together reach p
    penalty: float = 1.0        # divides positive, multiplies logits < 0 of tokens seen
    seed: int = 0               # row b draws with seed + b


class Sampler:
    """Draws the next tokens (B,) from logits (B, vocab); -1 where these are not finite.

    Row b takes one uniform number a token from a CPU generator of its own, whatever
    stands beside it and whatever the device. The penalty is CTRL's (Keskar et al.,
    2019).
    """

    def __init__(self, prompts, vocab, steps, device, sampling):
        self.sampling = sampling
        uniform = []
        seen = []
        for b, ids in enumerate(prompts):
            generator = torch.Generator().manual_seed(sampling.seed + b)
            uniform.append(torch.rand(steps, generator=generator, dtype=torch.float64))
            seen.append(torch.bincount(torch.tensor(ids), minlength=vocab) > 0)
        self.uniform = torch.stack(uniform, dim=1).to(device)                 # (steps, B)
        self.seen = torch.stack(seen).to(device)                              # (B, vocab)
        # How many were drawn: a tensor, so that a captured step can count.
        self.drawn = torch.zeros(1, dtype=torch.long, device=device)

    def __call__(self, logits):
        finite = torch.isfinite(logits).all(-1)
        logits = self.penalised(logits.float())
        s = self.sampling
        if s.temperature == 0:
            token = logits.argmax(-1)
        else:
            probs = filtered(logits, s.temperature, s.top_k, s.top_p)
            token = self.draw(probs)
        self.seen.scatter_(1, token[:, None], True)
        return token.masked_fill(~finite, -1)

    def penalised(self, logits):
        penalty = self.sampling.penalty
        if penalty == 1:
            return logits
        lowered = torch.where(logits > 0, logits / penalty, logits * penalty)
        return torch.where(self.seen, lowered, logits)

    def draw(self, probs):
        """One token a row by inversion: the first with cumulated probability above u."""
        cdf = probs.double().cumsum(-1)
        u = self.uniform.index_select(0, self.drawn).T                          # (B, 1)
        self.drawn += 1
        beyond = (cdf > u * cdf[:, -1:]) & (probs > 0)
        return beyond.int().argmax(-1)


# ------------------------------------------------------------ the cache
def key_heads(cfg, l):
    """How many the cache of block l has; none where its attention is left out."""
    return 0 if f"model.layers.{l}.self_attn" in cfg.removed else cfg.n_kv_heads


def value_shape(cfg, l, o2=True):
    """(heads, width) of a cached value in block l: (1, r_v) if less, else (G, D)."""
    r = cfg.ranks.get(f"model.layers.{l}.self_attn.v_proj")
    G = key_heads(cfg, l)
    D = cfg.head_dim
    if o2 and r and r < G * D:
        return 1, r
    return G, D


class Cache:
    """Keys (B, G, S, D) and values (B, G, S, D) or (B, 1, S, r_v) of a block.

    O3, `static`: allocated once, zeroed (a masked column must hold finite numbers),
    written in place. Otherwise grown by concatenation, as most libraries do.
    """

    def __init__(self, k, v, static):
        """k, v: zeroed, of all columns where `static`, else of none."""
        self.k = k
        self.v = v
        self.static = static

    def write(self, k, v, step):
        """Write k, v (B, heads, T, width) into a step's columns; returns what it sees."""
        if self.static:
            self.k.index_copy_(2, step.columns, k)
            self.v.index_copy_(2, step.columns, v)
        else:
            self.k = torch.cat((self.k, k), dim=2)
            self.v = torch.cat((self.v, v), dim=2)
        span = len(step.seen)
        return self.k[:, :, :span], self.v[:, :, :span]


@dataclass
class Step:
    """Where the new columns of a forward pass stand and what they see, in all blocks."""

    columns: torch.Tensor       # (T,) of the cache, where the new tokens go
    seen: torch.Tensor          # (span,) the columns of the cache that there are to see
    rotation: list              # RoPE's (cos, sin) at the new tokens' positions
    late_rotation: list | None  # … at those of the whole span, for keys cached unrotated
    mask: torch.Tensor | None   # added to the scores; None: nothing is masked


# ------------------------------------------------------------ attention
def attention_weights(q, k, mask):
    """softmax(q kᵀ/√D + mask) over k's columns: (B, G, H/G·T, S)."""
    scores = matmul(q * q.shape[-1] ** -0.5, k.mT)
    if mask is not None:
        scores = scores + mask
    return wide(scores).softmax(-1).to(q.dtype)


def cached_attention(q, k, v, mask):
    """softmax(q kᵀ/√D + mask) v: q (B, G, H/G·T, D); k, v (B, G, S, D) -> as q."""
    if torch.compiler.is_compiling():
        return matmul(attention_weights(q, k, mask), v)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def low_rank_attention(q, k, v, U, bias, mask):
    """Attention of one query over values of rank r.

    q (B, G, H/G, D), k (B, G, S, D), v (B, 1, S, r), U (G, r, D).
    Eq. 28: Σ_t a_t W_v x_t = U_k (Σ_t a_t V_kᵀx_t): the r numbers a token are summed,
    and U_k is applied once a head. A bias (G·D,) of the values comes after it: the a_t
    sum to 1. Returns (B, G, H/G, D).
    """
    B, G, heads, D = q.shape                                # heads: query heads a kv head
    a = attention_weights(q, k, mask)                           # (B, G, H/G, S)
    mixed = matmul(a.flatten(1, 2)[:, None], v)        # Σ a_t V_kᵀx_t         (B, 1, H, r)
    mixed = mixed.view(B, G, heads, -1).transpose(0, 1)         # (G, B, H/G, r)
    y = matmul(mixed.flatten(1, 2), U)                 # U_k, once a head    (G, B·H/G, D)
    if bias is not None:
        y = y + bias.view(G, 1, D)
    return y.view(G, B, heads, D).transpose(0, 1)


# ------------------------------------------------------------ the decoder
class CachedBlock:
    """A block prepared for decoding: what reads the same input shares a product."""

    def __init__(self, block, cfg, l, switches):
        self.cfg = cfg
        self.U = None
        # A half that is left out has none.
        self.turns = [half and half.turn for half in (block.self_attn, block.mlp)]
        self.attention_norm = block.input_layernorm.weight
        self.mlp_norm = block.post_attention_layernorm.weight
        self.key_shape = (key_heads(cfg, l), cfg.head_dim)
        self.value_shape = value_shape(cfg, l, switches.o2)
        how = {"fuse": switches.fuse}
        if switches.compile:
            how = {"fuse": False, "store": Weight}
        if block.self_attn:
            self.prepare_attention(block.self_attn, cfg, how)
        if block.mlp:
            self.gate_up = SharedInput(block.mlp.gate_proj, block.mlp.up_proj, **how)
            self.down = SharedInput(block.mlp.down_proj, **how)

    def prepare_attention(self, att, cfg, how):
        """What reads the same input shares a product; U_k by kv head."""
        # Qwen3 has a norm over each head of q and k.
        norms = (att.q_norm.weight, att.k_norm.weight) if cfg.qk_norm else (None, None)
        self.q_norm, self.k_norm = norms
        self.qkv = SharedInput(att.q_proj, att.k_proj, att.v_proj, **how)
        self.o = SharedInput(att.o_proj, **how)
        # O2: U_k by kv head, (G, r, D), where the values are cached as V_kᵀx.
        full = (cfg.n_kv_heads, cfg.head_dim)
        if self.value_shape != full:
            self.U = att.v_proj.U.weight.unflatten(0, full).mT
            self.value_shape = (1, self.U.shape[1])         # on a GPU r is aligned

    def vary(self):
        """Its weights are to be compiled for other blocks' ranks, too."""
        for layers in vars(self).values():
            if isinstance(layers, SharedInput):
                of_any_rank(layers)
        if self.U is not None:
            of_any_size(self.U, 1)

    def empty_cache(self, B, columns, like, static):
        """Its Cache of B rows, in the dtype and on the device of `like`."""
        stores = [like.new_zeros(B, heads, columns, width)
                  for heads, width in (self.key_shape, self.value_shape)]
        return Cache(*stores, static)

    def __call__(self, x, cache, step):
        """x (B, T, dim) -> (B, T, dim); writes the new columns of `cache`."""
        attention_turn, mlp_turn = self.turns
        if attention_turn:
            h = self.rms_norm(x, self.attention_norm)
            x = attention_turn(x) + self.o(self.attention(h, cache, step))[0]
        if mlp_turn:
            gate, up = self.gate_up(self.rms_norm(x, self.mlp_norm))    # (B, T, hidden)
            x = mlp_turn(x) + self.down(F.silu(gate) * up)[0]
        return x

    def attention(self, h, cache, step):
        """Attention over the cache: h (B, T, dim) -> (B, T, H·D).

        A kv head's queries stand in one group beside it, so neither keys nor values are
        repeated.
        """
        B, T, _ = h.shape
        H = self.cfg.n_heads
        G = self.cfg.n_kv_heads
        D = self.cfg.head_dim
        q, k, v = self.qkv.inner(h)
        q = self.heads(self.qkv.outer(0, q))                            # (B, H, T, D)
        k = self.heads(self.qkv.outer(1, k))                            # (B, G, T, D)
        if self.q_norm is not None:
            q = self.rms_norm(q, self.q_norm)
            k = self.rms_norm(k, self.k_norm)
        # O1: keys are cached rotated.
        if step.late_rotation is None:
            q, k = rotate(torch.cat((q, k), dim=1), step.rotation).split((H, G), dim=1)
        else:
            q = rotate(q, step.rotation)
        # O2: values are cached as V_kᵀx, (B, 1, T, r).
        v = self.heads(self.qkv.outer(2, v)) if self.U is None else v[:, None]
        k, v = cache.write(k, v, step)
        if step.late_rotation is not None:
            k = rotate(k, step.late_rotation)
        q = q.reshape(B, G, -1, D)                                      # (B, G, H/G·T, D)
        if self.U is not None and T == 1:
            y = low_rank_attention(q, k, v, self.U, self.qkv.bias[2], step.mask)
        else:
            # Many queries: values expanded once cost less than sums r wide for each.
            if self.U is not None:
                v = self.heads(self.qkv.outer(2, v[:, 0]))
            y = cached_attention(q, k, v, step.mask)
        return y.reshape(B, H, T, D).transpose(1, 2).reshape(B, T, -1)

    def heads(self, x):
        """(B, T, heads·D) -> (B, heads, T, D)."""
        return x.unflatten(-1, (-1, self.cfg.head_dim)).transpose(1, 2)

    def rms_norm(self, x, weight):
        # One kernel on CUDA, where model.py's are seven.
        return F.rms_norm(x, weight.shape, weight, self.cfg.norm_eps)


@dataclass
class Switches:
    """What makes decoding fast; the logits stay the same with each on or off."""

    o1: bool = True             # keys are cached rotated
    o2: bool = True             # values are cached as V_kᵀx
    o3: bool = True             # the cache is allocated once
    fuse: bool = True           # layers that read the same input share one product
    graph: bool = True          # CUDA: a step is captured once and replayed; needs o3
    compile: bool = False       # torch.compile makes one kernel of a block; needs o3


class Decoder:
    """A model prepared for generation: `prefill` a batch, then `step` one token a row.

    switches: those of Switches. The model's weights are taken over, not copied.
    """

    def __init__(self, model, **switches):
        self.on = Switches(**switches)
        self.on.compile &= self.on.o3                       # a growing cache is never the same
        self.model = model
        self.cfg = model.cfg
        self.embedding = model.model.embed_tokens.weight
        self.norm = model.model.norm.weight
        self.device = self.embedding.device
        self.dtype = self.embedding.dtype
        self.graph = self.on.graph and self.on.o3 and self.device.type == "cuda"
        self.head = Matrix(model.lm_head.weight)
        if self.device.type == "cuda":
            align(model)
        self.blocks = [CachedBlock(block, self.cfg, l, self.on)
                       for l, block in enumerate(model.model.layers)]
        # What a step runs; a prompt runs the plain one.
        self.fast_block = CachedBlock.__call__
        if self.on.compile:
            # All blocks are alike but for their ranks: compiled once.
            self.fast_block = compiled(self.fast_block)
            for block in self.blocks:
                block.vary()

    @torch.no_grad()
    def prefill(self, prompts, steps):
        """Start a batch: lists of token ids, room for `steps` more -> logits (B, vocab).

        Raises InputError for an empty prompt, one that fills the context, or a batch
        that would not fit in memory.
        """
        check_prompts(prompts, self.cfg)
        # The last batch's go first.
        self.cache = self.graphs = None
        B = len(prompts)
        T = max(map(len, prompts))
        self.width = T + steps
        self.check_memory(B, T)
        self.prepare(prompts, B, T)
        # All rows end in column T - 1, padded with their own first token: its numbers there
        # are finite where the row's own are.
        padded = [F.pad(torch.tensor(row), (T - len(row), 0), value=row[0]) for row in prompts]
        ids = torch.stack(padded).to(self.device)
        # The prompt, piece by piece.
        for columns in torch.arange(T, device=self.device).split(max(1, CHUNK // B)):
            self.logits = self.forward(ids[:, columns], columns, int(columns[-1]) + 1)
        return self.logits

    def prepare(self, prompts, B, T):
        """What steps read and write: tensors that stay in place, for a captured step."""
        # Where each row begins; None when all begin in column 0 and nothing is padding.
        start = torch.tensor([T - len(row) for row in prompts], device=self.device)
        self.start = start if start.any() else None                     # (B,)
        tables = rope(self.cfg, self.width, self.device)
        self.angles = [table.to(self.dtype) for table in tables]        # (S, D)
        columns = self.width if self.on.o3 else 0
        self.cache = [block.empty_cache(B, columns, self.embedding, self.on.o3)
                      for block in self.blocks]
        if self.on.compile:
            for cache in self.cache:
                of_any_size(cache.k, 2)
                of_any_size(cache.v, 2, 3)
        self.token = torch.zeros(B, dtype=torch.long, device=self.device)
        self.sampler = lambda logits: self.token
        # The next column, on the device and here.
        self.column = torch.tensor([T], device=self.device)
        self.filled = T
        self.graphs = Graphs(self.body, self.width) if self.graph else None

    def step(self, token):
        """Put `token` (B,) into the next column -> the logits (B, vocab) after it."""
        self.token.copy_(token)
        self.advance()
        return self.logits

    @torch.no_grad()
    def advance(self):
        """`token` goes into the next column, `logits` follow, the next is drawn."""
        self.filled += 1
        if self.graphs is None:
            self.body(self.filled)
        else:
            self.graphs.step(self.filled)

    def body(self, span):
        # A row that has ended goes on, if need be with −1, a draw from what is not finite.
        fed = self.token.clamp_min(0)
        self.logits.copy_(self.forward(fed[:, None], self.column, span))
        self.token.copy_(self.sampler(self.logits))
        self.column += 1

    def forward(self, ids, columns, span):
        """Ids (B, T) in `columns` (T,) that see `span` -> the last logits (B, vocab)."""
        # One query in the last column sees every column: only padding is to be masked.
        alone = ids.shape[1] == 1 and not self.graph
        seen = torch.arange(span, device=self.device)
        mask = None if alone and self.start is None else self.mask(columns, seen)
        late = None if self.on.o1 else self.rotation(seen)
        step = Step(columns, seen, self.rotation(columns), late, mask)
        if self.on.compile:
            of_any_size(seen, 0)
            if mask is not None:
                of_any_size(mask, 3)
        run_block = self.fast_block if ids.shape[1] == 1 else CachedBlock.__call__
        x = F.embedding(ids, self.embedding)                            # (B, T, dim)
        for block, cache in zip(self.blocks, self.cache):
            x = run_block(block, x, cache, step)
        return self.last_logits(x)

    def last_logits(self, x):
        """The last block's output (B, T, dim) -> the last column's logits (B, vocab)."""
        x = F.rms_norm(x[:, -1:], self.norm.shape, self.norm, self.cfg.norm_eps)
        return self.head(x)[0][:, 0]

    def rotation(self, columns):
        """(cos, sin) of `columns` (T,): (1, T, D), or (B, 1, T, D) where rows differ."""
        position = columns
        if self.start is not None:
            position = (columns - self.start[:, None]).clamp_min(0)     # (B, T)
        return [table[position].unsqueeze(-3) for table in self.angles]

    def mask(self, columns, every):
        """0 where a query in `columns` (T,) sees one of `every` (span,) column, else -inf.

        It sees those up to its own, from its row's start on. Padding sees itself, so
        that its own numbers stay finite. Returns (1, 1, H/G·T, span), or
        (B, 1, H/G·T, span) where rows begin apart.
        """
        own = columns[:, None]
        seen = every <= own                                             # (T, span)
        if self.start is not None:
            begun = every >= self.start[:, None, None]                  # (B, 1, span)
            seen = (seen & begun) | (every == own)                      # (B, T, span)
        mask = torch.zeros(seen.shape, dtype=self.dtype, device=self.device)
        mask.masked_fill_(~seen, -math.inf)
        # Every query head of a group sees the same.
        groups = self.cfg.n_heads // self.cfg.n_kv_heads
        return mask.view(-1, 1, len(columns), len(every)).repeat(1, 1, groups, 1)

    def cache_bytes(self):
        return sum(cache.k.nbytes + cache.v.nbytes for cache in self.cache)

    def check_memory(self, B, T):
        free = free_bytes(self.device)
        shape = (B, T, self.width)
        on = self.on
        need = sum(estimate(self.cfg, shape, self.dtype, on.o1, on.o2, on.o3))
        if free is not None and need > free:
            raise TooLarge(
                f"{B} x {self.width} tokens need about {need / 1e9:.2f} GB beside the "
                f"weights, {free / 1e9:.2f} GB are free on {self.device}; generate fewer "
                "tokens or fewer prompts at a time, or use --dtype bfloat16")


def check_prompts(prompts, cfg):
    """Raise InputError for an empty prompt or one that fills the model's context."""
    for n in map(len, prompts):
        if not 0 < n < cfg.context:
            raise InputError(f"the prompt has {n} tokens; expected 1 to "
                             f"{cfg.context - 1}, below the model's context")


def estimate(cfg, shape, dtype, o1=True, o2=True, o3=True):
    """(bytes of the cache, bytes of all else beside the weights at its peak).

    shape: B prompts of T tokens, S columns. The peak is a piece of a prompt (its mask
    and a block's activations) or a step over the whole cache (its scores, as wide as
    they are summed).
    """
    B, T, S = shape
    H = cfg.n_heads
    G = cfg.n_kv_heads
    D = cfg.head_dim
    size = dtype.itemsize
    keys = G * D
    values = [math.prod(value_shape(cfg, l, o2)) for l in range(cfg.n_layers)]
    every_key = sum(key_heads(cfg, l) * D for l in range(cfg.n_layers))
    cache = B * S * (every_key + sum(values)) * size
    # Copies of one block's keys or values: values expanded, keys rotated, a cache grown.
    copies = (min(values) < keys) + 3 * (not o1) + (not o3)
    # A piece of a prompt.
    tokens = B * min(T, max(1, CHUNK // B))
    mask = tokens * S * H // G * (size + 1)
    widths = 4 * cfg.dim + 3 * H * D + 4 * cfg.hidden
    piece = mask + tokens * (widths * size + 8 * cfg.dim)
    # A step: the scores in the model's dtype, and twice in fp32.
    scores = B * S * H * (size + 8)
    logits = 6 * 4 * B * cfg.vocab
    return cache, copies * B * S * keys * size + max(piece, scores) + logits


# ------------------------------------------------------------ the loop
def generate(decoder, prompts, max_new_tokens, eos=frozenset(), stop=None, **sampling):
    """Yield, step by step, the B next tokens: ids, None for a row that has ended.

    `prompts`: B lists of token ids. A row ends after `max_new_tokens`, at the end of
    the model's context, before any id in `eos`, or when stop(row, token), called once
    for every token, is true. `sampling`: fields of Sampling. Raises InputError as
    Decoder.prefill does, RuntimeError for logits that are not finite.
    """
    left = [min(max_new_tokens, decoder.cfg.context - len(ids)) for ids in prompts]
    logits = decoder.prefill(prompts, max(left))
    drawing = Sampling(**sampling)
    vocab = decoder.cfg.vocab
    if not any(left):
        return
    decoder.sampler = Sampler(prompts, vocab, max(left), decoder.device, drawing)
    decoder.token.copy_(decoder.sampler(logits))
    while True:
        drawn = decoder.token.tolist()
        for b, token in enumerate(drawn):
            if left[b] and token < 0:
                raise RuntimeError("the logits are not finite; try --dtype float32")
            # A row that has ended, or ends before this token, yields None from here on.
            if not left[b] or token in eos:
                drawn[b], left[b] = None, 0
                continue
            ends = stop is not None and stop(b, token)
            left[b] = 0 if ends else left[b] - 1
        if any(token is not None for token in drawn):
            yield drawn
        if not any(left):
            return
        decoder.advance()


# ------------------------------------------------------------ the command
def parse_arguments():
    p = parser(__doc__)
    what = p.add_mutually_exclusive_group()
    what.add_argument("--prompt", type=typed, default="import ")
    what.add_argument("--prompt-file",
                      help="one prompt a line, blank lines left out; one batch")
    p.add_argument("--chat", action="store_true",
                   help="a prompt is a message in the checkpoint's chat template")
    p.add_argument("--system", type=typed, help="with --chat: the system message before it")
    p.add_argument("--max-new-tokens", type=int, default=100)
    p.add_argument("--temperature", type=float, default=0.8,
                   help="0 takes the most likely token (default 0.8)")
    p.add_argument("--top-k", type=int, default=0,
                   help="sample from the k most likely tokens only (default 0: all)")
    p.add_argument("--top-p", type=float, default=1.0,
                   help="sample from the likeliest that together reach p (default 1)")
    p.add_argument("--repetition-penalty", type=float, default=1.0,
                   help="above 1: tokens already there become less likely")
    p.add_argument("--seed", type=int, default=0, help="prompt i draws with seed + i")
    p.add_argument("--stop", type=typed, action="append", default=[],
                   help="end before this text; can be given more than once")
    p.add_argument("--off", nargs="+", default=[], help="switch these off",
                   choices=("o1", "o2", "o3", "fuse", "graph"))
    p.add_argument("--compile", action="store_true",
                   help="torch.compile a step first, which takes some ten seconds")
    p.add_argument("--stats", action="store_true",
                   help="tokens a second, time to the first token, bytes of the cache")
    return p.parse_args()


def check_arguments(args):
    """Raise InputError for an option out of its range."""
    heat = args.temperature
    penalty = args.repetition_penalty
    ranges = {          # option: (value, whether it may be, what is expected)
        "--temperature": (heat, heat == 0 or 1e-6 <= heat < math.inf, "0, or 1e-6 and more"),
        "--top-k": (args.top_k, args.top_k >= 0, "0 or more"),
        "--top-p": (args.top_p, 0 < args.top_p <= 1, "above 0 and at most 1"),
        "--repetition-penalty": (penalty, 1e-3 <= penalty <= 1e3, "0.001 to 1000"),
        "--seed": (args.seed, abs(args.seed) < 2**62, "fewer than 19 digits"),
        "--stop": (args.stop, all(args.stop), "some text"),
        "--max-new-tokens": (args.max_new_tokens, args.max_new_tokens > 0, "1 or more"),
    }
    for option, (value, allowed, expected) in ranges.items():
        if not allowed:
            raise InputError(f"{option} is {value}; expected {expected}")
    if args.compile and "o3" in args.off:
        raise InputError("--compile needs o3, a cache that stays in place; leave one out")
    if args.system is not None and not args.chat:
        raise InputError("--system is part of a chat template; add --chat")


def speed_line(decoder, marks):
    """Tokens a second after the first, from (seconds so far, tokens) of every step."""
    first, _ = marks[0]
    last, _ = marks[-1]
    later = sum(tokens for _, tokens in marks[1:])
    rate = later / (last - first) if later else math.nan
    rows = len(decoder.token)
    columns = decoder.width if decoder.on.o3 else decoder.filled
    size = decoder.cache_bytes()
    return (f"{rate:.1f} tokens/s after the first, which took {first:.3f} s; "
            f"cache of {rows} x {columns} tokens: {size:,} bytes")


def main():
    args = parse_arguments()
    check_arguments(args)
    prompts = [args.prompt]
    if args.prompt_file is not None:
        prompts = read_prompts(args.prompt_file)
    ckpt = Checkpoint(args.ckpt)
    tokenizer = Tokenizer(ckpt)
    eos = tokenizer.endings(args.stop)
    device, dtype, why = pick_device(args.device, args.dtype)
    print(f"{args.ckpt} on {device}, {str(dtype)[6:]} ({why})", file=sys.stderr)
    ids = [tokenizer.bos + tokenizer.encode(prompt) for prompt in prompts]
    # What is printed before the first new token, and its ids: of a chat, nothing.
    starts = [(prompt, row[len(tokenizer.bos):]) for prompt, row in zip(prompts, ids)]
    if args.chat:
        chat = Chat(tokenizer, args.system)
        eos |= chat.eos
        ids = [chat.encode(prompt) for prompt in prompts]
        starts = [("", ())] * len(ids)
    check_prompts(ids, ckpt.cfg)
    switches = {name: False for name in args.off} | {"compile": args.compile}
    decoder = Decoder(ckpt.model(device, dtype), **switches)

    # One prompt is printed as it grows, several when all have ended.
    live = len(ids) == 1
    texts = [Continuation(*start, tokenizer, args.stop, live) for start in starts]
    sampling = {"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p,
                "penalty": args.repetition_penalty, "seed": args.seed}
    begin = time.perf_counter()
    marks = []                                      # (seconds so far, tokens) of a step
    for drawn in generate(decoder, ids, args.max_new_tokens, eos,
                          lambda b, token: texts[b].push(token), **sampling):
        tokens = sum(token is not None for token in drawn)
        marks.append((time.perf_counter() - begin, tokens))
    for i, text in enumerate(texts, 1):
        print(text.text[text.shown:] if live else f"--- {i} of {len(ids)}\n{text.text}")
    print(f"{sum(tokens for _, tokens in marks)} tokens", file=sys.stderr)
    if args.stats and marks:
        print(speed_line(decoder, marks), file=sys.stderr)


if __name__ == "__main__":
    run(main)
