#!/usr/bin/env bash
# Trains on one host of a slice; the exit code shows whether to start it again:
#
#   0   the run is complete
#   2   bad input, or other settings on resume: a restart would end the same way
#   42  stopped and saved before the last step: restart (the exit code that xpk uses for this)
#   1, and the codes of signals: the run failed; restart
set -euo pipefail

PYTHON=${PYTHON:-python3} # the interpreter that has muonclip-jax[tpu,examples]

if [[ $# -eq 0 || $1 == -* ]]; then
  echo "usage: train.sh RUN_FOLDER [flags of examples.language_model]; the folder is one that all hosts share"
  [[ ${1:-} == --help ]] && exit 0 || exit 2
fi
run=$1
shift
cd "$(dirname "$0")/../.."

"$PYTHON" -m examples.language_model --distributed --resume --out "$run" "$@" &
program=$!
stopped=
trap 'stopped=yes; kill -TERM "$program"' TERM

code=0
wait "$program" || code=$?
if [[ $stopped ]]; then # the signal ended the first wait, not the program
  code=0
  wait "$program" || code=$?
fi
# A run writes summary.json last. When a machine is drained, exit code 0 would mean "complete".
if [[ $code -eq 0 && ! -e $run/summary.json ]]; then
  code=42
fi
exit "$code"
