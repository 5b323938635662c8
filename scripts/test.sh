#!/usr/bin/env bash
# Installs what the tests need and runs them all; arguments go to pytest (for example: bash scripts/test.sh -m "not slow").
# JOBS worker processes (default 2) share the test files.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh test
exec .venv/bin/python -m pytest -n "${JOBS:-2}" --dist loadfile "$@"
