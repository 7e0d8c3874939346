"""Files and processes: modes, permissions, two runs at once, kills, checkpoints of other trainings, torchrun."""
import json
import os
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import air
import calibrate
from conftest import ROOT, air_main, script, write_checkpoint
from support import checkpoint, large
from support.checkpoint import Checkpoint, TensorFolder, Writer
from support.script import Hold, InputError, check_readable, check_writable, failure

ROOTLESS = 65534                # nobody
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another user")


@pytest.fixture
def job(tiny, tmp_path, windows):
    np.save(tmp_path / "w.npy", windows.numpy())
    return ["--ckpt", tiny, "--calib", tmp_path / "w.npy", "--text", "none", "--device", "cpu"]


def mode(path):
    return stat.S_IMODE(os.stat(path).st_mode)


# ---- modes


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_every_file_has_the_mode_that_umask_gives(umask, job, tmp_path, monkeypatch):
    tokenizer = tmp_path / "tiny" / "tokenizer.json"
    tokenizer.write_text("{}")
    tokenizer.chmod(0o444)
    seen = {}
    saved = large.Spill.pop

    def pop(self, l):
        seen.update({path: mode(path) for path in self.folder.path.iterdir()})
        return saved(self, l)
    monkeypatch.setattr(large.Spill, "pop", pop)
    old = os.umask(umask)
    try:
        air_main(monkeypatch, *job, "--out", tmp_path / "out", "--stats", tmp_path / "s", "--spill", tmp_path / "p",
                   "--json", tmp_path / "r.json", "--quiet")
        monkeypatch.setattr(sys, "argv", [*map(str, ("", *job[:4], "--out", tmp_path / "c.npy", "--device", "cpu"))])
        calibrate.main()
        monkeypatch.setattr(checkpoint, "SHARD_BYTES", 20_000)
        air_main(monkeypatch, *job, "--out", tmp_path / "shards", "--quiet")
    finally:
        os.umask(old)
    made = [tmp_path / name for name in ("out", "shards", "s", "p", "r.json", "c.npy")]
    made += [path for folder in made[:4] for path in folder.rglob("*")]
    assert len([path for path in made if path.suffix == ".safetensors"]) > 6 and len(seen) > 3
    for path in made:
        assert mode(path) == (0o777 if path.is_dir() else 0o666) & ~umask, path
    assert set(seen.values()) == {0o666 & ~umask}


# ---- permissions


@pytest.fixture
def open_folder(windows, monkeypatch):
    """A folder that any user reaches, with a checkpoint and windows in it; yields it and the arguments of a run.

    Another user may not enter the repository itself, whose sources a run digests.
    """
    for module in (air, large):
        monkeypatch.setattr(module, "code_digest", lambda *files: "code")
    folder = Path(tempfile.mkdtemp())
    write_checkpoint(folder / "tiny")
    np.save(folder / "w.npy", windows.numpy())
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o777 if path.is_dir() else 0o644)       # safetensors' own are not for others
    yield folder, ["--ckpt", folder / "tiny", "--calib", folder / "w.npy", "--text", "none", "--device", "cpu"]
    os.seteuid(0)
    shutil.rmtree(folder)


def refused(path, act, *words):
    """`act` raises an InputError of one line that names the path and the permission."""
    with pytest.raises(InputError) as error:
        act()
    message = str(error.value)
    assert str(path) in message and "ermission denied" in message and "\n" not in message, message
    assert all(word in message for word in words)


@needs_root
def test_what_may_not_be_read_is_said_as_that(open_folder, monkeypatch):
    folder, job = open_folder
    ckpt = folder / "tiny"
    run = lambda *more: (lambda: air_main(monkeypatch, *job, "--out", folder / "o", *more))     # noqa: E731
    stats = TensorFolder(folder / "s", {})
    stats.save("a.safetensors", {"x": torch.ones(2)})
    for name in ("t.txt", "t.jsonl", "tokenizer.model", "model.safetensors.index.json"):
        (folder / name).write_text("x")
    (folder / "tokenizer.model").rename(ckpt / "tokenizer.model")
    cases = (
        (ckpt / "model.safetensors", run()),
        (ckpt / "config.json", run()),
        (ckpt / "tokenizer.model", run()),                  # it would be copied at the end
        (ckpt, run()),
        (folder / "w.npy", run()),
        (folder / "t.txt", run("--text", folder / "t.txt")),
        (folder / "t.jsonl", run("--calib", folder / "t.jsonl")),
        (folder / "s", run("--stats", folder / "s")),
        (folder / "s" / "a.safetensors", lambda: stats.load("a.safetensors")),
    )
    for path, act in cases:
        before = mode(path)
        path.chmod(0)
        os.seteuid(ROOTLESS)
        refused(path, act)
        os.seteuid(0)
        path.chmod(before)
    assert not list(folder.glob("o*"))


