#!/usr/bin/env bash
# Trains on a Cloud TPU VM, or on all hosts of a pod slice, and resumes after preemptions.
set -euo pipefail

# Each may be given in the environment.
PROJECT=${PROJECT:-}                     # Google Cloud project
ZONE=${ZONE:-}                           # zone that has the chips, such as us-east5-b
NAME=${NAME:-}                           # of the TPU, of its queued resource and of the run
ACCELERATOR=${ACCELERATOR:-}             # v5litepod-16 and v6e-16 count chips, v5p-16 counts cores, two a chip
SHARE=${SHARE:-}                         # NFS share that outlives the TPU, as HOST:/NAME of a Filestore instance
CAPACITY=${CAPACITY---spot}              # --spot, --reserved, or empty for on demand
RUNTIME=${RUNTIME:-}                     # image of the hosts; empty: the one for the generation
PYTHON_VERSION=${PYTHON_VERSION:-3.13.7} # one patch release: without --data in FLAGS, the text is its standard library
POLL=${POLL:-60}                         # seconds between two looks at the state
FLAGS=${FLAGS:---preset medium --dtype bfloat16 --seq-len 2048 --batch-size 64} # of examples.language_model, on every host

MOUNT_POINT=/mnt/runs
UNIT=train # systemd's name for the program; it starts it again, keeps its output and stops it

usage="usage: tpu_vm.sh [--dry-run] COMMAND
  create   ask for the TPU and wait until it is there
  install  copy the commit that is checked out to all hosts, and install it
  start    start training on all hosts; it survives the end of this connection
  logs     follow the output of the first host
  stop     save and stop, on all hosts
  delete   give the TPU back; the run stays on SHARE
  keep     all of this until the run has ended: create, install, start, and again after a preemption
--dry-run prints the commands and runs none.
Settings, in the environment: PROJECT ZONE NAME ACCELERATOR SHARE
  and, with defaults: CAPACITY RUNTIME PYTHON_VERSION POLL FLAGS; their comments in tpu_vm.sh describe them."

root=$(cd "$(dirname "$0")/../.." && pwd)
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$root/examples/cloud_tpu/common.sh"

queued_resource() {
  run gcloud compute tpus queued-resources "$1" "$NAME" --project="$PROJECT" --zone="$ZONE" "${@:2}"
}

on_worker() { # which, command
  run gcloud compute tpus tpu-vm ssh "$NAME" --project="$PROJECT" --zone="$ZONE" --worker="$1" --command="$2"
}

# ACTIVE, WAITING_FOR_RESOURCES, SUSPENDED after a preemption, ...; empty if there is none.
state() {
  gcloud compute tpus queued-resources describe "$NAME" --project="$PROJECT" --zone="$ZONE" \
    --format='value(state.state)' 2>/dev/null || true
}

is_there() { # a path on the first host
  gcloud compute tpus tpu-vm ssh "$NAME" --project="$PROJECT" --zone="$ZONE" --worker=0 \
    --command="test -e $1" 2>/dev/null
}

ask() {
  # shellcheck disable=SC2086 # empty is no argument
  queued_resource create --node-id="$NAME" --accelerator-type="$ACCELERATOR" --runtime-version="$RUNTIME" $CAPACITY
}

create() {
  ask
  [[ $dry_run ]] && return
  local now
  until now=$(state) && [[ $now == ACTIVE ]]; do
    case $now in
      FAILED | SUSPENDED) fail "$NAME is $now; delete it, and create it again" ;;
    esac
    echo "$NAME is ${now:-not known yet}"
    sleep "$POLL"
  done
}

install() {
  local archive=muonclip-jax.tar
  # && as `keep` calls this where errexit is off
  run git -C "$root" archive --output="/tmp/$archive" HEAD &&
    run gcloud compute tpus tpu-vm scp "/tmp/$archive" "$NAME:$archive" --project="$PROJECT" --zone="$ZONE" --worker=all &&
    on_worker all "mkdir -p muonclip-jax && tar -xf $archive -C muonclip-jax && bash muonclip-jax/examples/cloud_tpu/tpu_vm_host.sh $SHARE $MOUNT_POINT $PYTHON_VERSION && touch installed"
}

start() {
  # KillMode=mixed: train.sh passes the signal on; a second one would end the program unsaved.
  local unit="sudo systemd-run --unit=$UNIT --collect --uid=\$USER --working-directory=\$HOME/muonclip-jax --setenv=PYTHON=\$HOME/venv/bin/python"
  local again="-p Restart=on-failure -p RestartPreventExitStatus=2 -p RestartSec=30 -p KillMode=mixed -p TimeoutStopSec=300"
  on_worker all "$unit $again bash examples/cloud_tpu/train.sh $MOUNT_POINT/$NAME $FLAGS"
}

logs() {
  on_worker 0 "sudo journalctl --unit=$UNIT --output=cat --follow"
}

stop() {
  on_worker all "sudo systemctl stop $UNIT"
}

delete() {
  queued_resource delete --force --quiet
}

keep() {
  if [[ $dry_run ]]; then
    create && install && start
    return
  fi
  while true; do
    case $(state) in
      '') ask ;;
      FAILED | SUSPENDED) delete ;;
      ACTIVE)
        if is_there "$MOUNT_POINT/$NAME/summary.json"; then
          echo "the run has ended: $MOUNT_POINT/$NAME on $SHARE"
          return
        fi
        # A new host has no installation; an installed one trains, or its logs show the error.
        is_there installed || { install && start; } || echo "failed; trying again in $POLL s"
        ;;
    esac
    sleep "$POLL"
  done
}

parse "create install start logs stop delete keep" "PROJECT ZONE NAME ACCELERATOR SHARE" "$@"
if [[ -z $RUNTIME ]]; then
  # cloud.google.com/tpu/docs/runtimes, "PyTorch and JAX", read in November 2026.
  case $ACCELERATOR in
    v6e-*) RUNTIME=v2-alpha-tpuv6e ;;
    v5p-*) RUNTIME=v2-alpha-tpuv5 ;;
    v5litepod-*) RUNTIME=v2-alpha-tpuv5-lite ;;
    v4-*) RUNTIME=tpu-ubuntu2204-base ;;
    *) fail "no image is known for ACCELERATOR=$ACCELERATOR; set RUNTIME, or use xpk.sh" ;;
  esac
fi
"$command"
