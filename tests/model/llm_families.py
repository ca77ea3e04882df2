"""Tiny random LLMs of every family of the table, each with what its family has of windows, norms, biases and widths."""

SIZES = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "max_position_embeddings": 256,
}
ONE_KIND = {name: value for name, value in SIZES.items() if name != "num_key_value_heads"}
OLD = {"vocab_size": 60, "bos_token_id": 1, "eos_token_id": 2, "n_embd": 32, "n_layer": 2, "n_head": 4}
WIDE = {"head_dim": 16}
WINDOW = {"sliding_window": 5}
MIXED = {"layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
GLM_EXPERTS = EXPERTS | {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1}
QWEN_WINDOW = WINDOW | {"use_sliding_window": True, "max_window_layers": 1}

# name -> its class, its configuration's, and settings.
JOINED = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", SIZES | WIDE | {"attention_bias": True}),
    "mistral": ("MistralForCausalLM", "MistralConfig", SIZES | WIDE | WINDOW),
    "ministral": ("MinistralForCausalLM", "MinistralConfig", SIZES | WIDE | WINDOW),
    "ministral3": ("Ministral3ForCausalLM", "Ministral3Config", SIZES | WIDE | WINDOW),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", SIZES | WIDE | WINDOW | EXPERTS),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", SIZES | QWEN_WINDOW),
    "qwen2_moe": (
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        SIZES | QWEN_WINDOW | EXPERTS | {"shared_expert_intermediate_size": 16},
    ),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", SIZES | WIDE | QWEN_WINDOW | {"attention_bias": True}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", SIZES | WIDE | EXPERTS | {"attention_bias": True}),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", SIZES | WIDE | {"attention_bias": True}),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", SIZES | WIDE | WINDOW | {"attention_bias": True}),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", SIZES | WIDE | WINDOW | MIXED | {"attention_bias": True}),
    "vaultgemma": ("VaultGemmaForCausalLM", "VaultGemmaConfig", SIZES | WIDE | WINDOW | MIXED),
    "phi": ("PhiForCausalLM", "PhiConfig", SIZES | {"qk_layernorm": True}),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", SIZES | WINDOW),
    "phimoe": ("PhimoeForCausalLM", "PhimoeConfig", SIZES | EXPERTS | WINDOW | {"attention_bias": True}),
    "olmo": ("OlmoForCausalLM", "OlmoConfig", SIZES | {"clip_qkv": 0.5, "attention_bias": True}),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", SIZES | {"attention_bias": True}),
    "olmo3": ("Olmo3ForCausalLM", "Olmo3Config", SIZES | WINDOW | MIXED | {"attention_bias": True}),
    "olmoe": ("OlmoeForCausalLM", "OlmoeConfig", SIZES | EXPERTS | {"clip_qkv": 0.5, "attention_bias": True}),
    "smollm3": ("SmolLM3ForCausalLM", "SmolLM3Config", SIZES | {"attention_bias": True, "no_rope_layers": [1, 0]}),
    "granite": ("GraniteForCausalLM", "GraniteConfig", SIZES | {"attention_multiplier": 0.3, "attention_bias": True}),
    "granitemoe": (
        "GraniteMoeForCausalLM",
        "GraniteMoeConfig",
        SIZES | EXPERTS | {"attention_multiplier": 0.3, "attention_bias": True},
    ),
    "cohere": ("CohereForCausalLM", "CohereConfig", SIZES | {"use_qk_norm": True, "attention_bias": True}),
    "cohere2": ("Cohere2ForCausalLM", "Cohere2Config", SIZES | WINDOW | MIXED | {"attention_bias": True}),
    "starcoder2": ("Starcoder2ForCausalLM", "Starcoder2Config", SIZES | WINDOW),
    "stablelm": ("StableLmForCausalLM", "StableLmConfig", SIZES | {"qk_layernorm": True, "use_qkv_bias": True}),
    "nemotron": ("NemotronForCausalLM", "NemotronConfig", SIZES | WIDE | {"attention_bias": True}),
    "glm": ("GlmForCausalLM", "GlmConfig", SIZES | WIDE | {"attention_bias": True}),
    "glm4": ("Glm4ForCausalLM", "Glm4Config", SIZES | WIDE | {"attention_bias": True}),
    "glm4_moe": (
        "Glm4MoeForCausalLM",
        "Glm4MoeConfig",
        SIZES | WIDE | GLM_EXPERTS | {"use_qk_norm": True, "attention_bias": True, "n_group": 1, "topk_group": 1},
    ),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", ONE_KIND),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", OLD | {"n_positions": 256}),
    "gpt_bigcode": ("GPTBigCodeForCausalLM", "GPTBigCodeConfig", OLD | {"n_positions": 256}),
    "opt": (
        "OPTForCausalLM",
        "OPTConfig",
        ONE_KIND | {"ffn_dim": 48, "word_embed_proj_dim": 32},
    ),
    "biogpt": ("BioGptForCausalLM", "BioGptConfig", ONE_KIND),
    "persimmon": ("PersimmonForCausalLM", "PersimmonConfig", ONE_KIND | {"qk_layernorm": True}),
    "helium": ("HeliumForCausalLM", "HeliumConfig", SIZES | {"head_dim": 8, "attention_bias": True}),
    "exaone4": ("Exaone4ForCausalLM", "Exaone4Config", SIZES | WINDOW | MIXED),
    "ernie4_5": ("Ernie4_5ForCausalLM", "Ernie4_5Config", SIZES | WIDE | {"use_bias": True}),
    "hunyuan_v1_dense": (
        "HunYuanDenseV1ForCausalLM",
        "HunYuanDenseV1Config",
        SIZES | WIDE | {"attention_bias": True},
    ),
    "seed_oss": ("SeedOssForCausalLM", "SeedOssConfig", SIZES | WIDE),
    "nanochat": ("NanoChatForCausalLM", "NanoChatConfig", SIZES | WIDE | {"attention_bias": True}),
    "gpt_oss": ("GptOssForCausalLM", "GptOssConfig", SIZES | WIDE | EXPERTS | WINDOW | {"attention_bias": True}),
    "apertus": ("ApertusForCausalLM", "ApertusConfig", SIZES | {"attention_bias": True}),
    "gptj": ("GPTJForCausalLM", "GPTJConfig", OLD | {"rotary_dim": 4}),
}

