# shellcheck shell=bash
# Shared by tpu_vm.sh and xpk.sh: the command line, and printing of commands before they run.
# They set `usage` and `root` before they source it.

fail() {
  echo "$(basename "$0"): $1" >&2
  exit 2
}

# Parses the command line into `command` and `dry_run`; exits with an error if a setting is missing.
parse() { # commands, settings, command line
  local commands=$1 settings=$2 name
  shift 2
  dry_run=
  if [[ ${1:-} == --dry-run ]]; then
    dry_run=yes
    shift
  fi
  command=${1:-}
  if [[ $command == --help ]]; then
    # shellcheck disable=SC2154 # it is set by the script that sources this
    echo "$usage"
    exit
  fi
  if [[ $# -ne 1 || $command == *' '* || " $commands " != *" $command "* ]]; then
    fail "got '$*', expected one of: $commands; --help describes them"
  fi
  for name in $settings; do
    [[ ${!name} ]] || fail "$name is not set; --help lists the settings"
  done
}

# Prints a command in a form that can be pasted into a shell.
show() {
  local word option line=
  for word in "$@"; do
    option=
    if [[ $word =~ ^--[a-z-]+= ]]; then
      option=${BASH_REMATCH[0]}
      word=${word#"$option"}
    fi
    [[ $word =~ ^[A-Za-z0-9_./:=@,+-]+$ ]] || word=${word@Q}
    line+="$option$word "
  done
  echo "${line% }"
}

run() {
  show "$@"
  [[ $dry_run ]] || "$@"
}
