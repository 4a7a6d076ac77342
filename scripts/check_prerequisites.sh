#!/bin/sh
# Names what this machine lacks for `make`, with the Debian and Ubuntu package that brings it.
# usage: check_prerequisites.sh PYTHON

python=${1:-python3}
missing=""

need() { # need WHAT PACKAGE
    echo "missing: $1 (install: apt-get install $2)" >&2
    missing="$missing $2"
}

if ! command -v "$python" >/dev/null 2>&1; then
    need "$python, version 3.11 or later" python3
elif ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    need "Python 3.11 or later ($python is $("$python" -V 2>&1))" python3.11
else
    "$python" -c 'import venv, ensurepip' >/dev/null 2>&1 || need "Python's venv and ensurepip" python3-venv
    # torch.compile and Triton compile small C programs against Python's headers.
    "$python" - <<'EOF' || need "Python's C headers (Python.h)" python3-dev
import os, sys, sysconfig
sys.exit(not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")))
EOF
fi
command -v c++ >/dev/null 2>&1 || command -v g++ >/dev/null 2>&1 || command -v clang++ >/dev/null 2>&1 ||
    need "a C++ compiler" g++
command -v cc >/dev/null 2>&1 || command -v gcc >/dev/null 2>&1 || command -v clang >/dev/null 2>&1 ||
    need "a C compiler" gcc

if [ -n "$missing" ]; then
    echo "Install what is missing and run make again:  sudo apt-get install$missing" >&2
    exit 1
fi
