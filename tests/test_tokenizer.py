"""support/tokenizer.py: transformers' ids, texts and chats (golden/tokens.json), ends of text, types, both files."""
import json
import shutil
import sys

import pytest

import generate as G
from conftest import ROOT, write_checkpoint
from make_tokens import CHATS, MODELS, SIZES, TEMPLATES, TEXTS, decoder, write_case
from support.checkpoint import Checkpoint
from support.config import compressed_config
from support.script import InputError
from support.tokenizer import Chat, Continuation, Tokenizer

GOLDEN = json.loads((ROOT / "tests" / "golden" / "tokens.json").read_text("utf-8"))
BASE = GOLDEN["tokenizer.json"]
END = {"eos_token": "<|im_end|>"}


def folder_of(path, files, size, **config):
    """A checkpoint with `size` rows and these files beside it."""
    folder = write_checkpoint(path, vocab_size=size, **config)
    write_case(folder, files, BASE)
    return folder


def tokenizer_of(path, files, size=2048, **config):
    return Tokenizer(Checkpoint(folder_of(path, files, size, **config)))


def case(name, path):
    """(tokenizer, its golden numbers) of a case; skipped where its files or its package are not at hand."""
    golden = dict(GOLDEN["cases"][name])
    if "post_processor" in golden["files"]:
        pytest.importorskip("tokenizers", reason="the optional package tokenizers is not installed")
    elif not MODELS[golden["files"]["tokenizer.model"]].exists():
        pytest.skip("the tokenizer is not at ../shared/data/tokenizers")
    for key in ("ids", "texts"):
        if isinstance(golden[key], str):
            golden[key] = GOLDEN["cases"][golden[key]][key]
    return tokenizer_of(path / "ckpt", golden["files"], golden["size"]), golden


@pytest.mark.parametrize("name", GOLDEN["cases"])
def test_ids_and_texts_are_those_of_transformers(name, tmp_path):
    tokenizer, golden = case(name, tmp_path)
    for text, ids, decoded in zip(TEXTS, golden["ids"], golden["texts"], strict=True):
        assert tokenizer.encode(text) == ids, text
        assert tokenizer.decode(ids) == (text if decoded is None else decoded), text
    # transformers 5 puts a BOS before a tokenizer.model's ids only where add_bos_token says so; 4 did, as Meta does.
    silent = "tokenizer.model" in golden["files"] and "add_bos_token" not in str(golden["files"])
    # It heeds add_bos_token: false no longer where a tokenizer.json puts one; 4 did.
    refused = "post_processor" in golden["files"] and '"add_bos_token": false' in json.dumps(golden["files"])
    assert tokenizer.bos == ([1] if silent else [] if refused else golden["first"])


