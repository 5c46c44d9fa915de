"""Imports only point down, importing the package costs and changes nothing, tests check shapes."""

import ast
import functools
import pathlib
import subprocess
import sys

import jax.numpy as jnp
import jaxtyping
import pytest

import muonclip_jax as mc
from muonclip_jax._qk_clip.head_factors import gamma_of
from tests.support.strict import STRICT

ROOT = pathlib.Path(__file__).parents[2]
PACKAGE = pathlib.Path(mc.__file__).parent  # also of an installed wheel
# The packages that a package may import; the modules at the top may import all of them.
MAY_IMPORT = {
    "_common": set(),
    "_head_layouts": set(),
    "_orthogonalize": {"_common"},
    "_sharding": {"_common", "_orthogonalize"},
    "_program": {"_common"},
    "_muon": {"_common", "_head_layouts", "_orthogonalize", "_sharding", "_program"},
    "_attention": {"_common"},
    "_qk_clip": {"_common", "_head_layouts", "_program", "_attention"},
    "integrations": set(),  # they use the public names
}
TOP = {"__init__", "_muonclip", "linen", "nnx"}
FILES = sorted(PACKAGE.rglob("*.py"))
SOURCES = {path: path.read_text() for path in FILES}


@functools.cache
def tree(path):
    return ast.parse(SOURCES[path])


def name_of(path):
    """Returns the dotted name below the package, such as `_muon.roles`."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(path): path for path in FILES}


def imports(path):
    """Yields the full names of the modules that a file imports anywhere in it."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            inner = [f"{module}.{alias.name}" for alias in node.names]
            modules = [n for n in inner if n.removeprefix("muonclip_jax.") in MODULES]
            yield from modules or [module]


def own_imports(path):
    found = {n.removeprefix("muonclip_jax.") for n in imports(path) if n.startswith("muonclip_jax")}
    return found & set(MODULES)


def test_every_file_is_in_a_package_of_the_table():
    assert {name.split(".")[0] for name in MODULES} == TOP | set(MAY_IMPORT)


def test_every_package_has_a_docstring():
    for package in MAY_IMPORT:
        assert ast.get_docstring(tree(PACKAGE / package / "__init__.py")), package


def test_imports_follow_the_table():
    wrong = []
    for name, path in MODULES.items():
        package = name.split(".")[0]
        allowed = set(MAY_IMPORT) | TOP if package in TOP else MAY_IMPORT[package] | {package}
        wrong += [
            f"{name} imports {n}" for n in own_imports(path) if n.split(".")[0] not in allowed
        ]
    assert not wrong


def test_no_cycle_of_imports():
    below = {name: own_imports(path) - {name} for name, path in MODULES.items()}
    while below:
        leaves = {name for name, names in below.items() if not names & set(below)}
        assert leaves, f"a cycle among {sorted(below)}"
        below = {name: names for name, names in below.items() if name not in leaves}


def test_architecture_shows_the_table():
    page = (ROOT / "ARCHITECTURE.md").read_text()
    for package, allowed in MAY_IMPORT.items():
        nothing = "the public names only" if package == "integrations" else "nothing"
        listed = " ".join(f"`{n}`" for n in MAY_IMPORT if n in allowed) or nothing
        assert f"| `{package}` | {listed} |" in page


def test_only_linen_and_nnx_import_flax():
    importing = {
        n for n, path in MODULES.items() if any(i.split(".")[0] == "flax" for i in imports(path))
    }
    assert {n for n in importing if not n.startswith("integrations.")} == {"linen", "nnx"}


def test_no_side_effects_in_the_source():
    assert {path: found for path in MODULES.values() if (found := side_effects(path))} == {}


def side_effects(path):
    """Names, calls and imports that a module of the package may not have."""
    found = {n.id for n in ast.walk(tree(path)) if isinstance(n, ast.Name)}
    found = found & {"print", "eval", "exec", "open"}
    found |= {"assert" for n in ast.walk(tree(path)) if isinstance(n, ast.Assert)}
    found |= {"os", "logging", "pickle"} & set(imports(path))
    calls = ("config.update", "pure_callback", "io_callback", "debug.print")
    return found | {call for call in calls if call in SOURCES[path]}


def test_file_sizes():
    for path, source in SOURCES.items():
        assert len(source.splitlines()) <= 350, path


def test_importing_the_package_is_quiet_and_light():
    code = """
import sys
import muonclip_jax as mc
heavy = {"flax", "orbax", "matplotlib", "tqdm", "chex"} & {m.split(".")[0] for m in sys.modules}
if heavy - CHEX:
    raise SystemExit(f"imported {heavy}")
import jax._src.xla_bridge as bridge
import optax
mc.muonclip(0.1)
optax.inject_hyperparams(mc.muonclip)(learning_rate=0.1)
if bridge._backends:  # jax.distributed.initialize must come before
    raise SystemExit("started a backend")
if not {"linen", "nnx"} <= set(dir(mc)):
    raise SystemExit("dir(mc) lacks linen or nnx before their first use")
if "flax" in sys.modules or mc.linen.__name__ != "muonclip_jax.linen" or "flax" not in sys.modules:
    raise SystemExit("linen is not loaded on first use")
from muonclip_jax import nnx
if nnx is not mc.nnx or nnx.__name__ != "muonclip_jax.nnx":
    raise SystemExit("nnx is not loaded on first use")
""".replace("CHEX", "{'chex'}")  # optax itself imports chex
    run = subprocess.run(
        [sys.executable, *STRICT, "-c", code],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


def test_public_names_are_the_pinned_ones():
    assert set(mc.__all__) == {
        "Analysis",
        "FusedQKVLayout",
        "MLALayout",
        "MultiHeadLayout",
        "MuonDimensionNumbers",
        "NormalizeNeuronsState",
        "QKClipInfo",
        "RoutingTable",
        "ScaleByMuonState",
        "ScaleBySinkhornState",
        "Sinkhorn",
        "add_cautious_weight_decay",
        "analyze",
        "dot_product_attention",
        "heads_ever_clipped",
        "linen",
        "max_attention_logit",
        "merge_max_logits",
        "muon",
        "muonclip",
        "newton_schulz",
        "nnx",
        "normalize_matrices",
        "normalize_neurons",
        "ns_coefficients",
        "plot_max_logits",
        "polar_express_coefficients",
        "qk_clip",
        "qk_clip_metrics",
        "routing_table",
        "scale_by_muon",
        "scale_by_shape",
        "scale_by_sinkhorn",
        "sharding_plan",
        "with_max_logits",
    }
    for name in mc.__all__:
        assert getattr(mc, name).__doc__


def test_dir_lists_every_public_name():
    assert set(mc.__all__) <= set(dir(mc))
    assert "__version__" in dir(mc)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        mc.nonsense  # noqa: B018


def test_tests_check_every_signature_with_shapes(pytestconfig):
    checked = pytestconfig.getoption("--jaxtyping-packages").split(",")
    shaped = [name for name, path in MODULES.items() if "from jaxtyping import" in SOURCES[path]]
    assert len(shaped) > 20
    for name in shaped:
        assert any(f"muonclip_jax.{name}.".startswith(f"{package}.") for package in checked), name
    with pytest.raises(jaxtyping.TypeCheckError):
        gamma_of(jnp.zeros(()), 100.0, True)  # no axis of heads
