"""Stage 1: text -> tokens -> windows, and the forward sweep: block inputs and Gram matrices ΣXXᵀ, block by block.

Alone, it writes the windows it would calibrate on:  python calibrate.py --ckpt demo --calib stdlib --out w.npy
"""
import functools
import gzip
import hashlib
import http.client
import itertools
import json
import os
import random
import re
import shutil
import sys
import sysconfig
import urllib.request
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import sentencepiece
import torch
import torch.nn.functional as F

from model import PLAIN, READS, Checkpoint, InputError, parser, check_target, pick_device, rope, run, sha256, wide

# ---------------------------------------------------------------------------------------------- texts
DATA = Path(__file__).resolve().parent / "data"      # downloads; git-ignored
HUB = "https://huggingface.co/datasets/"
C4 = {"train": "c4-train.00000-of-01024.json.gz", "test": "c4-validation.00000-of-00008.json.gz"}
DOWNLOADS = {   # file: (address, SHA-256). C4 publishes none: the address names a fixed revision, the first sum is kept.
    "wikitext-2-raw-v1.zip": (HUB + "ggml-org/ci/resolve/main/wikitext-2-raw-v1.zip",
                              "ef7edb566e3e2b2d31b29c1fdb0c89a4cc683597484c3dc2517919c615435a11"),
} | {file: (HUB + f"allenai/c4/resolve/1588ec454efa1a09f29cd18ddd04fe05fc8653a2/en/{file}", None) for file in C4.values()}
NOT_SOURCE = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
GENERATED = re.compile(r"(auto-?|automatically |is )generated|Mapping Codec|system configuration generated", re.I)


@functools.cache
def stdlib_files():
    """{relative path: text} of the library, {"topics/NAME": text} of the documentation; read once for both splits."""
    root, rows = Path(sysconfig.get_paths()["stdlib"]), {}
    for path in root.rglob("*.py"):
        name = path.relative_to(root)
        if not NOT_SOURCE & set(name.parts) and not name.parts[0].startswith("config-"):
            text = path.read_text("utf-8", errors="replace")
            if text.strip() and not GENERATED.search(text[:400]):
                rows[name.as_posix()] = text
    try:
        from pydoc_data.topics import topics
        rows |= {f"topics/{name}": text for name, text in topics.items()}
    except ImportError:                              # some distributions ship Python without its documentation
        pass
    return rows


def stdlib_rows(split):
    """The running interpreter's own library and documentation topics, one row a file, in the order of their paths.

    Left out: tests, generated tables, installed packages. A file is held out ("test") when the hash of its relative
    path says so, 1 in 20; every other one is "train".
    """
    held_out = lambda name: int(hashlib.sha256(name.encode()).hexdigest(), 16) % 20 == 0                 # noqa: E731
    return [text for name, text in sorted(stdlib_files().items()) if held_out(name) == (split == "test")]


def download(name):
    """A file of DOWNLOADS, fetched once into data/. Its SHA-256 is pinned here or kept beside it from the first fetch on.

    Raises InputError without a network or when the sum differs.
    """
    (url, pinned), path = DOWNLOADS[name], DATA / name
    kept = DATA / (name + ".sha256")
    if not path.exists():
        DATA.mkdir(exist_ok=True)
        part = path.with_suffix(".part")
        print(f"fetching {url}", file=sys.stderr)
        try:
            with urllib.request.urlopen(url, timeout=30) as response, open(part, "wb") as f:
                shutil.copyfileobj(response, f)
                if f.tell() != int(response.headers.get("Content-Length", f.tell())):
                    raise OSError("the connection ended early")
            os.replace(part, path)
        except (OSError, http.client.HTTPException) as e:
            raise InputError(f"{name} is not in {DATA} and could not be fetched ({e}); put it there yourself, or use a text that "
                             "needs no network: stdlib, or your own .txt, .jsonl or .npy") from None
        finally:
            part.unlink(missing_ok=True)
    found = sha256(path)
    wanted = pinned or (kept.read_text().strip() if kept.exists() else found)
    if found != wanted:
        raise InputError(f"{path} has SHA-256 {found}, expected {wanted}; delete it, and it is fetched again")
    kept.write_text(found + "\n")
    return path