@needs_root
def test_what_may_not_be_written_is_said_as_that_before_any_work(open_folder, monkeypatch):
    folder, job = open_folder
    (folder / "closed").mkdir()
    (folder / "closed").chmod(0o755)
    air_main(monkeypatch, *job, "--out", folder / "old", "--quiet")
    (folder / "old").chmod(0o555)
    monkeypatch.setattr(air, "forward_sweep", None)          # any work would fail
    os.seteuid(ROOTLESS)
    for option in ("--json", "--out", "--stats", "--spill"):
        path = folder / "closed" / "x"
        out = () if option == "--out" else ("--out", folder / "o")
        refused(folder / "closed", lambda: air_main(monkeypatch, *job, *out, option, path))
    refused(folder / "closed",
            lambda: air_main(monkeypatch, *job, "--out", folder / "o", "--stats", folder / "closed"))
    refused(folder / "old", lambda: air_main(monkeypatch, *job, "--out", folder / "old", "--overwrite"))
    assert not list(folder.glob("o.*")) and not (folder / "o").exists()


def test_denials_planted(tmp_path, monkeypatch):
    """What seteuid shows, for those who are not root: the sentences of a denied open and of any later one."""
    path = tmp_path / "x.json"
    path.write_text("{}")

    def closed(name, *_, **__):
        raise PermissionError(13, "Permission denied", str(name))
    monkeypatch.setattr("builtins.open", closed)
    refused(path, lambda: check_readable(path), "cannot be read")
    refused(path, lambda: checkpoint.read_json(path), "cannot be read")
    monkeypatch.undo()
    monkeypatch.setattr(os, "access", lambda *_, **__: False)
    refused(tmp_path, lambda: check_writable(path), "cannot be written")
    code, message = failure(PermissionError(13, "Permission denied", "/somewhere"))
    assert code == 2 and "/somewhere cannot be read or written: permission denied" in message


# ---- two runs at once


@pytest.mark.parametrize("shared", ["--out", "--stats", "--spill"])
def test_a_second_run_is_told_and_harms_nothing(shared, job, tmp_path, monkeypatch, capsys):
    """Within the first one's solve the second starts and is refused; the first then ends as if alone."""
    own = {"--out": tmp_path / "a", "--stats": tmp_path / "s", "--spill": tmp_path / "p"}
    other = {name: f"{path}2" for name, path in own.items()} | {shared: own[shared]}
    solve_block, told = air.solve_block, []

    def at_the_same_time(*arguments):
        monkeypatch.setattr(air, "solve_block", solve_block)
        files = {path: path.read_bytes() for path in tmp_path.rglob("*.safetensors")}
        capsys.readouterr()
        with pytest.raises(InputError, match="another run is at work in") as error:
            air_main(monkeypatch, *job, *(each for pair in other.items() for each in pair))
        told.append(str(error.value))
        assert capsys.readouterr().err == "" and {path: path.read_bytes() for path in files} == files
        return solve_block(*arguments)
    monkeypatch.setattr(air, "solve_block", at_the_same_time)
    air_main(monkeypatch, *job, *(each for pair in own.items() for each in pair))
    assert told and "\n" not in told[0] and not list(tmp_path.glob("*.partial"))
    air_main(monkeypatch, *job, "--out", tmp_path / "alone")
    one, alone = (load_file(tmp_path / name / "model.safetensors") for name in ("a", "alone"))
    assert all(torch.equal(one[name], alone[name]) for name in alone)


def test_a_killed_run_holds_nothing(tmp_path):
    code = (f"import sys, time; sys.path.insert(0, {str(ROOT)!r}); from support.script import Hold;"
            f"held = Hold({str(tmp_path / 'f')!r}); print('held', flush=True); time.sleep(60)")
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    with pytest.raises(InputError, match="another run is at work"):
        Hold(tmp_path / "f")
    process.kill()
    process.wait()
    Hold(tmp_path / "f").release()
    assert not list((tmp_path / "f").iterdir())


