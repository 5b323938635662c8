#!/usr/bin/env bash
# Installs what the tests need and runs them all; arguments go to pytest (for example: bash scripts/test.sh -m "not slow").
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh test
exec .venv/bin/python -m pytest "$@"
