"""Every key of a run, with its unit. A family's file overrides a few of them and says what it costs and gives.

A new key's default is what runs did before there was one: saved configs without it are read with that value.
"""

import ml_collections

# flow.mixture for one model that does every task; half of the videos still train at one level per clip.
EVERY_TASK = {
    "first": 0.06,
    "prefix": 0.09,
    "suffix": 0.07,
    "ends": 0.06,
    "every": 0.02,
    "light": 0.03,
    "box": 0.09,
    "forcing": 0.08,
}


def check_form(form: str, forms) -> None:
    """Raises LookupError where what stands behind a config file's colon is none of its forms."""
    if form not in forms:
        raise LookupError(f"form {form!r} is not known. Allowed: {', '.join(forms)}.")


def get_config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.name = "base"
    config.seed = 0
    config.steps = 10_000  # optimizer updates
    config.late = 0.0  # share of the steps, at the end, that train with flow.late_mixture and data.late_pair_share
    config.init_from = ""  # a run's workdir, a checkpoint or a .safetensors file: start from its weights

    config.data = data = ml_collections.ConfigDict()
    data.kind = "shapes"  # 'shapes', the embedded world, or 'clips', a folder of videos and images
    data.root = ""  # clips: the folder
    data.rows = 4  # rows in a global batch, B
    data.length = 1024  # patches per row, N
    data.text_length = 256  # text tokens per row, S
    data.groups = 48  # groups per row, G
    data.group_by = "frame"  # what shares a level: 'frame' or 'clip'
    data.shards = 4  # virtual shards; divides rows, and processes divide it
    data.waiting = 64  # clips each shard chooses from when it fills a row
    data.workers = 0  # decoding processes beside the training process; 0 = threads of it
    data.pair_share = 0.5  # shapes: clips with two objects
    data.late_pair_share = -1.0  # the same in the late steps; below 0 = pair_share
    data.still_share = 0.2  # shapes: clips of one frame
    data.large = False  # shapes: an object alone is larger and moves less, which is easier
    # Shares, least and most, of a clip's patches that training leaves out before packing; each clip draws its own
    # between them. A row then holds more clips: raise data.text_length and data.groups with it.
    data.drop = (0.0, 0.0)
    data.whole = 0.1  # with data.drop: share of the steps, at the end, that leave nothing out
    data.max_tokens = 128  # patches of the longest clip; attention uses it as its span
    data.fps = (8.0, 12.0)  # clips: frame rates that a window may be read at
    data.max_frames = 13  # clips: frames of the longest window
    data.max_side = 64  # clips: pixels of the longer side
    data.min_side = 16  # clips: pixels of the shorter side, where the aspect ratio lets it

    config.codec = codec = ml_collections.ConfigDict()
    codec.kind = "pixels"  # 'pixels', a lossless rearrangement, 'latents', given as they are, or learned: 'kl', 'wan'
    codec.stride = (4, 1, 1)  # video frames, pixels per latent (t, y, x)
    codec.channels = 0  # latents: their channels
    codec.weights = ""  # kl, wan: a .safetensors file of converted weights
    codec.chunk = 1  # kl, wan: latent frames encoded and decoded at a time
    codec.tile = 0  # kl, wan: latents on a side of a tile; 0 = whole frames. Tiles differ from the whole at their seams

    config.text = text = ml_collections.ConfigDict()
    # 'words' trained bytes of words, 'labels' class numbers, 'embeddings' precomputed, with a learned null token,
    # 'frozen' precomputed by a published encoder, nothing learned
    text.kind = "words"
    text.width = 128  # E
    text.depth = 2  # words: layers
    text.heads = 4  # words: heads
    text.classes = 1000  # labels: classes
    text.file = ""  # embeddings, frozen: a safetensors file, or a folder with one for each caption
    text.encoder = ""  # frozen: the folder of the encoder that made text.file; encodes what a request lacks there
    text.tokens = 0  # frozen: tokens per prompt, zeroed past its own (Wan: 512); 0 = its own alone
    text.dropout = 0.1  # share of the clips that train without their prompt

    config.model = model = ml_collections.ConfigDict()
    model.patch = (1, 8, 8)  # latents per patch (t, y, x)
    model.width = 256  # D
    model.depth = 6  # L
    model.heads = 4  # H
    model.mlp_width = 1024  # F
    model.out_channels = 0  # of the output, per latent; 0 = the codec's. DiT has twice as many (sigma), left unused
    model.predict = "x"  # what the network gives: 'x', 'v', 'e', or 'ddpm', the e of DDPM's x_t and timestep
    model.s_min = 0.1  # least divisor of an output of x (level) or of e (1 - level)
    model.modulation = "shared"  # 'shared' or 'block'
    model.position = "both"  # 'rope', 'table' (sin-cos, added) or 'both'
    model.qk_norm = "head"  # 'none', 'head' or 'width'
    model.text = "cross"  # 'none', 'pooled' or 'cross'
    model.text_norm = True  # LayerNorm with affine before cross-attention
    model.text_pool = False  # the mean of the prompt's tokens modulates the blocks too
    model.image_width = 0  # width of an image encoder's tokens; 0 = no second cross-attention
    model.level_scale = 1000.0  # what a level of 1 is to its embedding
    model.level_direction = "noise"  # 'noise': level 1 is noise; 'data': the embedding sees 1 - level
    model.attention_pattern = ("all",)  # what each layer of a period attends to: 'all', 'space', 'time'
    model.pos_scale = (4.0, 0.125, 0.125)  # indices per second, per codec pixel, per codec pixel
    model.rope_theta = 10_000.0  # longest wavelength of the rotary embedding, in indices / 2 pi
    model.pos_offset = (0.0, -0.5, -0.5)  # added to the indices (t, y, x)
    model.canvas_most = 0.0  # codec pixels: a longer side of a canvas is told to the model as this; 0 = as it is
    model.dtype = "float32"  # of the computation; parameters are float32
    # What the backward pass computes again: 'none' keeps all, 'dots' keeps products and what was attended, 'full' keeps
    # each layer's input alone, D values of a patch.
    model.remat = "dots"
    model.unroll = 1  # layers unrolled in the scan over layers
    model.window = 0  # latent frames, its own among them, that a frame of a causal clip sees; 0 = no clip is causal

    config.lora = lora = ml_collections.ConfigDict()
    lora.rank = 0  # of the low-rank factors that are trained in place of all weights; 0 = all weights are trained
    lora.alpha = 0.0  # the factors' product counts alpha / rank times; 0 = the rank
    lora.targets = ("q", "k", "v", "o", "text_q", "text_k", "text_v", "text_o", "mlp_in", "mlp_out")  # of each block
    lora.init_from = ""  # a .safetensors file of factors to go on from; init_from names the weights themselves

    config.flow = flow = ml_collections.ConfigDict()
    flow.distribution = "logit_normal"  # of the training levels: 'uniform', 'logit_normal' or 'mode'
    flow.mean = 0.6  # logit_normal: mean of the logit; above 0 is towards noise
    flow.deviation = 1.2  # logit_normal: its deviation; mode: its scale
    flow.shift_tokens = 0.0  # levels shift by sqrt(clip's patches / this); 0 = no shift
    flow.weight_floor = 0.0  # levels below it weigh (level / floor)^2: the error of x weighs at most 1 / floor^2
    flow.light = 0.2  # highest level of what is known but lightly noised
    flow.causal_share = 0.0  # share of the videos that train frame-causally, a few first frames clean; rest: mixture
    flow.mixture = mixture = ml_collections.ConfigDict()  # shares of the videos; the rest trains at one level per clip
    mixture.first = 0.1  # the first latent frame is known: clean, and of no weight
    mixture.prefix = 0.0  # the first few latent frames are
    mixture.suffix = 0.0  # the last few
    mixture.ends = 0.0  # both ends
    mixture.every = 0.0  # every second or third latent frame
    mixture.light = 0.0  # the first few, at a level in (0, light)
    mixture.box = 0.0  # all but a box in space and time, or what lies in one
    mixture.forcing = 0.0  # nothing is; each latent frame draws a level of its own
    # The same in the late steps; below 0 = mixture's.
    flow.late_mixture = ml_collections.ConfigDict(dict.fromkeys(mixture, -1.0))

    config.optimizer = optimizer = ml_collections.ConfigDict()
    optimizer.kind = "adamw"  # 'adamw' or 'muon' (block matrices; the rest stays with adamw)
    optimizer.lr = 2e-3  # peak learning rate
    optimizer.text_lr = 1e-4  # peak learning rate of the text encoder
    optimizer.warmup = 100  # steps up to the peak
    optimizer.decay = 0.3  # share of the steps, at the end, over which lr falls to 0
    optimizer.restart = 0.0  # share of the steps, after these, in which it rises once more and falls to 0
    optimizer.restart_lr = 0.3  # up to this share of the peak rates
    optimizer.b1 = 0.9
    optimizer.b2 = 0.99
    optimizer.weight_decay = 0.01
    optimizer.clip = 1.0  # largest gradient norm
    optimizer.muon_lr = 0.02  # peak learning rate of Muon's matrices
    optimizer.accumulate = 1  # parts that a batch's rows are split in, one after the other: activations of one alone
    # The optimizer's state in the host's memory between updates: while gradients are computed, accelerators hold 8
    # bytes of a parameter less with AdamW, 4 with Muon; each step moves them there and back. No gain on a CPU.
    optimizer.offload = False
    optimizer.ema = 0.999  # decay of the averaged weights, per step

    config.mesh = mesh = ml_collections.ConfigDict()
    mesh.data = -1  # devices along 'data'; -1 = all that are left
    mesh.fsdp = 1  # devices along 'fsdp', which cuts parameters, averages and optimizer too: 16 bytes each by AdamW
    mesh.tensor = 1  # devices along 'tensor': heads and the feed-forward's width, with their weights
    mesh.sequence = 1  # devices along 'sequence': the patches of a row, and the weights as along fsdp
    mesh.exchange = "ring"  # how attention crosses the cuts of a row: 'ring' or 'all_to_all' (heads must divide)

    config.log_every = 20  # steps between metrics
    config.eval_every = 1000  # steps between validation losses; 0 = never
    config.eval_batches = 4  # batches of the held-out stream
    config.sample_every = 2000  # steps between galleries; 0 = at the end alone, -1 = never
    config.checkpoint_every = 500  # steps
    config.keep = 3  # checkpoints

    config.sample = sample = ml_collections.ConfigDict()
    sample.steps = 32  # M
    sample.solver = "ab2"  # 'euler', 'heun', 'heun_full' or 'ab2'
    sample.shift = 1.0  # of the levels, towards noise
    sample.guidance = 3.0  # scale; 1 = none
    sample.guidance_given = 0.0  # scale where a picture or a video is given, but to roll out; 0 = guidance
    sample.interval = (0.0, 1.0)  # levels where guidance acts
    sample.history = 1.0  # guidance scale of what is known; 1 = none, any other doubles the cost
    sample.history_given = 0.0  # scale where a picture or a video is given, but to roll out; 0 = history
    sample.prompts = ()  # of the run's gallery, 'WxHxT@FPS: text'; empty = the data's own
    return config
