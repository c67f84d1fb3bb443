"""A real SLURM on this machine, in a folder of its own: munged, mariadbd, slurmdbd, slurmctld and slurmd.

One node with two pretended GPUs. All ports, sockets, states and logs are private, so that neither a SLURM that runs
here already nor a second copy of these tests is in the way.
"""

import os
import shutil
import signal
import socket
import subprocess
import tempfile
from pathlib import Path

from brakes import wait_until

PROGRAMS = {
    "munged": "munge",
    "slurmctld": "slurm-wlm",
    "slurmd": "slurm-wlm",
    "slurmdbd": "slurmdbd",
    "mariadbd": "mariadb-server",
    "mariadb-install-db": "mariadb-server",
    "setpriv": "util-linux",
}
# Debian keeps daemons in sbin, which may be missing from a user's PATH
PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
ACCOUNT, PARTITION, N_GPUS = "lab", "work", 2
COMMAND_S = 30

SLURM_CONF = """
ClusterName=segtrust
SlurmctldHost={node}(127.0.0.1)
SlurmctldPort={slurmctld}
SlurmdPort={slurmd}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
MpiDefault=none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
GresTypes=gpu
ReturnToService=2
# the node claims more processors than the machine may have
SlurmdParameters=config_overrides
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=1
JobAcctGatherParams=OverMemoryKill
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={slurmdbd}
# with slurmdbd and munge, the "password" is the socket of munge
AccountingStoragePass={folder}/munge.socket
AccountingStorageTRES=gres/gpu
AccountingStoreFlags=job_comment
KillWait=5
TaskProlog={folder}/bin/record
MinJobAge=300
NodeName={node} NodeAddr=127.0.0.1 CPUs=4 RealMemory=64000 Gres=gpu:{n_gpus}
PartitionName={partition} Nodes={node} Default=YES MaxTime=INFINITE State=UP
"""

GRES_CONF = """
NodeName={node} Name=gpu File=/dev/null
NodeName={node} Name=gpu File=/dev/zero
"""

SLURMDBD_CONF = """
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort={slurmdbd}
SlurmUser=root
LogFile={folder}/slurmdbd.log
PidFile={folder}/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={mariadbd}
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm
"""

DATABASE = """
CREATE DATABASE slurm;
CREATE USER 'slurm'@'127.0.0.1' IDENTIFIED BY 'slurm';
CREATE USER 'slurm'@'localhost' IDENTIFIED BY 'slurm';
GRANT ALL ON slurm.* TO 'slurm'@'127.0.0.1', 'slurm'@'localhost';
"""


def why_not():
    """Return why no cluster can be started here, or an empty text."""
    if os.geteuid() != 0:
        return "a SLURM of one's own needs root"
    missing = sorted({package for program, package in PROGRAMS.items() if not shutil.which(program, path=PATH)})
    return f"SLURM is not installed; on Debian: apt-get install {' '.join(missing)}" if missing else ""


