"""Stand-ins for commands of a cluster: ssh, pdsh, sbatch, srun, scontrol and kubectl.

`python stand_ins.py NAME ARGUMENTS...` does what NAME would do on the nodes of namespaces.py, as
far as the documents and scripts of this project use it. `install` puts the commands on a PATH.
`python stand_ins.py sshd ADDRESS` runs on every node and is the server that the other nodes connect
to. It runs the commands of any client, so it is only for nodes without a connection to the outside.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shlex
import socket
import socketserver
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

PORT = 22
END = b"\0"  # the exit code follows; the output before it is text
STARTS = 5  # of a job, at most
FLAGS = ("requeue", "parsable")  # options of Slurm without a value


def install(folder: Path) -> None:
    """Write the commands to a folder that is then put on the PATH."""
    for name in ("ssh", "pdsh", "sbatch", "srun", "scontrol", "kubectl"):
        (folder / name).write_text(
            f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {shlex.quote(__file__)} {name} "$@"\n'
        )
        (folder / name).chmod(0o755)


# ssh and pdsh: a command line on another node.


def sshd(address: str) -> int:
    """Serve requests for ever.

    A request is one line of JSON. The answer is the command's output, END and the exit code.
    """

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            asked = json.loads(self.rfile.readline())
            options: Any = {
                "stdin": subprocess.DEVNULL,
                "stdout": self.connection,
                "stderr": subprocess.STDOUT,
            }
            environment = {**os.environ, **asked["environment"]}
            process = subprocess.Popen(
                ["sh", "-c", asked["command"]], env=environment, start_new_session=True, **options
            )
            self.connection.sendall(END + str(process.wait()).encode())

    class Server(socketserver.ThreadingTCPServer):
        allow_reuse_address = True

    with Server((address, PORT), Handler) as server:
        print("ready", flush=True)
        server.serve_forever()
    return 0


def remote(
    host: str, command: str, environment: dict[str, str] | None = None, prefix: str = ""
) -> int:
    """Run a command line on a node, and print its output here.

    Returns:
        The exit code; like ssh, 255 where the node cannot be reached.
    """
    try:
        with (
            socket.create_connection((host, PORT), timeout=10) as connection,
            connection.makefile("rb") as answer,
        ):
            connection.settimeout(None)
            connection.sendall(
                json.dumps({"command": command, "environment": environment or {}}).encode() + b"\n"
            )
            for line in answer:
                text, end, code = line.partition(END)
                if text:
                    sys.stdout.write(prefix + text.decode(errors="replace"))
                    sys.stdout.flush()
                if end:
                    return int(code) if int(code) >= 0 else 128 - int(code)
    except OSError as error:
        print(f"{host}: {error}", file=sys.stderr)
    return 255


def ssh(arguments: list[str]) -> int:
    """Run `[-o OPTION] HOST COMMAND...`."""
    while arguments[0] == "-o":
        arguments = arguments[2:]
    host, *command = arguments
    return remote(host, " ".join(command))


def pdsh(arguments: list[str]) -> int:
    """Run `-S -f FANOUT -w HOST,HOST COMMAND...`: the command on all hosts; %n is a host's number.

    Returns:
        The largest exit code.
    """
    assert arguments[:2] == ["-S", "-f"] and arguments[3] == "-w"
    hosts, command = arguments[4].split(","), " ".join(arguments[5:])
    with ThreadPoolExecutor(len(hosts)) as pool:
        return max(
            pool.map(
                lambda i: remote(hosts[i], command.replace("%n", str(i)), prefix=f"{hosts[i]}: "),
                range(len(hosts)),
            )
        )


# Slurm. A job takes as many of node0, node1, ... as it requests. sbatch waits for the job, and
# starts it again if it was requeued.


def sbatch(arguments: list[str]) -> int:
    """Run `[--OPTION=VALUE or --OPTION VALUE]... SCRIPT ARGUMENTS...`, or what `--wrap` says."""
    options: dict[str, str] = {}
    given, rest = _options(arguments)
    if "wrap" in given:
        return _wrapped(given)
    script, *rest = rest
    for line in Path(script).read_text().splitlines():
        if line.startswith("#SBATCH"):
            options |= _options(line.partition("#SBATCH")[2].split("#")[0].split())[0]
    options |= given
    nodes, per_node = int(options["nodes"]), int(options["ntasks-per-node"])
    environment = {
        **os.environ,
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": f"node[0-{nodes - 1}]",
        "SLURM_NTASKS": str(nodes * per_node),
        "SLURM_NTASKS_PER_NODE": str(per_node),
        "SLURM_CPUS_PER_TASK": options["cpus-per-task"],
    }
    with tempfile.TemporaryDirectory() as spool, open("slurm-7.log", "ab") as log:
        for restart in range(STARTS):
            if restart:
                environment["SLURM_RESTART_COUNT"] = str(restart)
            environment["REQUEUED"] = str(Path(spool) / f"requeued-{restart}")
            code = subprocess.run(
                ["bash", script, *rest], env=environment, stdout=log, stderr=log
            ).returncode
            if not Path(environment["REQUEUED"]).exists():
                break
    return code


def _wrapped(options: dict[str, str]) -> int:
    """Run the line of `--wrap` here, as a job or as an array of jobs, and print the job's number.

    A job whose `--dependency` has failed is not run, and counts as failed.
    """
    assert "parsable" in options
    record = Path("slurm-jobs.json")
    codes: list[int] = json.loads(record.read_text()) if record.exists() else []
    number, (kind, _, before) = len(codes) + 1, options.get("dependency", "").partition(":")
    assert kind in ("", "afterok")
    first, _, last = options.get("array", "4294967294").partition("-")  # that of a single job

    def run(index: int) -> int:
        log = options["output"].replace("%A", str(number)).replace("%a", str(index))
        own = {"SLURM_ARRAY_TASK_ID": str(index)} if "array" in options else {}
        with open(log, "ab") as file:
            return subprocess.run(
                ["sh", "-c", options["wrap"]], env={**os.environ, **own}, stdout=file, stderr=file
            ).returncode

    if before and codes[int(before) - 1] != 0:
        codes.append(1)
    else:
        with ThreadPoolExecutor(2) as pool:
            codes.append(max(map(abs, pool.map(run, range(int(first), int(last or first) + 1)))))
    record.write_text(json.dumps(codes))
    print(number)
    return 0


def srun(arguments: list[str]) -> int:
    """Run the command as every task of the job; return the highest exit code."""
    options, command = _options(arguments)
    assert options == {"kill-on-bad-exit": "0", "wait": "600"}
    tasks, per_node = int(os.environ["SLURM_NTASKS"]), int(os.environ["SLURM_NTASKS_PER_NODE"])
    line = f"cd {shlex.quote(os.getcwd())} && exec {shlex.join(command)}"

    def run(task: int) -> int:
        own = {
            "SLURM_PROCID": str(task),
            "SLURM_LOCALID": str(task % per_node),
            "SLURM_STEP_NUM_TASKS": str(tasks),
        }
        return remote(f"node{task // per_node}", line, {**os.environ, **own})

    with ThreadPoolExecutor(tasks) as pool:
        return max(pool.map(run, range(tasks)))


def scontrol(arguments: list[str]) -> int:
    """Run `show hostnames LIST` or `requeue JOB`."""
    if arguments[0] == "requeue":
        assert arguments[1:] == [os.environ["SLURM_JOB_ID"]]
        Path(os.environ["REQUEUED"]).touch()
        return 0
    assert arguments[:2] == ["show", "hostnames"]
    first, last = re.fullmatch(  # type: ignore[union-attr]
        r"node\[(\d+)-(\d+)\]", arguments[2]
    ).groups()
    print(*(f"node{i}" for i in range(int(first), int(last) + 1)), sep="\n")
    return 0


def _options(words: list[str]) -> tuple[dict[str, str], list[str]]:
    """Split off the leading options: `--name=value`, `--name value`, or `--name` of a FLAG.

    Returns:
        The options, and the words after them.
    """
    options, words = {}, list(words)
    while words and words[0].startswith("--"):
        name, equals, value = words.pop(0)[2:].partition("=")
        options[name] = value if equals or name in FLAGS else words.pop(0)
    return options, words


# Kubernetes: an Indexed Job with one pod per node, or without a Service, with all pods here. Its
# controller is in `kubectl apply`, which waits for the Job to end.


def kubectl(arguments: list[str]) -> int:
    """Create a secret or run a Job.

    `create secret generic NAME --from-literal=KEY=VALUE` writes a file here. `apply -f FILE` runs a
    Job and returns 0 if it completes, and 1 if it fails.
    """
    import yaml

    if arguments[:3] == ["create", "secret", "generic"]:
        name, literal = arguments[3:]
        option, key, value = literal.split("=", 2)
        assert option == "--from-literal"
        Path(f"secret-{name}.json").write_text(json.dumps({key: value}))
        return 0
    assert arguments[:2] == ["apply", "-f"]
    kinds = {
        document["kind"]: document
        for document in yaml.safe_load_all(Path(arguments[2]).read_text())
    }
    name, job = kinds["Job"]["metadata"]["name"], kinds["Job"]["spec"]
    pod = job["template"]["spec"]
    assert job["completionMode"] == "Indexed" and pod["restartPolicy"] == "Never"
    assert job["completions"] == job["parallelism"]
    (container,) = pod["containers"]
    count = job["completions"]
    if "Service" not in kinds:
        return _complete(name, job, functools.partial(_pod_here, pod))
    assert kinds["Service"]["metadata"]["name"] == pod["subdomain"]
    hosts = "".join(
        f"10.77.0.{i + 1} {name}-{i}.{pod['subdomain']} {name}-{i}\n" for i in range(count)
    )
    work = shlex.quote(os.getcwd())
    volume = f"mount -t tmpfs none /mnt && mkdir /mnt/work && mount --bind {work} /mnt/work"
    for i in range(count):
        code = remote(f"node{i}", f"printf %s {shlex.quote(hosts)} >> /etc/hosts && {volume}")
        assert (
            code == 0
            and container["workingDir"] == "/mnt/work" == container["volumeMounts"][0]["mountPath"]
        )
    environment = {
        item["name"]: item["value"]
        if "value" in item
        else _secret(**item["valueFrom"]["secretKeyRef"])
        for item in container["env"]
    }
    line = f"cd /mnt/work && exec {shlex.join(container['command'] + container['args'])}"

    def start(i: int) -> int:
        own = {**environment, "JOB_COMPLETION_INDEX": str(i)}
        return remote(f"node{i}", line, own, prefix=f"{name}-{i}: ")

    return _complete(name, job, start)


def _pod_here(pod: dict[str, Any], i: int) -> int:
    """Run a pod here, where the current folder is its one volume; return its exit code."""
    (container,), (volume,) = pod["containers"], pod["volumes"]
    (mount,) = container["volumeMounts"]
    assert "persistentVolumeClaim" in volume and mount["name"] == volume["name"]
    assert mount["mountPath"] == container["workingDir"]
    words = [*container["command"], *container["args"]]
    words = [word.replace("$(JOB_COMPLETION_INDEX)", str(i)) for word in words]
    own = {**os.environ, "JOB_COMPLETION_INDEX": str(i)}
    return subprocess.run(words, env=own, stderr=subprocess.STDOUT).returncode


def _complete(name: str, job: dict[str, Any], start: Callable[[int], int]) -> int:
    """Run the pods of a Job until it completes (0) or fails (1); `start` runs one of an index."""

    def index(i: int) -> bool:
        """Run one pod after another until one succeeds; return whether one did."""
        for attempt in range(min(STARTS, job["backoffLimit"])):
            code = start(i)
            print(f"{name}-{i}: start {attempt + 1}: exit code {code}", flush=True)
            if code == 0:
                return True
            if _pod_failure(job["podFailurePolicy"], code) == "FailJob":
                return False
        return False

    with ThreadPoolExecutor(job["parallelism"]) as pool:
        return 0 if all(pool.map(index, range(job["completions"]))) else 1


def _secret(name: str, key: str) -> str:
    return json.loads(Path(f"secret-{name}.json").read_text())[key]


def _pod_failure(policy: dict[str, Any], code: int) -> str:
    """Return the action of the first rule that matches an exit code."""
    for rule in policy["rules"]:
        wanted = rule.get("onExitCodes")
        if wanted and (code in wanted["values"]) == (wanted["operator"] == "In"):
            return rule["action"]
    return "Count"


if __name__ == "__main__":
    command, *rest = sys.argv[1:]
    if command == "sshd":
        sys.exit(sshd(*rest))
    sys.exit(
        {
            "ssh": ssh,
            "pdsh": pdsh,
            "sbatch": sbatch,
            "srun": srun,
            "scontrol": scontrol,
            "kubectl": kubectl,
        }[command](rest)
    )
