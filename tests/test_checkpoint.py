"""Checkpoints under kills, damage, full disks and other meshes: complete, invisible, or refused by name."""

import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxpost import manifest
from jaxpost.checkpoint import CheckpointConfig, Checkpointer, tree_bytes
from jaxpost.errors import CheckpointError
from jaxpost.types import TrainState


def make_state(value=0.0, sharding=None):
    """Every kind of leaf a run has: fp32, bf16, ints, bool, zero size, lists, named tuples by way of a dataclass."""
    w = jnp.arange(64, dtype=jnp.float32).reshape(8, 8) + value
    params = {
        "policy": {
            "embed": w if sharding is None else jax.device_put(w, sharding),
            "prefix": [jnp.full((3,), value, jnp.bfloat16)],
            "empty": jnp.zeros((2, 0)),
        }
    }
    opt_state = ({"mu": jnp.full((8, 8), value + 0.25)}, None, jnp.int32(7))
    return TrainState(jnp.int32(int(value)), params, opt_state, {}, {"flag": jnp.bool_(True)})


def abstract(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def save_steps(folder, steps, **config):
    with Checkpointer(folder, CheckpointConfig(**config)) as checkpointer:
        checkpointer.preflight()
        for step in steps:
            checkpointer.save(step, make_state(step), {"row": step, "big": 2**60}, {"step": step})


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run with steps 10 and 20; tests that damage it copy it first."""
    folder = tmp_path_factory.mktemp("saved")
    save_steps(folder, (10, 20))
    return folder


@pytest.fixture
def damaged(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "run")
    return tmp_path / "run"


def test_round_trip_is_bitwise_with_source_and_meta(saved):
    checkpointer = Checkpointer(saved)
    assert checkpointer.steps() == [10, 20] and checkpointer.latest() == 20
    state, source, meta = checkpointer.restore(20, abstract(make_state()))
    same(state, make_state(20))
    assert source == {"row": 20, "big": 2**60} and meta == checkpointer.meta(20) == {"step": 20}


def test_parameters_alone_can_be_read(saved):
    checkpointer = Checkpointer(saved)
    wanted = {"policy": {"embed": abstract(make_state()).params["policy"]["embed"]}}
    same(checkpointer.restore_params(10, wanted), {"policy": {"embed": make_state(10).params["policy"]["embed"]}})
    leaves = checkpointer.leaves(10)
    assert leaves["params.policy.empty"].shape == (2, 0) and leaves["params.policy.prefix.0"].dtype == jnp.bfloat16


def test_a_tree_without_elements_is_saved_too(tmp_path):
    state = {"params": {"policy": {}}, "x": jnp.zeros((0, 3))}
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state, {}, {})
        same(checkpointer.restore(1, state)[0], state)


def test_a_donated_step_does_not_wait_and_does_not_change_what_is_saved(tmp_path):
    """The trap: a view of the buffer held for the write turns donation off, or the write sees the next step's bytes."""
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x * 3 + 1, tree), donate_argnums=0)
    state = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(1500, 1500)), jnp.float32), "v": jnp.ones((7,))}
    step(jax.tree.map(jnp.copy, state))  # compile
    expected, pointer = jax.tree.map(np.array, state), state["w"].unsafe_buffer_pointer()
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state, {}, {})
        old = state
        state = step(state)
        assert old["w"].is_deleted() and state["w"].unsafe_buffer_pointer() == pointer  # donated, in place
        for _ in range(5):
            state = step(state)
        restored, *_ = checkpointer.restore(1, abstract(state))
    same(restored, expected)
    jax.block_until_ready(step(restored))
    assert restored["w"].is_deleted()  # what was restored can be donated too


def test_retention_keeps_the_newest_and_every_kth(tmp_path):
    save_steps(tmp_path, range(1, 8), keep=2, keep_every=3)
    assert Checkpointer(tmp_path).steps() == [3, 6, 7]
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {"3", "6", "7", "LATEST"}


def test_blocking_writes_are_complete_on_return(tmp_path):
    checkpointer = Checkpointer(tmp_path, CheckpointConfig(async_write=False))
    checkpointer.save(1, make_state(1), {}, {})
    assert Checkpointer(tmp_path).latest() == 1
    checkpointer.close()


