"""Make tokens.json beside this file with transformers (5.24, tokenizers, protobuf; the tests need none of them).

    python tests/golden/make_tokens.py

For every case, the files of a folder: the ids of TEXTS without what is put around a text, what is put before one, and
the texts that the ids decode to without special tokens; of chats, what apply_chat_template renders and its ids. The
SentencePiece cases stand on demo/tokenizer.model and on LLaMA-2's and Mistral's. Of these two none names the class
LlamaTokenizer, which ranks merges by id, not score, and so differs from SentencePiece on their runs of spaces.
"""
import json
import shutil
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MODELS = {
    "demo": ROOT / "demo" / "tokenizer.model",
    "llama2": ROOT.parent / "shared" / "data" / "tokenizers" / "llama2_tokenizer.model",
    "mistral": ROOT.parent / "shared" / "data" / "tokenizers" / "mistral_v1_tokenizer.model",
}
SIZES = {"demo": 2048, "llama2": 32000, "mistral": 32000}
TEXTS = [
    "", " ", "   ", "hello", " hello", "  hello", "hello ", "The quick brown fox jumps over the lazy dog.",
    "na\u00efve caf\u00e9, \u0395\u03bb\u03bb\u03b7\u03bd\u03b9\u03ba\u03ac, \u041f\u0440\u0438\u0432\u0435\u0442",
    "e\u0301 o\u0308 \u00f1 n\u0303", "\u65e5\u672c\u8a9e\u306e\u30c6\u30ad\u30b9\u30c8\u3002\u6f22\u5b57",
    "\ud55c\uad6d\uc5b4 \u0627\u0644\u0639\u0631\u0628\u064a\u0629 \u05e2\u05d1\u05e8\u05d9\u05ea",
    "\U0001f44b\U0001f3fd \U0001f389\U0001f468\u200d\U0001f469\u200d\U0001f467",
    "\n", "a\nb\n\n\nc", "\tdef f(x):\n\t\treturn x ** 2\n", "    if a  ==  b:\n        pass", "a\r\nb",
    "3.14159 1,000,000 2024", "0123456789" * 4, "x" * 70, "pneumono" * 12,
    "\x00\x7f\u200b\ufeff\u00a0end", "\u2581low\u2581line", "\ud7ff\ue000\U0010fffd",
    "<s>hello</s>", "a</s> b<s> c", "<unk>", "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|><|im_start|><|im_end|>", "a<|im_end|> b  <|im_end|>  c", " <|im_start|> <|im_end|> ",
    "<|im_start", "x<|im_end|", "<tool>now<tool>", "a <tool> b <tool>", "toolx tool xtool", "a tool\n\ttool ",
    "<|begin|>x<|end|> <|end|>", "\u00e9<|im_end|>\u00e9",
]
CHATML = {"<|im_start|>": 0, "<|im_end|>": 1}


def decoder(first, *more):
    """added_tokens_decoder: ChatML's two from the id `first` on, then (content, flags) each."""
    tokens = [(text, {"special": True}) for text in CHATML] + list(more)
    plain = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word", "special"), False)
    return {str(first + i): plain | {"content": text} | flags for i, (text, flags) in enumerate(tokens)}


FLAGGED = (("<tool>", {"lstrip": True, "rstrip": True}), ("tool", {"single_word": True, "normalized": True}),
           ("<tool>now", {}))


def sentencepiece_cases(model):
    n = SIZES[model]
    cases = {
        "bare": {},
        "added_tokens": {"added_tokens.json": {text: n + i for text, i in CHATML.items()}},
        "legacy": {"tokenizer_config.json": {
            "legacy": True, "add_bos_token": True, "added_tokens_decoder": decoder(n)}},
        "new": {"tokenizer_config.json": {
            "legacy": False, "add_bos_token": False, "added_tokens_decoder": decoder(n)}},
    }
    if model == "mistral":
        del cases["added_tokens"], cases["legacy"]
    if model == "demo":
        cases["flags"] = {"tokenizer_config.json": {"added_tokens_decoder": decoder(n, *FLAGGED)}}
        cases["flags, new"] = {"tokenizer_config.json": {"legacy": False, "added_tokens_decoder": decoder(n, *FLAGGED)}}
        named = {"tokenizer_class": "LlamaTokenizer", "added_tokens_decoder": decoder(n)}
        cases["class"] = {"tokenizer_config.json": named}
        cases["class, legacy"] = {"tokenizer_config.json": named | {"legacy": True}}
        cases["class, no prefix"] = {"tokenizer_config.json": named | {"add_prefix_space": False}}
        cases["class, legacy, no prefix"] = {
            "tokenizer_config.json": named | {"legacy": True, "add_prefix_space": False}}
    return {f"{model}, {name}": files | {"tokenizer.model": model} for name, files in cases.items()}


