#!/bin/bash
# A real SLURM on this machine: four virtual nodes, one controller. As root, with Debian's slurm-wlm and munge.
#
#   cluster.sh start DIR    configuration, state and logs in DIR; prints the line that points commands at it
#   cluster.sh stop DIR     ends every job, and every daemon that start started
set -euo pipefail
action=$1 folder=$(realpath -m "$2")
nodes=(n1 n2 n3 n4)
conf=$folder/slurm.conf

start() {
    mkdir -p "$folder"/{state,munge} "${nodes[@]/#/$folder/spool/}"
    chmod 755 "$folder"
    if [[ ! -s $folder/munge/key ]]; then
        dd if=/dev/urandom of="$folder/munge/key" bs=1024 count=1 status=none
        chmod 400 "$folder/munge/key"
    fi
    chmod 700 "$folder/munge"
    munged --force --key-file="$folder/munge/key" --socket="$folder/munge.socket" --pid-file="$folder/munged.pid" \
        --log-file="$folder/munge/log" --seed-file="$folder/munge/seed"
    local cpus memory
    cpus=$(nproc)
    memory=$(($(awk '/MemTotal/ {print $2}' /proc/meminfo) / 1024 - 512))
    cat >"$conf" <<CONF
ClusterName=twonodes
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmctldPort=${SLURM_TEST_PORT:-26817}
AuthType=auth/munge
AuthInfo=socket=$folder/munge.socket,cred_expire=30
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool/%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd_%n.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd_%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/affinity
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
MpiDefault=none
ReturnToService=2
KillWait=20
MinJobAge=600
OverTimeLimit=0
SlurmctldParameters=enable_configless
MessageTimeout=60
PartitionName=main Nodes=n[1-4] Default=YES MaxTime=INFINITE OverSubscribe=NO State=UP
CONF
    local port=${SLURM_TEST_PORT:-26817}
    for node in "${nodes[@]}"; do
        echo "NodeName=$node NodeHostname=$(hostname -s) NodeAddr=127.0.0.1 Port=$((port + 10 + ${node#n})) CPUs=$cpus" \
            "RealMemory=$memory" >>"$conf"
    done
    slurmctld -f "$conf"
    for node in "${nodes[@]}"; do slurmd -f "$conf" -N "$node"; done
    export SLURM_CONF=$conf
    for _ in $(seq 60); do
        [[ $(sinfo --noheader --format=%t 2>/dev/null | sort -u) == idle ]] && break
        sleep 0.5
    done
    sinfo >&2
    echo "SLURM_CONF=$conf"
}

stop() {
    # A failed test's jobs first: what they run outlives the daemons.
    if SLURM_CONF=$conf scancel --quiet --user=root 2>/dev/null; then
        for _ in $(seq 120); do
            [[ -z $(SLURM_CONF=$conf squeue --noheader 2>/dev/null) ]] && break
            sleep 0.5
        done
    fi
    local pids=()
    for name in "${nodes[@]/#/slurmd_}" slurmctld munged; do
        [[ -s $folder/$name.pid ]] && pids+=("$(cat "$folder/$name.pid")")
    done
    for pid in "${pids[@]}"; do kill -TERM "$pid" 2>/dev/null || true; done
    for pid in "${pids[@]}"; do
        for _ in $(seq 40); do
            # A daemon whose parent does not collect it stays a zombie.
            [[ $(ps -o stat= -p "$pid" || true) =~ ^[^Z] ]] || break
            sleep 0.25
        done
    done
}

"$action"
