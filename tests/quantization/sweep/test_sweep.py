"""The engine: what decides a key, what is measured once, what fails alone, the same report after interruptions."""

import io
import json
import logging
import os
import random
import signal
import subprocess
import sys
import time
from concurrent import futures
from dataclasses import replace
from pathlib import Path

import pytest
import sweep_fakes as fakes

from fastvlm.common import staging, threads
from fastvlm.common.errors import CheckFailed, UserError
from quantization.sweep import cluster as sweep_cluster
from quantization.sweep import engine, server
from quantization.sweep import report as sweep_report
from quantization.sweep.recommend import Constraints

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
ROOT = HERE.parents[2]


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    """The child process finds the fakes; a busy machine's scheduler has time to answer."""
    monkeypatch.setenv("PYTHONPATH", str(HERE))
    monkeypatch.setattr(sweep_cluster, "ANSWER", 100)


@pytest.fixture
def points():
    return engine.grid(fakes.RECIPES[:2], fakes.FORMS, fakes.RESOLUTIONS)


def without_timings(document):
    return {name: value for name, value in document.items() if name != "timings"}


def report(points, outcome):
    return sweep_report.document(points, outcome, {}, {}, Constraints())


# The grid


def test_the_grid_is_every_combination(points):
    assert len(points) == len({point["name"] for point in points}) == 8
    assert points[0]["name"] == "fp16 fp16 128" and points[0]["recipe"]["rules"]


def test_every_fault_of_the_grid_is_named_at_once(tmp_path):
    twin = tmp_path / "twin.json"
    twin.write_text(json.dumps(engine.load_recipe("int4").to_json()))
    with pytest.raises(UserError) as caught:
        engine.grid(["int4", "int4x", str(twin), "int4"], ["fp16", "palette5"], [64, 64])
    said = str(caught.value)
    for part in ("int4x", "--quant int4: given twice", "2 recipes have the name int4", "palette5", "64: given twice"):
        assert part in said, said
    assert "\n" not in said


# Keys


def changed_recipe(point):
    recipe = json.loads(json.dumps(point["recipe"]))
    recipe["rules"][0]["pattern"] = "other*"
    return {**point, "recipe": recipe}


@pytest.mark.parametrize(
    "change",
    [
        lambda s, i, p: (s, i, changed_recipe(p)),
        lambda s, i, p: (s, i, {**p, "vision_quant": "int8"}),
        lambda s, i, p: (s, i, {**p, "resolution": 192}),
        lambda s, i, p: (replace(s, inputs={"samples": "other"}), i, p),
        lambda s, i, p: (replace(s, measure=fakes.unwell), i, p),
        lambda s, i, p: (s, {"sources": "other"}, p),
    ],
)
def test_whatever_determines_a_result_is_in_its_key(tmp_path, points, change):
    one = fakes.sweep_of(tmp_path, inputs={"samples": "these"})
    before = engine.key(one, fakes.identity(), points[0])
    assert engine.key(*change(one, fakes.identity(), points[0])) != before


def test_names_and_places_are_not_in_the_key(tmp_path, points):
    here, there = fakes.sweep_of(tmp_path / "a"), fakes.sweep_of(tmp_path / "b", sleep=1)
    same = {**points[0], "name": "another"}
    assert engine.key(here, fakes.identity(), points[0]) == engine.key(there, fakes.identity(), same)


def test_the_code_is_hashed(tmp_path, monkeypatch):
    (tmp_path / "fastvlm").mkdir()
    monkeypatch.setattr(engine, "ROOT", tmp_path)
    seen = [engine.sources_sha256()]
    for name, content in (("a.py", "1"), ("a.py", "2"), ("b.json", "2"), ("c.txt", "2")):
        (tmp_path / "fastvlm" / name).write_text(content)
        seen.append(engine.sources_sha256())
    assert len(set(seen)) == 4 and seen[3] == seen[4]


# Running


def test_a_repeated_sweep_is_free_and_a_larger_one_measures_only_what_is_new(tmp_path, points):
    one = fakes.sweep_of(tmp_path)
    first = engine.run(one, points[:3], jobs=2)
    assert (first.found, len(first.results), first.errors) == (0, 3, {})
    again = engine.run(one, points[:5], jobs=2)
    assert (again.found, len(again.results)) == (3, 5)
    assert set(fakes.runs(tmp_path).values()) == {1} and len(fakes.runs(tmp_path)) == 5
    assert engine.run(replace(one, inputs={"samples": "others"}), points[:1]).found == 0  # negative control


