"""Texts and tokens: named corpora or files, tokenizers, arrays of token ids, defaults."""
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

from support.script import ROOT, InputError, check_readable, sha256

# ------------------------------------------------------------ the library's source
NOT_SOURCE = {"test", "tests", "idle_test", "site-packages", "dist-packages",
              "__pycache__"}
GENERATED = re.compile(
    r"(auto-?|automatically |is )generated|Mapping Codec|"
    r"system configuration generated", re.I)


@functools.cache
def stdlib_files():
    """{relative path: text} of the library, {"topics/NAME": text} of its documents."""
    root = Path(sysconfig.get_paths()["stdlib"])
    rows = {}
    for path in root.rglob("*.py"):
        name = path.relative_to(root)
        if NOT_SOURCE & set(name.parts) or name.parts[0].startswith("config-"):
            continue
        text = path.read_text("utf-8", errors="replace")
        if text.strip() and not GENERATED.search(text[:400]):
            rows[name.as_posix()] = text
    try:
        from pydoc_data.topics import topics
    except ImportError:
        topics = {}                     # some distributions ship Python without them
    return rows | {f"topics/{name}": text for name, text in topics.items()}


def stdlib_rows(split):
    """The running interpreter's library and documentation topics, a row a file, by path.

    Left out: tests, generated tables, installed packages. A file is held out ("test")
    when the hash of its relative path says so, 1 in 20; every other one is "train".
    """
    rows = []
    for name, text in sorted(stdlib_files().items()):
        held_out = int(hashlib.sha256(name.encode()).hexdigest(), 16) % 20 == 0
        if held_out == (split == "test"):
            rows.append(text)
    return rows


# ------------------------------------------------------------ downloads
DATA = ROOT / "data"                    # git-ignored
HUB = "https://huggingface.co/datasets/"
WIKITEXT = "wikitext-2-raw-v1.zip"
C4 = {"train": "c4-train.00000-of-01024.json.gz",
      "test": "c4-validation.00000-of-00008.json.gz"}
C4_REVISION = HUB + "allenai/c4/resolve/1588ec454efa1a09f29cd18ddd04fe05fc8653a2/en/"
C4_ROWS = {"train": 20000, "test": 1100}
# file: (address, SHA-256). C4 publishes none: the address names a revision, the first sum
# is kept.
DOWNLOADS = {
    WIKITEXT: (HUB + "ggml-org/ci/resolve/main/" + WIKITEXT,
               "ef7edb566e3e2b2d31b29c1fdb0c89a4cc683597484c3dc2517919c615435a11"),
    C4["train"]: (C4_REVISION + C4["train"], None),
    C4["test"]: (C4_REVISION + C4["test"], None),
}


def fetch(url, path):
    """Fetch `url` into `path`, which appears when it is whole.

    Raises OSError, HTTPException.
    """
    path.parent.mkdir(exist_ok=True)
    partial = path.with_suffix(".part")
    print(f"fetching {url}", file=sys.stderr)
    try:
        with (urllib.request.urlopen(url, timeout=30) as response,
              open(partial, "wb") as f):
            shutil.copyfileobj(response, f)
            if f.tell() != int(response.headers.get("Content-Length", f.tell())):
                raise OSError("the connection ended early")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def download(name):
    """The path of a file of DOWNLOADS, fetched once into data/.

    Its SHA-256 is pinned here or kept beside it from the first fetch on. Raises
    InputError without a network or when the sum differs.
    """
    url, pinned = DOWNLOADS[name]
    path = DATA / name
    kept = DATA / (name + ".sha256")
    if not path.exists():
        try:
            fetch(url, path)
        except (OSError, http.client.HTTPException) as e:
            raise InputError(f"{name} is not in {DATA} and could not be fetched ({e}); "
                             "put it there yourself, or use a text that needs no "
                             "network: stdlib, or your own .txt, .jsonl or "
                             ".npy") from None
    check_readable(path)
    found = wanted = sha256(path)
    if pinned:
        wanted = pinned
    elif kept.exists():
        wanted = kept.read_text().strip()
    if found != wanted:
        raise InputError(f"{path} has SHA-256 {found}, expected {wanted}; "
                         "delete it, and it is fetched again")
    kept.write_text(found + "\n")
    return path


# ------------------------------------------------------------ documents
def wikitext_rows(raw):
    """WikiText's published rows: a line with its newline, a blank line as ''."""
    lines = raw.removesuffix("\n").split("\n")
    return [line + "\n" if line.strip() else "" for line in lines]


