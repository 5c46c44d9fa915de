# %% [markdown]
# # What Newton–Schulz does to singular values
#
# Muon replaces the momentum of a matrix, `M = U S Vᵀ`, by an approximation of `U Vᵀ`: it keeps the
# singular vectors and moves all singular values close to 1. It needs no decomposition. With
# X = M / ‖M‖, each step is three matrix products,
#
# ```
# X ← a X + b (X Xᵀ) X + c (X Xᵀ)² X        so that        s ← a s + b s³ + c s⁵
# ```
#
# for every singular value s. The coefficients (a, b, c) determine how fast it converges.

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
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import muonclip_jax as mc

SEED = 0
BLUE, ORANGE, GREY = "#2a6f97", "#e36414", "#8d99ae"
plt.rcParams.update({"figure.dpi": 100, "figure.constrained_layout.use": True})
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})
plt.rcParams.update({"axes.titlelocation": "left", "legend.frameon": False})
print(jax.devices())

# %% [markdown]
# ## A matrix with a known spectrum
#
# Momentum is far from orthogonal: a few singular values are large, most are small. This matrix has
# known singular vectors, and singular values from 1 down to 0.01.

# %%
ROWS, COLUMNS = 128, 256
rng = np.random.default_rng(SEED)
U, _ = np.linalg.qr(rng.normal(size=(ROWS, ROWS)))
V, _ = np.linalg.qr(rng.normal(size=(COLUMNS, ROWS)))
S = np.geomspace(1, 0.01, ROWS)
M = jnp.asarray((U * S) @ V.T, jnp.float32)
sizes = S / np.linalg.norm(S)  # what the first step sees, as ‖M‖ is the Frobenius norm

# %% [markdown]
# ## Step by step
#
# Each curve shows all singular values after one more step. `polar_express_6` has six steps, the
# others five.

# %%
PRESETS = ("jordan", "you", "polar_express_6", "cubic5")
figure, panels = plt.subplots(1, 4, figsize=(10, 3.6), sharey=True)
for axes, name in zip(panels, PRESETS, strict=True):
    count = len(mc.ns_coefficients(name))
    colors = plt.colormaps["viridis"](np.linspace(0.95, 0.1, count + 1))
    values = sizes
    axes.plot(values, color=colors[0], label="0")
    for k in range(1, count + 1):
        update = mc.newton_schulz(M, name, steps=k, dtype=jnp.float32)
        values = np.linalg.svd(update, compute_uv=False)
        axes.plot(values, color=colors[k], label=f"{k}")
    axes.axhline(1, color=GREY, linestyle="dashed", linewidth=1, zorder=0)
    axes.set(yscale="log", xlabel="number of the value, by size")
    axes.set_title(f"{name}: {values.min():.2f} to {values.max():.2f}", fontsize=9)
    print(f"{name}: singular values {values.min():.2f} to {values.max():.2f}")
panels[0].set_ylabel("singular value")
panels[0].set_yticks([0.01, 0.1, 1], ["0.01", "0.1", "1"])
figure.suptitle(f"From {sizes.min():.4f} .. {sizes.max():.2f} of the norm to about one")
figure.legend(*panels[2].get_legend_handles_labels(), title="step", loc="outside right center")
plt.show()

# %% [markdown]
# ## The polynomial
#
# All steps together are one polynomial of each singular value. For small values its slope is the
# product of all a. `jordan` leaves singular values between 0.68 and 1.2. `polar_express_6` reaches
# 1 with one more step. `cubic5` has c = 0, and needs a third fewer products.


# %%
def p(rows, s):
    """Follows singular values through all steps."""
    for a, b, c in rows:
        s = a * s + b * s**3 + c * s**5
    return s


COLOURS = dict(zip(PRESETS, (BLUE, ORANGE, "#222222", GREY), strict=True))
s = np.geomspace(1e-5, 1, 4001)
figure, axes = plt.subplots(figsize=(9, 3.8))
worst = 0.0
for name, color in COLOURS.items():
    rows = mc.ns_coefficients(name)
    got = U.T @ np.asarray(mc.newton_schulz(M, name, dtype=jnp.float32)) @ V
    slope = np.prod([a for a, _, _ in rows])
    axes.plot(s, p(rows, s), color=color, label=f"{name}, slope {slope:.0f}")
    axes.plot(sizes, np.diag(got), ".", color=color, markersize=5)
    worst = max(worst, np.abs(np.diag(got) - p(rows, sizes)).max())
