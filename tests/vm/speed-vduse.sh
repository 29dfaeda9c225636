# Not a test: 4 KiB requests on vduse-blk devices of stord and of qemu-storage-daemon in turns, with the ratio and the processor time.
# vm-seconds: 1500
. /tests/functions.sh
. /tests/vduse.sh
rounds=3
seconds=2

truncate -s 64M stord.raw
dd if=/dev/urandom of=stord.raw bs=1M count=64 conv=notrunc status=none
cp stord.raw qemu.raw
qemu-img convert -O qcow2 stord.raw stord.qcow2
cp stord.qcow2 qemu.qcow2

serve() { # WHO PROGRAM BACKEND QUEUES: sets disk_WHO and pid_WHO
    local blockdevs
    case $3 in
        null) blockdevs=(--blockdev driver=null-co,node-name=disk,size=67108864) ;;
        *) blockdevs=(--blockdev "driver=file,node-name=file,filename=$1.$3,aio=io_uring" --blockdev "driver=$3,node-name=disk,file=file") ;;
    esac
    daemon "$2" "${blockdevs[@]}" \
        --export "type=vduse-blk,id=export,node-name=disk,name=$1,writable=on,num-queues=$4"
    plug "$1"
    eval "disk_$1=$disk pid_$1=$daemon_pid"
}
ticks() { awk '{ sub(/.*\) /, ""); print $12 + $13 }' "/proc/$1/stat"; } # PID: hundredths of a second

measure() { # WHO CASE RW DEPTH JOBS
    local disk pid before requests
    eval "disk=\$disk_$1 pid=\$pid_$1"
    before=$(ticks "$pid")
    requests=$(fio --name=speed --filename="$disk" --direct=1 --ioengine=libaio --rw="$3" --bs=4k --iodepth="$4" --numjobs="$5" \
        --time_based --runtime=$seconds --randrepeat=0 --norandommap --group_reporting --output-format=json |
        jq '.jobs[0] | .read.total_ios + .write.total_ios')
    echo "$2 $1 $((requests / seconds)) $((($(ticks "$pid") - before) * 10000 / (requests + 1)))" >>figures
}

median() { # CASE WHO COLUMN
    awk -v name="$1" -v who="$2" -v column="$3" '$1 == name && $2 == who { print $column }' figures | sort -n | sed -n "$(((rounds + 1) / 2))p"
}

printf '%-28s %9s %9s %6s   %s\n' case QSD stord ratio "daemon's processor time per request, µs: QSD, stord"
for backend in null raw qcow2; do
    for queues in 1 2; do
        serve qemu qemu-storage-daemon $backend $queues
        serve stord stord $backend $queues
        # Depth 1 and 32 by one job on one queue; 32 by four on two.
        if [ $queues = 1 ]; then shapes="1x1 32x1"; else shapes="32x4"; fi
        for shape in $shapes; do
            for rw in randread randwrite; do
                name=$backend.$rw.depth${shape%x*}.jobs${shape#*x}.queues$queues
                for ((round = 0; round < rounds; round++)); do
                    for who in qemu stord; do
                        measure $who $name $rw "${shape%x*}" "${shape#*x}"
                    done
                done
                old=$(median $name qemu 3) new=$(median $name stord 3)
                printf '%-40s %7s %7s %6s   %s %s\n' "$name" "$old" "$new" "$(awk "BEGIN { printf \"%.2f\", $new / $old }")" \
                    "$(median $name qemu 4)" "$(median $name stord 4)"
            done
        done
        for who in qemu stord; do
            unplug $who
            eval "pid=\$pid_$who"
            stop "$pid"
        done
    done
done
