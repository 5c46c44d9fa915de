"""Imports the names of a framework that an integration needs, or reports all that are missing."""

import functools
import importlib
import importlib.metadata
import types
from collections.abc import Mapping, Sequence


def required(package: str, names: Mapping[str, Sequence[str]]) -> types.SimpleNamespace:
    """Imports names of a framework.

    Args:
      package: Name of the framework on PyPI, for the error.
      names: By module, the names to import. `"Trainer.train_step"` imports `Trainer`, which has to
        have `train_step`.

    Returns:
      The imported objects, as attributes.

    Raises:
      ImportError: with every module and name that is missing.

    Example:
      >>> required("python", {"math": ["pi"]}).pi > 3
      True
    """
    found, missing = types.SimpleNamespace(), []
    for module_name, wanted in names.items():
        try:
            module = importlib.import_module(module_name)
        except ImportError as error:
            missing.append(f"{module_name} ({error})")
            continue
        for name in wanted:
            try:
                functools.reduce(getattr, name.split("."), module)
            except AttributeError:
                missing.append(f"{module_name}.{name}")
            else:
                top = name.split(".")[0]
                setattr(found, top, getattr(module, top))
    if missing:
        raise ImportError(
            f"muonclip_jax.integrations needs names that {_version(package)} does not have:\n  "
            + "\n  ".join(missing)
            + f"\nInstall the newest {package}. If it is the newest, this integration has to be "
            "changed: please report it."
        )
    return found


def _version(package: str) -> str:
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return f"{package} (not installed)"
