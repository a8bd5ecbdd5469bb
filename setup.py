"""Build script: everything that does not need code lives in pyproject.toml."""

from setuptools import setup

setup()
