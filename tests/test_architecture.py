"""Imports only point down, and importing the package costs and changes nothing."""

import ast
import pathlib
import subprocess
import sys

import pytest

import muonclip_jax as mc
from strict import STRICT

PACKAGE = pathlib.Path(mc.__file__).parent
LAYERS = """
_types _paths _team _injection _kernel_pattern _child_names \
_resharding _folding _overrides _role_names
_adamw _coefficients _products _shared_key _visible _clipped_heads _module_shapes
_settings _evidence
_grouping _polar_express _iterations _layout _kernels _max_logit _splash _attention_layouts
_orientation _window_kernels
_head_kernels
_normalize _sharding_plan _roles _attention _multi_head_layout _mla_layout \
_fused_qkv_layout _attention_sites
_newton_schulz _placements _routing _flax_attention _site_faults
_sharded _layout_proposals linen nnx
_scale_by_muon _show_plan _attention_faults
_muon _qk_clip
_muonclip _metrics
""".split("\n")[1:-1]
LAYER = {name: height for height, names in enumerate(LAYERS) for name in names.split()}
OPTIMIZER_HALF = {
    "_adamw",
    "_coefficients",
    "_polar_express",
    "_products",
    "_team",
    "_iterations",
    "_sharding_plan",
    "_placements",
    "_sharded",
    "_show_plan",
    "_grouping",
    "_newton_schulz",
    "_normalize",
    "_layout",
    "_routing",
    "_roles",
    "_kernels",
    "_head_kernels",
    "_window_kernels",
    "_orientation",
    "_evidence",
    "_module_shapes",
    "_role_names",
    "_overrides",
    "_folding",
    "_scale_by_muon",
    "_muon",
}
ATTENTION_HALF = {
    "_shared_key",
    "_visible",
    "_splash",
    "_max_logit",
    "_attention",
    "_attention_layouts",
    "_kernel_pattern",
    "_clipped_heads",
    "_child_names",
    "_multi_head_layout",
    "_site_faults",
    "_layout_proposals",
    "_mla_layout",
    "_fused_qkv_layout",
    "_attention_sites",
    "_attention_faults",
    "_qk_clip",
    "_flax_attention",
    "linen",
    "nnx",
}
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")


def _imports(module):
    tree = ast.parse((PACKAGE / f"{module}.py").read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def _own_imports(module):
    return {
        name.removeprefix("muonclip_jax.")
        for name in _imports(module)
        if name.startswith("muonclip_jax.")
    }


def test_every_module_is_in_a_layer():
    assert sorted(LAYER) == MODULES


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module):
    for imported in _own_imports(module):
        assert LAYER[imported] < LAYER[module], f"{module} imports {imported}"


@pytest.mark.parametrize("module", MODULES)
def test_the_halves_do_not_know_each_other(module):
    for half, other in ((OPTIMIZER_HALF, ATTENTION_HALF), (ATTENTION_HALF, OPTIMIZER_HALF)):
        if module in half:
            assert not _own_imports(module) & other


@pytest.mark.parametrize("module", [m for m in MODULES if m not in ("linen", "nnx")])
def test_only_linen_and_nnx_import_flax(module):
    assert not any(name.split(".")[0] == "flax" for name in _imports(module))


@pytest.mark.parametrize("module", MODULES)
def test_no_side_effects_in_the_source(module):
    source = (PACKAGE / f"{module}.py").read_text()
    names = {n.id for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Name)}
    assert not names & {"print", "eval", "exec", "open"}
    assert not any(isinstance(n, ast.Assert) for n in ast.walk(ast.parse(source)))
    assert not {"os", "logging", "pickle"} & set(_imports(module))
    for call in ("config.update", "pure_callback", "io_callback", "debug.print"):
        assert call not in source


def test_file_sizes():
    for module in MODULES:
        assert len((PACKAGE / f"{module}.py").read_text().splitlines()) <= 350, module


def test_importing_the_package_is_quiet_and_light():
    code = """
import sys
import muonclip_jax as mc
heavy = {"flax", "orbax", "matplotlib", "tqdm", "chex"} & {m.split(".")[0] for m in sys.modules}
if heavy - CHEX:
    raise SystemExit(f"imported {heavy}")
import jax._src.xla_bridge as bridge
if bridge._backends:
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
        "FusedQKVLayout",
        "MLALayout",
        "MultiHeadLayout",
        "MuonDimensionNumbers",
        "QKClipInfo",
        "RoutingTable",
        "ScaleByMuonState",
        "dot_product_attention",
        "heads_ever_clipped",
        "linen",
        "max_attention_logit",
        "merge_max_logits",
        "muon",
        "muonclip",
        "newton_schulz",
        "nnx",
        "ns_coefficients",
        "polar_express_coefficients",
        "qk_clip",
        "qk_clip_metrics",
        "routing_table",
        "scale_by_muon",
        "scale_by_shape",
        "sharding_plan",
    }
    for name in mc.__all__:
        assert getattr(mc, name).__doc__


def test_dir_lists_every_public_name():
    assert set(mc.__all__) <= set(dir(mc))
    assert "__version__" in dir(mc)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        mc.nonsense  # noqa: B018
