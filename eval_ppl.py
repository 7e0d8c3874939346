"""Stage 4: perplexity of a dense or compressed checkpoint, and the divergence between two.

    python eval_ppl.py --ckpt llama7b.safetensors --text wikitext2
    python eval_ppl.py --ckpt out/demo-air-0.6 --against demo

Convention: the text's rows joined by a blank line, tokenized once with one BOS, cut into ⌊tokens/T⌋ disjoint windows of T,
T-1 targets each. WikiText-2 raw test is 341,469 LLaMA tokens, 166 windows of 2,048.
"""
import math
import sys

import torch
import torch.nn.functional as F

from calibrate import embed, forward_sweep
from model import to_logits
from support.checkpoint import Checkpoint
from support.script import InputError, check_target, parser, pick_device, run, write_json
from support.texts import TOO_SHORT, Tokenizer, choose, rows_of, token_array


def js_divergence(logits_p, logits_q):
    """Jensen-Shannon divergence in bits, 0 to 1, between softmax(p) and softmax(q) (…, vocab) -> (…)."""
    p, q = logits_p.float().log_softmax(-1), logits_q.float().log_softmax(-1)
    mix = torch.logaddexp(p, q) - math.log(2)
    return (p.exp() * (p - mix) + q.exp() * (q - mix)).sum(-1).clamp_min(0) / (2 * math.log(2))


def evaluation_windows(text, ckpt, seqlen=2048):
    """Every disjoint window of a text: ((N, seqlen) token ids, tokens in the text, tokens per UTF-8 byte or None for .npy).

    Rows joined by a blank line, tokenized once with one BOS, ⌊tokens/seqlen⌋ windows.
    """
    per_byte = None
    if str(text).endswith(".npy"):
        ids = token_array(text, ckpt)
        if ids.dim() == 2:
            return ids, ids.numel(), None
    else:
        joined, tokenizer = "\n\n".join(rows_of(text, "test")), Tokenizer(ckpt)
        ids = torch.tensor(tokenizer.bos + tokenizer.encode(joined))
        per_byte = len(ids) / max(1, len(joined.encode()))
    if (n := len(ids) // seqlen) == 0:
        raise InputError(TOO_SHORT(text, len(ids), seqlen))
    return ids[:n * seqlen].view(n, seqlen), len(ids), per_byte


@torch.no_grad()
def evaluate(ckpt, windows, device, dtype, against=None, tokens_per_byte=None):
    """Next-token loss over windows (N, T): {"nll" nats a token, "ppl", "bits_per_byte", "js" bits a token, "nonfinite" tokens}.

    Streams block by block, so the model may be larger than memory. A token whose logits are not finite is counted in
    "nonfinite" and said on stderr, and nll and ppl are then NaN: no token is dropped. js is the mean over the same tokens of
    the Jensen-Shannon divergence (base 2) to the checkpoint `against`. Without what they need, bits_per_byte and js are None.
    """
    hidden, heads = [], []
    for each in (ckpt, against) if against else (ckpt,):
        h = embed(each, windows, dtype)
        for _ in forward_sweep(each, h, device):
            pass
        hidden.append(h)
        heads.append((*each.head(device, dtype), each.cfg))
    nll = js = torch.zeros((), dtype=torch.float64, device=device)
    bad, batch = 0, max(1, 2**23 // (windows.shape[1] * ckpt.cfg.vocab))
    for i in range(0, len(windows), batch):
        logits = [to_logits(h[i:i + batch, :-1].to(device), *head) for h, head in zip(hidden, heads)]
        targets = windows[i:i + batch, 1:].to(device)
        nll = nll + F.cross_entropy(logits[0].flatten(0, 1).float(), targets.flatten(), reduction="sum")
        bad += sum((~torch.isfinite(each).all(-1)).sum().item() for each in logits)
        if against:
            js = js + js_divergence(*logits).sum()
    tokens = windows[:, 1:].numel()
    if bad:
        print(f"{bad:,} of {tokens:,} tokens have logits that are not finite: the perplexity is not a number", file=sys.stderr)
    nll = nll.item() / tokens if not bad else math.nan
    return {"nll": nll, "ppl": math.exp(min(nll, 700)), "bits_per_byte": tokens_per_byte and nll / math.log(2) * tokens_per_byte,
            "js": js.item() / tokens if against else None, "nonfinite": bad}


def main():
    p = parser(__doc__)
    p.add_argument("--text", help="stdlib, wikitext2 (default; demo stdlib), c4, or a .txt, .raw, .jsonl, .npy file")
    p.add_argument("--seqlen", type=int, help="tokens a window (default 2048; demo 256)")
    p.add_argument("--against", metavar="DENSE", help="also report the Jensen-Shannon divergence to this checkpoint")
    p.add_argument("--json", metavar="FILE", help="write the results to FILE")
    args = p.parse_args()
    check_target(args.json)
    ckpt = Checkpoint(args.ckpt)
    against = Checkpoint(args.against) if args.against else None
    if against and against.cfg.vocab != ckpt.cfg.vocab:
        raise InputError(f"--against has {against.cfg.vocab} token ids, --ckpt {ckpt.cfg.vocab}; expected the same")
    device, dtype, why = pick_device(args.device, args.dtype)
    text, _, seqlen = choose(ckpt, args.text, None, args.seqlen)
    if against:
        choose(against, text, None, seqlen)         # its context must hold the windows too
    windows, tokens, per_byte = evaluation_windows(text, ckpt, seqlen)
    print(f"{args.ckpt} on {device}, {str(dtype)[6:]} ({why})", file=sys.stderr)
    result = evaluate(ckpt, windows, device, dtype, against, per_byte)
    print(f"perplexity {result['ppl']:.4f}   {text}, {len(windows)} windows of {seqlen} ({tokens:,} tokens in the text)")
    if per_byte:
        print(f"per byte   {2 ** result['bits_per_byte']:.4f}   {result['bits_per_byte']:.4f} bits a byte")
    if against:
        # Table 12 prints the same quantity as a negative percentage: 0 % identical, -100 % disjoint.
        print(f"JS divergence {result['js']:.4f} bits   (paper's sign: {-100 * result['js']:.1f} %)")
    write_json(args.json, result | {"tokens": tokens, "windows": len(windows), "seqlen": seqlen, "text": text})


if __name__ == "__main__":
    run(main)
