#!/usr/bin/env bash
# Checks everything: ruff, mypy, the fast suite, and on the real data where it can be had.
# usage: bash scripts/test.sh [pytest arguments]      with arguments: only those tests
set -u
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

set_up test
python=.venv/bin/python
if [ $# -gt 0 ]; then
  say "pytest $*"
  exec $python -m pytest "$@"
fi
stage "ruff check" "mend what it names; '$python -m ruff check --fix' does the simple ones" $python -m ruff check .
stage "ruff format" "run '$python -m ruff format .'" $python -m ruff format --check .
stage "mypy" "mend the types it names" $python -m mypy
stage "the fast suite" "mend the test or the code that it names" $python -m pytest -n 2 --dist loadfile
stage "the long proofs" "mend the test or the code that it names" $python -m pytest -m "long and not data"
if $python -m lenet_pl.download data; then
  stage "the tests on the real data" "mend the test or the code that it names" $python -m pytest -m data
else
  say "the tests on the real data are left out: the data cannot be had (see above)"
fi