def test_libraries_are_imported_once_and_each_point_has_a_process(tmp_path, points):
    timings = [r["timings"] for r in engine.run(fakes.sweep_of(tmp_path), points[:4], jobs=2).results.values()]
    processes, prepared = ({one[name] for one in timings} for name in ("process", "prepared"))
    assert len(processes) == 4 and len(prepared) == 1 and not prepared & processes
    assert (None not in prepared) == (sys.platform == "linux")
    assert not alive(prepared.pop()), "it ends with the sweep"


def test_what_is_done_apart_says_how_it_ended():
    assert server.apart(os.getppid) == os.getpid()
    with pytest.raises(UserError, match="nowhere"):
        server.apart(engine.load_recipe, "nowhere.json")
    with pytest.raises(CheckFailed, match="_exit: its process was killed"):
        server.apart(os._exit, 9)


def test_a_damaged_result_is_measured_again(tmp_path, points):
    one = fakes.sweep_of(tmp_path)
    before = engine.run(one, points[:2], jobs=2)
    paths = sorted((tmp_path / "points").iterdir())
    paths[0].write_text(paths[0].read_text()[:-20])
    paths[1].write_text(paths[1].read_text().replace('"key": "', '"key": "0'))
    after = engine.run(one, points[:2], jobs=2)
    assert after.found == 0 and report(points, after)["points"] == report(points, before)["points"]


def test_a_failing_point_is_named_and_the_rest_goes_on(tmp_path):
    points = engine.grid(["fp16", "int8"], fakes.FORMS, fakes.RESOLUTIONS)
    outcome = engine.run(fakes.sweep_of(tmp_path, fakes.unwell), points, jobs=2)
    assert len(outcome.results) == 4
    assert outcome.errors["int8 fp16 128"] == "two; lines"
    assert outcome.errors["int8 fp16 256"].startswith("killed by SIGKILL")
    assert outcome.errors["int8 int8 128"] == "exit 7"
    assert outcome.errors["int8 int8 256"] == "division by zero"
    failed = report(points, outcome)["failed"]
    assert [row["name"] for row in failed] == sorted(outcome.errors)
    logs = sorted(path.read_text() for path in (tmp_path / "logs").iterdir())
    assert len(logs) == 4 and any("noise on stdout" in text and "Traceback" in text for text in logs)
    again = engine.run(fakes.sweep_of(tmp_path, fakes.unwell), points, jobs=2)
    assert again.found == 4 and len(again.errors) == 4, "failures are tried again"


def test_a_full_disk_stops_the_sweep(tmp_path, points):
    with pytest.raises(UserError, match=r"^No space left on device: /somewhere: free some.*0 finished points"):
        engine.run(fakes.sweep_of(tmp_path, fakes.no_space), points, jobs=1)


def test_a_figure_that_is_not_finite_is_none(tmp_path, points):
    outcome = engine.run(fakes.sweep_of(tmp_path, fakes.infinite), points[:1])
    assert outcome.results[points[0]["name"]]["figures"]["answer_kl_mean"] is None
    assert outcome.results[points[0]["name"]]["timings"]["peak_bytes"] > 1e6


@pytest.mark.parametrize(("jobs", "memory", "need", "most"), [(3, None, 1, 3), (3, 10, 4, 2), (3, 10, 40, 1)])
def test_points_run_together_as_far_as_memory_allows(tmp_path, points, jobs, memory, need, most, capsys):
    crowd = tmp_path / "crowd"
    crowd.mkdir()
    one = replace(
        fakes.sweep_of(tmp_path / "work", fakes.crowd, crowd=str(crowd), should=most), need=lambda point: need
    )
    outcome = engine.run(one, points[:4], jobs=jobs, memory=memory)
    assert len(outcome.results) == 4
    assert max(result["timings"]["crowd"] for result in outcome.results.values()) == most
    assert {r["timings"]["threads"] for r in outcome.results.values()} == {max(1, threads.cores() // jobs)}
    assert ("will run alone" in capsys.readouterr().err) == (need > (memory or need))


def test_a_second_sweep_on_the_folder_is_refused(tmp_path, points):
    with staging.held(tmp_path, ""), pytest.raises(UserError, match="another sweep runs there"):
        engine.run(fakes.sweep_of(tmp_path), points)
    assert len(engine.run(fakes.sweep_of(tmp_path), points[:1]).results) == 1, "the lock is gone with its holder"


# Interruptions


def program(work, target, *arguments):
    code = "import sweep_fakes, sys; sweep_fakes.main(*sys.argv[1:])"
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, (work, target, *arguments))],
        env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{HERE}", "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE, text=True,
        # A shell that starts the tests in the background has SIGINT ignored, which a child inherits.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


