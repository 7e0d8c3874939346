"""large.py and what rests on it: block inputs on disk, several processes, interruptions."""
import dataclasses
import json
import math
import random
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import air
import support.script
from support import checkpoint, large
from conftest import ROOT, TINY, distance, write_checkpoint
from model import LAYERS, Llama
from support.checkpoint import Checkpoint, TensorFolder, Writer
from support.config import parse_config
from support.script import InputError, check_space, container_bytes, free_bytes

AIR = (sys.executable, str(ROOT / "air.py"))


def start(*arguments, command=AIR):
    return subprocess.Popen([*command, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(*arguments, command=AIR):
    process = start(*arguments, command=command)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


@pytest.fixture
def job(tmp_path):
    """A checkpoint of 5 blocks, 7 windows of 24 tokens, and the arguments of a run over both."""
    ckpt = write_checkpoint(tmp_path / "ckpt", num_hidden_layers=5)
    np.save(tmp_path / "w.npy", np.random.RandomState(1).randint(0, 64, size=(7, 24)))
    return ("--ckpt", ckpt, "--calib", tmp_path / "w.npy", "--rate", 0.5, "--device", "cpu", "--text", "none")


# ---- the manifest


def test_folder_counts_only_what_its_manifest_names(tmp_path):
    folder = TensorFolder(tmp_path / "f", {"seed": 3})
    folder.save("a.safetensors", {"x": torch.arange(5)}, note=[1, 2])
    folder.save("b.safetensors", {"x": torch.ones(2)})
    folder.forget(["a.safetensors"])
    (tmp_path / "f" / "c.safetensors").write_bytes(b"left by something else")
    again = TensorFolder(tmp_path / "f", {"seed": 3})
    assert list(again.files) == ["b.safetensors"] and torch.equal(again.load("b.safetensors")["x"], torch.ones(2))
    assert not (tmp_path / "f" / "a.safetensors").exists()
    with pytest.raises(InputError, match=r"another seed \(3 there, 4 now\)"):
        TensorFolder(tmp_path / "f", {"seed": 4})
    (tmp_path / "f" / "b.safetensors").write_bytes(b"x")
    with pytest.raises(InputError, match="b.safetensors is not the file that was written"):
        again.load("b.safetensors")


# ---- interruptions


def killed_at(moment, *arguments):
    """Start a run, SIGKILL it after `moment` seconds; the seconds it took where it ended before, otherwise None."""
    began, process = time.time(), start(*arguments)
    try:
        process.communicate(timeout=moment)
        return time.time() - began
    except subprocess.TimeoutExpired:
        return None
    finally:
        process.kill()
        process.communicate()


def killed_and_run_again(arguments, out, undisturbed, kills, earliest=0.55):
    """Kill the run at random moments, run it again, and compare the file with an undisturbed one's. The moments are
    shares, from `earliest` on, of the shortest time a whole run took so far: a machine that others leave gets faster,
    and a kill that comes too late only says so. Yields each kill's second, or None, and the rerun's messages."""
    rng, lengths = random.Random(0), []
    for _ in range(5 * kills):
        moment = rng.uniform(earliest, 1.0) * min(lengths, default=300)
        ended = killed_at(moment, *arguments, "--out", out, "--overwrite")
        assert not out.exists() or Checkpoint(out)              # never a part of a checkpoint under the final name
        code, _, err = finish(*arguments, "--out", out, "--overwrite")
        assert code == 0, err
        assert (out / "model.safetensors").read_bytes() == (undisturbed / "model.safetensors").read_bytes()
        assert (out / "config.json").read_text() == (undisturbed / "config.json").read_text()
        subprocess.run(["rm", "-r", out])
        if ended is None:
            kills -= 1
            yield moment, err
        else:
            lengths.append(ended)
            yield None, err
        if kills == 0:
            return
    pytest.fail(f"{kills} more kills were due: whole runs took {lengths} s")


def test_killed_at_any_moment_it_goes_on(job, tmp_path):
    """SIGKILL at random moments, statistics and spilled inputs emptied between them; the file is bit-identical."""
    assert finish(*job, "--out", tmp_path / "undisturbed")[0] == 0      # in a fresh clone it compiles the modules, too
    stats, spill = tmp_path / "stats", tmp_path / "spill"
    again = (*job, "--stats", stats, "--spill", spill)
    for _ in killed_and_run_again(again, tmp_path / "out", tmp_path / "undisturbed", kills=5):
        subprocess.run(["rm", "-rf", stats, spill])             # before 0.55 of a run Python is still importing
        assert not (tmp_path / "out.partial").exists()


def stopped(monkeypatch, job, extra, after, what="save"):
    """Run air.main in this process and stop it, as a kill would, before the `after`-th file is saved."""
    saved, save = [], TensorFolder.save

    class Killed(BaseException):
        pass

    def counted(self, name, *rest, **more):
        if len(saved) == after:
            raise Killed
        saved.append(name)
        save(self, name, *rest, **more)
    monkeypatch.setattr(TensorFolder, "save", counted)
    monkeypatch.setattr(sys, "argv", ["air.py", *map(str, (*job, *extra))])
    try:
        air.main()
    except Killed:
        pass
    monkeypatch.setattr(TensorFolder, "save", save)
    return saved


@pytest.mark.parametrize("spill", [False, True])
def test_stopped_before_any_file_it_goes_on_without_doing_it_twice(job, tmp_path, monkeypatch, spill):
    """Every point between two files: what was finished is not computed again, and the result is bit-identical."""
    monkeypatch.setattr(sys, "argv", ["air.py", *map(str, (*job, "--out", tmp_path / "undisturbed", "--quiet"))])
    air.main()
    expected = (tmp_path / "undisturbed" / "model.safetensors").read_bytes()
    extra = lambda i: ["--out", tmp_path / f"o{i}", "--stats", tmp_path / f"s{i}", "--quiet",           # noqa: E731
                       *(["--spill", tmp_path / f"p{i}"] if spill else [])]
    whole = stopped(monkeypatch, job, extra("all"), 10**9)
    for i in range(0, len(whole), 3 if spill else 2):
        first = stopped(monkeypatch, job, extra(i), i)
        second = stopped(monkeypatch, job, extra(i), 10**9)
        assert first == whole[:i] and sorted(second) == sorted(whole[i:]), (i, second)
        assert (tmp_path / f"o{i}" / "model.safetensors").read_bytes() == expected
        assert not list((tmp_path / f"s{i}").glob("gradient*"))


def test_methods_share_a_folder_and_the_same_command_gives_the_same_file(job, tmp_path, monkeypatch):
    """ΣXXᵀ of another method's sweep differs in its last bits; whoever finds it there uses it, the first time too."""
    for name, options in (("a", ("--method", "svdllm")), ("b", ()), ("c", ())):
        stopped(monkeypatch, job, ["--out", tmp_path / name, "--stats", tmp_path / "s", "--quiet", *options], 10**9)
    b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "bc")
    assert b == c


def test_finished_blocks_are_not_thrown_away(job, tmp_path, monkeypatch):
    """Without --stats nothing would be kept: the same output folder is refused rather than begun anew."""
    extra = ["--out", tmp_path / "o", "--stats", tmp_path / "s"]
    stopped(monkeypatch, job, extra, 8)
    code, _, err = finish(*job, *extra[:2])
    assert code == 2 and "add --stats to go on" in err and list((tmp_path / "o.partial").glob("model-block*"))
    assert finish(*job, *extra)[0] == 0


def test_a_killed_run_that_kept_nothing_begins_anew_with_stats(job, tmp_path, monkeypatch):
    """Its parts, not to be kept, are none to go on from, nor in the way."""
    monkeypatch.setattr(checkpoint.shutil, "rmtree", lambda *a, **_: None)          # kill -9 clears nothing up
    monkeypatch.setattr(Writer, "__exit__", lambda *a: None)
    stopped(monkeypatch, job, ["--out", tmp_path / "o", "--quiet"], 2)
    monkeypatch.undo()
    assert list((tmp_path / "o.partial").glob("model-block*"))
    code, _, err = finish(*job, "--out", tmp_path / "o", "--stats", tmp_path / "s")
    assert code == 0, err
    assert finish(*job, "--out", tmp_path / "p")[0] == 0
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in "op")
    assert one == other


