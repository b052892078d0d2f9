# Sourced by the scripts beside it: goes to the root of the repository and defines `environment`.
# It makes .venv there, or reuses it, and installs the package in it once for every state of pyproject.toml.

cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() {
  echo "$(basename "$0"): $*" >&2
  exit 1
}

is_new_enough() {
  "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

find_python() {
  local candidate
  for candidate in ${PYTHON:+"$PYTHON"} python3 python3.12 python3.13 python3.11 python; do
    if is_new_enough "$candidate"; then
      echo "$candidate"
      return
    fi
  done
  fail "needs Python 3.11 or later; install one, or name it: PYTHON=/path/to/python3.12 scripts/..."
}

# Errors only: warnings are of how pip is set up on the machine, and nothing here can mend that.
pip_install() {
  .venv/bin/python -m pip install -qq --disable-pip-version-check "$@"
}

# environment EXTRA: EXTRA is "test", or "" for what running takes. What holds the tests' packages holds all.
environment() {
  local python state
  if [ ! -e .venv ]; then
    python=$(find_python)
    echo "making .venv with $("$python" --version)" >&2
    "$python" -m venv .venv || fail "cannot make .venv; on Debian and Ubuntu: apt-get install python3-venv"
  fi
  is_new_enough .venv/bin/python || fail ".venv does not work or is older than Python 3.11; remove it and run this again"
  state=$(cksum <pyproject.toml)
  if [ "$(cat .venv/installed-test 2>/dev/null)" = "$state" ]; then return; fi
  if [ -z "$1" ] && [ "$(cat .venv/installed 2>/dev/null)" = "$state" ]; then return; fi
  echo "installing into .venv; the first time takes some minutes" >&2
  if [ "$1" = test ]; then
    # torch alone first: with its version settled, a wheel for the CPU that pip finds on the disk is taken as it is.
    pip_install "$(grep -o 'torch==[0-9.]*' pyproject.toml)"
  fi
  pip_install --editable ".${1:+[$1]}"
  echo "$state" >".venv/installed${1:+-$1}"
}
