"""The order of the pages, by path in the repository; `*` is every page of a folder."""

# The README is the start page, above all captions.
START = "README.md"
NAVIGATION = {
    "Get started": (
        "docs/get_started.md",
        "notebooks/quick_start.ipynb",
        "docs/training_program.md",
    ),
    "Guides": (
        "docs/guides/flax.md",
        "docs/guides/nnx.md",
        "docs/guides/equinox_haiku.md",
        "docs/program.md",
        "notebooks/any_model.ipynb",
        "docs/guides/scan_remat_microbatches.md",
        "docs/guides/per_head.md",
        "docs/guides/threshold.md",
        "docs/choosing.md",
        "docs/guides/schedules_and_chains.md",
        "docs/guides/sharding.md",
        "notebooks/sharding.ipynb",
        "docs/guides/checkpoints.md",
        "docs/guides/lora.md",
        "examples/cloud_tpu/README.md",
    ),
    "Frameworks": ("docs/guides/frameworks.md", "docs/frameworks/*.md"),
    "How it works": (
        "docs/how_it_works.md",
        "notebooks/newton_schulz.ipynb",
        "notebooks/exploding_logits.ipynb",
        "docs/numerics.md",
        "docs/qk_clip.md",
        "docs/sharding.md",
        "ARCHITECTURE.md",
        "docs/references.md",
    ),
    "Evidence": ("docs/evidence.md", "docs/comparison.md", "docs/benchmarks.md"),
    "API reference": (
        "docs/api/index.md",
        "docs/api/optimizers.md",
        "docs/api/qk_clip.md",
        "docs/api/max_logits.md",
        "docs/api/before_training.md",
        "docs/api/analysis.md",
        "docs/api/transforms.md",
        "docs/api/newton_schulz.md",
        "docs/api/integrations.md",
    ),
    "Project": ("docs/faults.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"),
}
