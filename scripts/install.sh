#!/usr/bin/env bash
# Create the virtual environment and install exactly what a lock file names, hashes checked.
# usage: install.sh VENV LOCK STAMP
set -euo pipefail
venv=$1 lock=$2 stamp=$3

python_of() { # the first Python that is new enough; PYTHON= chooses one
  local candidate
  for candidate in ${PYTHON:-} python3 python3.13 python3.12 python3.11; do
    if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
      echo "$candidate"
      return
    fi
  done
  echo "CALM needs Python 3.11 or newer with venv (Debian: apt install python3-venv); set PYTHON=/path/to/python3.11" >&2
  exit 1
}

if [ ! -x "$venv/bin/python" ]; then
  python=$(python_of)
  echo "creating $venv with $("$python" --version)"
  "$python" -m venv "$venv"
fi
echo "installing $lock"
if ! "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --require-hashes -r "$lock"; then
  echo "could not install $lock: see pip's message above (offline? a proxy or index to configure in pip.conf?)" >&2
  exit 1
fi
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --no-build-isolation -e .
touch "$stamp"
