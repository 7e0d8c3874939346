"""influence.py: every rule alone, then the sweep against autograd on the whole model and the authors' numbers."""
import pytest
import torch
import torch.nn.functional as F

import influence as R
from calibrate import embed, forward_sweep
from conftest import distance, write_checkpoint
from model import LAYERS, READS
from support.checkpoint import Checkpoint
from support.script import InputError


def sweep(ckpt, windows, signal, dtype=torch.float64, gram=False):
    """{(block, key): tensor} of a backward sweep."""
    inputs = {}
    for _ in forward_sweep(ckpt, embed(ckpt, windows, dtype), "cpu", keep=inputs):
        pass
    g = R.start_gradient(ckpt, windows, inputs.pop(ckpt.cfg.n_layers), "cpu", signal)
    return {
        (l, key): value
        for l, stats in R.backward_sweep(ckpt, inputs, g, "cpu", signal, gram)
        for key, value in stats.items()
    }


def relevance(y, *inputs):
    """Give the output y relevance R = y·g for a random g; return (R of y, [R of each input]), R = x · gradient."""
    g = torch.randn_like(y)
    return (y * g).detach(), [(x * gx).detach() for x, gx in zip(inputs, torch.autograd.grad(y, inputs, g))]


@pytest.fixture
def x():
    torch.manual_seed(0)
    return torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)


# ---- the rules, one by one, in float64


def test_epsilon_rule_is_equation_11(x):
    layer, eps = torch.nn.Linear(8, 5).double(), 0.1                # a large ε, so that its place shows
    z, g = layer(x), torch.randn(2, 3, 5, dtype=torch.float64)
    gx, gW = torch.autograd.grad(R.epsilon_linear(layer, x, eps), (x, layer.weight), g)
    rel = z * g                                                     # R_j = z_j · g_j
    share = x[..., None, :] * layer.weight / (z + eps * z.sign())[..., None]    # z_ij / (z_j + ε sign z_j)
    assert torch.allclose(x * gx, (share * rel[..., None]).sum(-2))
    assert torch.allclose(layer.weight * gW, (share * rel[..., None]).sum((0, 1)))


def test_epsilon_rule_conserves_without_bias_and_survives_zero(x):
    layer = torch.nn.Linear(8, 5, bias=False).double()
    out, (rx,) = relevance(R.epsilon_linear(layer, x, 1e-12), x)
    assert torch.allclose(out.sum(-1), rx.sum(-1))
    zero = torch.zeros(1, 8, dtype=torch.float64, requires_grad=True)
    assert torch.isfinite(torch.autograd.grad(R.epsilon_linear(layer, zero).sum(), zero)[0]).all()


def test_norm_rule_keeps_each_elements_relevance(x):
    weight = torch.rand(8, dtype=torch.float64) + 0.5
    out, (rx,) = relevance(R.identity_norm(x, weight, 1e-5), x)
    assert torch.allclose(out, rx)                                  # identity: conserved element by element


def test_silu_rule_keeps_each_elements_relevance(x):
    out, (rx,) = relevance(R.identity_silu(x), x)
    assert torch.allclose(out, rx)
    assert torch.allclose(R.identity_silu(x), F.silu(x))


def test_product_rule_gives_each_factor_half(x):
    other = torch.randn_like(x, requires_grad=True)
    out, (ra, rb) = relevance(R.uniform_mul(x, other), x, other)
    assert torch.allclose(ra, out / 2) and torch.allclose(rb, out / 2)


def test_attention_rule_equals_its_products_one_by_one():
    """Scores and mix as explicit products, each with half its gradient, around a plain softmax."""
    torch.manual_seed(0)
    q = torch.randn(1, 4, 6, 8, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(1, 2, 6, 8, dtype=torch.float64, requires_grad=True) for _ in "kv")
    g = torch.randn(1, 4, 6, 8, dtype=torch.float64)
    kk, vv = k[:, [0, 0, 1, 1]], v[:, [0, 0, 1, 1]]
    half = lambda t: t / 2 + t.detach() / 2                         # noqa: E731
    scores = half(q @ kk.mT) / 8 ** 0.5
    A = scores.masked_fill(torch.ones(6, 6).triu(1).bool(), -torch.inf).softmax(-1)
    expected = torch.autograd.grad(half(A @ vv), (q, k, v), g)
    for a, b in zip(torch.autograd.grad(R.uniform_attention(q, k, v), (q, k, v), g), expected):
        assert torch.allclose(a, b)