def test_a_folder_moved_away_while_it_was_waited_for_is_made_anew(tmp_path, monkeypatch):
    from support import script as module
    flock, calls = module.fcntl.flock, []

    def late(*arguments):
        calls.append(1)
        flock(*arguments)
        if len(calls) == 1:
            (tmp_path / "f").rename(tmp_path / "moved")
    monkeypatch.setattr(module.fcntl, "flock", late)
    held = Hold(tmp_path / "f")
    assert len(calls) == 2 and os.path.samestat(os.fstat(held.held), os.stat(tmp_path / "f"))


@pytest.mark.parametrize("without", ["locks", "fcntl"])
def test_a_disk_without_locks_does_not_stop_a_run(without, job, tmp_path, monkeypatch):
    from support import script as module

    class Disk:
        LOCK_EX = LOCK_NB = 0

        def flock(*_):
            raise OSError(37, "No locks available")
    monkeypatch.setattr(module, "fcntl", None if without == "fcntl" else Disk)
    air_main(monkeypatch, *job, "--out", tmp_path / "o", "--stats", tmp_path / "s", "--quiet")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["o", "s", "tiny", "w.npy"]


def test_whole_statistics_are_read_by_any_number_of_runs(job, tmp_path, monkeypatch):
    air_main(monkeypatch, *job, "--out", tmp_path / "a", "--stats", tmp_path / "s", "--quiet")
    held = Hold(tmp_path / "s")
    air_main(monkeypatch, *job, "--out", tmp_path / "b", "--stats", tmp_path / "s", "--quiet", "--rate", 0.4)
    with pytest.raises(InputError, match="another run"):
        air_main(monkeypatch, *job, "--out", tmp_path / "c", "--stats", tmp_path / "s", "--signal", "wxg")
    held.release()
    assert not list(tmp_path.glob("c*"))


def test_other_statistics_are_refused_before_the_first_line(job, tmp_path, monkeypatch, capsys):
    air_main(monkeypatch, *job, "--out", tmp_path / "a", "--stats", tmp_path / "s", "--quiet")
    np.save(tmp_path / "w.npy", np.zeros((6, 24), dtype=np.int64))
    capsys.readouterr()
    with pytest.raises(InputError, match="another windows"):
        air_main(monkeypatch, *job, "--out", tmp_path / "b", "--stats", tmp_path / "s")
    assert capsys.readouterr().err == "" and not list(tmp_path.glob("b*"))


# ---- a kill between two renames


@pytest.mark.parametrize("shard_bytes", [5e9, 20_000])
@pytest.mark.parametrize("keep", [False, True])
def test_a_target_moved_aside_is_put_back(keep, shard_bytes, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", shard_bytes)
    ckpt, out = Checkpoint(tiny), tmp_path / "out"

    def write(value, **options):
        with Writer(out, 0, facts={}, keep=keep, **options) as writer:
            for name in ckpt.names:
                writer.add(f"model-{name}.safetensors", {name: ckpt.tensor(name)})
            writer.finish(ckpt.raw | {"air": {"value": value}})
    write(1)
    replace = os.replace

    def killed(source, target):
        if Path(target) == out:
            os._exit(9)
        replace(source, target)
    child = os.fork()
    if not child:
        os.replace = killed
        write(2, overwrite=True)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9 and not out.exists()
    with pytest.raises(InputError, match="already exists"):
        Writer(out, 0, facts={}, keep=keep)
    assert Checkpoint(out).raw["air"] == {"value": 1}
    def interrupted(source, target):
        if Path(target) == out and Path(source).name != "old":
            raise KeyboardInterrupt
        replace(source, target)
    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(2, overwrite=True)
    monkeypatch.setattr(os, "replace", replace)
    assert Checkpoint(out).raw["air"] == {"value": 1}
    write(3, overwrite=True)
    assert Checkpoint(out).raw["air"] == {"value": 3}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "tiny"] and not (out / "old").exists()
    # What no run moved stays.
    (tmp_path / "new.partial" / "old").mkdir(parents=True)
    (tmp_path / "new.partial" / "old" / "thesis.tex").write_text("x")
    with pytest.raises(InputError, match="holds old, which no run wrote"):
        Writer(tmp_path / "new", 0, facts={}, keep=keep)
    assert (tmp_path / "new.partial" / "old" / "thesis.tex").exists()


# ---- checkpoints as other trainings write them


def prefixed(state, prefix):
    return {prefix + name: w for name, w in state.items()}