# Refused, with an error that says why.
REFUSED = {
    "bloom": ("BloomForCausalLM", "BloomConfig", {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 60}),
    "falcon": ("FalconForCausalLM", "FalconConfig", ONE_KIND),
    "mpt": ("MptForCausalLM", "MptConfig", {"d_model": 32, "n_heads": 4, "n_layers": 2, "vocab_size": 60}),
    "codegen": ("CodeGenForCausalLM", "CodeGenConfig", OLD | {"rotary_dim": 4}),
    "gpt_neo": (
        "GPTNeoForCausalLM",
        "GPTNeoConfig",
        {
            "vocab_size": 60,
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "gpt_neox_japanese": ("GPTNeoXJapaneseForCausalLM", "GPTNeoXJapaneseConfig", ONE_KIND),
    "xglm": (
        "XGLMForCausalLM",
        "XGLMConfig",
        {"d_model": 32, "attention_heads": 4, "num_layers": 2, "ffn_dim": 48, "vocab_size": 60},
    ),
    "llama4": (
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        SIZES | WIDE | EXPERTS | {"intermediate_size_mlp": 32, "attention_chunk_size": 4},
    ),
    "deepseek_v3": (
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        SIZES | GLM_EXPERTS | {"n_group": 1, "topk_group": 1, "q_lora_rank": 8, "kv_lora_rank": 8},
    ),
    "mamba": ("MambaForCausalLM", "MambaConfig", {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 60}),
    "diffllama": ("DiffLlamaForCausalLM", "DiffLlamaConfig", SIZES),
    "doge": ("DogeForCausalLM", "DogeConfig", SIZES),
}
# The transformers that the reasons in the table are from; before, their attention did not go through its interface.
REASON_SINCE = {"codegen": "5.24"}
JOINED_SINCE = {"gptj": "5.24"}
