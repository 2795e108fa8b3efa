"""Metadata and extras; tool settings are in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

# Bounds are what the code needs: DeepSpeed's pipeline internals are verified on 0.19.8 alone.
RUNTIME = [
    "deepspeed>=0.19.8,<0.20",
    "torch>=2.6",
    "numpy>=1.26",
    "pydantic>=2.7",
    'triton>=3.2; platform_system == "Linux"',
]
TRANSFORMERS = ["transformers>=5.0", "accelerate>=1.10", "tokenizers>=0.22", "safetensors>=0.5"]
REPORT = ["rich>=13", "matplotlib>=3.8"]
DEV = ["pytest>=8", "hypothesis>=6.100", "ruff>=0.9", "mypy>=1.14", "import-linter>=2.1"]

setup(
    name="deepspeed-sentinel",
    version="0.1.0",
    description="Finds the worker that poisons a DeepSpeed pipeline, and keeps it out of the weights",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=[*find_packages(include=["deepspeed_sentinel", "deepspeed_sentinel.*"]), "deepspeed_sentinel.kernels"],
    # A top-level package named "kernels" would shadow the library of that name.
    package_dir={"deepspeed_sentinel.kernels": "kernels"},
    install_requires=RUNTIME,
    extras_require={
        "transformers": TRANSFORMERS,
        "report": REPORT,
        "dev": [*DEV, *TRANSFORMERS, *REPORT],
    },
)
