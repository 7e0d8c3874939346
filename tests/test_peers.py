"""peers/: SliceGPT, BlockPruner and ACIP against identities and brute force."""
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import distance, in_process, script, write_checkpoint
from safetensors.torch import save_file

from eval_ppl import evaluate
from generate import Decoder, estimate, generate
from model import PLAIN, rope, to_logits
from peers import acip as A
from peers import blockpruner as B
from peers import slicegpt as S
from support.checkpoint import Checkpoint, TensorFolder, Writer, part_of
from support.config import compressed_config, parse_config
from support.learning import own
from support.script import ROOT, InputError

CPU = torch.device("cpu")
FAMILIES = {
    "llama": {},
    "wide heads": {"head_dim": 24},
    "tied": {"tie_word_embeddings": True},
    "biased": {"attention_bias": True, "mlp_bias": True},
    "qwen3": {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 16,
              "rms_norm_eps": 1e-2},
}


@pytest.fixture(params=FAMILIES)
def dense(request, tmp_path):
    return Checkpoint(write_checkpoint(tmp_path / "dense", **FAMILIES[request.param]))


def written(tmp_path, ckpt, blocks, changes, section):
    with Writer(tmp_path / "out", 0, overwrite=True) as writer:
        for l, tensors in blocks:
            writer.add(part_of(l), tensors)
        writer.finish(compressed_config(ckpt.raw | changes, section))
    return Checkpoint(tmp_path / "out")


def sliced(tmp_path, ckpt, windows, s, normed=False):
    blocks = S.sliced(ckpt, windows, s, normed, CPU)
    return written(tmp_path, ckpt, blocks, S.sliced_config(ckpt, s), {"turned": True})


# ------------------------------------------------------------ SliceGPT
def test_without_slicing_the_logits_are_the_dense_models(tmp_path, dense, windows):
    small = sliced(tmp_path, dense, windows, dense.cfg.dim)
    assert distance(small.model()(windows), dense.model()(windows)) < 1e-4


