#!/usr/bin/env bash
# Installs what tests/cluster needs and pip does not have; without it those tests skip and say so.
set -euo pipefail
packages=(iproute2 openssh-client openssh-server pdsh munge slurmctld slurmd slurm-client slurm-wlm-basic-plugins
  openmpi-bin libfaketime procps util-linux)
missing=()
for package in "${packages[@]}"; do
  dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q "ok installed" || missing+=("$package")
done
[ ${#missing[@]} = 0 ] && exit 0
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
  echo "tests/cluster will skip without ${missing[*]}: only root can install them, with apt-get" >&2
  exit 1
fi
# Their services (an sshd on every interface, among others) must not be started: the tests start their own.
policy=/usr/sbin/policy-rc.d
if [ ! -e $policy ]; then
  printf '#!/bin/sh\nexit 101\n' >$policy
  chmod 755 $policy
  trap 'rm -f $policy' EXIT
fi
export DEBIAN_FRONTEND=noninteractive
bounded=(-qq -o Acquire::Retries=1 -o Acquire::http::Timeout=20 -o DPkg::Lock::Timeout=60)
timeout 120 apt-get "${bounded[@]}" update
timeout 300 apt-get "${bounded[@]}" install -y --no-install-recommends "${missing[@]}" >/dev/null
