"""The packages that the training program needs, checked before any of them is imported."""

import importlib.util

from examples.language_model.config import BadInput

# Package by module: the dependencies of muonclip-jax and its extra `examples`, in pyproject.toml.
PACKAGES = {
    "jax": "jax",
    "optax": "optax",
    "flax": "flax",
    "jaxtyping": "jaxtyping",
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
        f"{', '.join(packages)} {verb} not installed; run pip install -e '.[examples]' in the"
        " repository"
    )


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package around it
        return False
