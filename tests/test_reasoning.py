"""Reasoning tasks against the field's harness: its texts, log-probabilities and accuracies.

tests/golden/reasoning is of lm_eval 0.4.13 (tests/harness.py): our own rows in both published
forms with their texts; 50 rows of each public file as digests of theirs.
"""
import bz2
import hashlib
import json
import math
import shutil
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import in_process, script, write_checkpoint

from experiments import choices as C
from experiments import reasoning as R
from experiments import task_files as F
from experiments import tasks as T
from experiments.common import Cells
from support import texts
from support.checkpoint import Checkpoint
from support.script import ROOT, InputError
from support.tokenizer import Tokenizer

GOLDEN = ROOT / "tests" / "golden" / "reasoning"
SHARED = ROOT.parent / "shared" / "data" / "eval"
SMOLLM2 = ROOT / "data" / "smollm2"


def golden(name):
    return json.loads((GOLDEN / f"{name}.json").read_text("utf-8"))["tasks"]


@pytest.fixture(scope="module")
def demo():
    ckpt = Checkpoint(ROOT / "demo")
    return SimpleNamespace(ckpt=ckpt, tokenizer=Tokenizer(ckpt),
                           model=ckpt.model(dtype=torch.float32))


def scored(lab, row):
    """The scores of a row's choices, by the shared prefill."""
    groups, places = C.groups_of(row, lab.tokenizer, lab.ckpt.cfg.context)
    found = C.scores(lab.model, groups)
    return [found[group][place] for group, place in places]


def check_against(lab, rows, wanted, digested):
    for row, theirs in zip(rows, wanted, strict=True):
        found = scored(lab, row)
        for request, score, their in zip(row.requests, found, theirs["requests"], strict=True):
            if digested:
                assert hashlib.sha256("\0".join(request).encode()).hexdigest()[:16] == their[0]
            else:
                assert list(request) == their[:2]
            assert score == pytest.approx(their[-1], abs=1e-3)
        acc, norm = R.right(row, found)
        assert acc == theirs["acc"]
        assert norm == theirs["acc_norm"]


# ------------------------------------------------------------ the harness
@pytest.mark.parametrize("form", ["flat", "nested"])
@pytest.mark.parametrize("task", T.TASKS)
def test_our_own_rows_are_asked_and_scored_as_in_the_harness(demo, form, task):
    rows, split = F.rows_of_task(task, GOLDEN / form)
    assert split == ("test" if task == "mathqa" or (form, task) in (
        ("nested", "openbookqa"), ("nested", "arc_easy")) else "validation")
    check_against(demo, rows, golden(form)[task], digested=False)


@pytest.mark.skipif(not SHARED.exists(), reason="needs the public files in ../shared")
@pytest.mark.parametrize("task", T.TASKS)
def test_public_rows_are_asked_and_scored_as_in_the_harness(demo, task):
    rows, _ = F.rows_of_task(task, SHARED)
    check_against(demo, rows[:50], golden("shared-demo")[task], digested=True)


@pytest.mark.skipif(not (SHARED.exists() and SMOLLM2.exists()),
                    reason="needs the public files in ../shared, and make smollm2")
@pytest.mark.parametrize("task", T.TASKS)
def test_a_real_model_is_scored_as_in_the_harness(task):
    pytest.importorskip("tokenizers")
    ckpt = Checkpoint(SMOLLM2)
    lab = SimpleNamespace(ckpt=ckpt, tokenizer=Tokenizer(ckpt), model=ckpt.model())
    rows, _ = F.rows_of_task(task, SHARED)
    check_against(lab, rows[:50], golden("shared-smollm2")[task], digested=True)


# ------------------------------------------------------------ scores
def alone(model, context, continuation):
    """Log-probability by a forward of its own."""
    ids = torch.tensor([context + continuation])
    logits = model(ids)[0, :-1].double().log_softmax(-1)
    tail = logits[len(context) - 1:]
    return tail.gather(1, ids[0, len(context):, None]).sum().item()