def test_any_orthogonal_matrices_leave_the_logits_as_they_are(
        tmp_path, dense, windows, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    turns = []

    def random(h, s, normed, device):
        a = torch.randn(h.shape[-1], s, generator=generator, dtype=torch.float64)
        turns.append(torch.linalg.qr(a)[0])
        return turns[-1]
    monkeypatch.setattr(S, "directions", random)
    small = sliced(tmp_path, dense, windows, dense.cfg.dim)
    assert distance(small.model()(windows), dense.model()(windows)) < 1e-4
    assert len(turns) == 2 * dense.cfg.n_layers + 1
    # And they are in it: the embedding is turned by the first.
    table = dense.tensor("model.embed_tokens.weight").double() @ turns[0]
    assert distance(small.tensor("model.embed_tokens.weight"), table) < 1e-5


def test_a_sliced_model_computes_in_the_directions_that_are_left(
        tmp_path, dense, windows, monkeypatch):
    """Against the dense model in its own basis, its stream projected before every half."""
    kept = []
    plain = S.directions

    def noted(*args):
        kept.append(plain(*args))
        return kept[-1]
    monkeypatch.setattr(S, "directions", noted)
    s = dense.cfg.dim // 2
    small = sliced(tmp_path, dense, windows, s)
    model = dense.model().double()
    x = model.model.embed_tokens.weight[windows]
    angles = [each.double() for each in rope(dense.cfg, windows.shape[1])]
    eps = dense.cfg.norm_eps
    for i, P in enumerate(kept):
        x = x @ P @ P.T
        if i == len(kept) - 1:
            break
        block = model.model.layers[i // 2]
        if i % 2 == 0:
            h = PLAIN.norm(x, block.input_layernorm.weight, eps)
            x = x + block.attend(h, angles, PLAIN)
        else:
            h = PLAIN.norm(x, block.post_attention_layernorm.weight, eps)
            x = x + block.feed(h, PLAIN)
    wanted = to_logits(x, (model.model.norm.weight, model.lm_head), dense.cfg)
    assert distance(small.model()(windows), wanted) < 1e-4


@pytest.mark.parametrize("normed", [False, True])
def test_directions_are_the_streams_principal_ones(normed):
    generator = torch.Generator().manual_seed(0)
    scale = torch.linspace(5, 1, 12)
    h = torch.randn(6, 40, 12, generator=generator) * scale
    rows = h.flatten(0, 1).double().numpy()
    if normed:
        rows = rows / np.sqrt((rows ** 2).mean(1, keepdims=True))
    _, _, wanted = np.linalg.svd(rows, full_matrices=False)
    found = S.directions(h, 5, normed, CPU)
    # Up to signs.
    assert np.allclose(np.abs(wanted[:5] @ found.numpy()), np.eye(5), atol=1e-4)


@pytest.mark.parametrize("s", [8, 16, 32])
def test_the_formula_counts_the_parameters(tmp_path, dense, windows, s):
    small = sliced(tmp_path, dense, windows, s)
    assert small.cfg.dim == s
    assert small.parameters() == S.parameters(dense.cfg, s)


def test_widths_are_rounded_down_to_eight():
    assert [S.width_at(576, each) for each in (0, 0.1, 0.25, 0.3)] == [576, 512, 432, 400]


# ------------------------------------------------------------ BlockPruner
def greedy(tmp_path, ckpt, windows, budget):
    """By files: each candidate is written without its half and evaluated."""
    removed = []
    size = B.sizes(ckpt)
    left = sum(size.values())
    while left > budget:
        losses = {}
        for name in B.every_half(ckpt.cfg):
            if name not in removed:
                gone = [*removed, name]
                small = written(tmp_path, ckpt, B.kept_blocks(ckpt, set(gone)), {},
                                {"removed": gone})
                losses[name] = evaluate(small, windows, CPU, torch.float32)["nll"]
        best = min(losses, key=losses.get)
        removed.append(best)
        left -= size[best]
    return removed, losses[best]


def test_the_order_is_brute_forces(tmp_path, windows):
    ckpt = Checkpoint(write_checkpoint(tmp_path / "dense", num_hidden_layers=3))
    budget = 0.35 * sum(B.sizes(ckpt).values())
    stream = B.Stream(ckpt, windows, CPU, torch.float32)
    found = list(B.prune(ckpt, stream, budget))
    wanted, loss = greedy(tmp_path, ckpt, windows, budget)
    assert [half for half, _ in found] == wanted and len(wanted) > 2
    assert found[-1][1] == pytest.approx(loss, abs=1e-5)
    left = sum(n for half, n in B.sizes(ckpt).items() if half not in wanted)
    assert left <= budget


def test_sizes_are_those_of_the_layers(tmp_path):
    ckpt = Checkpoint(write_checkpoint(tmp_path / "dense", **FAMILIES["biased"]))
    block = ckpt.block(1)
    for half in B.HALVES:
        wanted = sum(w.numel() for w in getattr(block, half).parameters())
        assert B.sizes(ckpt)[f"model.layers.1.{half}"] == wanted


# ------------------------------------------------------------ what reads them
@pytest.mark.parametrize("off", [{}, {"o1": False, "o2": False, "o3": False, "fuse": False}])
@pytest.mark.parametrize("peer", ["sliced", "pruned"])
def test_generation_is_the_uncached_models(tmp_path, windows, peer, off):
    ckpt = Checkpoint(write_checkpoint(tmp_path / "dense"))
    if peer == "sliced":
        small = sliced(tmp_path, ckpt, windows, 16)
    else:
        gone = ["model.layers.0.self_attn", "model.layers.1.mlp"]
        small = written(tmp_path, ckpt, B.kept_blocks(ckpt, set(gone)), {}, {"removed": gone})
    prompts = [windows[0, :9].tolist(), windows[1, :4].tolist()]
    drawn = [[], []]
    decoder = Decoder(small.model(), **off)
    for row in generate(decoder, prompts, 6, temperature=0):
        for b, token in enumerate(row):
            drawn[b].append(token)
    model = small.model()
    for prompt, tokens in zip(prompts, drawn):
        ids = list(prompt)
        for token in tokens:
            with torch.no_grad():
                assert model(torch.tensor([ids]))[0, -1].argmax().item() == token
            ids.append(token)


def test_a_left_out_attention_keeps_no_cache(tmp_path, windows):
    ckpt = Checkpoint(write_checkpoint(tmp_path / "dense"))
    gone = ["model.layers.0.self_attn"]
    small = written(tmp_path, ckpt, B.kept_blocks(ckpt, set(gone)), {}, {"removed": gone})
    caches = []
    for each in (ckpt, small):
        decoder = Decoder(each.model())
        decoder.prefill([windows[0].tolist()], 4)
        caches.append(decoder.cache_bytes())
        shape = (1, windows.shape[1], decoder.width)
        assert estimate(each.cfg, shape, torch.float32)[0] == caches[-1]
    assert caches[1] == caches[0] * (ckpt.cfg.n_layers - 1) // ckpt.cfg.n_layers


def test_a_sliced_model_says_in_what_it_was_computed(tiny, tmp_path, windows):
    np.save(tmp_path / "ids.npy", windows.numpy())
    for dtype in ("float32", "bfloat16"):
        done = in_process("peers/slicegpt", "--ckpt", tiny, "--calib", tmp_path / "ids.npy", "--text", "none",
                          "--dtype", dtype, "--out", tmp_path / dtype)
        assert done.returncode == 0 and Checkpoint(tmp_path / dtype).raw["air"]["dtype"] == "float32"
    same = [(tmp_path / dtype / "model.safetensors").read_bytes() for dtype in ("float32", "bfloat16")]
    assert same[0] == same[1]


@pytest.mark.parametrize("name, option", [("slicegpt", ["--slicing", "0.25"]),
                                          ("blockpruner", ["--rate", "0.8"])])
def test_the_commands_results_are_read_and_refused_where_they_should_be(
        tmp_path, windows, name, option):
    dense = write_checkpoint(tmp_path / "dense")
    np.save(tmp_path / "ids.npy", windows.numpy())
    arguments = ["--ckpt", str(dense), "--calib", str(tmp_path / "ids.npy"), *option,
                 "--out", str(tmp_path / "out"), "--json", str(tmp_path / "r.json")]
    done = script(f"peers/{name}", *arguments)          # by itself, as a user would
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "r.json").read_text())
    small = Checkpoint(tmp_path / "out")
    assert small.cfg.compressed and small.raw["model_type"] == "air_llama"
    assert result["ppl_after"] == pytest.approx(
        evaluate(small, windows, CPU, torch.float32)["ppl"], rel=1e-4)
    # There it stays; a compressed one is no start for anything here.
    assert in_process(f"peers/{name}", *arguments).returncode == 2
    done = in_process(f"peers/{name}", *arguments, "--overwrite", "--quiet")
    assert done.returncode == 0 and done.stderr == ""
    # A half that is left out has no inputs to be looked at.
    done = in_process("calibrate", "--ckpt", tmp_path / "out", "--calib", tmp_path / "ids.npy")
    assert done.returncode == (2 if name == "blockpruner" else 0) and "Traceback" not in done.stderr
    for other in (f"peers/{name}", "air"):
        done = in_process(other, "--ckpt", str(tmp_path / "out"), "--out", str(tmp_path / "x"),
                      "--calib", str(tmp_path / "ids.npy"))
        assert done.returncode == 2 and "already compressed" in done.stderr
    done = in_process("enhance/refine", "--ckpt", str(tmp_path / "out"), "--out",
                  str(tmp_path / "x"), "--calib", str(tmp_path / "ids.npy"))
    assert done.returncode == 2 and "no low-rank layers" in done.stderr
    done = in_process("support/export", tmp_path / "out", "--dense", tmp_path / "x")
    assert done.returncode == 2 and f"{tmp_path / 'out'} has no low-rank layers" in done.stderr