def test_a_step_can_be_saved_again(tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, make_state(1), {}, {})
        checkpointer.save(1, make_state(2), {}, {})
        same(checkpointer.restore(1, abstract(make_state()))[0], make_state(2))


@pytest.mark.parametrize("spec", [P("a", "b"), P(None, ("a", "b")), P()])
def test_restores_onto_another_mesh(tmp_path, spec):
    one = jax.make_mesh((8,), ("a",), axis_types=(AxisType.Auto,))
    state = make_state(5, NamedSharding(one, P("a")))
    other = jax.make_mesh((2, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:4])
    target = make_state(0, NamedSharding(other, spec))
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(5, state, {}, {})
        restored, *_ = checkpointer.restore(5, abstract(target))
    same(restored, state)
    assert restored.params["policy"]["embed"].sharding == NamedSharding(other, spec)


def test_a_tree_that_does_not_fit_is_refused_field_by_field(saved):
    state = make_state()
    policy = state.params["policy"]
    policy["embed"] = jnp.zeros((8, 9))
    policy["prefix"] = [jnp.zeros((3,), jnp.float32)]
    policy["extra"] = policy.pop("empty")
    with pytest.raises(CheckpointError) as error:
        Checkpointer(saved).restore(20, state)
    text = str(error.value)
    assert "params.policy.embed: saved float32[8,8], this run has float32[8,9]" in text
    assert "params.policy.prefix.0: saved bfloat16[3], this run has float32[3]" in text
    assert (
        "params.policy.extra: not in the checkpoint" in text and "params.policy.empty: in the checkpoint only" in text
    )
    assert "\n" not in text


def test_a_missing_step_names_those_that_are_there(saved):
    with pytest.raises(CheckpointError, match="no checkpoint of step 15 .*there: 10, 20"):
        Checkpointer(saved).restore(15, make_state())


# Damage


def files_of(folder, step=20):
    root = folder / "checkpoints" / str(step)
    return sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file())


def refused_then_falls_back(folder, name):
    """The damaged file is named, nothing is returned; with allow_fallback step 10 comes back whole."""
    checkpointer = Checkpointer(folder)
    assert checkpointer.latest() == 20
    with pytest.raises(CheckpointError, match="step 20.*--allow_fallback") as error:
        checkpointer.restore(20, make_state())
    assert name in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(CheckpointError, match="step 20"):
        checkpointer.restore_params(20, make_state().params)
    state, source, _ = checkpointer.restore(20, make_state(), allow_fallback=True)
    same(state, make_state(10))
    assert source["row"] == 10


def test_each_file_deleted_in_turn_is_named(damaged):
    names = files_of(damaged)
    assert len(names) > 8 and "manifest.json" in names
    for name in names:
        path = damaged / "checkpoints" / "20" / name
        content = path.read_bytes()
        path.unlink()
        refused_then_falls_back(damaged, f"{name} is missing")
        path.write_bytes(content)
    same(Checkpointer(damaged).restore(20, make_state())[0], make_state(20))


def change(path, rng):
    """Flip bits of one byte, cut the tail, or append; returns the sentence expected of the manifest."""
    content = bytearray(path.read_bytes())
    kind = rng.choice(["flip", "flip", "cut", "append"])
    if kind == "flip":
        content[rng.randrange(len(content))] ^= rng.randrange(1, 256)
    elif kind == "cut":
        del content[rng.randrange(len(content)) :]
    else:
        content += bytes([rng.randrange(256)])
    path.write_bytes(content)


def flips(folder, seeds):
    names = files_of(folder)
    for seed in seeds:
        rng = random.Random(seed)
        path = folder / "checkpoints" / "20" / names[seed % len(names)]
        content = path.read_bytes()
        change(path, rng)
        try:
            state, *_ = Checkpointer(folder).restore(20, make_state())
        except CheckpointError as error:
            assert "step 20" in str(error) and path.name in str(error)
        else:  # white space of the manifest may change; a weight may not
            assert path.name == "manifest.json", f"seed {seed}: a changed {path} was not noticed"
            same(state, make_state(20))
        path.write_bytes(content)


def test_changed_bytes_are_never_restored(damaged):
    flips(damaged, range(40))