def until(condition, seconds=300):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The report of one process that measures one point after the other."""
    folder = tmp_path_factory.mktemp("whole")
    os.environ["PYTHONPATH"] = str(HERE)  # before the function's own fixture
    points = engine.grid(fakes.RECIPES, fakes.FORMS, fakes.RESOLUTIONS)
    return without_timings(report(points, engine.run(fakes.sweep_of(folder), points, jobs=2)))


@pytest.mark.slow
def test_killed_at_random_moments_the_report_is_the_same(tmp_path, uninterrupted):
    rng, work, target = random.Random(5), tmp_path / "work", tmp_path / "report.json"
    for kill in range(3):
        before = fakes.finished(work)
        process = program(work, target, 2, before + 3)
        until(lambda process=process, before=before: fakes.finished(work) > before or process.poll() is not None)
        time.sleep(rng.uniform(0, 0.4))
        process.kill()
        process.communicate()
        assert not target.exists() and fakes.finished(work) > before, kill
    (work / "points" / ".point.json.1.partial").touch()  # as of a kill in the middle of a write
    assert program(work, target, 3).wait() == 0
    assert without_timings(json.loads(target.read_text())) == json.loads(json.dumps(uninterrupted))
    assert len(uninterrupted["points"]) == 16
    assert max(fakes.runs(work).values()) <= 1 + 3, "a point runs again only when it was killed"
    assert sum(fakes.runs(work).values()) <= 16 + 3 * 2
    assert not list(work.rglob("*.partial"))


def test_a_killed_sweep_takes_its_children_with_it(tmp_path, points):
    process = subprocess.Popen(
        [sys.executable, "-c", "import sys, pathlib, sweep_fakes as f; from quantization.sweep import engine as sweep\n"
         "w = pathlib.Path(sys.argv[1]); p = sweep.grid(['fp16', 'int4'], ['fp16'], [64])\n"
         "sweep.run(f.sweep_of(w, f.patient), p, jobs=2)", str(tmp_path)],
        env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{HERE}"}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    until(lambda: len(fakes.runs(tmp_path)) == 2)
    pids = below(process.pid)
    assert len(pids) >= 1 + 2, "what starts the points, and they"
    process.kill()
    process.communicate()
    until(lambda: not any(map(alive, pids)), 60)


def below(pid):
    """All processes that it and its children started."""
    listed = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True).stdout.split()
    parents, found = dict(zip(map(int, listed[::2]), map(int, listed[1::2]))), []
    for one in [one for one, parent in parents.items() if parent == pid]:
        found += [one, *below(one)]
    return found


def alive(pid):
    """A zombie is dead, too: not every container has somebody to bury it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_ctrl_c_ends_the_children_and_keeps_what_is_finished(tmp_path, uninterrupted):
    work = tmp_path / "work"
    process = program(work, tmp_path / "report.json", 2, 8)
    until(lambda: fakes.finished(work) >= 2)
    process.send_signal(signal.SIGINT)
    assert "KeyboardInterrupt" in process.communicate(timeout=120)[1]
    assert 2 <= fakes.finished(work) < 16
    assert sum(fakes.runs(work).values()) <= fakes.finished(work) + 2


# A cluster


@pytest.fixture(scope="module")
def scheduler():
    """The address of two Dask workers on this machine, each a process."""
    distributed = pytest.importorskip("distributed")
    os.environ["PYTHONPATH"] = f"{ROOT}{os.pathsep}{HERE}"
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None, silence_logs=50
    ) as cluster:
        yield cluster.scheduler_address


def test_two_workers_give_the_report_of_one_process(tmp_path, scheduler, uninterrupted):
    points = engine.grid(fakes.RECIPES, fakes.FORMS, fakes.RESOLUTIONS)
    outcome = engine.run(fakes.sweep_of(tmp_path), points, scheduler=scheduler)
    assert without_timings(report(points, outcome)) == uninterrupted
    assert sum(fakes.runs(tmp_path).values()) == 16


