#!/bin/sh
# The user that serves, its folder of models, and the loader's list of libraries.
set -eu

groupadd --gid 10001 kvern
useradd --uid 10001 --gid 10001 --home-dir /models --no-create-home --shell /usr/sbin/nologin kvern
install -d -o kvern -g kvern -m 0755 /models
ldconfig
