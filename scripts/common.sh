# train.sh and test.sh source this file. It changes to the project's folder, and set_up makes the environment .venv.
# usage: set_up [EXTRA]

CDPATH= cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

say() { printf '\n== %s\n' "$*"; }

# Runs one stage. If it fails, the message names the stage and says what to do.
stage() { # TITLE REMEDY COMMAND...
  local title=$1 remedy=$2
  shift 2
  say "$title"
  "$@" && return
  local code=$?
  printf '\nFailed (exit code %s): %s\nWhat to do: %s\n' "$code" "$title" "$remedy" >&2
  exit "$code"
}

find_python() { # [NEWEST]      of Python 3, such as 12
  local candidate check="import sys, venv, ensurepip; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, ${1:-99}))"
  for candidate in "${PYTHON:-}" python3 python3.14 python3.13 python3.12 python3.11 python3.10 python; do
    if [ -n "$candidate" ] && "$candidate" -c "$check" 2>/dev/null; then
      printf '%s' "$candidate"
      return
    fi
  done
  printf 'No Python from 3.10%s with the venv module was found.\nWhat to do: install one, or name it: PYTHON=/path/to/python3 bash %s\n' "${1:+ to 3.$1}" "$0" >&2
  exit 1
}

install_project() { # EXTRA
  .venv/bin/python -m pip install --disable-pip-version-check --quiet --editable ".${1:+[$1]}" || return
  # notes what was installed, so that a second run need not ask pip
  cp pyproject.toml ".venv/installed-${1:-base}"
}

set_up() { # [EXTRA]
  local extra=${1:-}
  if ! [ -x .venv/bin/python ]; then
    local python
    python=$(find_python) || exit 1
    stage "making .venv with $python" "read the message above, remove .venv, and run this again" "$python" -m venv .venv
  fi
  if ! cmp -s pyproject.toml ".venv/installed-${extra:-base}"; then
    stage "installing lenet_pl${extra:+ with its extra '$extra'} into .venv (the first time this takes minutes and 6 GB)" \
      "check the network and the free disk space, then run this again" install_project "$extra"
  fi
}
