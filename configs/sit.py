"""SiT S, B, L and XL with patches of 2, 4 and 8 latents, class-conditional (Ma et al. 2024).

    --config=configs/sit.py:XL/2

DiT's sizes and class, trained on the straight path: the network gives the velocity and is told t = 1 - level.
"""

from configs import dit


def get_config(form="S/2"):
    config = dit.get_config(form)
    config.name = f"SiT-{form}"
    config.model.predict, config.model.level_scale, config.model.level_direction = "v", 1.0, "data"
    config.flow.distribution = "uniform"
    return config
