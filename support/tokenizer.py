"""Tokenizers: text <-> ids, what ends a text, chat templates, a text as it grows."""
import json
import re
from datetime import datetime
from typing import NamedTuple

import sentencepiece

from support.config import family
from support.script import InputError, check_readable, read_json
from support.texts import check_text, read_text

# ------------------------------------------------------------ the files beside the weights
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token",
         "mask_token")
LISTS = ("additional_special_tokens", "extra_special_tokens")


class Added(NamedTuple):
    """A token that is found in a text before anything else is, and is one id."""

    content: str
    special: bool = False           # is not printed
    lstrip: bool = False            # takes the white space before it along
    rstrip: bool = False            # and after it
    single_word: bool = False       # not inside of a word


FLAGS = Added._fields[1:]


def is_bool(value):
    return isinstance(value, bool)


def is_text(value):
    """A text, without half of a surrogate pair."""
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)


def is_ids(value):
    """A number or a list of them, which may be no id of the tokenizer, such as -1."""
    ids = value if isinstance(value, list) else [value]
    return all(type(each) is int for each in ids)       # true and false are none


def is_text_to_id(value):
    """{"<|im_start|>": 32000, …}"""
    return isinstance(value, dict) and all(
        text and is_text(text) and type(i) is int and i >= 0
        for text, i in value.items())


def is_token(value):
    """A text, or an object with it under "content" and with flags."""
    if isinstance(value, dict):
        flags = [value.get(flag, False) for flag in FLAGS]
        return is_text(value.get("content")) and all(map(is_bool, flags))
    return is_text(value)


def is_added(value):
    return isinstance(value, dict) and is_token(value) and value["content"] != ""


def is_tokens(value):
    tokens = value.values() if isinstance(value, dict) else value
    return isinstance(value, (dict, list)) and all(map(is_token, tokens))


def is_decoder(value):
    """{"32000": {"content": "<|im_start|>", …}, …}"""
    return isinstance(value, dict) and all(
        re.fullmatch("[0-9]{1,9}", key) and is_added(token)
        for key, token in value.items())


def is_template(value):
    """A text or [{"name": "default", "template": text}, …]."""
    if not isinstance(value, list):
        return is_text(value)
    keys = ("name", "template")
    return all(isinstance(each, dict) and is_text(each.get(key))
               for each in value for key in keys)


# What is read: {file: {key: (test, what is expected)}}.
IDS = {"eos_token_id": (is_ids, "a token id or a list of them")}
TOKEN = (is_token, "a text, or an object with a text as its content")
TOKENS = (is_tokens, "a list of tokens")
NAMES = dict.fromkeys(NAMED, TOKEN) | dict.fromkeys(LISTS, TOKENS)
KEYS = {
    "config.json": IDS,
    "generation_config.json": IDS,
    "special_tokens_map.json": NAMES,
    "tokenizer_config.json": NAMES | {
        "add_bos_token": (is_bool, "true or false"),
        "add_prefix_space": (is_bool, "true or false"),
        "legacy": (is_bool, "true or false"),
        "tokenizer_class": (is_text, "a text"),
        "added_tokens_decoder": (is_decoder, "an object of ids and tokens"),
        "chat_template": (is_template, "a text or a list of names and templates"),
    },
}


def read_checked(folder, name):
    """{key: value} of what is read of `name` in `folder`; {} where there is no such file.

    Raises InputError for a value of another type than KEYS says; null is any type's.
    """
    path = folder / name
    raw = read_json(path) if path.is_file() else {}
    for key, (good, expected) in KEYS[name].items():
        if raw.get(key) is not None and not good(raw[key]):
            raise InputError(f"{path} has {key} {str(raw[key])[:80]!r}; expected "
                             f"{expected}: use the file that came with the weights")
    return {key: raw[key] for key in KEYS[name] if key in raw}


def content(token):
    """The text of a token: its own, or an object's content; None for None."""
    return token["content"] if isinstance(token, dict) else token


