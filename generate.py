"""Stage 5: generate text with a dense or compressed checkpoint (Section 4.3 and Appendix A.4).

    python generate.py --ckpt out/demo-air-0.6 --prompt "def main("
    python generate.py --ckpt out/demo-air-0.6 --prompt-file prompts.txt --temperature 0 --stats

Decoding reads every weight and the whole cache once a token, so what is cached decides what compression saves:
O1 keys are rotated once, when they are written; O2 values are cached as V_kᵀx, r_v numbers a token, and U_k is applied to
their weighted sum (Eq. 28); O3 the cache is allocated once and written in place.

Shapes: B prompts, T new columns, S columns of the cache, H heads, G kv heads, D head size, n in, m out, r rank of a V_kᵀ.
Prompts are padded on the left: all rows end in the same column, and a row's position is its column minus its `start`.
"""
import math
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from model import LowRank, rope, rotate, wide
from support.checkpoint import Checkpoint
from support.fast import Matrix, Reads, align
from support.script import InputError, free_bytes, parser, pick_device, run
from support.texts import Tokenizer

CHUNK = 2048        # columns × rows of one piece of a prompt: bounds the memory of the prefill
SPAN = 256          # a captured graph attends to a multiple of this many columns


def filtered(logits, temperature=1.0, top_k=0, top_p=1.0):
    """Probabilities (..., vocab) of the next token: softmax(logits/temperature), limited to the `top_k` most likely tokens
    (0: all), then to the fewest whose probability reaches `top_p`. Temperature 0: all on the largest logit."""
    if temperature == 0:
        return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    probs = ((logits - logits.amax(-1, keepdim=True)).float() / temperature).softmax(-1)
    if not top_k and top_p == 1:
        return probs
    probs, order = probs.sort(descending=True, stable=True)
    if top_k:
        probs[..., top_k:] = 0
        probs = probs / probs.sum(-1, keepdim=True)
    if top_p < 1:
        probs = probs * (probs.cumsum(-1) - probs < top_p)          # drop what begins at or beyond the nucleus
    return torch.zeros_like(probs).scatter_(-1, order, probs / probs.sum(-1, keepdim=True))


class Sampler:
    """Draws the next tokens (B,) from logits (B, vocab); -1 for a row whose logits are not finite.

    Row b takes one uniform number a token from a CPU generator seeded with seed + b, whatever stands beside it and whatever the
    device. `penalty` divides positive, multiplies negative logits of tokens the row already has (CTRL, Keskar et al., 2019)."""

    def __init__(self, prompts, vocab, steps, device, temperature=1.0, top_k=0, top_p=1.0, penalty=1.0, seed=0):
        self.temperature, self.top, self.penalty = temperature, (top_k, top_p), penalty
        draw = lambda b: torch.rand(steps, generator=torch.Generator().manual_seed(seed + b), dtype=torch.float64)
        self.uniform = torch.stack([draw(b) for b in range(len(prompts))], dim=1).to(device)            # (steps, B)
        self.drawn = torch.zeros(1, dtype=torch.long, device=device)                    # a tensor, so that a graph can count
        self.seen = torch.stack([torch.bincount(torch.tensor(ids), minlength=vocab) > 0 for ids in prompts]).to(device)

    def __call__(self, logits):
        finite, logits = torch.isfinite(logits).all(-1), logits.float()
        if self.penalty != 1:
            logits = torch.where(self.seen, torch.where(logits > 0, logits / self.penalty, logits * self.penalty), logits)
        if self.temperature == 0:
            token = logits.argmax(-1)
        else:
            probs = filtered(logits, self.temperature, *self.top)
            cdf = probs.double().cumsum(-1)
            u = self.uniform.index_select(0, self.drawn).T                              # (B, 1)
            token = ((cdf > u * cdf[:, -1:]) & (probs > 0)).int().argmax(-1)            # the first beyond u
            self.drawn += 1
        self.seen.scatter_(1, token[:, None], True)
        return token.masked_fill(~finite, -1)


def value_shape(cfg, l, o2=True):
    """(heads, width) of a cached value in block l: (1, r_v) where the low-rank form is the smaller one, else (G, D)."""
    r = cfg.ranks.get(f"model.layers.{l}.self_attn.v_proj")
    full = cfg.n_kv_heads, cfg.head_dim
    return (1, r) if o2 and r and r < math.prod(full) else full


