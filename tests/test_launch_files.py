"""The files of experiments/launch: their own commands suit the machines that they name, and two of them run here."""

import contextlib
import importlib
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys

import pytest
from test_sharding import Chip, pod
from test_trainer import TINY

from dit_video import planning
from dit_video.sharding import check_layout, make_mesh

ROOT = pathlib.Path(__file__).resolve().parent.parent
LAUNCH = ROOT / "experiments" / "launch"
SCRIPTS = sorted(path.name for path in LAUNCH.iterdir() if path.suffix in (".sh", ".sbatch"))


def hosts(kind, platform, count, devices):
    """Machines, each a process and, as jax tells GPUs, a slice of its own."""
    place = lambda n: Chip(n, kind, (), n // devices, n // devices, platform=platform)
    return [place(n) for n in range(count * devices)]


def machines(text):
    """The devices that a file says it is for."""
    number = lambda pattern: int(re.search(pattern, text)[1])
    if found := re.search(r"v5p:(\d+)x(\d+)x(\d+)", text):
        return pod("TPU v5", *map(int, found.groups()))
    if "--nodes" in text:
        return hosts("NVIDIA H100", "gpu", number(r"--nodes=(\d+)"), number(r"--gpus-per-node=(\d+)"))
    if "GPUs" in text:
        return hosts("NVIDIA H100", "gpu", 1, number(r"for (\d+) GPUs"))
    return hosts("cpu", "cpu", number(r"local\.sh (\d+) "), 1)


def command(text, devices):
    """The config that a file's command asks for."""
    given = dict(re.findall(r"--(config[.\w]*)=(\S+)", text.replace('"$gpus"', str(len(devices)))))
    path, _, form = given.pop("config").removesuffix(".py").partition(".py:")
    config = importlib.import_module(path.replace("/", ".")).get_config(*filter(None, [form]))
    value = lambda given: int(given) if given.isdecimal() else given
    config.update_from_flattened_dict({key.removeprefix("config."): value(v) for key, v in given.items()})
    return config


@pytest.mark.parametrize("name", [*SCRIPTS, "gke-jobset.yaml"])
def test_a_files_command_suits_its_machines(name):
    text = (LAUNCH / name).read_text()
    devices = machines(text)
    config = command(text, devices)
    mesh = make_mesh(config.mesh, devices)
    check_layout(config, mesh)
    planning.check_shares(config, mesh)
    assert config.data.kind == "shapes" or config.data.root.startswith(("gs://BUCKET/", "/shared/", "FOLDER"))
    assert re.search(r"--workdir=\S", text)


def test_the_jobset_is_of_its_topology():
    """Pods, chips of a pod and the topology that the nodes have say the same number."""
    text = (LAUNCH / "gke-jobset.yaml").read_text()
    number = lambda key: int(re.search(rf"(?m)^ +{key}: (\d+)$", text)[1])
    devices, sides = machines(text), re.search(r"gke-tpu-topology: (\d+)x(\d+)x(\d+)", text).groups()
    assert pod("TPU v5", *map(int, sides)) == devices
    assert number("parallelism") == number("completions") == len({d.process_index for d in devices})
    assert number("google.com/tpu") * number("parallelism") == len(devices) and number("replicas") == 1


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_can_be_read(name):
    subprocess.run(["bash" if name.endswith(".sbatch") else "sh", "-n", LAUNCH / name], check=True)


# What another shell is given runs at once, in a folder of its own, where Python, pip and uv only tell what they were
# given; to what else it is asked the stand-in says yes.
STAND_IN = """#!/bin/sh
for given; do
    case $given in --command=*) cd "$HOSTS" && exec sh -c "${given#--command=}" ;; esac
done
case " $* " in *" scp "*) cp "$5" "$HOSTS" ;; esac
"""
TELLS = """#!/bin/sh
for given; do printf '%s\\0' "$given" >>"$HOSTS/given"; done
"""


@pytest.mark.parametrize(("name", "tool"), [("tpu-vm.sh", "gcloud"), ("gke-xpk.sh", "xpk")])
def test_flags_reach_the_hosts_as_they_were_given(tmp_path, name, tool):
    """Spaces, quotes and what a shell would take for its own; and the Python is not the one that the host has."""
    if name == "tpu-vm.sh" and not (ROOT / ".git").exists():
        pytest.skip("what is sent to the hosts is taken from git")
    flags = ["--config.data.drop=(0.5, 0.5)", '--config.sample.prompts=("16x16x1@8: a dog\'s $HOME",)', "--a=\\*"]
    hosts, python = tmp_path / "hosts", tmp_path / "hosts" / "dit_video" / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    for path, program in ((tmp_path / tool, STAND_IN), (python, TELLS), (tmp_path / "python", TELLS)):
        path.write_text(program)
        path.chmod(0o755)
    for other in ("python3", "pip", "pip3", "uv", "sudo"):  # nothing is installed on this machine, whatever is asked
        (tmp_path / other).symlink_to("python")
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "HOSTS": str(hosts)}
    env |= dict.fromkeys(("NAME", "ZONE", "TYPE", "CLUSTER", "IMAGE"), "x")
    subprocess.run(["sh", LAUNCH / name, *flags], env=env, check=True, timeout=120)
    given = (hosts / "given").read_text().split("\0")[:-1]
    assert given[-5:] == ["-m", "dit_video.train", *flags]
    assert name != "tpu-vm.sh" or given[given.index("install") :][:4] == ["install", "-q", "--user", "uv"]