class Beside:
    """What the JSON files beside a checkpoint say of its tokenizer.

    config: tokenizer_config.json's keys. named: {"bos_token": text or None, …}. special:
    the texts of all special tokens. added: {id: Added}. eos_ids, eos_texts: what ends a
    text, by any file. Raises InputError for a value of a wrong type.
    """

    def __init__(self, folder):
        self.folder = folder
        self.config = read_checked(folder, "tokenizer_config.json")
        older = read_checked(folder, "special_tokens_map.json")
        # As in transformers: the older files count where added_tokens_decoder is not.
        names = self.config
        if "added_tokens_decoder" not in names:
            names = names | older
        # LLaMA 1's usual file names tokens of no text, which are no tokens.
        self.named = {key: content(names[key]) for key in NAMED
                      if key in names and content(names[key]) != ""}
        self.special = set(self.named.values()) - {None}
        for key in LISTS:
            tokens = names.get(key) or []
            tokens = tokens.values() if isinstance(tokens, dict) else tokens
            self.special |= set(map(content, tokens)) - {""}
        self.added = self.read_added()
        self.mistral = family(read_json(folder / "config.json")) == "mistral"
        self.eos_texts = {content(each.get("eos_token")) for each in (self.config, older)} - {""}
        self.eos_ids = set()
        for name in ("config.json", "generation_config.json"):
            ids = read_checked(folder, name).get("eos_token_id")
            self.eos_ids |= set(ids if isinstance(ids, list) else [ids])

    def read_added(self):
        """{id: Added} of tokenizer_config.json, or of the older added_tokens.json."""
        decoder = self.config.get("added_tokens_decoder")
        if decoder is not None:
            return {int(i): as_added(token) for i, token in decoder.items()}
        path = self.folder / "added_tokens.json"
        ids = read_json(path) if path.is_file() else {}
        if not is_text_to_id(ids):
            raise InputError(f"{path} holds {str(ids)[:80]}; expected an object of "
                             "tokens and their ids")
        return {i: Added(text, text in self.special) for text, i in ids.items()}


def as_added(token):
    """A token of a JSON file, an object, as Added."""
    return Added(**{key: token[key] for key in Added._fields if key in token})


# ------------------------------------------------------------ tokenizer.model
# Appended to a model (protocol buffers: the last value of a field counts), this sets
# normalizer_spec.add_dummy_prefix to false: a text begins without a space put before it.
NO_PREFIX = b"\x1a\x02\x18\x00"
SPACE = re.compile(r"\s*")
MARKER = re.compile(r"<\|?\w+\|?>")            # of a chat template, by its look


