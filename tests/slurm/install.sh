#!/bin/bash
# Slurm and munge from Debian's packages, where they are missing and can be installed. Never fails:
# the tests skip without them, and say why.

set -uo pipefail

reason=
if PATH="$PATH:/usr/sbin:/sbin" command -v slurmctld slurmd munged > /dev/null; then
    exit 0
elif ! command -v apt-get > /dev/null; then
    reason="there is no apt-get"
elif ((EUID != 0)); then
    reason="only root can install packages"
else
    export DEBIAN_FRONTEND=noninteractive
    # Installing must not start the distribution's own daemons: the tests run theirs.
    export RUNLEVEL=1
    if ! (apt-get update && apt-get install -y --no-install-recommends slurm-wlm munge) > /dev/null; then
        reason="apt-get could not install slurm-wlm and munge"
    fi
fi
if [[ -n $reason ]]; then
    echo "Slurm was not installed: $reason" >&2
fi
exit 0
