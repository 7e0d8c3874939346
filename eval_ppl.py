"""Stage 4: perplexity of a dense or compressed checkpoint, divergence between two.

    python eval_ppl.py --ckpt llama7b.safetensors --text wikitext2
    python eval_ppl.py --ckpt out/demo-air-0.6 --against demo

Convention: the text's rows joined by a blank line, tokenized once with one BOS, cut
into ⌊tokens/T⌋ disjoint windows of T, T-1 targets each. WikiText-2 raw test is 341,469
LLaMA tokens, 166 windows of 2,048. --windows takes some of them, evenly spaced.

Shapes: N windows, T tokens a window.
"""
import math
import sys

import torch
import torch.nn.functional as F

from calibrate import embed, forward_sweep
from model import to_logits
from support.checkpoint import Checkpoint
from support.progress import Progress, told
from support.script import (InputError, check_results, parser, pick_device, run,
                            write_json)
from support.texts import (is_array, own_windows, rows_of, token_array, too_short,
                           with_defaults)
from support.tokenizer import Tokenizer


def evaluation_windows(text, ckpt, seqlen=2048, count=None):
    """Every disjoint window of a text: ((N, seqlen) ids, tokens in all, tokens a byte).

    The last is None for a .npy file. With `count`, that many of them, evenly spaced:
    numbers ⌊i·N/count⌋ of 0 … N-1. Raises InputError for a text shorter than one window,
    or than `count` of them.
    """
    per_byte = None
    if is_array(text):
        own = own_windows(text, ckpt)
        if own is not None:
            return evenly(own, count, text), own.numel(), None
        ids = token_array(text, ckpt)
    else:
        joined = "\n\n".join(rows_of(text, "test"))
        tokenizer = Tokenizer(ckpt)
        ids = torch.tensor(tokenizer.bos + tokenizer.encode(joined))
        per_byte = len(ids) / max(1, len(joined.encode()))
    n = len(ids) // seqlen
    if n == 0:
        raise too_short(text, len(ids), seqlen)
    windows = ids[:n * seqlen].view(n, seqlen)
    return evenly(windows, count, text), len(ids), per_byte


def evaluation(text, ckpt, seqlen, args):
    """What evaluation_windows returns for a command's --text, --seqlen and --windows; None for
    the text "none". seqlen: tokens a window, but of a .npy file that brings its own."""
    if text == "none":
        return None
    length = seqlen if own_windows(text, ckpt) is None else args.seqlen
    _, _, length = with_defaults(ckpt, text, None, length)
    return evaluation_windows(text, ckpt, length, args.windows)


