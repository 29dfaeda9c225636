# stord attach --via nbd: images as the kernel's NBD devices.
# vm-programs: sfdisk
. /tests/functions.sh

# The module is loaded by the first that needs it.
[ ! -e /sys/module/nbd ] || modprobe -r nbd
qemu-img create -q -f qcow2 disk.qcow2 256M
device=$(stord attach --via nbd --queues 4 disk.qcow2)
[[ $device = /dev/nbd* ]] || fail "no device: $device"
[ "$(blockdev --getsize64 "$device")" = $((256 << 20)) ] || fail "the size is wrong"
[ "$(stord ls --json | jq -r '.[0].device')" = "$device" ] || fail "not listed"
# The kernel uses no more queues than it has processors.
queues=$(($(nproc) < 4 ? $(nproc) : 4))
[ "$(ls "/sys/block/${device#/dev/}/mq" | wc -l)" = $queues ] || fail "not one queue for each connection"
refuses "is attached as '$device'" stord attach --via nbd disk.qcow2

echo "- many requests, verified"
fio --name=load --filename="$device" --ioengine=libaio --direct=1 --rw=randrw --bsrange=512-128k --iodepth=32 --numjobs=4 \
    --size=8M --offset_increment=32M --verify=crc32c --verify_fatal=1 --minimal >fio.log || { cat fio.log; fail "fio"; }

echo "- discards and zeroes reach the image"
dd if=/dev/urandom of="$device" bs=1M count=16 oflag=direct 2>/dev/null
blkdiscard -o 0 -l $((8 << 20)) "$device"
blkdiscard -z -o $((8 << 20)) -l $((4 << 20)) "$device"
cmp -n $((12 << 20)) "$device" /dev/zero

echo "- a file system; in use it is not detached"
mkfs.ext4 -q -b 4096 "$device"
mkdir -p mounted
mount "$device" mounted
dd if=/dev/urandom of=mounted/file bs=1M count=32 2>/dev/null
sum=$(sha256sum <mounted/file)
refuses "in use: mounted at" stord detach disk.qcow2
umount mounted
exec 5<"$device"
refuses "in use: open in process" stord detach disk.qcow2
exec 5<&-
stord detach "$device"
[ ! -e "/sys/block/${device#/dev/}/pid" ] || fail "the device is still served"
qemu-img check -q disk.qcow2
[ "$(qemu-img map --output=json disk.qcow2 | jq '[.[] | select(.data) | .length] | add')" -lt $((224 << 20)) ] ||
    fail "nothing was discarded"
device=$(stord attach --via nbd --read-only --logical-block-size 4096 disk.qcow2)
[ "$(blockdev --getro "$device")" = 1 ] || fail "not read-only"
[ "$(blockdev --getss "$device")" = 4096 ] || fail "not the block size"
mount -o ro,noload "$device" mounted
[ "$sum" = "$(sha256sum <mounted/file)" ] || fail "another content"
umount mounted
stord detach "$device"
e2fsck -fn "$(stord attach --via nbd -r disk.qcow2)"
stord detach disk.qcow2

echo "- partitions"
qemu-img create -q -f raw disk.raw 64M
printf 'label: gpt\nstart=2048, size=8192\n' | sfdisk -q disk.raw
device=$(stord attach --via nbd disk.raw)
eventually 10 test -b "${device}p1"
stord detach "$device"

echo "- a daemon that dies takes its device with it"
device=$(stord attach --via nbd --cdi disk disk.qcow2)
mkdir -p mounted
mount "$device" mounted
kill -9 "$(stord ls --json | jq '.[0].pid')"
eventually 10 sh -c "! dd if=mounted/file of=/dev/null bs=1M iflag=direct"
umount mounted
# The kernel keeps the rest of it for as long as somebody has it open.
eventually 10 test ! -e "/sys/block/${device#/dev/}/pid"
eventually 10 test ! -e /run/cdi/stord.io-disk-disk.json
stord ls | grep -q "No device"

echo "- a device that is disconnected by somebody else ends its daemon"
device=$(stord attach --via nbd disk.qcow2)
nbd-client -d "$device" >/dev/null
eventually 10 sh -c "stord ls | grep -q 'No device'"
qemu-img check -q disk.qcow2

echo "- as many as there are"
free=$(ls -d /sys/block/nbd* | wc -l)
for number in $(seq "$free"); do
    qemu-img create -q -f raw "many-$number.raw" 1M
    stord attach --via nbd "many-$number.raw" >/dev/null 2>&1
done
qemu-img create -q -f raw one-more.raw 1M
refuses "all $free NBD devices are in use" stord attach --via nbd one-more.raw
stord detach many-1.raw
stord attach --via nbd one-more.raw
for image in $(stord ls --json | jq -r '.[].image'); do stord detach "$image" >/dev/null; done

echo "- a loop device, too"
device=$(stord attach --via loop disk.qcow2)
mount "$device" mounted
[ "$sum" = "$(sha256sum <mounted/file)" ] || fail "another content"
umount mounted
stord detach "$device"
