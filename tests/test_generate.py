"""generate.py: every cached path against the uncached model, bytes of the cache, the drawing of tokens, the command."""
import itertools
import json
import math
import os
import shutil
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import generate as G
from conftest import ROOT, TINY, in_process, script, write_checkpoint
from experiments import decode, fig4, table9, table11
from experiments.shapes import SHAPES, at_rate, random_model
from model import LAYERS, Llama, LowRank
from support import fast
from support.checkpoint import Checkpoint
from support.config import compressed_config, parse_config
from support.script import InputError


def ranks(*k, layers=LAYERS):
    """The `air` section of a config.json: the ranks of LAYERS, in both blocks."""
    return {"air": {"ranks": {f"model.layers.{l}.{name}": r for l in (0, 1) for name, r in zip(layers, k)}}}


LOW = ranks(9, 7, 5, 10, 13, 11, 12)
CASES = {   # 4 heads of 8 in all of them
    "multi-head": dict(TINY, num_key_value_heads=4),
    "multi-head low-rank": dict(TINY, num_key_value_heads=4, **LOW),
    "grouped": TINY,
    "grouped low-rank": dict(TINY, **LOW),
    "one kv head low-rank": dict(TINY, num_key_value_heads=1, **LOW),
    "biases": dict(TINY, architectures=["Qwen2ForCausalLM"], model_type="qwen2"),
    "biases low-rank": dict(TINY, architectures=["Qwen2ForCausalLM"], model_type="qwen2", **LOW),
    "norms of q and k": dict(TINY, architectures=["Qwen3ForCausalLM"], model_type="qwen3", head_dim=8),
    "norms of q and k low-rank": dict(
        TINY, architectures=["Qwen3ForCausalLM"], model_type="qwen3", head_dim=8, attention_bias=True, **LOW
    ),
    "biases everywhere, wide heads, low-rank": dict(
        TINY, num_key_value_heads=4, head_dim=12, attention_bias=True, mlp_bias=True, **LOW),
    "values whose rank saves nothing": dict(TINY, **ranks(9, 7, 18, 10, 13, 11, 12)),
    "some layers dense, tied": dict(
        TINY, tie_word_embeddings=True, **ranks(6, 12, layers=("self_attn.v_proj", "mlp.up_proj"))),
}
PROMPTS = {"equal": (6, 6, 6), "unequal": (9, 1, 4), "one token": (1,)}
STEPS = 7


@pytest.fixture(scope="module", params=CASES, ids=lambda name: name.replace(" ", "-"))
def case(request, tmp_path_factory):
    """(model, {prompts: (sequences (rows of ids), their logits by the uncached model)}) in fp32."""
    model = Checkpoint(write_checkpoint(tmp_path_factory.mktemp("case"), CASES[request.param])).model()
    g, rows = torch.Generator().manual_seed(3), {}
    for name, lengths in PROMPTS.items():
        ids = [torch.randint(64, (n + STEPS,), generator=g) for n in lengths]
        rows[name] = ids, [model(row[None])[0] for row in ids]
    return model, rows


def follow(decoder, ids, lengths, each=None):
    """Prefill the first `lengths` ids of each row, then step through the rest; yields (row, position, logits)."""
    logits = decoder.prefill([row[:n].tolist() for row, n in zip(ids, lengths)], STEPS)
    for i in range(STEPS):
        for b, n in enumerate(lengths):
            yield b, n + i - 1, logits[b].clone()
        step = each or decoder.step
        logits = step(torch.stack([row[n + i] for row, n in zip(ids, lengths)]))


def stored(decoder):
    """[(keys, values)] of every block's cache."""
    return [(cache.k, cache.v) for cache in decoder.cache]


SWITCHES = [dict(zip(("o1", "o2", "o3", "fuse"), on)) for on in itertools.product((True, False), repeat=4)]


@pytest.mark.parametrize("prompts", PROMPTS)
def test_cached_logits_equal_the_uncached_models(case, prompts, monkeypatch):
    """At every step, with every combination of O1, O2, O3 and fused projections, the prompt in one piece or in many."""
    model, rows = case
    ids, expected = rows[prompts]
    for switches, chunk in itertools.product(SWITCHES, (2048, 6)):              # 6: pieces of 2 columns for 3 prompts
        monkeypatch.setattr(G, "CHUNK", chunk)
        decoder = G.Decoder(model, **switches)
        for b, t, logits in follow(decoder, ids, PROMPTS[prompts]):
            assert (logits - expected[b][t]).abs().max() < 1e-4, (switches, chunk, b, t)
    assert torch.equal(model(ids[0][None])[0], expected[0])                 # taken over, and still the same model
    own = {w.untyped_storage().data_ptr() for w in model.parameters()}      # and held once
    assert all(block.U is None or block.U.untyped_storage().data_ptr() in own for block in decoder.blocks)
    shared = [matrix for block in decoder.blocks for layers in (block.qkv, block.o, block.gate_up, block.down)
              for matrix in (*layers.V, *layers.U) if matrix is not None]
    assert {matrix.w.untyped_storage().data_ptr() for matrix in (*shared, decoder.head)} <= own


