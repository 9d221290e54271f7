"""Wan's transformers, of the published sizes: 2.1 T2V 1.3B and 14B, 2.1 I2V 14B, 2.2 TI2V 5B (Wan et al. 2025).

    python -m dit_video.convert --from=Wan-AI/Wan2.1-T2V-1.3B-Diffusers --to=wan.safetensors
    python -m dit_video.train --config=configs/wan.py:T2V-1.3B --config.init_from=wan.safetensors ...

Parameters of the transformers, in this order: 1,418,996,800, 14,288,491,584, 16,394,878,784, 4,999,787,712: exactly the
published checkpoints' (but for 204,800 gains in diffusers' I2V file that its class does not read).
Captions come as UMT5 encoded them: text.encoder is its folder, text.file where its embeddings are kept.
Latents have 16 channels and strides of (4, 8, 8) at 16 frames per second; TI2V's 48, (4, 16, 16), 24.
"""

from configs import base

# Depth, width, heads, width of the feed-forward, channels in and out, width of the image encoder's tokens.
SIZES = {
    "T2V-1.3B": (30, 1536, 12, 8960, 16, 16, 0),
    "T2V-14B": (40, 5120, 40, 13824, 16, 16, 0),
    "I2V-14B": (40, 5120, 40, 13824, 36, 16, 1280),
    "TI2V-5B": (30, 3072, 24, 14336, 48, 48, 0),
}


def get_config(form="T2V-1.3B"):
    base.check_form(form, SIZES)
    config = base.get_config()
    config.name = f"Wan-{form}"
    model, codec = config.model, config.codec
    model.depth, model.width, model.heads, model.mlp_width, codec.channels, model.out_channels, model.image_width = (
        SIZES[form]
    )
    stride, rate = (16, 6.0) if form == "TI2V-5B" else (8, 4.0)  # pixels per latent, latent frames per second
    codec.kind, codec.stride = "latents", (4, stride, stride)
    config.text.kind, config.text.width, config.text.tokens = "frozen", 4096, 512
    config.data.kind, config.data.text_length, config.data.group_by = "clips", 2048, "clip"
    config.data.max_frames, config.data.max_side, config.data.min_side = 81, 832, 256
    config.data.fps = (4 * rate, 4 * rate)
    config.data.max_tokens = 21 * 30 * 52  # 81 frames at 832x480; what a window may hold is data.length too
    model.patch, model.predict, model.dtype = (1, 2, 2), "v", "bfloat16"
    model.position, model.qk_norm = "rope", "width"
    model.pos_scale = (rate, 1 / (2 * stride), 1 / (2 * stride))
    config.optimizer.lr, config.optimizer.weight_decay = 1e-4, 0.0
    config.sample.steps, config.sample.shift, config.sample.guidance = 50, 5.0, 5.0
    return config
