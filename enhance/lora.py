"""LoRA on the factors: adapters on all U, merged, then on all V, merged (Tables 5, 13).

    python enhance/lora.py --ckpt out/demo-air-0.6 --out out/demo-lora --batch 8 --lr 1e-3
    python enhance/lora.py --ckpt RESULT --calib alpaca.json --out FOLDER

Everything else is frozen. On windows of a text, or on instructions: a .json list of
"instruction", "input" and "output" in Alpaca's template, whose prompts carry no loss (all rows;
--text is then the checkpoint's). The recipe is SVD-LLM's (Wang et al., 2025): rank 8, α 16,
dropout 0.05, AdamW 1e-4, 100 warm-up steps, then linearly to 0, batches of 64, 256 tokens of a
row. The adapters of least held-out loss are merged. A killed run goes on.

Shapes: B windows, T tokens; an adapter of rank r on a factor (m, n): A (r, n), B (m, r).
"""
import math
import sys
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))        # from any folder
from enhance.retrain import Loss, model_plan, states_bytes
from model import LowRank
from support.learning import Course, balance, batch_at, learn, linear_at, own, warm_up_of
from support.result import write_model
from support.script import run
from support.task import arguments, prepare
from support.texts import instruction_rows
from support.tokenizer import Tokenizer

WARM_UP = 100                   # steps; not in the papers: of few, a fifth
CUTOFF = 256                    # tokens of an instruction and its answer (or --seqlen)
STAGES = ("U", "V")


# ------------------------------------------------------------ adapters
class Adapter(nn.Module):
    """y = Wx + (α/r) · B A dropout(x), W frozen; at the start B is 0."""

    def __init__(self, linear, rank, alpha, dropout):
        super().__init__()
        m, n = linear.weight.shape
        device = linear.weight.device
        self.linear = linear.requires_grad_(False)
        # Drawn on the CPU: the same numbers for every device.
        A = nn.init.kaiming_uniform_(torch.empty(rank, n, device="cpu"), a=math.sqrt(5))
        self.A = nn.Parameter(A.to(device))
        self.B = nn.Parameter(torch.zeros(m, rank, device=device))
        self.scale = alpha / rank
        self.dropout = dropout

    def forward(self, x):
        inner = F.linear(F.dropout(x, self.dropout, self.training), self.A.to(x.dtype))
        return self.linear(x) + self.scale * F.linear(inner, self.B.to(x.dtype))

    @torch.no_grad()
    def merged(self, dtype):
        """A Linear with W + (α/r) B A, rounded to `dtype`."""
        linear = own(self.linear)
        change = self.scale * (self.B @ self.A)
        linear.weight.copy_((linear.weight.float() + change).to(dtype))
        return linear


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


def merge(model, which, ckpt):
    """Put merged factors, rounded as `ckpt` stores them, in the adapters' places; returns
    {layer: Adapter}."""
    adapters = {}
    for name, layer in list(model.named_modules()):
        if isinstance(layer, LowRank):
            adapters[layer] = getattr(layer, which)
            dtype = ckpt.tensors[f"{name}.{which}.weight"].dtype
            setattr(layer, which, adapters[layer].merged(dtype))
    return adapters


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


def tokens_of(row, tokenizer, length):
    """A row as `length` ids: prompt and what fills up hidden; the end-of-text learnt where
    there is room for it."""
    prompt = tokenizer.bos + tokenizer.encode(prompt_of(row))
    whole = tokenizer.bos + tokenizer.encode(prompt_of(row) + row["output"])
    ids = hide(whole[:len(prompt)]) + whole[len(prompt):] + sorted(tokenizer.eos)[:1]
    ids = ids[:length]
    # On the right, which later tokens alone would see, and there are none.
    return ids + hide([0] * (length - len(ids)))


def instructions(path, ckpt, length):
    """The rows of a .json file as ids (N, `length`; None: CUTOFF, within the context), but
    for those whose prompt leaves no room for an answer. Raises InputError."""
    rows = instruction_rows(path)
    tokenizer = Tokenizer(ckpt)
    length = length or min(CUTOFF, ckpt.cfg.context)
    ids = torch.tensor([tokens_of(row, tokenizer, length) for row in rows])
    learnt = (ids[:, 1:] >= 0).any(1)
    left_out = int((~learnt).sum())
    if left_out:
        print(f"{left_out} of {len(ids)} rows of {path} are left out: their prompts fill all "
              f"{length} tokens", file=sys.stderr)
    last = ids[:, -1]
    cut = int(((last >= 0) & ~torch.isin(last, torch.tensor(sorted(tokenizer.eos)))).sum())
    if cut:
        print(f"{cut} of {len(ids)} answers of {path} end at {length} tokens, before their end "
              "of text; --seqlen takes more", file=sys.stderr)
    return ids[learnt]


# ------------------------------------------------------------ learning
def lora(task, model, folder=None):
    """Adapters on all U, then on all V of `model`, merged in place; yields (factor, step,
    held-out loss). folder: of a Course."""
    o = task.options
    balance(model)
    loss = Loss(model, task.device, task.dtype)
    steps = task.steps
    warm_up = warm_up_of(steps, WARM_UP)

    def gradient(step):
        model.train()
        loss.add_gradient(batch_at(task, step))
        model.eval()

    def held_loss():
        # Of the factors as they would be stored.
        adapters = merge(model, which, task.ckpt)
        found = loss.mean(task.held)
        for layer, adapter in adapters.items():
            setattr(layer, which, adapter)
        return found

    for which in STAGES:
        torch.manual_seed(task.seed)
        params = put_on(model, which, o)
        course = Course(params, o, dict.fromkeys(params, torch.float32), folder,
                        f"training-{which}")
        for step, found in learn(course, steps, gradient, held_loss,
                                 lambda step: linear_at(step, steps, warm_up)):
            yield which, step, found
        merge(model, which, task.ckpt)


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

    shapes = [task.ckpt.tensors[f"{layer}.{which}.weight"].shape
              for layer in task.ckpt.cfg.ranks for which in STAGES]
    states = states_bytes(task.ckpt, args.rank * sum(map(sum, shapes)))
    # Factors, and merged ones to be judged; what learns is few beside them.
    write_model(task, args, model_plan(task, states, 8, len(STAGES)), train)


if __name__ == "__main__":
    run(main)
