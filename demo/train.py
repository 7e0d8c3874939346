"""Train the bundled demo model, tokenizer and weights, from the running Python's library.

    python demo/train.py --out /tmp/demo            # hours on a laptop's CPU, minutes on a GPU

The text is the source of its standard library. The checkpoint kept is the one with the lowest
perplexity on the held-out files; nothing else decides. A killed run goes on where it was.
"""
import io
import json
import math
import os
import platform
import re
import shutil
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import sentencepiece
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from model import PLAIN, Llama, attention
from support.config import parse_config
from support.script import InputError, Parser, check_seed, run, usual_mode, write_whole
from support.texts import digest, stdlib_rows

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "vocab_size": 2048,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
    # What support.texts.with_defaults takes.
    "defaults": {"text": "stdlib", "samples": 64, "seqlen": 256},
}
MICRO_BATCH = 2048                  # tokens whose activations are in memory at a time
WARMUP = 100                        # steps
LAST_RATE = 0.1                     # of the peak, where the cosine ends, as LLaMA's does
LENGTHS = (256, 512)                # of windows; of 512 for the last tenth of the steps
EVERY = 50                          # steps between saved states
# What a folder may not hold unless a killed run's state lies there.
OTHERS = ("*.safetensors*", "*.bin*", "*.pt", "*.pth", "config.json", "train.json")


# ------------------------------------------------------------ operations
def fp32_attention(q, k, v):
    """The fused kernel's backward on a CPU is half again as fast in fp32 as in bf16."""
    with torch.autocast(q.device.type, enabled=False):
        return attention(q.float(), k.float(), v.float())


def regularised(device, share):
    """A block's operations in training: `share` of attention's output and of the MLP's gate
    is dropped."""
    mix = fp32_attention if device == "cpu" else attention

    def dropout(x):
        # One mask for all tokens of a window, x (B, …, T, D): a tenth as many random numbers,
        # which a CPU draws slowly.
        return x * F.dropout(torch.ones_like(x[..., :1, :]), share)

    if not share:
        return SimpleNamespace(**vars(PLAIN) | {"attention": mix})
    return SimpleNamespace(**vars(PLAIN) | {
        "attention": lambda q, k, v: dropout(mix(q, k, v)),
        "silu": lambda x: dropout(F.silu(x)),
    })


# ------------------------------------------------------------ text
def train_tokenizer(rows, path):
    """SentencePiece BPE with LLaMA's settings (byte fallback, split digits, no normalisation),
    2,048 pieces, written to `path`. Raises InputError where another one is there."""
    lines = (line for row in rows for line in row.split("\n") if line.strip())
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines, model_writer=model, model_type="bpe",
        vocab_size=2048, byte_fallback=True, split_digits=True, character_coverage=0.9995,
        normalization_rule_name="identity", remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True, max_sentence_length=100_000, num_threads=2,
        minloglevel=2)
    if path.exists() and path.read_bytes() != model.getvalue():
        raise InputError(f"{path} is another text's; name another --out")
    write_whole(path, model.getvalue())


@dataclass
class Text:
    """The library's source as token ids."""

    train_files: int
    test_files: int
    stream: torch.Tensor            # (tokens,) of the files to train on, one after another
    held_out: torch.Tensor          # (windows, 256)


def read_text(out, device):
    """Train the tokenizer, too, where a run that was killed has not."""
    train, test = (stdlib_rows(split) for split in ("train", "test"))
    trained = out / "tokenizer.model"
    if not (out / "train.pt").exists():
        train_tokenizer(train, trained)
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(trained))
    bos = tokenizer.bos_id()
    eos = tokenizer.eos_id()
    ids = np.concatenate([[bos, *tokenizer.encode(row), eos] for row in train])
    held_out = torch.tensor([bos, *tokenizer.encode("\n\n".join(test))])
    held_out = held_out[:len(held_out) // 256 * 256].view(-1, 256)
    return Text(len(train), len(test), torch.from_numpy(ids), held_out.to(device))


# ------------------------------------------------------------ training
def new_model(device):
    """GPT-2's initialisation: residual projections start smaller by the depth of the stack."""
    model = Llama(parse_config(CONFIG)).to(device)
    for name, w in model.named_parameters():
        std = 0.02
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            std = 0.02 / math.sqrt(2 * model.cfg.n_layers)
        if w.dim() == 2:
            torch.nn.init.normal_(w, std=std)
    return model


def optimizers_of(model, args):
    """AdamW; with "muon" the matrices inside the blocks by Muon: the usual division (Jordan
    et al., 2024)."""
    hidden = [w for w in model.model.layers.parameters() if w.dim() == 2]
    tables = [model.model.embed_tokens.weight, model.lm_head.weight]
    norms = [w for w in model.parameters() if w.dim() < 2]
    decay = {"weight_decay": args.weight_decay}
    first = []
    if args.optimizer == "muon":
        first = [torch.optim.Muon(hidden, lr=args.lr, adjust_lr_fn="match_rms_adamw", **decay)]
        hidden = []
    groups = [{"params": hidden + tables, **decay}, {"params": norms, "weight_decay": 0}]
    return [*first, torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=True)]