def rows_of(text, split):
    """Documents of a named text or a file. `split` "train" is for calibration, "test" for evaluation; a file has one.

    Texts: stdlib; wikitext2 (raw); c4 (first 20,000 documents of the first training shard; first 1,100 of the first
    validation shard); a .txt (one document), .raw (WikiText's layout) or .jsonl (key `text`).
    """
    def wikitext(raw):      # as the rows of its published data set: a line with its newline, a blank line as ''
        return [line + "\n" if line.strip() else "" for line in raw.removesuffix("\n").split("\n")]

    def json_lines(lines, name):
        for i, line in enumerate(lines, 1):
            try:
                if line.strip():
                    yield json.loads(line)["text"] + ""
            except (ValueError, KeyError, TypeError):
                raise InputError(f"line {i} of {name} is not a JSON object with a text under the key 'text'") from None
    if text == "stdlib":
        return stdlib_rows(split)
    if text == "wikitext2":
        with zipfile.ZipFile(download("wikitext-2-raw-v1.zip")) as z:
            return wikitext(z.read(f"wikitext-2-raw/wiki.{split}.raw").decode())
    if text == "c4":
        with gzip.open(download(C4[split]), "rt", encoding="utf-8") as f:
            return list(json_lines(itertools.islice(f, 20000 if split == "train" else 1100), C4[split]))
    path = Path(text)
    if path.suffix not in (".txt", ".raw", ".jsonl"):
        raise InputError(f"the text '{text}' is unknown; expected stdlib, wikitext2, c4, or a .txt, .raw, .jsonl or .npy file")
    try:
        content = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"{path} cannot be read as UTF-8 text ({e})") from None
    if path.suffix == ".jsonl":
        return list(json_lines(content.split("\n"), path))
    return wikitext(content) if path.suffix == ".raw" else [content]


# ---------------------------------------------------------------------------------------------- tokens and windows
TOO_SHORT = ("{} is good for {} tokens, fewer than one window of {} (calibration draws each from ten characters a token); "
             "give more text or a smaller --seqlen").format


class Tokenizer:
    """tokenizer.model (SentencePiece) or tokenizer.json beside a checkpoint: encode, decode, `bos` (0 or 1 ids), `eos`.

    Raises InputError when there is none, it cannot be read, or its vocabulary is not the model's.
    """

    def __init__(self, ckpt):
        sp, js = ckpt.folder / "tokenizer.model", ckpt.folder / "tokenizer.json"
        if sp.is_file():
            try:
                t = sentencepiece.SentencePieceProcessor(model_file=str(sp))
            except Exception:
                raise InputError(f"{sp} is not a SentencePiece model; use the weights' own, or remove it where a tokenizer.json "
                                 "lies beside it") from None
            self.encode, size = t.encode, t.vocab_size()
            self.decode = lambda ids: t.decode([i for i in ids if i < size])     # a padded vocabulary has ids without a piece
            self.bos, eos = [t.bos_id()] if t.bos_id() >= 0 else [], t.eos_id()
        elif js.is_file():
            try:
                import tokenizers
            except ImportError:
                raise InputError(f"{js} needs the package tokenizers; install it: pip install tokenizers") from None
            try:
                t = tokenizers.Tokenizer.from_file(str(js))
            except Exception as e:
                raise InputError(f"{js} cannot be read ({e}); use the one that came with the weights") from None
            t.no_truncation(), t.no_padding()
            self.encode = lambda text: t.encode(text, add_special_tokens=False).ids
            self.decode, size = t.decode, t.get_vocab_size()
            self.bos, eos = t.encode("").ids[:1], None      # what the tokenizer itself puts before an empty text
        else:
            raise InputError(f"{ckpt.folder} has no tokenizer.model or tokenizer.json; put the one that came with it there")
        vocab = ckpt.cfg.vocab
        if not 0.9 * vocab <= size <= vocab:
            raise InputError(f"the tokenizer in {ckpt.folder} has {size:,} pieces, the model {vocab:,}; use the model's own")
        named = ckpt.raw.get("eos_token_id") if eos is None else eos
        self.eos = set(named if isinstance(named, list) else [named]) - {None}


