"""The two package roots; everything else is in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=find_packages("framework") + find_packages("kernels"),
    package_dir={
        "shardwise": "framework/shardwise",
        "shardwise_kernels": "kernels/shardwise_kernels",
    },
)