@pytest.mark.slow
def test_changed_bytes_are_never_restored_200(damaged):
    flips(damaged, range(40, 240))


def test_a_run_goes_on_after_a_fallback_without_the_damaged_step(damaged):
    (damaged / "checkpoints" / "20" / "source.json").write_text("{}")
    with Checkpointer(damaged) as checkpointer:
        checkpointer.preflight()
        checkpointer.restore(20, make_state(), allow_fallback=True)
        checkpointer.save(15, make_state(15), {}, {})
        checkpointer.wait()
        assert checkpointer.steps() == [10, 15]


def test_nothing_sound_is_an_error_even_with_fallback(damaged):
    for step in (10, 20):
        (damaged / "checkpoints" / str(step) / "tree.json").unlink()
    with pytest.raises(CheckpointError, match="no sound checkpoint at or before step 20"):
        Checkpointer(damaged).restore(20, make_state(), allow_fallback=True)


# Kills and disks


def test_leftovers_of_killed_saves_are_ignored_then_removed(damaged):
    folder = damaged / "checkpoints"
    (folder / "30" / "state.orbax-checkpoint-tmp").mkdir(parents=True)
    (folder / "10.trash").mkdir()
    (folder / "20" / "manifest.json.tmp").write_text("{")
    checkpointer = Checkpointer(damaged)
    assert checkpointer.steps() == [10, 20]
    checkpointer.preflight()
    assert {p.name for p in folder.iterdir()} == {"10", "20", "LATEST"}
    same(checkpointer.restore(20, make_state())[0], make_state(20))


def child(script, folder, **popen):
    environment = os.environ | {"PYTHONPATH": f"{Path(__file__).parent}{os.pathsep}{Path(__file__).parent.parent}"}
    command = [sys.executable, "-c", "import conftest\nfrom test_checkpoint import *\n" + script, str(folder)]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **popen
    )


def big_state(step):
    rng = np.random.default_rng(step)
    return {
        "step": jnp.int32(step),
        "w": jnp.asarray(rng.normal(size=(400_000,)), jnp.float32),
        "v": jnp.full((9,), step),
    }


SAVE_FOREVER = """
with Checkpointer(sys.argv[1], CheckpointConfig(keep=2)) as checkpointer:
    checkpointer.preflight()
    step = 0
    while True:
        step += 1
        checkpointer.save(step, big_state(step), {"row": step}, {})
        print(step, flush=True)
"""


def killed_run_is_whole(folder, seed):
    process = child(SAVE_FOREVER, folder)
    for _ in range(4):
        process.stdout.readline()
    time.sleep(random.Random(seed).uniform(0, 0.15))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    with Checkpointer(folder) as checkpointer:
        latest = checkpointer.latest()
        assert latest >= 3
        checkpointer.preflight()
        assert checkpointer.latest() == latest
        for step in checkpointer.steps():  # none is listed that does not restore
            state, source, _ = checkpointer.restore(step, big_state(0))
            same(state, big_state(step))
            assert source == {"row": step}
        checkpointer.save(latest + 1, big_state(latest + 1), {}, {})


@pytest.mark.parametrize("seed", range(2))
def test_kill_9_at_any_time_leaves_a_whole_step(tmp_path, seed):
    killed_run_is_whole(tmp_path, seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 22))
def test_kill_9_at_any_time_leaves_a_whole_step_20(tmp_path, seed):
    killed_run_is_whole(tmp_path, seed)