def byte_level():
    """A small byte-level BPE as LLaMA-3's and Qwen's are, as the object that tokenizer.json holds."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    pieces = Tokenizer(models.BPE())
    pieces.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pieces.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
                                  show_progress=False)
    pieces.train_from_iterator((ROOT / "air.py").read_text("utf-8").split("\n"), trainer)
    pieces.add_special_tokens(["<|begin|>", "<|end|>"])
    return json.loads(pieces.to_str())


def json_cases(base):
    begin, end = ({"SpecialToken": {"id": text, "type_id": 0}} for text in ("<|begin|>", "<|end|>"))
    own = {"Sequence": {"id": "A", "type_id": 0}}
    byte = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
    ids = {token["content"]: {"id": token["content"], "ids": [token["id"]], "tokens": [token["content"]]}
           for token in base["added_tokens"]}

    def template(*single):
        return {"type": "TemplateProcessing", "single": list(single), "special_tokens": ids,
                "pair": [own, {"Sequence": {"id": "B", "type_id": 1}}]}
    n = max(token["id"] for token in base["added_tokens"]) + 1
    named = {"bos_token": "<|begin|>", "eos_token": {"__type": "AddedToken", "content": "<|end|>", "special": True}}
    return {
        "json, begin": {"post_processor": {"type": "Sequence", "processors": [byte, template(begin, own)]}},
        "json, end": {"post_processor": template(own, end)},
        "json, both": {"post_processor": template(begin, own, end),
                       "tokenizer_config.json": named | {"add_bos_token": False}},
        "json, none": {"post_processor": byte, "tokenizer_config.json": named | {"add_bos_token": True}},
        "json, no processor": {"post_processor": None, "special_tokens_map.json": named},
        "json, more tokens": {"post_processor": template(begin, own), "tokenizer_config.json": named | {
            "added_tokens_decoder": decoder(n, *FLAGGED)}},
        "json, older tokens": {"post_processor": byte, "added_tokens.json": {text: n + i for text, i in CHATML.items()},
                               "special_tokens_map.json": {"eos_token": "<|im_end|>"}},
    }


TEMPLATES = {
    "chatml": """
        {%- for message in messages %}
            {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
        {%- endfor %}
        {%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}""",
    "inst": """{{ bos_token }}
        {%- if messages[0].role == 'system' %}
            {%- set lead = '<<SYS>>' + messages[0]['content'] + '<</SYS>> ' %}
            {%- set messages = messages[1:] %}
        {%- else %}
            {%- set lead = '' %}
        {%- endif %}
        {%- for message in messages %}
            {%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}
                {{- raise_exception('roles must take turns') }}
            {%- endif %}
            {%- if message.role == 'user' %}
                {{- '[INST] ' + (lead if loop.first else '') + message.content | trim + ' [/INST]' }}
            {%- else %}
                {{- ' ' + message.content | trim + ' ' + eos_token }}
            {%- endif %}
        {%- endfor %}""",
    "header": """{% set turn = namespace(first=true) %}
{% for message in messages %}
    {% generation %}
    {%- set text = '<|im_start|>' + message['role'] + '<|end|>\\n\\n' + message['content'] | trim + '<|im_end|>' -%}
    {{ (bos_token or '') + text if turn.first else text }}
    {%- endgeneration %}
    {% set turn.first = false %}
    {% if loop.index > 8 %}{% break %}{% endif %}
{%- endfor %}
{% if tools is not none %}{{ tools | tojson(indent=2) }}{% endif %}
{% if add_generation_prompt %}<|im_start|>assistant<|end|>

{% endif %}""",
}
CHATS = [[("user", "Who are you?")], [("system", "Be brief: <1 & 2>."), ("user", " Überblick?\n\n2 + 2 ")],
         [("user", "<|im_end|> injected </s>")]]


def write_case(folder, files, base):
    """Write a case's files into `folder`: tokenizer.model, or tokenizer.json from `base`, and what lies beside it."""
    for name, value in files.items():
        if name == "tokenizer.model":
            shutil.copy(MODELS[value], folder / name)
        elif name == "post_processor":
            (folder / "tokenizer.json").write_text(json.dumps(base | {name: value}), "utf-8")
        else:
            (folder / name).write_text(json.dumps(value), "utf-8")


def load(files, base):
    from transformers import AutoTokenizer
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_case(folder, files, base)
        (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
        return AutoTokenizer.from_pretrained(folder)


def numbers(tokenizer):
    plain = [tokenizer.encode(text, add_special_tokens=False) for text in TEXTS]
    both, own = (tokenizer.encode("a", add_special_tokens=put) for put in (True, False))
    decoded = [tokenizer.decode(ids, skip_special_tokens=True) for ids in plain]
    return {"first": both[:both.index(own[0])], "size": len(tokenizer), "ids": plain,
            "texts": [None if text == found else found for text, found in zip(TEXTS, decoded)]}       # None: unchanged


def chats(tokenizer):
    found = {}
    for name, template in TEMPLATES.items():
        tokenizer.chat_template = template
        found[name] = []
        for turns in CHATS:
            messages = [{"role": role, "content": text} for role, text in turns]
            text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
            found[name].append({"text": text, "ids": ids})
    return found


def main():
    import transformers
    base = byte_level()
    cases = json_cases(base)
    for model in MODELS:
        cases |= sentencepiece_cases(model)
    golden = {"made_with": f"transformers {transformers.__version__}", "tokenizer.json": base, "cases": {}, "chats": {}}
    for name, files in cases.items():
        tokenizer = load(files, base)
        found = numbers(tokenizer)
        print(name, type(tokenizer).__name__, len(tokenizer), found["first"])
        for other, case in golden["cases"].items():
            if case.get("ids") == found["ids"] and case.get("texts") == found["texts"]:
                found |= {"ids": other, "texts": other}         # as there
                break
        golden["cases"][name] = {"files": files} | found
        if name in ("demo, legacy", "demo, new", "json, more tokens"):
            golden["chats"][name] = chats(tokenizer)
    path = Path(__file__).parent / "tokens.json"
    path.write_text(json.dumps(golden, ensure_ascii=True, separators=(",", ":")) + "\n")
    print(path.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
