"""Measures the attached NVIDIA GPU for some minutes, and prints which settings to use.

    pip install "muonclip-jax[cuda]"
    python -m benchmarks.gpu_kernel --list
    python -m benchmarks.gpu_kernel

It measures in three parts, and `--list` prints what each would measure:

- the rate of a square product, in bfloat16, TF32 and float32;
- the numbers of the symmetric-product kernel, and its time against XLA's products;
- a whole update of `muon`, for each dtype, method and kind of products, against
  `optax.contrib.muon`; and the update of `torch.optim.Muon`, if torch is installed.

Writes results/gpu_kernel.json. Nobody had a GPU when this was written: please open an issue with
the table. `dtype="auto"`, `method="auto"` and `products="auto"` will follow it.
"""

import dataclasses
import functools
import importlib.util
import itertools
import math
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax import contrib

import muonclip_jax as mc
from benchmarks import report
from benchmarks.compiled import compiled_cost
from benchmarks.kernel_products import (
    BFLOAT16,
    CALLS,
    Product,
    by_kernel,
    error,
    kernel_and_xla,
    median_seconds,
    wrong,
)
from muonclip_jax._orthogonalize import gpu_kernel
from muonclip_jax._orthogonalize.tiles import Tiles, fastest

LEARNING_RATE = 0.02
TORCH = importlib.util.find_spec("torch") is not None
RATES = {"bf16": jnp.bfloat16, "tf32": jnp.float32, "f32": jnp.float32}
SETTINGS = {"ns_dtype": ("bfloat16", "float32"), "ns_method": ("standard", "gram")}
PRODUCTS = ("xla", "pallas")
# Relative Frobenius distance from optax's update, whose products are TF32. On CPU bfloat16 differs
# from float32 by 2e-2.
LARGEST_DISTANCE = 0.1
# float32 is more accurate: it may take this much more time than bfloat16.
FLOAT32_BY_BFLOAT16 = 1.05