def test_attention_rule_conserves_what_reaches_the_values():
    """With one kv head: relevance of v is half the output's, the rest goes through the softmax."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 1, 5, 4, dtype=torch.float64, requires_grad=True) for _ in "qkv")
    out, (_, _, rv) = relevance(R.uniform_attention(q, k, v), q, k, v)
    assert torch.allclose(rv.sum(), out.sum() / 2)


# ---- the sweep


@pytest.mark.parametrize("signal", ["wxg", "fisher", "grad"])
@pytest.mark.parametrize("arch", ["LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"])
def test_sweep_equals_autograd_on_the_whole_model(signal, arch, tmp_path, windows):
    ckpt = Checkpoint(write_checkpoint(tmp_path / "c", architectures=[arch], head_dim=8))
    found, model = sweep(ckpt, windows, signal), ckpt.model(dtype=torch.float64).requires_grad_()
    expected = {}
    for ids in windows:
        model.zero_grad()
        F.cross_entropy(model(ids[None])[0, :-1], ids[1:]).backward()
        for l in range(2):
            for name in LAYERS:
                W = model.model.layers[l].get_submodule(name).weight
                value = {"wxg": (W * W.grad).abs(), "fisher": W.grad ** 2, "grad": W.grad.abs()}[signal]
                expected[l, name] = expected.get((l, name), 0) + value.detach()
    for (l, name), value in expected.items():
        assert distance(found[l, f"{name}.{signal}"], value) < 1e-10


@pytest.mark.parametrize("arch", ["LlamaForCausalLM", "Qwen3ForCausalLM"])
@pytest.mark.parametrize("signal", ["lrp", "lrp-all"])
def test_lrp_sweep_equals_the_rules_on_the_whole_model(signal, arch, tmp_path, windows, monkeypatch):
    ckpt = Checkpoint(write_checkpoint(tmp_path / "c", architectures=[arch], head_dim=8))
    ops = R.attn_lrp(1e-3)                                          # a large ε, so that its place shows
    monkeypatch.setitem(R.SIGNALS, signal, R.SIGNALS[signal]._replace(ops=ops))
    found, model = sweep(ckpt, windows, signal), ckpt.model(dtype=torch.float64).requires_grad_()
    expected = {}
    for ids in windows:
        model.zero_grad()
        logits = model(ids[None], ops)[0]
        (logits[-1:] if signal == "lrp" else logits).amax(-1).sum().backward()
        for l in range(2):
            for name in LAYERS:
                W = model.model.layers[l].get_submodule(name).weight
                expected[l, name] = expected.get((l, name), 0) + (W * W.grad).abs().detach()
    for (l, name), value in expected.items():
        assert distance(found[l, f"{name}.{signal}"], value) < 1e-10


def test_relevance_of_a_layers_weights_is_its_outputs(tiny, windows):
    """No bias, tiny ε: Σ W ⊙ R over a layer's weights is Σ over tokens of the relevance at its output.

    The signed sums of gate and up agree because the uniform rule gives both half of their product."""
    ckpt = Checkpoint(tiny)
    model = ckpt.model(dtype=torch.float64).requires_grad_()
    logits = model(windows[:1], R.attn_lrp(1e-12))
    logits[0, -1].amax().backward()
    mlp = model.model.layers[1].mlp
    layers = {name: layer for name, layer in mlp.named_children() if name.endswith("_proj")}
    total = {name: (layer.weight * layer.weight.grad).sum().item() for name, layer in layers.items()}
    assert total["gate_proj"] == pytest.approx(total["up_proj"], rel=1e-8)
    assert total["gate_proj"] + total["up_proj"] == pytest.approx(total["down_proj"], rel=1e-8)


def test_norms_of_q_and_k_keep_their_relevance(tmp_path, windows):
    """Qwen3. The uniform rule gives q and k the same sum, the identity rule passes it through their norms.

    The ordinary derivative would leave nothing: a norm does not change with its input's length."""
    ckpt = Checkpoint(write_checkpoint(tmp_path / "c", architectures=["Qwen3ForCausalLM"], head_dim=8))
    model = ckpt.model(dtype=torch.float64).requires_grad_()
    model(windows[:1], R.attn_lrp(1e-12))[0, -1].amax().backward()
    att = model.model.layers[0].self_attn
    total = {name: (att.get_submodule(name).weight * att.get_submodule(name).weight.grad).sum().item()
             for name in ("q_proj", "k_proj", "q_norm", "k_norm")}
    assert abs(total["q_norm"]) > 1e-6
    for name in total:
        assert total[name] == pytest.approx(total["q_norm"], rel=1e-7)


