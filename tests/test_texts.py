"""Texts as files hold them: byte order marks, half characters, line ends, names in capitals, narrow terminals."""
import codecs
import json
import os

import numpy as np
import pytest
import torch
from calibrate import calibration_windows
from conftest import ROOT, in_process, script, write_checkpoint
from eval_ppl import evaluation_windows
from support import texts as T
from support.checkpoint import Checkpoint
from support.script import InputError, Parser

TEXT = "import os\n\n\ndef read(path):\n    return open(path).read()  # naïve — “ok” 🙂\n" * 12


@pytest.fixture(scope="module")
def demo():
    return Checkpoint(ROOT / "demo")


def content(kind):
    if kind == "jsonl":
        return "".join(json.dumps({"text": line}) + "\n" for line in TEXT.split("\n"))
    return TEXT


@pytest.mark.parametrize("kind", ["txt", "raw", "jsonl"])
@pytest.mark.parametrize("change", ["mark", "crlf", "capitals"])
def test_ids_do_not_change(kind, change, demo, tmp_path):
    plain, other = tmp_path / f"plain.{kind}", tmp_path / f"other.{kind}"
    plain.write_bytes(content(kind).encode())
    changed = content(kind).replace("\n", "\r\n") if change == "crlf" else content(kind)
    if change == "capitals":
        other = other.with_suffix(f".{kind.upper()}")
    other.write_bytes((codecs.BOM_UTF8 if change == "mark" else b"") + changed.encode())
    one, two = (evaluation_windows(str(path), demo, 32) for path in (plain, other))
    assert torch.equal(one[0], two[0]) and one[1:] == two[1:]
    assert torch.equal(*(calibration_windows(str(path), demo, 3, 16) for path in (plain, other)))


def test_arrays_in_capitals(demo, tmp_path):
    ids = np.arange(200).reshape(4, 50)
    with open(tmp_path / "w.NPY", "wb") as f:
        np.save(f, ids)
    assert T.with_defaults(demo, str(tmp_path / "w.NPY"))[1:] == (4, 50)
    assert torch.equal(calibration_windows(str(tmp_path / "w.NPY"), demo), torch.from_numpy(ids))


@pytest.mark.parametrize("escape", ["\\ud83d", "\\udc00 x", "a\\ud800b"])
def test_half_a_character_is_named_by_its_line(escape, tmp_path):
    (tmp_path / "t.jsonl").write_text('{"text": "ok"}\n\n{"text": "' + escape + '"}\n')
    with pytest.raises(InputError, match="line 3 of .*half of a surrogate pair"):
        T.rows_of(str(tmp_path / "t.jsonl"), "test")
    (tmp_path / "t.jsonl").write_text('{"text": "\\ud83d\\ude42"}')                  # both halves are a character
    assert T.rows_of(str(tmp_path / "t.jsonl"), "test") == ["🙂"]


@pytest.mark.parametrize("kind", ["txt", "raw", "jsonl"])
def test_what_is_not_utf8_is_named_by_its_line(kind, tmp_path):
    (tmp_path / f"t.{kind}").write_bytes(b"one\ntwo\n\xff\xfe\n")
    with pytest.raises(InputError, match="line 3 of .* is not UTF-8"):
        T.rows_of(str(tmp_path / f"t.{kind}"), "test")


def test_prompts_end_at_newlines_only(tmp_path):
    odd = ["a\x0bb\x0cc", "d\x1ce\x85f", "g\u2028h\u2029i", "j\rk", "  indented"]
    (tmp_path / "p.txt").write_bytes(codecs.BOM_UTF8 + ("\n".join(odd) + "\r\n \n\n").encode())
    assert T.read_prompts(tmp_path / "p.txt") == odd


def finish(name, *arguments, **env):
    return script(name, *arguments, env=env)


