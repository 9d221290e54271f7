"""Latte S, B, L and XL: DiT over videos, whose blocks attend over space and over time in turn (Ma et al. 2024).

    --config=configs/latte.py:XL/2, :XL/2:101 for 101 classes

Sixteen frames at 256x256, apart in the autoencoder; without classes, as published for faces and skies, or with those of
UCF-101. Trained by DDPM, as DiT is.
"""

from configs import dit


def get_config(form="XL/2"):
    form, _, classes = form.partition(":")
    config = dit.get_config(form)
    config.name = f"Latte-{form}"
    config.model.attention_pattern = ("space", "time")
    config.model.pos_scale = (8.0, *config.model.pos_scale[1:])  # frames per second
    config.model.text, config.text.classes = ("pooled", int(classes)) if classes else ("none", 1000)
    config.data.max_frames, config.data.max_tokens, config.data.group_by = 16, 16 * config.data.max_tokens, "clip"
    config.data.length = max(config.data.length, config.data.max_tokens)
    return config