def test_a_spill_of_another_number_of_processes_is_cleared_up(job, tmp_path, monkeypatch):
    """Of the same run, which nobody holds; another run's stays."""
    extra = ["--out", tmp_path / "o", "--spill", tmp_path / "p", "--quiet"]
    stopped(monkeypatch, job, extra, 3)
    (tmp_path / "p" / "0of1").rename(tmp_path / "p" / "1of4")
    shutil.copytree(tmp_path / "p" / "1of4", tmp_path / "p" / "0of2")
    path = tmp_path / "p" / "0of2" / "manifest.json"
    path.write_text(path.read_text().replace('"windows": "', '"windows": "other '))
    assert json.loads(path.read_text())["files"]
    # Others' files, whatever they are called.
    theirs = ("proofs/a.txt", "software/manifest.json", "leftof2/input_001.safetensors", "3of4/thesis.tex",
              "1of3/input_000.safetensors.bak", "2of4")
    for name in theirs:
        (tmp_path / "p" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "p" / name).write_text("{}")
    # A killed run of the same, which was about to be removed.
    shutil.copytree(tmp_path / "p" / "1of4", tmp_path / "p" / "4of5")
    (tmp_path / "p" / "4of5" / "manifest.json").unlink()
    assert finish(*job, *extra)[0] == 0
    assert sorted(path.name for path in (tmp_path / "p").iterdir()) == sorted(
        {"0of2", *(name.split("/")[0] for name in theirs)})
    assert all((tmp_path / "p" / name).read_text() == "{}" for name in theirs)
    # Nor is a folder of somebody's taken that has the name of this run's own.
    (tmp_path / "p" / "0of1").mkdir()
    (tmp_path / "p" / "0of1" / "thesis.tex").write_text("x")
    code, _, err = finish(*job, *extra, "--overwrite")
    assert code == 2 and "holds thesis.tex, which no run wrote" in err
    assert (tmp_path / "p" / "0of1" / "thesis.tex").read_text() == "x"


