"""Zero-shot accuracy on six multiple-choice tasks: Tables 2, 12 and 13 of the paper.

    python experiments/reasoning.py --ckpt data/smollm2 out/smollm2-air-0.6 --data DIR

Any checkpoints the project loads, each against the first one on the same rows. The score of
a choice is the log-probability of " " + choice after the context; acc, the paper's column, is
how often the right one scores highest, acc_norm divides scores by the choices' characters.
Continues where it stopped; writes experiments/results/reasoning-NAME.json.
"""
import hashlib
import json
import math
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from experiments.choices import batches_of, groups_of, scores
from experiments.common import Cells, Setup, machine_facts
from experiments.report import RESULTS, table
from experiments.task_files import rows_of_task
from experiments.tasks import TASKS
from support.checkpoint import Checkpoint
from support.large import machine_rates
from support.learning import check_finite
from support.progress import Progress, duration, say, told
from support.script import (InputError, check_results, code_digest, free_bytes, parser,
                            pick_device, run, write_json)
from support.tokenizer import Tokenizer

# LLaMA-7B by the paper's Table 12, in %: accuracy on the six tasks, their mean.
PAPER = {
    "dense": "34, 75, 70, 57, 79, 27: 57",
    "SVD-LLM(W), 0.8": "26.6, 64, 65.7, 43.3, 69.9, 23.2: 48.8",
    "AIR, 0.8": "26.6, 66.3, 66.1, 45.3, 71.1, 24.1: 49.9",
    "SVD-LLM(W), 0.6": "20.6, 47.3, 55.4, 32.5, 61.2, 22.7: 40.0",
    "AIR, 0.6": "19.2, 51.0, 59, 34.7, 63.7, 22.2: 41.6",
}


# ------------------------------------------------------------ accuracy
def right(row, scored):
    """(acc, acc_norm) of a row, 0 or 1 each; None where the task has no acc_norm."""
    best = max(range(len(scored)), key=lambda i: scored[i])
    if row.lengths is None:
        return int(best == row.gold), None
    each = [score / max(1, n) for score, n in zip(scored, row.lengths)]
    return int(best == row.gold), int(max(range(len(each)), key=lambda i: each[i]) == row.gold)


def mean_error(values):
    """(mean, its standard error √(s²/n), s² the sample variance), in %; of one value it is
    not known, NaN.
    """
    n = len(values)
    mean = sum(values) / n
    if n == 1:
        return 100 * mean, math.nan
    spread = sum((value - mean) ** 2 for value in values) / (n - 1)
    return 100 * mean, 100 * math.sqrt(spread / n)


def total_error(tasks):
    """(mean of the tasks' means, its standard error), in %; {task: values}."""
    each = [mean_error(values) for values in tasks.values()]
    mean = sum(mean for mean, _ in each) / len(each)
    return mean, math.sqrt(sum(error**2 for _, error in each)) / len(each)


def differences(ours, others):
    """(mean, standard error) of paired differences, averaged over the tasks, in %."""
    return total_error({task: [a - b for a, b in zip(ours[task], others[task])]
                        for task in ours})


# ------------------------------------------------------------ tables
def cell(mean, error, sign=""):
    """'40.2 ± 1.3'; without an error that is not known."""
    return f"{mean:{sign}.1f}" + ("" if math.isnan(error) else f" ± {error:.1f}")


def hits(row, what):
    """{task: [0 or 1 a row]} of "acc" or "acc_norm"."""
    return {task: [int(each) for each in found[what]] for task, found in row["tasks"].items()
            if found[what] is not None}


def markdown(result, what="acc"):
    """A row a checkpoint: accuracy by task, its mean, and the mean against the first's."""
    first = hits(result["rows"][0], what)
    lines = []
    for row in result["rows"]:
        ours = hits(row, what)
        tasks = [cell(*mean_error(values)) for values in ours.values()]
        line = [row["checkpoint"], *tasks, cell(*total_error(ours))]
        if row is not result["rows"][0]:
            gap, known = differences(ours, first)
            within = " (within 2 errors)" if abs(gap) <= 2 * known else ""
            line.append(cell(gap, known, "+") + within)
        lines.append(line + [""] * (len(first) + 3 - len(line)))
    return table([f"{what}, %", *first, "mean", "against the first"], lines)


def splits_line(result):
    """Which rows were asked, and where the harness takes other ones."""
    said = []
    for task, (split, n, of) in result["splits"].items():
        usual = TASKS[task].split
        other = "" if split == usual else f", where the harness takes {usual}"
        said.append(f"{task} {n} of {of} rows of {split}{other}")
    return "; ".join(said) + "."


