#!/bin/bash
# What is on disk, with file sizes compared (checkpoint.py verify checks every byte): scripts/list_checkpoints.sh [out_dir]
exec "${PYTHON:-python}" "$(dirname "$0")/../checkpoint.py" list "$@"