def test_gradients_of_a_run_killed_at_its_end_are_cleared_up(job, tmp_path):
    """Whether its manifest names them or not; another signal's are left to that."""
    extra = ("--out", tmp_path / "o", "--overwrite", "--stats", tmp_path / "s")
    assert finish(*job, *extra)[0] == 0
    # Above blocks of which some are not there, a killed run of more of them goes on from it.
    for path in (tmp_path / "s").glob("block_002.lrp*"):
        path.rename(tmp_path / path.name)
    for name in ("gradient_000.lrp", "gradient_001.lrp", "gradient_001.fisher", "gradient_003.lrp"):
        save_file({"g": torch.zeros(3)}, tmp_path / "s" / f"{name}.safetensors")
    found = json.loads((tmp_path / "s" / "manifest.json").read_text())
    lacks = dict(found["files"])
    del lacks["block_002.lrp.safetensors"]
    found["files"]["gradient_000.lrp.safetensors"] = {"sha256": "", "note": None}
    (tmp_path / "s" / "manifest.json").write_text(json.dumps(found | {"files": lacks}))
    assert finish(*job, *extra, "--layers", "3:5")[0] == 0
    left = sorted(path.name for path in (tmp_path / "s").glob("gradient*"))
    assert left == ["gradient_001.fisher.safetensors", "gradient_003.lrp.safetensors"]
    (tmp_path / "block_002.lrp.safetensors").rename(tmp_path / "s" / "block_002.lrp.safetensors")
    (tmp_path / "s" / "manifest.json").write_text(json.dumps(found))
    assert finish(*job, *extra)[0] == 0
    assert [path.name for path in (tmp_path / "s").glob("gradient*")] == ["gradient_001.fisher.safetensors"]
    assert "gradient" not in (tmp_path / "s" / "manifest.json").read_text()


