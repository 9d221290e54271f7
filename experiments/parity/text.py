"""How far the text encoders are from their reference: the largest error of each output, relative to its largest value.

python -m experiments.parity.text GOLDEN_DIR
"""

import functools
import json
import sys

import jax
import numpy as np

from dit_video.text.clip import CLIPText
from dit_video.text.t5 import T5Encoder, relative_buckets
from dit_video.weights import clip, t5
from experiments.parity.arrays import error, load


def t5_errors(golden_dir, family: str) -> dict[str, float]:
    """Of 't5_v1_1' or 'umt5': with padding, without, 200 tokens, and the buckets (a count of those that differ)."""
    state, config, io = load(golden_dir, f"transformers/{family}")
    config |= {"model_type": {"t5_v1_1": "t5", "umt5": "umt5"}[family]}
    model, params = T5Encoder(**t5.arguments(config)), t5.to_ours(state, config)["t5"]
    encode = functools.partial(jax.jit(model.apply), {"params": params})
    every = lambda ids_BxS: np.ones(ids_BxS.shape, bool)
    mask, ids, long = io["attention_mask"] != 0, io["input_ids"], io["long_ids"]
    return {
        f"{family} masked": error(encode(ids, mask), io["last_hidden_state"]),
        f"{family} unmasked": error(encode(ids, every(ids)), io["last_hidden_state_nomask"]),
        f"{family} 200 tokens": error(encode(long, every(long)), io["long_last_hidden_state"]),
        f"{family} buckets": float((relative_buckets(200) != io["rel_buckets_200"]).sum()),
    }


def clip_errors(golden_dir) -> dict[str, float]:
    """Of CLIP's text model: the last hidden state, the pooled and the projected one, and with padding masked."""
    state, config, io = load(golden_dir, "transformers/clip_text_quickgelu")
    model, params = CLIPText(**clip.arguments(config, True)), clip.to_ours(state, config)["clip"]
    encode = functools.partial(jax.jit(model.apply), {"params": params})
    text, pooled, projected = encode(io["input_ids"])
    return {
        "clip text": error(text, io["last_hidden_state"]),
        "clip pooled": error(pooled, io["pooler_output"]),
        "clip projected": error(projected, io["text_embeds"]),
        "clip masked": error(encode(io["input_ids"], io["attention_mask"])[0], io["last_hidden_state_masked"]),
    }


def errors(golden_dir) -> dict[str, float]:
    """All of them, in float32 on the default device."""
    return t5_errors(golden_dir, "t5_v1_1") | t5_errors(golden_dir, "umt5") | clip_errors(golden_dir)


if __name__ == "__main__":
    print(json.dumps(errors(sys.argv[1]), indent=1))