class Sentences:
    """tokenizer.model by SentencePiece, with added tokens around it.

    Text between added tokens is SentencePiece's, a space put before it. By `legacy` of
    tokenizer_config.json before every such stretch, else before the first alone, and
    there not where it begins with one. As in transformers, its class LlamaTokenizer
    takes legacy for false where it is not named, never puts a space before a space, and
    none at all where add_prefix_space is false. Raises InputError.
    """

    def __init__(self, path, beside):
        try:
            pieces = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except Exception:
            raise InputError(f"{path} is not a SentencePiece model; use the weights' "
                             "own, or remove it where a tokenizer.json lies beside "
                             "it") from None
        self.pieces = pieces
        model = pieces.serialized_model_proto() + NO_PREFIX
        self.no_prefix = sentencepiece.SentencePieceProcessor(model_proto=model)
        name = beside.config.get("tokenizer_class") or ""
        # A Mistral's class by this name is another one there.
        llama = name.removesuffix("Fast") == "LlamaTokenizer" and not beside.mistral
        legacy = beside.config.get("legacy")
        self.legacy = not llama if legacy is None else legacy
        self.doubled = self.legacy and not llama        # a space before a space
        bare = llama and beside.config.get("add_prefix_space") is False
        self.first = self.no_prefix if bare else pieces
        self.added = self.all_added(beside)
        self.ids = {token.content: i for i, token in self.added.items()}
        self.size = max(pieces.vocab_size() - 1, *self.added) + 1
        longest_first = sorted(self.ids, key=len, reverse=True)
        self.pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self.eos = {pieces.eos_id()}
        self.named = self.names(beside)
        bos = self.id(self.named.get("bos_token"))
        wanted = beside.config.get("add_bos_token") is not False
        self.bos = [bos] if wanted and bos is not None else []

    def all_added(self, beside):
        """{id: Added}: the model's own control pieces, named special ones, added ones.

        A special token that no file gives an id gets the next, as in transformers.
        """
        pieces = self.pieces
        found = {}
        for i in range(pieces.vocab_size()):
            piece = pieces.id_to_piece(i)
            if pieces.is_control(i) or pieces.is_unknown(i) or piece in beside.special:
                found[i] = Added(piece, special=True)
        found |= beside.added
        known = {token.content for token in found.values()}
        for text in beside.named.values():
            if text is not None and text not in known:
                found[max(pieces.vocab_size() - 1, *found) + 1] = Added(text, special=True)
                known.add(text)
        return found

    def names(self, beside):
        """{"bos_token": text, …}: the model's own, but for those the files name."""
        own = {"bos_token": self.pieces.bos_id(), "eos_token": self.pieces.eos_id(),
               "unk_token": self.pieces.unk_id()}
        own = {key: self.added[i].content for key, i in own.items() if i in self.added}
        return own | beside.named

    def vocabulary(self):
        """{text: id} of all."""
        n = self.pieces.vocab_size()
        return {self.pieces.id_to_piece(i): i for i in range(n)} | self.ids

    def id(self, text):
        """The id of an added token; None for any other text, and for None."""
        return self.ids.get(text)

    def split(self, text):
        """Yield (where a stretch without added tokens begins, it, the id after it)."""
        begin = 0
        for match in self.pattern.finditer(text):
            token = self.added[self.ids[match[0]]]
            start, end = match.span()
            around = text[start - 1:start] + text[end:end + 1]
            if start < begin or token.single_word and re.search(r"\w", around):
                continue
            if token.lstrip:
                start = begin + len(text[begin:start].rstrip())
            if token.rstrip:
                end = SPACE.match(text, end).end()
            yield begin, text[begin:start], self.ids[match[0]]
            begin = end
        yield begin, text[begin:], None

    def encode(self, text):
        ids = []
        for begin, stretch, token in self.split(text):
            first = self.legacy or begin == 0
            spaced = stretch.startswith((" ", "▁")) and not self.doubled
            model = self.first if first and not spaced else self.no_prefix
            ids += model.encode(stretch)
            ids += [] if token is None else [token]
        return ids

    def decode(self, ids):
        shown = []
        for i in ids:
            token = self.added.get(i)
            if token is not None:
                shown += [] if token.special else [token.content]
            elif i < self.pieces.vocab_size():      # a padded vocabulary has ids without
                shown.append(self.pieces.id_to_piece(i))
        return self.first.decode(shown)