def test_a_narrow_terminal_gets_escapes(tmp_path):
    narrow = {"PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONUTF8": "0"}
    for name in ("air", "calibrate"):
        done = finish(name, "--help", **narrow)
        assert done.returncode == 0 and done.stderr == ""
    done = finish("generate", "--prompt", "naïve “x” 🙂", "--max-new-tokens", 2, **narrow)
    assert done.returncode == 0 and "\\xefve" in done.stdout
    done = finish("eval_ppl", "--ckpt", tmp_path / "наїв", **narrow)
    assert done.returncode == 2 and "Traceback" not in done.stderr


def test_a_prompt_of_bytes_that_are_no_text_is_refused():
    done = finish("generate", "--prompt", os.fsdecode(b"a\xffb"), PYTHONUTF8="1")
    assert done.returncode == 2 and "not UTF-8" in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("name, words", [
    ("air", ["--text", ""]), ("air", ["--out", ""]), ("air", ["--calib="]), ("eval_ppl", ["--text", ""]),
    ("influence", ["--ckpt", ""]), ("enhance/refine", ["--ckpt", "r", "--out", "o", "--json", ""]),
    ("peers/slicegpt", ["--out", ""]), ("experiments/table2", ["--calib", ""]),
    ("support/export", ["r", "--dense", ""])])
def test_an_empty_option_is_not_an_absent_one(name, words):
    """As an unset variable of the shell leaves it."""
    done = in_process(name, *words)
    option = [word for word in words if word.startswith("--")][-1].rstrip("=")
    assert done.returncode == 2 and f"{option} is empty; expected a value, or leave it out" in done.stderr


@pytest.mark.parametrize("name, words, said", [
    ("air", ["--rate", "half"], "argument --rate: invalid float value: 'half'"),
    ("air", ["--rat"], "argument --rate: expected one argument"),
    ("enhance/refine", ["--ckpt", "r"], "the following arguments are required: --out"),
    ("enhance/quantize", ["--ckpt", "r", "--out", "o", "--bits", "5"], "argument --bits: invalid choice: 5"),
    ("eval_ppl", ["--txt", "x"], "unrecognized arguments: --txt x"),
    ("experiments/table5", ["--rates", "x"], "argument --rates: invalid float value: 'x'")])
def test_arguments_that_are_not_understood_are_one_sentence(name, words, said):
    done = in_process(name, *words)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert said in done.stderr and done.stderr.endswith("; --help says what is expected\n")


def test_an_empty_default_may_be_given():
    p = Parser("")
    p.add_argument("--sides", default="")
    assert p.parse_args([]).sides == p.parse_args(["--sides", ""]).sides == ""


def test_a_configuration_with_a_mark_is_read(tmp_path):
    folder = write_checkpoint(tmp_path / "c")
    config = (folder / "config.json").read_bytes()
    (folder / "config.json").write_bytes(codecs.BOM_UTF8 + config)
    assert Checkpoint(folder).raw == json.loads(config)


def test_what_is_no_array_of_tokens_is_one_sentence(tmp_path):
    """An archive of arrays, torn headers, an array larger than any memory."""
    np.savez(tmp_path / "a.npz", x=np.zeros(3, dtype=np.int64))
    np.save(tmp_path / "good.npy", np.zeros(300, dtype=np.int64))
    good = (tmp_path / "good.npy").read_bytes()
    header = good[10:128]
    cases = {
        "archive": (tmp_path / "a.npz").read_bytes(),
        "zip": b"PK\x03\x04 and garbage",
        "torn": good[:10] + header.replace(b"}", b"("),
        "huge": good[:10] + header.replace(b"(300,)", b"(%d,)" % 10**20)[:118] + good[128:],
        "short": good[:200],
        "empty": b"",
    }
    ckpt = Checkpoint(ROOT / "demo")
    for name, content in cases.items():
        (tmp_path / f"{name}.npy").write_bytes(content)
        with pytest.raises(InputError, match=f"{name}.npy cannot be read as a .npy array"):
            T.token_array(str(tmp_path / f"{name}.npy"), ckpt)