def test_statistics_are_of_every_number_of_a_checkpoint(job, tmp_path):
    """A pruned head, in the middle of a tensor: an ordinary variant of a model."""
    extra = ("--out", tmp_path / "o", "--overwrite", "--stats", tmp_path / "s")
    # Wide enough that first and last numbers are not all.
    job = ("--ckpt", write_checkpoint(tmp_path / "wide", hidden_size=128, num_hidden_layers=3), *job[2:])
    assert finish(*job, *extra)[0] == 0
    ckpt = Checkpoint(job[1])
    before = ckpt.fingerprint()
    path = ckpt.files[0]
    state = load_file(path)
    middle = state["model.layers.2.self_attn.q_proj.weight"]
    middle.flatten()[middle.numel() // 2] += 1e-3
    save_file(state, path)
    assert Checkpoint(job[1]).fingerprint() != before
    code, _, err = finish(*job, *extra)
    assert code == 2 and "another checkpoint (" in err


def test_other_arguments_are_refused_and_named(job, tmp_path, monkeypatch):
    extra = ["--out", tmp_path / "o", "--stats", tmp_path / "s", "--quiet"]
    stopped(monkeypatch, job, extra, 4)
    for options, named in (
        (("--rate", 0.4), "rate (0.5 there, 0.4 now)"),
        (("--delta", 3), "delta (2.0 there, 3.0 now)"),
        (("--layers", "0:2"), "layers (0:5 there, 0:2 now)"),
    ):
        code, _, err = finish(*job, *extra, *options)
        assert code == 2 and f"another {named}" in err and err.count("\n") == 1
    np.save(tmp_path / "w.npy", np.random.RandomState(2).randint(0, 64, size=(7, 24)))
    code, _, err = finish(*job, *extra)
    assert code == 2 and "another windows" in err
    assert (tmp_path / "o.partial").exists()


# ---- block inputs on disk


def test_spilled_inputs_give_the_same_file_and_leave_nothing(job, tmp_path):
    for options in ((), ("--spill", tmp_path / "spill")):
        assert finish(*job, *options, "--out", tmp_path / f"out{len(options)}")[0] == 0
    assert (tmp_path / "out0" / "model.safetensors").read_bytes() == (
        tmp_path / "out2" / "model.safetensors"
    ).read_bytes()
    assert not list((tmp_path / "spill").iterdir())
    for i in range(2):  # the second run finds all statistics and has nothing to spill
        code, _, err = finish(
            *job, "--spill", tmp_path / "spill", "--stats", tmp_path / "s", "--out", tmp_path / f"again{i}"
        )
        assert code == 0 and not list((tmp_path / "spill").iterdir()), err


def plan_of(config, out, windows=(256, 2048)):
    """The plan of a run at rate 0.6 over a model of `config`, and its result's bytes by counting parameters."""
    cfg = parse_config(config)
    with torch.device("meta"):
        shapes = {name: tuple(w.shape) for name, w in Llama(cfg).state_dict().items()}
    names = [f"model.layers.{l}.{name}" for l in range(cfg.n_layers) for name in LAYERS]
    cut = {name: (*shapes[name + ".weight"], air.rank_at(0.6, *shapes[name + ".weight"])) for name in names}
    plan = large.make_plan(cfg, cut, windows, torch.device("cpu"), torch.float32, "lrp")
    with torch.device("meta"):
        small = Llama(dataclasses.replace(cfg, ranks={name: k for name, (_, _, k) in cut.items()}))
    return plan, 2 * sum(w.numel() for w in small.state_dict().values())


def test_the_plans_result_is_the_result(tmp_path, monkeypatch):
    """LLaMA-7B's shape: 8.3 GB in 16 bits at rate 0.6; that, the spill and the statistics on one disk are added up."""
    config = dict(
        TINY,
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        max_position_embeddings=2048,
    )
    monkeypatch.setattr(large, "machine_rates", lambda *_: (1e11, 1e11, 1e10))
    plan, result = plan_of(config, tmp_path)
    plan.place((tmp_path / "out.partial", result), tmp_path / "spill", tmp_path / "stats")
    assert plan.disk["result"] == (tmp_path / "out.partial", result) and result == pytest.approx(8.3e9, rel=0.01)
    assert (
        "result 8.29 GB" in plan.line() and "inputs 283.47 GB" in plan.line() and "statistics 69.81 GB" in plan.line()
    )
    free = sum(size for _, size, *_ in plan.disk.values())
    monkeypatch.setattr(large, "free_bytes", lambda device: 10**12)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**13, 0, free))
    plan.check()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**13, 0, free - 1))
    with pytest.raises(InputError, match="GB are needed"):
        plan.check()