@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 2}, {"ranks": True}])
def test_a_shared_prefill_scores_what_each_choice_scores_alone(tmp_path, changes):
    changes = dict(changes)
    changes.pop("ranks", None)
    model = Checkpoint(write_checkpoint(tmp_path / "m", **changes)).model()
    generator = torch.Generator().manual_seed(0)
    vocab = model.cfg.vocab

    def some(n):
        return tuple(torch.randint(vocab, (n,), generator=generator).tolist())
    # Of every size, continuations of one token included, in one padded batch.
    groups = [C.Group(some(n), tuple(some(m) for m in lengths))
              for n, lengths in ((1, (1,)), (5, (3, 1, 7)), (12, (2, 2)), (3, (1, 1, 1, 1, 1)))]
    with torch.no_grad():
        for group, found in zip(groups, C.scores(model, groups)):
            for continuation, score in zip(group.continuations, found):
                assert score == pytest.approx(alone(model, group.context, continuation),
                                              abs=1e-4)


def test_a_choice_longer_than_the_context_loses_its_beginning_for_itself(demo):
    row = T.Row("", [("x = 1\n" * 30, " a"), ("x = 1\n" * 30, " a" * 30)], 0, [1, 60])
    whole, _ = C.groups_of(row, demo.tokenizer, 10_000)
    assert len(whole) == 1
    limit = 40
    cut, places = C.groups_of(row, demo.tokenizer, limit)
    for group, _ in places:
        context, (continuation,) = cut[group]
        # What a model sees is at most `limit` tokens: all but the last are read.
        assert len(context) + len(continuation) - 1 == limit
        assert context == whole[0].context[-len(context):]


def test_batches_hold_every_group_once_and_keep_to_their_size():
    groups = [C.Group(tuple(range(n)), ((1, 2),)) for n in (5, 900, 3, 3000, 5000, 17)]
    batches = C.batches_of(groups)
    assert sorted(map(id, sum(batches, []))) == sorted(map(id, groups))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(g.size for g in batch) <= C.BATCH


# ------------------------------------------------------------ accuracy
def test_accuracy_errors_and_differences_by_hand():
    assert R.mean_error([1, 0, 0, 1]) == pytest.approx((50, 100 * math.sqrt(1 / 3 / 4)))
    tasks = {"a": [1, 0, 0, 1], "b": [1, 1]}
    mean, error = R.total_error(tasks)
    assert mean == 75 and error == pytest.approx(100 * math.sqrt(1 / 12) / 2)
    # Paired: rows on which both are right or wrong say nothing.
    assert R.differences(tasks, tasks) == (0, 0)
    gap, error = R.differences({"a": [1, 1, 0, 1]}, {"a": [1, 0, 0, 1]})
    assert (gap, error) == pytest.approx((25, 25))


def test_the_first_of_equal_choices_counts_and_characters_divide():
    row = T.Row("", [("c", " aaaa"), ("c", " b")], 1, [4, 1])
    assert R.right(row, [-2.0, -2.0]) == (0, 0)
    assert R.right(row, [-4.0, -0.5]) == (1, 1)
    assert R.right(row, [-1.9, -2.0]) == (0, 0)
    assert R.right(T.Row("", row.requests, 0, None), [-1.0, -2.0]) == (1, None)


# ------------------------------------------------------------ files
def copied(tmp_path, form="flat"):
    folder = tmp_path / "data"
    shutil.copytree(GOLDEN / form, folder)
    return folder


WRONG = [
    ("openbookqa_validation.jsonl", '{"question_stem": "a"}', "line 4"),
    ("openbookqa_validation.jsonl", "nonsense", "line 4"),
    ("arc_easy_validation.jsonl", '{"question": "q", "choices": {"text": ["a", "b"], "label": '
     '["A", "B"]}, "answerKey": "E"}', "line 4"),
    ("winogrande_xl_validation.jsonl", '{"sentence": "no blank", "option1": "a", "option2": '
     '"b", "answer": "1"}', "line 4"),
    ("winogrande_xl_validation.jsonl", '{"sentence": "a _ b", "option1": "a", "option2": "b", '
     '"answer": ""}', "line 4"),
    ("piqa_valid.jsonl", '{"goal": "g", "sol1": "a", "sol2": "b"}', "4 rows and 3 labels"),
    ("hellaswag_val.txt", "one: more", "line 19"),
    ("openbookqa_validation.jsonl", "[1, 2]", "line 4"),
    ("openbookqa_validation.jsonl", '{"question_stem": "\\ud800", "choices": {"text": ["a", '
     '"b"], "label": ["A", "B"]}, "answerKey": "A"}', "surrogate"),
]


@pytest.mark.parametrize("name, line, said", WRONG)
def test_a_malformed_row_is_named_by_its_line(tmp_path, name, line, said):
    folder = copied(tmp_path)
    with open(folder / name, "a") as f:
        f.write(line + "\n")
    task = next(task for task in T.TASKS if name.startswith(task))
    with pytest.raises(InputError, match=said):
        F.rows_of_task(task, folder)