@pytest.mark.parametrize("breaks", [1, 100])
def test_a_connection_that_breaks_while_a_result_is_fetched(tmp_path, scheduler, monkeypatch, breaks):
    import distributed.comm
    import distributed.core

    send_recv, broken, said = distributed.core.send_recv, [], logging.StreamHandler(io.StringIO())

    async def breaking(comm, *, op, **kwargs):
        if op == "gather" and len(broken) < breaks:
            broken.append(op)
            raise distributed.comm.CommClosedError("Connection reset by peer")
        return await send_recv(comm=comm, op=op, **kwargs)

    monkeypatch.setattr(distributed.core, "send_recv", breaking)
    logging.getLogger("tornado.application").addHandler(said)
    try:
        with sweep_cluster.cluster(scheduler, tmp_path, fakes.identity, "run") as (pool, _):
            future = pool.submit(fakes.identity)
            if breaks == 1:
                assert future.result(timeout=120) == fakes.identity()
            else:  # as when the scheduler goes away between two checks: the next one says so, and nobody else
                until(lambda: len(broken) > sweep_cluster.RETRIES)
                with pytest.raises(futures.TimeoutError):
                    future.result(timeout=2)
    finally:
        logging.getLogger("tornado.application").removeHandler(said)
    assert len(broken) == min(breaks, 1 + sweep_cluster.RETRIES) and not said.stream.getvalue()


def test_a_worker_with_other_code_is_refused(tmp_path, scheduler, points, monkeypatch):
    other = replace(fakes.sweep_of(tmp_path), identity=fakes.of_this_process)
    monkeypatch.setenv("SWEEP_FAKES", "changed")
    with pytest.raises(UserError, match=r"has other sources than here.*has other sources than here"):
        engine.run(other, points, scheduler=scheduler)


def test_no_scheduler_is_one_line(tmp_path, points, monkeypatch):
    monkeypatch.setattr(sweep_cluster, "ANSWER", 1)
    with pytest.raises(UserError, match=r"--scheduler tcp://127\.0\.0\.1:9: no Dask scheduler answers there") as caught:
        engine.run(fakes.sweep_of(tmp_path), points, scheduler="tcp://127.0.0.1:9")
    assert "\n" not in str(caught.value)


def test_a_scheduler_that_goes_away_leaves_the_finished_points(tmp_path, uninterrupted):
    distributed = pytest.importorskip("distributed")
    points = engine.grid(fakes.RECIPES, fakes.FORMS, fakes.RESOLUTIONS)
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{HERE}", "OMP_NUM_THREADS": "1"}
    scheduler = subprocess.Popen(
        [sys.executable, "-m", "distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard",
         "--scheduler-file", str(tmp_path / "scheduler.json")], env=environment, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    worker = None
    try:
        file = tmp_path / "scheduler.json"
        until(lambda: file.exists() and file.read_text().rstrip().endswith("}"))  # it is not written at once
        address = json.loads(file.read_text())["address"]
        worker = subprocess.Popen(
            [sys.executable, "-m", "distributed.cli.dask_worker", address, "--nthreads", "1", "--no-nanny",
             "--no-dashboard", "--local-directory", str(tmp_path / "dask")], env=environment, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        with distributed.Client(address, timeout=300, set_as_default=False) as client:
            client.wait_for_workers(1, timeout=300)
        process = program(tmp_path / "work", tmp_path / "report.json", 1, 4, address)
        until(lambda: fakes.finished(tmp_path / "work") >= 2 or process.poll() is not None)
        assert process.poll() is None, process.communicate()[1]
        scheduler.kill()
        said = process.communicate(timeout=300)[1]
        assert process.returncode == 1 and "UserError: --scheduler" in said.splitlines()[-1]
        assert "went away: finished points are kept in" in said.splitlines()[-1]
        assert " - ERROR - " not in said, "Dask's own account of it"
    finally:
        for one in (scheduler, worker):
            if one:
                one.kill()
                one.wait()
    outcome = engine.run(fakes.sweep_of(tmp_path / "work"), points, jobs=2)
    assert outcome.found >= 2 and without_timings(report(points, outcome)) == uninterrupted
