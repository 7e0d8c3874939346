"""Texts and tokens: named corpora or files, arrays of token ids, defaults."""
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
import torch

from support.config import own_defaults
from support.script import ROOT, InputError, check_readable, denied, sha256, write_whole

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
    # Its own for each process: torchrun's fetch at once.
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
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


def download(name, source=None, instead="a text that needs no network: stdlib, or your own "
             ".txt, .jsonl or .npy"):
    """The path of a file, fetched once into data/ from its `source`, (address, SHA-256).

    source: that of DOWNLOADS where None. A sum that is not pinned is kept beside the file
    from the first fetch on. Raises InputError without a network (`instead`: what else to
    use) or when the sum differs.
    """
    url, pinned = source or DOWNLOADS[name]
    path = DATA / name
    kept = DATA / (name + ".sha256")
    if not path.exists():
        try:
            fetch(url, path)
        except PermissionError:
            raise denied(DATA, "written") from None
        except (OSError, http.client.HTTPException) as e:
            raise InputError(f"{name} is not in {DATA} and could not be fetched ({e}); "
                             f"put it there yourself, or use {instead}") from None
    check_readable(path)
    found = wanted = sha256(path)
    if pinned:
        wanted = pinned
    elif kept.exists():
        wanted = kept.read_text().strip()
    if found != wanted:
        raise InputError(f"{path} has SHA-256 {found}, expected {wanted}; "
                         "delete it, and it is fetched again")
    if not pinned and not kept.exists():
        write_whole(kept, found + "\n")
    return path


# ------------------------------------------------------------ documents
def wikitext_rows(raw):
    """WikiText's published rows: a line with its newline, a blank line as ''."""
    lines = raw.removesuffix("\n").split("\n")
    return [line + "\n" if line.strip() else "" for line in lines]


def typed(argument):
    """An argument as it was typed, in UTF-8, whatever the shell's locale says."""
    try:
        return os.fsencode(argument).decode("utf-8")
    except UnicodeError:
        raise InputError(f"the argument {argument!a} is not UTF-8 text; "
                         "expected Unicode: type it again or use --prompt-file") from None


def check_text(text, where):
    """Raise InputError for half a character, which JSON's escapes allow."""
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise InputError(f"{where} has half of a surrogate pair, {text[e.start]!a}, which "
                         "is no character; expected Unicode text: mend or delete "
                         "it") from None


def jsonl_rows(lines, name):
    """The texts under the key `text`, a JSON object a line.

    Raises InputError with the line.
    """
    rows = []
    for i, line in enumerate(lines, 1):
        try:
            if line.strip():
                rows.append(json.loads(line)["text"] + "")
        except (ValueError, KeyError, TypeError, RecursionError):
            raise InputError(f"line {i} of {name} is not a JSON object with a text "
                             "under the key 'text'") from None
        if line.strip():
            check_text(rows[-1], f"line {i} of {name}")
    return rows


def read_text(path):
    """A UTF-8 file as it is, but for a byte order mark in front.

    Raises InputError, with the line of what is not UTF-8.
    """
    check_readable(path)
    try:
        content = Path(path).read_bytes()
        return content.decode("utf-8-sig")
    except OSError as e:
        raise InputError(f"{path} cannot be read ({e.strerror})") from None
    except UnicodeDecodeError as e:
        line = content.count(b"\n", 0, e.start) + 1
        raise InputError(f"line {line} of {path} is not UTF-8 ({e.reason}); "
                         "save the file as UTF-8 text") from None


def instruction_rows(path):
    """Instructions, [{"instruction", "input", "output"}, …], of a .json file.

    Raises InputError with the row that lacks a text; "input" may be absent.
    """
    try:
        rows = json.loads(read_text(path))
    except (ValueError, RecursionError) as e:
        raise InputError(f"{path} is not readable as JSON ({e}); expected a list of "
                         "instructions, as Alpaca's") from None
    if not isinstance(rows, list) or not rows:
        raise InputError(f"{path} is no list of rows (found {str(rows)[:40]!r}); expected "
                         'objects with "instruction", "input" and "output"')
    for i, row in enumerate(rows, 1):
        for key in ("instruction", "input", "output"):
            optional = "" if key == "input" else None
            text = row.get(key, optional) if isinstance(row, dict) else None
            if not isinstance(text, str):
                raise InputError(f"row {i} of {path} has no text under '{key}'; expected "
                                 "rows as Alpaca's: mend or delete it")
            check_text(text, f"row {i} of {path}")
    return rows


def file_rows(path):
    """The documents of a user's own file. Raises InputError."""
    kind = path.suffix.lower()
    if kind not in (".txt", ".raw", ".jsonl"):
        raise InputError(f"the text '{path}' is unknown; expected stdlib, wikitext2, "
                         "c4, or a .txt, .raw, .jsonl or .npy file")
    # Lines end alike whatever system wrote them.
    content = read_text(path).replace("\r\n", "\n").replace("\r", "\n")
    if kind == ".jsonl":
        return jsonl_rows(content.split("\n"), path)
    return wikitext_rows(content) if kind == ".raw" else [content]


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


# ------------------------------------------------------------ windows of tokens
def too_short(text, tokens, seqlen):
    return InputError(f"{text} is good for {tokens} tokens, fewer than one window of "
                      f"{seqlen} (calibration draws each from ten characters a token); "
                      "give more text or a smaller --seqlen")


def token_array(text, ckpt):
    """The token ids of a .npy file: 1-D (a stream) or 2-D (the windows), a LongTensor."""
    check_readable(text)
    try:
        with open(text, "rb") as f:
            ids = np.lib.format.read_array(f, allow_pickle=False)
    except Exception as e:                  # of a torn header anything that parsing raises
        reason = str(e).split("\n")[0][:200]
        raise InputError(f"{text} cannot be read as a .npy array ({reason})") from None
    if ids.dtype.kind not in "iu" or ids.ndim not in (1, 2) or not ids.size:
        raise InputError(f"{text} holds {ids.dtype} of shape {ids.shape}; "
                         "expected 1-D or 2-D token ids (integers)")
    if not 0 <= ids.min() <= ids.max() < ckpt.cfg.vocab:
        raise InputError(f"{text} holds token ids {ids.min()} to {ids.max()}; "
                         f"the vocabulary is 0 to {ckpt.cfg.vocab - 1}")
    return torch.from_numpy(ids.astype(np.int64))


def is_array(text):
    """Does a text's name say a .npy file of token ids?"""
    return text.lower().endswith(".npy")


def own_windows(text, ckpt):
    """The windows of a 2-D .npy file, None for any other text."""
    ids = token_array(text, ckpt) if is_array(text) else None
    return ids if ids is not None and ids.dim() == 2 else None


def with_defaults(ckpt, text=None, samples=None, seqlen=None):
    """(text, windows, tokens a window), filled in where None.

    By a 2-D .npy file's own, by what the checkpoint's config.json names under "defaults",
    by the paper's. Raises InputError for a length beyond the model's context.
    """
    defaults = {"text": "wikitext2", "samples": 256, "seqlen": 2048}
    defaults |= own_defaults(ckpt.raw)
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


# ------------------------------------------------------------ prompts
def read_prompts(path):
    """The lines of the file `path` that are not blank.

    Lines end at a newline and nowhere else. Raises InputError where there is none.
    """
    lines = [line.removesuffix("\r") for line in read_text(path).split("\n")]
    prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise InputError(f"{path} has no prompt; expected one a line")
    return prompts
