#!/bin/bash
# Shows the runs of an out_dir (all of out*/ without one) in a browser: scripts/start_tensorboard.sh [OUT_DIR] [tensorboard's options]
logdir=.
if [[ $# -gt 0 && $1 != -* ]]; then
    logdir=$1
    [[ -d $logdir/tensorboard ]] && logdir+=/tensorboard # the runs' names alone, without a folder before them
    shift
fi
if [[ -z $(find -L "$logdir" -name .venv -prune -o -name 'events.out.tfevents.*' -print -quit 2>/dev/null) ]]; then
    echo "error: no TensorBoard log in $logdir: train with --use_tensorboard, or name the out_dir of a run that did" >&2
    exit 2
fi
own=$(dirname "$0")/../.venv/bin/python # where `make quickstart` installs it
[[ -x $own ]] || own=python
exec "${PYTHON:-$own}" -m tensorboard.main --logdir "$logdir" "$@"
