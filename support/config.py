"""config.json -> model.Config: every value's type is checked where it is read, and
whatever would change the numbers and is not computed is refused by name."""
import re
from pathlib import Path

from model import LAYERS, Config
from support.packed import WIDTHS
from support.script import InputError

# {model_type: its architecture}. model_type decides how a model computes; a result of
# air.py has "air_" in front.
FAMILIES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
RESULT = "air_"
ROPE_KEYS = {       # rope_type: what it needs
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor",
               "original_max_position_embeddings"),
}
# Keys of RoPE's object that every type may carry.
ROPE_COMMON = ("rope_type", "type", "rope_theta", "original_max_position_embeddings",
               "partial_rotary_factor")
# {key: the values that compute what model.py computes}; None is a key's absence.
NEUTRAL = {
    "hidden_act": (None, "silu", "swish"),              # two names of one function
    "is_causal": (None, True),
    "is_encoder_decoder": (None, False),
    "add_cross_attention": (None, False),
    "partial_rotary_factor": (None, 1),
    "rope_interleaved": (None, False),
    "use_mrope": (None, False),
    "per_layer_config": (None, {}),
    "quantization_config": (None, {}),
    # Of relatives: Granite, MiniCPM, Gemma, OLMo, Cohere, SmolLM3.
    "embedding_multiplier": (None, 1),
    "residual_multiplier": (None, 1),
    "attention_multiplier": (None,),
    "logits_scaling": (None, 1),
    "logit_scale": (None, 1),
    "scale_emb": (None, 1),
    "scale_depth": (None,),
    "attn_logit_softcapping": (None, 0),
    "final_logit_softcapping": (None, 0),
    "query_pre_attn_scalar": (None,),
    "clip_qkv": (None,),
    "no_rope_layers": (None, []),
}
# What would have to be done, where there is more to say than the key's name.
INSTEAD = {"quantization_config": "the checkpoint is quantized: point at its fp32, fp16 "
                                  "or bf16 original"}
LARGEST = 2**31         # no size in a config.json is as large
HALF = re.compile(r"model\.layers\.([0-9]{1,6})\.(self_attn|mlp)")


# ------------------------------------------------------------ values
def refuse(key, value, expected):
    """The InputError of a value that is not what was expected."""
    return InputError(f"config.json has {key} {value!r}; expected {expected}: "
                      "use the one that came with the weights")


def integer(raw, key, default=None, least=1):
    """A whole number of `least` or more; `default` where the key is absent or null.

    Raises InputError for anything else, and where it is absent without a default.
    """
    value = raw.get(key)
    if value is None:
        value = default
    if value is None:
        raise InputError(f"config.json has no '{key}'; "
                         "use the one that came with the weights")
    if type(value) is not int or not least <= value < LARGEST:
        raise refuse(key, value, f"a whole number, {least} or more")
    return value


def real(raw, key, where="", below=1e12):
    """A number above 0 and `below`; None where the key is absent or null."""
    value = raw.get(key)
    if value is None:
        return None
    if type(value) not in (int, float) or not 0 < value < below:
        raise refuse(where + key, value, f"a number above 0, below {below:.0e}")
    return float(value)


def boolean(raw, key):
    """true or false; False where the key is absent or null."""
    value = raw.get(key)
    if value is not None and not isinstance(value, bool):
        raise refuse(key, value, "true or false")
    return bool(value)


def mapping(raw, key):
    """An object; {} where the key is absent or null."""
    value = raw.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise refuse(key, value, "an object")
    return value


def same(value, neutral):
    """Are two JSON values equal, true and 1 told apart?"""
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)


