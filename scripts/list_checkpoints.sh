#!/bin/bash
# What is on disk and whether it is whole: scripts/list_checkpoints.sh [out_dir]
exec "${PYTHON:-python}" "$(dirname "$0")/../checkpoint.py" list "$@"
