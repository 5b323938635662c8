#!/usr/bin/env bash
# Installs the package and runs the whole recipe on the small model that comes with it; arguments go to `gptoss-jax demo`.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh
exec .venv/bin/gptoss-jax demo "$@"
