#!/bin/sh
# Makes a base image for `make image` from Debian's packages, where no registry can be reached. Needs root, debootstrap
# and Docker:   tests/container/base.sh && make image DOCKER_BUILD="--network host --build-arg BASE=local/python:bookworm"
# This machine's certificate authorities go in, so that a build behind a proxy trusts it.
set -eu
tag=${1:-local/python:bookworm}
root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT
debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates bookworm "$root" >&2
cp /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/ca-certificates.crt"
rm -rf "$root"/var/cache/apt/archives/*.deb "$root"/var/lib/apt/lists/*
tar -C "$root" --exclude='./proc/*' --exclude='./sys/*' -c . |
  docker import -c 'ENV SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt' - "$tag"