@dataclasses.dataclass(frozen=True)
class Work:
    """The measurements.

    Attributes:
      side: Side of the square product.
      products: Symmetric products, in bfloat16.
      tiles: Tiles of the kernel; None for its own.
      layers: Layers of the model, whose matrices are leaves of their own.
      shapes: Matrices of a layer, inputs x outputs.
    """

    side: int
    products: Sequence[Product]
    tiles: Tiles | None
    layers: int
    shapes: Mapping[str, tuple[int, int]]

    def params(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns the shapes of all parameters."""
        return {
            f"layer_{i}/{name}": jax.ShapeDtypeStruct(shape, jnp.float32)
            for i in range(self.layers)
            for name, shape in self.shapes.items()
        }


# meta-llama/Llama-2-7b-hf, config.json: hidden_size, intermediate_size.
WORK = Work(
    8192,
    (
        *(Product("square", n, n) for n in (1024, 2048, 4096)),
        *(Product("gram", n, m) for n, m in ((1024, 4096), (2048, 7168), (4096, 11008))),
        Product("product", 4096, 4096),
    ),
    None,
    4,
    dict.fromkeys("qkvo", (4096, 4096))
    | {"gate": (4096, 11008), "up": (4096, 11008), "down": (11008, 4096)},
)
QUICK = Work(
    64,
    (Product("gram", 40, 56), Product("square", 40, 40), Product("product", 40, 40)),
    Tiles(16, 16, 16),
    1,
    {"q": (32, 32), "up": (32, 48)},
)


def candidates() -> list[dict[str, str]]:
    """Lists the settings of `muon` that are compared."""
    settings = SETTINGS | {"ns_products": PRODUCTS}
    return [
        dict(zip(settings, values, strict=True)) for values in itertools.product(*settings.values())
    ]


def described(work: Work) -> list[str]:
    """Lists what is measured, a line each."""
    shapes = ", ".join(f"{name} {a} x {b}" for name, (a, b) in work.shapes.items())
    lines = [f"rate of a {work.side} x {work.side} product: {name}" for name in RATES]
    lines += [f"kernel against XLA: {p.kind} {p.n} x {p.m}, bfloat16" for p in work.products]
    lines += [f"update of {work.layers} layers of {shapes}:"]
    lines += [f"  muon, {shown(settings)}, against optax.contrib.muon" for settings in candidates()]
    installed = "installed" if TORCH else "not installed"
    return [*lines, f"  torch.optim.Muon, against optax.contrib.muon ({installed})"]


def shown(settings: Mapping[str, str]) -> str:
    """Writes settings as keyword arguments."""
    return ", ".join(f"{name}={value!r}" for name, value in settings.items())


def measured_rates(side: int) -> dict[str, float]:
    """Measures the FLOP/s of a square product: by default a GPU computes float32 as TF32."""
    x = jax.random.normal(jax.random.key(0), (side, side))

    def call(name: str, dtype: Any) -> Callable[[], Any]:
        factor = x.astype(dtype)
        precision = jax.lax.Precision.HIGHEST if name == "f32" else None
        product = jax.jit(functools.partial(jnp.matmul, precision=precision))
        return lambda: product(factor, factor).block_until_ready()

    seconds = median_seconds([call(name, dtype) for name, dtype in RATES.items()])
    return {name: 2 * side**3 / one for name, one in zip(RATES, seconds, strict=True)}


def measure_product(product: Product, cut: Tiles | None, kind: str, rate: float) -> dict[str, Any]:
    """Checks and times one symmetric product; the rate of XLA's is a share of `rate`."""
    cut = cut or fastest(product.n, product.m, BFLOAT16, kind)
    if cut is None:
        raise ValueError(f"measure_product: the kernel is not used for {product} on {kind}.")
    kernel = functools.partial(by_kernel, gpu_kernel, product, cut)
    mine, other = kernel_and_xla(product, kernel)
    flops = 2 * product.n**2 * product.m * CALLS
    return dataclasses.asdict(product) | {
        "error": error(product, kernel),
        "tiles": tuple(cut),
        "kernel_by_xla": mine / other,
        "rate_of_xla_by_peak": flops / other / rate,
    }


class Run:
    """An optimizer on parameters that start at zero: after one step they are its update."""

    def __init__(self, tx: optax.GradientTransformation, gradients: Any) -> None:
        def step(params, state, gradients):
            updates, state = tx.update(gradients, state, params)
            return optax.apply_updates(params, updates), state

        self.params, self.gradients = jax.tree.map(jnp.zeros_like, gradients), gradients
        self.state = jax.jit(tx.init)(self.params)
        traced = jax.jit(step, donate_argnums=(0, 1)).trace(self.params, self.state, gradients)
        self.step = traced.lower().compile()

    def __call__(self) -> None:
        """Executes a step and waits for it."""
        self.params, self.state = self.step(self.params, self.state, self.gradients)
        jax.block_until_ready(self.params)


def distance(params: Any, others: Any) -> float:
    """Returns the largest relative Frobenius distance over the leaves."""

    def one(x: jax.Array, y: jax.Array) -> float:
        return float(jnp.linalg.norm(x - y) / jnp.linalg.norm(y))

    return max(map(one, jax.tree.leaves(params), jax.tree.leaves(others)))


def measure_updates(work: Work, rates: Mapping[str, float]) -> list[dict[str, Any]]:
    """Times a step of optax, of each setting against it, and of torch."""
    shapes = work.params()
    keys = jax.random.split(jax.random.key(0), len(shapes))
    gradients = {
        name: jax.random.normal(key, leaf.shape)
        for key, (name, leaf) in zip(keys, shapes.items(), strict=True)
    }
    reference = Run(contrib.muon(LEARNING_RATE), gradients)
    reference()
    update = jax.tree.map(jnp.copy, reference.params)
    (seconds,) = median_seconds([reference])
    rate = compiled_cost(reference.step).flops / seconds
    rows: list[dict[str, Any]] = [{"optimizer": "optax", "rate_by_peak": rate / rates["tf32"]}]
    for settings in candidates():
        arguments: dict[str, Any] = settings | {"ns_dtype": getattr(jnp, settings["ns_dtype"])}
        run = Run(mc.muon(LEARNING_RATE, **arguments), gradients)
        run()
        far = distance(run.params, update)
        mine, other = median_seconds([run, reference])
        rate = sum(group.flops for group in mc.sharding_plan(shapes, **arguments).groups) / mine
        peak = rates["bf16" if settings["ns_dtype"] == "bfloat16" else "f32"]
        figures = {"time_by_optax": mine / other, "rate_by_peak": rate / peak}
        rows.append(report.rounded(settings | figures | {"distance_from_optax": far}))
        print("muon", *(f"{k} {v}" for k, v in rows[-1].items()), sep=", ", flush=True)
    if TORCH:
        rows.append({"optimizer": "torch", "time_by_optax": torch_seconds(work) / seconds})
    return rows


def torch_seconds(work: Work) -> float:
    """Times a step of `torch.optim.Muon`, whose products are bfloat16, on the same device."""
    import torch  # pyright: ignore[reportMissingImports]

    device = "cuda" if torch.cuda.is_available() else "cpu"
    params = []
    for leaf in work.params().values():
        params.append(torch.zeros(leaf.shape[::-1], device=device, requires_grad=True))
        params[-1].grad = torch.randn(leaf.shape[::-1], device=device)
    optimizer = torch.optim.Muon(params, lr=LEARNING_RATE, weight_decay=0.0)

    def step() -> None:
        optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()

    return median_seconds([step])[0]


def advice(products: Sequence[Mapping[str, Any]], updates: Sequence[Mapping[str, Any]]) -> str:
    """Returns one line: which settings to use."""
    ours = [row for row in updates if "ns_dtype" in row]
    far = [shown_settings(r) for r in ours if not r["distance_from_optax"] <= LARGEST_DISTANCE]
    if names := "; ".join(wrong(products) + far):
        return f"Wrong numbers for {names}. Please open an issue."
    narrow, wide = (
        min((r for r in ours if r["ns_dtype"] == dtype), key=lambda r: r["time_by_optax"])
        for dtype in SETTINGS["ns_dtype"]
    )
    is_wide = wide["time_by_optax"] <= FLOAT32_BY_BFLOAT16 * narrow["time_by_optax"]
    best = wide if is_wide else narrow
    mean = math.exp(statistics.fmean(math.log(r["kernel_by_xla"]) for r in products))
    return (
        f"Use {shown_settings(best)}: an update takes {best['time_by_optax']:.2f} of the time of "
        f"optax's, at {best['rate_by_peak']:.2f} of the measured peak. The kernel takes {mean:.2f} "
        "of the time of XLA's products."
    )


def shown_settings(row: Mapping[str, Any]) -> str:
    """Writes the settings of a row as keyword arguments."""
    return shown({name: row[name] for name in (*SETTINGS, "ns_products")})


def main(arguments: list[str] | None = None) -> None:
    """Measures every part, prints the advice, and writes the results."""
    parser = report.parser("gpu_kernel", "Settings of muon, measured on the attached NVIDIA GPU.")
    parser.add_argument("--list", action="store_true", help="print what is measured, and stop")
    parser.add_argument("--quick", action="store_true", help="tiny, interpreted: needs no GPU")
    parser.add_argument("--layers", type=int, default=WORK.layers, help="fewer need less memory")
    options = parser.parse_args(arguments)
    work = QUICK if options.quick else dataclasses.replace(WORK, layers=options.layers)
    if options.list:
        print("\n".join(described(work)))
        return
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs some memory
    device = jax.devices()[0]
    if device.platform != "gpu" and not options.quick:
        parser.error(f"this measures a GPU, got {device.platform}; --quick runs anywhere")
    packages = ("optax", *(["torch"] if TORCH else []))
    results = report.provenance("gpu_kernel", *packages, machine=device.device_kind)
    rates = measured_rates(work.side)
    results["teraflops"] = {name: rate / 1e12 for name, rate in rates.items()}
    print(f"TFLOP/s of a square product: {report.rounded(results['teraflops'])}", flush=True)
    results["products"] = []
    for product in work.products:
        row = measure_product(product, work.tiles, device.device_kind, rates["bf16"])
        results["products"].append(report.rounded(row))
        print(*(f"{k} {v}" for k, v in results["products"][-1].items()), sep=", ", flush=True)
    results["updates"] = measure_updates(work, rates)
    results["advice"] = advice(results["products"], results["updates"])
    report.write_json(options.out / "gpu_kernel.json", report.rounded(results))
    print(results["advice"])


if __name__ == "__main__":
    main()