def test_a_kill_before_any_file_operation_leaves_a_whole_step(tmp_path):
    """What the disk holds just before each file operation of two saves is what a kill there would leave: try all."""
    folder, pictures = tmp_path / "run", tmp_path / "pictures"
    inside, count, on = threading.local(), itertools.count(), threading.Event()
    events = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "shutil.rmtree"}

    def before(event, arguments):
        busy = getattr(inside, "busy", False)
        if not on.is_set() or busy or event not in events or not str(arguments[0]).startswith(str(folder)):
            return
        if event == "open" and arguments[1] in ("r", "rb"):
            return
        inside.busy = True
        with contextlib.suppress(shutil.Error):  # a lock file of a running write vanished while it was copied
            shutil.copytree(folder, pictures / f"{next(count):04}")
        inside.busy = False

    sys.addaudithook(before)  # cannot be taken away again: `on` silences it
    with Checkpointer(folder, CheckpointConfig(keep=1)) as checkpointer:
        checkpointer.save(1, make_state(1), {}, {})
        checkpointer.wait()
        on.set()
        for step in (2, 3):
            checkpointer.save(step, make_state(step), {}, {})
            checkpointer.wait()
        on.clear()

    latest, checked = 1, set()
    for picture in sorted(pictures.iterdir()):
        checkpointer = Checkpointer(picture)
        steps = checkpointer.steps()
        assert steps and steps[-1] >= latest
        latest = steps[-1]
        for step in steps:
            assert manifest.problems(checkpointer.folder / str(step), step) == [], picture
        checkpointer.preflight()
        assert checkpointer.steps() == steps
        assert {p.name for p in checkpointer.folder.iterdir()} <= {*map(str, steps), "LATEST"}
        if latest not in checked:
            checked.add(latest)
            same(checkpointer.restore(latest, make_state())[0], make_state(latest))
    assert checked == {1, 2, 3} and next(count) > 30


FULL_DISK = """
import resource
checkpointer = Checkpointer(sys.argv[1])
checkpointer.preflight()
checkpointer.save(1, big_state(1), {}, {})
checkpointer.wait()
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
try:
    checkpointer.save(2, big_state(2), {}, {})
    checkpointer.close()
except CheckpointError as error:
    print(error)
print(checkpointer.steps())
checkpointer.restore(1, big_state(0))
print("restored")
"""


def test_a_full_disk_is_one_line_and_the_older_step_stays(tmp_path):
    output, errors = child(FULL_DISK, tmp_path).communicate(timeout=60)
    message, listing, end = output.splitlines()[-3:]
    assert message.startswith(
        f"step 2 could not be saved in {tmp_path}/checkpoints: File too large; it needs about 1.5 MiB"
    )
    assert listing == "[1]" and end == "restored", errors
    assert "site-packages/orbax" not in errors  # it would print a traceback of what it raises
    checkpointer = Checkpointer(tmp_path)
    checkpointer.preflight()  # Orbax's threads may have written a little after the failure
    assert {p.name for p in checkpointer.folder.iterdir()} == {"1", "LATEST"}


def test_a_disk_too_small_is_refused_before_the_first_step(tmp_path):
    with pytest.raises(CheckpointError, match="a checkpoint needs 1024.0 TiB"):
        Checkpointer(tmp_path).preflight(2**50)
    assert tree_bytes(make_state()) == 64 * 4 * 2 + 3 * 2 + 4 + 4 + 1


def test_a_folder_that_cannot_be_written_is_refused_before_the_first_step(tmp_path):
    (tmp_path / "checkpoints").write_text("in the way")
    with pytest.raises(CheckpointError, match="cannot be written to .*checkpoints: "):
        Checkpointer(tmp_path).preflight()


def test_a_failed_write_is_raised_by_the_next_call_and_the_run_may_go_on(tmp_path, monkeypatch):
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(1, make_state(1), {}, {})
    checkpointer.wait()

    def refuse(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("jaxpost.manifest.write", refuse)
        checkpointer.save(2, make_state(2), {}, {})
        with pytest.raises(CheckpointError, match="step 2 could not be saved .*: No space left on device"):
            checkpointer.wait()
    assert checkpointer.steps() == [1]
    checkpointer.save(3, make_state(3), {}, {})
    checkpointer.close()
    assert checkpointer.steps() == [1, 3]


def test_a_source_state_that_is_not_json_is_a_bug_said_at_once(tmp_path):
    with pytest.raises(ValueError):
        Checkpointer(tmp_path).save(1, make_state(), {"x": float("nan")}, {})
    assert not (tmp_path / "checkpoints").exists()


def test_later_changes_of_the_source_state_do_not_reach_the_disk(tmp_path):
    source = {"rows": [1]}
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, make_state(), source, {})
        source["rows"].append(2)
        checkpointer.wait()
    assert json.loads((tmp_path / "checkpoints" / "1" / "source.json").read_text()) == {"rows": [1]}
