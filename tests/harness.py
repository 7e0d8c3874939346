"""Golden scores of experiments/reasoning.py by the field's harness, lm_eval 0.4.13.

    pip install lm_eval==0.4.13 transformers==5.24.0          # beside the project's packages
    python tests/harness.py CKPT DATA OUT.json --rows 50 [--texts] [--bos]

Every task is the harness's own but for its files, which are local: the published ones, turned
into the objects its datasets have. OUT has, a row and task: the requests as (digest of
context and continuation, log-probability) and the accuracies, so that no question is copied
into the repository; with --texts (our own rows, tests/golden/reasoning) the texts themselves.
"""
import argparse
import bz2
import hashlib
import json
import re
import tempfile
from pathlib import Path

import lm_eval
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml
from transformers import PreTrainedTokenizerFast

TASKS = ("openbookqa", "arc_easy", "winogrande", "hellaswag", "piqa", "mathqa")


# ------------------------------------------------------------ the files as datasets
def lines(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines() if line.strip()]


def find(folder, start, end):
    return next(path for path in sorted(folder.iterdir())
                if path.name.startswith(start) and path.name.endswith(end))


def from_text(folder):
    """HellaSwag's six lines; the second part of a context begins after the last full stop."""
    packed = find(folder, "hellaswag", (".txt", ".txt.bz2"))
    raw = packed.read_bytes()
    text = (bz2.decompress(raw) if packed.suffix == ".bz2" else raw).decode()
    each = text.split("\n")
    rows = []
    for i in range(0, len(each) - 5, 6):
        label, whole = each[i].split(": ", 1)
        a, b = whole, ""
        cut = max(whole.rfind(mark + " ") for mark in ".!?")
        if cut >= 0 and whole[cut + 2:cut + 3].islower():
            a, b = whole[:cut + 1], whole[cut + 2:]
        rows.append({"activity_label": label, "ctx_a": a, "ctx_b": b,
                     "endings": each[i + 2:i + 6], "label": each[i + 1]})
    return rows


def mathqa(folder):
    rows = []
    for row in json.loads(find(folder, "mathqa", ".json").read_text("utf-8")):
        if "Problem" in row:
            rows.append({key: row[key] for key in ("Problem", "options", "correct")})
            continue
        problem, options = row["instruction"].split(" The options: ")
        rows.append({"Problem": problem, "options": options.lower(),
                     "correct": row["answer"].lower()})
    return rows


def nested(row):
    """AI2's own form as the datasets have it."""
    question = row.get("question")
    if not isinstance(question, dict):
        return row
    choices = {key: [each[key] for each in question["choices"]] for key in ("text", "label")}
    return {"question_stem": question["stem"], "question": question["stem"],
            "choices": choices, "answerKey": row["answerKey"]}


def datasets(folder):
    piqa = lines(find(folder, "piqa", ".jsonl"))
    labels = find(folder, "piqa", "labels.lst").read_text().split()
    hella = [path for path in folder.iterdir()
             if re.fullmatch(r"hellaswag.*\.jsonl", path.name)]
    return {
        "openbookqa": list(map(nested, lines(find(folder, "openbookqa", ".jsonl")))),
        "arc_easy": list(map(nested, lines(find(folder, "arc_easy", ".jsonl")))),
        "winogrande": lines(find(folder, "winogrande", ".jsonl")),
        "hellaswag": lines(hella[0]) if hella else from_text(folder),
        "piqa": [row | {"label": int(label)} for row, label in zip(piqa, labels)],
        "mathqa": mathqa(folder),
    }


# ------------------------------------------------------------ the harness
def digest(*texts):
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


def scored(name, rows, model, n, texts):
    """[{"requests", "acc", "acc_norm"}] of the first n rows of a task."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows[:n]), "utf-8")
        config = load_yaml(TaskManager().task_index[name].yaml_path, resolve_func=True)
        config.pop("tag", None)
        config |= {"dataset_path": "json", "dataset_name": None, "training_split": None,
                   "fewshot_split": None, "validation_split": "validation",
                   "test_split": None,
                   "dataset_kwargs": {"data_files": {"validation": str(path)}}}
        task = lm_eval.api.task.ConfigurableTask(config=config)
        task.build_all_requests(limit=None, rank=0, world_size=1)
    found = []
    for doc_id, doc in task.doc_iterator(rank=0, world_size=1, limit=None):
        asked = [each for each in task.instances if each.doc_id == doc_id]
        results = model.loglikelihood(asked, disable_tqdm=True)
        metrics = task.process_results(doc, results)
        requests = []
        for each, (score, _) in zip(asked, results):
            context, continuation = each.args
            said = [context, continuation] if texts else [digest(context, continuation)]
            requests.append([*said, round(float(score), 6)])
        found.append({"requests": requests, "acc": metrics["acc"],
                      "acc_norm": metrics.get("acc_norm")})
    return found


def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("ckpt")
    p.add_argument("data", type=Path)
    p.add_argument("out", type=Path)
    p.add_argument("--rows", type=int, default=50)
    p.add_argument("--texts", action="store_true")
    p.add_argument("--bos", action="store_true", help="put BOS first, where a tokenizer.model "
                   "stands alone (transformers 5 leaves it out, 4 and Meta's code put it)")
    args = p.parse_args()
    tokenizer = args.ckpt
    if (Path(args.ckpt) / "tokenizer.json").exists():
        # As the file is: GPT2Tokenizer in transformers 5 leaves out its pre-tokenizer.
        tokenizer = PreTrainedTokenizerFast.from_pretrained(args.ckpt)
    model = HFLM(pretrained=args.ckpt, tokenizer=tokenizer, device="cpu", dtype="float32",
                 batch_size=1, add_bos_token=True if args.bos else None)
    found = {name: scored(name, rows, model, args.rows, args.texts)
             for name, rows in datasets(args.data).items()}
    args.out.write_text(json.dumps({"lm_eval": lm_eval.__version__, "tasks": found},
                                   indent=None, ensure_ascii=False) + "\n", "utf-8")


if __name__ == "__main__":
    main()
