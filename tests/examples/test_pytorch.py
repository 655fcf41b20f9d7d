"""The examples in plain PyTorch, small: what they are for happens, and a killed run ends as if nothing had."""

import os
import random
import signal
import subprocess
import sys

import pytest
from frameworks import EXAMPLES, example

torch = pytest.importorskip("torch")
pytest.importorskip("sklearn")
pytest.importorskip("tqdm")

CONFIG = ["--config", str(EXAMPLES / "solver.toml")]
pytestmark = pytest.mark.slow


def test_plain_loop_cleans_its_training_set(capsys):
    found = example("pytorch/plain_loop.py").main([*CONFIG, "--steps", "40"])
    assert found["tuned weights, validation loss"] < 0.5 * found["equal weights, validation loss"]
    assert found["tuned weights, test loss"] < 0.7 * found["equal weights, test loss"]
    assert found["weight of the wrong"] < 0.3 < 0.7 < found["weight of the right"]
    assert "tuned weights, test accuracy" in capsys.readouterr().out


@pytest.mark.parametrize(("loop", "steps"), [("ddp_loop.py", 5), ("fsdp_loop.py", 2)])
def test_a_loop_prints_the_same_on_two_ranks_as_on_one(tmp_path, loop, steps):
    script = [str(EXAMPLES / "pytorch" / loop), *CONFIG, "--steps", str(steps)]
    env = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}
    printed = []
    for ranks in (1, 2):
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(ranks),
            *script,
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path, env=env)
        assert done.returncode == 0, done.stderr
        printed.append([line for line in done.stdout.splitlines() if line.startswith("step")])
        assert f"{ranks} ranks, 2,410 decays" in done.stdout
    assert len(printed[0]) == 2
    assert printed[0] == printed[1]


STEPS = 24


@pytest.fixture(scope="module")
def resumable():
    return example("pytorch/resumable.py")


@pytest.fixture(scope="module")
def undisturbed(resumable):
    """The digest of a run that nothing disturbs."""
    run = resumable.Run()
    for _ in range(STEPS):
        run.advance()
    return run.digest()


def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bits(resumable, tmp_path):
    checkpoint, moments = tmp_path / "run.pt", random.Random(0)

    def command(steps):
        return [sys.executable, resumable.__file__, "--checkpoint", checkpoint, "--steps", str(steps)]

    for _ in range(3):
        kill_at = moments.randrange(2, 9)
        with subprocess.Popen(command(10**9), stdout=subprocess.PIPE, text=True) as process:
            for number, _ in enumerate(process.stdout, 1):
                if number == kill_at:
                    process.kill()  # while it writes the checkpoint of that step, or computes another
        assert process.returncode == -signal.SIGKILL
    steps = torch.load(checkpoint)["step"] + 3  # how far it came until the kills arrived, the machine decides
    done = subprocess.run(command(steps), stdout=subprocess.PIPE, text=True, check=True)
    run = resumable.Run()
    while run.step < steps:
        run.advance()
    assert done.stdout.split()[-2:] == ["digest", run.digest()]


@pytest.fixture(scope="module")
def halfway(resumable, tmp_path_factory):
    path, run = tmp_path_factory.mktemp("state") / "run.pt", resumable.Run()
    for _ in range(STEPS // 2 + 1):
        run.advance()
    resumable.save(run.state(), path)
    return path


def resume(resumable, halfway, without=None):
    """Go on from a checkpoint, one part of which is that of a new run: `optimizer`, or `solver.calls`."""
    run, state = resumable.Run(), torch.load(halfway)
    if without:
        *parents, part = without.split(".")
        inside, fresh = state, resumable.Run().state()
        for parent in parents:
            inside, fresh = inside[parent], fresh[parent]
        inside[part] = fresh[part]
    run.load(state)
    while run.step < STEPS:
        run.advance()
    return run.digest()


def test_a_whole_checkpoint_resumes_bit_for_bit(resumable, undisturbed, halfway):
    assert resume(resumable, halfway) == undisturbed


PARTS = ["net", "decays", "optimizer", "scheduler", "outer_optimizer", "solver", "random", "step"]
MEMORY = ["solver.adjoint", "solver.previous", "solver.state", "solver.calls"]


def test_all_that_is_in_a_checkpoint_is_tried_below(halfway):
    state = torch.load(halfway)
    assert sorted(state) == sorted(PARTS)
    assert {f"solver.{name}" for name in state["solver"]} == {
        *MEMORY,
        "solver.format",
        "solver.solver",
        "solver.counts",
        *(f"solver.{name}" for name in ("damping", "image", "residual_norm")),  # None: the example gives a damping
    }


@pytest.mark.parametrize("part", PARTS + MEMORY)
@pytest.mark.filterwarnings("ignore::bilevel.SolverWarning")  # fresh weights are far from where the run was
def test_nothing_in_a_checkpoint_could_be_left_out(resumable, undisturbed, halfway, part):
    assert resume(resumable, halfway, without=part) != undisturbed