WRAPPED = {
    "model": lambda s: {"epoch": 3, "model": s, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}},
    "state_dict": lambda s: {"state_dict": s, "args": {"lr": 1.0}},
    "two levels": lambda s: {"checkpoint": {"module": s}},
    "beside its average": lambda s: {"model": s, "ema": {name: w + 1 for name, w in s.items()}},
    "numbers beside": lambda s: s | {"step": 7, "best": None},
    "DataParallel": lambda s: prefixed(s, "module."),
    "torch.compile": lambda s: prefixed(s, "_orig_mod."),
    "both": lambda s: {"model": prefixed(s, "_orig_mod.module.")},
    "a Lightning module": lambda s: {"state_dict": prefixed(s, "model.")},
    "blocks compiled": lambda s: {name.replace("layers.0.", "layers.0._orig_mod."): w for name, w in s.items()},
    "head beside the base": lambda s: {name.removeprefix("model."): w for name, w in s.items()},
    "gradients asked for": lambda s: {name: torch.nn.Parameter(w) for name, w in s.items()},
}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("file", ["pytorch_model.bin", "mine.pt", "mine.pth"])
@pytest.mark.parametrize("case", WRAPPED)
def test_a_bin_file_is_read_whatever_is_around_its_weights(case, file, legacy, tiny, windows):
    expected = Checkpoint(tiny).model()(windows)
    state = load_file(tiny / "model.safetensors")
    (tiny / "model.safetensors").unlink()
    torch.save(WRAPPED[case](state), tiny / file, _use_new_zipfile_serialization=not legacy)
    ckpt = Checkpoint(tiny / file)
    assert torch.equal(ckpt.model()(windows), expected) and ckpt.fingerprint()
    assert sorted(ckpt.names) == sorted(state)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model."])
def test_prefixes_in_safetensors_and_over_shards(prefix, tiny, windows):
    expected = Checkpoint(tiny).model()(windows)
    state = prefixed(load_file(tiny / "model.safetensors"), prefix)
    save_file(state, tiny / "model.safetensors")
    assert torch.equal(Checkpoint(tiny).model()(windows), expected)
    (tiny / "model.safetensors").unlink()
    where = {}
    for i, names in enumerate((sorted(state)[::2], sorted(state)[1::2])):
        save_file({name: state[name] for name in names}, tiny / f"{i}.safetensors")
        where |= dict.fromkeys(names, f"{i}.safetensors")
    (tiny / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    assert torch.equal(Checkpoint(tiny).model()(windows), expected)


def test_of_a_tensor_in_two_shards_the_index_says_which_counts(tiny, windows):
    expected = Checkpoint(tiny).model()(windows)
    state = load_file(tiny / "model.safetensors")
    (tiny / "model.safetensors").unlink()
    save_file(state, tiny / "1.safetensors")
    save_file({"model.norm.weight": torch.zeros(32), "lm_head.weight": state["lm_head.weight"].clone()},
              tiny / "2.safetensors")
    where = dict.fromkeys(state, "1.safetensors") | {"lm_head.weight": "2.safetensors"}
    (tiny / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    assert torch.equal(Checkpoint(tiny).model()(windows), expected)


def test_one_storage_under_two_names_is_written_twice(tmp_path, windows):
    """As torch.save keeps a head that is the embedding, in a model whose config.json does not tie them."""
    folder = write_checkpoint(tmp_path / "m", tie_word_embeddings=False)
    state = load_file(folder / "model.safetensors")
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    np.save(tmp_path / "w.npy", windows.numpy())
    done = script("air", "--ckpt", folder, "--calib", tmp_path / "w.npy", "--text", "none", "--out", tmp_path / "out",
                  "--rate", 0.5)
    assert done.returncode == 0, done.stderr
    small = Checkpoint(tmp_path / "out")
    assert torch.equal(small.tensor("lm_head.weight"), small.tensor("model.embed_tokens.weight"))


def test_factors_have_the_dtype_of_the_blocks(tmp_path, windows):
    """Not of the embedding, which some hold in another."""
    folder = write_checkpoint(tmp_path / "m", tie_word_embeddings=False)
    state = load_file(folder / "model.safetensors")
    state["model.embed_tokens.weight"] = state["model.embed_tokens.weight"].bfloat16()
    save_file(state, folder / "model.safetensors")
    np.save(tmp_path / "w.npy", windows.numpy())
    done = script("air", "--ckpt", folder, "--calib", tmp_path / "w.npy", "--text", "none", "--out", tmp_path / "out",
                  "--rate", 0.5)
    assert done.returncode == 0, done.stderr
    small = Checkpoint(tmp_path / "out")
    dtypes = {name: stored.dtype for name, stored in small.tensors.items()}
    assert dtypes.pop("model.embed_tokens.weight") == torch.bfloat16 and set(dtypes.values()) == {torch.float32}
    cut = {layer: (*Checkpoint(folder).tensors[layer + ".weight"].shape, k) for layer, k in small.cfg.ranks.items()}
    wanted = sum(torch.Size(each.shape).numel() * each.dtype.itemsize for each in small.tensors.values())
    assert checkpoint.result_bytes(Checkpoint(folder), cut) == wanted + 2**22


def test_a_tied_model_may_be_stored_under_its_heads_name(tmp_path, windows):
    """As safetensors' own save_model keeps it."""
    folder = write_checkpoint(tmp_path / "m", tie_word_embeddings=True)
    expected = Checkpoint(folder).model()(windows)
    state = load_file(folder / "model.safetensors")
    state["lm_head.weight"] = state.pop("model.embed_tokens.weight")
    save_file(state, folder / "model.safetensors")
    assert torch.equal(Checkpoint(folder).model()(windows), expected)


def test_a_head_of_another_type_and_a_model_beyond_any_size_are_one_sentence(tmp_path):
    folder = write_checkpoint(tmp_path / "m", tie_word_embeddings=True)
    state = load_file(folder / "model.safetensors")
    state["lm_head.weight"] = state["model.embed_tokens.weight"].to(torch.float8_e4m3fn)
    save_file(state, folder / "model.safetensors")
    with pytest.raises(InputError, match="lm_head.weight is stored as"):
        Checkpoint(folder)
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"hidden_size": 2147483640}))
    with pytest.raises(InputError, match="cannot be built"):
        Checkpoint(folder)


