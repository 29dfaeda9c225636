# stord attach, by VDUSE: images as virtio disks; a daemon that dies is replaced.
. /tests/functions.sh

# The modules are loaded by the first that needs them.
qemu-img create -q -f qcow2 disk.qcow2 256M
device=$(stord attach --serial my-disk --queues 2 --cdi disk disk.qcow2)
[[ $device = /dev/vd* ]] || fail "no device: $device"
name=${device#/dev/}
[ "$(blockdev --getsize64 "$device")" = $((256 << 20)) ] || fail "the size is wrong"
[ "$(cat "/sys/block/$name/serial")" = my-disk ] || fail "not its serial number"
# The kernel uses no more queues than it has processors.
[ "$(ls "/sys/block/$name/mq" | wc -l)" = $(($(nproc) < 2 ? 1 : 2)) ] || fail "not its queues"
[ "$(stord ls --json | jq -r '.[0] | .device, .via, .serial' | xargs)" = "$device vduse my-disk" ] || fail "not listed"
grep -q "\"$device\"" /run/cdi/stord.io-disk-disk.json
refuses "is attached as '$device'" stord attach disk.qcow2
refuses "is attached as" stord mount disk.qcow2

echo "- a file system; in use it is not detached"
mkfs.ext4 -q -b 4096 "$device"
mkdir mounted
mount "$device" mounted
dd if=/dev/urandom of=mounted/file bs=1M count=32 2>/dev/null
sum=$(sha256sum <mounted/file)
refuses "in use: mounted at" stord detach disk.qcow2
stord ls

echo "- a daemon that is killed under a verifying load is replaced"
fio --name=load --filename=mounted/load --ioengine=libaio --direct=1 --rw=randwrite --bs=4k --iodepth=16 --size=16M --verify=crc32c \
    --verify_fatal=1 --loops=2 --minimal >fio.log 2>&1 &
load=$!
for round in 1 2 3; do
    before=$(awk '{print $7}' "/sys/block/$name/stat")
    eventually 30 sh -c "[ \$(awk '{print \$7}' /sys/block/$name/stat) -gt $((before + 500)) ]"
    kill -9 "$(stord ls --json | jq '.[0].pid')"
    eventually 10 sh -c "stord ls | grep -q dead"
    refuses "its users wait" stord detach disk.qcow2
    [ "$(stord attach --serial my-disk --queues 2 --cdi disk disk.qcow2)" = "$device" ] || fail "not the same device"
done
wait $load || { cat fio.log; fail "the load saw the deaths"; }
[ "$sum" = "$(sha256sum <mounted/file)" ] || fail "another content"
[ "$(stord ls --json | jq length)" = 1 ] || fail "the dead are still listed"

echo "- told to end, it waits for its users"
kill "$(stord ls --json | jq '.[0].pid')"
echo more >mounted/more
umount mounted
eventually 20 sh -c "stord ls | grep -q 'No device'"
[ ! -e "/sys/block/$name" ] || fail "the device is still there"
[ ! -e /run/cdi/stord.io-disk-disk.json ] || fail "containers still find it"
qemu-img check -q disk.qcow2

echo "- again, read-only, with large blocks"
device=$(stord attach --read-only --logical-block-size 4096 disk.qcow2)
[ "$(blockdev --getro "$device")" = 1 ] || fail "not read-only"
[ "$(blockdev --getss "$device")" = 4096 ] || fail "not the block size"
[ "$(cat "/sys/block/${device#/dev/}/serial" | wc -c)" -ge 20 ] || fail "no serial number"
mount -o ro,noload "$device" mounted
[ "$(cat mounted/more)" = more ] || fail "another content"
refuses "in use" stord detach disk.qcow2
stord detach --force disk.qcow2
umount mounted
stord ls | grep -q "No device"
[ ! -e "/sys/block/${device#/dev/}" ] || fail "the device is still there"
