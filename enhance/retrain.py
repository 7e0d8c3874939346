"""Retraining: all factors learn next-token prediction, end to end (Table 14).

    python enhance/retrain.py --ckpt out/demo-air-0.6 --out out/demo-retrained

On the calibration windows; norms, embeddings and head stay as they are. The whole model is
in memory with an fp32 copy of its factors, their gradients and Adam's moments. The paper
names no optimizer; this is the nearest published recipe (AdamW, 2e-5, ten warm-up steps, a
cosine, no weight decay, stopped early by held-out windows). A killed run goes on.

Shapes: N windows, T tokens a window.
"""
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
import torch.utils.checkpoint

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))        # from any folder
from model import LowRank, rope, to_logits
from support.checkpoint import result_bytes
from support.learning import Course, balance, batch_at, learn, products, rate_at, warm_up_of
from support.result import make_plan, write_model
from support.script import InputError, run
from support.task import arguments, dense_of, prepare

MICRO_BATCH = 2048              # tokens whose activations are in memory at a time
WARM_UP = 10                    # steps


# ------------------------------------------------------------ the loss
def logits_of(model, ids):
    """Logits (B, T-1, vocab) of every token but the last; a block's activations are computed
    again on the way back, so that one block's are in memory at a time."""
    x = F.embedding(ids[:, :-1], model.model.embed_tokens.weight)
    angles = rope(model.cfg, x.shape[1], x.device)
    for block in model.model.layers:
        x = torch.utils.checkpoint.checkpoint(block, x, angles, use_reentrant=False)
    return to_logits(x, (model.model.norm.weight, model.lm_head), model.cfg).float()


def next_token_loss(logits, targets):
    """Cross-entropy in nats of the tokens `targets` (B, T-1), a sum; those below 0 carry
    none."""
    targets = targets.clamp_min(-1).flatten()
    return F.cross_entropy(logits.flatten(0, 1), targets, ignore_index=-1, reduction="sum")


def distance(logits, wanted, targets):
    """Not in the paper: KL(wanted ‖ model) of both logits, in nats, a sum over the same
    tokens."""
    wanted = wanted.log_softmax(-1)
    apart = F.kl_div(logits.log_softmax(-1), wanted, log_target=True, reduction="none")
    return apart.sum(-1)[targets >= 0].sum()