def jsonl_rows(lines, name):
    """The texts under the key `text`, a JSON object a line.

    Raises InputError with the line.
    """
    rows = []
    for i, line in enumerate(lines, 1):
        try:
            if line.strip():
                rows.append(json.loads(line)["text"] + "")
        except (ValueError, KeyError, TypeError):
            raise InputError(f"line {i} of {name} is not a JSON object with a text "
                             "under the key 'text'") from None
    return rows


def file_rows(path):
    """The documents of a user's own file. Raises InputError."""
    if path.suffix not in (".txt", ".raw", ".jsonl"):
        raise InputError(f"the text '{path}' is unknown; expected stdlib, wikitext2, "
                         "c4, or a .txt, .raw, .jsonl or .npy file")
    check_readable(path)
    try:
        content = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"{path} cannot be read as UTF-8 text ({e})") from None
    if path.suffix == ".jsonl":
        return jsonl_rows(content.split("\n"), path)
    return wikitext_rows(content) if path.suffix == ".raw" else [content]


def rows_of(text, split):
    """Documents of a named text or a file; `split` "train" calibrates, "test" evaluates.

    Texts: stdlib; wikitext2 (raw); c4 (first 20,000 documents of the first training
    shard; first 1,100 of the first validation shard); a .txt (one document), .raw
    (WikiText's layout) or .jsonl (key `text`) file, which has one split. Raises
    InputError.
    """
    if text == "stdlib":
        return stdlib_rows(split)
    if text == "wikitext2":
        with zipfile.ZipFile(download(WIKITEXT)) as z:
            return wikitext_rows(z.read(f"wikitext-2-raw/wiki.{split}.raw").decode())
    if text == "c4":
        with gzip.open(download(C4[split]), "rt", encoding="utf-8") as f:
            return jsonl_rows(itertools.islice(f, C4_ROWS[split]), C4[split])
    return file_rows(Path(text))


# ------------------------------------------------------------ tokens
def too_short(text, tokens, seqlen):
    return InputError(f"{text} is good for {tokens} tokens, fewer than one window of "
                      f"{seqlen} (calibration draws each from ten characters a token); "
                      "give more text or a smaller --seqlen")


class Tokenizer:
    """tokenizer.model (SentencePiece) or tokenizer.json beside a checkpoint.

    encode(text) -> ids, decode(ids) -> text, `bos` (a list of 0 or 1 ids), `eos` (a set
    of ids). Raises InputError when there is none, it cannot be read, or its vocabulary is
    not the model's.
    """

    def __init__(self, ckpt):
        sp = ckpt.folder / "tokenizer.model"
        js = ckpt.folder / "tokenizer.json"
        for path in (sp, js):
            check_readable(path)
        if sp.is_file():
            self.read_sentencepiece(sp)
        elif js.is_file():
            self.read_json(js)
        else:
            raise InputError(f"{ckpt.folder} has no tokenizer.model or tokenizer.json; "
                             "put the one that came with it there")
        vocab = ckpt.cfg.vocab
        if not 0.9 * vocab <= self.size <= vocab:
            raise InputError(f"the tokenizer in {ckpt.folder} has {self.size:,} pieces, "
                             f"the model {vocab:,}; use the model's own")
        if self.eos is None:
            self.eos = ckpt.raw.get("eos_token_id")
        named = self.eos if isinstance(self.eos, list) else [self.eos]
        self.eos = set(named) - {None}

    def read_sentencepiece(self, path):
        try:
            pieces = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except Exception:
            raise InputError(f"{path} is not a SentencePiece model; use the weights' "
                             "own, or remove it where a tokenizer.json lies beside "
                             "it") from None
        self.size = size = pieces.vocab_size()
        self.encode = pieces.encode
        # A padded vocabulary has ids without a piece.
        self.decode = lambda ids: pieces.decode([i for i in ids if i < size])
        self.bos = [pieces.bos_id()] if pieces.bos_id() >= 0 else []
        self.eos = pieces.eos_id()

    def read_json(self, path):
        try:
            import tokenizers
        except ImportError:
            raise InputError(f"{path} needs the package tokenizers; "
                             "install it: pip install tokenizers") from None
        try:
            pieces = tokenizers.Tokenizer.from_file(str(path))
        except Exception as e:
            raise InputError(f"{path} cannot be read ({e}); "
                             "use the one that came with the weights") from None
        pieces.no_truncation()
        pieces.no_padding()
        self.size = pieces.get_vocab_size()
        self.encode = lambda text: pieces.encode(text, add_special_tokens=False).ids
        self.decode = pieces.decode
        self.bos = pieces.encode("").ids[:1]        # what it puts before an empty text
        self.eos = None                             # config.json says