def processes_with(text):
    """Return {process id: command line} of all processes whose environment or command line has a text."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            environment = (folder / "environ").read_bytes().decode(errors="replace")
            zombie = (folder / "stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
        except OSError:  # it has ended meanwhile
            continue
        if text in command + environment and not zombie and int(folder.name) != os.getpid():
            found[int(folder.name)] = command
    return found


class Cluster:
    """A SLURM that runs between `start` and `stop`.

    environment : what a process needs to talk to it
    """

    def __init__(self):
        self.folder = Path(tempfile.mkdtemp(prefix="segtrust-slurm-"))
        self.folder.chmod(0o711)  # munged wants a socket that all can reach
        self.node = socket.gethostname().split(".")[0]
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))},
            "PATH": f"{self.folder}/bin:{PATH}",
            "SLURM_CONF": str(self.folder / "slurm.conf"),
        }
        self._daemons = []

    def start(self):
        self._write_settings()
        self._start_munge()
        self._start_database()
        self._daemon("slurmdbd", "-D")
        self._until(["sacctmgr", "-n", "list", "cluster"], "slurmdbd answers")
        self("sacctmgr", "-i", "add", "cluster", "segtrust")
        self._daemon("slurmctld", "-D")
        self._until(["scontrol", "ping"], "slurmctld answers", says="UP")
        self._daemon("slurmd", "-D", "-N", self.node)
        self("sacctmgr", "-i", "add", "account", ACCOUNT)
        self("sacctmgr", "-i", "add", "user", "root", f"account={ACCOUNT}")
        self._until(["sinfo", "-h", "-o", "%T"], "the node is idle", says="idle")

    def stop(self):
        """End all jobs and daemons, remove the folder; AssertionError naming what still runs."""
        if any(daemon.args[3] == "slurmd" for daemon in self._daemons):
            subprocess.run(["scancel", "--full", "--user=root"], env=self.environment, timeout=COMMAND_S, check=False)
        for daemon in reversed(self._daemons):
            daemon.terminate()
            try:
                daemon.wait(timeout=20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait(timeout=20)
        try:
            wait_until(lambda: not self.processes(), "the end of all processes of the cluster", timeout_s=20)
        except AssertionError:
            left = self.processes()
            for process in left:
                os.kill(process, signal.SIGKILL)
            raise AssertionError(f"still running after the cluster's end (now killed): {left}") from None
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)

    def processes(self):
        """Return {process id: command line} of all that belongs to this cluster: daemons, steps, jobs."""
        return processes_with(str(self.folder))

    def __call__(self, *command, timeout_s=COMMAND_S):
        """Run a command of SLURM and return what it says; AssertionError with its words where it fails."""
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=timeout_s, check=False
        )
        assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
        return done.stdout

    def queue(self):
        """Return [{id, state, reason, comment}] of the jobs that wait or run."""
        lines = self("squeue", "-h", "-o", "%i|%T|%r|%k").splitlines()
        return [dict(zip(("id", "state", "reason", "comment"), line.split("|", 3), strict=True)) for line in lines]

    def accounted(self, run_id):
        """Return [{field: text}] of all jobs of one Snakemake run, in the order of their ids."""
        fields = ("JobIDRaw", "Comment", "State", "ReqMem", "AllocTRES", "Start", "End")
        listed = self("sacct", "-X", "-n", "-P", f"--name={run_id}", f"--format={','.join(fields)}")
        jobs = [dict(zip(fields, line.split("|"), strict=True)) for line in listed.splitlines()]
        return sorted(jobs, key=lambda job: int(job["JobIDRaw"]))

    def devices(self):
        """Return {job id: what CUDA_VISIBLE_DEVICES was in it}, an empty text where it was not set."""
        lines = (self.folder / "devices").read_text().splitlines()
        return dict(line.split("|") for line in lines)

    def _write_settings(self):
        values = {
            **{name: _free_port() for name in ("slurmctld", "slurmd", "slurmdbd", "mariadbd")},
            **{"folder": self.folder, "node": self.node, "partition": PARTITION, "n_gpus": N_GPUS},
        }
        self._database_port = values["mariadbd"]
        for name, text in (("slurm", SLURM_CONF), ("gres", GRES_CONF), ("slurmdbd", SLURMDBD_CONF)):
            path = self.folder / f"{name}.conf"
            path.write_text(text.format(**values))
            path.chmod(0o600)  # slurmdbd refuses a password that others could read
        for name in ("state", "spool", "bin"):
            (self.folder / name).mkdir()
        # every step of a job writes down which GPUs it sees
        record = self.folder / "bin" / "record"
        record.write_text(f'#!/bin/sh\necho "$SLURM_JOB_ID|$CUDA_VISIBLE_DEVICES" >> {self.folder}/devices\n')
        record.chmod(0o755)
        # snakemake-executor-plugin-slurm-jobstep takes SLURM_CONF from the environment of the srun that it starts
        srun = self.folder / "bin" / "srun"
        srun.write_text(f'#!/bin/sh\nSLURM_CONF={self.folder}/slurm.conf exec {shutil.which("srun", path=PATH)} "$@"\n')
        srun.chmod(0o755)

    def _start_munge(self):
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        names = {"socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        files = [f"--{option}={self.folder}/munge.{ending}" for option, ending in names.items()]
        self._daemon("munged", "--foreground", f"--key-file={key}", *files)
        self._until(["munge", "-n", "-S", f"{self.folder}/munge.socket"], "munged answers")

    def _start_database(self):
        place = ["--no-defaults", f"--datadir={self.folder}/database", "--user=root"]
        self("mariadb-install-db", *place, "--auth-root-authentication-method=normal", "--skip-test-db", timeout_s=120)
        socket_file = f"{self.folder}/database.socket"
        network = ["--bind-address=127.0.0.1", f"--port={self._database_port}", f"--socket={socket_file}"]
        # the safety of the database is nobody's concern here, its start is
        small = ["--innodb-buffer-pool-size=64M", "--innodb-flush-log-at-trx-commit=0", "--innodb-doublewrite=0"]
        files = [f"--pid-file={self.folder}/database.pid"]
        self._daemon("mariadbd", *place, *network, *small, *files)
        client = ["mariadb", "--no-defaults", f"--socket={socket_file}", "--user=root", "-e"]
        self._until([*client, "SELECT 1"], "mariadbd answers")
        self(*client, DATABASE)

    def _daemon(self, name, *arguments):
        # it ends with these tests, even where they are killed
        command = ["setpriv", "--pdeathsig", "TERM", name, *arguments]
        with open(self.folder / f"{name}.out", "wb") as output:
            daemon = subprocess.Popen(
                command, env=self.environment, stdout=output, stderr=output, stdin=subprocess.DEVNULL,
                start_new_session=True, cwd=self.folder,
            )  # fmt: skip
        self._daemons.append(daemon)

    def _until(self, command, what, says=""):
        def answered():
            for daemon in self._daemons:
                assert daemon.poll() is None, f"{daemon.args[3]} has ended:\n{self._last_words(daemon.args[3])}"
            try:
                done = subprocess.run(
                    command, env=self.environment, capture_output=True, text=True, timeout=COMMAND_S, check=False
                )
            except subprocess.TimeoutExpired:
                return False
            return done.returncode == 0 and says in done.stdout

        wait_until(answered, what)

    def _last_words(self, name):
        files = [self.folder / f"{name}.out", self.folder / f"{name}.log"]
        return "\n".join(path.read_text(errors="replace")[-2000:] for path in files if path.is_file())


def _free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