# ---- kept statistics are the plain ones


@pytest.mark.parametrize("signal", [None, "lrp", "fisher", "kfac"])
@pytest.mark.parametrize("kept", ["nothing", "stats", "spill", "both", "again"])
def test_kept_statistics_are_the_plain_ones_bit_by_bit(job, tmp_path, signal, kept):
    ckpt, blocks = Checkpoint(job[1]), range(1, 4)
    windows = torch.from_numpy(np.load(job[3]))
    arguments = (ckpt, windows, torch.device("cpu"), torch.float32, blocks, signal)
    plain = {l: {key: x.clone() for key, x in stats.items()} for l, stats in air.statistics(*arguments)}
    folders = {"nothing": (None, None), "stats": (tmp_path / "s", None), "spill": (None, tmp_path / "p")}.get(
        kept, (tmp_path / "s", tmp_path / "p"))
    if kept == "again":
        for _ in large.Kept(*folders).statistics(*arguments):
            pass
    found = dict(large.Kept(*folders).statistics(*arguments))
    assert plain.keys() == found.keys() == set(blocks)
    for l in blocks:
        assert plain[l].keys() == found[l].keys() and all(torch.equal(x, found[l][key]) for key, x in plain[l].items())


def test_statistics_know_the_code_that_made_them(tmp_path):
    """A fork that edits a rule is refused the old numbers, by name; an edited comment or message changes nothing."""
    shutil.copytree(
        ROOT,
        tmp_path / "fork",
        ignore=shutil.ignore_patterns(".git", ".venv", "out", "data", "tests", "experiments", "*.png"),
    )
    rule = tmp_path / "fork" / "influence.py"
    text = rule.read_text("utf-8")
    command = (sys.executable, str(tmp_path / "fork" / "air.py"))
    job = (
        "--samples",
        2,
        "--seqlen",
        32,
        "--text",
        "none",
        "--layers",
        "5:6",
        "--stats",
        tmp_path / "s",
        "--device",
        "cpu",
    )
    assert finish(*job, "--out", tmp_path / "a", command=command)[0] == 0
    for harmless in (text.replace("# A.1:", "# Appendix A.1:"), text.replace("Identity rule for SiLU", "Rule for SiLU"),
                     text.replace("the share of influence", "how much influence there is")):
        assert harmless != text
        rule.write_text(harmless, "utf-8")
        code, _, err = finish(*job, "--out", tmp_path / "a", "--overwrite", command=command)
        assert code == 0, err
    rule.write_text(text.replace("lambda W, g: (W * g).abs()", "lambda W, g: torch.rand_like(W)", 1), "utf-8")
    code, _, err = finish(*job, "--out", tmp_path / "b", command=command)
    assert code == 2 and "made with another code (" in err.splitlines()[-1] and not (tmp_path / "b").exists()


def test_the_plan_is_printed_and_refused(job, tmp_path, monkeypatch):
    code, _, err = finish(*job, "--out", tmp_path / "out", "--stats", tmp_path / "s")
    assert code == 0 and "plan: about" in err and "GB of memory" in err and "statistics" in err
    monkeypatch.setattr(large, "free_bytes", lambda device: 1000)
    monkeypatch.setattr(sys, "argv", ["air.py", *map(str, job), "--out", str(tmp_path / "o2")])
    with pytest.raises(InputError, match="--spill DIR keeps block inputs on disk"):
        air.main()
    assert not list(tmp_path.glob("o2*"))


