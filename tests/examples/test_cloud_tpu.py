"""The launch scripts of examples/cloud_tpu: their settings, and what they would run."""

import os
import pathlib
import re
import shlex
import subprocess
import sys

import pytest

from examples.language_model import config
from tests.support.launch_scripts import FOLDER, call

SCRIPTS = sorted(FOLDER.glob("*.sh"))
COMMANDS = {
    "tpu_vm.sh": ("create", "install", "start", "logs", "stop", "delete", "keep"),
    "xpk.sh": ("cluster", "start", "list", "stop", "delete-cluster"),
}
each_launcher = pytest.mark.parametrize("script", COMMANDS)


def shown(script, command, **changes):
    """The commands that a script would run, as lists of words."""
    done = call(script, "--dry-run", command, **changes)
    assert (done.returncode, done.stderr) == (0, "")
    return [shlex.split(line) for line in done.stdout.splitlines()]


def value(words, option):
    (found,) = [word for word in words if word.startswith(option + "=")]
    return found.removeprefix(option + "=")


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_scripts_are_bash_in_strict_mode(path):
    subprocess.run(["bash", "-n", path], check=True)
    if path.name != "common.sh":  # it is read by the others
        assert path.read_text().startswith("#!/usr/bin/env bash\n")
        assert "\nset -euo pipefail\n" in path.read_text()
        assert os.access(path, os.X_OK)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_scripts_are_clean_to_shellcheck(path):
    shellcheck = pathlib.Path(sys.executable).with_name("shellcheck")
    subprocess.run([shellcheck, "-x", path], check=True)


@each_launcher
def test_help_names_every_command_and_setting(script):
    done = call(script, "--help", PROJECT=None)
    assert (done.returncode, done.stderr) == (0, "")
    settings = re.findall(r"^([A-Z_]+)=\$\{\1", (FOLDER / script).read_text(), re.MULTILINE)
    assert len(settings) > 8
    for word in (*COMMANDS[script], *settings):
        assert re.search(rf"\b{word}\b", done.stdout), word


@each_launcher
def test_every_setting_has_a_comment(script):
    for line in (FOLDER / script).read_text().splitlines():
        if re.match(r"[A-Z_]+=\$\{", line):
            assert re.search(r"\} +# \S|\} # \S", line), line


@pytest.mark.parametrize(
    ("script", "name"),
    [("tpu_vm.sh", n) for n in ("PROJECT", "ZONE", "NAME", "ACCELERATOR", "SHARE")]
    + [("xpk.sh", n) for n in ("PROJECT", "ZONE", "CLUSTER", "NAME", "TPU_TYPE")],
)
def test_missing_setting_is_one_line(script, name):
    done = call(script, "start", **{name: None})
    said = f"{script}: {name} is not set; --help lists the settings\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", said)


@each_launcher
@pytest.mark.parametrize("arguments", [(), ("trian",), ("start", "stop"), ("start stop",)])
def test_unknown_command_is_one_line(script, arguments):
    done = call(script, *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"{script}: got '{' '.join(arguments)}', expected one of: ")
    assert done.stderr.count("\n") == 1


def test_generation_without_a_known_image_is_an_error():
    done = call("tpu_vm.sh", "create", ACCELERATOR="tpu7x-16")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "set RUNTIME, or use xpk.sh" in done.stderr


# --- What is passed to the training program -------------------------------------------------------


def training_flags(script):
    """The flags of the training program in a launcher, and those that train.sh adds."""
    (command,) = [word for words in shown(script, "start") for word in words if "train.sh" in word]
    run, *flags = command.split("train.sh ")[1].split()
    (line,) = re.findall(r'-m examples\.language_model (.*) --out "\$run"', _text("train.sh"))
    return [*line.split(), "--out", run, *flags]


def _text(name):
    return (FOLDER / name).read_text()


@each_launcher
def test_flags_are_those_of_the_training_program(script):
    settings = config.parse(training_flags(script))
    assert settings.out == pathlib.Path("/mnt/runs/a-run")
    assert settings.resume
    assert settings.distributed is not None


