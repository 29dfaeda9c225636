# Discard and write-zeroes on a vduse-blk device reach the image, a read-only export refuses writes, a new size is seen.
# vm-seconds: 180
. /tests/functions.sh
. /tests/vduse.sh

qemu-img create -q -f qcow2 disk.qcow2 16M
truncate -s 16M disk.raw
for format in qcow2 raw; do
    echo "-- discard and write-zeroes in $format"
    daemon stord --blockdev driver=file,node-name=file,filename=disk.$format,discard=unmap \
        --blockdev driver=$format,node-name=disk,file=file,discard=unmap
    export_disk disk space ',"writable":true'
    plug space
    dd if=/dev/urandom of=data bs=1M count=16 status=none
    dd if=data of="$disk" bs=1M oflag=direct status=none
    blkdiscard -o 4M -l 4M "$disk"
    blkdiscard -z -o 10M -l 2M "$disk"
    dd if=/dev/zero of=data bs=1M seek=4 count=4 conv=notrunc status=none
    dd if=/dev/zero of=data bs=1M seek=10 count=2 conv=notrunc status=none
    # What a discarded range reads as is the device's business, but these images read as zeroes.
    cmp "$disk" data
    sync "$disk"
    qemu-img map -U -f $format --output=json disk.$format >map.json
    for range in 4:8 10:12; do
        jq -e "[.[] | select(.start < ${range#*:} * 1048576 and .start + .length > ${range%:*} * 1048576)] | length > 0 and all(.zero)" \
            map.json >/dev/null || fail "MiB $range of the image are not zeroes: $(cat map.json)"
    done
    jq -e '[.[] | select(.data)] | map(.length) | add <= 12 * 1048576' map.json >/dev/null || fail "nothing was freed: $(cat map.json)"

    echo "-- a new size"
    qmp "$monitor" block_resize "{\"node-name\":\"disk\",\"size\":$((24 << 20))}" >/dev/null
    resized() { [ "$(cat "/sys/block/${disk#/dev/}/size")" = $((24 << 11)) ]; }
    eventually 30 resized
    echo grown | dd of="$disk" bs=512 seek=$((20 << 11)) conv=sync oflag=direct status=none
    unplug space
    withdraw space

    echo "-- read-only"
    export_disk disk fixed ',"writable":false'
    plug fixed
    [ "$(blockdev --getro "$disk")" = 1 ] || fail "the device is writable"
    refuses "not permitted|ead-only" dd if=/dev/zero of="$disk" bs=4096 count=1 oflag=direct conv=notrunc
    dd if="$disk" bs=512 skip=$((20 << 11)) count=1 iflag=direct status=none | grep -aq grown
    unplug fixed
    withdraw fixed
    stop $daemon_pid
done
qemu-img check -q disk.qcow2
