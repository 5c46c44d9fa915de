# %% [markdown]
# # Muon on eight devices
#
# Newton–Schulz needs the full matrix, and on a mesh every device has a shard of it. `mc.muon`
# exchanges matrices: each device receives a few full ones, orthogonalizes them, and returns the
# shards. This notebook runs a step on eight devices. They are simulated, unless the machine has
# eight.

# %%
import importlib.util
import subprocess
import sys

# On a GPU or TPU: "muonclip-jax[cuda]" or "muonclip-jax[tpu]"
# Not on PyPI before the first release: until then, run `pip install .` in a clone.
PACKAGE = "muonclip-jax"
if importlib.util.find_spec("muonclip_jax") is None:
    install = [sys.executable, "-m", "pip", "install", "-q", PACKAGE, "matplotlib"]
    subprocess.run(install, check=True)

# %%
import contextlib
import re

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from matplotlib.colors import Normalize
from optax import contrib

import muonclip_jax as mc

SEED = 0
BLUE, GREY = "#2a6f97", "#8d99ae"
plt.rcParams.update({"figure.dpi": 100, "figure.constrained_layout.use": True})
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})
plt.rcParams.update({"axes.titlelocation": "left", "legend.frameon": False})

with contextlib.suppress(RuntimeError):  # the devices exist if the cell has run before
    jax.config.update("jax_num_cpu_devices", 8)
devices = jax.devices() if jax.device_count() >= 8 else jax.devices("cpu")
devices = np.array(devices[:8])
jax.config.update("jax_default_device", devices[0])
print(jax.devices())

# %% [markdown]
# ## A sharded model
#
# The matrices of eight layers, stacked as by `nn.scan`. One axis of the mesh shards them as FSDP
# does, the other as tensor parallelism does.

# %%
mesh = Mesh(devices.reshape(-1, min(2, devices.size)), ("fsdp", "tp"))
LAYERS, WIDTH, HIDDEN = 8, 128, 512
into, out = P(None, "fsdp", "tp"), P(None, "tp", "fsdp")
attention = {name: ((LAYERS, WIDTH, WIDTH), into) for name in ("q_proj", "k_proj", "v_proj")}
attention["o_proj"] = (LAYERS, WIDTH, WIDTH), out
mlp = {"up_proj": ((LAYERS, WIDTH, HIDDEN), into), "down_proj": ((LAYERS, HIDDEN, WIDTH), out)}
leaves = attention | mlp | {"norm": ((LAYERS, WIDTH), P())}
shardings = {name: NamedSharding(mesh, spec) for name, (_, spec) in leaves.items()}


def draw(key):
    """Draws a sharded array for each leaf."""
    keys = jax.random.split(key, len(leaves))
    shapes = (shape for shape, _ in leaves.values())
    arrays = (0.02 * jax.random.normal(k, shape) for k, shape in zip(keys, shapes, strict=True))
    return jax.device_put(dict(zip(leaves, arrays, strict=True)), shardings)


params, grads = (draw(key) for key in jax.random.split(jax.random.key(SEED)))

# %% [markdown]
# ## The plan
#
# `mc.sharding_plan` prints, before anything is compiled, which matrices each device
# orthogonalizes and what it sends. All projections of one shape are one group.

# %%
print(mc.sharding_plan(params, shardings=shardings))

# %% [markdown]
# Its first group, with one color for each device. Up and down projections of all layers are one
# stack, and each device receives the same number of matrices.

# %%
stack = (2 * LAYERS, WIDTH, HIDDEN)
stored, full = (NamedSharding(mesh, spec) for spec in (into, P(("fsdp", "tp"))))
figure, panels = plt.subplots(2, stack[0], figsize=(10, 3))
for row, sharding, label in zip(panels, (stored, full), ("stored", "orthogonalized"), strict=True):
    owner = np.empty(stack)
    for device, index in sharding.devices_indices_map(stack).items():
        owner[index] = list(devices).index(device)
    for axes, matrix in zip(row, owner, strict=True):
        axes.imshow(matrix, cmap="viridis", vmin=0, vmax=devices.size - 1, aspect="auto")
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    row[0].set_ylabel(label)
for i, axes in enumerate(panels[0]):
    axes.set_title(f"{'down' if i < LAYERS else 'up'} {i % LAYERS + 1}", fontsize=8)