def rate_at(step, steps):
    """Share of the peak learning rate: linear warm-up, then a cosine."""
    if step < WARMUP:
        return step / WARMUP
    done = (step - WARMUP) / max(1, steps - WARMUP)
    return LAST_RATE + (1 - LAST_RATE) * (1 + math.cos(math.pi * done)) / 2


def draw_batch(stream, T):
    """MICRO_BATCH tokens as windows (…, T + 1): inputs, and each one's next token."""
    at = torch.randint(len(stream) - T - 1, (MICRO_BATCH // T,))
    return torch.stack([stream[i:i + T + 1] for i in at])


def products(device, dtype):
    """Matrix products in `dtype`: autocast, where that is bf16."""
    return torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16)


def update(model, forward, optimizers, batches):
    """One step, over micro-batches; returns their mean loss, a tensor."""
    total = 0
    for batch in batches:
        logits = forward(batch[:, :-1])
        loss = F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        loss = loss / len(batches)
        loss.backward()
        total += loss.detach()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return total


@torch.no_grad()
def perplexity(model, windows, dtype):
    """Perplexity over windows (N, 256): 255 targets each."""
    model.eval()
    nll = 0.0
    for batch in windows.split(32):
        with products(batch.device.type, dtype):
            logits = model(batch)
        logits = logits[:, :-1].float().flatten(0, 1)
        nll += F.cross_entropy(logits, batch[:, 1:].flatten(), reduction="sum").item()
    model.train()
    return math.exp(nll / (windows.shape[0] * (windows.shape[1] - 1)))


# ------------------------------------------------------------ the command
def save(model, out):
    """The checkpoint, as bf16."""
    out.mkdir(parents=True, exist_ok=True)
    state = {name: w.detach().to(torch.bfloat16).cpu().contiguous()
             for name, w in model.state_dict().items()}
    save_file(state, out / "model.partial", metadata={"format": "pt"})
    usual_mode(out / "model.partial")
    os.replace(out / "model.partial", out / "model.safetensors")
    write_whole(out / "config.json", json.dumps(CONFIG, indent=1) + "\n")


def named(args):
    """{argument: value} of what decides a run: not of where it is written."""
    return vars(args) | {"out": None}


@dataclass
class Training:
    """What a killed run needs to go on; in OUT/train.pt."""

    model: Llama
    optimizers: list
    step: int = 0
    seconds: float = 0.0
    log: list = field(default_factory=list)             # the evaluations

    @property
    def best(self):
        return min((row["held_out_ppl"] for row in self.log), default=math.inf)

    def save(self, path, args, text):
        state = {"model": self.model.state_dict(), "step": self.step, "log": self.log,
                 "optimizers": [each.state_dict() for each in self.optimizers],
                 "seconds": self.seconds, "random": torch.get_rng_state(),
                 "random on GPUs": torch.cuda.get_rng_state_all(),
                 "arguments": named(args), "text": digest(text.stream)}
        torch.save(state, f"{path}.partial")
        os.replace(f"{path}.partial", path)

    def load(self, path, args, text):
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            arguments = state["arguments"]
        except Exception:
            raise InputError(f"{path} is not what a killed run left; name another "
                             "--out") from None
        if arguments != named(args):
            raise InputError(f"{path} is of a run with other arguments, "
                             f"{arguments}; expected the same, or another --out")
        if state["text"] != digest(text.stream):
            raise InputError(f"{path} is of a run on another text, as another Python's library "
                             "is; expected the same Python, or another --out")
        self.model.load_state_dict(state["model"])
        for optimizer, kept in zip(self.optimizers, state["optimizers"]):
            optimizer.load_state_dict(kept)
        torch.set_rng_state(state["random"])
        torch.cuda.set_rng_state_all(state["random on GPUs"])
        self.step, self.seconds, self.log = state["step"], state["seconds"], state["log"]


def write_log(out, args, text, training):
    """train.json: with what and on what it was trained, and every evaluation."""
    facts = {
        "arguments": named(args),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": text.held_out.device.type,
        "threads": torch.get_num_threads(),
        "parameters": sum(w.numel() for w in training.model.parameters()),
        "train_files": text.train_files,
        "train_tokens": len(text.stream),
        "held_out_files": text.test_files,
        "held_out_tokens": text.held_out.numel(),
        "best_held_out_ppl": training.best,
        "log": training.log,
    }
    write_whole(out / "train.json", json.dumps(facts, indent=1) + "\n")


def parse_arguments():
    p = Parser(__doc__)
    p.add_argument("--out", required=True,
                   help="folder for model.safetensors, config.json, tokenizer.model")
    p.add_argument("--tokens", type=float, default=32e6,
                   help="training tokens (default 32e6, nine epochs)")
    p.add_argument("--optimizer", choices=("adamw", "muon"), default="adamw")
    p.add_argument("--lr", type=float, default=2e-3, help="its peak (default 2e-3)")
    p.add_argument("--weight-decay", type=float, default=0.1, help="(default 0.1)")
    p.add_argument("--dropout", type=float, default=0.1, help="(default 0.1)")
    p.add_argument("--batch", type=int, default=8192, help="tokens a step (default 8192)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--every", type=int, default=200, help="steps between evaluations")
    p.add_argument("--keep", default="", help="also keep the model at these tokens, such as "
                   "2e6,4e6, each in a folder OUT/TOKENS")
    p.add_argument("--dtype", choices=("float32", "bfloat16"), help="of matrix products "
                   "(default: bfloat16 on a GPU, else float32)")
    p.add_argument("--compile", action="store_true",
                   help="compile the model (needs a C++ compiler on a CPU)")
    return p.parse_args()


def check_arguments(args):
    """Raise InputError for an option out of its range."""
    check_seed(args.seed)
    batch, tokens = args.batch, args.tokens
    ranges = {          # option: (value, whether it may be, what is expected)
        "--batch": (batch, batch > 0 and batch % MICRO_BATCH == 0, f"a multiple of {MICRO_BATCH}"),
        "--tokens": (tokens, batch <= tokens < math.inf, "a --batch or more"),
        "--every": (args.every, args.every > 0, "1 or more"),
        "--lr": (args.lr, 0 < args.lr < math.inf, "a number above 0"),
        "--weight-decay": (args.weight_decay, 0 <= args.weight_decay < math.inf, "0 or more"),
        "--dropout": (args.dropout, 0 <= args.dropout < 1, "0 or more, below 1"),
    }
    for option, (value, allowed, expected) in ranges.items():
        if not allowed:
            raise InputError(f"{option} is {value}; expected {expected}")


def steps_to_keep(args):
    """{step: folder's name} of --keep. Raises InputError."""
    found = {}
    for text in args.keep.split(",") if args.keep else ():
        if not re.fullmatch(r"\d+(\.\d+)?(e\d+)?", text):
            raise InputError(f"--keep is {args.keep}; expected numbers of tokens such as 2e6,4e6")
        if not args.batch <= float(text) <= args.tokens:
            raise InputError(f"--keep has {text}; expected a --batch, {args.batch}, or more, at "
                             f"most --tokens, {args.tokens:g}")
        found[int(float(text) / args.batch)] = f"{float(text) / 1e6:g}M"
    return found


def main():
    args = parse_arguments()
    check_arguments(args)
    keep = steps_to_keep(args)
    out = Path(args.out)
    killed = (out / "train.pt").exists()
    there = [path for pattern in OTHERS for path in out.glob(pattern)]
    if there and not killed:
        raise InputError(f"{out} holds a model that no killed run left; name another --out")
    out.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, args.dtype or ("bfloat16" if device == "cuda" else "float32"))
    torch.manual_seed(args.seed)
    text = read_text(out, device)
    print(f"{text.train_files} files, {len(text.stream):,} tokens to train on; "
          f"{text.test_files} files, {text.held_out.numel():,} held out", flush=True)

    model = new_model(device)
    training = Training(model, optimizers_of(model, args))
    if killed:
        training.load(out / "train.pt", args, text)
        print(f"going on after step {training.step}", flush=True)
    else:
        training.save(out / "train.pt", args, text)         # from here on all in `out` is ours
    compiled = torch.compile(model, dynamic=False) if args.compile else model
    ops = regularised(device, args.dropout)

    def forward(ids):
        with products(device, dtype):
            return compiled(ids, ops)

    steps = int(args.tokens / args.batch)
    start = time.time() - training.seconds
    while training.step < steps:
        training.step += 1
        for optimizer in training.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = args.lr * rate_at(training.step, steps)
        # One update.
        T = LENGTHS[training.step > 0.9 * steps]
        batches = [draw_batch(text.stream, T).to(device)
                   for _ in range(args.batch // MICRO_BATCH)]
        loss = update(model, forward, training.optimizers, batches)
        training.seconds = time.time() - start
        if training.step % 10 == 0:
            speed = training.step * args.batch / training.seconds
            print(f"step {training.step}/{steps}  loss {loss:.3f}  {speed:,.0f} tokens/s",
                  flush=True)
        # An evaluation; the best checkpoint so far is kept, and those asked for.
        if training.step % args.every == 0 or training.step in keep or training.step == steps:
            best = training.best
            ppl = perplexity(model, text.held_out, dtype)
            training.seconds = time.time() - start
            training.log.append({"step": training.step, "tokens": training.step * args.batch,
                            "held_out_ppl": ppl, "seconds": training.seconds})
            kept = " (kept)" if ppl < best else ""
            print(f"step {training.step}: held-out perplexity {ppl:.3f}{kept}", flush=True)
            if ppl < best:
                save(model, out)
            if training.step in keep:
                save(model, out / keep[training.step])
                shutil.copy(out / "tokenizer.model", out / keep[training.step])
            write_log(out, args, text, training)
        if training.step % EVERY == 0 or training.step % args.every == 0 or training.step == steps:
            training.save(out / "train.pt", args, text)


if __name__ == "__main__":
    run(main)