# ------------------------------------------------------------ tokenizer.json
class Pieces:
    """tokenizer.json by the optional package tokenizers; the same methods.

    What its post-processor puts before a text is `bos`, unless add_bos_token is false,
    which transformers 4 obeys, too (5 does not). Raises InputError.
    """

    def __init__(self, path, beside, tokenizers):
        try:
            self.pieces = tokenizers.Tokenizer.from_file(str(path))
        except Exception as e:
            raise InputError(f"{path} cannot be read ({e}); "
                             "use the one that came with the weights") from None
        self.pieces.no_truncation()
        self.pieces.no_padding()
        self.add(beside, tokenizers.AddedToken)
        self.added = self.pieces.get_added_tokens_decoder()
        self.ids = {token.content: i for i, token in self.added.items()}
        self.size = max(self.pieces.get_vocab().values(), default=-1) + 1
        self.eos = set()
        self.named = beside.named
        # A template may also append: what is put first stands before the text's own.
        both = self.pieces.encode("a")
        marks = both.special_tokens_mask
        wanted = 0 in marks and beside.config.get("add_bos_token") is not False
        self.bos = both.ids[:marks.index(0)] if wanted else []

    def add(self, beside, kind):
        """Add what only the files beside it know: their tokens, and special ones' rank."""
        known = {token.content for token in self.pieces.get_added_tokens_decoder().values()}
        vocab = self.pieces.get_vocab()
        more = dict(sorted(beside.added.items()))
        more |= {vocab[text]: Added(text, special=True)
                 for text in beside.special - {token.content for token in more.values()}
                 if text in vocab}
        # A named one that no file gives an id gets the next.
        there = {*vocab, *known, *(token.content for token in more.values())}
        lost = [text for text in beside.named.values() if text and text not in there]
        for i, token in more.items():
            if token.content in known:
                continue
            flags = token._asdict() | {"normalized": not token.special}
            self.pieces.add_tokens([kind(**flags)])
            found = self.pieces.token_to_id(token.content)
            if token.content not in vocab and found != i:
                raise InputError(f"{beside.folder} names {token.content} as id {i}, in its "
                                 f"tokenizer.json it would be {found}; use files that "
                                 "came together")
        self.pieces.add_special_tokens([kind(text, special=True) for text in lost])

    def id(self, text):
        return self.ids.get(text)

    def encode(self, text):
        return self.pieces.encode(text, add_special_tokens=False).ids

    def decode(self, ids):
        return self.pieces.decode(ids)


# ------------------------------------------------------------ which of the two
def open_pieces(folder, beside):
    """The tokenizer in `folder`: tokenizer.json decides. Raises InputError.

    Without its package tokenizer.model is no substitute: the two may treat spaces, BOS
    and added tokens differently, and ids must not depend on what is installed.
    """
    js = folder / "tokenizer.json"
    sp = folder / "tokenizer.model"
    for path in (sp, js):
        check_readable(path)
    if js.is_file():
        try:
            import tokenizers
        except ImportError:
            raise InputError(f"{js} needs the package tokenizers; "
                             "install it: pip install tokenizers") from None
        return Pieces(js, beside, tokenizers)
    if sp.is_file():
        return Sentences(sp, beside)
    raise InputError(f"{folder} has no tokenizer.model or tokenizer.json; "
                     "put the one that came with it there")


class Tokenizer:
    """tokenizer.json or tokenizer.model (SentencePiece) beside a checkpoint.

    encode(text) -> ids, decode(ids) -> text, `bos` (the ids, one at most as a rule, that
    stand before a text), `eos` (the set of ids that end one, by any file that names
    some). Raises InputError when there is none, it or a file beside it cannot be read, or
    its vocabulary is not the model's.
    """

    def __init__(self, ckpt):
        self.beside = Beside(ckpt.folder)
        pieces = open_pieces(ckpt.folder, self.beside)
        rows = ckpt.cfg.vocab
        if pieces.size > rows:
            raise InputError(f"the tokenizer has {pieces.size:,} ids, the embedding "
                             f"{rows:,} rows; use the files that came with the weights, "
                             "without tokens added later")
        # Rows are padded to a round number, by public models to 3 % more than are used.
        if pieces.size < 0.9 * rows:
            raise InputError(f"the tokenizer in {ckpt.folder} has {pieces.size:,} ids, "
                             f"the embedding {rows:,} rows; use the model's own")
        self.encode = pieces.encode
        self.decode = pieces.decode
        self.id = pieces.id                         # of an added token, else None
        self.added = pieces.added
        self.named = pieces.named
        self.bos = pieces.bos
        named = self.beside.eos_ids | pieces.eos | set(map(self.id, self.beside.eos_texts))
        # Some files name -1 or nothing: an id that no model draws ends no text.
        self.eos = {i for i in named if i is not None and 0 <= i < rows}

    def is_marker(self, i):
        """Is id `i` a token with a name, as <|im_end|>, rather than a piece of text?

        Yi's is a piece of its SentencePiece model, and no added one.
        """
        return i in self.added or bool(MARKER.fullmatch(self.decode([i]).strip()))

    def endings(self, stops):
        """The ids that end a text: `eos`, and those of --stop's texts that are one token.

        Raises InputError for a text around a token that is never printed.
        """
        ids = set(self.eos)
        for stop in stops:
            if self.id(stop.strip()) is not None:
                ids.add(self.id(stop.strip()))
                continue
            for hidden in self.added.values():
                if hidden.special and hidden.content in stop:
                    raise InputError(f"--stop {stop!r} has more than the special token "
                                     f"{hidden.content}, which is not printed; give the "
                                     "token alone")
        return ids


