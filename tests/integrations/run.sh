#!/usr/bin/env bash
# Installs the newest release of a framework with this checkout, and runs its tests in its own trainer.
#     bash tests/integrations/run.sh FRAMEWORK [arguments of pytest]
# The environment is FOLDER/FRAMEWORK; an existing one is used as it is. FOLDER is .frameworks.
set -euo pipefail
cd "$(dirname "$0")/../.."
framework=$1
shift
python=${FOLDER:-.frameworks}/$framework
if [[ ! -e $python/bin/python ]]; then
  case $framework in
    maxtext) uv venv --python 3.12 "$python"; uv pip install --python "$python" 'maxtext[tpu]' . ;;
    levanter) uv venv --python 3.12 "$python"; uv pip install --python "$python" marin-levanter . ;;
    tunix) uv venv --python 3.12 "$python"; uv pip install --python "$python" google-tunix . ;;
    gemma) uv venv --python 3.12 "$python"; uv pip install --python "$python" gemma kauldron 'sentencepiece<0.2.2' . ;;
    easydel) uv venv --python 3.11 "$python"; uv pip install --python "$python" easydel pillow torch . ;;
    *) echo "unknown framework: $framework" >&2; exit 1 ;;
  esac
  uv pip install --python "$python" pytest hypothesis
fi
exec "$python/bin/python" -m pytest -q -o addopts= -o filterwarnings= --strict-markers "tests/integrations/trained_in_$framework"*.py "$@"