def estimate(cfg, B, T, S, itemsize, o1=True, o2=True, o3=True):
    """(bytes of the cache, bytes of all else beside the weights at its peak) for B prompts of T tokens and S columns."""
    keys, values = cfg.n_kv_heads * cfg.head_dim, [math.prod(value_shape(cfg, l, o2)) for l in range(cfg.n_layers)]
    copies = B * S * keys * itemsize * ((min(values) < keys) + 3 * (not o1) + (not o3))     # of one block's keys or full values
    chunk = B * min(T, max(1, CHUNK // B))
    mask = chunk * S * cfg.n_heads // cfg.n_kv_heads * (itemsize + 1)
    rows = chunk * ((4 * cfg.dim + 3 * cfg.n_heads * cfg.head_dim + 4 * cfg.hidden) * itemsize + 8 * cfg.dim)
    return (B * S * (cfg.n_layers * keys + sum(values)) * itemsize,
            copies + max(mask + rows, B * S * cfg.n_heads * (itemsize + 8)) + 6 * 4 * B * cfg.vocab)


class Cache:
    """Keys (B, G, S, D) and values (B, G, S, D) or (B, 1, S, r_v) of every block. Static: allocated once, zeroed (a masked
    column must hold finite numbers), written in place. Otherwise grown by concatenation, as most libraries do."""

    def __init__(self, cfg, B, S, o2, static, like):
        new = lambda heads, width: like.new_zeros(B, heads, S if static else 0, width)
        self.k = [new(cfg.n_kv_heads, cfg.head_dim) for _ in range(cfg.n_layers)]
        self.v, self.static = [new(*value_shape(cfg, l, o2)) for l in range(cfg.n_layers)], static

    def write(self, l, k, v, columns, span):
        """Write k, v (B, heads, T, width) into `columns` (T,) of block l; returns its first `span` columns."""
        for store, new in ((self.k, k), (self.v, v)):
            store[l] = store[l].index_copy_(2, columns, new) if self.static else torch.cat((store[l], new), dim=2)
        return self.k[l][:, :, :span], self.v[l][:, :, :span]

    def bytes(self):
        return sum(t.nbytes for t in self.k + self.v)


def check_prompts(prompts, cfg):
    """Raise InputError for an empty prompt or one that leaves no room in the model's context."""
    for n in map(len, prompts):
        if not 0 < n < cfg.context:
            raise InputError(f"the prompt has {n} tokens; expected 1 to {cfg.context - 1}, below the model's context")


class Decoder:
    """A model prepared for generation: `prefill` a batch of prompts, then `step` (or `advance`) one token a row at a time.

    o1, o2, o3: see the top of this file. fuse: layers that read the same input share one product. graph: on CUDA a step,
    drawing included, is captured once and replayed; needs o3. Each can be switched off alone: the logits stay the model's."""

    def __init__(self, model, o1=True, o2=True, o3=True, fuse=True, graph=True):
        self.model, self.cfg, self.o1, self.o2, self.o3 = model, model.cfg, o1, o2, o3
        self.embedding, self.norm = model.model.embed_tokens.weight, model.model.norm.weight
        self.device, self.dtype, G, D = self.embedding.device, self.embedding.dtype, self.cfg.n_kv_heads, self.cfg.head_dim
        self.graph = graph and o3 and self.device.type == "cuda"
        self.head = Matrix(model.lm_head.weight)
        for name, layer in model.named_modules() if self.device.type == "cuda" else ():
            if isinstance(layer, LowRank) and not name.endswith("v_proj"):              # its rank is the cache's width
                align(layer)
        self.parts = []
        for l, block in enumerate(model.model.layers):
            att, mlp, U = block.self_attn, block.mlp, None
            qkv = Reads(att.q_proj, att.k_proj, att.v_proj, fuse=fuse)
            if value_shape(self.cfg, l, o2) != (G, D):
                U = att.v_proj.U.weight.unflatten(0, (G, D)).mT                         # O2: U_k by kv head, (G, r, D)
            self.parts.append(SimpleNamespace(
                norms=(block.input_layernorm.weight, block.post_attention_layernorm.weight), qkv=qkv, U=U, out=Reads(att.o_proj),
                mlp=Reads(mlp.gate_proj, mlp.up_proj, fuse=fuse), down=Reads(mlp.down_proj)))

    @torch.no_grad()
    def prefill(self, prompts, steps):
        """Start a batch: `prompts` lists of token ids, room for `steps` more tokens -> next logits (B, vocab).
        Raises InputError for an empty prompt, one that fills the context, or a batch that would not fit in memory."""
        check_prompts(prompts, self.cfg)
        B, T, self.cache, self.graphs = len(prompts), max(map(len, prompts)), None, {}  # the last batch's, freed first
        S = self.width = T + steps
        need = sum(estimate(self.cfg, B, T, S, self.dtype.itemsize, self.o1, self.o2, self.o3))
        if (free := free_bytes(self.device)) is not None and need > free:
            raise InputError(f"{B} x {S} tokens need about {need / 1e9:.2f} GB beside the weights, {free / 1e9:.2f} GB are free "
                             f"on {self.device}; generate fewer tokens or fewer prompts at a time, or use --dtype bfloat16")
        ids = torch.stack([F.pad(torch.tensor(row), (T - len(row), 0)) for row in prompts]).to(self.device)
        start = torch.tensor([T - len(row) for row in prompts], device=self.device)
        self.start = start if any(len(row) < T for row in prompts) else None            # (B,)
        self.angles = [table.to(self.dtype) for table in rope(self.cfg, S, self.device)]                # (S, D)
        self.cache = Cache(self.cfg, B, S, self.o2, self.o3, self.embedding)
        self.token = torch.zeros(B, dtype=torch.long, device=self.device)
        self.sampler = lambda logits: self.token
        self.column, self.filled = torch.tensor([T], device=self.device), T             # the next column, there and here
        self.pool = torch.cuda.graph_pool_handle() if self.graph else None
        for columns in torch.arange(T, device=self.device).split(max(1, CHUNK // B)):
            self.logits = self.forward(ids[:, columns], columns, int(columns[-1]) + 1)
        return self.logits

    def step(self, token):
        """Put `token` (B,) into the next column -> the logits (B, vocab) that follow it."""
        self.token.copy_(token)
        self.advance()
        return self.logits

    @torch.no_grad()
    def advance(self):
        """`token` goes into the next column, new `logits` follow from it, and `sampler` draws the next `token`."""
        span, self.filled = self.filled + 1, self.filled + 1
        if not self.graph:
            return self.body(span)
        span = min(-(-span // SPAN) * SPAN, self.width)
        if span in self.graphs:
            return self.graphs[span].replay()
        self.body(span)                                 # this step is run, and warms up what capturing needs
        self.graphs[span] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graphs[span], pool=self.pool):
            self.body(span)                             # recorded for the next ones

    def body(self, span):
        self.logits.copy_(self.forward(self.token[:, None], self.column, span))
        self.token.copy_(self.sampler(self.logits))
        self.column += 1

    def rms_norm(self, x, weight):
        return F.rms_norm(x, weight.shape, weight, self.cfg.norm_eps)                   # one kernel on CUDA, not seven

    def rotation(self, columns):
        """(cos, sin) at the positions of `columns` (T,), each (1, T, D), or (B, 1, T, D) where rows start apart."""
        position = columns if self.start is None else (columns - self.start[:, None]).clamp_min(0)
        return [table[position].unsqueeze(-3) for table in self.angles]

    def mask(self, columns, span):
        """What is added to the scores of queries in `columns` (T,): 0 for columns up to their own, from the row's start on;
        -inf elsewhere. (1 or B, 1, H/G·T, span). Padding sees itself, so that its own numbers stay finite."""
        every, own = torch.arange(span, device=self.device), columns[:, None]
        seen = every <= own                                                             # (T, span)
        if self.start is not None:
            seen = seen & (every >= self.start[:, None, None]) | (every == own)         # (B, T, span)
        mask = torch.zeros(seen.shape, dtype=self.dtype, device=self.device).masked_fill_(~seen, -math.inf)
        return mask.view(-1, 1, len(columns), span).repeat(1, 1, self.cfg.n_heads // self.cfg.n_kv_heads, 1)

    def forward(self, ids, columns, span):
        """Token ids (B, T) in `columns` (T,), which see no more than the first `span` -> logits (B, vocab) after the last."""
        x, rotation = F.embedding(ids, self.embedding), self.rotation(columns)
        alone = ids.shape[1] == 1 and not self.graph            # one query, in the last column: only padding is to be masked
        mask = None if alone and self.start is None else self.mask(columns, span)
        every = None if self.o1 else self.rotation(torch.arange(span, device=self.device))
        for l, part in enumerate(self.parts):
            h = self.rms_norm(x, part.norms[0])
            x = x + part.out(self.attention(l, part, h, rotation, every, columns, span, mask))[0]
            gate, up = part.mlp(self.rms_norm(x, part.norms[1]))                        # (B, T, hidden)
            x = x + part.down(F.silu(gate) * up)[0]
        return self.head(self.rms_norm(x[:, -1:], self.norm))[0][:, 0]

    def attention(self, l, part, h, rotation, every, columns, span, mask):
        """Attention of block l over the cache: h (B, T, dim) -> (B, T, H·D). A kv head's queries stand in one group beside it,
        so that neither keys nor values are repeated."""
        (B, T, _), H, G, D = h.shape, self.cfg.n_heads, self.cfg.n_kv_heads, self.cfg.head_dim
        split = lambda t: t.view(B, t.shape[1], -1, D).transpose(1, 2)
        q, k, v = part.qkv.first(h)
        q, k = split(part.qkv.second(0, q)), split(part.qkv.second(1, k))               # (B, H, T, D), (B, G, T, D)
        if self.o1:
            q, k = rotate(torch.cat((q, k), dim=1), rotation).split((H, G), dim=1)
        else:
            q = rotate(q, rotation)
        v = split(part.qkv.second(2, v)) if part.U is None else v[:, None]              # O2: (B, 1, T, r)
        k, v = self.cache.write(l, k, v, columns, span)
        k = k if self.o1 else rotate(k, every)
        q = q.reshape(B, G, -1, D)                                                      # (B, G, H/G·T, D)
        if part.U is not None and T == 1:
            scores = (q * D ** -0.5) @ k.mT                                             # (B, G, H/G, span)
            weights = wide(scores if mask is None else scores + mask).softmax(-1).to(v.dtype)
            mixed = weights.view(B, 1, H, span) @ v                                     # Σ a_t v_t, (B, 1, H, r)
            mixed = mixed.view(B, G, H // G, -1).transpose(0, 1).reshape(G, B * H // G, -1)
            y = torch.bmm(mixed, part.U)                                                # Eq. 28: (Σ a_t v_t) U_kᵀ, once a head
            y = y if part.qkv.bias[2] is None else y + part.qkv.bias[2].view(G, 1, D)   # the weights a_t sum to 1
            return y.view(G, B, -1).transpose(0, 1).reshape(B, 1, -1)
        if part.U is not None:      # many queries: expanding the values once costs less than sums r wide for every query
            v = split(part.qkv.second(2, v[:, 0]))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)                     # (B, G, H/G·T, D)
        return y.reshape(B, -1, T, D).transpose(1, 2).reshape(B, T, -1)


def generate(decoder, prompts, max_new_tokens, eos=frozenset(), stop=lambda row, token: False, **sampling):
    """Yield, step by step, the B next tokens: ids, None for a row that has ended. `prompts`: B lists of token ids.

    A row ends after `max_new_tokens`, at the end of the model's context, before any id in `eos`, or when stop(row, token),
    called once for every token, is true. `sampling`: temperature, top_k, top_p, penalty, seed of `Sampler`.
    Raises InputError as `Decoder.prefill` does, RuntimeError for logits that are not finite."""
    left = [min(max_new_tokens, decoder.cfg.context - len(ids)) for ids in prompts]
    logits = decoder.prefill(prompts, max(left))
    decoder.sampler = Sampler(prompts, decoder.cfg.vocab, max(left), decoder.device, **sampling)
    decoder.token.copy_(decoder.sampler(logits))
    while True:
        drawn = decoder.token.tolist()
        for b, token in enumerate(drawn):
            if left[b] and token < 0:
                raise RuntimeError("the logits are not finite; try --dtype float32")
            drawn[b] = token if left[b] and token not in eos else None
            left[b] = 0 if drawn[b] is None or stop(b, token) else left[b] - 1
        if drawn.count(None) < len(drawn):
            yield drawn
        if not any(left):
            return
        decoder.advance()


class Text:
    """One prompt and its continuation. `push` is the `stop` of generate: it takes a token, prints what is new when `live`, and
    is true once one of `stops` has appeared in the continuation, which then ends before it."""

    def __init__(self, prompt, ids, tokenizer, stops, live):
        self.ids, self.decode, self.stops, self.live = ids[len(tokenizer.bos):], tokenizer.decode, stops, live
        self.prompt, self.before, self.text, self.shown = prompt, len(tokenizer.decode(self.ids)), prompt, 0

    def push(self, token):
        self.ids.append(token)
        more = self.decode(self.ids)[self.before:]
        end = min((at for stop in self.stops if (at := more.find(stop)) >= 0), default=None)
        self.text = self.prompt + more[:end]
        # Held back: a character whose bytes have not all been drawn, and what may be the beginning of a stop string.
        begun = max((n for stop in self.stops for n in range(1, len(stop)) if more.endswith(stop[:n])), default=0)
        hold = 0 if end is not None else len(more) if more.endswith("\ufffd") else begun
        if self.live:
            print(self.text[self.shown:len(self.text) - hold], end="", flush=True)
            self.shown = max(self.shown, len(self.text) - hold)
        return end is not None


def read_prompts(path):
    """The lines of the file `path` that are not blank. Raises InputError where there is none."""
    try:
        prompts = [line for line in Path(path).read_text("utf-8").splitlines() if line]
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"--prompt-file {path} cannot be read as UTF-8 text ({e})") from None
    if not prompts:
        raise InputError(f"{path} has no prompt; expected one a line")
    return prompts


def main():
    p = parser(__doc__)
    what = p.add_mutually_exclusive_group()
    what.add_argument("--prompt", default="import ")
    what.add_argument("--prompt-file", help="one prompt a line, blank lines left out; all are continued as one batch")
    p.add_argument("--max-new-tokens", type=int, default=100)
    p.add_argument("--temperature", type=float, default=0.8, help="0 takes the most likely token (default 0.8)")
    p.add_argument("--top-k", type=int, default=0, help="sample from the k most likely tokens only (default 0: all)")
    p.add_argument("--top-p", type=float, default=1.0, help="sample from the likeliest tokens that together reach p (default 1)")
    p.add_argument("--repetition-penalty", type=float, default=1.0, help="above 1: tokens already there become less likely")
    p.add_argument("--seed", type=int, default=0, help="prompt i draws with seed + i")
    p.add_argument("--stop", action="append", default=[], help="end before this text; can be given more than once")
    p.add_argument("--off", nargs="+", default=[], choices=("o1", "o2", "o3", "fuse", "graph"), help="switch these off")
    p.add_argument("--stats", action="store_true", help="tokens a second, time to the first token, bytes of the cache")
    args = p.parse_args()
    for option, value, good, expected in (
            ("--temperature", args.temperature, 0 <= args.temperature < math.inf, "0 or more"),
            ("--top-k", args.top_k, args.top_k >= 0, "0 or more"),
            ("--top-p", args.top_p, 0 < args.top_p <= 1, "above 0 and at most 1"),
            ("--repetition-penalty", args.repetition_penalty, 0 < args.repetition_penalty < math.inf, "above 0"),
            ("--stop", args.stop, all(args.stop), "some text"),
            ("--max-new-tokens", args.max_new_tokens, args.max_new_tokens >= 1, "1 or more")):
        if not good:
            raise InputError(f"{option} is {value}; expected {expected}")
    if not args.prompt:
        raise InputError("the prompt is empty; expected some text")
    prompts = [args.prompt] if args.prompt_file is None else read_prompts(args.prompt_file)
    ckpt = Checkpoint(args.ckpt)
    tokenizer = Tokenizer(ckpt)
    device, dtype, why = pick_device(args.device, args.dtype)
    print(f"{args.ckpt} on {device}, {str(dtype)[6:]} ({why})", file=sys.stderr)
    ids = [tokenizer.bos + tokenizer.encode(prompt) for prompt in prompts]
    check_prompts(ids, ckpt.cfg)
    decoder = Decoder(ckpt.model(device, dtype), **{name: False for name in args.off})
    texts = [Text(prompt, row, tokenizer, args.stop, live=len(ids) == 1) for prompt, row in zip(prompts, ids)]
    begin, marks = time.perf_counter(), []                          # marks: (time, tokens) of every step
    for drawn in generate(decoder, ids, args.max_new_tokens, tokenizer.eos, lambda row, token: texts[row].push(token),
                          temperature=args.temperature, top_k=args.top_k, top_p=args.top_p,
                          penalty=args.repetition_penalty, seed=args.seed):
        marks.append((time.perf_counter() - begin, len(drawn) - drawn.count(None)))
    for i, text in enumerate(texts, 1):
        print(text.text[text.shown:] if text.live else f"--- {i} of {len(ids)}\n{text.text}")
    print(f"{sum(n for _, n in marks)} tokens", file=sys.stderr)
    if args.stats and marks:
        (first, n), (last, _) = marks[0], marks[-1]
        rate = (sum(n for _, n in marks) - n) / (last - first) if len(marks) > 1 else math.nan
        print(f"{rate:.1f} tokens/s after the first, which took {first:.3f} s; cache of {len(ids)} x "
              f"{decoder.width if decoder.o3 else decoder.filled} tokens: {decoder.cache.bytes():,} bytes", file=sys.stderr)


if __name__ == "__main__":
    run(main)