axes.axhline(1, color=GREY, linestyle="dashed", linewidth=1, zorder=0)
axes.set(xscale="log", xlabel="singular value before, as a part of ‖M‖", ylabel="after")
axes.set_title(f"The matrix (dots) follows the polynomials (lines), to {worst:.0e}")
axes.legend()
plt.show()
assert worst < 1e-3

# %% [markdown]
# ## Two dtypes, two methods
#
# `standard` multiplies X in every step. `gram` iterates on X Xᵀ, which has the short side of X, and
# needs fewer FLOPs for long matrices. Both run in float32 or in bfloat16, the default on GPU and
# TPU. Left: the difference of each singular value from the polynomial in exact arithmetic. Right:
# how much of the other singular vectors rounding mixes into each (leakage).

# %%
rows = mc.ns_coefficients("jordan")
exact = p(rows, sizes)
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8), sharey=True)
errors = {}
for dtype, color in ((jnp.float32, BLUE), (jnp.bfloat16, ORANGE)):
    for method, marker in (("standard", "o"), ("gram", "x")):
        update = mc.newton_schulz(M, "jordan", method=method, dtype=dtype)
        got = U.T @ np.asarray(update, np.float64) @ V
        off = np.linalg.norm(got - np.diag(np.diag(got)), axis=1)
        style = {"marker": marker, "linestyle": "", "color": color, "markersize": 3}
        label = f"{jnp.dtype(dtype)}, {method}"
        left.plot(sizes, np.abs(np.diag(got) - exact), **style)
        right.plot(sizes, off, **style, label=label)
        errors[label] = np.linalg.norm(got - np.diag(exact)) / np.linalg.norm(exact)
        print(f"{label:20} relative error {errors[label]:.1e}")
titles = (
    "{}: {:.0e} standard, {:.0e} Gram".format(
        dtype, *(errors[f"{dtype}, {method}"] for method in ("standard", "gram"))
    )
    for dtype in ("float32", "bfloat16")
)
figure.suptitle("Error, as a part of the update. " + "; ".join(titles))
for axes in (left, right):
    axes.set(xscale="log", yscale="log", xlabel="singular value before, as a part of ‖M‖")
left.set_ylabel("distance from exact arithmetic")
left.set_title("size along its own direction", fontsize=10)
right.set_title("what leaks in from the others", fontsize=10)
right.legend(loc="lower left", ncols=2, fontsize=8)
plt.show()

# %% [markdown]
# ## The update
#
# The gradient of a layer whose inputs are random walks: neighboring columns are similar, and one
# singular value is far larger than the others. A gradient step changes little except this
# direction. The orthogonalized update has about the same size in all directions.

# %%
keys = jax.random.split(jax.random.key(SEED), 3)
x = jnp.cumsum(jax.random.normal(keys[0], (512, 96)), axis=1) / 10
target = jax.random.normal(keys[1], (512, 64))
W = jax.random.normal(keys[2], (96, 64)) / 10
gradient = jax.grad(lambda W: jnp.mean((jnp.tanh(x @ W) - target) ** 2))(W)
update = mc.newton_schulz(gradient, "you")

figure, panels = plt.subplots(1, 3, figsize=(10, 3), width_ratios=(1.2, 1.2, 1))
for axes, matrix, name, color in (
    (panels[0], gradient, "gradient", GREY),
    (panels[1], update, "update", BLUE),
):
    values = np.linalg.svd(matrix, compute_uv=False)
    share = values[0] ** 2 / np.sum(values**2)
    rms = float(jnp.sqrt(jnp.mean(matrix**2)))
    axes.imshow(matrix.T / rms, cmap="RdBu", vmin=-3, vmax=3, interpolation="nearest")
    axes.set(xlabel="input", ylabel="output")
    axes.set_title(f"{name}: {share:.0%} in one direction")
    panels[2].plot(values / values[0], color=color, label=name)
panels[2].set(yscale="log", xlabel="number of the value, by size")
panels[2].set_ylabel("singular value, by the largest")
panels[2].set_title(f"update: {values.min():.2f} to {values.max():.2f}")
panels[2].legend()
plt.show()