def test_what_lies_on_one_disk_is_added_up_and_what_is_there_is_not_asked_for_again(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 0, 1000))
    check_space((tmp_path / "a", 600), (tmp_path / "b", 400))
    with pytest.raises(InputError, match="0.000 GB free"):
        check_space((tmp_path / "a", 600), (tmp_path / "b", 500))
    (tmp_path / "b" / "0of1").mkdir(parents=True)
    (tmp_path / "b" / "0of1" / "input_000.safetensors").write_bytes(b"x" * 100)
    (tmp_path / "b" / "0of1" / "manifest.json").write_text(
        '{"facts": {}, "files": {"input_000.safetensors": {}, "gone.safetensors": {}}}')
    check_space((tmp_path / "a", 600), (tmp_path / "b", 500))
    # Another's files, links to nothing and statistics that are not read leave nothing to spare.
    for place in (tmp_path / "b" / "other", tmp_path / "b" / "hub" / "some"):
        place.mkdir(parents=True)
        (place / "model.safetensors").write_bytes(b"x" * 500)
        (place / "dangling.safetensors").symlink_to(place / "none")
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "block_000.lrp.safetensors").write_bytes(b"x" * 300)
    (tmp_path / "s" / "block_000.gram.safetensors").write_bytes(b"x" * 50)
    (tmp_path / "s" / "manifest.json").write_text(
        '{"facts": {}, "files": {"block_000.lrp.safetensors": {}, "block_000.gram.safetensors": {}}}')
    for name, text in (("other", '{"files": [{"path": "x"}]}'), ("hub of some", "[]"), ("1of2", "torn {")):
        (tmp_path / "b" / name).mkdir(exist_ok=True)
        (tmp_path / "b" / name / "manifest.json").write_text(text)
    for needs in (((tmp_path / "b", 1101),), ((tmp_path / "s", 1051, {"gram", "fisher"}),)):
        with pytest.raises(InputError, match="0.000 GB free"):
            check_space(*needs)
    check_space((tmp_path / "b", 1100))
    check_space((tmp_path / "s", 1050, {"gram", "fisher"}))
    check_space((tmp_path / "s", 1350, {"gram", "lrp"}))


def test_a_containers_limit_is_the_memory_that_is_free(tmp_path, monkeypatch):
    host = torch.device("cpu")
    whole = free_bytes(host)
    assert container_bytes(tmp_path) == math.inf                        # no cgroup v2
    for name, text in (("max", "max\n"), ("current", "700\n"), ("stat", "anon 400\nfile 300\n")):
        (tmp_path / f"memory.{name}").write_text(text)
    assert container_bytes(tmp_path) == math.inf
    (tmp_path / "memory.max").write_text("1000\n")
    assert container_bytes(tmp_path) == 600
    monkeypatch.setattr(support.script, "container_bytes", lambda: 600)
    assert free_bytes(host) == 600 < whole


def test_what_a_run_does_not_do_is_not_planned(demo_job):
    """ALS where the method sweeps, once a sweep; no statistics on disk for plain SVD."""
    seconds = {}
    for how in ((), ("--sweeps", "3"), ("--sweeps", "0"), ("--method", "svdllm"), ("--method", "kfac")):
        plan = demo_job(*how)
        seconds[how] = plan.seconds["solve"], plan.als
    base, als = seconds["--sweeps", "0"]
    for how, times in (((), 1), (("--sweeps", "3"), 3), (("--sweeps", "0"), 0), (("--method", "svdllm"), 0),
                       (("--method", "kfac"), 0)):
        assert math.isclose(seconds[how][0], base + times * als), how
    assert "statistics" not in demo_job("--method", "svd", "--stats", "s").disk
    assert "statistics" in demo_job("--method", "svdllm", "--stats", "s").disk


@pytest.fixture
def demo_job(tmp_path, monkeypatch):
    """The plan of a run of air.py with these arguments, at fixed rates of the machine."""
    monkeypatch.setattr(large, "machine_rates", lambda device, dtype: (1e11, 1e11, 1e10))
    monkeypatch.chdir(tmp_path)

    def plan(*arguments):
        monkeypatch.setattr(sys, "argv", ["air.py", "--ckpt", str(ROOT / "demo"), "--text", "none", "--samples", "2",
                                          *arguments])
        return air.make_plan(air.prepare(air.parse_arguments()), 0)
    return plan


# ---- several processes


def torchrun(world, path=ROOT / "air.py"):
    return (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world), str(path))