@pytest.mark.parametrize("slicing", ["0", "0.25"])
def test_a_sliced_model_takes_the_disk_that_is_asked_for(tmp_path, dense, windows, slicing, monkeypatch):
    """More than the dense one, where tables were tied or little is sliced: each block has two matrices more."""
    np.save(tmp_path / "ids.npy", windows.numpy())
    needs = []
    init = Writer.__init__

    def watched(self, out, need, *more):
        needs.append(need)
        init(self, out, need, *more)
    monkeypatch.setattr(Writer, "__init__", watched)
    done = in_process("peers/slicegpt", "--ckpt", dense.folder, "--calib", tmp_path / "ids.npy", "--slicing", slicing,
                      "--out", tmp_path / "out", "--text", "none")
    assert done.returncode == 0, done.stderr
    size = Checkpoint(tmp_path / "out").parameters() * dense.dtype.itemsize
    assert needs == [2 * (size + 2**22)]                # its parts and the one file, each with its config.json


@pytest.mark.parametrize("name, option, said", [
    ("slicegpt", ["--slicing", "1"], "--slicing is 1.0"),
    ("slicegpt", ["--slicing", "0.99"], "fewer than 8"),
    ("blockpruner", ["--rate", "0"], "--rate is 0.0"),
    ("blockpruner", ["--rate", "1"], "--rate is 1.0"),          # a dense model under another name
    ("acip", ["--rate", "1"], "--rate is 1.0"),
    ("acip", ["--weight", "0"], "weight > 0"),
])
def test_bad_options_are_one_sentence(tmp_path, windows, name, option, said):
    np.save(tmp_path / "ids.npy", windows.numpy())
    done = in_process(f"peers/{name}", "--ckpt", str(write_checkpoint(tmp_path / "m")), "--calib",
                  str(tmp_path / "ids.npy"), "--out", str(tmp_path / "out"), *option)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_halves_whose_loss_is_not_a_number_are_not_taken(tmp_path, windows):
    """fp16 overflows: nothing is known of any half, and nothing is written."""
    ckpt = Checkpoint(str(write_checkpoint(tmp_path / "m")))
    big = {name: w * 1e4 if "down_proj" in name else w
           for name, w in ((name, ckpt.tensor(name)) for name in ckpt.names)}
    save_file(big, tmp_path / "m" / "model.safetensors")
    np.save(tmp_path / "ids.npy", windows.numpy())
    done = in_process("peers/blockpruner", "--ckpt", str(tmp_path / "m"), "--calib", str(tmp_path / "ids.npy"),
                      "--dtype", "float16", "--text", "none", "--rate", "0.5", "--out", str(tmp_path / "out"))
    assert done.returncode == 1 and "is not finite" in done.stderr and not (tmp_path / "out").exists()