def token_array(text, ckpt):
    """The token ids of a .npy file: 1-D (a stream) or 2-D (the windows), a LongTensor."""
    check_readable(text)
    try:
        ids = np.load(text, allow_pickle=False)
    except (OSError, ValueError, EOFError) as e:
        raise InputError(f"{text} cannot be read as a .npy array ({e})") from None
    if ids.dtype.kind not in "iu" or ids.ndim not in (1, 2) or not ids.size:
        raise InputError(f"{text} holds {ids.dtype} of shape {ids.shape}; "
                         "expected 1-D or 2-D token ids (integers)")
    if not 0 <= ids.min() <= ids.max() < ckpt.cfg.vocab:
        raise InputError(f"{text} holds token ids {ids.min()} to {ids.max()}; "
                         f"the vocabulary is 0 to {ckpt.cfg.vocab - 1}")
    return torch.from_numpy(ids.astype(np.int64))


def own_windows(text, ckpt):
    """The windows of a 2-D .npy file, None for any other text."""
    ids = token_array(text, ckpt) if text.endswith(".npy") else None
    return ids if ids is not None and ids.dim() == 2 else None


def with_defaults(ckpt, text=None, samples=None, seqlen=None):
    """(text, windows, tokens a window), filled in where None.

    By a 2-D .npy file's own, by what the checkpoint's config.json names under "defaults",
    by the paper's. Raises InputError for a length beyond the model's context.
    """
    defaults = {"text": "wikitext2", "samples": 256, "seqlen": 2048}
    defaults |= ckpt.raw.get("defaults") or {}
    text = text or defaults["text"]
    own = own_windows(text, ckpt)
    if own is not None:
        given = (("--samples", samples, own.shape[0]),
                 ("--seqlen", seqlen, own.shape[1]))
        for option, value, found in given:
            if value not in (None, found):
                raise InputError(f"{text} holds windows of shape {tuple(own.shape)}, "
                                 f"{option} says {value}; leave {option} out")
        samples, seqlen = own.shape
    if samples is None:
        samples = defaults["samples"]
    if seqlen is None:
        seqlen = min(defaults["seqlen"], ckpt.cfg.context)
    if samples < 1:
        raise InputError(f"--samples is {samples}; expected at least 1")
    if not 2 <= seqlen <= ckpt.cfg.context:
        raise InputError(f"a window has {seqlen} tokens; expected 2 to "
                         f"{ckpt.cfg.context}, the model's context: set --seqlen")
    return text, samples, seqlen


def digest(windows):
    """SHA-256 (hex) of windows of token ids."""
    shape = f"{tuple(windows.shape)}".encode()
    return hashlib.sha256(shape + windows.contiguous().numpy().tobytes()).hexdigest()


# ------------------------------------------------------------ prompts and what follows
class Continuation:
    """One prompt and its continuation, printed as it grows when `live`."""

    def __init__(self, prompt, ids, tokenizer, stops, live):
        self.ids = ids[len(tokenizer.bos):]
        self.decode = tokenizer.decode
        self.stops = stops
        self.live = live
        self.prompt = self.text = prompt
        # Characters of the prompt, decoded.
        self.before = len(tokenizer.decode(self.ids))
        self.shown = 0

    def push(self, token):
        """The `stop` of `generate`: take a token; true once a stop text has appeared.

        The stop text is cut.
        """
        self.ids.append(token)
        more = self.decode(self.ids)[self.before:]
        found = [more.find(stop) for stop in self.stops if stop in more]
        ended = bool(found)
        self.text = self.prompt + (more[:min(found)] if ended else more)
        if self.live:
            held = 0 if ended else self.held_back(more)
            until = len(self.text) - held
            print(self.text[self.shown:until], end="", flush=True)
            self.shown = max(self.shown, until)
        return ended

    def held_back(self, more):
        """How many characters wait: an incomplete one, or what may begin a stop text."""
        if more.endswith("\ufffd"):
            return len(more)
        begun = [n for stop in self.stops for n in range(1, len(stop))
                 if more.endswith(stop[:n])]
        return max(begun, default=0)


def read_prompts(path):
    """The lines of the file `path` that are not blank.

    Raises InputError where there is none.
    """
    check_readable(path)
    try:
        lines = Path(path).read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"--prompt-file {path} cannot be read as UTF-8 text "
                         f"({e})") from None
    prompts = [line for line in lines if line]
    if not prompts:
        raise InputError(f"{path} has no prompt; expected one a line")
    return prompts