def test_what_any_process_repaired_is_said(job, tmp_path):
    """The inputs of two blocks' o_proj are always zero; each is solved by another process, the first alone prints."""
    shutil.copytree(job[1], tmp_path / "pruned")
    state = load_file(tmp_path / "pruned" / "model.safetensors")
    for l in (1, 2):
        state[f"model.layers.{l}.self_attn.v_proj.weight"].zero_()
    save_file(state, tmp_path / "pruned" / "model.safetensors")
    code, _, err = finish(*job, "--ckpt", tmp_path / "pruned", "--out", tmp_path / "o", "--ridge", "0", "--json",
                          tmp_path / "r.json", command=torchrun(2))
    assert code == 0, err
    repaired = json.loads((tmp_path / "r.json").read_text())["repairs"]
    assert len(repaired) == err.count("is not positive definite") == 2
    assert all(f"{layer}: ΣXXᵀ is not positive definite" in err for layer in repaired)


@pytest.mark.parametrize("world", [2, 3])
def test_processes_give_one_processs_result(job, tmp_path, world):
    """7 windows and 5 blocks divide evenly by neither; sums agree to 1e-6, and so do the factors' products."""
    for command, name in ((AIR, "one"), (torchrun(world), "many")):
        code, out, err = finish(*job, "--dtype", "float32", "--out", tmp_path / name, "--stats", tmp_path / f"s_{name}",
                                "--json", tmp_path / f"{name}.json", command=command)
        assert code == 0, err
        assert out.count("parameters (") == 1
    for path in sorted((tmp_path / "s_one").glob("block*")):
        a, b = load_file(path), load_file(tmp_path / "s_many" / path.name)
        assert a.keys() == b.keys() and all(distance(b[key], a[key]) < 1e-6 for key in a)
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "many"))
    assert a.keys() == b.keys()
    for layer in Checkpoint(tmp_path / "one").cfg.ranks:
        many, one = (w[layer + ".U.weight"] @ w[layer + ".V.weight"] for w in (b, a))
        assert distance(many, one) < 1e-4
    one, many = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "many"))
    assert many["ranks"] == one["ranks"] and many["loss"].keys() == one["loss"].keys()


def test_several_processes_go_on_where_one_was_killed(job, tmp_path, monkeypatch):
    """What one process had finished is taken over; its gradient, of all windows, is not: each sweeps its own."""
    extra = ["--out", tmp_path / "out", "--stats", tmp_path / "s", "--quiet"]
    stopped(monkeypatch, job, extra, 6)
    assert list((tmp_path / "s").glob("gradient*"))
    code, _, err = finish(*job, *extra[:-1], command=torchrun(2))
    assert code == 0 and "going on: 1 of 5 blocks" in err, err
    assert finish(*job, "--out", tmp_path / "one")[0] == 0 and not list((tmp_path / "s").glob("gradient*"))
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "out"))
    for layer in Checkpoint(tmp_path / "one").cfg.ranks:
        assert (
            distance(b[layer + ".U.weight"] @ b[layer + ".V.weight"], a[layer + ".U.weight"] @ a[layer + ".V.weight"])
            < 1e-4
        )


def test_one_process_dying_ends_all(job, tmp_path):
    """Process 1 of 2 meets a broken disk: the run ends with its reason, and no target appears."""
    wrapper = tmp_path / "air_broken.py"
    wrapper.write_text(f"import os, sys; sys.path.insert(0, {str(ROOT)!r}); import air\n"
                       "def broken(*a, **k): raise OSError(5, 'Input/output error')\n"
                       "if os.environ['RANK'] == '1': air.solve_block = broken\n"
                       "air.run(air.main)\n")
    code, _, err = finish(*job, "--out", tmp_path / "out", command=torchrun(2, wrapper))
    assert code != 0 and "Input/output error" in err and not (tmp_path / "out").exists()


def test_fewer_windows_than_processes(job, tmp_path):
    np.save(tmp_path / "w.npy", np.zeros((1, 24), dtype=np.int64))
    code, _, err = finish(*job, "--out", tmp_path / "out", command=torchrun(2))
    assert code != 0 and "1 windows cannot be divided among 2 processes" in err and not (tmp_path / "out").exists()
