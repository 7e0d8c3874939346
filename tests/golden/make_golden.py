"""Make the golden logits beside this file with the transformers package (made with 5.x; the tests do not need it).

    python tests/golden/make_golden.py

Weights are drawn from a fixed NumPy stream by name, so a file holds only the configuration, token ids and fp32 logits.
"""
import json
from pathlib import Path

import numpy as np

SMALL = dict(hidden_act="silu", vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, rms_norm_eps=1e-5,
             rope_theta=10000.0, tie_word_embeddings=False)
CASES = {
    "llama-grouped": dict(SMALL, architectures=["LlamaForCausalLM"], model_type="llama"),
    "llama-multihead-wide-heads": dict(
        SMALL,
        architectures=["LlamaForCausalLM"],
        model_type="llama",
        num_key_value_heads=4,
        head_dim=12,
        attention_bias=True,
        mlp_bias=True,
    ),
    "llama-3.1-rope": dict(
        SMALL,
        architectures=["LlamaForCausalLM"],
        model_type="llama",
        rope_theta=500000.0,
        rope_scaling=dict(
            rope_type="llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=16,
        ),
    ),
    "llama-linear-rope": dict(
        SMALL, architectures=["LlamaForCausalLM"], model_type="llama", rope_scaling=dict(rope_type="linear", factor=4.0)
    ),
    "mistral": dict(
        SMALL,
        architectures=["MistralForCausalLM"],
        model_type="mistral",
        num_key_value_heads=1,
        sliding_window=48,
        rms_norm_eps=1e-6,
    ),
    "qwen2.5": dict(
        SMALL,
        architectures=["Qwen2ForCausalLM"],
        model_type="qwen2",
        rope_theta=1000000.0,
        use_sliding_window=False,
        sliding_window=64,
        max_window_layers=2,
    ),
    "qwen2.5-tied": dict(
        SMALL,
        architectures=["Qwen2ForCausalLM"],
        model_type="qwen2",
        tie_word_embeddings=True,
        use_sliding_window=False,
    ),
    "qwen3": dict(
        SMALL,
        architectures=["Qwen3ForCausalLM"],
        model_type="qwen3",
        rope_theta=1000000.0,
        head_dim=12,
        attention_bias=False,
        use_sliding_window=False,
        max_window_layers=2,
    ),
    "qwen3-tied-biased": dict(
        SMALL,
        architectures=["Qwen3ForCausalLM"],
        model_type="qwen3",
        head_dim=16,
        num_key_value_heads=1,
        attention_bias=True,
        tie_word_embeddings=True,
    ),
}


def weights(shapes, seed=0):
    """{name: shape} -> {name: fp32 array}, one fixed stream per name: norms near 1, matrices of gain about 1.5."""
    out = {}
    for name, shape in shapes.items():
        stream = np.random.RandomState([seed, *name.encode()])
        x = stream.standard_normal(shape)
        out[name] = (1 + 0.2 * x if name.endswith("norm.weight") else 0.3 * x if len(shape) == 1
                     else x * (1.0 if "embed" in name else 1.5 / shape[1] ** 0.5)).astype(np.float32)
    return out


def main():
    import torch
    import transformers
    for case, config in CASES.items():
        path = Path(__file__).parent / f"{case}.npz"
        if path.exists():               # the others' stay as they were made
            continue
        arch = getattr(transformers, config["architectures"][0])
        cfg = arch.config_class(**{k: v for k, v in config.items() if k not in ("architectures", "model_type")})
        model = arch(cfg).eval().float()
        shapes = {name: tuple(w.shape) for name, w in model.state_dict().items()}
        if config["tie_word_embeddings"]:
            shapes.pop("lm_head.weight", None)
        state = {name: torch.from_numpy(w) for name, w in weights(shapes).items()}
        if config["tie_word_embeddings"]:
            state["lm_head.weight"] = state["model.embed_tokens.weight"]
        model.load_state_dict(state)
        ids = np.random.RandomState(7).randint(0, 64, size=(2, 40))
        with torch.no_grad():
            logits = model(torch.from_numpy(ids)).logits.numpy()
        np.savez(
            path,
            ids=ids.astype(np.int16),
            logits=logits,
            config=json.dumps(config),
            made_with=f"transformers {transformers.__version__}, torch {torch.__version__}",
        )
        print(case, logits.std(), len(shapes))


if __name__ == "__main__":
    main()