shades = plt.colormaps["viridis"].resampled(devices.size)
norm = Normalize(-0.5, devices.size - 0.5)
figure.colorbar(
    plt.cm.ScalarMappable(norm, shades), ax=panels, label="device", ticks=range(devices.size)
)
figure.suptitle("Stored in shards, orthogonalized as full matrices", x=0.01, ha="left")
plt.show()

# %% [markdown]
# ## One step
#
# On a mesh with Auto axes, as here, pass `shardings=`. On an Explicit mesh, the default of
# `jax.make_mesh`, the argument is not needed. Everything else is as on one device, and the numbers
# are equal up to rounding.

# %%
ours = mc.muon(1e-3, consistent_rms=0.2, shardings=shardings, ns_dtype=jnp.float32)


def step(tx, grads, opt_state, params):
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state


def compiled(tx):
    """Compiles a step that keeps the sharding of the parameters."""
    run = jax.jit(lambda *arguments: step(tx, *arguments), out_shardings=(shardings, None))
    return run.lower(grads, tx.init(params), params).compile()


ours_step = compiled(ours)
on_eight, _ = ours_step(grads, ours.init(params), params)

alone = mc.muon(1e-3, consistent_rms=0.2, ns_dtype=jnp.float32)
local_grads, local_params = jax.device_put((grads, params), devices[0])
on_one, _ = jax.jit(lambda *a: step(alone, *a))(local_grads, alone.init(local_params), local_params)

for name, x in on_one.items():
    moved = np.abs(x - local_params[name]).max()
    apart = np.abs(np.asarray(on_eight[name]) - np.asarray(x)).max()
    print(f"{name:10} moved by up to {moved:.1e}, the two differ by {apart / moved:.0e} of it")
    assert apart < 1e-3 * moved

# %% [markdown]
# ## What is sent
#
# The text of a compiled program lists every exchange between devices. Compare with the same step
# of `optax.contrib.muon`, for which the compiler gathers the shards in each of five iterations.

# %%
KINDS = "all-to-all|all-gather|all-reduce|reduce-scatter|collective-permute"


def exchanges(program):
    """Lists the kind and the MB that a device receives of every exchange in a compiled program."""
    pattern = rf" = (\(.*?\)|\S+) ({KINDS})(?:-start)?\("
    for shapes, kind in re.findall(pattern, program.as_text()):
        arrays = re.findall(r"f(\d+)\[([\d,]*)\]", shapes)
        bits = sum(int(b) * np.prod([int(n) for n in s.split(",") if n]) for b, s in arrays)
        yield kind, bits / 8e6


numbers = jax.tree.map(
    lambda x: contrib.MuonDimensionNumbers(-2, -1) if x.ndim == 3 else None, params
)
theirs = contrib.muon(1e-3, consistent_rms=0.2, muon_weight_dimension_numbers=numbers)
found = {"mc.muon": list(exchanges(ours_step)), "optax": list(exchanges(compiled(theirs)))}
print({name: {kind: [k for k, _ in e].count(kind) for kind, _ in e} for name, e in found.items()})
assert {kind for kind, _ in found["mc.muon"]} <= {"all-to-all"}

counts = [len(e) for e in found.values()]
sent = [sum(mb for _, mb in e) for e in found.values()]

figure, panels = plt.subplots(1, 2, figsize=(9, 2.4))
for axes, values, title, form in (
    (panels[0], counts, "Exchanges in a step: {:.0f} against {:.0f}", "{:.0f}"),
    (panels[1], sent, "MB a device receives in it: {:.1f} against {:.1f}", "{:.1f}"),
):
    bars = axes.barh(list(found), values, color=(BLUE, GREY), height=0.6)
    axes.bar_label(bars, [form.format(v) for v in values], padding=4)
    axes.invert_yaxis()
    axes.set_title(title.format(*values))
    axes.set(xticks=[], xlim=(0, 1.15 * max(*values, 1)))
    axes.spines["bottom"].set_visible(False)
plt.show()

# %% [markdown]
# `mc.muon` uses two all-to-alls for each group of the plan. On a GPU or TPU the default dtype is
# bfloat16, and the exchanges have half of these bytes. For other meshes, several processes, and
# larger plans, see `docs/guides/sharding.md` in the repository.