def test_tied_embeddings_are_held_once(tmp_path):
    """A Matrix moves what it stores: the embedding has to move with lm_head, or the largest matrix is there twice."""
    config = CASES["some layers dense, tied"]
    model = Checkpoint(write_checkpoint(tmp_path / "tied", config)).model()
    ids = torch.arange(2, 2 + STEPS + 4)
    expected = model(ids[None])[0]
    decoder = G.Decoder(model)
    stored = decoder.head.w.untyped_storage()
    for w in (model.model.embed_tokens.weight, model.lm_head.weight, decoder.embedding):
        assert w.untyped_storage().data_ptr() == stored.data_ptr()
    # A few columns at most pad the slices of the threads.
    assert stored.nbytes() < (config["vocab_size"] + torch.get_num_threads()) * config["hidden_size"] * 4
    for _, t, logits in follow(decoder, [ids], [4]):
        assert (logits - expected[t]).abs().max() < 1e-4
    assert torch.allclose(model(ids[None])[0], expected, atol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("G_kv, heads", [(1, 4), (2, 3), (4, 1)])
def test_eq_28_is_attention_over_the_expanded_values(G_kv, heads, biased, masked):
    """U_k after the sum over V_kᵀx against ordinary softmax attention over U_k V_kᵀx + b, query by query, in fp64."""
    B, S, D, r = 3, 11, 6, 5
    g = torch.Generator().manual_seed(G_kv)
    q, k, Vx, U = (torch.randn(*shape, generator=g, dtype=torch.float64)
                   for shape in ((B, G_kv, heads, D), (B, G_kv, S, D), (B, 1, S, r), (G_kv, r, D)))
    bias = torch.randn(G_kv * D, generator=g, dtype=torch.float64) if biased else None
    mask = None
    if masked:      # as the decoder's: a row's columns; one always stays
        hidden = torch.rand(B, 1, 1, S, generator=g) < 0.5
        hidden[..., -1] = False
        mask = torch.zeros(B, 1, 1, S, dtype=torch.float64).masked_fill_(hidden, -math.inf).repeat(1, 1, heads, 1)
    got = G.low_rank_attention(q, k, Vx, U, bias, mask)
    assert got.shape == q.shape and got.dtype == q.dtype
    for b, kv, head in itertools.product(range(B), range(G_kv), range(heads)):
        v = Vx[b, 0] @ U[kv] + (0 if bias is None else bias[kv * D:(kv + 1) * D])          # (S, D)
        scores = [sum(q[b, kv, head] * k[b, kv, t]).item() / math.sqrt(D) for t in range(S)]
        weights = [math.exp(x) * (mask is None or mask[b, 0, head, t].item() == 0) for t, x in enumerate(scores)]
        expected = sum(a * v[t] for t, a in enumerate(weights)) / sum(weights)
        assert (got[b, kv, head] - expected).abs().max() < 1e-12, (b, kv, head)


def test_a_captured_step_is_the_same_step(case):
    """What a CUDA graph records: fixed shapes, all columns, those not yet written masked. Run here on the CPU."""
    model, rows = case
    for prompts, lengths in PROMPTS.items():
        decoder = G.Decoder(model)

        def step(token):
            decoder.graph = True
            decoder.token.copy_(token)
            decoder.body(decoder.width)
            return decoder.logits
        for b, t, logits in follow(decoder, rows[prompts][0], lengths, step):
            assert (logits - rows[prompts][1][b][t]).abs().max() < 1e-4, (prompts, b, t)


def test_greedy_tokens_are_the_uncached_models(case):
    model, rows = case
    for (ids, _), lengths in zip(rows.values(), PROMPTS.values()):
        prompts = [row[:n].tolist() for row, n in zip(ids, lengths)]
        expected = [list(row) for row in prompts]
        for row in expected:
            for _ in range(STEPS):
                row.append(model(torch.tensor([row]))[0, -1].argmax().item())
        for switches in (SWITCHES[0], SWITCHES[-1]):
            steps = list(G.generate(G.Decoder(model, **switches), prompts, STEPS, temperature=0))
            assert [p + list(row) for p, row in zip(prompts, zip(*steps))] == expected


def test_graph_replays_the_eager_steps(case, monkeypatch, gpu):
    model, rows = case
    monkeypatch.setattr(fast, "SPAN", 4)                                    # several captures, several replays
    model = Llama(model.cfg).requires_grad_(False).eval()
    model.load_state_dict(case[0].state_dict())
    model = model.cuda()
    for prompts, lengths in PROMPTS.items():
        ids, expected = rows[prompts]
        for b, t, logits in follow(G.Decoder(model), [row.cuda() for row in ids], lengths):
            assert (logits.cpu() - expected[b][t]).abs().max() < 1e-3
        start = [row[:n].tolist() for row, n in zip(ids, lengths)]
        for sampling in (dict(temperature=0), dict(top_k=8, top_p=0.9, penalty=1.2, seed=5)):
            a, b = (list(G.generate(G.Decoder(model, graph=graph), start, STEPS, **sampling))
                    for graph in (True, False))
            assert a == b


def test_cache_holds_exactly_keys_and_ranks(case):
    """(n_kv·d_h + r_v) numbers a token and layer; 2·n_kv·d_h where no values are low-rank or the rank saves nothing."""
    cfg, model = case[0].cfg, case[0]
    full = cfg.n_kv_heads * cfg.head_dim
    for o2, o3, dtype in itertools.product((True, False), (True, False), (torch.float32, torch.bfloat16)):
        half = Llama(cfg).requires_grad_(False)
        half.load_state_dict(model.state_dict())
        decoder = G.Decoder(half.to(dtype), o2=o2, o3=o3)
        decoder.prefill([[1, 2, 3], [4, 5]], 6)
        columns = 9 if o3 else 3                                            # allocated at once, or as far as grown
        r = cfg.ranks.get("model.layers.0.self_attn.v_proj", full)
        for k, v in stored(decoder):
            assert k.nbytes == 2 * columns * full * dtype.itemsize
            assert v.nbytes == 2 * columns * (min(r, full) if o2 else full) * dtype.itemsize
            assert k.untyped_storage().nbytes() == k.nbytes and v.untyped_storage().nbytes() == v.nbytes
        if o3:
            assert decoder.cache_bytes() == G.estimate(cfg, (2, 3, 9), dtype, o2=o2)[0]


def test_a_padded_row_caches_what_it_caches_alone(case):
    """Keys at the row's own positions (the scores alone would not tell: RoPE knows only differences)."""
    model, rows = case
    ids, lengths = [row.tolist() for row in rows["unequal"][0]], PROMPTS["unequal"]
    for o1 in (True, False):
        together, alone = G.Decoder(model, o1=o1), G.Decoder(model, o1=o1)
        together.prefill([row[:n] for row, n in zip(ids, lengths)], 1)
        for b, n in enumerate(lengths):
            alone.prefill([ids[b][:n]], 1)
            pairs = zip(itertools.chain(*stored(together)), itertools.chain(*stored(alone)))
            for a, c in pairs:
                assert (a[b, :, max(lengths) - n:max(lengths)] - c[0, :, :n]).abs().max() < 1e-5


class Sizes(TorchDispatchMode):
    """Numbers in the storages of what operations return, largest first."""

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, torch.Tensor):
                self.seen.append(t.untyped_storage().nbytes() // t.itemsize)
        return out

    def __enter__(self):
        self.seen = []
        return super().__enter__()


def test_prefill_memory_is_linear_and_decoding_expands_no_cache():
    torch.manual_seed(0)
    config = dict(TINY, max_position_embeddings=4096, num_key_value_heads=1, **LOW)
    with torch.no_grad():
        decoder = G.Decoder(Llama(parse_config(config)).requires_grad_(False))
    largest = {}
    for T in (512, 1024):
        with Sizes() as sizes:
            decoder.prefill([[1] * T] * 8, 1)                                           # pieces of 64 columns
        largest[T] = max(sizes.seen)
    assert largest[1024] <= 2.1 * largest[512]
    with Sizes() as sizes:
        decoder.step(torch.ones(8, dtype=torch.long))
    cache = {t.numel() for pair in stored(decoder) for t in pair}
    others = [n for n in sizes.seen if n not in cache]
    assert max(others) <= 8 * 4 * 1025                                      # the scores; expanded keys: 8 times that


def test_a_stored_matrix_multiplies_as_linear_does():
    for m, n in ((10, 7), (11, 7), (64, 33), (66, 33), (32, 5), (1, 1), (1, 40), (7, 40), (8, 40), (33, 40), (90, 7)):
        x, w = torch.randn(1, 1, n), torch.randn(m, n)
        before, matrix = w.clone(), fast.Matrix(w)
        y, = matrix(x)
        assert torch.equal(w, before) and y.shape == (1, 1, m)
        assert w.untyped_storage().data_ptr() == matrix.w.untyped_storage().data_ptr()     # not held twice
        assert torch.allclose(y.double(), x.double() @ w.double().T, atol=1e-5)
        for rows in (1, 6, 31, 32, 33):
            x = torch.randn(rows, 1, n)
            assert torch.allclose(matrix(x)[0], F.linear(x, before), atol=1e-5)
    x, parts = torch.randn(1, 1, 33), [torch.randn(m, 33) for m in (11, 64, 2)]
    for y, w in zip(fast.Matrix(*parts)(x), parts, strict=True):
        assert torch.allclose(y, F.linear(x, w), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_matrix_of_16_bits_rounds_once_and_is_held_once(dtype):
    """Against the same weights in float64: half a unit in the last place of each sum, whatever multiplies it."""
    unit = torch.finfo(dtype).eps
    for sizes, n in (((1,), 1), ((7,), 33), ((33, 8), 8), ((1,), 40), ((31, 32, 33), 7), ((192,), 576)):
        parts = [torch.randn(m, n).to(dtype) for m in sizes]
        wanted = [w.double() for w in parts]
        matrix = fast.Matrix(*parts)
        assert {w.untyped_storage().data_ptr() for w in parts} == {matrix.w.untyped_storage().data_ptr()}
        for shape in ((1, 1), (1,), (31, 1), (32, 1), (33, 1)):
            x = torch.randn(*shape, n).to(dtype)
            for y, w in zip(matrix(x), wanted, strict=True):
                exact = x.double() @ w.T
                most = x.double().abs() @ w.abs().T                     # what fp32 sums may lose grows with this
                assert y.dtype == dtype and y.shape == exact.shape
                assert (y.double() - exact).abs().le(unit * exact.abs() + 1e-5 * most + 1e-7).all()


def test_alignment_changes_no_logit(case):
    """What CUDA gets: ranks padded with zeros, and cached values with them."""
    model, rows = case
    padded = Llama(model.cfg).requires_grad_(False)
    padded.load_state_dict(model.state_dict())
    fast.align(padded)
    for name, layer in padded.named_modules():
        if isinstance(layer, LowRank):
            k = model.cfg.ranks[name]
            assert layer.U.weight.shape[1] == len(layer.V.weight) == -(-k // 8) * 8
    ids, expected = rows["unequal"]
    decoder = G.Decoder(padded)
    for b, t, logits in follow(decoder, ids, PROMPTS["unequal"]):
        assert (logits - expected[b][t]).abs().max() < 1e-4
    for l, block in enumerate(decoder.blocks):
        assert block.U is None or decoder.cache[l].v.shape[-1] % 8 == 0


# ---------------------------------------------------------------------------------------------- compiled
compiles = pytest.mark.skipif(
    not shutil.which(os.environ.get("CXX", "g++")) or " " in torch.__file__,
    reason="needs a C++ compiler, and torch in a path without spaces, which it does not quote")
UNLIKE = {f"model.layers.{l}.{name}": 7 + (3 * l + 5 * i) % 8 for l in (0, 1) for i, name in enumerate(LAYERS)}


@compiles
def test_a_compiled_step_is_the_plain_step_and_is_compiled_once(tmp_path):
    """Logits to 1e-4 and the same greedy tokens; one compilation for blocks of unlike ranks and a cache that grows."""
    config = dict(CASES["norms of q and k low-rank"], air={"ranks": UNLIKE})
    model = Checkpoint(write_checkpoint(tmp_path, config)).model()
    own = {w.untyped_storage().data_ptr() for w in model.model.layers.parameters()}
    ids = torch.randint(64, (5 + STEPS,), generator=torch.Generator().manual_seed(3))
    expected = model(ids[None])[0]
    decoder = G.Decoder(model, compile=True)
    # The blocks' weights as they were.
    assert {w.untyped_storage().data_ptr() for w in model.model.layers.parameters()} == own
    decoder.prefill([ids[:5].tolist()], STEPS + 1)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for t in range(5, 5 + STEPS):
            assert (decoder.step(ids[t:t + 1])[0] - expected[t]).abs().max() < 1e-4, t
        # Another prompt, a longer cache.
        ours = list(G.generate(decoder, [ids[:9].tolist()], 3 * STEPS, temperature=0))
    assert ours == list(G.generate(G.Decoder(model), [ids[:9].tolist()], 3 * STEPS, temperature=0))


@compiles
def test_a_compiled_step_of_padded_rows(tmp_path):
    """Rows that begin apart, so masked; dense attention; a layer of rank 1 beside dense ones."""
    config = dict(TINY, tie_word_embeddings=True, **ranks(1, layers=("mlp.up_proj",)))
    model = Checkpoint(write_checkpoint(tmp_path, config)).model()
    plain, fast = (G.Decoder(model, compile=compile) for compile in (False, True))
    for decoder in (plain, fast):
        decoder.prefill([[5, 6, 7, 8], [9]], STEPS + 1)
    for i in range(STEPS):
        a, b = (decoder.step(torch.tensor([3 + i, 20 + i])) for decoder in (plain, fast))
        assert (a - b).abs().max() < 1e-4, i


def test_no_compiler_is_said_in_a_sentence(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "no-such-compiler")
    done = in_process("generate", "--ckpt", ROOT / "demo", "--compile", "--max-new-tokens", "2")
    err = done.stderr
    assert done.returncode == 2 and "found no no-such-compiler" in err and "CXX" in err and "Traceback" not in err
    # A torch without these options; a compiler with flags of its own.
    monkeypatch.setenv("CXX", f"{shutil.which('sh')} -O2")
    with monkeypatch.context() as patch:
        patch.setattr(torch, "compile", lambda function, fullgraph: function)
        with pytest.raises(InputError, match="needs torch 2.13 or later"):
            fast.compiled(len)
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))                  # nothing of earlier runs
    done = script("generate", "--ckpt", ROOT / "demo", "--compile", "--max-new-tokens", "2")
    err = done.stderr
    assert done.returncode == 2 and "torch.compile failed" in err and "Traceback" not in err and err.count("\n") < 5


# ---------------------------------------------------------------------------------------------- drawing
def one(model, ids, steps, **kwargs):
    """The tokens after one prompt."""
    return [token for token, in G.generate(G.Decoder(model), [ids], steps, **kwargs)]


def test_filters():
    logits = torch.tensor([0.5, 0.2, 0.1, 0.15, 0.05]).log()
    assert torch.allclose(G.filtered(logits), logits.exp())
    assert torch.allclose(G.filtered(logits, temperature=0.5), logits.exp() ** 2 / (logits.exp() ** 2).sum())
    assert torch.allclose(G.filtered(logits, top_k=2), torch.tensor([5 / 7, 2 / 7, 0, 0, 0]))
    assert torch.allclose(G.filtered(logits, top_p=0.7), torch.tensor([5 / 7, 2 / 7, 0, 0, 0]))
    assert torch.allclose(G.filtered(logits, top_p=0.71), torch.tensor([0.5, 0.2, 0, 0.15, 0]) / 0.85)
    assert torch.allclose(G.filtered(logits, top_k=3, top_p=0.83), torch.tensor([10 / 17, 4 / 17, 0, 3 / 17, 0]))
    assert G.filtered(logits, temperature=0).tolist() == [1, 0, 0, 0, 0]
    for least in (1e-9, 1e-50):                     # this is 0 in fp32
        assert G.filtered(logits, top_p=least).tolist() == [1, 0, 0, 0, 0]
    assert G.filtered(logits, temperature=1e-40).tolist() == [1, 0, 0, 0, 0]
    rows = torch.stack((logits, logits.flip(0)))
    assert torch.equal(G.filtered(rows, 0.7, 4, 0.9), torch.stack([G.filtered(row, 0.7, 4, 0.9) for row in rows]))


@pytest.mark.parametrize("temperature,top_k,top_p", [(1.0, 0, 1.0), (0.7, 8, 1.0), (1.3, 0, 0.8)])
def test_draws_follow_the_filtered_distribution(tiny, temperature, top_k, top_p):
    """Chi-squared over 20,000 draws; cells below 5 expected draws are joined. Bound: mean + 4 deviations of χ²."""
    logits = Checkpoint(tiny).model()(torch.tensor([[1, 2]]))[0, -1]
    probs, counts = G.filtered(logits, temperature, top_k, top_p), torch.zeros(64)
    sampler = G.Sampler([[0]] * 20, 64, 1000, "cpu", G.Sampling(temperature, top_k, top_p, seed=1))
    for _ in range(1000):
        counts += torch.bincount(sampler(logits.expand(20, 64)), minlength=64)
    assert counts.sum() == 20000 and counts[probs == 0].sum() == 0
    expected, order = (20000 * probs).sort(descending=True)
    cells = int((expected >= 5).sum())
    e = torch.cat((expected[:cells], expected[cells:].sum()[None]))
    c = torch.cat((counts[order][:cells], counts[order][cells:].sum()[None]))
    e, c = e[e > 0], c[e > 0]
    assert ((c - e) ** 2 / e).sum() < len(e) - 1 + 4 * math.sqrt(2 * (len(e) - 1))


def test_repetition_penalty_by_hand():
    logits = torch.tensor([[2.0, 1.9, -1.0, -1.1], [2.0, 1.9, -1.0, -1.1]])
    sampler = G.Sampler([[0, 2], [3]], 4, 3, "cpu", G.Sampling(temperature=0, penalty=2.0))
    assert sampler(logits).tolist() == [1, 0]                   # row 0: 1, 1.9, -2, -1.1; row 1: 2, 1.9, -1, -2.2
    assert sampler(logits).tolist() == [0, 1]                   # row 0: 1, 0.95, -2, -1.1; row 1: 1, 1.9, -1, -2.2
    assert sampler(-logits).tolist() == [3, 2]                  # row 0: -4, -3.8, 0.5, 1.1; row 1: -4, -3.8, 1, 0.55


def test_a_seed_gives_one_text_whatever_stands_beside_it(tiny):
    model = Checkpoint(tiny).model()
    draw = lambda seed: one(model, [1], 30, seed=seed)
    assert draw(0) == draw(0) != draw(1)
    assert draw(0)[:10] == one(model, [1], 10, seed=0)
    batch = list(zip(*G.generate(G.Decoder(model), [[7, 8, 9], [1]], 30, seed=0)))
    assert list(batch[1]) == draw(1)


def test_rows_end_at_eos_at_the_context_and_at_a_stop(tiny):
    model = Checkpoint(tiny).model()
    tokens = one(model, [1], 20, temperature=0)
    eos = tokens[4]
    assert one(model, [1], 20, temperature=0, eos={eos}) == tokens[:tokens.index(eos)]
    assert list(G.generate(G.Decoder(model), [[1]], 20, temperature=0, eos={tokens[0]})) == []
    assert len(one(model, [1] * 60, 20)) == 4                                           # context 64
    rows = list(zip(*G.generate(G.Decoder(model), [[1] * 60, [1]], 20, temperature=0, eos={eos})))
    assert sum(t is not None for t in rows[0]) <= 4
    assert [t for t in rows[1] if t is not None] == tokens[:tokens.index(eos)]
    assert all(later is None for row in rows for now, later in zip(row, row[1:]) if now is None)
    seen = []
    stop = lambda row, token: seen.append((row, token)) or len(seen) == 3
    assert one(model, [1], 20, temperature=0, stop=stop) == tokens[:3] == [token for _, token in seen]


def test_logits_that_are_not_finite_are_an_error(tiny):
    model = Checkpoint(tiny).model()
    model.lm_head.weight[5, 0] = math.inf
    with pytest.raises(RuntimeError, match="not finite"):
        one(model, [1], 5)


# ---------------------------------------------------------------------------------------------- bad input, the command
def test_prompts_that_do_not_fit(tiny, monkeypatch):
    decoder = G.Decoder(Checkpoint(tiny).model())
    for ids in ([], [1] * 64):
        with pytest.raises(InputError, match="expected 1 to 63"):
            decoder.prefill([[1], ids], 5)
    need = sum(G.estimate(decoder.cfg, (3, 5, 15), torch.float32))
    monkeypatch.setattr(G, "free_bytes", lambda device: need - 1)
    with pytest.raises(InputError, match=r"3 x 15 tokens need about 0\.\d+ GB"):
        decoder.prefill([[1] * 5] * 3, 10)
    monkeypatch.setattr(G, "free_bytes", lambda device: need)
    decoder.prefill([[1] * 5] * 3, 10)
    monkeypatch.undo()
    with pytest.raises(InputError, match=r"GB are free on cpu"):
        decoder.prefill([[1]] * 10, 10 ** 9)


def command(monkeypatch, capsys, *arguments):
    """generate.main() in this process -> (stdout, stderr)."""
    own = "--ckpt", ROOT / "demo", "--device", "cpu"
    monkeypatch.setattr(sys, "argv", ["generate.py", *map(str, (*own, *arguments))])
    capsys.readouterr()
    G.main()
    return capsys.readouterr()


def test_command_stops_counts_and_batches(monkeypatch, capsys, tmp_path):
    run = lambda *arguments: command(monkeypatch, capsys, *arguments)
    whole, err = run("--prompt", "def read(self", "--temperature", 0, "--max-new-tokens", 24, "--stats")
    assert whole.startswith("def read(self")
    assert all(x in err for x in ("24 tokens", "tokens/s after the first", "cache of 1 x"))
    more = whole[len("def read(self"):-1]
    stop = more[8:11]
    cut = run("--prompt", "def read(self", "--temperature", 0, "--max-new-tokens", 24,
              "--stop", stop, "--stop", "\0")[0]
    assert cut == "def read(self" + more[:more.index(stop)] + "\n"
    for off in ("o1", "o2", "o3", "fuse", "graph"):
        assert run("--prompt", "def read(self", "--temperature", 0, "--max-new-tokens", 24, "--off", off)[0] == whole
    file = tmp_path / "prompts.txt"
    file.write_text("import os, sys\n\ndef read(self\n")
    both = run("--prompt-file", file, "--temperature", 0, "--max-new-tokens", 24)[0]
    assert both.startswith("--- 1 of 2\nimport os, sys") and both.endswith("--- 2 of 2\n" + whole)
    assert run("--repetition-penalty", 1.5, "--temperature", 0)[0] != run("--temperature", 0)[0]


def test_bad_options(monkeypatch, capsys, tmp_path):
    (tmp_path / "none.txt").write_text("\n\n")
    for *arguments, said in (
            ("--temperature", -1, "expected 0, or 1e-6 and more"),
            ("--temperature", 1e-46, "expected 0, or 1e-6 and more"),       # 0 in fp32, so no number at all
            ("--seed", 10**20, "fewer than 19 digits"),
            ("--compile", "--off", "o3", "needs o3"),
            ("--repetition-penalty", 0, "expected 0.001 to 1000"),
            ("--repetition-penalty", 1e-39, "expected 0.001 to 1000"),      # 0 in fp32
            ("--prompt", "", "--prompt is empty"),
            ("--prompt-file", tmp_path / "none.txt", "has no prompt"),
            ("--prompt-file", tmp_path / "absent.txt", "cannot be read"),
            ("--stop", "", "expected some text"),
            ("--prompt", "x " * 600, "below the model's"),
            ("--max-new-tokens", 0, "expected 1 or more")):
        with pytest.raises(InputError, match=said):
            command(monkeypatch, capsys, *arguments)


class Overflowing:
    """A Decoder whose logits are not finite once a row has drawn `last`."""

    def __init__(self, decoder, last):
        self.forward, self.last = decoder.forward, last

    def __call__(self, ids, columns, span):
        logits = self.forward(ids, columns, span)
        return logits.masked_fill(ids[:, -1:] == self.last, math.nan)


def test_a_row_that_has_ended_may_overflow(tiny):
    """In fp16 the end-of-text token's own stream may; what it would draw is no token, and no row's beside it."""
    decoder = G.Decoder(Checkpoint(tiny).model())
    prompts = [[5, 3, 9], [8, 2, 4]]
    alone = [[step[0] for step in G.generate(decoder, [prompt], 6, temperature=0)] for prompt in prompts]
    end = alone[0][1]
    assert end not in alone[1] and end != alone[0][0]
    decoder.forward = Overflowing(decoder, end)
    found = list(G.generate(decoder, prompts, 6, eos={end}, temperature=0))
    assert [step[0] for step in found] == [alone[0][0]] + [None] * 5 and [step[1] for step in found] == alone[1]


def test_padding_is_a_rows_own_first_token(tiny):
    """Another's numbers may overflow, and NaN times 0 reaches the row."""
    model = Checkpoint(tiny).model()
    model.model.embed_tokens.weight.requires_grad_(False)[0] = math.nan     # no row has this token
    prompts = [[5, 3, 9, 7, 1], [8, 2]]
    alone = [[step[0] for step in G.generate(G.Decoder(model), [prompt], 4, temperature=0)] for prompt in prompts]
    both = list(G.generate(G.Decoder(model), prompts, 4, temperature=0))
    assert [list(row) for row in zip(*both)] == alone
    assert list(G.generate(G.Decoder(model), prompts, 0)) == []


def test_script_streams_text_and_repeats_itself():
    arguments = ("generate", "--ckpt", ROOT / "demo", "--prompt", "import ", "--max-new-tokens", 20, "--device", "cpu")
    first, again = script(*arguments), script(*arguments)
    assert first.returncode == 0 and first.stdout == again.stdout and first.stdout.startswith("import ")
    bad = script("generate", "--ckpt", ROOT / "demo", "--prompt", "")
    assert bad.returncode == 2 and "--prompt is empty" in bad.stderr


# ---------------------------------------------------------------------------------------------- the benchmarks
def test_shapes_have_the_published_sizes():
    millions = {name: round(table9.parameters(config) / 1e6) for name, config in SHAPES.items()}
    assert millions == {"llama-7b": 6738, "tinyllama": 1100, "mistral-7b": 7242, "demo": 6}
    low = table9.parameters(at_rate(SHAPES["llama-7b"], 0.6)) - 2 * 32000 * 4096
    assert 0.599 < low / (table9.parameters(SHAPES["llama-7b"]) - 2 * 32000 * 4096) <= 0.6001


def test_random_models_are_random():
    model = random_model(at_rate(SHAPES["demo"], 0.6), dtype=torch.bfloat16)
    logits = model(torch.arange(2, 40)[None])[0].float()
    assert logits.isfinite().all() and 0.3 < logits.std() < 3 and len(set(logits.argmax(-1).tolist())) > 20


@pytest.mark.parametrize("rate", [None, 0.5])
def test_flops_are_those_of_the_operations(rate, monkeypatch):
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)        # no padded rows
    config = at_rate(SHAPES["demo"], rate)
    decoder = G.Decoder(random_model(config))
    decoder.prefill([[1] * 20], 4)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        decoder.step(torch.tensor([1]))
    assert counter.get_total_flops() == table9.flops(config, 21)