# ------------------------------------------------------------ which model it is
def family(raw):
    """Which of FAMILIES a config.json describes. Raises InputError for any other.

    model_type decides; architectures does where it is absent (LLaMA 1). Where both are
    there, each must be one that is known.
    """
    known = {name.lower(): kind for kind, name in FAMILIES.items()}
    # The body alone, which transformers' AutoModel saves; tied, it is whole.
    known |= {kind + "model": kind for kind in FAMILIES}
    named = raw.get("architectures")
    kind = raw.get("model_type")
    if named is not None:
        if not isinstance(named, list) or not named or not isinstance(named[0], str):
            raise refuse("architectures", named, "a list of names")
        by_name = known.get(named[0].lower().removeprefix("air"))
        if by_name is None:
            raise InputError(f"config.json names the architecture {named[0]}; "
                             f"supported are {', '.join(FAMILIES.values())}")
    if kind is None:
        if named is None:
            raise InputError("config.json has neither 'model_type' nor 'architectures'; "
                             "use the one that came with the weights")
        return by_name
    if not isinstance(kind, str) or kind.removeprefix(RESULT) not in FAMILIES:
        raise InputError(f"config.json has the model_type {kind!r}; "
                         f"supported are {', '.join(FAMILIES)}")
    return kind.removeprefix(RESULT)


def check_neutral(raw):
    """Raise InputError for a key whose value asks for what model.py does not compute."""
    for key, values in NEUTRAL.items():
        value = raw.get(key)
        if not any(same(value, neutral) for neutral in values):
            known = " or ".join(repr(each) for each in values if each is not None)
            advice = INSTEAD.get(key, f"model.py computes {known or 'without it'} only")
            raise InputError(f"config.json has {key} {value!r}; {advice}")


# ------------------------------------------------------------ RoPE
def rope_type(found, key):
    """The type that RoPE's object `found` under `key` names, under its new key or old."""
    named = [found[name] for name in ("rope_type", "type") if name in found]
    kind = named[0] if named else "default"
    if not isinstance(kind, str) or kind not in ROPE_KEYS or kind != (named or [kind])[-1]:
        raise InputError(f"config.json has the rope_type {' and '.join(map(repr, named))} "
                         f"in {key}; supported is one of {', '.join(ROPE_KEYS)}")
    return kind


def rope_object(raw, key):
    """RoPE's settings under `key`, {"rope_type": …}; {} where there are none."""
    found = {name: value for name, value in mapping(raw, key).items()
             if value is not None}
    if not found:
        return {}
    kind = rope_type(found, key)
    foreign = found.keys() - {*ROPE_COMMON, *ROPE_KEYS[kind]}
    if foreign:
        raise InputError(f"config.json has {key}.{min(foreign)}, with which rope_type "
                         f"'{kind}' does not compute; use what came with the weights")
    if not same(found.pop("partial_rotary_factor", 1), 1):
        raise InputError(f"config.json has a partial_rotary_factor in {key}; "
                         "model.py rotates whole heads only")
    settings = {"rope_type": kind}
    for name in found.keys() - {"rope_type", "type"}:
        settings[name] = real(found, name, f"{key}.")
    return settings


def agreed(key, places):
    """The value of `key` in all of `places`, {where: an object}; None where it is in none.

    Raises InputError where two differ.
    """
    found = {where: values[key] for where, values in places.items() if key in values}
    for where, value in found.items():
        first = next(iter(found))
        if value != found[first]:
            raise InputError(f"config.json has {key} {found[first]!r} {first} and {value!r} "
                             f"{where}; expected one: delete the one that is not meant")
    return next(iter(found.values()), None)