def test_acips_plan_is_of_the_steps_that_its_masks_take_at_least(monkeypatch, tmp_path, windows):
    """p falls from SCALE by the learning rate a step, as AdamW moves it."""
    costs = []
    monkeypatch.setattr(A, "write_peer", lambda task, args, cost, blocks, section: costs.append((cost[0], section)))
    np.save(tmp_path / "ids.npy", windows.numpy())
    ckpt = write_checkpoint(tmp_path / "m")
    done = in_process("peers/acip", "--ckpt", str(ckpt), "--calib", str(tmp_path / "ids.npy"), "--rate", "0.7", "--lr",
                      "1e-3", "--adapter-steps", "7", "--batch", "2", "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    tokens = 2 * windows.shape[1] * (A.SCALE / 1e-3 + 7)
    assert costs == [(pytest.approx(12 * Checkpoint(ckpt).parameters() * tokens), {"rate": 0.7})]


@pytest.mark.parametrize("removed", ["all", ["model.layers.9.mlp"], [3], {"a": 1}])
def test_a_config_that_names_other_halves_is_refused(removed):
    raw = json.loads((ROOT / "demo" / "config.json").read_text())
    with pytest.raises(InputError, match="air.removed"):
        parse_config(raw | {"air": {"removed": removed}})


# ------------------------------------------------------------ ACIP
OPTIONS = A.OPTIONS | {"rank": 3, "alpha": 6.0, "dropout": 0.0, "batch": 2, "lr": 2e-3,
                       "weight": 1e-2, "adapter_steps": 3, "every": 2, "stop": 0.5}


def masked(ckpt, options=None):
    torch.manual_seed(0)
    model = own(ckpt.model())
    return model, *A.put_on(model, options or OPTIONS)


def bases(layers):
    return [layer.linear for layer in layers.values()]


def with_adapters(layers):
    """Adapters that do something."""
    for i, layer in enumerate(layers.values()):
        torch.nn.init.normal_(layer.B, std=0.05, generator=torch.Generator().manual_seed(i))


def test_masks_of_ones_are_the_dense_model(dense, windows):
    model, _, p = masked(dense)
    assert len(p) == sum(min(w.shape) for l in range(dense.cfg.n_layers)
                         for w in dense.block(l).parameters() if w.dim() == 2)
    with torch.no_grad():
        assert distance(model(windows), dense.model()(windows)) < 1e-5


def test_masks_derivatives_are_those_of_the_relaxed_loss(tiny, windows, monkeypatch):
    """By finite differences in fp64; at 1 the relaxed mask is the hard one."""
    ckpt = Checkpoint(tiny)
    model, layers, p = masked(ckpt)
    with_adapters(layers)
    model.double()
    p.requires_grad_(True)

    def loss():
        logits = model(windows)[:, :-1]
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
    loss().backward()
    monkeypatch.setattr(A, "mask", lambda p: torch.relu(p) / A.SCALE)
    step = 1e-6
    for i in (0, 5, 40, 100, len(p) - 1):
        with torch.no_grad():
            p[i] += step
            above = loss().item()
            p[i] -= 2 * step
            below = loss().item()
            p[i] += step
        assert p.grad[i].item() == pytest.approx((above - below) / (2 * step), rel=1e-4, abs=1e-7)


def test_a_mask_is_zero_or_one_and_passes_nothing_back_below(tiny):
    p = torch.tensor([-0.01, 0.0, 0.001, 0.5], requires_grad=True)
    hard = A.mask(p)
    assert hard.tolist() == [0, 0, 1, 1]
    hard.sum().backward()
    assert p.grad.tolist() == pytest.approx([0, 0, 1 / A.SCALE, 1 / A.SCALE])


@pytest.mark.parametrize("rate", [0.3, 0.5, 0.75, 1.0])
def test_a_cut_checkpoint_computes_what_the_masks_do(tmp_path, dense, windows, rate):
    model, layers, p = masked(dense)
    with_adapters(layers)
    scores = torch.randn(len(p), generator=torch.Generator().manual_seed(1))
    kept = A.cut(bases(layers), scores, rate)
    with torch.no_grad():
        p.copy_(torch.where(kept, A.SCALE, -A.SCALE))
        wanted = model(windows)
    training = SimpleNamespace(layers=layers, bases=bases(layers), p=p, done=True, scores=lambda: scores, reached=1)
    task = SimpleNamespace(ckpt=dense, device=CPU, dtype=torch.float32, options=OPTIONS,
                           held=windows, windows=windows)
    blocks = dict(A.blocks_of(task, model, training, rate))
    ranks = {name.removesuffix(".V.weight"): len(w) for block in blocks.values()
             for name, w in block.items() if name.endswith(".V.weight")}
    small = written(tmp_path, dense, blocks.items(), {}, {"ranks": ranks})
    assert distance(small.model()(windows), wanted) < 1e-4
    # The size, adapters aside, is the largest that the order of the scores allows.
    assert A.share_left(bases(layers), kept) <= rate
    if rate < 1:
        more = kept.clone()
        more[torch.where(kept, -torch.inf, scores).argmax()] = True
        assert A.share_left(bases(layers), more) > rate
    else:
        assert kept.all()


def test_cutting_takes_the_best_scores_of_all_layers(tiny):
    _, layers, p = masked(Checkpoint(tiny))
    scores = torch.randn(len(p), generator=torch.Generator().manual_seed(2))
    kept = A.cut(bases(layers), scores, 0.4)
    assert scores[kept].min() > scores[~kept].max()


def trained(ckpt, windows, folder, steps=None):
    model, layers, p = masked(ckpt)
    training = A.Training(layers, p, OPTIONS, folder)
    task = SimpleNamespace(ckpt=ckpt, device=CPU, dtype=torch.float32, options=OPTIONS, seed=3,
                           held=windows[:1], windows=windows)
    for i, _ in enumerate(A.learn(task, model, training)):
        if steps is not None and i == steps:
            break
    return training


def test_training_reaches_the_size_then_adapters_learn_alone_and_goes_on(tmp_path, tiny, windows, monkeypatch):
    ckpt = Checkpoint(tiny)
    whole = trained(ckpt, windows, None)
    assert A.share_left(whole.bases, whole.p > 0) <= OPTIONS["stop"] < 1
    assert whole.step - whole.reached == OPTIONS["adapter_steps"] and whole.reached > 2
    # What was cut later has the better score; what is left the best.
    scores = whole.scores()
    assert scores[whole.cut_at > 0].max() < 0 < scores[whole.cut_at == 0].min()
    order = whole.cut_at[whole.cut_at > 0].argsort()
    assert (scores[whole.cut_at > 0][order].diff() >= 0).all()
    # Nor do those that fell in one step go by their place.
    cuts = whole.cut_at[whole.cut_at > 0]
    assert len(cuts.unique()) > 0.9 * len(cuts) > len(cuts.ceil().unique())
    # Left twice in the middle, and each time while the next state is written, it ends at the same numbers.
    def folder():
        return TensorFolder(tmp_path / "map", {"a": 1})

    def interrupted(self):
        raise KeyboardInterrupt
    for steps in (1, 3):
        trained(ckpt, windows, folder(), steps)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(TensorFolder, "write_manifest", interrupted)
            trained(ckpt, windows, folder())
    parts = trained(ckpt, windows, folder())
    assert torch.equal(parts.p, whole.p) and torch.equal(parts.scores(), scores)
    for key, w in whole.params.items():
        assert torch.equal(w, parts.params[key]), key


def test_the_penalty_alone_moves_a_mask_that_the_loss_does_not_need(tiny, windows):
    ckpt = Checkpoint(tiny)
    _, layers, p = masked(ckpt)
    training = A.Training(layers, p, OPTIONS | {"stop": 0.01})
    training.update()
    # AdamW's first step is lr in the direction of the derivative's sign.
    assert torch.allclose(p, torch.full_like(p, A.SCALE - OPTIONS["lr"]), atol=1e-6)


def test_one_map_is_cut_to_any_rate_from_the_stop_up(tmp_path, tiny, windows):
    np.save(tmp_path / "ids.npy", windows.numpy())
    arguments = ["--ckpt", tiny, "--calib", tmp_path / "ids.npy", "--map", tmp_path / "map",
                 "--stop", "0.5", "--lr", "2e-3", "--weight", "0.01", "--rank", "3", "--batch",
                 "2", "--adapter-steps", "3"]
    done = script("peers/acip", *arguments, "--rate", "0.6", "--out", tmp_path / "a")
    assert done.returncode == 0, done.stderr
    state, = (tmp_path / "map").glob("training.*")
    before = state.stat().st_mtime_ns
    done = in_process("peers/acip", *arguments, "--rate", "0.8", "--out", tmp_path / "b")
    assert done.returncode == 0, done.stderr
    assert [each.stat().st_mtime_ns for each in (tmp_path / "map").glob("training.*")] == [before]
    small, large = (Checkpoint(tmp_path / name) for name in "ab")
    assert small.parameters() < large.parameters()
    # Its adapter with it, no layer takes more than W would.
    for ckpt in (small, large):
        shapes = {layer: Checkpoint(tiny).tensors[f"{layer}.weight"].shape for layer in ckpt.cfg.ranks}
        assert all(k * sum(shapes[layer]) < math.prod(shapes[layer]) for layer, k in ckpt.cfg.ranks.items())
    done = in_process("peers/acip", *arguments, "--rate", "0.3", "--out", tmp_path / "c")
    assert done.returncode == 2 and "train to less" in done.stderr
    # Without --map it lies beside the result, however that is written.
    usual = [each for each in arguments if each not in ("--map", tmp_path / "map")]
    done = in_process("peers/acip", *usual, "--rate", "0.6", "--out", f"{tmp_path / 'd'}/")
    assert done.returncode == 0 and len(list((tmp_path / "d.map").glob("training.*"))) == 1
    # Others' options are another map.
    done = in_process("peers/acip", *arguments, "--lr", "1e-3", "--rate", "0.6", "--out",
                  tmp_path / "c")
    assert done.returncode == 2 and "another lr" in done.stderr
    # Refused before any work: a result that is there, a map inside of it.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("peers.acip.put_on", lambda *a: pytest.fail("worked first"))
        done = in_process("peers/acip", *arguments, "--rate", "0.6", "--out", tmp_path / "a")
        assert done.returncode == 2 and "already exists" in done.stderr
        done = in_process("peers/acip", *arguments, "--map", tmp_path / "a" / "map", "--rate",
                          "0.6", "--out", tmp_path / "a", "--overwrite")
        assert done.returncode == 2 and "lies inside --out" in done.stderr
    # An ordinary result: refined, generated from.
    done = in_process("enhance/refine", "--ckpt", tmp_path / "a", "--calib", tmp_path / "ids.npy",
                  "--out", tmp_path / "r", "--epochs", "1", "--text", "none")
    assert done.returncode == 0, done.stderr
