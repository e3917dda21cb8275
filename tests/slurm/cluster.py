"""A Slurm of one's own on this machine: real daemons, all of their state in one temporary folder.

Two nodes of the cluster are two `slurmd` on this host. Root only; nothing outside the folder is
written, and nothing runs on after `Cluster.stop`.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import psutil

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
NODES = ("node1", "node2")
CREDENTIAL_S = 20
"""Life of a job's credential, and so how long a requeued job waits (Slurm's default: 120)."""

PATIENCE_S = 1200.0
"""Longest wait for a job; on two idle cores the longest takes two minutes."""
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")

CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmctldPort={controller_port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire={credential}
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
MpiDefault=none
ReturnToService=2
KillWait=120
MinJobAge=3600
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port={port1} CPUs=4 RealMemory=64000
NodeName=node2 NodeHostname={host} NodeAddr=127.0.0.1 Port={port2} CPUs=4 RealMemory=64000
PartitionName=all Nodes=node1,node2 Default=YES MaxTime=INFINITE State=UP OverSubscribe=YES:8
"""


def obstacle() -> str | None:
    """Why no cluster can be started here; None when it can."""
    if missing := [program for program in PROGRAMS if shutil.which(program, path=_path()) is None]:
        return f"{', '.join(missing)} not installed (tests/slurm/install.sh does)"
    if os.geteuid() != 0:
        return "starting Slurm's daemons takes root"
    return None


class Cluster:
    """Started by `start`; its commands find it by the environment that they are given."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {
            **os.environ,
            "PATH": _path(),
            "SLURM_CONF": str(folder / "slurm.conf"),
        }
        self._daemons: list[subprocess.Popen] = []

    def start(self) -> None:
        host = socket.gethostname().split(".")[0]
        ports = _free_ports(3)
        (self.folder / "state").mkdir()
        for node in NODES:
            (self.folder / f"spool-{node}").mkdir()
        (self.folder / "cgroup.conf").write_text("CgroupAutomount=no\n")
        (self.folder / "slurm.conf").write_text(
            CONFIG.format(
                folder=self.folder,
                host=host,
                credential=CREDENTIAL_S,
                controller_port=ports[0],
                port1=ports[1],
                port2=ports[2],
            )
        )
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        self._run_daemon(
            *("munged", "--foreground", "--force", f"--socket={self.folder}/munge.socket"),
            *(f"--key-file={key}", f"--pid-file={self.folder}/munged.pid"),
            *(f"--log-file={self.folder}/munged.log", f"--seed-file={self.folder}/munged.seed"),
        )
        self._wait("munged", (self.folder / "munge.socket").exists)
        self._run_daemon("slurmctld", "-D")
        for node in NODES:
            self._run_daemon("slurmd", "-D", "-N", node)
        self._wait("all nodes idle", lambda: self.command("sinfo", "-h", "-o", "%T %D") == "idle 2")

    def stop(self) -> None:
        """Cancels every job, and ends every process that the cluster has started."""
        try:
            if jobs := self._jobs():
                self.command("scancel", *jobs, check=False)
                self._wait("the jobs' end", lambda: not self._jobs())
        finally:
            for daemon in reversed(self._daemons):
                daemon.terminate()
            psutil.wait_procs(self._processes(), timeout=30)
            for process in self._processes():  # whatever would not go by itself
                process.kill()
            for daemon in self._daemons:
                daemon.wait()
            self._daemons = []

    def _processes(self) -> list[psutil.Process]:
        """Daemons, steps and what runs in them: all inherit where the configuration is."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get("SLURM_CONF") == self.environment["SLURM_CONF"]:
                    found.append(process)
        return found

    def command(self, *arguments: str, check: bool = True, **environment: str) -> str:
        """What a command of Slurm prints."""
        done = subprocess.run(
            arguments,
            env={**self.environment, **environment},
            capture_output=True,
            text=True,
            timeout=60,
        )
        if check and done.returncode:
            raise AssertionError(f"{' '.join(arguments)}: {done.stderr}")
        return done.stdout.strip()

    def submit(self, folder: Path, *arguments: object, **environment: str) -> str:
        """`sbatch arguments` from a folder; the number of the job."""
        done = subprocess.run(
            ["sbatch", "--parsable", *map(str, arguments)],
            env={**self.environment, **environment},
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def job(self, number: str) -> Mapping[str, str]:
        """The fields of `scontrol show job`."""
        text = self.command("scontrol", "--oneliner", "show", "job", number)
        return dict(re.findall(r"(\S+?)=(\S*)", text))

    def wait(self, number: str, reached: Callable[[], bool], timeout_s: float = PATIENCE_S) -> None:
        """Until something is reached while a job goes on."""

        def going_on() -> bool:
            state = self.job(number)["JobState"]
            assert reached() or state not in ENDED, f"job {number} ended before: {state}"
            return reached()

        self._wait(f"job {number}", going_on, timeout_s)

    def finish(self, number: str, timeout_s: float = PATIENCE_S) -> Mapping[str, str]:
        """The fields of a job that has ended."""
        self._wait(f"job {number}", lambda: self.job(number)["JobState"] in ENDED, timeout_s)
        return self.job(number)

    def _jobs(self) -> list[str]:
        if not self._daemons:
            return []
        return self.command("squeue", "-h", "-o", "%A", check=False).split()

    def _run_daemon(self, *arguments: str) -> None:
        log = (self.folder / f"{arguments[0]}.out").open("ab")
        self._daemons.append(
            subprocess.Popen(
                arguments, env=self.environment, stdout=log, stderr=log, start_new_session=True
            )
        )

    def _wait(self, what: str, reached: Callable[[], bool], timeout_s: float = 60) -> None:
        deadline = time.monotonic() + timeout_s
        while not reached():
            assert time.monotonic() < deadline, f"{what}: not within {timeout_s} s\n{self._logs()}"
            time.sleep(0.5)

    def _logs(self) -> str:
        logs = sorted([*self.folder.glob("*.log"), *self.folder.glob("*.out")])
        tails = (f"--- {log.name}\n{log.read_text(errors='replace')[-1500:]}" for log in logs)
        return "\n".join([self.command("squeue", check=False), *tails])


def _path() -> str:
    """Debian keeps daemons out of the search path of users."""
    return os.pathsep.join([os.environ["PATH"], "/usr/local/sbin", "/usr/sbin", "/sbin"])


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports
