"""What `pyproject.toml` cannot say: the wheel holds `examples/` as `megatron_coe/presets`.

`apex` is no dependency on purpose: the index's package of that name is another project.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["megatron_coe", "megatron_coe.*"]), "megatron_coe.presets"],
    package_dir={"megatron_coe.presets": "examples"},
    package_data={
        "megatron_coe.analysis": ["report.html"],
        "megatron_coe.presets": ["*.yaml", "paper/*.yaml", "scale/*.yaml", "compare/*.yaml"],
    },
)
