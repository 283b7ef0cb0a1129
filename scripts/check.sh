#!/usr/bin/env bash
# Runs every static check, reports each, and fails if any failed. Argument: the folder of the tools.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bin=${1:-.venv/bin}
failed=()

check() {
    local name=$1
    shift
    printf '==> %s\n' "$name"
    "$@" || failed+=("$name")
}

check format "$bin/ruff" format --check .
check lint "$bin/ruff" check .
check types "$bin/mypy"
check imports "$bin/lint-imports"
check dockerfile "$bin/hadolint" Dockerfile
check compose "$bin/check-jsonschema" --builtin-schema vendor.compose-spec docker-compose.yml

if ((${#failed[@]})); then
    printf '\nfailed: %s\n' "${failed[*]}" >&2
    exit 1
fi
printf '\nall checks passed\n'
