"""The tables of compiled steps on the pages of docs/ are the committed ones."""

from tests.support.pages import result, table

# --- sharding.md ----------------------------------------------------------------------------------


def test_costs_of_a_sharded_step_are_the_committed_ones():
    figures = ("seconds", "cycles", "flops", "sent_bytes", "temporary_bytes", "compile_seconds")
    expected = [
        [
            f"{case['layers']} {'in stacks' if case['stacked'] else 'apart'}",
            case["topology"],
            " x ".join(map(str, case["mesh"])),
            *(f"{by[f]:.2g}" if (by := case["ours_by_optax"]).get(f) else "-" for f in figures),
        ]
        for case in result("sharded_step")["cases"].values()
    ]
    assert table("sharding.md", "sharded_step") == expected


def test_costs_of_a_sharded_step_on_gpus_are_the_committed_ones():
    def products(least):
        return least["product_seconds"]

    def links(least):
        return least["nvlink_seconds"] + least["network_seconds"]

    expected = [
        [
            f"{case['layers']} {'in stacks' if case['stacked'] else 'apart'}",
            case["topology"],
            " x ".join(map(str, case["mesh"])),
            *(
                f"{case['ours_by_optax'][figure]:.2g}"
                for figure in ("flops", "sent_bytes", "temporary_bytes")
            ),
            *(
                f"{part(case['ours']['roofline']) / part(case['optax']['roofline']):.2g}"
                for part in (products, links)
            ),
            " and ".join(f"{sum(case[by]['counts'].values()):,}" for by in ("ours", "optax")),
            f"{case['ours_by_optax']['compile_cpu_seconds']:.2g}",
        ]
        for case in result("sharded_step_gpu")["cases"].values()
    ]
    assert table("sharding.md", "sharded_step_gpu") == expected


def test_costs_of_a_step_of_kimi_are_the_committed_ones():
    def gigabytes(bytes_):
        return f"{bytes_ / 1e9:.1f} GB"

    expected = [
        [
            name,
            " x ".join(map(str, x["mesh"].values())),
            *(gigabytes(x[f"{memory}_bytes"]) for memory in ("argument", "temporary", "peak")),
            f"{x['flops_by_standard']:.2f}",
            gigabytes(x["sent_bytes"]),
            f"{100 * x['training_step']['optimizer_share']:.2f} %",
        ]
        for name, x in result("kimi_k2_step")["slices"].items()
    ]
    assert table("sharding.md", "kimi_k2") == expected


def test_costs_of_steps_with_the_kernel_are_the_committed_ones():
    figures = ("seconds", "cycles", "flops", "temporary_bytes", "compile_cpu_seconds")
    expected = [
        [
            f"{case['layers']} layers" if "layers" in case else "Kimi K2",
            case["topology"],
            f"`{products}`",
            *(
                f"{by[f]:.2f}" if f in (by := case[f"pallas_by_{products}"]) else "-"
                for f in figures
            ),
        ]
        for case in result("tpu_kernel_step")["cases"].values()
        for products in ("optax", "xla")
        if f"pallas_by_{products}" in case
    ]
    assert table("sharding.md", "tpu_kernel") == expected


def test_cycles_of_the_kernel_are_the_committed_ones():
    generations = {"TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v6 lite": "v6e", "TPU7x": "TPU7x"}
    expected = [
        [
            generations[kind],
            row["kind"],
            f"{row['n']} x {row['m']}",
            f"{row['xla']:,}",
            f"{row['cycles']:,}",
            f"{row['kernel_by_xla']:.2f}",
        ]
        for kind, chip in result("tpu_kernel_cycles")["chips"].items()
        for row in {row["kind"]: row for row in chip["products"]}.values()  # the largest of each
    ]
    assert table("numerics.md", "tpu_kernel_cycles") == expected


# --- benchmarks.md --------------------------------------------------------------------------------


def test_shares_of_the_optimizer_are_the_committed_ones():
    def percent(share):
        return f"{100 * share:.2g} %" if share >= 1e-6 else "below 0.0001 %"

    expected = [
        [
            name,
            f"{model['tokens'] / 1e6:.2g} M",
            percent(model["bound"]),
            *(
                percent(cost[figure] / (cost[figure] + model["model"][figure]))
                for figure in ("flops", "bytes")
                for cost in model["optimizers"].values()
            ),
        ]
        for name, model in result("optimizer_share")["models"].items()
    ]
    assert table("benchmarks.md", "optimizer_share") == expected
