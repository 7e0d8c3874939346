"""support/ranks.py: slopes against finite differences, a step against every other one, the search end to end."""

import dataclasses
import itertools
import json
import math
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, in_process, write_checkpoint
from safetensors.torch import load_file, save_file

import air as A
from generate import Decoder
from model import LAYERS
from support import large
from support import ranks as R
from support.checkpoint import Checkpoint, in_memory

CPU = torch.device("cpu")


def test_an_edited_search_is_another_result(monkeypatch):
    """A run with --stats goes on only where the rules that chose its ranks are the same."""
    seen = []
    monkeypatch.setattr(A, "code_digest", lambda *files: seen.append(files))
    ckpt = SimpleNamespace(fingerprint=lambda: "")
    none = torch.zeros(0)
    for options in (A.Options(ranks="auto"), A.Options(), A.Options(method="aasvd")):
        fields = dict.fromkeys((field.name for field in dataclasses.fields(A.Job)))
        A.Job(**fields | {"ckpt": ckpt, "options": options, "windows": none, "blocks": range(2)}).facts()
    assert "support/ranks.py" in seen[0] and "support/ranks.py" not in seen[1] and "support/anchored.py" in seen[2]


def wholes_of(ckpt, windows, blocks=range(2), ranks="auto"):
    sweep = A.statistics(ckpt, windows, CPU, torch.float32, blocks, "kfac")
    return A.wholes_of(ckpt, sweep, blocks, CPU, A.Options(ranks=ranks))


def mean_loss(ckpt, windows):
    model = ckpt.model("cpu", torch.float64)
    with torch.no_grad():
        return sum(F.cross_entropy(model(w[None])[0, :-1], w[1:]).item() for w in windows)


def test_a_layers_components_are_its_weight_and_its_energies_its_predicted_loss(tiny, windows):
    ckpt = Checkpoint(str(tiny))
    wholes = wholes_of(ckpt, windows)
    assert list(wholes) == [f"model.layers.{l}.{name}" for l in (1, 0) for name in LAYERS]
    for l, stats in A.statistics(ckpt, windows, CPU, torch.float32, range(2), "kfac"):
        for layer in A.layers_of(ckpt, l, stats, dict.fromkeys(wholes, 3), CPU):
            whole = wholes[layer.name]
            assert whole.cost == sum(layer.W.shape) and len(whole.energy) == A.rank_at(1.0, *layer.W.shape)
            for k in (1, 3, len(whole.energy)):
                D = (layer.W - R.product(whole.U, whole.V, k, CPU)).double()
                wanted = (layer.L.T @ D @ layer.S).square().sum().item()
                assert whole.dropped(k) == pytest.approx(wanted, rel=1e-4, abs=1e-6 * whole.total)


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen3ForCausalLM"])
def test_slopes_are_the_losss_derivative_towards_the_dense_weight(tmp_path, windows, architecture):
    ckpt = Checkpoint(str(write_checkpoint(tmp_path / "m", architectures=[architecture])))
    wholes = wholes_of(ckpt, windows)
    small = R.cut(ckpt, wholes, A.pick_ranks(ckpt, range(2), 0.5), CPU)
    found = R.slopes(ckpt, small, windows, CPU, torch.float64)
    assert found.keys() == wholes.keys()
    for layer in found:
        W = small.tensor(layer + ".weight").double()
        D = ckpt.tensor(layer + ".weight").double() - W
        losses = []
        for step in (-1e-4, 1e-4):
            moved = R.cut(ckpt, {}, {}, CPU)
            moved.tensors = small.tensors | in_memory({layer + ".weight": W + step * D})
            losses.append(mean_loss(moved, windows))
        assert found[layer] == pytest.approx((losses[0] - losses[1]) / 2e-4, rel=1e-3, abs=1e-4), layer


def small_problem(seed):
    g = torch.Generator().manual_seed(seed)
    wholes, ranks = {}, {}
    for name, (m, n, k) in {"a": (4, 4, 10), "b": (12, 6, 10), "c": (20, 60, 12)}.items():
        energy = torch.rand(20, generator=g).double().sort(descending=True).values
        wholes[name] = R.Whole(torch.zeros(m, 20), torch.zeros(20, n), energy, energy.sum().item() + 0.5)
        ranks[name] = k
    return wholes, ranks, {"a": 1.0, "b": 0.9, "c": 3.0}


