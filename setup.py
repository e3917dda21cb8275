"""Packaging. `apex` is left out on purpose: the index's package of that name is another project."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="megatron-coe",
    version="0.1.0",
    description="Chain-of-Experts as a Megatron-Core model provider",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    python_requires=">=3.10",
    packages=find_packages(include=["megatron_coe", "megatron_coe.*"]),
    package_data={"megatron_coe.analysis": ["report.html"]},
    install_requires=[
        "torch>=2.10",  # torch.nn.functional.grouped_mm
        "megatron-core>=0.16.1,<0.17; python_version < '3.12'",
        "megatron-core>=0.19.2,<0.20; python_version >= '3.12'",
        "sentencepiece",
        "nltk",
        "omegaconf>=2.3",  # Megatron-Bridge's hydra-core wants one before 2.4
        "psutil",  # megatron.core.dist_checkpointing imports it without declaring it
        "tensorboard",
        "tqdm",
    ],
    extras_require={
        "te": ["transformer-engine[pytorch]"],
        "data": ["pyarrow", "reasoning-gym"],
        "hf": ["transformers>=4.57", "safetensors"],
        "eval": ["lm_eval[hf]>=0.4.9", "transformers>=4.57", "pyarrow"],
        "plot": ["matplotlib", "jinja2"],
        "test": [
            "accelerate",  # transformers' Trainer asks for it
            "codespell",
            "import-linter",
            "mypy",
            "pytest",
            "pytest-xdist",
            "ruff",
            "safetensors",
            "transformers>=4.57",
            "pyarrow",
            "reasoning-gym",
            "matplotlib",
        ],
    },
)
