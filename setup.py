"""Metadata and extras of deepspeed-sentinel; the tools are configured in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent

TRANSFORMERS = ["transformers>=5.10.1", "accelerate>=1.10.1", "tokenizers>=0.22.1", "safetensors>=0.4.4"]
PEFT = ["peft>=0.19.0"]
SWEEP = ["pyarrow>=26.0", 'tomli>=2.0; python_version < "3.11"']
PROMETHEUS = ["prometheus-client>=0.26"]
REPORT = ["rich>=15.0", "matplotlib>=3.11", "jinja2>=3.1"]
DEV = [
    "pytest>=9.0",
    "hypothesis>=6.170",
    "ruff>=0.17",
    "mypy>=2.4",
    "import-linter>=2.16",
    "setuptools>=77.0.3",  # make lint builds the installed layout with it
]


# Address of the public repository, such as https://github.com/someone/deepspeed-sentinel; "" while it has none.
HOME = ""


def readme() -> str:
    """README for an index page, where a relative link leads nowhere: absolute, or the text alone without a HOME."""
    path = ROOT / "README.md"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    relative = r"(!?)\[([^\]]*)\]\((?!https?:|#)([^)]+)\)"

    def link(found: re.Match[str]) -> str:
        image, words, target = found.groups()
        if HOME:
            return f"{image}[{words}]({HOME}/{'raw' if image else 'blob'}/main/{target})"
        return "" if image else words

    return re.sub(relative, link, text)


# kernels/ stands at the top of the repository but is installed below the package only: a top-level module named
# `kernels` would shadow a known library of that name.
KERNELS = find_packages(where="kernels")
PACKAGES = [
    *find_packages(include=["deepspeed_sentinel", "deepspeed_sentinel.*"]),
    "deepspeed_sentinel.kernels",
    *(f"deepspeed_sentinel.kernels.{name}" for name in KERNELS),
]

setup(
    name="deepspeed-sentinel",
    version="0.1.0",
    description="Keeps tampered and silently corrupted workers out of DeepSpeed pipeline training",
    long_description=readme(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=PACKAGES,
    package_dir={"deepspeed_sentinel": "deepspeed_sentinel", "deepspeed_sentinel.kernels": "kernels"},
    package_data={
        "deepspeed_sentinel": ["py.typed"],
        "deepspeed_sentinel.telemetry.report": ["report.html.j2", "report.css", "report.js"],
    },
    # torch calls these at the end of its import; see flag.py.
    entry_points={
        "torch.backends": ["deepspeed_sentinel = deepspeed_sentinel.flag:begin"],
        "console_scripts": ["deepspeed-sentinel = deepspeed_sentinel.__main__:main"],
    },
    # Lower bounds are what has been run, see docs/versions.md. DeepSpeed needs no upper one: what a newer version has
    # moved is named before an engine is watched, see engine/internals.py.
    install_requires=[
        "deepspeed>=0.16.0",
        "torch>=2.5.1",
        "numpy>=1.26.4",
        "pydantic>=2.9.2",
        "cryptography>=42.0.8",
        # torch for CUDA brings its own triton (2.5.1 pins 3.1.0, 2.13.0 pins 3.7.1), torch for CPU brings none
        'triton>=3.1.0; platform_system == "Linux" and (platform_machine == "x86_64" or platform_machine == "aarch64")',
    ],
    extras_require={
        "transformers": TRANSFORMERS,
        "peft": [*TRANSFORMERS, *PEFT],
        "prometheus": PROMETHEUS,
        "report": REPORT,
        "sweep": SWEEP,
        "dev": [*DEV, *TRANSFORMERS, *PEFT, *PROMETHEUS, *REPORT, *SWEEP],
    },
    keywords=["deepspeed", "pipeline parallelism", "silent data corruption", "byzantine", "fault detection"],
    project_urls=(
        {"Source": HOME, "Documentation": f"{HOME}/tree/main/docs", "Issues": f"{HOME}/issues"} if HOME else {}
    ),
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Environment :: GPU",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Intended Audience :: System Administrators",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: System :: Distributed Computing",
        "Topic :: System :: Monitoring",
        "Typing :: Typed",
    ],
)