def test_gram_of_the_backward_sweep_is_the_forward_sweeps(tiny, windows):
    ckpt = Checkpoint(tiny)
    found, h = sweep(ckpt, windows, "lrp", gram=True), embed(ckpt, windows, torch.float64)
    for l, stats in forward_sweep(ckpt, h, "cpu", gram=True):
        for key, value in stats.items():
            assert distance(found[l, key], value) < 1e-12


def test_influence_equals_the_authors(official):
    folder, numbers = official
    windows = torch.from_numpy(numbers["windows"]).long()
    for signal, theirs, tolerance in (("lrp", "lrp", 2e-3), ("wxg", "weightxgrad", 1e-5), ("fisher", "fisher", 1e-5)):
        found = sweep(Checkpoint(folder), windows, signal, torch.float32, gram=True)
        for l in range(2):
            for name in LAYERS:
                layer = f"model.layers.{l}.{name}"
                assert distance(found[l, f"{name}.{signal}"], numbers[f"{theirs}/{layer}"]) < tolerance
                assert distance(found[l, f"{READS[name]}.gram"], numbers[f"gram/{layer}"]) < 1e-5


def test_bf16_agrees_with_fp32_in_direction(tiny, windows):
    ckpt = Checkpoint(tiny)
    a, b = sweep(ckpt, windows, "lrp", torch.bfloat16), sweep(ckpt, windows, "lrp", torch.float32)
    for key in b:
        assert F.cosine_similarity(a[key].flatten().double(), b[key].flatten().double(), dim=0) > 0.98


@pytest.mark.parametrize("signal", R.BACKWARD)
def test_fp16_is_refused_on_the_way_back(tiny, windows, signal):
    """LRP overflows there, and a loss's gradients, millionths at SmolLM2's stream, are subnormal."""
    with pytest.raises(InputError, match="bfloat16 or float32"):
        sweep(Checkpoint(tiny), windows, signal, torch.float16)


def test_cuda_equals_cpu(tiny, windows, gpu):
    ckpt, inputs = Checkpoint(tiny), {}
    for _ in forward_sweep(ckpt, embed(ckpt, windows, torch.float32), "cuda", keep=inputs):
        pass
    g = R.start_gradient(ckpt, windows, inputs.pop(ckpt.cfg.n_layers), "cuda")
    expected = sweep(ckpt, windows, "lrp", torch.float32, gram=True)
    for l, stats in R.backward_sweep(ckpt, inputs, g, "cuda", "lrp", gram=True):
        for key, value in stats.items():
            assert distance(value.cpu(), expected[l, key]) < 1e-3


# ---- what the two-sided methods read


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen2ForCausalLM"])
def test_metrics_are_sums_over_tokens_and_windows_of_whole_model_gradients(tmp_path, windows, architecture):
    """B from hooks on the whole model, token by token; GFWSVD's from autograd's gradients of whole windows."""
    changes = dict(architectures=[architecture], attention_bias=architecture != "LlamaForCausalLM")
    ckpt = Checkpoint(str(write_checkpoint(tmp_path / "m", **changes)))
    tokens, whole = sweep(ckpt, windows, "kfac"), sweep(ckpt, windows, "gfwsvd")
    model = ckpt.model("cpu", torch.float64)
    outputs, wanted = {}, {}
    for l, block in enumerate(model.model.layers):
        for name in LAYERS:
            layer = block.get_submodule(name)
            layer.weight.requires_grad_()
            layer.register_forward_hook(lambda m, i, z, key=(l, name): outputs.update({key: z}))
    for window in windows:
        loss = F.cross_entropy(model(window[None])[0, :-1], window[1:])
        keys = list(outputs)
        leaves = [model.model.layers[l].get_submodule(name).weight for l, name in keys]
        grads = torch.autograd.grad(loss, [*outputs.values(), *leaves])
        for key, g, G in zip(keys, grads, grads[len(keys):]):
            B = sum(torch.outer(row, row) for row in g[0])
            for what, value in (("B.kfac", B), ("A.gfwsvd", G.T @ G), ("B.gfwsvd", G @ G.T)):
                where = key[0], f"{key[1]}.{what}"
                wanted[where] = wanted.get(where, 0) + value
    found = {key: value for key, value in (tokens | whole).items() if ".B." in key[1] or ".A." in key[1]}
    assert found.keys() == wanted.keys() and len(found) == 2 * 7 * 3
    for key in wanted:
        assert found[key].dtype == torch.float64
        assert torch.allclose(found[key], wanted[key], rtol=1e-8), key
    # I beside it is W×Grad's.
    plain = sweep(ckpt, windows, "wxg")
    for l, name in keys:
        assert torch.equal(tokens[l, f"{name}.kfac"], plain[l, f"{name}.wxg"])
