#!/usr/bin/env bash
# Makes the secrets of docker-compose.yml that are missing, in deploy/secrets; keeps those that are there.
#
# Containers read them as users of their own, who are not you: the files are open, and the folder is closed
# to everybody but you.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
mkdir -p secrets
chmod 700 secrets
for name in admin_token registry_password grafana_password; do
    file=secrets/$name
    if [[ -s $file ]]; then
        printf 'kept  deploy/%s\n' "$file"
        continue
    fi
    (umask 022 && od -An -N32 -tx1 /dev/urandom | tr -d ' \n' >"$file")
    printf 'made  deploy/%s\n' "$file"
done
