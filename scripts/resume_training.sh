#!/bin/bash
# Goes on with a run where it stopped, or starts it: scripts/resume_training.sh config/quickstart.py [--knob=value ...]
exec "${PYTHON:-python}" "$(dirname "$0")/../train.py" "$@" --resume=latest
