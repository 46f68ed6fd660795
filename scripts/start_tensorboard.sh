#!/bin/bash
# Shows the runs of an out_dir (all of out*/ without one) in a browser: scripts/start_tensorboard.sh [OUT_DIR] [tensorboard's options]
exec "${PYTHON:-python}" -m tensorboard.main --logdir "${1:-.}" "${@:2}"
