#!/bin/bash
# Sends a study to a real Slurm and disturbs it: preemption, scontrol requeue, the signal before a time limit, kill -9,
# and another study on the same folder. Every run must end with the bits of an undisturbed one. It takes ten minutes.
#
# $ apt-get install slurm-wlm munge       # Debian's; as root, on a machine that has no Slurm of its own
# $ PYTHON=.venv/bin/python tests/slurm.sh       # EPOCHS=60 on a slow machine
#
# It brings Slurm up on this machine, with eight cards in place of GPUs, which are terminals, to see that no two tasks get
# the same one.
set -eu
reference=
PYTHON=$(command -v "${PYTHON:-python}")
root=$(cd "$(dirname "$0")/.." && pwd)
epochs=${EPOCHS:-400} # of 20 steps: enough for a run to be at its middle when it is disturbed
work=$(mktemp -d)
host=$(hostname)
export SLURM_CONF=$work/slurm.conf
say() { echo "$(date +%T) $*"; }
fail() { say "FAILED: $*"; exit 1; }

cat > "$SLURM_CONF" <<CONF
ClusterName=test
SlurmctldHost=$host
SlurmUser=root
AuthType=auth/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=card
StateSaveLocation=$work/state
SlurmdSpoolDir=$work/spool
SlurmctldPidFile=$work/slurmctld.pid
SlurmdPidFile=$work/slurmd.pid
SlurmdParameters=config_overrides
ReturnToService=2
MpiDefault=none
KillWait=15
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=$host CPUs=8 Gres=card:8 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=9
CONF
echo "NodeName=$host Name=card File=/dev/tty[0-7]" > "$work/gres.conf"
mkdir "$work/state" "$work/spool"

stop() {
    scancel --user=root 2> /dev/null || true
    pkill -P "${reference:-none},${beside:-none}" 2> /dev/null || true # their studies
    for _ in $(seq 30); do
        [ -n "$(squeue -h 2> /dev/null)" ] || break
        sleep 1
    done
    for name in slurmd slurmctld; do # their pid files
        kill "$(cat "$work/$name.pid")" 2> /dev/null || true
    done
    [ -z "${munged:-}" ] || kill "$munged" 2> /dev/null || true
    say "logs are in $work"
}
trap stop EXIT
if ! munge -n > /dev/null 2>&1; then
    install -d -o munge -g munge /run/munge
    su -s /bin/bash munge -c /usr/sbin/munged
    munged=$(pgrep -n -u munge munged)
fi
slurmctld -D > "$work/slurmctld.log" 2>&1 &
slurmd -D > "$work/slurmd.log" 2>&1 &
for _ in $(seq 30); do
    sinfo -h -o %T 2> /dev/null | grep -q idle && break
    sleep 1
done
sinfo

# -----------------------------------------------------------------------------
cd "$work"
study() {
    "$PYTHON" "$root/study.py" --heads=baseline,cosine --seeds=1,2 --settings="--epochs=$epochs --patience=0 --plots=false" "$@"
}
send() { study --out_dir=out --launcher=submitit --slurm="time=30 cpus_per_task=1 gres=card:1"; }
in_queue() { squeue -h -r -o "%i %t %r" | sort; }
wait_for() { # a command that is true, within ten minutes: Slurm itself waits two before it starts a task again
    for _ in $(seq 600); do
        if eval "$1" > /dev/null; then return; fi
        sleep 1
    done
    in_queue
    fail "waited for: $1"
}
array() { sed -n 's/^sent to the array \([0-9]*\).*/\1/p' "$1"; }
runs="baseline_s1 cosine_stable_s1 baseline_s2 cosine_stable_s2" # the tasks 0 to 3
step() { tail -n1 "out/$1/metrics.jsonl" | sed 's/.*"step": \([0-9]*\).*/\1/'; }
all_train() { for name in $runs; do [ -s "out/$name/ckpt.pt" ] && [ "$(step "$name")" -ge "$1" ] || return 1; done; }
where() { for name in $runs; do echo "  $name: step $(step "$name")"; done; }

say "an undisturbed study beside it, to compare with"
study --out_dir=reference --jobs=2 > reference.log 2>&1 &
reference=$!

send | tee sent.log
id=$(array sent.log)
wait_for "all_train 40"
where
say "four tasks, their cards:"
scontrol show job -d "$id" | grep -o 'IDX:[0-7]' | sort | tee gpus.log
[ "$(sort -u gpus.log | wc -l)" = 4 ] || fail "two tasks have one card"

say "meanwhile a study without Slurm on the same folder: who comes first to a run makes it"
study --heads=cosine --seeds=2 --out_dir=out --jobs=1 > beside.log 2>&1 &
beside=$!

say "preempted, all four: a job of a partition with a higher priority wants the node"
sbatch --partition=urgent --exclusive --output=/dev/null --wrap "sleep 20" 
wait_for "in_queue | grep -c '${id}_.* PD' | grep -q 4"
say "stopped at:"; where; in_queue
all_train 0 || fail "a run has no checkpoint"

wait_for "in_queue | grep -c '${id}_[012] R ' | grep -q 3"
wait_for "all_train $((20 * epochs / 3))"
say "task 0: scontrol requeue"; where
scontrol requeue "${id}_0"
say "task 1: the signal before a time limit"
scancel --signal=URG "${id}_1"
say "task 2: kill -9 of all its processes"
scontrol listpids "$(squeue -h --job="${id}_2" -o %A)" | awk '$3 == 0 {print $1}' | xargs -t kill -9
say "and the same array once more, beside the first one"
send | tee again.log
wait_for "[ -z \"\$(in_queue)\" ]"
where
send | tee last.log # for what was killed, if the second array has not made it
[ -z "$(array last.log)" ] || wait_for "[ -z \"\$(in_queue)\" ]"
study --out_dir=out | tail -n 2

say "each run, beside the undisturbed one"
wait $reference || fail "$(cat reference.log)"
wait $beside || fail "$(cat beside.log)"
grep -hE "left alone|have ended" beside.log
for name in $runs; do
    "$PYTHON" - "$name" <<'CHECK' || fail "$name differs"
import json, sys
name, found = sys.argv[1], []
for folder in ("reference", "out"):
    with open(f"{folder}/{name}/metrics.jsonl") as f:
        evals = [row for row in map(json.loads, f) if row["kind"] == "eval"]
    with open(f"{folder}/{name}/summary.json") as f:
        summary = json.load(f)
    found.append(([(row["step"], row["val_loss"]) for row in evals], summary["step"], summary["test_loss"]))
with open(f"out/{name}/log.txt") as f:
    log = f.read()
begun, saved, killed = log.count(" steps of "), log.count("stopped by SIGTERM after"), name == "baseline_s2"
print(f"  {name}: begun {begun} times, saved and stopped {saved} times; {len(found[1][0])} evaluations, step "
      f"{found[1][1]}, test loss {found[1][2]}, equal: {found[0] == found[1]}")
sys.exit(found[0] != found[1] or begun != 1 + saved + killed)
CHECK
done
say "nothing lost, nothing doubled"