# ------------------------------------------------------------ the command
def parse_arguments():
    p = parser(__doc__)
    for action in p._actions:
        if action.dest == "ckpt":
            action.nargs = "+"
            action.default = [action.default]
            action.help = "checkpoints, dense or compressed; the first is the measure"
    p.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    p.add_argument("--limit", type=int, metavar="N", help="the first N rows of each task")
    p.add_argument("--data", metavar="DIR", help="folder with the published files (default: "
                   "fetched once into data/; ARC's archive is 681 MB)")
    p.add_argument("--work", default=str(Path(Setup.work).parent / "reasoning"),
                   help="scores so far (default out/reasoning)")
    p.add_argument("--json", metavar="FILE", help="the results (default "
                   "experiments/results/reasoning-NAME.json)")
    p.add_argument("--quiet", action="store_true", help="print the results only")
    return p.parse_args()


def read_rows(args):
    """({task: rows}, {task: [split, rows, of]}). Raises InputError."""
    if args.limit is not None and args.limit < 1:
        raise InputError(f"--limit is {args.limit}; expected 1 or more")
    if args.data and not Path(args.data).is_dir():
        raise InputError(f"--data is {args.data}, which is no folder; expected one with the "
                         "tasks' files")
    rows = {}
    splits = {}
    for task in args.tasks:
        every, split = rows_of_task(task, args.data)
        rows[task] = every[:args.limit]
        splits[task] = [split, len(rows[task]), len(every)]
    return rows, splits


def key_of(group):
    return hashlib.sha256(json.dumps(group).encode()).hexdigest()[:24]


def ask(ckpt, groups, cells, device, dtype):
    """Score what `cells` lack of a checkpoint's groups; kept batch by batch."""
    todo = [batch for batch in batches_of(groups)
            if any(key_of(group) not in cells for group in batch)]
    if not todo:
        return
    need = ckpt.parameters() * dtype.itemsize
    free = free_bytes(device)
    if free is not None and need > free:
        raise InputError(f"{ckpt.name} takes {need / 1e9:.1f} GB of {device.type} memory and "
                         f"{free / 1e9:.1f} GB are free; try --dtype bfloat16")
    model = ckpt.model(device, dtype)
    for batch in told(f"{ckpt.name}: batches", todo):
        for group, found in zip(batch, scores(model, batch)):
            check_finite(found, f"a score of {ckpt.name}")
            cells.keep(key_of(group), found)


def measure(path, rows, work, device, dtype):
    """{"checkpoint", "fingerprint", "tasks": {task: {"acc", "acc_norm"}}}, hits as text."""
    ckpt = Checkpoint(path)
    tokenizer = Tokenizer(ckpt)
    fingerprint = ckpt.fingerprint()
    code = code_digest("model.py", "experiments/choices.py")[:8]
    where = f"{str(dtype)[6:]}-{device.type}-torch-{torch.__version__}"
    cells = Cells(Path(work) / f"{ckpt.name}-{fingerprint[:12]}-{where}-{code}.jsonl")
    asked = {task: [groups_of(row, tokenizer, ckpt.cfg.context) for row in each]
             for task, each in rows.items()}
    groups = [group for each in asked.values() for own, _ in each for group in own]
    groups = list(dict.fromkeys(groups))
    rate, _, _ = machine_rates(device, dtype)
    tokens = sum(group.size for group in groups if key_of(group) not in cells)
    say(f"{path}: {sum(map(len, rows.values())):,} rows, {tokens:,} tokens to go, about "
        f"{duration(2 * ckpt.parameters() * tokens / rate)}")
    ask(ckpt, groups, cells, device, dtype)
    tasks = {}
    for task, each in asked.items():
        found = []
        for row, (own, places) in zip(rows[task], each):
            scored = [cells[key_of(own[group])][place] for group, place in places]
            found.append(right(row, scored))
        acc, norm = zip(*found)
        tasks[task] = {"acc": "".join(map(str, acc)),
                       "acc_norm": None if None in norm else "".join(map(str, norm))}
    return {"checkpoint": ckpt.name, "path": str(path), "fingerprint": fingerprint,
            "air": ckpt.raw.get("air"), "tasks": tasks}


def main():
    args = parse_arguments()
    Progress(args.quiet).listen()
    first = Checkpoint(args.ckpt[0])
    out = args.json or RESULTS / f"reasoning-{first.name}.json"
    check_results(out, "splits")
    for path in args.ckpt:
        Checkpoint(path)
    rows, splits = read_rows(args)
    device, dtype, _ = pick_device(args.device, args.dtype)
    found = [measure(path, rows, args.work, device, dtype) for path in args.ckpt]
    result = {"script": "reasoning", "machine": machine_facts(device, dtype),
              "splits": splits, "rows": found}
    write_json(out, result)
    print(markdown(result))
    if hits(found[0], "acc_norm"):
        print("\n" + markdown(result, "acc_norm"))
    print("\n" + splits_line(result))
    print("LLaMA-7B in the paper: " + "; ".join(map(": ".join, PAPER.items())))


if __name__ == "__main__":
    run(main)