def test_a_token_without_a_text_is_none(tmp_path):
    """As LLaMA 1's usual tokenizer_config.json has them: its ids are those of the file alone."""
    empty = {"content": "", "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    names = dict.fromkeys(("bos_token", "eos_token", "unk_token"))
    shutil.copytree(ROOT / "demo", tmp_path / "plain")
    plain = Tokenizer(Checkpoint(tmp_path / "plain"))
    for i, (config, special) in enumerate((("", None), ("", ""), (empty, empty), ("", empty))):
        folder = tmp_path / str(i)
        shutil.copytree(ROOT / "demo", folder)
        (folder / "tokenizer_config.json").write_text(json.dumps(dict.fromkeys(names, config)))
        if special is not None:
            (folder / "special_tokens_map.json").write_text(
                json.dumps(dict.fromkeys(names, special) | {"additional_special_tokens": [""]}))
        found = Tokenizer(Checkpoint(folder))
        assert (found.bos, found.eos) == (plain.bos, plain.eos) == ([1], {2})
        assert found.encode("import os") == plain.encode("import os")


@pytest.mark.parametrize("name", ["demo, flags", "demo, new", "json, more tokens"])
def test_a_text_printed_as_it_grows_is_the_whole_text(name, tmp_path, capsys):
    tokenizer, golden = case(name, tmp_path)
    for text, ids in zip(TEXTS, golden["ids"]):
        for prompt in ([], tokenizer.encode("a <|im_start|>")):
            grown = Continuation("", prompt, tokenizer, [], live=True)
            for token in ids:
                assert not grown.push(token)
            print(grown.text[grown.shown:], end="")
            whole = tokenizer.decode(prompt + ids)[len(tokenizer.decode(prompt)):]
            assert capsys.readouterr().out == grown.text == whole, text


# ---------------------------------------------------------------------------------------------- what ends a text
@pytest.mark.parametrize("config, files, expected", [
    ({"eos_token_id": 7}, {}, {2, 7}),
    ({"eos_token_id": [7, 8]}, {"generation_config.json": {"eos_token_id": [9]}}, {2, 7, 8, 9}),
    ({"eos_token_id": None}, {"generation_config.json": {"eos_token_id": 9}}, {2, 9}),
    ({"eos_token_id": -1}, {"generation_config.json": {"eos_token_id": [2050, 10 ** 9, 5]}}, {2, 5}),
    ({}, {"tokenizer_config.json": END | {"added_tokens_decoder": decoder(2048)}}, {2, 2049}),
    ({}, {"tokenizer_config.json": {"added_tokens_decoder": decoder(2048)}, "special_tokens_map.json": END}, {2, 2049}),
    ({}, {"added_tokens.json": {"<|im_end|>": 2048},
          "special_tokens_map.json": {"eos_token": {"content": "<|im_end|>", "lstrip": False}}}, {2, 2048}),
    ({}, {"tokenizer_config.json": END}, {2, 2048}),        # no file gives it an id: the next
])
def test_what_ends_a_text_is_what_any_file_names(config, files, expected, tmp_path):
    files = files | {"tokenizer.model": "demo"}
    assert tokenizer_of(tmp_path / "c", files, 2050, **({"eos_token_id": None} | config)).eos == expected


def test_tokenizer_json_and_its_end_of_text(tmp_path):
    pytest.importorskip("tokenizers", reason="the optional package tokenizers is not installed")
    files = GOLDEN["cases"]["json, more tokens"]["files"] | {"generation_config.json": {"eos_token_id": [335, 3]}}
    assert tokenizer_of(tmp_path / "c", files, 337, eos_token_id=[1, 2]).eos == {1, 2, 3, 331, 335}
    shutil.copy(tmp_path / "c" / "tokenizer.json", tmp_path / "t.json")
    limited = BASE | {"truncation": {"max_length": 4, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}}
    (tmp_path / "c" / "tokenizer.json").write_text(json.dumps(limited))
    assert len(Tokenizer(Checkpoint(tmp_path / "c")).encode("def f(x): return x")) > 4
    (tmp_path / "c" / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read"):
        Tokenizer(Checkpoint(tmp_path / "c"))


def test_a_token_whose_id_two_files_disagree_about_is_refused(tmp_path):
    pytest.importorskip("tokenizers", reason="the optional package tokenizers is not installed")
    files = GOLDEN["cases"]["json, none"]["files"] | {"tokenizer_config.json": {"added_tokens_decoder": decoder(400)}}
    with pytest.raises(InputError, match="names <|im_start|> as id 400, in its tokenizer.json it would be 332"):
        tokenizer_of(tmp_path / "c", files, 402)


BAD = [
    ("generation_config.json", {"eos_token_id": bad}) for bad in ("2", [2, "3"], 2.0, True, {"a": 1}, [[2]])
] + [
    ("special_tokens_map.json", {"eos_token": bad}) for bad in (2, ["</s>"], {"text": "</s>"}, {"content": 3})
] + [
    ("special_tokens_map.json", {"additional_special_tokens": bad}) for bad in ("<a>", [1], 3, [["a"]])
] + [
    ("tokenizer_config.json", {"added_tokens_decoder": bad})
    for bad in ([], {"x": {"content": "a"}}, {"-1": {"content": "a"}}, {"7": 3}, {"7": {}},
                {"7": {"content": "a", "lstrip": "no"}}, {"7": {"content": 1}}, {"7": {"content": ""}}, {"7": "a"})
] + [
    ("tokenizer_config.json", {"add_bos_token": "false"}), ("tokenizer_config.json", {"legacy": 0}),
    ("tokenizer_config.json", {"tokenizer_class": ["LlamaTokenizer"]}),
    ("tokenizer_config.json", {"chat_template": 3}),
    ("tokenizer_config.json", {"chat_template": [{"name": "default"}]}),
    ("tokenizer_config.json", {"chat_template": ["x"]}), ("tokenizer_config.json", []),
    ("added_tokens.json", {"<a>": "2048"}), ("added_tokens.json", {"<a>": None}), ("added_tokens.json", ["<a>"]),
    ("added_tokens.json", {"<a>": -5}), ("added_tokens.json", {"": 2048}), ("generation_config.json", "x"),
]


@pytest.mark.parametrize("name, content", BAD, ids=lambda value: str(value)[:60])
def test_a_value_of_a_wrong_type_is_one_sentence(name, content, tmp_path):
    with pytest.raises(InputError, match=name.replace(".", r"\.")):
        tokenizer_of(tmp_path / "c", {"tokenizer.model": "demo", name: content}, 2050)


def test_config_json_is_held_to_the_same_types(tmp_path):
    with pytest.raises(InputError, match="eos_token_id 'two'; expected a token id or a list"):
        tokenizer_of(tmp_path / "c", {"tokenizer.model": "demo"}, eos_token_id="two")


def test_null_is_nothing(tmp_path):
    nulls = dict.fromkeys(("bos_token", "eos_token", "legacy", "add_bos_token", "tokenizer_class", "chat_template",
                           "added_tokens_decoder", "additional_special_tokens"))
    tokenizer = tokenizer_of(tmp_path / "c", {"tokenizer.model": "demo", "tokenizer_config.json": nulls})
    assert (tokenizer.bos, tokenizer.eos) == ([], {2})             # a tokenizer whose bos_token is null has none


def test_stop_texts_that_are_tokens_end_by_their_id(tmp_path):
    tokenizer, _ = case("demo, legacy", tmp_path)
    assert tokenizer.endings(["<|im_end|>", "\n\n", "<|im_start|>\n"]) == {2, 2048, 2049}
    with pytest.raises(InputError, match=r"more than the special token <\|im_end\|>"):
        tokenizer.endings(["bye<|im_end|>"])
    flagged, _ = case("demo, flags", tmp_path / "flags")
    assert flagged.endings(["<tool>"]) == {2, 2050} and flagged.endings(["a <tool>"]) == {2}      # it is printed


@pytest.mark.parametrize("rows, added, message", [
    (2048, 16, "the tokenizer has 2,064 ids, the embedding 2,048 rows"),
    (2100, 1000, "the tokenizer has 3,048 ids, the embedding 2,100 rows"),
    (2300, 0, "has 2,048 ids, the embedding 2,300 rows"),
])
def test_a_tokenizer_of_another_size_is_refused_with_both_sizes(rows, added, message, tmp_path):
    tokens = {f"<{i}>": 2048 + i for i in range(added)}
    with pytest.raises(InputError, match=message):
        tokenizer_of(tmp_path / "c", {"tokenizer.model": "demo", "added_tokens.json": tokens}, rows)
    assert tokenizer_of(tmp_path / "d", {"tokenizer.model": "demo"}, 2176).encode("a")              # padded


# ---------------------------------------------------------------------------------------------- both files
def json_of(model, added=(), **changes):
    """A tokenizer.json with the pieces of a tokenizer.model, of which some are changed."""
    import sentencepiece
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(MODELS[model]))
    vocab = {changes.get(str(i), pieces.id_to_piece(i)): i for i in range(pieces.vocab_size())}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    tokens = [{"id": SIZES[model] + i, "content": text, "special": True} | flags for i, text in enumerate(added)]
    return {"version": "1.0", "added_tokens": tokens, "model": {
        "type": "BPE", "vocab": vocab, "merges": [], "byte_fallback": True, "unk_token": "<unk>", "fuse_unk": True}}


def test_tokenizer_json_decides_where_both_lie_there(tmp_path):
    pytest.importorskip("tokenizers", reason="the optional package tokenizers is not installed")
    files = {"tokenizer.model": "demo", "tokenizer.json": json_of("demo", ["<|im_start|>", "<|im_end|>"])}
    tokenizer = tokenizer_of(tmp_path / "c", files, 2050)
    # It has no merges, and no space before a text: other ids than the model's.
    ids = tokenizer.encode("ab<|im_end|>")
    own = tokenizer_of(tmp_path / "d", {"tokenizer.model": "demo"}).encode("ab")
    assert len(ids) == 3 and ids[2] == 2049 and ids[:2] != own


def test_without_its_package_tokenizer_json_is_not_replaced(tmp_path, monkeypatch):
    """Ids must not depend on what is installed: tokenizer.model may treat spaces, BOS and added tokens differently."""
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    for i, files in enumerate(({"tokenizer.json": json_of("demo")},
                               {"tokenizer.model": "demo", "tokenizer.json": json_of("demo")})):
        with pytest.raises(InputError, match="pip install tokenizers"):
            tokenizer_of(tmp_path / str(i), files, 2050)


def test_a_named_token_that_no_file_holds_gets_the_next_id(tmp_path):
    """As in transformers; an embedding without a row for it is refused."""
    files = {"tokenizer.model": "demo", "tokenizer_config.json": {
        "bos_token": "<x>", "pad_token": "[PAD]", "eos_token": "</s>", "add_bos_token": True}}
    tokenizer = tokenizer_of(tmp_path / "c", files, 2050)
    assert tokenizer.bos == [2048] and tokenizer.encode("[PAD]") == [2049] and tokenizer.eos == {2}
    with pytest.raises(InputError, match="2,050 ids, the embedding 2,048 rows"):
        tokenizer_of(tmp_path / "d", files, 2048)


def test_a_mistral_keeps_the_space_before_a_space(tmp_path):
    """Its folders name the class LlamaTokenizer, too; transformers' for its model_type is another one."""
    named = {"tokenizer.model": "demo", "tokenizer_config.json": {"tokenizer_class": "LlamaTokenizer", "legacy": True}}
    bare = tokenizer_of(tmp_path / "bare", {"tokenizer.model": "demo"})
    folder = tmp_path / "mistral"
    tokenizer_of(folder, named)
    config = json.loads((folder / "config.json").read_text())
    assert Tokenizer(Checkpoint(folder)).encode("  hello") != bare.encode("  hello")
    result = compressed_config(config | {"model_type": "mistral"}, {"ranks": {}})       # where it must read the same
    for each in (config | {"model_type": "mistral"}, result):
        (folder / "config.json").write_text(json.dumps(each))
        assert Tokenizer(Checkpoint(folder)).encode("  hello") == bare.encode("  hello")


@pytest.mark.parametrize("name, content", [
    ("tokenizer_config.json", {"eos_token": "\ud800"}), ("added_tokens.json", {"\ud800": 2048}),
    ("tokenizer_config.json", {"added_tokens_decoder": {"9" * 5000: {"content": "x"}}}),
    ("tokenizer_config.json", '{"a":' + "[" * 200000)])
def test_halves_and_depths_are_one_sentence(name, content, tmp_path):
    folder = tmp_path / "c"
    tokenizer_of(folder, {"tokenizer.model": "demo"}, 2050)
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(InputError, match=name):
        Tokenizer(Checkpoint(folder))


def test_a_model_that_is_none_is_refused(tiny):
    (tiny / "tokenizer.model").write_text("IQ== 0\n")           # tiktoken's, as LLaMA-3 has one
    with pytest.raises(InputError, match="is not a SentencePiece model"):
        Tokenizer(Checkpoint(tiny))
    (tiny / "tokenizer.model").unlink()
    with pytest.raises(InputError, match="no tokenizer.model or tokenizer.json"):
        Tokenizer(Checkpoint(tiny))


def test_all_files_of_a_tokenizer_are_copied_along(tiny):
    names = {"tokenizer.model", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "vocab.json",
             "merges.txt", "chat_template.jinja", "special_tokens_map.json", "added_tokens.json"}
    for name in names:
        (tiny / name).write_text("{}")
    assert {path.name for path in Checkpoint(tiny).extras()} == names


# ---------------------------------------------------------------------------------------------- chat
TURN = {"chatml": "<|im_end|>", "inst": "</s>", "header": "<|im_end|>"}


@pytest.mark.parametrize("kind", TEMPLATES)
@pytest.mark.parametrize("name", GOLDEN["chats"])
def test_a_chat_is_the_one_of_transformers(name, kind, tmp_path):
    pytest.importorskip("jinja2", reason="the optional package jinja2 is not installed")
    tokenizer, _ = case(name, tmp_path)
    (tmp_path / "ckpt" / "chat_template.jinja").write_text(TEMPLATES[kind], "utf-8")
    for turns, expected in zip(CHATS, GOLDEN["chats"][name][kind], strict=True):
        system = turns[0][1] if turns[0][0] == "system" else None
        chat = Chat(tokenizer, system)
        assert chat.render(turns[-1], start=True) == expected["text"]
        assert chat.encode(turns[-1][1]) == expected["ids"]
        turn = "<|end|>" if (kind, name) == ("inst", "json, more tokens") else TURN[kind]
        assert chat.eos == {tokenizer.id(turn)} != {None}


def chat_of(path, template, jinja=None, **more):
    files = {"tokenizer.model": "demo", "tokenizer_config.json": {"chat_template": template} | more}
    folder = folder_of(path, files, 2048)
    if jinja is not None:
        (folder / "chat_template.jinja").write_text(jinja, "utf-8")
    return Chat(Tokenizer(Checkpoint(folder)))


def test_where_a_template_stands(tmp_path):
    pytest.importorskip("jinja2", reason="the optional package jinja2 is not installed")
    several = [{"name": "tool_use", "template": "tool"}, {"name": "default", "template": "own"}]
    for i, (template, jinja, expected) in enumerate(
            [("own", None, "own"), (several, None, "own"), (several, "file", "file"), (None, "file", "file")]):
        assert chat_of(tmp_path / str(i), template, jinja).render(start=True) == expected
    for i, template in enumerate((None, several[:1], [])):
        with pytest.raises(InputError, match="has no chat template"):
            chat_of(tmp_path / f"none{i}", template)
    (tmp_path / "0" / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(InputError, match="UTF-8"):
        Chat(Tokenizer(Checkpoint(tmp_path / "0")))


@pytest.mark.parametrize("template, message", [
    ("{% if %}", "not a template"), ("{{ 'a' | nosuch }}", "not a template"),
    ("{{ raise_exception('no system\\nhere') }}", "no system here"),
    ("{{ messages[5].content }}", "cannot be filled in"),
    ("{{ 1 / 0 }}", "cannot be filled in"), ("{{ messages + 3 }}", "cannot be filled in"),
    ("{{ ''.__class__.__mro__ }}", "cannot be filled in"), ("{{ messages.append(1) }}", "cannot be filled in"),
    ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "cannot be filled in"),
])
def test_a_template_that_fails_is_one_sentence(template, message, tmp_path):
    pytest.importorskip("jinja2", reason="the optional package jinja2 is not installed")
    with pytest.raises(InputError, match=message) as error:
        chat_of(tmp_path / "c", template).encode("Hi")
    assert "\n" not in str(error.value)


def test_a_template_has_what_transformers_gives_one(tmp_path):
    pytest.importorskip("jinja2", reason="the optional package jinja2 is not installed")
    given = "{{ strftime_now('%Y')|length }}{{ {'a': '<ü>'}|tojson }}{{ [1]|tojson(indent=1) }}{{ tools }}" \
            "{{ eos_token }}"
    assert chat_of(tmp_path / "c", given).render(start=True) == '4{"a": "<ü>"}[\n 1\n]None</s>'
    # Only for questions: then nothing is known of how an answer ends.
    assert chat_of(tmp_path / "d", "{% if messages|length > 1 %}{{ raise_exception('x') }}{% endif %}a").eos == set()


def test_only_the_token_right_after_an_answer_ends_it(tmp_path):
    pytest.importorskip("jinja2", reason="the optional package jinja2 is not installed")
    assert chat_of(tmp_path / "c", "{{ messages[-1].content }}\n</s><s>next").eos == {2}
    assert chat_of(tmp_path / "d", "<s>{{ messages[-1].content }}\n").eos == set()


def test_chat_without_jinja2(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(InputError, match="pip install jinja2"):
        chat_of(tmp_path / "c", "x")


def command(monkeypatch, folder, drawn, *arguments):
    """Run generate.py's main with a model that draws the ids `drawn`; returns (prompts, ids that end)."""
    seen = {}

    def generate(decoder, prompts, steps, eos, stop, **sampling):
        seen.update(prompts=prompts, eos=eos)
        for token in drawn:
            if token in eos:
                return
            yield [token] * len(prompts)
            for b in range(len(prompts)):
                stop(b, token)
    monkeypatch.setattr(G, "generate", generate)
    monkeypatch.setattr(sys, "argv", ["generate.py", "--ckpt", str(folder), *arguments])
    G.main()
    return seen["prompts"], seen["eos"]


def test_generate_chat_prints_the_answer_alone(tmp_path, monkeypatch, capsys):
    pytest.importorskip("jinja2", reason="the optional package jinja2 is not installed")
    golden = GOLDEN["cases"]["demo, new"]
    folder = folder_of(tmp_path / "c", golden["files"], 2050, max_position_embeddings=200)
    (folder / "chat_template.jinja").write_text(TEMPLATES["inst"], "utf-8")
    expected = [chat["ids"] for chat in GOLDEN["chats"]["demo, new"]["inst"]]
    answer = Tokenizer(Checkpoint(folder)).encode("Fine, é!") + [2049, 5]
    prompts, eos = command(monkeypatch, folder, answer, "--chat", "--prompt", "Who are you?", "--stop", "<|im_end|>")
    assert (prompts, eos) == ([expected[0]], {2, 2049}) and prompts[0].count(1) == 1           # one BOS
    assert capsys.readouterr().out == "Fine, é!\n"
    (tmp_path / "p.txt").write_text("Who are you?\n<|im_end|> injected </s>\n")
    (folder / "chat_template.jinja").write_text(TEMPLATES["chatml"], "utf-8")
    prompts, eos = command(monkeypatch, folder, answer, "--chat", "--prompt-file", str(tmp_path / "p.txt"))
    expected = [chat["ids"] for chat in GOLDEN["chats"]["demo, new"]["chatml"]]
    assert (prompts, eos) == ([expected[0], expected[2]], {2, 2049})        # ChatML's end, which no file names
    assert capsys.readouterr().out == "--- 1 of 2\nFine, é!\n--- 2 of 2\nFine, é!\n"
    # Without --chat the prompt is printed, and what follows it.
    prompts, eos = command(monkeypatch, folder, answer, "--prompt", "a <|im_start|>b")
    assert (prompts, eos) == ([Tokenizer(Checkpoint(folder)).encode("a <|im_start|>b")], {2})
    assert capsys.readouterr().out.startswith("a <|im_start|>b Fine, é!")


def test_generate_refuses_before_any_work(monkeypatch):
    monkeypatch.setattr(Checkpoint, "model", None)
    for arguments, message in (
            (("--system", "x"), "add --chat"),
            (("--chat",), "has no chat template"),
            (("--stop", "a</s>"), "give the token alone")):
        with pytest.raises(InputError, match=message):
            command(monkeypatch, ROOT / "demo", [], *arguments)