@pytest.mark.parametrize("given", [[], ["--config.mesh.data=2"]])
def test_flags_of_a_gpu_machine_can_be_parsed(tmp_path, given):
    """Where a value of the config comes before the config, absl knows no such flag."""
    folder = tmp_path / "experiments" / "launch"
    folder.mkdir(parents=True)
    shutil.copy(LAUNCH / "gpu.sh", folder)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").write_text(f"PATH={tmp_path}:$PATH")
    tells = (
        f'#!/bin/sh\n[ "$1" = -c ] && echo 1 && exit\nfor flag; do printf "%s\\0" "$flag" >>{tmp_path}/given; done\n'
    )
    for name in ("python", "pip"):
        (tmp_path / name).write_text(tells.replace("given", "installed") if name == "pip" else tells)
        (tmp_path / name).chmod(0o755)
    flags = [f"--config={ROOT}/configs/shapes.py:quick", *given, f"--workdir={tmp_path / 'run'}"]
    subprocess.run(["sh", folder / "gpu.sh", *flags], check=True, timeout=60)
    found = (tmp_path / "given").read_text().split("\0")[:-1]
    assert found[:2] == ["-m", "dit_video.train"] and found[2:-1] == flags
    assert found[-1] == "--config.mesh.fsdp=1"
    command = [sys.executable, *found, "--config.no_such_key=1"]  # which is told once all before it was parsed
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == 1 and "the config has no such key: " in run.stderr and "no_such_key" in run.stderr


SRUN = """#!/bin/sh
# Two tasks of one node, as srun starts them: the first that fails has the other killed.
shift
export SLURM_STEP_NODELIST=localhost SLURM_NTASKS=2 SLURM_STEP_NUM_NODES=1 SLURM_LOCALID=0
SLURM_PROCID=1 "$@" & other=$!
SLURM_PROCID=0 "$@" || { code=$?; kill -9 $other; exit $code; }
wait $other
"""


@pytest.mark.parametrize(("codes", "ends", "goes_on"), [((75, 75), 0, True), ((0, 0), 0, False), ((1, 0), 1, False)])
def test_a_slurm_job_that_was_stopped_goes_on(tmp_path, codes, ends, goes_on):
    """Of those that save and leave none is killed by another's leaving, nor by the signal itself."""
    stand_ins = {
        "srun": SRUN,
        "scontrol": '#!/bin/sh\necho "$@" >>asked\n',
        # Both get SLURM's signal, which reaches their parents too; the second takes longer to leave.
        "python": "#!/bin/sh\ntrap : TERM\nkill -TERM $PPID\nsleep $SLURM_PROCID\ntouch left-$SLURM_PROCID\n"
        f"[ $SLURM_PROCID = 0 ] && exit {codes[0]}\nexit {codes[1]}\n",
    }
    for name, program in stand_ins.items():
        (tmp_path / name).write_text(program)
        (tmp_path / name).chmod(0o755)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").touch()
    env = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_JOB_ID": "7",
    }
    assert subprocess.run(["bash", LAUNCH / "slurm.sbatch"], env=env, timeout=60).returncode == ends
    asked = (tmp_path / "asked").read_text().split() if (tmp_path / "asked").exists() else []
    assert asked == (["requeue", "7"] if goes_on else [])
    assert (tmp_path / "left-1").exists() == (codes[0] != 1) and not [*tmp_path.glob(".stopped*")]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["local.sh", "slurm.sbatch"])
def test_a_script_runs(tmp_path, name):
    """Two processes join, each with a device, and finish; one of them writes what is left."""
    flags = [f"--config.{key}={value}" for key, value in (TINY | {"steps": 3, "eval_every": 0}).items()]
    flags = [f"--config={ROOT}/configs/shapes.py", "--config.mesh.data=2", f"--workdir={tmp_path / 'run'}", *flags]
    env = os.environ | {
        "XLA_FLAGS": "",
        "PYTHONPATH": str(ROOT),
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_JOB_ID": "1",
    }
    env["PATH"] = f"{tmp_path}:{pathlib.Path(sys.executable).parent}:{env['PATH']}"
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").touch()
    (tmp_path / "srun").write_text(SRUN)
    (tmp_path / "srun").chmod(0o755)
    start = ["sh", LAUNCH / name, "2"] if name == "local.sh" else ["bash", LAUNCH / name]
    log = tmp_path / "log"
    with open(log, "w") as out:
        script = subprocess.Popen(
            [*start, *flags], env=env, cwd=tmp_path, stdout=out, stderr=out, start_new_session=True
        )
    try:
        assert script.wait(1800) == 0, log.read_text()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(script.pid, signal.SIGKILL)
    assert log.read_text().count("finished: 3 steps") == 1
    assert len(json.loads((tmp_path / "run" / "versions.json").read_text())["devices"]) == 2