def rope_settings(raw):
    """config.json's RoPE under one form, {"rope_type": …, "rope_theta": …, …}.

    Raises InputError where it is given twice, differently.
    """
    numbers = {key: real(raw, key) for key in ROPE_COMMON[2:4] if raw.get(key) is not None}
    places = {"at the top": numbers}
    for key in ("rope_parameters", "rope_scaling"):
        found = rope_object(raw, key)
        if found:
            places[f"in {key}"] = found
    kind = agreed("rope_type", places) or "default"
    settings = {"rope_type": kind, "rope_theta": agreed("rope_theta", places)}
    for key in ROPE_KEYS[kind]:
        settings[key] = agreed(key, places)
    missing = [key for key in ROPE_KEYS[kind] if settings[key] is None]
    if missing:
        raise InputError(f"config.json's rope_type '{kind}' lacks {', '.join(missing)}; "
                         "use the one that came with the weights")
    if kind == "llama3" and settings["low_freq_factor"] >= settings["high_freq_factor"]:
        raise InputError(f"config.json has low_freq_factor {settings['low_freq_factor']}, "
                         f"high_freq_factor {settings['high_freq_factor']}; expected the "
                         "first to be less")
    return settings


# ------------------------------------------------------------ what differs by family
def biased(raw):
    """The layers that carry a bias."""
    kind = family(raw)
    attention = boolean(raw, "attention_bias")
    mlp = boolean(raw, "mlp_bias")
    names = ()
    if kind == "qwen2":
        names = LAYERS[:3]                                              # q, k and v
    elif attention and kind in ("llama", "qwen3"):
        names = LAYERS[:4]                                              # and o
    if mlp and kind == "llama":
        names += LAYERS[4:]
    return frozenset(names)


def sliding_layers(raw):
    """How many blocks see a sliding window only."""
    n = integer(raw, "num_hidden_layers")
    kind = family(raw)
    types = raw.get("layer_types")
    slides = boolean(raw, "use_sliding_window")
    if types is not None:
        known = ("full_attention", "sliding_attention")
        fits = isinstance(types, list) and len(types) == n
        if not fits or not all(each in known for each in types):
            raise refuse("layer_types", types, f"{n} times {' or '.join(known)}")
    if kind == "mistral":
        return n
    if types is not None:
        return types.count("sliding_attention")
    if kind == "llama":
        return n if slides else 0
    full = integer(raw, "max_window_layers", 28, least=0)
    return max(0, n - full) if slides else 0


def longest_window(raw):
    """The context in tokens.

    Not in the paper: a sliding window is not computed. Up to its width it equals full
    attention, so it bounds the context instead. Where the key is absent its width is
    4096 by the format; null is no window.
    """
    named = [integer(raw, key) for key in ("max_position_embeddings", "max_sequence_length")
             if raw.get(key) is not None]
    if not named:
        integer(raw, "max_position_embeddings")
    context = max(named)
    if raw.get("sliding_window", 4096) is None or not sliding_layers(raw):
        return context
    return min(context, integer(raw, "sliding_window", 4096))


def head_sizes(raw):
    """(heads, key/value heads, D), each checked against the others."""
    heads = integer(raw, "num_attention_heads")
    kv_heads = integer(raw, "num_key_value_heads", heads)
    if heads % kv_heads:
        raise InputError(f"config.json has {heads} heads on {kv_heads} key/value heads; "
                         "expected a multiple")
    dim = integer(raw, "hidden_size")
    if raw.get("head_dim") is None and family(raw) != "qwen3" and dim % heads:
        raise InputError(f"config.json has hidden_size {dim} for {heads} heads and no "
                         "head_dim; expected a multiple")
    # Qwen3's format has a size of its own where the key is absent.
    default = 128 if family(raw) == "qwen3" else dim // heads
    D = integer(raw, "head_dim", default)
    if D % 2 or heads * D >= LARGEST:
        raise refuse("head_dim", D, "an even size, as RoPE rotates pairs")
    return heads, kv_heads, D


def own_defaults(raw):
    """What config.json names under "defaults": a text, samples, seqlen, or fewer."""
    section = mapping(raw, "defaults")
    found = {key: integer(section, key) for key in ("samples", "seqlen")
             if section.get(key) is not None}
    text = section.get("text")
    if text is not None:
        if not isinstance(text, str):
            raise refuse("defaults.text", text, "a text's name")
        found["text"] = text
    return found


