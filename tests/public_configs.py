"""The forms in which public checkpoints state their configuration: the keys as they are published, the sizes shrunk.

What counts is which keys are there: LLaMA 1 has neither key/value heads nor RoPE's base, Mistral 0.2 a window of null,
Qwen2 a window that is switched off, LLaMA 3.2 a tied head, Nemo heads whose widths do not add up to the model's.
"""
SIZES = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             hidden_act="silu", rms_norm_eps=1e-5, initializer_range=0.02, use_cache=True, torch_dtype="float16")
LLAMA = dict(SIZES, architectures=["LlamaForCausalLM"], model_type="llama", max_position_embeddings=64, bos_token_id=1,
             eos_token_id=2)
LLAMA2 = dict(LLAMA, num_key_value_heads=4, pretraining_tp=1, rope_scaling=None, tie_word_embeddings=False)
LLAMA3 = dict(LLAMA2, num_key_value_heads=2, rope_theta=500000.0, attention_bias=False, attention_dropout=0.0)
BANDS = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32,
             rope_type="llama3")
MISTRAL = dict(SIZES, architectures=["MistralForCausalLM"], model_type="mistral", num_key_value_heads=2,
               max_position_embeddings=64, rope_theta=10000.0, sliding_window=48, tie_word_embeddings=False)
QWEN2 = dict(SIZES, architectures=["Qwen2ForCausalLM"], model_type="qwen2", num_key_value_heads=2,
             max_position_embeddings=64, max_window_layers=2, rope_theta=1000000.0, sliding_window=64,
             use_sliding_window=False, tie_word_embeddings=False, attention_dropout=0.0, rms_norm_eps=1e-6)
QWEN3 = dict(QWEN2, architectures=["Qwen3ForCausalLM"], model_type="qwen3", head_dim=16, attention_bias=False,
             rope_scaling=None, sliding_window=None)


def without(config, *keys):
    return {key: value for key, value in config.items() if key not in keys}


CONFIGS = {
    "llama-1 (first conversion)": without(LLAMA, "max_position_embeddings") | dict(
        architectures=["LLaMAForCausalLM"], max_sequence_length=64, pad_token_id=-1, bos_token_id=0, eos_token_id=1),
    "llama-1 7B": dict(LLAMA, rms_norm_eps=1e-6, pad_token_id=0, tie_word_embeddings=False),
    "open-llama 3B": dict(LLAMA, rms_norm_eps=1e-6, pad_token_id=0, tie_word_embeddings=False, hidden_size=40),
    "vicuna 1.3": dict(LLAMA, max_sequence_length=64, rms_norm_eps=1e-6, pad_token_id=0, tie_word_embeddings=False),
    "vicuna 1.5": dict(LLAMA2, pad_token_id=0),
    "vicuna 1.5 16k": dict(LLAMA2, max_position_embeddings=16, max_sequence_length=64, pad_token_id=0,
                           rope_scaling={"factor": 4.0, "type": "linear"}),
    "llama-2 7B": LLAMA2,
    "llama-2 70B": dict(LLAMA2, num_key_value_heads=1),
    "llama-2 7B 32K (together)": dict(LLAMA2, rope_scaling={"factor": 8.0, "type": "linear"}, pad_token_id=0),
    "code llama 7B": dict(LLAMA2, rope_theta=1000000),
    "tinyllama 1.1B": dict(LLAMA2, num_key_value_heads=1, attention_bias=False),
    "solar 10.7B": dict(LLAMA2, num_key_value_heads=2, rope_theta=10000.0, attention_bias=False),
    "yi 6B": dict(LLAMA2, num_key_value_heads=1, rope_theta=5000000.0, pad_token_id=0),
    "deepseek-llm 7B": dict(LLAMA2, attention_bias=False, attention_dropout=0.0, rms_norm_eps=1e-6),
    "deepseek-coder 6.7B": dict(LLAMA2, rope_theta=100000, rope_scaling={"factor": 4.0, "type": "linear"}),
    "internlm2 as llama": dict(LLAMA2, num_key_value_heads=2, rope_theta=1000000, bias=False),
    "llama-3 8B": LLAMA3,
    "llama-3 8B instruct": dict(LLAMA3, eos_token_id=[2, 9]),
    "llama-3.1 8B": dict(LLAMA3, rope_scaling=BANDS, mlp_bias=False, eos_token_id=[2, 8, 9]),
    "llama-3.2 1B": dict(LLAMA3, rope_scaling=BANDS | {"factor": 32.0}, head_dim=8, mlp_bias=False,
                         tie_word_embeddings=True),
    "llama-3.3 70B": dict(LLAMA3, rope_scaling=BANDS, head_dim=8, mlp_bias=False),
    "deepseek-r1 distill llama": dict(LLAMA3, rope_scaling=BANDS, mlp_bias=False),
    "smollm 135M": dict(LLAMA2, num_key_value_heads=2, tie_word_embeddings=True, rope_theta=10000.0),
    "smollm2 135M": dict(LLAMA2, num_key_value_heads=2, tie_word_embeddings=True, rope_theta=100000,
                         is_llama_config=True, rope_interleaved=False, pad_token_id=2),
    "saved by transformers 5": without(LLAMA3, "rope_theta", "rope_scaling", "torch_dtype") | dict(
        dtype="float32", rope_parameters=BANDS | {"rope_theta": 500000.0}, head_dim=8, mlp_bias=False,
        pad_token_id=None, transformers_version="5.24.0"),
    "mistral 0.1": MISTRAL,
    "mistral 0.2": dict(MISTRAL, rope_theta=1000000.0, sliding_window=None),
    "mistral nemo": dict(MISTRAL, head_dim=12, rope_theta=1000000.0, sliding_window=None),
    "zephyr": dict(MISTRAL, pad_token_id=2),
    "qwen2 0.5B": dict(QWEN2, tie_word_embeddings=True),
    "qwen2.5 7B": QWEN2,
    "deepseek-r1 distill qwen": dict(QWEN2, rope_theta=10000, use_mrope=False),
    "qwen3 0.6B": dict(QWEN3, tie_word_embeddings=True),
    "qwen3 8B": QWEN3,
}
