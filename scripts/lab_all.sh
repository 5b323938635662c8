#!/usr/bin/env bash
# Runs the experiments of configs/lab in order and gathers their tables. What has a result is not run again, so it may be interrupted and repeated.
#   scripts/lab_all.sh [DIRECTORY] [PROCESSES] [NAME...]      default runs/lab, 2, all of them
# Each leaves DIRECTORY/NAME/report.md and report.html; DIRECTORY/tables.md has all tables, with commit and time, as LOG.md shows them.
set -euo pipefail
cd "$(dirname "$0")/.."
root=${1:-runs/lab} processes=${2:-2}
names=("${@:3}")
if [ ${#names[@]} -eq 0 ]; then
  for file in configs/lab/*.yaml; do names+=("$(basename "$file" .yaml)"); done
fi
mkdir -p "$root"
for name in "${names[@]}"; do
  echo "== $name, $(date +%H:%M:%S)"
  start=$SECONDS
  "${PYTHON:-python}" -m gptoss_jax lab run "configs/lab/$name.yaml" --processes "$processes" --out "$root/$name"
  minutes=$(((SECONDS - start + 30) / 60))
  commit=$(git rev-parse --short HEAD 2>/dev/null || echo unknown)
  {
    echo "## $(date +%F): $name"
    echo
    echo "Commit $commit, $minutes minutes in this call: \`gptoss-jax lab run configs/lab/$name.yaml --processes $processes\`"
    sed -n '2,$p' "$root/$name/report.md" | grep -v '^!\['
  } > "$root/$name/log.md"
done
cat "$root"/*/log.md > "$root/tables.md"
echo "tables: $root/tables.md"