def token_array(text, ckpt):
    """A .npy file of token ids as a LongTensor: 1-D (a token stream) or 2-D (the windows themselves)."""
    try:
        ids = np.load(text, allow_pickle=False)
    except (OSError, ValueError, EOFError) as e:
        raise InputError(f"{text} cannot be read as a .npy array ({e})") from None
    if ids.dtype.kind not in "iu" or ids.ndim not in (1, 2) or not ids.size:
        raise InputError(f"{text} holds {ids.dtype} of shape {ids.shape}; expected 1-D or 2-D token ids (integers)")
    if not 0 <= ids.min() <= ids.max() < ckpt.cfg.vocab:
        raise InputError(f"{text} holds token ids {ids.min()} to {ids.max()}; the vocabulary is 0 to {ckpt.cfg.vocab - 1}")
    return torch.from_numpy(ids.astype(np.int64))


def choose(ckpt, text=None, samples=None, seqlen=None):
    """Fill in defaults: (text, windows, tokens a window), the paper's, the checkpoint's config.json's, or a 2-D .npy array's own.

    Raises InputError for a length beyond the model's context.
    """
    defaults = {"text": "wikitext2", "samples": 256, "seqlen": 2048} | (ckpt.raw.get("defaults") or {})
    text = text or defaults["text"]
    if text.endswith(".npy") and (ids := token_array(text, ckpt)).dim() == 2:
        for option, value, found in (("--samples", samples, ids.shape[0]), ("--seqlen", seqlen, ids.shape[1])):
            if value not in (None, found):
                raise InputError(f"{text} holds windows of shape {tuple(ids.shape)}, {option} says {value}; leave {option} out")
        samples, seqlen = ids.shape
    samples = defaults["samples"] if samples is None else samples
    seqlen = min(defaults["seqlen"], ckpt.cfg.context) if seqlen is None else seqlen
    if samples < 1:
        raise InputError(f"--samples is {samples}; expected at least 1")
    if not 2 <= seqlen <= ckpt.cfg.context:
        raise InputError(f"a window has {seqlen} tokens; expected 2 to {ckpt.cfg.context}, the model's context: set --seqlen")
    return text, samples, seqlen


