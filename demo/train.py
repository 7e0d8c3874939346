"""Train the bundled demo model, tokenizer and weights, from the running Python's library.

    python demo/train.py --out /tmp/demo            # hours on a laptop's CPU, minutes on a GPU

The text is the source of its standard library. The checkpoint kept is the one with the lowest
perplexity on the held-out files; nothing else decides.
"""
import argparse
import json
import math
import platform
import sys
import time
from dataclasses import dataclass
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
from support.texts import stdlib_rows

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
TOKENS_A_STEP = 2048
WARMUP = 200                        # steps
WEIGHT_DECAY = 0.3
DROPOUT = 0.1
LENGTHS = (256, 512)                # of windows; of 512 for the last tenth of the steps


# ------------------------------------------------------------ operations
def fp32_attention(q, k, v):
    """The fused kernel's backward on a CPU is half again as fast in fp32 as in bf16."""
    with torch.autocast(q.device.type, enabled=False):
        return attention(q.float(), k.float(), v.float())


def dropout(x):
    """One mask for all tokens of a window, x (B, …, T, D): a tenth as many random numbers,
    which a CPU draws slowly."""
    return x * F.dropout(torch.ones_like(x[..., :1, :]), DROPOUT)


def regularised(device):
    """A block's operations in training."""
    mix = fp32_attention if device == "cpu" else attention
    return SimpleNamespace(**vars(PLAIN) | {
        "attention": lambda q, k, v: dropout(mix(q, k, v)),
        "silu": lambda x: dropout(F.silu(x)),
    })


# ------------------------------------------------------------ text
def train_tokenizer(rows, out):
    """SentencePiece BPE with LLaMA's settings (byte fallback, split digits, no normalisation),
    2,048 pieces."""
    lines = (line for row in rows for line in row.split("\n") if line.strip())
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines, model_prefix=str(out / "tokenizer"), model_type="bpe",
        vocab_size=2048, byte_fallback=True, split_digits=True, character_coverage=0.9995,
        normalization_rule_name="identity", remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True, max_sentence_length=100_000, num_threads=2,
        minloglevel=2)
    (out / "tokenizer.vocab").unlink()
    return sentencepiece.SentencePieceProcessor(model_file=str(out / "tokenizer.model"))


@dataclass
class Text:
    """The library's source as token ids."""

    train_files: int
    test_files: int
    stream: torch.Tensor            # (tokens,) of the files to train on, one after another
    held_out: torch.Tensor          # (windows, 256)


def read_text(out, device):
    """Train the tokenizer, too."""
    train, test = (stdlib_rows(split) for split in ("train", "test"))
    tokenizer = train_tokenizer(train, out)
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


def optimizers_of(model, lr):
    """Muon for the matrices inside the blocks, AdamW for embeddings, head and norms: the usual
    division (Jordan et al., 2024)."""
    hidden = [w for w in model.model.layers.parameters() if w.dim() == 2]
    tables = [model.model.embed_tokens.weight, model.lm_head.weight]
    norms = [w for w in model.parameters() if w.dim() < 2]
    groups = [{"params": tables, "weight_decay": WEIGHT_DECAY},
              {"params": norms, "weight_decay": 0}]
    return [torch.optim.Muon(hidden, lr=lr, weight_decay=WEIGHT_DECAY,
                             adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.99), fused=True)]


def set_rate(optimizers, lr):
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr


def draw_batch(stream, T):
    """TOKENS_A_STEP tokens as windows (…, T + 1): inputs, and each one's next token."""
    at = torch.randint(len(stream) - T - 1, (TOKENS_A_STEP // T,))
    return torch.stack([stream[i:i + T + 1] for i in at])


def update(model, ops, optimizers, batch):
    """One step; returns the loss, a tensor."""
    with torch.autocast(batch.device.type, torch.bfloat16):
        logits = model(batch[:, :-1], ops)
    loss = F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return loss.detach()


@torch.no_grad()
def perplexity(model, windows):
    """Perplexity over windows (N, 256): 255 targets each."""
    model.eval()
    nll = 0.0
    for batch in windows.split(32):
        with torch.autocast(batch.device.type, torch.bfloat16):
            logits = model(batch)
        logits = logits[:, :-1].float().flatten(0, 1)
        nll += F.cross_entropy(logits, batch[:, 1:].flatten(), reduction="sum").item()
    model.train()
    return math.exp(nll / (windows.shape[0] * (windows.shape[1] - 1)))


# ------------------------------------------------------------ the command
def save(model, out):
    state = {name: w.detach().to(torch.bfloat16).cpu().contiguous()
             for name, w in model.state_dict().items()}
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(CONFIG, indent=1) + "\n")


def write_log(out, args, text, model, log):
    """train.json: with what and on what it was trained, and every evaluation."""
    facts = {
        "arguments": vars(args) | {"out": None},
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": text.held_out.device.type,
        "threads": torch.get_num_threads(),
        "parameters": sum(w.numel() for w in model.parameters()),
        "train_files": text.train_files,
        "train_tokens": len(text.stream),
        "held_out_files": text.test_files,
        "held_out_tokens": text.held_out.numel(),
        "best_held_out_ppl": min(row["held_out_ppl"] for row in log),
        "log": log,
    }
    (out / "train.json").write_text(json.dumps(facts, indent=1) + "\n")


def parse_arguments():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", required=True,
                   help="folder for model.safetensors, config.json, tokenizer.model")
    p.add_argument("--tokens", type=float, default=17e6,
                   help="training tokens (default 17e6, five epochs)")
    p.add_argument("--lr", type=float, default=3e-3)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--every", type=int, default=800, help="steps between evaluations")
    p.add_argument("--compile", action="store_true",
                   help="compile the model (needs a C++ compiler on a CPU)")
    return p.parse_args()


def main():
    args = parse_arguments()
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(args.seed)
    text = read_text(out, device)
    print(f"{text.train_files} files, {len(text.stream):,} tokens to train on; "
          f"{text.test_files} files, {text.held_out.numel():,} held out", flush=True)

    model = new_model(device)
    optimizers = optimizers_of(model, args.lr)
    forward = torch.compile(model, dynamic=False) if args.compile else model
    ops = regularised(device)
    steps = int(args.tokens / TOKENS_A_STEP)
    best = math.inf
    log = []
    start = time.time()
    for step in range(1, steps + 1):
        # Linear warm-up, then linear decay to zero.
        decay = (steps - step) / (steps - WARMUP)
        set_rate(optimizers, args.lr * min(step / WARMUP, decay))
        # One update.
        T = LENGTHS[step > 0.9 * steps]
        batch = draw_batch(text.stream, T).to(device)
        loss = update(forward, ops, optimizers, batch)
        if step % 50 == 0:
            speed = step * TOKENS_A_STEP / (time.time() - start)
            print(f"step {step}/{steps}  loss {loss:.3f}  {speed:,.0f} tokens/s", flush=True)
        if step % args.every and step < steps:
            continue
        # An evaluation; the best checkpoint so far is kept.
        ppl = perplexity(model, text.held_out)
        log.append({"step": step, "tokens": step * TOKENS_A_STEP, "held_out_ppl": ppl,
                    "seconds": time.time() - start})
        kept = " (kept)" if ppl < best else ""
        print(f"step {step}: held-out perplexity {ppl:.3f}{kept}", flush=True)
        if ppl < best:
            best = ppl
            save(model, out)
        write_log(out, args, text, model, log)


if __name__ == "__main__":
    main()