def test_a_row_of_the_tables(capfd, monkeypatch):
    low = at_rate(SHAPES["demo"], 0.6)
    spec = dict(what="compressed", shape="demo", device="cpu", dtype="float32", batch=2, prompt=5, new_tokens=8,
                length=13, budget_gb=1, switches=fig4.ALL, config=low, round=0, rate=0.6, eos="off")
    row = table11.run_row(spec)
    assert row["cache_bytes"] == G.estimate(parse_config(low), (2, 5, 13), torch.float32)[0]
    assert 4 * table9.parameters(low) == row["weight_bytes"] < row["peak_bytes"] < row["weight_bytes"] + 3e8
    base = table11.run_row(spec | dict(what="growing", budget_gb=0.01, config=SHAPES["demo"]))    # not run
    assert base["oom"] and fig4.ratio([row, base], 2, 13, "us_per_token", "growing") == "B-OOM"
    assert fig4.ratio([row | dict(oom=True), base], 2, 13, "us_per_token", "growing") == "OOM"
    with pytest.raises(InputError, match="beyond the shape's context of 512"):
        table11.run_row(spec | dict(new_tokens=600))
    # What the Decoder's own estimate refuses is a row that does not fit, too, on a GPU as well.
    monkeypatch.setattr(G, "free_bytes", lambda device: 1000)
    assert table11.measure(spec) == {"oom": True}


