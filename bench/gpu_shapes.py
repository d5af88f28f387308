"""Published shapes of the language and vision models that bench/gpu.py builds with random weights."""

PANGU = dict(  # openPangu-Embedded-7B
    vocab_size=153376,
    hidden_size=4096,
    intermediate_size=12800,
    num_hidden_layers=34,
    num_attention_heads=32,
    num_key_value_heads=8,
    bias=True,
    rms_norm_eps=1e-5,
    max_position_embeddings=32768,
    rope_theta=16000000.0,
    tie_word_embeddings=False,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=45892,
)
FM9G = dict(  # FM9G-4B, 4.13 B parameters
    vocab_size=73448,
    hidden_size=2560,
    intermediate_size=6400,
    num_hidden_layers=62,
    num_attention_heads=40,
    num_key_value_heads=4,
    scale_emb=12,
    scale_depth=1.4,
    dim_model_base=256,
    rope_theta=1e6,
    rms_norm_eps=1e-5,
    tie_word_embeddings=True,
    max_position_embeddings=32768,
)
QWEN_TEXT = dict(  # Qwen2.5-VL-3B
    hidden_size=2048,
    intermediate_size=11008,
    num_hidden_layers=36,
    num_attention_heads=16,
    num_key_value_heads=2,
    vocab_size=151936,
    rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
)
QWEN_VISION = dict(
    depth=32,
    hidden_size=1280,
    intermediate_size=3420,
    num_heads=16,
    patch_size=14,
    out_hidden_size=2048,
    window_size=112,
    fullatt_block_indexes=[7, 15, 23, 31],
)
LLAVA_TEXT = dict(  # LLaVA-1.5-7B; the vision tower is LlavaConfig's default, CLIP-L at 336 pixels
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
    vocab_size=32064,
)
TINY_EMBEDDING = dict(  # dia_pangu's embedding layer for volumes of 64 x 64 x 16
    perceiver_num=8,
    vis_dim=96,
    patch_size=8,
    frame_patch_size=4,
    n_tok=256,
    vit=dict(
        image_size=64, frames=16, depth=1, heads=2, dim_head=24, mlp_dim=96, dropout=0.0, emb_dropout=0.0
    ),
    perceiver=dict(depth=1, heads=2, dim_head=24, ff_mult=2),
)


def smaller(shape: dict) -> dict:
    """The same model with two narrow layers and 600 words, for dry runs and parity."""
    changed = dict(vocab_size=600, hidden_size=64, intermediate_size=96, num_hidden_layers=2)
    changed |= dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512)
    if "eos_token_id" in shape:
        changed["eos_token_id"] = 2
    if "dim_model_base" in shape:
        changed["dim_model_base"] = 32
    return {**shape, **changed}
