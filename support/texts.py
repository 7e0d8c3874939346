"""Texts and tokens: corpora by name or from files, downloads by checksum, tokenizers, arrays of token ids, defaults."""
import functools
import gzip
import hashlib
import http.client
import itertools
import json
import os
import re
import shutil
import sys
import sysconfig
import urllib.request
import zipfile
from pathlib import Path

import numpy as np
import sentencepiece
import torch

from support.script import InputError, sha256

DATA = Path(__file__).resolve().parents[1] / "data"      # downloads; git-ignored
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


def digest(windows):
    """SHA-256 (hex) of windows of token ids."""
    return hashlib.sha256(f"{tuple(windows.shape)}".encode() + windows.contiguous().numpy().tobytes()).hexdigest()
