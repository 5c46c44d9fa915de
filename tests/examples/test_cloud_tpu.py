"""The launch scripts of examples/cloud_tpu: what they would run, and what they do about its end."""

import json
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys

import pytest

from examples.language_model import config
from tests.support.processes import free_port

FOLDER = pathlib.Path(__file__).parents[2] / "examples" / "cloud_tpu"
SCRIPTS = sorted(FOLDER.glob("*.sh"))
SETTINGS = {
    "PROJECT": "a-project",
    "ZONE": "us-east5-b",
    "NAME": "a-run",
    "ACCELERATOR": "v6e-16",
    "SHARE": "10.0.0.2:/runs",
    "CLUSTER": "a-cluster",
    "TPU_TYPE": "v6e-16",
}
COMMANDS = {
    "tpu_vm.sh": ("create", "install", "start", "logs", "stop", "delete", "keep"),
    "xpk.sh": ("cluster", "start", "list", "stop", "delete-cluster"),
}
each_launcher = pytest.mark.parametrize("script", COMMANDS)


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


# --- After a preemption ---------------------------------------------------------------------------


@pytest.fixture
def cloud(tmp_path):
    """A gcloud that returns one state after the other, and records its arguments."""
    script = tmp_path / "gcloud"
    script.write_text(
        f"""#!{sys.executable}
import json, pathlib, sys
folder = pathlib.Path({str(tmp_path)!r})
line = " ".join(sys.argv[1:])
with (folder / "log").open("a") as log:
    print(json.dumps(sys.argv[1:]), file=log)
if " describe " in line:
    states = json.loads((folder / "states").read_text())
    state = states.pop(0)
    (folder / "states").write_text(json.dumps(states))
    (folder / "now").write_text(state)
    print(state.split()[0]) if state else sys.exit(1)
elif "test -e" in line:
    now = (folder / "now").read_text()
    present = {{"ACTIVE": ["installed"], "ACTIVE ended": ["summary.json"]}}
    sys.exit(not any(line.endswith(name) for name in present.get(now, [])))
"""
    )
    script.chmod(0o755)
    (tmp_path / "git").symlink_to("/bin/true")

    def keep(*states):
        (tmp_path / "states").write_text(json.dumps(states))
        path = f"{tmp_path}:{os.environ['PATH']}"
        done = call("tpu_vm.sh", "keep", PATH=path, POLL="0")
        log = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
        return done, [_step(words) for words in log if "describe" not in words]

    return keep


def _step(words):
    """The purpose of a call of gcloud, in a word."""
    line = " ".join(words)
    for sign, step in {
        "queued-resources create": "create",
        "queued-resources delete": "delete",
        " scp ": "copy",
        "tpu_vm_host.sh": "install",
        "systemd-run": "start",
        "test -e": "look",
    }.items():
        if sign in line:
            return step
    return line


def test_keep_asks_installs_starts_and_ends_with_the_run(cloud):
    done, steps = cloud(
        "", "WAITING_FOR_RESOURCES", "ACTIVE new", "ACTIVE", "ACTIVE", "ACTIVE ended"
    )
    assert (done.returncode, done.stderr) == (0, "")
    installing, training = ["copy", "install", "start"], ["look", "look"]
    assert steps == ["create", *training, *installing, *training, *training, "look"]
    assert done.stdout.endswith("the run has ended: /mnt/runs/a-run on 10.0.0.2:/runs\n")


def test_keep_starts_over_on_a_new_tpu_after_a_preemption(cloud):
    done, steps = cloud("ACTIVE", "SUSPENDED", "", "ACTIVE new", "ACTIVE ended")
    assert done.returncode == 0
    steps = [step for step in steps if step != "look"]
    assert steps == ["delete", "create", "copy", "install", "start"]


# --- Exit codes of train.sh -----------------------------------------------------------------------


@pytest.fixture
def program(tmp_path):
    """A stand-in for Python: it records its arguments, waits if asked, and exits as asked."""
    script = tmp_path / "python"

    def write(body):
        script.write_text(f"#!/usr/bin/env bash\nrun={tmp_path}/run\nmkdir -p $run\n{body}\n")
        script.chmod(0o755)
        return {"PYTHON": str(script), "PATH": os.environ["PATH"]}

    return write


ENDED = "touch $run/summary.json"


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (f"{ENDED}; exit 0", 0),
        ("exit 0", 42),
        ("exit 1", 1),
        ("exit 2", 2),
        ("kill -KILL $$", 128 + signal.SIGKILL),
    ],
    ids=["ended", "stopped", "failed", "bad input", "killed"],
)
def test_exit_code_decides_on_a_restart(program, tmp_path, body, code):
    done = call("train.sh", str(tmp_path / "run"), "--steps", "3", **program(body))
    assert done.returncode == code


@pytest.mark.parametrize(("last", "code"), [("exit 0", 42), (f"{ENDED}; exit 0", 0)])
def test_a_signal_reaches_the_program_once_and_its_end_is_awaited(program, tmp_path, last, code):
    body = f"""
    trap 'echo stop >> $run/signals; sleep 0.2; echo saved >> $run/signals; {last}' TERM
    touch $run/ready
    while true; do sleep 0.05; done"""
    command = ["bash", FOLDER / "train.sh", tmp_path / "run"]
    with subprocess.Popen(command, env=program(body)) as script:
        while not (tmp_path / "run" / "ready").exists():
            assert script.poll() is None
        script.terminate()
        assert script.wait(timeout=60) == code
    assert (tmp_path / "run" / "signals").read_text() == "stop\nsaved\n"


def test_train_needs_a_folder(program):
    done = call("train.sh", "--steps", "3", **program("exit 0"))
    assert done.returncode == 2
    assert done.stdout.count("\n") == 1


@pytest.mark.nightly
def test_train_trains(tmp_path):
    (tmp_path / "text").write_text("to be or not to be, that is the question\n" * 99)
    alone = f"127.0.0.1:{free_port()},1,0"
    flags = f"--preset tiny --steps 3 --seq-len 16 --batch-size 4 --distributed {alone}"
    arguments = [*flags.split(), "--data", str(tmp_path / "text")]
    python = {"PYTHON": sys.executable, "PATH": os.environ["PATH"], "JAX_PLATFORMS": "cpu"}
    for said in ("validation loss", "this run has ended"):
        done = call("train.sh", str(tmp_path / "run"), *arguments, **python)
        assert done.returncode == 0, done.stderr
        assert said in done.stdout
