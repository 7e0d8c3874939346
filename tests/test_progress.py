"""What a run says while it goes on: loops, the time they take, where the lines go, a pace far below the plan's."""
import io
import json
import math
import sys

import numpy as np
import pytest
import torch

import air
import calibrate
import eval_ppl
import influence
from conftest import ROOT, script
from support import large
from support import progress as P
from support.checkpoint import Checkpoint
from support.script import InputError


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Clock:
    """time.time() of a simulated machine."""

    def __init__(self, monkeypatch):
        self.now = 1e9
        monkeypatch.setattr(P.time, "time", lambda: self.now)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def sweep(clock, blocks, windows, seconds, between=0):
    """A sweep of `blocks` as the scripts have it: `seconds` a window, `between` spent by whoever reads it."""
    for l in P.told("forward sweep: block", range(blocks)):
        for _ in P.told("windows", range(0, windows, 4)):
            clock.now += 4 * seconds
        yield l
        clock.now += between


@pytest.mark.parametrize("between", [0, 100])
def test_the_time_left_is_that_of_the_loops_alone(clock, monkeypatch, between):
    """3 blocks of 20 windows at 10 s: 600 s, of which every line takes off what is done, whoever reads between."""
    err = io.StringIO()
    monkeypatch.setattr(sys, "stderr", err)
    P.Progress().listen()
    assert list(sweep(clock, 3, 20, 10, between)) == [0, 1, 2]
    lines = err.getvalue().splitlines()
    assert lines[0] == "forward sweep: block 1 of 3, windows 4 of 20, 560 s left"
    assert lines[7] == "forward sweep: block 2 of 3, windows 12 of 20, 280 s left"
    assert len(lines) == 15 and lines[-1] == "forward sweep: block 3 of 3, windows 20 of 20, 0 s left"


def test_a_log_gets_few_lines_and_a_terminal_one(clock, monkeypatch):
    """1,000 windows in 500 s: a line every half minute, or one that is rewritten and then taken away."""
    for stream, expected in ((io.StringIO(), 500 / P.IN_LOG), (Terminal(), math.inf)):
        monkeypatch.setattr(sys, "stderr", stream)
        progress = P.Progress().listen()
        list(sweep(clock, 10, 100, 0.5))
        said = stream.getvalue()
        shown = said.count("block")
        assert 10 < shown <= expected and said.count("\n") == (0 if stream.isatty() else shown)
        progress.say("done")
        if stream.isatty():
            assert said.count("\r\033[K") > 200 and stream.getvalue().endswith("\r\033[Kdone\n")


def test_quiet_says_nothing_and_functions_nothing_either(clock, monkeypatch, capsys):
    P.Progress(quiet=True).listen()
    assert P.Progress.running is None
    list(sweep(clock, 10, 100, 10))
    assert capsys.readouterr() == ("", "")


def test_steps_of_a_solve_know_what_the_sweep_still_takes(clock, monkeypatch):
    """5 blocks, 40 s of sweep and 7 layers of 10 s each: after the first layer 4·40 + 34·10 s are left."""
    err = io.StringIO()
    monkeypatch.setattr(sys, "stderr", err)
    progress = P.Progress().listen()
    progress.begin(35)
    for _ in sweep(clock, 5, 4, 10):
        for _ in range(7):
            clock.now += 10
            progress.step("a layer")
    left = [line.split()[-3:-1] for line in err.getvalue().splitlines() if line.startswith("a layer")]
    assert left[0] == ["500", "s"] and left[7] == ["390", "s"] and left[-1] == ["0", "s"]


@pytest.mark.parametrize("slow, expected", [(1, 0), (4, 0), (55, 1)])
def test_a_solve_far_below_the_plans_pace_is_said_once(clock, monkeypatch, slow, expected):
    """A layer of 0.2 s that takes 11 is two threads waiting for each other; four times is a small layer."""
    err = io.StringIO()
    monkeypatch.setattr(sys, "stderr", err)
    progress = P.Progress().listen()
    progress.begin(70, {"solve": 14.0})
    for _ in range(70):
        clock.now += 0.2 * slow
        progress.step("a layer")
    assert err.getvalue().count("OMP_NUM_THREADS") == expected


def test_a_sweep_far_below_the_plans_pace_is_said_within_it_and_an_evaluation_is_not_held_to_it(clock, monkeypatch):
    for slow, expected in ((3, 0), (50, 1)):
        err = io.StringIO()
        monkeypatch.setattr(sys, "stderr", err)
        progress = P.Progress().listen()
        progress.begin(1, {"forward sweep": 100.0, "solve": 1.0})
        blocks = sweep(clock, 10, 100, 0.1 * slow)
        next(blocks)
        assert err.getvalue().count("OMP_NUM_THREADS") == expected
        list(blocks)
        progress.step("the layer")
        list(sweep(clock, 10, 100, 100))
        assert err.getvalue().count("OMP_NUM_THREADS") == expected


def test_the_plan_knows_its_stages(tiny, tmp_path):
    from test_large import plan_of
    from conftest import TINY
    plan, _ = plan_of(TINY, tmp_path)
    assert plan.seconds.keys() == {"forward sweep", "backward sweep", "solve"}
    assert 0 < plan.seconds["forward sweep"] < plan.seconds["backward sweep"] and plan.pace == plan.seconds
    plan.device = torch.device("cuda")
    assert plan.pace == {}


# ---- the scripts


@pytest.fixture
def eager(monkeypatch):
    """Every step of a loop is a line."""
    monkeypatch.setattr(P, "IN_LOG", 0)


