#!/usr/bin/env bash
# Trains LeNet-5 on Fashion-MNIST and prints its test accuracy.
# usage: bash scripts/train.sh [fit arguments]      by default: --config configs/lenet.yaml
set -u
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # sh scripts/train.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

set_up
stage "getting the data" "see the message above" .venv/bin/python -m lenet_pl.download data
[ $# -gt 0 ] || set -- --config configs/lenet.yaml
say "training: python -m lenet_pl fit $*"
exec .venv/bin/python -m lenet_pl fit "$@"
