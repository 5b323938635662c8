#!/usr/bin/env bash
# Makes .venv and installs the package into it. Idempotent: does nothing when pyproject.toml is unchanged since the last run.
#   bash scripts/setup.sh [test]      with "test": also what the tests need (torch included)
set -euo pipefail
cd "$(dirname "$0")/.."
extras="${1:-}"
stamp=".venv/.installed-$(cat pyproject.toml scripts/setup.sh | sha256sum | cut -c1-16)${extras:+-$extras}"
[ -f "$stamp" ] && exit 0

python=""
for candidate in ${PYTHON:-} python3.11 python3.12 python3.13 python3; do
  if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then python="$candidate"; break; fi
done
[ -n "$python" ] || { echo "setup: no Python 3.11 or newer found; set PYTHON=/path/to/python" >&2; exit 2; }
[ -x .venv/bin/python ] || "$python" -m venv .venv
pip=".venv/bin/python -m pip --disable-pip-version-check"
echo "setup: installing into .venv (a few minutes the first time)" >&2
# torch first: a later range must find it installed, or it would pull the registry's newest GPU build
[ "$extras" = test ] && $pip install --quiet torch==2.13.0
$pip install --quiet --editable ".${extras:+[$extras]}"
touch "$stamp"
