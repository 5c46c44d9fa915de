"""Calls the launch scripts of examples/cloud_tpu."""

import os
import pathlib
import subprocess

FOLDER = pathlib.Path(__file__).parents[2] / "examples" / "cloud_tpu"
SETTINGS = {
    "PROJECT": "a-project",
    "ZONE": "us-east5-b",
    "NAME": "a-run",
    "ACCELERATOR": "v6e-16",
    "SHARE": "10.0.0.2:/runs",
    "CLUSTER": "a-cluster",
    "TPU_TYPE": "v6e-16",
}


def call(script, *arguments, **changes):
    """Runs a script with all settings except those set to None by `changes`."""
    settings = {k: v for k, v in (SETTINGS | changes).items() if v is not None}
    return subprocess.run(
        ["bash", FOLDER / script, *arguments],
        env={"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/")} | settings,
        capture_output=True,
        text=True,
        timeout=60,
    )