@pytest.mark.parametrize("name, arguments, said", [
    ("fig4", ["--lengths", "32", "1024"], "beyond the shape's context"),
    ("fig4", ["--batches", "4", "0"], "a batch of 0"),
    ("table9", ["--batch", "-1"], "a batch of -1"),
    ("table11", ["--batch", "0"], "a batch of 0"),
    ("table11", ["--out", "/nowhere/x.json"], "cannot write"),
    ("fig4", ["--out", "x.png"], "expected the JSON's name"),
    ("speed", ["foo"], "there is no part foo"),
    ("scale", ["--folder", "/nowhere"], "which is no folder"),
    ("scale", ["--blocks", "2", "0"], "1 or more"),
    ("scale", ["--rate", "0"], "--rate is 0.0"),
])
def test_what_cannot_be_measured_is_said_before_anything_is(monkeypatch, name, arguments, said):
    monkeypatch.setattr(table11, "run_row", lambda spec: pytest.fail("measured"))
    done = in_process(f"experiments/{name}", *arguments)
    assert done.returncode == 2 and said in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_side_has_the_seconds_between_its_moments_and_no_captured_step(monkeypatch):
    assert decode.apart([1.0, 4.0, 4.5, 6.0]) == (3.0, [0.5, 1.5])
    monkeypatch.setattr(decode, "Decoder", lambda model: model)
    monkeypatch.setattr(decode, "timed", lambda *arguments: (3.0, [(0.5, False), (9.0, True), (1.5, False)]))
    assert decode.ours("model")([[1]], 4) == (3.0, [0.5, 1.5])