def test_flags_of_the_page_are_those_of_the_training_program():
    page = _text("README.md")
    settings = re.findall(r'^export FLAGS="(.*)"$', page, re.MULTILINE)
    assert settings
    for flags in settings:
        config.parse(flags.split())
    for line in re.findall(r"^python -m examples\.language_model (.*)$", page, re.MULTILINE):
        config.parse(line.split())


def test_links_of_the_page_lead_somewhere():
    targets = re.findall(r"\]\(([^)#:]+)\)", _text("README.md"))
    assert targets
    assert all((FOLDER / target).exists() for target in targets)


def test_settings_of_the_page_are_those_of_the_scripts():
    exported = re.findall(r"^export (.*)$", _text("README.md"), re.MULTILINE)
    named = {name for line in exported for name in re.findall(r"\b([A-Z_]+)=", line)}
    assert {"PROJECT", "ZONE", "NAME", "SHARE", "CLUSTER"} <= named
    assert all(any(f"\n{name}=" in _text(script) for script in COMMANDS) for name in named)


# --- What would be run ----------------------------------------------------------------------------


@each_launcher
def test_every_command_names_project_and_zone(script):
    for command in COMMANDS[script]:
        lines = shown(script, command)
        cloud = [words for words in lines if words[0] in ("gcloud", "xpk")]
        assert cloud
        for words in cloud:
            assert value(words, "--project") == "a-project"
            assert value(words, "--zone") == "us-east5-b"


@pytest.mark.parametrize(
    ("accelerator", "image"),
    [
        ("v5litepod-16", "v2-alpha-tpuv5-lite"),
        ("v5p-16", "v2-alpha-tpuv5"),
        ("v6e-16", "v2-alpha-tpuv6e"),
    ],
)
def test_a_tpu_is_asked_for_with_the_image_of_its_generation(accelerator, image):
    (words,) = shown("tpu_vm.sh", "create", ACCELERATOR=accelerator)
    assert words[:6] == ["gcloud", "compute", "tpus", "queued-resources", "create", "a-run"]
    assert value(words, "--accelerator-type") == accelerator
    assert value(words, "--runtime-version") == image
    assert words[-1] == "--spot"
    (words,) = shown("tpu_vm.sh", "create", ACCELERATOR=accelerator, CAPACITY="")
    assert words[-1] == f"--runtime-version={image}"


def test_keep_is_create_install_and_start():
    steps = [line for step in ("create", "install", "start") for line in shown("tpu_vm.sh", step)]
    assert shown("tpu_vm.sh", "keep") == steps


def test_all_hosts_are_installed_and_started():
    for words in shown("tpu_vm.sh", "install")[1:] + shown("tpu_vm.sh", "start"):
        assert value(words, "--worker") == "all"


def test_systemd_starts_again_after_a_failure_but_not_after_bad_input():
    (words,) = shown("tpu_vm.sh", "start")
    command = value(words, "--command")
    for said in ("Restart=on-failure", "RestartPreventExitStatus=2", "KillMode=mixed"):
        assert f"-p {said} " in command


def test_a_workload_starts_again_after_a_failure_and_has_time_to_save():
    words = shown("xpk.sh", "start")[-1]
    assert words[:3] == ["xpk", "workload", "create"]
    assert value(words, "--restart-on-exit-codes") == "1"
    assert int(value(words, "--max-restarts")) > 0
    assert int(value(words, "--termination-grace-period-seconds")) > 30
    assert " exec bash examples/cloud_tpu/train.sh " in value(words, "--command")


@each_launcher
def test_a_dry_run_runs_nothing(script, tmp_path):
    for name in ("gcloud", "xpk", "git", "rm", "mkdir", "tar"):
        (tmp_path / name).write_text(f"#!/bin/sh\necho ran >> {tmp_path}/log\n")
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    for command in COMMANDS[script]:
        shown(script, command, PATH=path)
    assert not (tmp_path / "log").exists()
