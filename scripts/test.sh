#!/usr/bin/env bash
# Runs ruff, mypy and the tests; those on the real data where it can be fetched.
# usage: bash scripts/test.sh [pytest arguments]      with arguments: only those tests
#        bash scripts/test.sh --lowest                the fast suite with the lowest versions that pyproject.toml names
set -u
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # sh scripts/test.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

install_lowest() { # PYTHON
  rm -rf .venv-lowest
  "$1" -m venv .venv-lowest || return
  local python=.venv-lowest/bin/python
  $python -m pip install --disable-pip-version-check --quiet uv || return
  $python -m uv pip install --quiet --python $python --resolution lowest-direct --editable '.[test]' || return
  cp pyproject.toml .venv-lowest/installed
}

if [ "${1:-}" = --lowest ]; then
  if ! cmp -s pyproject.toml .venv-lowest/installed; then
    python=$(find_python 12) || exit 1 # the lowest numpy has no wheels for Python 3.13
    stage "installing the lowest versions into .venv-lowest (the first time some minutes and 8 GB)" \
      "check the network and the free disk space, then run this again" install_lowest "$python"
  fi
  say "the fast suite with the lowest versions"
  exec .venv-lowest/bin/python -m pytest -n 2 --dist loadfile
fi

set_up test
python=.venv/bin/python
if [ $# -gt 0 ]; then
  say "pytest $*"
  exec $python -m pytest "$@"
fi
stage "ruff check" "correct what it names; '$python -m ruff check --fix' corrects the simple mistakes" $python -m ruff check .
stage "ruff format" "run '$python -m ruff format .'" $python -m ruff format --check .
stage "mypy" "correct the types that it names" $python -m mypy
stage "the fast suite" "correct the test or the code that it names" $python -m pytest -n 2 --dist loadfile
stage "the long proofs" "correct the test or the code that it names" $python -m pytest -n 2 -m "long and not data"
if $python -m lenet_pl.download data; then
  stage "the tests on the real data" "correct the test or the code that it names" $python -m pytest -m data
else
  say "the tests on the real data are left out, because the data could not be fetched (see above)"
fi