# ---------------------------------------------------------------------------------------------- experiments/decode.py
@pytest.mark.parametrize("arguments, said", [
    ("--dtypes float33", "--dtypes has 'float33'"), ("--dtypes int8", "--dtypes has 'int8'"),
    ("--batches 0", "--batches is 0"), ("--batches -1", "--batches is -1"), ("--prompts x", "--prompts is x"),
    ("--rate 5", "--rate is 5.0"), ("--tokens 5000", "at most"), ("--sides dense;sparse", "--sides has 'sparse'"),
    ("--out no/such/folder/d.json", "no/such/folder")])
def test_decode_says_what_it_does_not_take(monkeypatch, arguments, said):
    monkeypatch.setattr(sys, "argv", ["decode.py", *arguments.split()])
    with pytest.raises(InputError, match=said):
        decode.main()


def test_decode_keeps_what_was_measured_before_a_failure(monkeypatch, tmp_path):
    plain = decode.rows_of

    def second_fails(sides, what, *more):
        if what[0] == 2:
            raise MemoryError
        return plain(sides, what, *more)
    monkeypatch.setattr(decode, "rows_of", second_fails)
    out = tmp_path / "d.json"
    arguments = "--dtypes float32 --batches 1,2 --prompts , --tokens 2 --rounds 1 --sides dense;0.6 --out"
    monkeypatch.setattr(sys, "argv", ["decode.py", *arguments.split(), str(out)])
    with pytest.raises(MemoryError):
        decode.main()
    assert [row["batch"] for row in json.loads(out.read_text())["rows"]] == [1, 1]


