"""The packages of the wheel, among them `harness.conf`: the folder conf/. pyproject.toml cannot add it to a search."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["harness*", "methods*"]), "hydra_plugins", "harness.conf"],
    package_dir={"harness.conf": "conf"},
)
