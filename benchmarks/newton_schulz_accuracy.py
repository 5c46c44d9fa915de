"""Both methods of Newton–Schulz against float64, and against a plain iteration in the same dtype.

    python -m benchmarks.newton_schulz_accuracy

Writes results/newton_schulz_accuracy.json and prints its rows. With x = U S Vᴴ in float64, O the
result, C = Uᴴ O V, and p the polynomial (in 16-bit dtypes with the guarded coefficients that
`newton_schulz` then uses):

    smallest, largest   singular values of C where S is at least 3e-3 of the norm of x
    largest_of_all      largest singular value of O
    error               ‖O - U p(S / ‖x‖) Vᴴ‖ / ‖p(S / ‖x‖)‖
    leakage             ‖C - diag C‖ / ‖C‖: how far rounding mixes the singular vectors
    ..._by_plain        the same, divided by the figure of `plain`

Each is the worst of `SEEDS`.
"""

import math
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import report
from muonclip_jax import newton_schulz, ns_coefficients
from muonclip_jax._orthogonalize import choices
from muonclip_jax._orthogonalize.coefficients import evaluate, for_sixteen_bits

PRESETS = ("jordan", "you", "polar_express", "polar_express_6", "deepseek_v4", "cubic5")
SPECTRA = ("gaussian", "1 .. 1e-4", "rank 8", "rank 1 + 1e-3")
SEEDS = (0, 1, 2)
WIDE, SQUARE = (128, 512), (128, 128)
# Smallest singular value for which the presets state a range of results.
LEAST = 3e-3
# Matrix, methods, dtypes; each with 1 and 2 blocks.
CASES = (
    (WIDE, ("standard", "gram"), ("float32", "bfloat16", "float16")),
    (SQUARE, ("standard",), ("float32", "bfloat16")),
)


def matrices(n: int, m: int) -> np.ndarray:
    """Makes one matrix of each spectrum and seed: (spectra, seeds, n, m), with n <= m."""
    made = []
    for seed in SEEDS:
        normal = np.random.default_rng(seed).normal
        u, v = (np.linalg.qr(normal(size=(side, n)))[0] for side in (n, m))
        decaying = (u * np.geomspace(1, 1e-4, n)) @ v.T
        rank_8 = normal(size=(n, 8)) @ normal(size=(8, m))
        rank_1 = normal(size=(n, 1)) @ normal(size=(1, m)) + 1e-3 * normal(size=(n, m))
        made.append([normal(size=(n, m)), decaying, rank_8, rank_1])
    return np.swapaxes(np.array(made, np.float32), 0, 1)


def plain(
    x: np.ndarray, coefficients: Sequence[tuple[float, float, float]], dtype: str
) -> np.ndarray:
    """Computes A = X Xᵀ, Z = b A + c A², X ← a X + Z X, and rounds only A, Z and X."""

    def product(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.matmul(a, b, precision="highest", preferred_element_type=jnp.float32)

    X = jnp.asarray(x / np.linalg.norm(x, axis=(-2, -1), keepdims=True), dtype)
    for a, b, c in coefficients:  # not under jit, where XLA may omit a rounding
        A = product(X, X.mT).astype(dtype)
        Z = (b * A.astype(jnp.float32) + c * product(A, A)).astype(dtype)
        X = (a * X.astype(jnp.float32) + product(Z, X)).astype(dtype)
    return np.asarray(X, np.float64)


def scores(out: np.ndarray, u: np.ndarray, s: np.ndarray, vh: np.ndarray, p: np.ndarray) -> dict:
    """Computes the figures that the docstring of this module defines, each (spectra, seeds)."""
    C = np.swapaxes(u, -1, -2) @ out @ np.swapaxes(vh, -1, -2)
    off = C * (1 - np.eye(C.shape[-1]))
    kept = s >= LEAST
    inner = C * kept[..., :, None] * kept[..., None, :]
    values = np.linalg.svd(inner, compute_uv=False)
    smallest = np.take_along_axis(values, kept.sum(-1, keepdims=True) - 1, -1)[..., 0]
    norm = np.linalg.norm(p, axis=-1)
    return {
        "smallest": smallest,
        "largest": values[..., 0],
        "largest_of_all": np.linalg.norm(out, 2, axis=(-2, -1)),
        "error": np.linalg.norm(out - (u * p[..., None, :]) @ vh, axis=(-2, -1)) / norm,
        "leakage": np.linalg.norm(off, axis=(-2, -1)) / np.linalg.norm(C, axis=(-2, -1)),
    }


def rows_of(shape: tuple[int, int], methods: Sequence[str], dtype: str) -> Iterator[dict]:
    """Measures every preset, method, number of blocks and spectrum on one shape in one dtype."""
    x = matrices(*shape)
    u, s, vh = np.linalg.svd(x.astype(np.float64), full_matrices=False)
    s /= np.linalg.norm(s, axis=-1, keepdims=True)
    for preset in PRESETS:
        steps = ns_coefficients(preset)
        steps = steps if dtype == "float32" else for_sixteen_bits(steps)
        p = np.vectorize(lambda value, steps=steps: evaluate(steps, value))(s)
        base = scores(plain(x, steps, dtype), u, s, vh, p)
        for method, blocks in ((method, blocks) for method in methods for blocks in (1, 2)):
            smallest = 2 if blocks == 2 else math.inf
            choices._SMALLEST_MIRRORED = {jax.default_backend(): smallest}
            out = newton_schulz(x, preset, method=method, dtype=dtype)
            found = scores(np.asarray(out, np.float64), u, s, vh, p)
            found |= {f"{key}_by_plain": found[key] / base[key] for key in ("error", "leakage")}
            for i, spectrum in enumerate(SPECTRA):
                worst = {k: (np.min if k == "smallest" else np.max)(v[i]) for k, v in found.items()}
                yield {
                    "matrix": list(shape),
                    "dtype": dtype,
                    "preset": preset,
                    "method": method,
                    "blocks": blocks,
                    "spectrum": spectrum,
                } | {key: float(f"{value:.3g}") for key, value in worst.items()}


def main(arguments: list[str] | None = None) -> None:
    """Measures, prints a table and writes the results."""
    options = report.parser("newton_schulz_accuracy", "Accuracy of Newton-Schulz.").parse_args(
        arguments
    )
    rows = [
        row
        for shape, methods, dtypes in CASES
        for dtype in dtypes
        for row in rows_of(shape, methods, dtype)
    ]
    results = report.provenance("newton_schulz_accuracy") | {"rows": rows}
    report.write_json(options.out / "newton_schulz_accuracy.json", results, per_line="rows")
    print(report.columns([rows[0], *(row.values() for row in rows)]))


if __name__ == "__main__":
    main()
