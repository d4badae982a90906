"""Maps two top-level folders into the package; everything else about the build is in pyproject.toml."""

from setuptools import find_packages, setup

MAPPED = {f"int8compile.{folder}": folder for folder in ("passes", "triton_kernels")}
# find_packages() follows the links int8compile/<folder>, which an sdist does not have: left out here, listed below.
links = [f"{name}{suffix}" for name in MAPPED for suffix in ("", ".*")]
packages = find_packages(include=["int8compile", "int8compile.*"], exclude=links)
for name, folder in MAPPED.items():
    packages += [name, *(f"{name}.{package}" for package in find_packages(folder))]

# Modules outside of the package, because importing the package takes seconds: every pytest run imports the first, and
# `import torch` the second.
setup(packages=packages, package_dir=MAPPED, py_modules=["pytest_int8compile", "int8compile_autoload"])
