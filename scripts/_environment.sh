# Sourced by the other scripts: makes .venv if missing, installs what is named, and starts at once the next time.
# Assumes bash and python3 (3.11 or newer; PYTHON=python3.12 picks another).

cd "$(dirname "${BASH_SOURCE[0]}")/.."

prepare() { # prepare EXTRA: the project with one of its extras ("" for none)
    local extra=$1 stamp=".venv/installed${1:+-$1}" wanted
    wanted=$(cat pyproject.toml constraints.txt | python3 -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())')
    if [ ! -x .venv/bin/python ]; then
        echo "making .venv"
        "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON")'
        "${PYTHON:-python3}" -m venv .venv
    fi
    local stamps=("$stamp")
    [ -n "$extra" ] || stamps=(.venv/installed*) # every extra has the project itself with it
    if ! grep -qsx "$wanted" "${stamps[@]}"; then
        echo "installing into .venv (a few minutes the first time)"
        .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".${extra:+[$extra]}"
        echo "$wanted" >"$stamp"
    fi
}