@pytest.mark.parametrize("seed", range(8))
def test_a_step_is_the_best_one_within_its_reach_but_for_the_last_component(seed):
    wholes, ranks, scales = small_problem(seed)
    budget = sum(wholes[x].cost * k for x, k in ranks.items())
    made = R.spend(wholes, scales, ranks, 0.1, budget)

    def saved(k):
        return sum(scales[x] * wholes[x].energy[:k[x]].sum().item() for x in wholes)

    def cost(k):
        return sum(wholes[x].cost * k[x] for x in wholes)

    reach = [range(9, 12), range(9, 12), range(10, 15)]
    every = [dict(zip(wholes, ks)) for ks in itertools.product(*reach)]
    assert made in every and cost(made) <= budget
    # As good as any that costs no more than it does: what is left of the budget buys no whole component.
    assert saved(made) == pytest.approx(max(saved(k) for k in every if cost(k) <= cost(made)))
    assert budget - cost(made) < max(whole.cost for whole in wholes.values())


@pytest.mark.parametrize("seed", range(24))
def test_a_step_with_dense_layers_is_the_best_for_what_it_costs(seed):
    """Everett, 1963: where each layer alone saves most less λ times its cost, all of them save most for the sum of
    their costs. λ is drawn, the budget follows."""
    g = torch.Generator().manual_seed(seed)
    wholes, ranks, scales = {}, {}, {}
    for i, (m, n) in enumerate([(8, 8), (12, 6), (20, 60), (30, 30), (16, 48), (24, 12)]):
        energy = (torch.rand(m * n // (m + n), generator=g).double() ** 3).sort(descending=True).values
        tail = torch.rand(1, generator=g).item() * energy.min().item() * min(m, n) / 2
        wholes[f"{i}"] = R.Whole(torch.zeros(m, 1), torch.zeros(1, n), energy, energy.sum().item() + tail, m * n)
        ranks[f"{i}"] = max(2, len(energy) * 3 // 4)
        scales[f"{i}"] = 0.5 + torch.rand(1, generator=g).item()
    del ranks["3"]                                          # dense before the step
    price = 0.02 * 2 ** (4 * torch.rand(1, generator=g).item() - 2)
    best = {}
    for name, whole in wholes.items():
        least, most = R.reach(whole, ranks.get(name), 0.5)
        left = {k: scales[name] * whole.dropped(k) + price * k * whole.cost for k in range(least, most + 1)}
        left["dense"] = price * whole.dense
        best[name] = min(left, key=left.get)
    wanted = {name: k for name, k in best.items() if k != "dense"}
    budget = R.price(wholes, wanted)
    assert budget == sum(math.prod((len(w.U), w.V.shape[1])) if best[x] == "dense" else best[x] * w.cost
                         for x, w in wholes.items())
    assert R.spend(wholes, scales, ranks, 0.5, budget) == wanted


def test_dense_is_offered_only_where_it_may_be():
    wholes, ranks, scales = small_problem(0)
    budget = R.price(wholes, ranks)
    assert R.stay_dense(wholes, scales, ranks, 0.1, budget) == set()
    # Two of three at less than a component above their ranks.
    cheap = {name: whole._replace(dense=whole.cost * ranks[name] + 1) for name, whole in wholes.items()}
    assert len(R.stay_dense(cheap, scales, ranks, 0.1, budget)) >= 2


def test_layers_whose_slope_is_lost_in_noise_keep_a_scale_above_zero():
    wholes, ranks, _ = small_problem(0)
    scales = R.scales_of(wholes, ranks, {"a": 2.0, "b": -1.0, "c": 0.0})
    assert scales["a"] > 0 and scales["b"] == scales["c"] == pytest.approx(R.LEAST * scales["a"] / 3)
    scales = R.scales_of(wholes, ranks, dict.fromkeys("abc", -1.0))
    assert min(scales.values()) > 0


def test_the_search_never_ends_above_uniform_ranks_and_spends_no_more(tiny, windows):
    ckpt = Checkpoint(str(tiny))
    wholes = wholes_of(ckpt, windows)
    uniform = A.pick_ranks(ckpt, range(2), 0.5)
    found = R.find_ranks(ckpt, wholes, uniform, windows, CPU, torch.float32)
    assert found == R.find_ranks(ckpt, wholes, uniform, windows, CPU, torch.float32)
    cost = [sum(wholes[x].cost * k[x] for x in wholes) for k in (found, uniform)]
    assert cost[0] <= cost[1]
    losses = [mean_loss(R.cut(ckpt, wholes, k, CPU), windows) for k in (found, uniform)]
    assert losses[0] <= losses[1] + 1e-6
    assert all(1 <= k <= len(wholes[x].energy) for x, k in found.items())


def test_the_search_with_dense_layers_is_below_that_without_and_costs_no_more(tiny, windows):
    ckpt = Checkpoint(str(tiny))
    losses, costs = {}, {}
    for ranks in ("auto", "mixed"):
        wholes = wholes_of(ckpt, windows, ranks=ranks)
        uniform = A.pick_ranks(ckpt, range(2), 0.8)
        found = R.find_ranks(ckpt, wholes, uniform, windows, CPU, torch.float32)
        losses[ranks] = mean_loss(R.cut(ckpt, wholes, found, CPU), windows)
        shapes = A.shapes_of(ckpt, range(2))
        costs[ranks] = sum(sum(shapes[x]) * found[x] if x in found else math.prod(shapes[x]) for x in shapes)
        assert costs[ranks] <= sum(sum(shapes[x]) * k for x, k in uniform.items())
        assert (len(found) < len(shapes)) == (ranks == "mixed")
    assert losses["mixed"] < losses["auto"]


@pytest.mark.parametrize("method, more", [("air", ("--anchor", 0.5)), ("kfac", ()), ("kfac-air", ("--rate", 1.0))])
def test_layers_that_stay_dense_are_the_checkpoints(tmp_path, windows, method, more):
    code, said = refused(tmp_path, windows, "--method", method, "--ranks", "mixed", "--rate", 0.8,
                         "--json", tmp_path / "r.json", *more)
    assert code == 0, said
    dense, small = (Checkpoint(str(tmp_path / name)) for name in ("m", "out"))
    every = {f"model.layers.{l}.{name}" for l in range(2) for name in LAYERS}
    apart = every - small.cfg.ranks.keys()
    assert apart and small.cfg.ranks
    assert all(torch.equal(small.tensor(x + ".weight"), dense.tensor(x + ".weight")) for x in apart)
    assert {name for name in small.names if ".U." in name} == {x + ".U.weight" for x in small.cfg.ranks}
    shapes = A.shapes_of(dense, range(2))
    rate = 1 - (dense.parameters() - small.parameters()) / sum(map(math.prod, shapes.values()))
    assert 0.7 < rate <= (1.0 if more == ("--rate", 1.0) else 0.8)
    assert json.loads((tmp_path / "r.json").read_text())["rate_decomposed"] == rate
    # It decodes as it computes.
    ids = windows[:1, :20].tolist()
    logits = Decoder(small.model("cpu", torch.float32)).prefill(ids, 1)
    whole = small.model("cpu", torch.float32)(windows[:1, :20])[:, -1]
    assert torch.allclose(logits, whole, atol=1e-4)


@pytest.mark.parametrize("apart", LAYERS)
def test_where_a_layer_stays_dense_the_others_are_what_they_would_be(tiny, windows, apart):
    ckpt = Checkpoint(str(tiny))
    ranks = A.pick_ranks(ckpt, range(2), 0.5)
    for l, stats in A.statistics(ckpt, windows, CPU, torch.float32, range(2)):
        tensors = []
        for left in (ranks, {x: k for x, k in ranks.items() if not x.endswith(apart)}):
            block = A.compress_block(ckpt, l, stats, left, A.Options(method="svdllm"), CPU)
            tensors.append({name: w for solved in block for name, w in solved.tensors.items()})
        whole, rest = tensors
        assert rest.keys() == {name for name in whole if f".{apart}." not in name}
        assert all(torch.equal(w, whole[name]) for name, w in rest.items())


def test_a_budget_for_all_leaves_all_dense(tmp_path):
    """At rate 1 components cost a layer of even, equal sides exactly what it costs dense."""
    config = dict(TINY, intermediate_size=TINY["hidden_size"], num_key_value_heads=TINY["num_attention_heads"])
    write_checkpoint(tmp_path / "m", config)
    np.save(tmp_path / "w.npy", np.random.RandomState(3).randint(0, 64, size=(6, 24)))      # where dense is best
    done = in_process("air", "--ckpt", tmp_path / "m", "--calib", tmp_path / "w.npy", "--text", tmp_path / "w.npy",
                      "--rate", 1, "--ranks", "mixed", "--out", tmp_path / "out", "--json", tmp_path / "r.json")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["rate_decomposed"] == 1 and found["ppl_compressed"] == found["ppl_dense"]


def test_a_step_that_makes_it_worse_is_not_taken(tiny, windows, monkeypatch):
    ckpt = Checkpoint(str(tiny))
    uniform = A.pick_ranks(ckpt, range(2), 0.5)
    wholes = wholes_of(ckpt, windows)
    for after in (10.1, 10.0, float("nan")):
        found = iter([10.0, *[after] * 3])                                  # three ever shorter steps
        monkeypatch.setattr(R, "evaluate", lambda *arguments: {"ppl": next(found)})  # noqa: B023
        assert R.find_ranks(ckpt, wholes, uniform, windows, CPU, torch.float32) == uniform


@pytest.mark.parametrize("method", ["kfac", "kfac-air", "air", "svd"])
def test_the_command_writes_measured_ranks(tmp_path, windows, method):
    write_checkpoint(tmp_path / "m", architectures=["Qwen2ForCausalLM"], attention_bias=True)
    np.save(tmp_path / "w.npy", windows.numpy())
    done = in_process("air", "--ckpt", tmp_path / "m", "--calib", tmp_path / "w.npy", "--text", tmp_path / "w.npy",
                  "--rate", 0.5, "--method", method, "--ranks", "auto", "--layers", "1:2", "--out", tmp_path / "out",
                  "--stats", tmp_path / "stats")
    assert done.returncode == 0, done.stderr
    assert "ranks: uniform ones give" in done.stderr + done.stdout
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    section = next(value for value in config.values() if isinstance(value, dict) and "allocation" in value)
    assert section["allocation"] == "auto" and len(section["ranks"]) == 7
    ckpt = Checkpoint(str(tmp_path / "out"))
    assert ckpt.cfg.ranks == section["ranks"]
    assert all(layer.startswith("model.layers.1.") for layer in ckpt.cfg.ranks)
    # The same again from kept statistics: the same file.
    again = in_process("air", "--ckpt", tmp_path / "m", "--calib", tmp_path / "w.npy", "--text", "none", "--rate", 0.5,
                   "--method", method, "--ranks", "auto", "--layers", "1:2", "--out", tmp_path / "again",
                   "--stats", tmp_path / "stats")
    assert again.returncode == 0, again.stderr
    for name in ("config.json", "block_001.safetensors", "model-00002.safetensors"):
        if (tmp_path / "out" / name).exists():
            assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name


def test_the_plan_counts_the_search(tmp_path, windows, monkeypatch):
    # Of a plan in FLOP alone: a search over as many windows as calibrate is eight sweeps more.
    write_checkpoint(tmp_path / "m")
    np.save(tmp_path / "w.npy", windows.numpy())
    monkeypatch.setattr(large, "machine_rates", lambda device, dtype: (1e9, 1e9, 1e30))
    minutes = {}
    for ranks in ("uniform", "auto"):
        monkeypatch.setattr(sys, "argv", ["air.py", "--ckpt", str(tmp_path / "m"), "--calib", str(tmp_path / "w.npy"),
                                          "--rate", "0.5", "--method", "kfac", "--ranks", ranks, "--text", "none",
                                          "--out", str(tmp_path / ranks)])
        job = A.prepare(A.parse_arguments())
        minutes[ranks] = A.make_plan(job, 0).seconds
    once = minutes["uniform"]
    sweep = once["forward sweep"] + once["backward sweep"]
    assert minutes["auto"]["solve"] == 2 * once["solve"] and sweep > 0
    assert minutes["auto"]["search"] == pytest.approx(8 * sweep * min(8, len(windows)) / len(windows))


def refused(tmp_path, windows, *arguments):
    np.save(tmp_path / "w.npy", windows.numpy())
    write_checkpoint(tmp_path / "m")
    done = in_process("air", "--ckpt", tmp_path / "m", "--calib", tmp_path / "w.npy", "--text", "none", "--rate", 0.5,
                      "--out", tmp_path / "out", *arguments)
    return done.returncode, done.stderr


def test_a_signal_that_the_method_does_not_read_is_refused(tmp_path, windows):
    """kfac-air takes W×Grad of the sweep that collects B; the same factors under another name would mislead."""
    code, said = refused(tmp_path, windows, "--method", "kfac-air", "--signal", "fisher")
    assert code == 2 and "--signal is fisher; expected none with --method kfac-air" in said
    assert refused(tmp_path, windows, "--method", "kfac-air")[0] == 0
    found = json.loads((tmp_path / "out" / "config.json").read_text("utf-8"))["air"]
    assert (found["signal"], found["delta"]) == ("kfac", 2.0)
    assert refused(tmp_path, windows, "--method", "svdllm", "--overwrite")[0] == 0
    found = json.loads((tmp_path / "out" / "config.json").read_text("utf-8"))["air"]
    assert (found["signal"], found["delta"]) == (None, None)


def test_gradients_that_overflow_are_not_blamed_on_the_inputs(tmp_path, windows):
    write_checkpoint(tmp_path / "m")
    state = load_file(tmp_path / "m" / "model.safetensors")
    state["lm_head.weight"] *= 1e22
    save_file(state, tmp_path / "big.safetensors")
    shutil.copy(tmp_path / "m" / "config.json", tmp_path / "config.json")
    for ranks in ("uniform", "auto"):
        code, said = refused(tmp_path, windows, "--ckpt", tmp_path / "big.safetensors", "--method", "kfac",
                             "--ranks", ranks)
        assert code == 1 and "overflowed, or gradients" in said, said


def job_of(monkeypatch, tmp_path, windows, *arguments):
    """The prepared air.Job of a command line."""
    if not (tmp_path / "m").exists():
        write_checkpoint(tmp_path / "m")
    np.save(tmp_path / "w.npy", windows.numpy())
    argv = ["air.py", "--ckpt", tmp_path / "m", "--calib", tmp_path / "w.npy", "--rate", 0.5, "--text", "none",
            "--out", tmp_path / "out", "--overwrite", *arguments]
    monkeypatch.setattr(sys, "argv", list(map(str, argv)))
    return A.prepare(A.parse_arguments())


@pytest.mark.parametrize("method", ["svdllm", "air", "kfac", "fwsvd", "gfwsvd"])
@pytest.mark.parametrize("ranks", ["uniform", "auto"])
def test_the_plans_statistics_are_those_that_are_kept(tmp_path, windows, monkeypatch, method, ranks):
    """On disk, where the search's lie beside the method's own; and in memory, where a block's are all at once."""
    job = job_of(monkeypatch, tmp_path, windows, "--method", method, "--ranks", ranks, "--stats", tmp_path / "s",
                 "--spill", tmp_path / "p")
    plan = A.make_plan(job, 0)
    assert ("inputs" in plan.disk) == (method != "svdllm" or ranks == "auto")
    monkeypatch.setattr(large, "machine_rates", lambda device, dtype: (1e9, 1e9, 1e9))
    A.main()
    kept = [x for path in (tmp_path / "s").glob("block*") for x in load_file(path).values()]
    kept = sum(x.nbytes for x in kept if x.ndim == 2)                       # vectors and counts are not planned for
    assert kept == pytest.approx(plan.disk["statistics"][1])
    if ranks == "uniform" and method != "svdllm":
        _, stats = next(iter(A.statistics(job.ckpt, job.windows, CPU, torch.float32, range(2), job.options.backward)))
        held = sum(x.nbytes for x in stats.values() if x.ndim == 2)
        assert held == pytest.approx(plan.held["statistics"] / 2)


@pytest.mark.parametrize("ranks", ["auto", "mixed"])
def test_a_killed_run_goes_on_with_the_ranks_that_it_had_measured(tmp_path, windows, monkeypatch, ranks):
    """Another search may end elsewhere by rounding alone; its ranks beside the first one's would miss the rate."""
    job_of(monkeypatch, tmp_path, windows, "--method", "kfac", "--ranks", ranks, "--stats", tmp_path / "s",
           "--rate", "0.8")
    A.main()
    whole = (tmp_path / "out" / "model.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "out")
    add = A.Writer.add

    def killed(self, part, tensors, note=None):
        add(self, part, tensors, note)
        raise KeyboardInterrupt
    monkeypatch.setattr(A.Writer, "add", killed)
    with pytest.raises(KeyboardInterrupt):
        A.main()
    monkeypatch.setattr(A.Writer, "add", add)
    monkeypatch.setattr(R, "find_ranks", lambda *arguments: pytest.fail("searched again"))
    A.main()
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == whole


def test_a_quiet_run_prints_its_results_only(tmp_path, windows):
    write_checkpoint(tmp_path / "m")
    np.save(tmp_path / "w.npy", windows.numpy())
    done = in_process("air", "--ckpt", tmp_path / "m", "--calib", tmp_path / "w.npy", "--rate", 0.5, "--method", "kfac",
                  "--ranks", "auto", "--out", tmp_path / "out", "--quiet", "--json", tmp_path / "r.json",
                  "--text", tmp_path / "w.npy")
    assert done.returncode == 0 and "ranks" not in done.stdout + done.stderr
    assert json.loads((tmp_path / "r.json").read_text())["allocation"] == "auto"
