"""Learning by steps: what is trained, in which order, at which rate, and what is kept of it."""
import copy
import math

import torch

from calibrate import block_forward
from model import LowRank
from support.progress import told

ADAM = ("step", "exp_avg", "exp_avg_sq")        # what AdamW keeps of a parameter


# ------------------------------------------------------------ what learns
def own(module):
    """A copy to be changed: an fp32 checkpoint hands out its own memory."""
    return copy.deepcopy(module)


def model_to_learn(ckpt, device, dtype):
    """The whole model in memory, in `dtype`, but for its factors, which are in fp32: what
    learns starts from the numbers that are stored."""
    model = own(ckpt.model(device, dtype))
    for name, layer in model.named_modules():
        if isinstance(layer, LowRank):
            for which in ("V", "U"):
                w = ckpt.tensor(f"{name}.{which}.weight", device, torch.float32)
                getattr(layer, which).weight = torch.nn.Parameter(w.clone(), requires_grad=False)
    return model


@torch.no_grad()
def balance(model):
    """Scale each rank's row of V and column of U to about one length, in place.

    Not in the papers: S⁻¹ leaves V's numbers thousands of times smaller than U's, and Adam
    moves both by as much. By powers of two, so that UV stays what it is bit by bit.
    """
    for layer in model.modules():
        if isinstance(layer, LowRank):
            U = layer.U.weight
            V = layer.V.weight
            ratio = V.norm(dim=1) / U.norm(dim=0).clamp_min(1e-30)              # (k,)
            scale = (ratio.clamp_min(1e-30).log2() / 2).round().exp2()
            U.mul_(scale)
            V.div_(scale[:, None])


def check_finite(value, what):
    """Raise RuntimeError for a number or a tensor that is not finite."""
    if not torch.isfinite(torch.as_tensor(value)).all():
        raise RuntimeError(f"{what} is not finite: activations overflowed; use bfloat16 or "
                           "float32")


@torch.no_grad()
def advance(block, h, angles):
    """A stream (N, T, dim) in the host's memory through a block, in place."""
    block_forward(block, h, h, angles, gram=False)


def input_grams(block, layers, h, angles):
    """{name: ΣXXᵀ (n, n)} of the inputs that `layers` {name: Linear} see, the block's
    input being h (N, T, dim); products in fp32, sums in fp64."""
    grams = {name: 0 for name in layers}
    hooks = []
    for name, layer in layers.items():
        def note(_, inputs, name=name):
            x = inputs[0].flatten(0, -2).float()
            grams[name] = grams[name] + (x.T @ x).double()
        hooks.append(layer.register_forward_pre_hook(note))
    block_forward(block, h, torch.empty_like(h), angles, gram=False)
    for hook in hooks:
        hook.remove()
    for name, gram in grams.items():
        check_finite(gram, f"ΣXXᵀ of {name}")
    return grams


