#!/bin/bash
# Whether the server of this container is healthy; without curl, which the image does not have.
set -euo pipefail

port=${KVERN_PORT:-8000}
exec 3<>"/dev/tcp/127.0.0.1/$port"
printf 'GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n' >&3
read -r status <&3
case $status in
*' 200 '*) ;;
*)
    echo "expected status 200 of /health, found ${status%$'\r'}" >&2
    exit 1
    ;;
esac
