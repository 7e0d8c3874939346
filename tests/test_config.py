"""support/config.py: configurations edited as people edit them are computed as written or refused, never half read.

tests/config_sweep.py does the same for every key against the transformers package."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from public_configs import CONFIGS
from conftest import TINY, script, write_checkpoint
from safetensors.torch import load_file, save_file
from support.checkpoint import Checkpoint
from support.config import FAMILIES, NEUTRAL, parse_config
from support.script import InputError
from support.texts import with_defaults

LINEAR = {"rope_type": "linear", "factor": 4.0}
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=16)
MISTRAL = TINY | {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
QWEN2 = TINY | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "max_position_embeddings": 32768}
QWEN3 = TINY | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 8}


def without(config, *keys):
    return {key: value for key, value in config.items() if key not in keys}


REFUSED = {     # what: (configuration, words of the sentence)
    "scaling beside other parameters": (
        TINY | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "rope_scaling": LINEAR},
        "in rope_parameters.*in rope_scaling"),
    "scaling of another factor": (
        TINY | {"rope_parameters": LINEAR, "rope_scaling": LINEAR | {"factor": 2.0}}, "factor 4.0 .* and 2.0"),
    "another base at the top": (
        TINY | {"rope_theta": 5e5, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, "rope_theta"),
    "another original context at the top": (
        TINY | {"rope_scaling": LLAMA3, "original_max_position_embeddings": 32}, "32.* at the top and 16"),
    "two names of the type": (TINY | {"rope_scaling": {"rope_type": "default", "type": "linear", "factor": 2.0}},
        "linear"),
    "parameters by layer type": (TINY | {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
        "full_attention"),
    "a key of another type": (TINY | {"rope_scaling": {"rope_type": "linear", "factor": 4.0, "beta_fast": 32}},
        "beta_fast"),
    "half of a head rotated": (TINY | {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        "partial_rotary"),
    "an empty band": (TINY | {"rope_scaling": LLAMA3 | {"low_freq_factor": 4.0}}, "low_freq_factor"),
    "no causal mask": (TINY | {"is_causal": False}, "is_causal"),
    "granite by its model_type": (TINY | {"model_type": "granite"}, "granite"),
    "norms that llama has not": (TINY | {"use_qk_norm": True}, "use_qk_norm"),
    "granite's multipliers": (TINY | {"embedding_multiplier": 12.0}, "embedding_multiplier"),
    "layers of another kind": (QWEN2 | {"layer_types": ["full_attention", "chunked_attention"]}, "layer_types"),
    "layer_types of another length": (QWEN2 | {"layer_types": ["full_attention"]}, "layer_types"),
    "a classifier": (TINY | {"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
    "neither name": (without(TINY, "architectures", "model_type"), "neither 'model_type' nor 'architectures'"),
    "an odd head": (TINY | {"head_dim": 7}, "head_dim 7"),
    "quantized": (TINY | {"quantization_config": {"bits": 4}}, "quantized"),
    "heads that do not divide": (TINY | {"num_attention_heads": 5, "num_key_value_heads": 5},
        "hidden_size 32 for 5 heads"),
}


@pytest.mark.parametrize("what", REFUSED, ids=lambda what: what.replace(" ", "-"))
def test_refused(what):
    config, words = REFUSED[what]
    with pytest.raises(InputError, match=words) as refusal:
        parse_config(config)
    assert "\n" not in str(refusal.value)


WHOLE = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
         "num_key_value_heads", "head_dim", "max_position_embeddings", "max_sequence_length", "sliding_window")
REAL = ("rms_norm_eps", "rope_theta", "original_max_position_embeddings")
YES_NO = ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window")
OBJECTS = ("rope_parameters", "rope_scaling", "air")
WRONG = {
    **dict.fromkeys(WHOLE, (0, -1, 2.5, True, "64", [64], {"a": 1}, float("nan"), 10**30)),
    **dict.fromkeys(REAL, (0, -1.0, True, "1", [1.0], {}, float("nan"), float("inf"), 10**400)),
    **dict.fromkeys(YES_NO, ("false", "true", 1, 0, [True], {})),
    **dict.fromkeys(OBJECTS, ("linear", [4.0], 4.0, True)),
    "architectures": ("LlamaForCausalLM", [], [3], {"a": 1}, True),
    "model_type": (3, ["llama"], "Llama 3", True, {}),
    "layer_types": ("full_attention", [1, 2], {}, 3),
    "max_window_layers": (-1, "2", [2], 2.5, True),
    "hidden_act": (3, ["silu"], "gelu", True),
}


@pytest.mark.parametrize("key", WRONG)
def test_every_value_has_its_type_checked(key):
    config = {"sliding_window": MISTRAL, "layer_types": QWEN2,
              "max_window_layers": QWEN2 | {"use_sliding_window": True}}.get(key, TINY)
    for value in WRONG[key]:
        with pytest.raises(InputError, match=key):
            parse_config(config | {key: value})


def test_values_inside_are_checked_too():
    for key in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings", "rope_theta"):
        for value in (0, -1.0, "4", [4], True, float("nan")):
            with pytest.raises(InputError, match=key):
                parse_config(TINY | {"rope_scaling": LLAMA3 | {key: value}})
    for ranks in ([3], "3", {"model.layers.0.mlp.up_proj": "3"}, {"model.layers.0.mlp.up_proj": 0}):
        with pytest.raises(InputError, match="ranks|up_proj"):
            parse_config(TINY | {"air": {"ranks": ranks}})


@pytest.mark.parametrize("named", ["x", [1], True, {"text": 5}, {"text": ["a"]}, {"samples": "64"}, {"seqlen": 1.5},
                                   {"samples": True}, {"samples": 0}], ids=str)
def test_what_a_checkpoint_names_as_defaults_is_checked(named, tmp_path):
    with pytest.raises(InputError, match="config.json has "):
        with_defaults(Checkpoint(write_checkpoint(tmp_path / "c", defaults=named)))


def test_a_body_alone_is_read_where_its_embedding_is_its_head():
    for name in ("LlamaModel", "AirLlamaModel"):
        assert parse_config(TINY | {"architectures": [name]}) == parse_config(TINY)


def test_null_is_absence():
    for key in (*YES_NO, *OBJECTS, "head_dim", "num_key_value_heads", "rope_theta", *NEUTRAL):
        assert parse_config(TINY | {key: None}) == parse_config(without(TINY, key))


def test_what_agrees_is_read():
    theta = TINY | {"rope_theta": 1e4}
    both = theta | {"rope_parameters": LINEAR | {"rope_theta": 1e4}, "rope_scaling": {"type": "linear", "factor": 4}}
    assert parse_config(both) == parse_config(theta | {"rope_scaling": LINEAR})
    moved = LLAMA3 | {"original_max_position_embeddings": None}
    assert parse_config(TINY | {"rope_scaling": moved, "original_max_position_embeddings": 16}) \
        == parse_config(TINY | {"rope_scaling": LLAMA3})
    assert parse_config(TINY | {"hidden_act": "swish"}) == parse_config(TINY)
    assert parse_config(TINY | {"model_type": "air_llama",
        "architectures": ["AirLlamaForCausalLM"]}) == parse_config(TINY)
    assert parse_config(TINY | {"original_max_position_embeddings": 16}) == parse_config(TINY)      # of no use here


def test_model_type_decides():
    for kind, name in FAMILIES.items():
        one = parse_config(TINY | {"model_type": kind, "architectures": ["LlamaForCausalLM"], "head_dim": 8})
        assert one == parse_config(TINY | {"model_type": kind, "architectures": [name], "head_dim": 8})
        assert one == parse_config(without(TINY, "architectures") | {"model_type": kind, "head_dim": 8})
        assert one == parse_config(without(TINY, "model_type") | {"architectures": [name], "head_dim": 8})


def test_the_longer_context():
    vicuna = TINY | {"max_position_embeddings": 16, "max_sequence_length": 64, "rope_scaling": LINEAR}
    assert parse_config(vicuna).context == 64
    assert parse_config(vicuna | {"max_position_embeddings": 128}).context == 128


def test_sliding_layers_by_name():
    types = ["full_attention", "sliding_attention"]
    assert parse_config(QWEN2 | {"layer_types": types, "sliding_window": 8}).context == 8
    assert parse_config(QWEN2 | {"layer_types": ["full_attention"] * 2, "use_sliding_window": True}).context == 32768
    assert parse_config(QWEN3 | {"use_sliding_window": True, "max_window_layers": 0, "sliding_window": 8}).context == 8


def test_head_size_of_qwen3_has_a_default_of_its_own():
    assert parse_config(without(QWEN3, "head_dim")).head_dim == 128
    assert parse_config(without(TINY, "head_dim")).head_dim == 8


# ---- the files


def test_a_head_is_never_dropped_in_silence(tmp_path, windows):
    folder = write_checkpoint(tmp_path / "tied", tie_word_embeddings=True)
    logits = Checkpoint(folder).model()(windows)
    state = load_file(folder / "model.safetensors")
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    save_file(state, folder / "model.safetensors")
    assert torch.equal(Checkpoint(folder).model()(windows), logits)                 # the same twice
    state["lm_head.weight"][3, 5] += 1
    save_file(state, folder / "model.safetensors")
    with pytest.raises(InputError, match="tie_word_embeddings true, but lm_head.weight"):
        Checkpoint(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    changed = Checkpoint(folder).model()(windows)                                   # as the sentence advises
    assert np.unique(np.nonzero(changed.numpy() != logits.numpy())[2]).tolist() == [3]


@pytest.mark.parametrize("index", ["[]", '"model"', '{"weight_map": 3}', '{"weight_map": {"a": 3}}',
    '{"weight_map": {}}',
                                   '{"weight_map": {"a": ["b"]}}', "{}", "",
                                       '{"weight_map": {"a": "../b.safetensors"}}'])
def test_an_index_without_a_usable_map(index, tiny):
    (tiny / "model.safetensors").rename(tiny / "model-00001-of-00001.safetensors")
    (tiny / "model.safetensors.index.json").write_text(index)
    with pytest.raises(InputError, match="index.json"):
        Checkpoint(tiny)


def test_a_mistyped_number_of_blocks_ends_at_once(tiny):
    config = json.loads((tiny / "config.json").read_text())
    (tiny / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 10**9}))
    with pytest.raises(InputError, match="lacks 1 tensor"):
        Checkpoint(tiny)


def test_the_command_refuses_in_one_sentence(tiny, tmp_path):
    for key, value in (("rope_scaling", [4]), ("tie_word_embeddings", "false"), ("hidden_size", "32"), ("is_causal",
        False)):
        folder = write_checkpoint(tmp_path / key)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {key: value}))
        done = script("eval_ppl", "--ckpt", folder)
        assert done.returncode == 2 and key in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("name", CONFIGS, ids=lambda name: name.replace(" ", "-"))
def test_public_forms_are_read(name):
    """tests/test_transformers.py compares their logits; here, what each is known by."""
    raw, cfg = CONFIGS[name], parse_config(CONFIGS[name])
    assert cfg.context == (48 if name in ("mistral 0.1", "zephyr") else 64)
    assert cfg.tied == raw.get("tie_word_embeddings", False) and cfg.qk_norm == ("qwen3" in name)
    assert cfg.n_kv_heads == raw.get("num_key_value_heads", 4) and len(cfg.biases) == 3 * (raw["model_type"] == "qwen2")


@pytest.mark.parametrize("path", sorted((Path(__file__).parent / "golden").glob("*.npz")), ids=lambda path: path.stem)
def test_golden_configurations_are_read_without_a_guess(path):
    """Every key that the file's configuration has is either read or has no part in the logits."""
    config = json.loads(str(np.load(path)["config"]))
    assert parse_config(config).n_heads == config["num_attention_heads"]