def test_a_base_model_is_read_where_its_head_is_the_embedding_and_else_refused(tmp_path, windows):
    for tied in (True, False):
        folder = write_checkpoint(tmp_path / str(tied), tie_word_embeddings=tied)
        expected = Checkpoint(folder).model()(windows)
        state = load_file(folder / "model.safetensors")
        state = {name.removeprefix("model."): w for name, w in state.items() if not name.startswith("lm_head")}
        save_file(state, folder / "model.safetensors")
        if tied:
            assert torch.equal(Checkpoint(folder).model()(windows), expected)
        else:
            with pytest.raises(InputError, match="lacks 1 tensor, such as lm_head.weight"):
                Checkpoint(folder)


@pytest.mark.parametrize("saved, words", [
    ({"epoch": 1, "optimizer": {}}, ("0 sets of weights", "epoch, optimizer")),
    ([torch.ones(2)], ("0 sets of weights", "list")),
    ({"a": {"x.weight": torch.ones(2)}, "b": {"x.weight": torch.ones(2)}}, ("2 sets of weights", "a, b")),
    ({"tok_embeddings.weight": torch.ones(2)}, ("lacks", "found are tok_embeddings.weight")),
])
def test_what_is_not_understood_is_refused_with_what_was_found(saved, words, tiny):
    (tiny / "model.safetensors").unlink()
    torch.save(saved, tiny / "pytorch_model.bin")
    with pytest.raises(InputError) as error:
        Checkpoint(tiny)
    assert all(word in str(error.value) for word in words)


# ---- names


def test_python_objects_beside_the_weights_are_named(tiny):
    import argparse
    state = load_file(tiny / "model.safetensors")
    (tiny / "model.safetensors").unlink()
    torch.save({"args": argparse.Namespace(a=1), "model": state}, tiny / "pytorch_model.bin")
    with pytest.raises(InputError, match="Python objects besides tensors, such as argparse.Namespace") as refusal:
        Checkpoint(tiny)
    assert "\x1b" not in str(refusal.value) and "copy it again" not in str(refusal.value)