@pytest.mark.parametrize("module, stages", [
    (air, ("forward sweep: block 2 of 2, windows 6 of 6", "gradient of the head: windows 6 of 6",
           "backward sweep: block 2 of 2, windows 6 of 6", "head: windows 6 of 6")),
    (eval_ppl, ("forward sweep: block 2 of 2, windows 6 of 6", "head: windows 6 of 6")),
    (influence, ("forward sweep: block 2 of 2", "gradient of the head: windows 3 of 6",
                 "backward sweep: block 1 of 2")),
    (calibrate, ("forward sweep: block 2 of 2, windows 6 of 6",)),
])
def test_every_script_shows_its_loops_and_none_when_quiet(module, stages, tiny, tmp_path, windows, monkeypatch, capsys,
                                                          eager):
    np.save(tmp_path / "w.npy", windows.numpy())
    texts = {air: ("--calib", "--text"), eval_ppl: ("--text",)}.get(module, ("--calib",))
    arguments = ["--ckpt", str(tiny), "--device", "cpu"]
    for option in texts:
        arguments += [option, str(tmp_path / "w.npy")]
    for quiet in ([], ["--quiet"]):
        if module is air:
            arguments += ["--out", str(tmp_path / f"o{len(quiet)}")]
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *arguments, *quiet])
        module.main()
        found = capsys.readouterr()
        if quiet:
            assert found.err == "" and found.out
        else:
            assert all(stage in found.err for stage in stages), found.err


def test_an_interrupt_leaves_a_clean_line(monkeypatch):
    from support.script import run
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(P, "ON_TERMINAL", 0)

    def main():
        P.Progress().listen()
        for i in P.told("windows", range(9)):
            if i == 5:
                raise KeyboardInterrupt
    with pytest.raises(SystemExit):
        run(main)
    assert stream.getvalue().rpartition("\r\033[K")[2].endswith(": interrupted; nothing incomplete was left "
                                                                "where results go\n")


@pytest.mark.parametrize("spill", [False, True])
def test_layers_stop_the_way_back_at_the_lowest(spill, tiny, tmp_path, windows, monkeypatch):
    """--layers 1:2 needs no gradient below block 1: of the 2 blocks one is swept back, and said to be the only one."""
    totals, enter = [], P.Progress.enter
    monkeypatch.setattr(P.Progress, "enter", lambda self, loop: (totals.append((loop.name, loop.total)),
                                                                 enter(self, loop))[1])
    P.Progress().listen()
    collect = large.Kept(None, tmp_path / "p").statistics if spill else air.statistics
    found = [l for l, _ in collect(Checkpoint(tiny), windows, torch.device("cpu"), torch.float32, range(1, 2), "lrp")]
    assert found == [1] and ("backward sweep: block", 1) in totals


# ---- influence of nothing


def test_a_block_of_zeros_has_no_nan(tiny, tmp_path, windows, monkeypatch, capsys):
    from safetensors.torch import load_file, save_file
    state = load_file(tiny / "model.safetensors")
    for name in state:
        if ".layers.1." in name:
            state[name].zero_()
    save_file(state, tiny / "model.safetensors")
    np.save(tmp_path / "w.npy", windows.numpy())
    runs = [(calibrate.main, ())] + [(influence.main, ("--signal", chosen)) for chosen in influence.BACKWARD]
    for main, options in runs:
        arguments = ("", "--ckpt", tiny, "--calib", tmp_path / "w.npy", "--device", "cpu", "--quiet", *options)
        monkeypatch.setattr(sys, "argv", [*map(str, arguments)])
        main()
        said = capsys.readouterr().out
        assert "nan" not in said.lower() and (not options or "q_proj 0%" in said), said


# ---- --windows


def test_evenly_spaced_windows_by_hand(tiny, tmp_path):
    """10 windows of 8 tokens: 4 of them are numbers 0, 2, 5 and 7."""
    np.save(tmp_path / "stream.npy", np.arange(85) % 64)
    ckpt, text = Checkpoint(tiny), str(tmp_path / "stream.npy")
    every, tokens, _ = eval_ppl.evaluation_windows(text, ckpt, 8)
    some, _, _ = eval_ppl.evaluation_windows(text, ckpt, 8, 4)
    assert torch.equal(some, every[[0, 2, 5, 7]]) and tokens == 85
    assert torch.equal(eval_ppl.evaluation_windows(text, ckpt, 8, 10)[0], every)
    assert eval_ppl.windows_line(some, tokens) == "4 of 10 windows of 8, evenly spaced"
    assert eval_ppl.windows_line(every, tokens) == "10 windows of 8"
    for count in (0, -1, 11):
        with pytest.raises(InputError, match=f"--windows is {count}, and .* has 10 windows of 8; expected 1 to 10"):
            eval_ppl.evaluation_windows(text, ckpt, 8, count)


def test_windows_in_both_scripts(tiny, tmp_path, windows):
    np.save(tmp_path / "w.npy", windows.numpy())
    text = tmp_path / "w.npy"
    common = ("--ckpt", tiny, "--text", text, "--windows", 2, "--json", tmp_path / "r.json", "--device", "cpu")
    for name, options in (("eval_ppl", ()), ("air", ("--calib", text, "--out", tmp_path / "o"))):
        done = script(name, *common, *options, cwd=ROOT)
        assert done.returncode == 0 and "2 of 6 windows of 24, evenly spaced" in done.stdout, done.stderr
        found = json.loads((tmp_path / "r.json").read_text())
        assert (found["windows"], found["windows_in_text"]) == (2, 6)
        expected = eval_ppl.evaluate(Checkpoint(tiny), windows[[0, 3]], torch.device("cpu"), torch.float32)["ppl"]
        assert found["ppl_dense" if name == "air" else "ppl"] == pytest.approx(expected, rel=1e-6)