def ranks_of(raw):
    """{layer: k} of a result's low-rank layers."""
    section = mapping(raw, "air")
    ranks = mapping(section, "ranks")
    for layer in ranks:
        integer(ranks, layer)
    return ranks


def removed_of(raw):
    """The halves of blocks that peers/blockpruner.py left out."""
    names = mapping(raw, "air").get("removed", [])
    texts = isinstance(names, list) and all(isinstance(name, str) for name in names)
    found = [HALF.fullmatch(name) for name in names] if texts else [None]
    blocks = integer(raw, "num_hidden_layers")
    if not all(half and int(half[1]) < blocks for half in found):
        raise refuse("air.removed", names, "a list of halves such as model.layers.0.mlp")
    return frozenset(names)


def quantized_of(raw):
    """(bits, group) of a result whose factors enhance/quantize.py packed; else None."""
    section = mapping(mapping(raw, "air"), "quantized")
    if not section:
        return None
    bits = integer(section, "bits")
    if bits not in WIDTHS:
        raise refuse("air.quantized.bits", bits, f"one of {WIDTHS}")
    return bits, integer(section, "group", least=0)


# ------------------------------------------------------------ the whole
def parse_config(raw):
    """config.json, a dict -> Config.

    It has Hugging Face's keys, from LLaMA 1's to `rope_parameters`. Raises InputError for
    a missing key or anything that model.py does not compute.
    """
    kind = family(raw)
    check_neutral(raw)
    if boolean(raw, "use_qk_norm") and kind != "qwen3":
        raise refuse("use_qk_norm", True, f"none in a {kind}")
    heads, kv_heads, D = head_sizes(raw)
    rope = rope_settings(raw)
    theta = rope.pop("rope_theta")
    # LLaMA 1 and 2 are older than rope_theta: the format defines its absence.
    if theta is None and kind != "llama":
        raise InputError("config.json has no 'rope_theta'; "
                         "use the one that came with the weights")
    eps = real(raw, "rms_norm_eps", below=1)
    if eps is None:
        raise InputError("config.json has no 'rms_norm_eps'; "
                         "use the one that came with the weights")
    return Config(
        vocab=integer(raw, "vocab_size"),
        dim=integer(raw, "hidden_size"),
        hidden=integer(raw, "intermediate_size"),
        n_layers=integer(raw, "num_hidden_layers"),
        n_heads=heads,
        n_kv_heads=kv_heads,
        head_dim=D,
        context=longest_window(raw),
        norm_eps=eps,
        rope_theta=theta or 10000.0,
        rope_scaling=rope,
        tied=boolean(raw, "tie_word_embeddings"),
        qk_norm=kind == "qwen3",
        biases=biased(raw),
        ranks=ranks_of(raw),
        turned=boolean(mapping(raw, "air"), "turned"),
        removed=removed_of(raw),
    )


# ------------------------------------------------------------ names of a result
MODELING = Path(__file__).with_name("modeling_air.py")      # lies beside every result


def compressed_config(raw, section):
    """config.json of a checkpoint -> its result's, with `section` as what AIR did.

    The type, of its own, and the classes of modeling_air.py that compute it keep other
    tools from reading it as the dense model, whose weights they would miss.
    """
    kind = family(raw)
    name = "Air" + kind.capitalize()
    # vLLM goes through them in this order.
    classes = {"AutoConfig": "Config", "AutoModel": "Model",
               "AutoModelForCausalLM": "ForCausalLM"}
    auto_map = {auto: f"{MODELING.stem}.{name}{suffix}"
                for auto, suffix in classes.items()}
    return raw | {"model_type": RESULT + kind, "architectures": [name + "ForCausalLM"],
                  "auto_map": auto_map, "air": section}


def dense_config(raw):
    """config.json of a result -> that of the same model with whole weights."""
    kind = family(raw)
    kept = {key: raw[key] for key in raw if key not in ("air", "auto_map")}
    return kept | {"model_type": kind, "architectures": [FAMILIES[kind]]}
