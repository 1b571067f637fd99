#!/usr/bin/env bash
# Backs one volume up with plain tools: snapshot, copy, verify, prune.
#
#   backup.sh MOUNTPOINT VOLUME DESTINATION [KEEP]
#
# A backup is DESTINATION/VOLUME-YYYYmmddTHHMMSSZ.img: a raw image, usable without Stillframe. It
# gets that name only after it has been compared with the snapshot, so whatever ends in .img is
# whole. The newest KEEP (default 7) are kept. The snapshot is removed in the end: what protects
# against mistakes on the machine itself is a matter for another job.
#
# The copy is as if power was cut at the instant of the snapshot. Sync the writer first (fsfreeze in
# a guest, sync, or the application's own command) where that is not enough.
set -euo pipefail

if [ $# -lt 3 ]; then
    sed -n '2,5p' "$0" >&2
    exit 2
fi
mountpoint=$1
volume=$2
destination=$3
keep=${4:-7}

case $keep in
    '' | *[!0-9]* | 0) echo "backup.sh: KEEP must be a number above 0" >&2; exit 2 ;;
esac

stamp=$(date -u +%Y%m%dT%H%M%SZ)
snapshot=$mountpoint/$volume/snapshots/backup-$stamp.img
target=$destination/$volume-$stamp.img

if [ -e "$target" ]; then
    echo "backup.sh: $target exists already" >&2
    exit 5
fi

touch -- "$snapshot"
trap 'rm -f -- "$snapshot" "$target.part"' EXIT

cp --sparse=always -- "$snapshot" "$target.part"
sync -- "$target.part"
cmp -- "$snapshot" "$target.part"
mv -- "$target.part" "$target"
sync -- "$destination"

# The stamps sort like the instants; the pattern matches nothing but what this script writes.
stamped=[0-9][0-9][0-9][0-9][0-9][0-9][0-9][0-9]T[0-9][0-9][0-9][0-9][0-9][0-9]Z
old=()
for file in "$destination/$volume"-$stamped.img; do
    old+=("$file")
done
for ((i = 0; i < ${#old[@]} - keep; i++)); do
    rm -- "${old[i]}"
done

echo "$target"
