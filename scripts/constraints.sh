#!/usr/bin/env bash
# Rewrites scripts/constraints.txt with the versions installed now, keeping its header.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
pip="${1:-.venv/bin}/pip"
[[ $pip == /* ]] || pip=../$pip
new=$(mktemp)
{
    grep '^#' constraints.txt
    "$pip" freeze --all --exclude-editable | sed 's/+cpu$//' |
        grep -vE '^(pip|triton|apache-tvm-ffi|torchvision|torchaudio|torchcodec)=='
} >"$new"
mv "$new" constraints.txt