# ------------------------------------------------------------ chat
# A tag that marks what a model is trained on; here it stands for nothing.
TRAINED = re.compile(r"({%[-+]?\s*)(end)?generation(\s*[-+]?%})")
ANSWER = "answer"


def compiled(source, name):
    """A chat template of Jinja2, sandboxed, with what transformers gives one."""
    try:
        import jinja2
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        raise InputError("--chat needs the package jinja2; "
                         "install it: pip install jinja2") from None

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent,
                          separators=separators, sort_keys=sort_keys)

    def strftime_now(form):
        return datetime.now().strftime(form)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": raise_exception,
                            "strftime_now": strftime_now}
    source = TRAINED.sub(lambda tag: tag[1] + ("endif" if tag[2] else "if true") + tag[3],
                         source)
    try:
        return environment.from_string(source)
    except (jinja2.TemplateError, RecursionError) as e:
        raise InputError(f"{name} is not a template that Jinja2 reads ({e}); "
                         "use the one that came with the weights") from None


class Chat:
    """The checkpoint's own chat template, with --system's text where one is given.

    encode(message) -> the ids of a user's message up to where the answer begins; `eos`:
    the set of ids that end an answer. Raises InputError where there is no template, or
    it refuses.
    """

    def __init__(self, tokenizer, system=None):
        self.tokenizer = tokenizer
        self.system = [] if system is None else [{"role": "system", "content": system}]
        source, self.name = self.source(tokenizer.beside)
        self.template = compiled(source, self.name)
        self.eos = self.end_of_turn()

    def source(self, beside):
        """(The template, where it stands)."""
        path = beside.folder / "chat_template.jinja"
        if path.is_file():
            return read_text(path), path
        found = beside.config.get("chat_template")
        if isinstance(found, list):
            found = {each["name"]: each["template"] for each in found}.get("default")
        if found is None:
            raise InputError(f"{beside.folder} has no chat template; expected a "
                             "chat_template.jinja, or a chat_template, \"default\" where "
                             "there are several, in tokenizer_config.json: leave out --chat")
        return found, f"chat_template in {beside.folder / 'tokenizer_config.json'}"

    def render(self, *turns, start):
        """The text of `turns`, (role, text) each; `start`: and how an answer begins."""
        messages = [{"role": role, "content": text} for role, text in turns]
        named = {key: text for key, text in self.tokenizer.named.items() if text is not None}
        try:
            text = self.template.render(
                messages=self.system + messages, tools=None, documents=None,
                add_generation_prompt=start, **named)
        except Exception as e:
            # Whatever a template may do; raise_exception's text may have lines.
            reason = " ".join(str(e).split())
            raise InputError(f"{self.name} cannot be filled in ({reason}); leave out "
                             "--chat, or --system where it takes none") from None
        check_text(text, f"what {self.name} makes")
        return text

    def encode(self, message):
        return self.tokenizer.encode(self.render(("user", message), start=True))

    def end_of_turn(self):
        """The id of the token that the template puts after an answer: none or one."""
        turns = (("user", "question"), ("assistant", ANSWER))
        try:
            text = self.render(*turns, start=False)
        except InputError:
            return set()                    # for questions only
        after = self.tokenizer.encode(text.rpartition(ANSWER)[2])
        return set([i for i in after if self.tokenizer.is_marker(i)][:1])


# ------------------------------------------------------------ a text as it grows
class Continuation:
    """One prompt and its continuation, printed as it grows when `live`."""

    def __init__(self, prompt, ids, tokenizer, stops, live):
        self.ids = list(ids)
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
