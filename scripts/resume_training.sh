#!/bin/bash
# Goes on with a run where it stopped, or starts it: scripts/resume_training.sh config/quickstart.py [--knob=value ...]
if [[ $# -eq 0 ]]; then
    echo "usage: $0 config/X.py [--knob=value ...]     what the run was started with" >&2
    exit 2
fi
exec "${PYTHON:-python}" "$(dirname "$0")/../train.py" "$@" --resume=latest
