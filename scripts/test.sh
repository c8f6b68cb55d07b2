#!/usr/bin/env bash
# Checks everything: ruff, mypy, the fast suite, the long proofs, and tests on the real data if it can be fetched.
# usage: bash scripts/test.sh [pytest arguments]      with arguments, pytest alone runs with them
set -u
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

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
stage "the long proofs" "correct the test or the code that it names" $python -m pytest -m "long and not data"
if $python -m lenet_pl.download data; then
  stage "the tests on the real data" "correct the test or the code that it names" $python -m pytest -m data
else
  say "the tests on the real data are left out, because the data could not be fetched (see above)"
fi
