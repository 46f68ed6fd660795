#!/bin/bash
# Shows the runs of an out_dir (all of out*/ without one) in a browser: scripts/start_tensorboard.sh [OUT_DIR] [tensorboard's options]
logdir=.
if [[ $# -gt 0 && $1 != -* ]]; then
    logdir=$1
    shift
fi
exec "${PYTHON:-python}" -m tensorboard.main --logdir "$logdir" "$@"