def test_a_row_of_piqa_that_is_no_object_is_named_beside_its_label(tmp_path):
    folder = copied(tmp_path)
    for name, line in (("piqa_valid.jsonl", "[1]"), ("piqa_valid-labels.lst", "0")):
        with open(folder / name, "a") as f:
            f.write(line + "\n")
    with pytest.raises(InputError, match="line 4"):
        F.rows_of_task("piqa", folder)


@pytest.mark.parametrize("answer", ["", "CD", "F", "abcde"])
def test_an_answer_of_mathqa_is_one_of_its_five_letters(tmp_path, answer):
    folder = copied(tmp_path)
    path = folder / "mathqa.test.json"
    rows = json.loads(path.read_text())
    path.write_text(json.dumps([*rows, rows[0] | {"answer": answer}]))
    with pytest.raises(InputError, match="is no row of mathqa"):
        F.rows_of_task("mathqa", folder)


def test_a_file_that_is_no_json_missing_or_double_is_said(tmp_path):
    folder = copied(tmp_path)
    (folder / "mathqa.test.json").write_text("{")
    with pytest.raises(InputError, match="not readable as JSON"):
        F.rows_of_task("mathqa", folder)
    (folder / "mathqa.test.json").write_text('[{"Problem": 1}]')
    with pytest.raises(InputError, match="row 1"):
        F.rows_of_task("mathqa", folder)
    (folder / "winogrande_xl_validation.jsonl").unlink()
    with pytest.raises(InputError, match="no file of winogrande"):
        F.rows_of_task("winogrande", folder)
    shutil.copy(folder / "piqa_valid.jsonl", folder / "piqa_val.jsonl")
    with pytest.raises(InputError, match="several files of piqa"):
        F.rows_of_task("piqa", folder)


def test_the_harnesss_split_is_taken_where_both_lie_there(tmp_path):
    folder = copied(tmp_path)
    (folder / "openbookqa_test.jsonl").write_text(
        (GOLDEN / "nested" / "openbookqa_test.jsonl").read_text())
    assert F.rows_of_task("openbookqa", folder)[1] == "test"


def test_a_packed_text_reads_as_the_text(tmp_path):
    folder = copied(tmp_path)
    text = folder / "hellaswag_val.txt"
    rows, _ = F.rows_of_task("hellaswag", folder)
    (folder / "hellaswag_val.txt.bz2").write_bytes(bz2.compress(text.read_bytes()))
    text.unlink()
    packed, _ = F.rows_of_task("hellaswag", folder)
    assert [row[1:] for row in packed] == [row[1:] for row in rows]
    (folder / "hellaswag_val.txt.bz2").write_bytes(b"BZh9 torn")
    with pytest.raises(InputError, match="cannot be unpacked"):
        F.rows_of_task("hellaswag", folder)


@pytest.mark.parametrize("task", T.TASKS)
def test_fetched_archives_are_read_as_the_same_rows(tmp_path, monkeypatch, task):
    """The publishers' archives, made here of our own rows."""
    monkeypatch.setattr(texts, "DATA", tmp_path)
    wanted, _ = F.rows_of_task(task, GOLDEN / "nested")
    url, _ = T.TASKS[task].download
    path = tmp_path / url.rpartition("/")[2]
    sources = sorted(each for each in (GOLDEN / "nested").iterdir()
                     if each.name.startswith(task))
    if T.TASKS[task].members:
        inside = {"openbookqa": ["OBQA/Data/Main/test.jsonl"],
                  "arc_easy": ["ARC-V1/ARC-Easy/ARC-Easy-Test.jsonl"],
                  "winogrande": ["winogrande_1.1/dev.jsonl"],
                  "piqa": ["p/dev-labels.lst", "p/dev.jsonl"], "mathqa": ["test.json"]}[task]
        with zipfile.ZipFile(path, "w") as z:
            for name, source in zip(inside, sources):
                z.write(source, name)
    else:
        shutil.copy(sources[0], path)
    known = T.TASKS[task]._replace(download=(url, texts.sha256(path)))
    monkeypatch.setitem(T.TASKS, task, known)
    rows, split = F.rows_of_task(task)
    assert [row[1:] for row in rows] == [row[1:] for row in wanted]
    assert split == known.split
    path.write_bytes(b"another file")
    with pytest.raises(InputError, match="SHA-256"):
        F.rows_of_task(task)


