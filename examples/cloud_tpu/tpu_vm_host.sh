#!/usr/bin/env bash
# Prepares one host of a TPU VM; tpu_vm.sh runs it on all of them.
set -euo pipefail

if [[ $# -ne 3 ]]; then
  echo "usage: tpu_vm_host.sh NFS_SHARE MOUNT_POINT PYTHON_VERSION"
  [[ ${1:-} == --help ]] && exit 0 || exit 2
fi
share=$1 mount_point=$2 python_version=$3
cd "$(dirname "$0")/../.."

# The timeout: a new host is still updating itself.
sudo apt-get -qq -o DPkg::Lock::Timeout=600 install -y nfs-common python3-venv
sudo mkdir -p "$mount_point"
mountpoint -q "$mount_point" || sudo mount -t nfs "$share" "$mount_point"
sudo chown "$(id -u)" "$mount_point"

# Ubuntu 22.04, of which the images are, has Python 3.10, and this package needs 3.11: uv brings one.
python3 -m venv ~/uv
~/uv/bin/pip install --quiet uv
~/uv/bin/uv venv --quiet --clear --python "$python_version" ~/venv
~/uv/bin/uv pip install --quiet --python ~/venv/bin/python '.[tpu,examples]'
