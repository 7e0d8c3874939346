"""LoRA on the factors: adapters on all U, merged, then on all V, merged (Tables 5, 13).

    python enhance/lora.py --ckpt out/demo-air-0.6 --out out/demo-lora --batch 8 --lr 1e-3
    python enhance/lora.py --ckpt RESULT --calib alpaca.json --out FOLDER

Everything else is frozen. On windows of a text, or on instructions: a .json list of
"instruction", "input" and "output" in Alpaca's template, whose prompts carry no loss. The
recipe is SVD-LLM's (Wang et al., 2025): rank 8, α 16, dropout 0.05, AdamW 1e-4, 100 warm-up
steps, then linearly to 0, batches of 64, at most 256 tokens; the demo's few windows want
smaller batches. The adapters of least held-out loss are merged. A killed run goes on.

Shapes: B windows, T tokens; an adapter of rank r on a factor (m, n): A (r, n), B (m, r).
"""
import math
import sys
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))        # from any folder
from enhance.retrain import Loss, model_plan
from model import LowRank
from support.enhance import (Course, arguments, balance, batch_at, learn, linear_at,
                             prepare, warm_up_of, write_model)
from support.script import run
from support.texts import instruction_rows
from support.tokenizer import Tokenizer

WARM_UP = 100                   # steps; not in the papers: of few, a fifth
CUTOFF = 256                    # tokens of an instruction and its answer
STAGES = ("U", "V")


# ------------------------------------------------------------ adapters
class Adapter(nn.Module):
    """y = Wx + (α/r) · B A dropout(x), W frozen; at the start B is 0."""

    def __init__(self, linear, rank, alpha, dropout):
        super().__init__()
        m, n = linear.weight.shape
        self.linear = linear.requires_grad_(False)
        self.A = nn.Parameter(torch.empty(rank, n, device=linear.weight.device))
        self.B = nn.Parameter(torch.zeros(m, rank, device=linear.weight.device))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        self.scale = alpha / rank
        self.dropout = dropout

    def forward(self, x):
        inner = F.linear(F.dropout(x, self.dropout, self.training), self.A.to(x.dtype))
        return self.linear(x) + self.scale * F.linear(inner, self.B.to(x.dtype))

    @torch.no_grad()
    def merged(self):
        """The Linear with W + (α/r) B A."""
        change = self.scale * (self.B @ self.A)
        self.linear.weight.copy_(self.linear.weight.float() + change)
        return self.linear


def put_on(model, which, options):
    """Adapters on every factor `which` of the model; {name: parameter} of theirs."""
    params = {}
    for name, layer in model.named_modules():
        if isinstance(layer, LowRank):
            adapter = Adapter(getattr(layer, which), *(options[key] for key in
                                                       ("rank", "alpha", "dropout")))
            setattr(layer, which, adapter)
            params |= {f"{name}.{key}": getattr(adapter, key) for key in "AB"}
    return params


def merge(model, which):
    for layer in model.modules():
        if isinstance(layer, LowRank):
            setattr(layer, which, getattr(layer, which).merged())


# ------------------------------------------------------------ text
def prompt_of(row):
    """Alpaca's template (Taori et al., 2023) up to the answer."""
    above = "Below is an instruction that describes a task"
    below = "Write a response that appropriately completes the request."
    asked = f"### Instruction:\n{row['instruction']}\n\n"
    if row.get("input"):
        above += ", paired with an input that provides further context"
        asked += f"### Input:\n{row['input']}\n\n"
    return f"{above}. {below}\n\n{asked}### Response:\n"


def hide(ids):
    """Ids that carry no loss, so that one tensor holds both: −1 − id."""
    return [-1 - id for id in ids]


def tokens_of(row, tokenizer):
    """A row as CUTOFF ids: prompt and what fills up hidden; the end-of-text learnt where
    there is room for it."""
    prompt = tokenizer.bos + tokenizer.encode(prompt_of(row))
    whole = tokenizer.bos + tokenizer.encode(prompt_of(row) + row["output"])
    ids = hide(whole[:len(prompt)]) + whole[len(prompt):] + sorted(tokenizer.eos)[:1]
    ids = ids[:CUTOFF]
    # On the right, which later tokens alone would see, and there are none.
    return ids + hide([0] * (CUTOFF - len(ids)))


def instructions(path, ckpt):
    """The rows of a .json file as ids (N, CUTOFF). Raises InputError."""
    rows = instruction_rows(path)
    tokenizer = Tokenizer(ckpt)
    return torch.tensor([tokens_of(row, tokenizer) for row in rows])


# ------------------------------------------------------------ learning
def lora(task, model, folder=None):
    """Adapters on all U, then on all V of `model`, merged in place; yields (factor, step,
    held-out loss). folder: of a Course."""
    o = task.options
    balance(model)
    loss = Loss(model, task.device, task.dtype)
    steps = o["epochs"] * -(-len(task.windows) // o["batch"])
    warm_up = warm_up_of(steps, WARM_UP)

    def gradient(step):
        model.train()
        loss.add_gradient(batch_at(task, step))
        model.eval()

    for which in STAGES:
        torch.manual_seed(task.seed)
        adapters = put_on(model, which, o)
        course = Course(adapters, o, torch.float32, folder, f"training-{which}")
        for step, found in learn(course, steps, gradient, lambda: loss.mean(task.held),
                                 lambda step: linear_at(step, steps, warm_up)):
            yield which, step, found
        merge(model, which)


# ------------------------------------------------------------ the command
def main():
    p = arguments(__doc__)
    p.add_argument("--epochs", type=int, default=3, help="of each stage (default 3)")
    p.add_argument("--lr", type=float, default=1e-4, help="its peak (default 1e-4)")
    p.add_argument("--batch", type=int, default=64, help="rows a step (default 64)")
    p.add_argument("--every", type=int, default=20, help="steps between evaluations on the "
                   "held-out rows (default 20)")
    p.add_argument("--rank", type=int, default=8, help="(default 8)")
    p.add_argument("--alpha", type=float, default=16, help="(default 16)")
    p.add_argument("--dropout", type=float, default=0.05, help="(default 0.05)")
    args = p.parse_args()
    names = ("epochs", "lr", "batch", "every", "rank", "alpha", "dropout")
    options = {name: getattr(args, name) for name in names}
    task = prepare("lora", args, options, instructions)

    def train(model, folder):
        for which, step, loss in lora(task, model, folder):
            yield f"adapters on {which}, step {step}: held-out loss {loss:.4f}"

    write_model(task, args, model_plan(task, len(STAGES)), train)


if __name__ == "__main__":
    run(main)
