"""What makers publish of one chip: what a plan's roofline is made of."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
    """flops: bfloat16 FLOP/s, dense. memory: bytes. bandwidth: of that memory, bytes/s. links: bytes/s out of a chip
    to its neighbours over all links, one way. network: bytes/s out of a chip to another slice or machine. machine: GPUs
    of one, which links join; 0 = a slice is as large as it is asked for. devices: that jax sees in one. usable: the
    share of the memory that jax takes."""

    flops: float
    memory: float
    bandwidth: float
    links: float
    network: float
    machine: int = 0
    devices: int = 1
    usable: float = 1.0


# TPUs: cloud.google.com/tpu/docs/v5e, /v5p, /v6e, /tpu7x, read in November 2026. Links: half of what is given as
# bidirectional; where a page gives Gbps per chip, those. Network: v5e and v6e, the pod's over its 256 chips.
# GPUs: nvidia.com's data sheets of A100 80GB SXM, H100 SXM, H200 SXM (figures without sparsity); links are half of
# NVLink's total, network one 400 Gb/s adapter per GPU (200 for A100), as in DGX machines, of 8.
CHIPS = {
    "v5e": Chip(197e12, 16 * 2**30, 819e9, 200e9, 3.125e9),
    "v5p": Chip(459e12, 95 * 2**30, 2765e9, 600e9, 6.25e9),
    "v6e": Chip(918e12, 32 * 2**30, 1600e9, 400e9, 12.5e9),
    "tpu7x": Chip(2307e12, 192 * 2**30, 7380e9, 600e9, 12.5e9, devices=2),
    "a100": Chip(312e12, 80e9, 2039e9, 300e9, 25e9, 8, usable=0.75),
    "h100": Chip(989e12, 80e9, 3350e9, 450e9, 50e9, 8, usable=0.75),
    "h200": Chip(989e12, 141e9, 4800e9, 450e9, 50e9, 8, usable=0.75),
}
