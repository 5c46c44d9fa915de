"""The packages that the training program needs beside muonclip-jax: all there, or one line."""

import importlib.util

from lm.config import BadInput

# By module; `examples` of pyproject.toml lists the same packages with their versions.
PACKAGES = {
    "muonclip_jax": "muonclip-jax",
    "orbax.checkpoint": "orbax-checkpoint",
    "grain": "grain",
    "tqdm": "tqdm",
    "matplotlib": "matplotlib",
    "tensorboardX": "tensorboardX",
}


def check() -> None:
    """Raises `BadInput` if a package is not installed; imports none of them."""
    if missing := [package for module, package in PACKAGES.items() if not _is_installed(module)]:
        raise not_installed(*missing)


def not_installed(*packages: str) -> BadInput:
    """Returns the error for packages that are not installed."""
    verb = "is" if len(packages) == 1 else "are"
    return BadInput(
        f"{', '.join(packages)} {verb} not installed; run pip install 'muonclip-jax[examples]',"
        " or in a clone pip install -e '.[examples]'"
    )


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package around it
        return False
