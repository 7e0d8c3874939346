"""Six multiple-choice tasks: the published files' rows, and what is asked of each.

A row asks for the log-probability of a continuation after a context, once a choice. Texts
are those of the field's harness (lm_eval 0.4): tests/harness.py made the golden ones.

Sources: OpenBookQA (Mihaylov et al., 2018), ARC (Clark et al., 2018), WinoGrande (Sakaguchi
et al., 2019), HellaSwag (Zellers et al., 2019), PIQA (Bisk et al., 2020), MathQA (Amini et
al., 2019).
"""
import re
from typing import NamedTuple

from support.script import InputError
from support.texts import check_text

AI2 = "https://s3-us-west-2.amazonaws.com/ai2-website/data/"
MOSAIC = "https://storage.googleapis.com/ai2-mosaic/public/"


class Row(NamedTuple):
    """A question: its requests, in the order of the choices."""

    where: str                  # "line 7 of …"
    requests: list              # [(context, continuation)], one a choice
    gold: int                   # the right choice
    lengths: list | None        # characters of the choices; None: no acc_norm


class Task(NamedTuple):
    """Where a task's rows come from and how one is read."""

    read: object                # row of the file -> (contexts, choices, gold, normed?)
    pattern: str                # of the files in --data, a regular expression
    split: str                  # which the harness takes
    download: tuple             # (address, SHA-256)
    members: tuple              # ends of the names inside that zip; (): it is no zip


# ------------------------------------------------------------ rows
def asked(context, choices, gold):
    """One context for all choices."""
    return [context] * len(choices), choices, gold, True


def labelled(choices):
    """(texts, labels), from an object of two lists or a list of objects."""
    if isinstance(choices, list):
        return [each["text"] for each in choices], [each["label"] for each in choices]
    return choices["text"], choices["label"]


def openbookqa(row):
    question = row.get("question", row)         # AI2's own file nests
    choices, labels = labelled(question["choices"])
    stem = question.get("question_stem", question.get("stem"))
    return asked(stem + "", choices, labels.index(row["answerKey"].strip()))


def arc_easy(row):
    question = row["question"]
    if isinstance(question, dict):
        choices, labels = labelled(question["choices"])
        question = question["stem"]
    else:
        choices, labels = labelled(row["choices"])
    return asked(f"Question: {question}\nAnswer:", choices, labels.index(row["answerKey"]))


def winogrande(row):
    """The sentence after the blank is scored, behind each option in its place."""
    before, after = row["sentence"].split("_", 1)
    contexts = [before + row["option1"], before + row["option2"]]
    return contexts, [after.strip()] * 2, ("1", "2").index(row["answer"]), False


def cleaned(text):
    """Without WikiHow's marks."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def hellaswag(row):
    context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    return asked(cleaned(context), list(map(cleaned, row["endings"])), int(row["label"]))


def piqa(row):
    choices = [row["sol1"] + "", row["sol2"] + ""]
    return asked(f"Question: {row['goal']}\nAnswer:", choices, int(row["label"]))


def mathqa(row):
    """Options in one text, "a ) 38 , b ) …"; a choice ends at the first comma."""
    problem = row.get("Problem")
    options = row.get("options")
    answer = row.get("correct")
    if problem is None:
        # A second published form, with the options inside of the text, a to e as A to E.
        problem, options = row["instruction"].split(" The options: ")
        options = options.lower()
        answer = row["answer"].lower()
    found = re.findall(r"[abcd] \) .*?, |e \) .*?$", options)
    choices = [each[4:].rstrip(" ,") for each in found]
    return asked(f"Question: {problem}\nAnswer:", choices, list("abcde").index(answer))


TASKS = {
    "openbookqa": Task(openbookqa, r"openbookqa.*\.jsonl", "test", (
        AI2 + "OpenBookQA-V1-Sep2018.zip",
        "82368cf05df2e3b309c17d162e10b888b4d768fad6e171e0a041954c8553be46"),
        ("Main/test.jsonl",)),
    "arc_easy": Task(arc_easy, r"arc[-_]easy.*\.jsonl", "test", (
        AI2 + "ARC-V1-Feb2018.zip",
        "6d2d5ab50b2ceec6ba5f79c921be77cf2de712ea25a2b3f4fff3acc101cecfa0"),
        ("ARC-Easy-Test.jsonl",)),
    "winogrande": Task(winogrande, r"winogrande.*\.jsonl", "validation", (
        MOSAIC + "winogrande/winogrande_1.1.zip",
        "3619ab104d8be2977b25c90ff420cb42d491707dcc75362a1e5d22bc082b7318"),
        ("1.1/dev.jsonl",)),
    "hellaswag": Task(hellaswag, r"hellaswag.*\.(jsonl|txt|txt\.bz2)", "validation", (
        "https://github.com/rowanz/hellaswag/raw/master/data/hellaswag_val.jsonl",
        "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"),
        ()),
    "piqa": Task(piqa, r"(piqa|physicaliqa).*\.jsonl", "validation", (
        MOSAIC + "physicaliqa/physicaliqa-train-dev.zip",
        "54d32a04f59a7e354396f321723c8d7ec35cc6b08506563d8d1ffcc15ce98ddd"),
        ("dev.jsonl", "dev-labels.lst")),
    "mathqa": Task(mathqa, r"mathqa.*\.json", "test", (
        "https://math-qa.github.io/math-QA/data/MathQA.zip",
        "7344f30456a7aef3176d4866cc953b35b41bec44eda6b00cdbcfde2876b2f07a"),
        ("test.json",)),
}


def row_of(task, where, raw):
    """A Row of a file's object. Raises InputError for one of another form."""
    try:
        contexts, choices, gold, normed = TASKS[task].read(raw)
        requests = [(context, " " + choice) for context, choice in zip(contexts, choices)]
        if len(requests) < 2 or not 0 <= gold < len(requests) or "" in contexts:
            raise ValueError(f"choice {gold} of {len(requests)} is the right one")
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as e:
        raise InputError(f"{where} is no row of {task} ({type(e).__name__}: {e}); expected "
                         "the published form: mend or delete it") from None
    for text in (*contexts, *choices):
        check_text(text, where)
    return Row(where, requests, gold, list(map(len, choices)) if normed else None)
