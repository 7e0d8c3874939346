"""The files of the six tasks: in a folder of the published ones, or fetched once.

Formats: a JSON object a line; one JSON list (MathQA); HellaSwag's text form of six lines a
row; PIQA's answers in a file of their own. The archives' sums are pinned in tasks.py.
"""
import bz2
import json
import re
import zipfile
from pathlib import Path

from experiments.tasks import TASKS, row_of
from support.script import InputError
from support.texts import download, read_text


# ------------------------------------------------------------ files
def six_lines(lines):
    """HellaSwag's text form, six lines a row (context, label, endings), as its objects.

    There ctx_a and ctx_b are one text; ctx_b is what follows the last whole sentence and
    begins in lower case.
    """
    for i in range(0, len(lines), 6):
        context, label, *endings = lines[i:i + 6]
        activity, _, whole = context.partition(": ")
        a, b = re.fullmatch(r"(.*?)((?<=[.!?] )[a-z][^.!?]*|)", whole).groups()
        yield {"activity_label": activity, "ctx_a": a.removesuffix(" "), "ctx_b": b,
               "endings": endings, "label": label}


def objects(path, text):
    """The rows of a file: [(where, object)], a line, an element or six lines each."""
    kind = path.name.lower().removesuffix(".bz2").rpartition(".")[2]
    if kind == "json":
        return [(f"row {i} of {path}", each) for i, each in enumerate(json.loads(text), 1)]
    if kind == "txt":
        lines = text.removesuffix("\n").split("\n")
        over = len(lines) % 6
        if over:
            raise InputError(f"line {len(lines) - over + 1} of {path} begins a row of {over} "
                             "lines; expected six: mend or delete it")
        return [(f"line {6 * i + 1} of {path}", each) for i, each in enumerate(six_lines(lines))]
    found = []
    for i, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                found.append((f"line {i} of {path}", json.loads(line)))
            except (ValueError, RecursionError):
                raise InputError(f"line {i} of {path} is no JSON object; mend or delete "
                                 "it") from None
    return found


def split_of(name):
    """The split that a file's name says."""
    words = re.split("[^a-z]+", name.lower())
    if {"validation", "valid", "val", "dev"} & set(words):
        return "validation"
    return "test" if "test" in words else "unknown"


def local(task, folder):
    """(path, split) of a task's file in `folder`, the harness's split before another.

    Raises InputError for none, or for several of one split.
    """
    pattern = TASKS[task].pattern
    found = [path for path in sorted(folder.iterdir())
             if re.fullmatch(pattern, path.name, re.I)]
    if not found:
        raise InputError(f"{folder} has no file of {task}; expected a name as {pattern}, or "
                         "leave it out with --tasks")
    right = [path for path in found if split_of(path.name) == TASKS[task].split]
    if len(right or found) > 1:
        names = ", ".join(path.name for path in right or found)
        raise InputError(f"{folder} has several files of {task} ({names}); leave one there")
    path, = right or found
    return path, split_of(path.name)


def content(path):
    """A file's text, unpacked where its name ends in .bz2."""
    if path.suffix != ".bz2":
        return read_text(path)
    try:
        return bz2.decompress(path.read_bytes()).decode("utf-8")
    except (OSError, ValueError) as e:
        raise InputError(f"{path} cannot be unpacked ({e}); fetch it again") from None


def fetched(task):
    """(path, text, labels or None) of a task's published file, fetched once into data/."""
    url, pinned = TASKS[task].download
    path = download(url.rpartition("/")[2], (url, pinned), "--data DIR, a folder with the "
                    "tasks' files")
    if not TASKS[task].members:
        return path, read_text(path), None
    with zipfile.ZipFile(path) as z:
        texts = [z.read(name).decode("utf-8") for end in TASKS[task].members
                 for name in z.namelist() if name.endswith(end) and "MACOSX" not in name]
    inside = path.parent / TASKS[task].members[0].replace("/", "-")
    return inside, texts[0], texts[1] if len(texts) > 1 else None


def rows_of_task(task, folder=None):
    """(rows, split) of a task, from a folder with the published files or fetched once.

    Raises InputError, for a malformed row with its line.
    """
    split = TASKS[task].split
    if folder is None:
        path, text, labels = fetched(task)
    else:
        path, split = local(task, Path(folder))
        text = content(path)
        beside = path.with_name(path.stem + "-labels.lst")
        labels = read_text(beside) if beside.exists() else None
    try:
        found = objects(path, text.replace("\r\n", "\n"))
    except (ValueError, TypeError, RecursionError) as e:
        raise InputError(f"{path} is not readable as JSON ({e}); expected a list of "
                         "rows") from None
    if labels:
        # PIQA's answers lie in a file of their own.
        labels = labels.split()
        if len(labels) != len(found):
            raise InputError(f"{path} has {len(found)} rows and {len(labels)} labels beside "
                             "it; expected as many: fetch both again")
        found = [(where, raw | {"label": label} if isinstance(raw, dict) else raw)
                 for (where, raw), label in zip(found, labels)]
    rows = [row_of(task, where, raw) for where, raw in found]
    if not rows:
        raise InputError(f"{path} has no rows")
    return rows, split