def evenly(windows, count, text):
    """`count` of N windows, numbers ⌊i·N/count⌋; all for None. Raises InputError."""
    N = len(windows)
    if count is None:
        return windows
    if not 1 <= count <= N:
        raise InputError(f"--windows is {count}, and {text} has {N} windows of "
                         f"{windows.shape[1]}; expected 1 to {N}, or none to take all")
    return windows[[i * N // count for i in range(count)]]


def windows_line(windows, tokens):
    """'752 windows of 256', or '24 of 752 …, evenly spaced', of a text's `tokens`."""
    n, T = windows.shape
    whole = tokens // T
    if n == whole:
        return f"{n} windows of {T}"
    return f"{n} of {whole} windows of {T}, evenly spaced"


@torch.no_grad()
def last_states(ckpt, windows, device, dtype):
    """(The last block's output (N, T, dim) in host memory, ckpt): `evaluate` reads it."""
    h = embed(ckpt, windows, dtype)
    for _ in forward_sweep(ckpt, h, device):
        pass
    return h, ckpt


def js_divergence(logits_p, logits_q):
    """Jensen-Shannon divergence of softmax(p), softmax(q): (…, vocab) -> (…), in bits.

    ½ KL(p‖m) + ½ KL(q‖m) with m = (p + q)/2.
    """
    p = logits_p.float().log_softmax(-1)
    q = logits_q.float().log_softmax(-1)
    m = torch.logaddexp(p, q) - math.log(2)
    nats = (p.exp() * (p - m) + q.exp() * (q - m)).sum(-1) / 2
    return nats.clamp_min(0) / math.log(2)


@torch.no_grad()
def evaluate(ckpt, windows, device, dtype, against=None):
    """Next-token loss over windows (N, T): {"nll", "ppl", "js", "nonfinite"}.

    Streams block by block, so the model may be larger than memory. A token whose logits
    are not finite is counted in "nonfinite", and nll (nats a token) and ppl are then
    NaN: no token is dropped. js, bits a token, is the mean divergence to another
    checkpoint, `against` = last_states(…) of the same windows; None without it, NaN where
    logits of either are not finite.
    """
    states = [last_states(ckpt, windows, device, dtype)] + ([against] if against else [])
    heads = [each.head(device, dtype) for _, each in states]
    nll = js = torch.zeros((), dtype=torch.float64, device=device)
    nonfinite = 0
    batch = max(1, 2**23 // (windows.shape[1] * ckpt.cfg.vocab))
    for i in told("head: windows", range(0, len(windows), batch)):
        # Every token but the last predicts the next one.
        targets = windows[i:i + batch, 1:].to(device)
        logits = []
        for (h, each), head in zip(states, heads):
            logits.append(to_logits(h[i:i + batch, :-1].to(device), head, each.cfg))
        ours = logits[0].flatten(0, 1).float()
        nonfinite += (~torch.isfinite(ours).all(-1)).sum().item()
        nll = nll + F.cross_entropy(ours, targets.flatten(), reduction="sum")
        if against:
            js = js + js_divergence(*logits).sum()
    tokens = windows[:, 1:].numel()
    nll = math.nan if nonfinite else nll.item() / tokens
    return {"nll": nll, "ppl": math.exp(min(nll, 700)), "nonfinite": nonfinite,
            "js": js.item() / tokens if against else None}


def per_byte_line(*bits):
    """'per byte   2.1572 -> 2.4700': perplexities a byte, whatever the tokenizer."""
    return "per byte   " + " -> ".join(f"{2 ** each:.4f}" for each in bits)


def bits_per_byte(score, tokens_per_byte):
    """A score's loss in bits a byte of the text; None where its bytes are not known."""
    return score["nll"] / math.log(2) * tokens_per_byte if tokens_per_byte else None


def warn_nonfinite(score, windows):
    if score["nonfinite"]:
        tokens = windows[:, 1:].numel()
        print(f"{score['nonfinite']:,} of {tokens:,} tokens have logits that are not "
              "finite: the perplexity is not a number", file=sys.stderr)


# ------------------------------------------------------------ the command
def parse_arguments():
    p = parser(__doc__)
    p.add_argument("--text", help="stdlib, wikitext2 (default; demo stdlib), c4, "
                   "or a .txt, .raw, .jsonl, .npy file")
    p.add_argument("--seqlen", type=int, help="tokens a window (default 2048; demo 256)")
    p.add_argument("--windows", type=int, metavar="N", help="evaluate on N evenly spaced "
                   "windows of the text's (default: all)")
    p.add_argument("--against", metavar="DENSE",
                   help="also report the Jensen-Shannon divergence to this checkpoint")
    p.add_argument("--json", metavar="FILE", help="write the results to FILE")
    p.add_argument("--quiet", action="store_true", help="print the results only")
    return p.parse_args()


def open_both(args):
    """(checkpoint, the one to compare it with or None). Raises InputError."""
    ckpt = Checkpoint(args.ckpt)
    if args.against is None:
        return ckpt, None
    against = Checkpoint(args.against)
    if against.cfg.vocab != ckpt.cfg.vocab:
        raise InputError(f"--against has {against.cfg.vocab} token ids, "
                         f"--ckpt {ckpt.cfg.vocab}; expected the same")
    return ckpt, against


def check_ids(ours, others):
    """Raise InputError where the other tokenizer gives other windows of token ids."""
    if not torch.equal(ours, others):
        raise InputError("--against has another tokenizer: it gives the text other token ids; "
                         "expected checkpoints of one tokenizer")


def main():
    args = parse_arguments()
    progress = Progress(args.quiet).listen()
    check_results(args.json)
    ckpt, against = open_both(args)
    device, dtype, why = pick_device(args.device, args.dtype)
    text, _, seqlen = with_defaults(ckpt, args.text, None, args.seqlen)
    if against:
        # Its context must hold the windows, too.
        with_defaults(against, text, None, seqlen)
    windows, tokens, tokens_per_byte = evaluation_windows(
        text, ckpt, seqlen, args.windows)
    if against:
        check_ids(windows, evaluation_windows(text, against, seqlen, args.windows)[0])

    progress.say(f"{args.ckpt} on {device}, {str(dtype)[6:]} ({why})")
    dense = last_states(against, windows, device, dtype) if against else None
    result = evaluate(ckpt, windows, device, dtype, dense)
    bits = bits_per_byte(result, tokens_per_byte)
    warn_nonfinite(result, windows)
    print(f"perplexity {result['ppl']:.4f}   {text}, {windows_line(windows, tokens)} "
          f"({tokens:,} tokens in the text)")
    if bits is not None:
        print(f"{per_byte_line(bits)}   {bits:.4f} bits a byte")
    if against:
        # Table 12 prints the same quantity as a negative percentage: -100 % is disjoint.
        js = result["js"]
        if math.isnan(js):
            print("the divergence is not a number: logits of one of both are not finite",
                  file=sys.stderr)
        print(f"JS divergence {js:.4f} bits   (paper's sign: {-100 * js:.1f} %)")
    measured = {"tokens": tokens, "windows": len(windows), "seqlen": seqlen, "text": text,
                "windows_in_text": tokens // seqlen}
    write_json(args.json, result | {"bits_per_byte": bits} | measured)


if __name__ == "__main__":
    run(main)
