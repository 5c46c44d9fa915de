#!/usr/bin/env bash
# Trains on a Cloud TPU slice of a GKE cluster, with xpk: github.com/AI-Hypercomputer/xpk.
set -euo pipefail

# Each may be given in the environment.
PROJECT=${PROJECT:-}                # Google Cloud project
ZONE=${ZONE:-}                      # zone that has the chips, such as us-east5-b
CLUSTER=${CLUSTER:-}                # of GKE; `cluster` makes it
NAME=${NAME:-}                      # of the workload and of the run
TPU_TYPE=${TPU_TYPE:-}              # v5litepod-16 and v6e-16 count chips, v5p-16 counts cores, two a chip
CAPACITY=${CAPACITY:---spot}        # --spot, --on-demand, --flex or --reservation=NAME
STORAGE=${STORAGE:-runs}            # xpk's name of the Filestore instance that keeps the runs
STORAGE_SIZE=${STORAGE_SIZE:-1024}  # of it, in GB; the smallest there is
IMAGE=${IMAGE:-python:3.13.7}       # of the container; one patch release: without --data in FLAGS, the text is its standard library
RESTARTS=${RESTARTS:-100}           # after preemptions and failures, at most
GRACE=${GRACE:-120}                 # seconds to save in, from the signal to the end of the container
FLAGS=${FLAGS:---preset medium --dtype bfloat16 --seq-len 2048 --batch-size 64} # of examples.language_model, on every host

MOUNT_POINT=/mnt/runs

usage="usage: xpk.sh [--dry-run] COMMAND
  cluster         make a cluster with one slice, and a Filestore instance for the runs
  start           start training the commit that is checked out; it starts again after preemptions
  list            show the workloads of the cluster and their states
  stop            delete the workload: it saves and stops; start goes on from there
  delete-cluster  give the slice back, and delete the runs
--dry-run prints the commands and runs none.
Settings, in the environment: PROJECT ZONE CLUSTER NAME TPU_TYPE
  and, with defaults: CAPACITY STORAGE STORAGE_SIZE IMAGE RESTARTS GRACE FLAGS; their comments in xpk.sh describe them."

root=$(cd "$(dirname "$0")/../.." && pwd)
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$root/examples/cloud_tpu/common.sh"

xpk_() {
  run xpk "$@" --project="$PROJECT" --zone="$ZONE" --cluster="$CLUSTER"
}

cluster() {
  xpk_ cluster create --tpu-type="$TPU_TYPE" --num-slices=1 "$CAPACITY" --enable-gcpfilestore-csi-driver
  xpk_ storage create "$STORAGE" --type=gcpfilestore --size="$STORAGE_SIZE" --tier=BASIC_HDD --vol=default \
    --access-mode=ReadWriteMany --mount-point="$MOUNT_POINT" --readonly=false --auto-mount=true
}

start() {
  local sources=/tmp/muonclip-jax-sources
  run rm -rf "$sources"
  run mkdir "$sources"
  run git -C "$root" archive --output="$sources/sources.tar" HEAD
  run tar -xf "$sources/sources.tar" -C "$sources"
  run rm "$sources/sources.tar"
  # exec: xpk sends its signal to this command, which must be train.sh.
  # xpk itself restarts after 42 and after signals; 1 is a failed run, 2 is bad input.
  xpk_ workload create --workload="$NAME" --tpu-type="$TPU_TYPE" --num-slices=1 \
    --base-docker-image="$IMAGE" --script-dir="$sources" \
    --max-restarts="$RESTARTS" --restart-on-exit-codes=1 --termination-grace-period-seconds="$GRACE" \
    --command="pip install --quiet '.[tpu,examples]' && exec bash examples/cloud_tpu/train.sh $MOUNT_POINT/$NAME $FLAGS"
}

list() {
  xpk_ workload list
}

stop() {
  xpk_ workload delete --workload="$NAME"
}

delete-cluster() {
  xpk_ storage delete "$STORAGE"
  xpk_ cluster delete
}

parse "cluster start list stop delete-cluster" "PROJECT ZONE CLUSTER NAME TPU_TYPE" "$@"
"$command"