# ------------------------------------------------------------ a step
def products(device, dtype):
    """Matrix products in `dtype`, where parameters that learn are in fp32."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def batch_at(task, step):
    """The windows of a step, (batch, T): each epoch in another order. The batch and what is
    drawn in it, such as dropout, are the same in a run that goes on."""
    torch.manual_seed(task.seed + step)
    N = len(task.windows)
    size = task.options["batch"]
    an_epoch = -(-N // size)
    order = torch.Generator().manual_seed(task.seed + step // an_epoch)
    return task.windows[torch.randperm(N, generator=order).split(size)[step % an_epoch]]


def rate_at(step, steps, warm_up, last):
    """Share of the peak learning rate at `step` of 0 … steps-1: linear warm-up over
    `warm_up` steps, then a cosine to `last`."""
    if step < warm_up:
        return (step + 1) / warm_up
    done = (step - warm_up) / max(1, steps - warm_up)
    return last + (1 - last) * (1 + math.cos(math.pi * done)) / 2


def linear_at(step, steps, warm_up):
    """The same with a straight line to 0."""
    if step < warm_up:
        return (step + 1) / warm_up
    return (steps - step) / max(1, steps - warm_up)


def warm_up_of(steps, usual):
    """Steps of warm-up: the `usual` number, of a short course at most a fifth."""
    return min(usual, steps // 5)


# ------------------------------------------------------------ the course
def training_tensors(params, optimizer):
    """{name: tensor} of parameters and what AdamW keeps of them, to go on from."""
    tensors = {}
    for key, w in params.items():
        moments = optimizer.state[w].items()
        tensors |= {f"{key}:now": w} | {f"{key}:{name}": moment for name, moment in moments}
    return tensors


@torch.no_grad()
def take_training(params, optimizer, tensors, step):
    """Give them back."""
    for key, w in params.items():
        w.copy_(tensors[f"{key}:now"])
        if step:
            state = {name: tensors[f"{key}:{name}"].clone() for name in ADAM}
            optimizer.state[w] = {name: each if name == "step" else each.to(w.device)
                                  for name, each in state.items()}


class Course:
    """AdamW without weight decay on `params` {name: fp32 tensor}; what is best on held-out
    text is kept, rounded to the dtypes `stored` {name: dtype}.

    folder: a TensorFolder in which a killed run finds all of it again; None: none.
    """

    def __init__(self, params, options, stored, folder=None, name="training"):
        self.params = params
        self.lr = options["lr"]
        self.every = options["every"]           # steps between evaluations
        self.patience = options.get("patience", 0)      # of them without a better one; 0: any
        self.stored = stored
        self.folder = folder
        self.name = name
        self.optimizer = torch.optim.AdamW(params.values(), weight_decay=0.0)
        self.step = 0
        self.log = []                           # [step, held-out loss]
        self.best = None                        # {name: tensor}
        found = folder.latest(name) if folder else None
        if found:
            self.load(*found)

    def update(self, share):
        """One step by the gradient that was added, at `share` of the peak rate."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * share
        torch.nn.utils.clip_grad_norm_(self.params.values(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1

    @torch.no_grad()
    def give(self, values):
        for key, w in self.params.items():
            w.copy_(values[key])

    def judge(self, held_loss):
        """Note held_loss() of the parameters as they would be stored; a state is saved."""
        exact = {key: w.detach().clone() for key, w in self.params.items()}
        rounded = {key: w.to(self.stored[key]) for key, w in exact.items()}
        self.give(rounded)
        loss = held_loss()
        self.give(exact)
        if not self.log:
            check_finite(loss, "the held-out loss before the first step")
        if loss < min((each for _, each in self.log), default=math.inf):
            self.best = rounded
        self.log.append([self.step, loss])
        if self.folder:
            self.save()

    @property
    def since_best(self):
        """How many evaluations ago the best was."""
        losses = [loss for _, loss in self.log]
        return len(losses) - 1 - losses.index(min(losses))

    def save(self):
        tensors = training_tensors(self.params, self.optimizer)
        tensors |= {f"{key}:best": w for key, w in self.best.items()}
        note = {"step": self.step, "log": self.log}
        self.folder.save_state(self.name, self.step, tensors, note)

    def load(self, note, tensors):
        self.step = note["step"]
        self.log = note["log"]
        take_training(self.params, self.optimizer, tensors, self.step)
        self.best = {key: tensors[f"{key}:best"].clone() for key in self.params}


def learn(course, steps, gradient, held_loss, share):
    """Train a Course's parameters and give them their best values; yields [step, held-out
    loss].

    gradient(step) adds the gradient of a step's loss; share(step) is that of the peak rate.
    Ends after `steps`, or when the course's patience does.
    """
    if not course.log:
        course.judge(held_loss)
    yield course.log[-1]
    for step in told("steps", range(course.step, steps)):
        if 0 < course.patience <= course.since_best:
            break
        gradient(step)
        course.update(share(step))
        if course.step % course.every == 0 or course.step == steps:
            course.judge(held_loss)
            yield course.log[-1]
    course.give(course.best)