def test_of_a_result_decode_has_the_ranks(tmp_path, monkeypatch):
    """Beside the dense model that it was made of; a layer without a rank is dense in both."""
    ranks = {"model.layers.0.self_attn.v_proj": 3, "model.layers.1.mlp.up_proj": 5}
    result = compressed_config(SHAPES["demo"], {"rate": 0.9, "ranks": ranks})
    (tmp_path / "config.json").write_text(json.dumps(result))
    made, plain = [], decode.random_model
    monkeypatch.setattr(decode, "random_model", lambda *arguments: made.append(plain(*arguments)) or made[-1])
    arguments = "--dtypes float32 --batches 1 --prompts , --tokens 2 --rounds 1 --sides dense;0.9 --ckpt"
    monkeypatch.setattr(sys, "argv", ["decode.py", *arguments.split(), str(tmp_path), "--out", f"{tmp_path}/d.json"])
    decode.main()
    assert [model.cfg.ranks for model in made] == [{}, ranks]
    assert [row["rate"] for row in json.loads((tmp_path / "d.json").read_text())["rows"]] == [0.9, 0.9]


def test_sides_take_turns(tmp_path, monkeypatch, capsys):
    """Every side at every batch and prompt, a number a round; ratios are those of the rounds."""
    monkeypatch.setattr(shutil, "which", lambda name: None)                                 # nothing is compiled
    arguments = "--tokens 3 --rounds 2 --batches 1,2 --prompts 8 --dtypes float32 --out"
    monkeypatch.setattr(sys, "argv", ["decode.py", *arguments.split(), str(tmp_path / "d.json")])
    decode.main()
    rows = json.loads((tmp_path / "d.json").read_text())["rows"]
    ours = [row for row in rows if row["side"] in ("dense", "0.6")]
    assert [(r["side"], r["batch"], r["prompt"], r["tokens"]) for r in ours] == [
        (side, *what) for what in ((1, 32, 3), (2, 32, 3), (1, 8, 1)) for side in ("dense", "0.6")]
    assert all(len(r["tokens_per_s"]) == len(r["prompt_per_s"]) == 2 for r in ours)
    assert all(x > 0 for r in ours for x in r["prompt_per_s"] + r["tokens_per_s"] * (r["tokens"] > 1))
    low, dense = ours[1]["tokens_per_s"], ours[0]["tokens_per_s"]
    assert f"| {(low[0] / dense[0] + low[1] / dense[1]) / 2:.2f} |" in capsys.readouterr().out


def test_a_gguf_file_holds_the_dense_weights(tmp_path):
    """Read by the package gguf: every name is one of llama's, every weight and number the model's."""
    pytest.importorskip("gguf.gguf_reader", reason="needs the package gguf")      # golden/gguf is a "package" without
    import gguf
    config = dict(SHAPES["demo"], num_hidden_layers=2)
    model = random_model(config)
    reader = gguf.GGUFReader(decode.write_gguf(tmp_path / "m.gguf", config, model))
    known = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    state = model.state_dict()
    assert len(reader.tensors) == len(state)
    for name, w in state.items():
        theirs = known.get_name(name, try_suffixes=(".weight",))
        tensor, = (t for t in reader.tensors if t.name == theirs)
        assert torch.equal(torch.from_numpy(tensor.data.copy()), w), name
    assert reader.get_field("llama.attention.head_count_kv").contents() == model.cfg.n_kv_heads
    assert reader.get_field("llama.feed_forward_length").contents() == model.cfg.hidden