# ------------------------------------------------------------ the command
def test_the_command_goes_on_and_compares(tmp_path):
    arguments = ["--ckpt", str(ROOT / "demo"), str(ROOT / "demo"), "--data",
                 str(GOLDEN / "flat"), "--work", str(tmp_path), "--json",
                 str(tmp_path / "r.json")]
    done = script("experiments/reasoning", *arguments)
    assert done.returncode == 0, done.stderr
    assert "+0.0 ± 0.0" in done.stdout and "where the harness takes test" in done.stdout
    result = json.loads((tmp_path / "r.json").read_text())
    wanted = golden("flat")
    for task, found in result["rows"][1]["tasks"].items():
        assert [int(each) for each in found["acc"]] == [row["acc"] for row in wanted[task]]
    # A kept score is not computed again, that of a torn line is.
    kept, = tmp_path.glob("*.jsonl")
    lines = kept.read_text().splitlines()
    key, value = json.loads(lines[0])
    kept.write_text("\n".join([json.dumps([key, [0.0] * len(value)]), *lines[1:]]) + "\n")
    done = in_process("experiments/reasoning", *arguments)
    assert done.returncode == 0, done.stderr
    assert Cells(kept)[key] == [0.0] * len(value)
    kept.write_text("\n".join([*lines[:-1], lines[-1][:9]]))
    done = in_process("experiments/reasoning", *arguments)
    assert done.returncode == 0, done.stderr
    last, value = json.loads(lines[-1])
    assert Cells(kept)[last] == pytest.approx(value, abs=1e-4)


def test_one_row_of_a_task_without_acc_norm_is_told_quietly(tmp_path):
    """Of one row no error is known, and nothing is said to be within it."""
    done = in_process("experiments/reasoning", "--ckpt", str(ROOT / "demo"), str(ROOT / "demo"), "--data",
                      str(GOLDEN / "flat"), "--work", str(tmp_path), "--json", str(tmp_path / "r.json"), "--tasks",
                      "winogrande", "--limit", "1", "--quiet")
    assert done.returncode == 0 and done.stderr == ""
    assert "+0.0 |" in done.stdout and "±" not in done.stdout and "acc_norm" not in done.stdout
    # Results replace results alone, no task.
    shutil.copytree(GOLDEN / "flat", tmp_path / "tasks")
    task = next((tmp_path / "tasks").iterdir())
    before = task.read_bytes()
    done = in_process("experiments/reasoning", "--ckpt", str(ROOT / "demo"), "--data", str(tmp_path / "tasks"),
                      "--work", str(tmp_path), "--json", str(task))
    assert done.returncode == 2 and "holds no results" in done.stderr and task.read_bytes() == before
    kept, = tmp_path.glob("*.jsonl")
    assert torch.__version__ in kept.name and "float32-cpu" in kept.name


def test_scores_that_are_not_numbers_are_not_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(R, "scores", lambda model, batch: [[math.nan, 0.0] for _ in batch])
    done = in_process("experiments/reasoning", "--ckpt", str(ROOT / "demo"), "--data", str(GOLDEN / "flat"), "--work",
                      str(tmp_path), "--json", str(tmp_path / "r.json"), "--tasks", "winogrande")
    assert done.returncode == 1 and "is not finite" in done.stderr
    assert not list(tmp_path.glob("*.jsonl")) and not (tmp_path / "r.json").exists()


@pytest.mark.parametrize("arguments, said", [
    (["--limit", "0"], "--limit is 0"),
    (["--data", "nowhere"], "no folder"),
    (["--ckpt", "nowhere"], "nowhere"),
])
def test_bad_arguments_are_one_sentence(tmp_path, arguments, said):
    given = ["--data", str(GOLDEN / "flat"), "--work", str(tmp_path), *arguments]
    done = in_process("experiments/reasoning", *given)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_the_papers_rows_are_its_means():
    for line in R.PAPER.values():
        each, mean = line.split(": ")
        values = [float(value) for value in each.split(", ")]
        assert sum(values) / 6 == pytest.approx(float(mean), abs=0.06 if "." in mean else 0.5)


def test_no_question_of_a_public_file_is_in_the_repository():
    assert not any(isinstance(request[0], str) and " " in request[0]
                   for name in ("shared-demo", "shared-smollm2") for rows in golden(name).values()
                   for row in rows for request in row["requests"])
    assert Path(GOLDEN / "shared-demo.json").stat().st_size < 2**17