def test_a_result_is_named_by_its_repository(tiny, tmp_path, monkeypatch):
    hub = tmp_path / "models--org--name-7b" / "snapshots" / ("ab" * 20)
    (hub.parents[1] / "blobs").mkdir(parents=True)
    hub.mkdir(parents=True)
    for i, name in enumerate(("config.json", "model.safetensors")):
        blob = hub.parents[1] / "blobs" / f"{i:064x}"
        blob.write_bytes((tiny / name).read_bytes())
        blob.chmod(0o444)
        (hub / name).symlink_to(blob)
    (tmp_path / "link").symlink_to(hub)
    (tmp_path / "link-to-tiny").symlink_to(tiny)
    for path, name in ((hub, "name-7b"), (hub / "model.safetensors", "name-7b"), (f"{hub}/", "name-7b"),
                       (tmp_path / "link", "name-7b"), (tiny, "tiny"), (tiny / "model.safetensors", "tiny"),
                       (tmp_path / "link-to-tiny", "tiny"), (f"{tiny}/../tiny/.", "tiny")):
        assert Checkpoint(path).name == name, path
    monkeypatch.chdir(tiny)
    assert Checkpoint(".").name == "tiny" and Checkpoint("model.safetensors").name == "tiny"
    (tiny / "model.safetensors").rename(tiny / "llama7b.safetensors")
    assert Checkpoint("llama7b.safetensors").name == "llama7b"
    (tiny / "sub").mkdir()
    monkeypatch.chdir(tiny / "sub")
    (tiny / "llama7b.safetensors").rename(tiny / "model.safetensors")
    assert Checkpoint("..").name == "tiny"


# ---- the environment of several processes


RANKED = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
ENVIRONMENTS = {
    "no RANK": ({"RANK": None}, "RANK is not set, and WORLD_SIZE is 2"),
    "no MASTER_ADDR": ({"MASTER_ADDR": None}, "MASTER_ADDR is not set"),
    "no MASTER_PORT": ({"MASTER_PORT": None}, "MASTER_PORT is not set"),
    "WORLD_SIZE a word": ({"WORLD_SIZE": "two"}, "WORLD_SIZE is two"),
    "WORLD_SIZE zero": ({"WORLD_SIZE": "0"}, "WORLD_SIZE is 0"),
    "RANK a word": ({"RANK": "first"}, "RANK is first"),
    "RANK too high": ({"RANK": "2"}, "expected a whole number, 0 to 1"),
    "RANK negative": ({"RANK": "-1"}, "RANK is -1"),
    "MASTER_PORT too high": ({"MASTER_PORT": "70000"}, "MASTER_PORT is 70000"),
}


@pytest.mark.parametrize("case", ENVIRONMENTS)
def test_an_environment_that_is_amiss(case, job, tmp_path):
    changes, expected = ENVIRONMENTS[case]
    env = {key: value for key, value in (RANKED | changes).items() if value is not None}
    done = script("air", *job, "--out", tmp_path / "o", env=env)
    assert done.returncode == 2 and expected in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not list(tmp_path.glob("o*"))


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_processes_that_cannot_be_joined_say_why(job, tmp_path):
    """The port is another's; the interface of gloo does not exist."""
    with socket.socket() as s:
        s.bind(("", 0))
        s.listen()
        taken = script("air", *job, "--out", tmp_path / "o", env=RANKED | {"MASTER_PORT": str(s.getsockname()[1])})
    assert taken.returncode == 2 and taken.stderr.splitlines()[-1].startswith("air.py: the 2 processes could not be")
    assert "address already in use" in taken.stderr and "Traceback" not in taken.stderr
    env = os.environ | RANKED | {"GLOO_SOCKET_IFNAME": "nowhere0", "MASTER_PORT": str(free_port())}
    both = [subprocess.Popen([sys.executable, str(ROOT / "air.py"), *map(str, job), "--out", str(tmp_path / "o")],
                             env=env | {"RANK": rank}, text=True, stderr=subprocess.PIPE) for rank in "01"]
    for process in both:
        _, err = process.communicate(timeout=100)
        assert process.returncode == 2 and "nowhere0" in err and "Traceback" not in err, err


def test_a_partner_that_never_comes(monkeypatch):
    for name, value in RANKED.items():
        monkeypatch.setenv(name, value)

    def late(*_):
        raise torch.distributed.DistNetworkError("The client socket has timed out after 300000ms")
    monkeypatch.setattr(large.dist, "init_process_group", late)
    with pytest.raises(InputError, match="could not be joined at 127.0.0.1, port 29500 .*timed out"):
        large.start_processes(torch.device("cpu"))
    assert failure(torch.distributed.DistNetworkError("failed to recv, got 0 bytes"))[0] == 1


@pytest.mark.parametrize("left", [
    {"WORLD_SIZE": "1", "RANK": "3", "MASTER_PORT": "x"}, {"RANK": "1"}, {"WORLD_SIZE": ""}])
def test_what_a_finished_torchrun_left_behind_does_not_matter(left, job, tmp_path, monkeypatch, capsys):
    for name, value in left.items():
        monkeypatch.setenv(name, value)
    air_main(monkeypatch, *job, "--out", tmp_path / "o")
    assert "model.layers.0" in capsys.readouterr().err
