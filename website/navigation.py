"""The order of the pages, by path in the repository; `*` is every page of a folder."""

# The README is the start page, above all captions.
START = "README.md"
NAVIGATION = {
    "Get started": ("notebooks/quick_start.ipynb", "docs/training_program.md"),
    "Guides": (
        "docs/recipes.md",
        "docs/program.md",
        "docs/qk_clip.md",
        "docs/choosing.md",
        "docs/sharding.md",
        "docs/frameworks/*.md",
        "examples/cloud_tpu/README.md",
    ),
    "Notebooks": ("notebooks/*.ipynb",),
    "How it works": (
        "docs/how_it_works.md",
        "docs/numerics.md",
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
