"""pip install -e .            trains and samples on CPU (or on whatever jax is already installed for)
pip install -e '.[test]'      the tests as well
pip install -e '.[gpu]'       jax with CUDA 12
pip install -e '.[hub]'       published weights by their names on the Hugging Face hub
pip install -e '.[plan]'      the compiler for TPUs, to plan for a pod that is not there
pip install -e '.[published]' tokenisers of published text encoders
"""

import pathlib

import setuptools

setuptools.setup(
    name="dit_video",
    version="0.1.0",
    description="Train and sample Sora-style video diffusion transformers in JAX, on clips of any size and duration",
    long_description=pathlib.Path(__file__).with_name("README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=setuptools.find_packages(include=["dit_video", "dit_video.*", "configs"]),
    package_data={"configs": ["*.py"]},
    install_requires=[
        "absl-py>=2.1",
        "av>=18",
        "einops>=0.8",
        "etils[epath]>=1.10",
        "flax>=0.12",
        "grain>=0.2.15",
        "jax>=0.10",
        "ml-collections>=1.1",
        "ml-dtypes>=0.5",
        "numpy>=2.0",
        "optax>=0.2.6",
        "orbax-checkpoint>=0.11.30",
        "pillow>=11",
        "protobuf>=4",
        "safetensors>=0.5",
        "tensorboardX>=2.6",
    ],
    extras_require={
        "hub": ["huggingface_hub>=0.30"],
        "published": ["sentencepiece>=0.2", "tokenizers>=0.20"],
        "test": [
            "huggingface_hub>=0.30",
            "ipython>=8",
            "matplotlib>=3.9",
            "pytest>=8",
            "pytest-xdist>=3.6",
            "ruff>=0.9",
            "sentencepiece>=0.2",
            "tokenizers>=0.20",
        ],
        "gpu": ["jax[cuda12]>=0.10"],
        "plan": ["jax[tpu]>=0.10"],
        "notebook": ["ipykernel", "matplotlib"],
    },
)
