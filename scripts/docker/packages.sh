#!/bin/sh
# What the builder needs beside Rust and a C compiler: Python with virtual environments, for the kernels' compiler.
set -eu

apt-get update
apt-get install --yes --no-install-recommends python3 python3-venv
rm -rf /var/lib/apt/lists/*
