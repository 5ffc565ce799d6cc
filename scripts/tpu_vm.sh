#!/usr/bin/env bash
# Install tljax for the TPU of this VM from the checkout that holds this script, and check it.
# Run it again at any time: an environment that exists is updated.
#
#   scripts/tpu_vm.sh                      on one TPU VM
#   NO_DOCTOR=1 scripts/tpu_vm.sh          on every worker of a pod slice, where `tljax doctor`
#                                          would wait for the other workers
#   EXTRAS=tpu,tfds PYTHON=python3.12 VENV=/mnt/venv scripts/tpu_vm.sh
set -euo pipefail
cd "$(dirname "$0")/.."

extras=${EXTRAS:-tpu} venv=${VENV:-.venv}

find_python() {
    local python
    for python in ${PYTHON:-python3.13 python3.12 python3.11 python3}; do
        if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$python"
            return
        fi
    done
    echo "error: Python 3.11 or later is needed: sudo apt-get install python3.11 python3.11-venv" >&2
    return 2
}

if ! [ -x "$venv/bin/python" ] || ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    python=$(find_python)
    "$python" -m venv --clear "$venv"
fi
"$venv/bin/python" -m pip install --quiet --config-settings editable_mode=compat --editable ".[$extras]"
if [ -z "${NO_DOCTOR:-}" ]; then
    "$venv/bin/tljax" doctor
fi