def calibration_windows(text, ckpt, samples=256, seqlen=2048, seed=3):
    """Calibration windows (samples, seqlen) of token ids.

    As the paper's released code takes them: rows joined by a blank line (blank rows dropped), a start uniform in
    characters, 10·T characters tokenized, the first T tokens kept, shorter ones drawn again. From a 1-D array: a start
    uniform in tokens. A 2-D array is returned as it is. Raises InputError for a text shorter than one window.
    """
    rng = random.Random(seed)
    if str(text).endswith(".npy"):
        ids = token_array(text, ckpt)
        if ids.dim() == 2:
            return ids
        if len(ids) < seqlen:
            raise InputError(TOO_SHORT(text, len(ids), seqlen))
        starts = [rng.randint(0, len(ids) - seqlen) for _ in range(samples)]
        return torch.stack([ids[i:i + seqlen] for i in starts])
    joined = "\n\n".join(row for row in rows_of(text, "train") if row.strip())
    tokenizer, windows = Tokenizer(ckpt), []
    if len(joined) <= 10 * seqlen:
        raise InputError(TOO_SHORT(text, len(joined) // 10, seqlen))
    for _ in range(10 * samples):
        start = rng.randint(0, len(joined) - 10 * seqlen - 1)
        ids = tokenizer.bos + tokenizer.encode(joined[start:start + 10 * seqlen])
        if len(ids) >= seqlen:
            windows.append(ids[:seqlen])
            if len(windows) == samples:
                return torch.tensor(windows)
    raise InputError(TOO_SHORT(text, max(len(ids), 1), seqlen))


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


def digest(windows):
    """SHA-256 (hex) of windows of token ids."""
    return hashlib.sha256(f"{tuple(windows.shape)}".encode() + windows.contiguous().numpy().tobytes()).hexdigest()


# ---------------------------------------------------------------------------------------------- the forward sweep
def recording(ops, seen):
    """The operations `ops`, whose linear also notes each layer's input: seen[layer] = x."""
    def linear(layer, x):
        seen[layer] = x.detach()
        return ops.linear(layer, x)
    return SimpleNamespace(**vars(ops) | {"linear": linear})


def add_inputs(stats, block, seen, tokens):
    """Add a batch to the statistics of a block's four distinct inputs: ΣXXᵀ (n, n) and the mean of |x| (n,), both fp64.

    The product is taken in fp32 (fp64 for an fp64 model) and summed in fp64, so that 256 windows lose no digits.
    `tokens`: how many there are in all batches.
    """
    for name in sorted(set(READS.values())):
        x = wide(seen[block.get_submodule(name)]).flatten(0, -2)                # (tokens, n)
        for key, value in ((f"{name}.gram", x.T @ x), (f"{name}.mean_abs", x.abs().sum(0) / tokens)):   # Eq. 1: ΣXXᵀ
            stats[key] = stats[key].add_(value) if key in stats else value.double()


def embed(ckpt, windows, dtype):
    """Token ids (N, T) -> the first block's input (N, T, dim), in host memory."""
    return F.embedding(windows, ckpt.tensor("model.embed_tokens.weight", dtype=dtype))


@torch.no_grad()
def forward_sweep(ckpt, h, device, gram=False, keep=None, start=0, stop=None, tokens=None):
    """Run every window through blocks start to stop - 1 (default: all); only one block's weights are in memory at a time.

    h (N, T, dim), in host memory, is replaced in place by each block's output, unless there is `keep`, a dict: it receives
    {l: block l's input} and, under `stop`, the last output. Yields (l, stats) after block l; with `gram`, stats holds what
    add_inputs collects, for `tokens` calibration tokens in all (default: these).
    """
    angles, batch = rope(ckpt.cfg, h.shape[1], device), max(1, 1024 // h.shape[1])
    stop = ckpt.cfg.n_layers if stop is None else stop
    for l in range(start, stop):
        block, stats = ckpt.block(l, device, h.dtype), {}
        if keep is not None:
            keep[l] = h
        out = h if keep is None else torch.empty_like(h)
        for i in range(0, len(h), batch):
            seen = {}
            out[i:i + batch] = block(h[i:i + batch].to(device), angles, recording(PLAIN, seen) if gram else PLAIN)
            if gram:
                add_inputs(stats, block, seen, tokens or h.shape[0] * h.shape[1])
        h = out
        yield l, stats
    if keep is not None:
        keep[stop] = h


def add_calibration_arguments(parser):
    parser.add_argument("--calib", help="calibration text: stdlib, wikitext2 (default; demo stdlib), c4, or a file's path")
    parser.add_argument("--samples", type=int, help="calibration windows (default 256; demo 64)")
    parser.add_argument("--seqlen", type=int, help="tokens a window, calibration and evaluation (default 2048; demo 256)")
    parser.add_argument("--seed", type=int, default=3)


def main():
    p = parser(__doc__)
    add_calibration_arguments(p)
    p.add_argument("--out", help="write the windows (N, T) to this .npy file")
    args = p.parse_args()
    check_target(args.out)
    ckpt = Checkpoint(args.ckpt)
    device, dtype, _ = pick_device(args.device, args.dtype)
    text, samples, seqlen = choose(ckpt, args.calib, args.samples, args.seqlen)
    windows = calibration_windows(text, ckpt, samples, seqlen, args.seed)
    print(f"{text}: {windows.shape[0]} windows of {windows.shape[1]} tokens, sha256 {digest(windows)[:16]}")
    if args.out:
        with open(args.out, "wb") as f:
            np.save(f, windows.numpy())
    print("block  condition number of ΣXXᵀ, for each distinct layer input")
    for l, stats in forward_sweep(ckpt, embed(ckpt, windows, dtype), device, gram=True):
        print(f"{l:>5}  " + "   ".join(f"{key.split('.')[1]} {torch.linalg.cond(gram):.1e}" for key, gram in stats.items()
                                       if key.endswith("gram")), flush=True)


if __name__ == "__main__":
    run(main)