class Loss:
    """What is minimised, a mean over the tokens of windows of ids (N, T).

    Next-token loss, or with a teacher (1 − weight) · that + weight · the distance to the
    teacher's predictions. An id that is only read, and carries no loss, is −1 − id.
    """

    def __init__(self, model, device, dtype, teacher=None, weight=0.0):
        self.model = model
        self.device = device
        self.dtype = dtype
        self.teacher = teacher
        self.weight = weight

    def total(self, ids):
        """Its sum over the tokens of ids (B, T)."""
        seen = torch.where(ids < 0, -1 - ids, ids)
        targets = ids[:, 1:]
        with products(self.device, self.dtype):
            logits = logits_of(self.model, seen)
            loss = next_token_loss(logits, targets)
            if self.teacher:
                with torch.no_grad():
                    wanted = logits_of(self.teacher, seen)
                apart = distance(logits, wanted, targets)
                loss = (1 - self.weight) * loss + self.weight * apart
        return loss

    def parts(self, windows):
        """(A micro-batch, on the device; the share of all tokens that its sum counts for)."""
        tokens = max(1, (windows[:, 1:] >= 0).sum().item())
        for part in windows.split(max(1, MICRO_BATCH // windows.shape[1])):
            yield part.to(self.device), 1 / tokens

    def add_gradient(self, windows):
        for part, share in self.parts(windows):
            (self.total(part) * share).backward()

    @torch.no_grad()
    def mean(self, windows):
        return sum(self.total(part).item() * share for part, share in self.parts(windows))


# ------------------------------------------------------------ the course
def learning_factors(model):
    """{name: parameter} of all factors, to learn; all else stays."""
    params = {}
    for name, layer in model.named_modules():
        if isinstance(layer, LowRank):
            for which in ("V", "U"):
                weight = getattr(layer, which).weight
                params[f"{name}.{which}.weight"] = weight.requires_grad_(True)
    return params


def retrain(task, model, teacher=None, folder=None):
    """Train the factors of `model` in place; yields [step, held-out loss].

    What is kept is best on the held-out windows, the start among it. folder: of a Course.
    """
    o = task.options
    balance(model)
    loss = Loss(model, task.device, task.dtype, teacher, o["weight"])
    params = learning_factors(model)
    stored = {name: task.ckpt.tensors[name].dtype for name in params}
    course = Course(params, o, stored, folder)
    steps = task.steps
    warm_up = warm_up_of(steps, WARM_UP)

    def gradient(step):
        loss.add_gradient(batch_at(task, step))

    yield from learn(course, steps, gradient, lambda: loss.mean(task.held),
                     lambda step: rate_at(step, steps, warm_up, 0.0))


# ------------------------------------------------------------ the command
def states_bytes(ckpt, numbers):
    """Of a state on disk, `numbers` parameters that learn and what AdamW keeps of them, and
    of the one that takes its place."""
    return 2 * numbers * (12 + ckpt.dtype.itemsize)


def model_plan(task, states, each, stages=1, teacher=None):
    """The Plan of a file that trains the whole model in `stages`: bytes of its `states` on
    disk, of `each` parameter in memory. Raises InputError for what does not fit."""
    cfg = task.ckpt.cfg
    o = task.options
    T = task.windows.shape[1]
    evaluations = 1 + -(-task.steps // o["every"])
    numbers = task.ckpt.parameters()
    tokens = 8 * task.windows.numel() * o["epochs"] + 2 * task.held.numel() * evaluations
    # The parameters and what belongs to each; a micro-batch's graph and its logits.
    widths = (cfg.n_layers + 12) * cfg.dim + 6 * cfg.hidden + 3 * cfg.vocab
    held = each * numbers + 4 * max(MICRO_BATCH, T) * widths
    if teacher:
        held += teacher.parameters() * task.dtype.itemsize
    disk = {"result": result_bytes(task.ckpt, {}),
            f"training states (written {stages * evaluations} times)": states}
    # A state goes from the device to disk through the host's memory.
    host = states / 2 if task.device.type == "cuda" else 0
    return make_plan(task, numbers * tokens * stages, host, held, disk,
                     "enhance/refine.py, block by block, takes less")


def main():
    p = arguments(__doc__)
    p.add_argument("--epochs", type=int, default=5, help="(default 5)")
    p.add_argument("--lr", type=float, default=2e-5, help="its peak (default 2e-5)")
    p.add_argument("--batch", type=int, default=8, help="windows a step (default 8)")
    p.add_argument("--every", type=int, default=10, help="steps between evaluations on the "
                   "held-out windows (default 10)")
    p.add_argument("--patience", type=int, default=5, help="evaluations without a better one "
                   "after which it stops; 0: never (default 5)")
    p.add_argument("--teacher", metavar="DENSE", help="also learn this model's predictions: "
                   "the dense one's")
    p.add_argument("--weight", type=float,
                   help="of the distance to the teacher (default 0.5)")
    args = p.parse_args()
    if args.weight is not None and args.teacher is None:
        raise InputError(f"--weight is {args.weight:g} and there is no teacher; name it with "
                         "--teacher, or leave both out")
    names = ("epochs", "lr", "batch", "every", "patience", "weight")
    options = {name: getattr(args, name) for name in names}
    if args.weight is None:
        options["weight"] = 0.5 if args.teacher else 0.0
    task = prepare("retrain", args, options)
    dense = dense_of(task.ckpt, args.teacher) if args.teacher else None

    def train(model, folder):
        teacher = dense.model(task.device, task.dtype) if dense else None
        for step, loss in retrain(task, model, teacher, folder):
            yield f"step {step}: held-out loss {loss:.4f}"

    factors = sum(math.prod(task.ckpt.tensors[f"{layer}.{which}.weight"].shape)
                  for layer in task.ckpt.cfg.ranks for which in "VU")
    states = states_bytes(task.ckpt, factors)
    # Factors, gradients, Adam's moments, the best.
    write_model(task, args, model_plan(task, states, 24, teacher=dense), train)


if __name__ == "__main__":
    run(main)
